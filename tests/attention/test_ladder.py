"""The ladder: all of ours climb to the top, and what is broken stops at the rung of its fault, with the right words.

`pytest tests/attention/test_ladder.py --attention my_module:MyFlashAttention` sets somebody else's on every rung.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cs336_systems.attention.backends import AttentionFunction, resolve_attention
from cs336_systems.attention.flash import attention as flash_attention
from cs336_systems.attention.ladder import RUNGS, Outcome, Rung, attempt, climb
from cs336_systems.attention.oracle import Exact, allowed_errors, ranges
from cs336_systems.attention.trial import Subject
from cs336_systems.errors import UserError
from cs336_systems.repository import repository_root

# The class itself as well: the function around it shows no logsumexp.
ON_A_CPU = ("reference", "sdpa", "flash", "cs336_systems.attention.flash:FlashAttention")
ON_A_GPU = (
    "flash-triton",
    "flash-triton-tf32",
    "flash-triton-graded",
    "cs336_systems.attention.flash_triton:FlashAttentionTriton",
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every rung of every implementation: ours, or the one that `--attention` names."""
    if "climbing" not in metafunc.fixturenames:
        return
    chosen = metafunc.config.getoption("--attention")
    names = ON_A_CPU if chosen is None else (chosen,)
    metafunc.parametrize(
        ("climbing", "rung"),
        [pytest.param(name, rung, id=f"{name}: {rung.name}: {rung.tests}") for name in names for rung in RUNGS],
    )


def test_it_takes_the_rung(climbing: str, rung: Rung, pytestconfig: pytest.Config) -> None:
    theirs_on_a_gpu = pytestconfig.getoption("--attention") is not None and torch.cuda.is_available()
    device = "cuda" if theirs_on_a_gpu else "cpu"
    try:
        outcome = attempt(rung, resolve_attention(climbing), device)
    except UserError as error:
        pytest.fail(str(error), pytrace=False)
    if outcome.status == "failed":
        pytest.fail("\n".join(filter(None, (outcome.text, outcome.cause))), pytrace=False)
    if outcome.status != "passed":
        pytest.skip(outcome.text)


@pytest.mark.gpu
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("name", ON_A_GPU)
def test_on_a_gpu_the_kernels_climb_to_the_top(name: str) -> None:
    failed = {o.rung.name: o.text for o in climb(resolve_attention(name), "cuda") if o.status == "failed"}
    assert failed == {}


# Broken ones -----------------------------------------------------------------------------------------------------

RIGHT = """
import math
import torch

TILE = 16

class Mine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, Q, K, V, is_causal=False):
        # forward begins
        q, k, v = Q.float(), K.float(), V.float()
        scale = q.shape[-1] ** -0.5
        keys = k.shape[1]
        padded = -(-keys // TILE) * TILE
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, padded - keys)) for x in (k, v))
        m = torch.full_like(q[..., 0], -math.inf)
        l = torch.zeros_like(m)
        acc = torch.zeros_like(q)
        rows = torch.arange(q.shape[1])[:, None]
        for start in range(0, padded, TILE):
            columns = torch.arange(start, start + TILE)
            S = scale * q @ k[:, start:start + TILE].mT
            S = S.masked_fill(columns >= keys, -math.inf)
            if is_causal:
                S = S.masked_fill(columns > rows, -math.inf)
            m_new = torch.maximum(m, S.amax(-1))
            P = torch.exp(S - m_new[..., None])
            rescale = torch.exp(m - m_new)
            l = rescale * l + P.sum(-1)
            acc = rescale[..., None] * acc + P @ v[:, start:start + TILE]
            m = m_new
        O = (acc / l[..., None]).to(Q.dtype)
        L = m + torch.log(l)
        ctx.save_for_backward(Q, K, V, O, L)
        ctx.is_causal = is_causal
        return O

    @staticmethod
    def backward(ctx, dO):
        Q, K, V, O, L = ctx.saved_tensors
        # backward begins
        q, k, v, o, do = (x.float() for x in (Q, K, V, O, dO))
        scale = q.shape[-1] ** -0.5
        S = scale * q @ k.mT
        if ctx.is_causal:
            S = S.masked_fill(torch.arange(k.shape[1]) > torch.arange(q.shape[1])[:, None], -math.inf)
        P = torch.exp(S - L[..., None])
        D = (do * o).sum(-1, keepdim=True)
        dV = P.mT @ do
        dS = P * (do @ v.mT - D)
        dQ = scale * dS @ k
        dK = scale * dS.mT @ q
        return dQ.to(Q.dtype), dK.to(Q.dtype), dV.to(Q.dtype), None
"""
DENSE = "torch.as_strided({0}, {0}.shape, ({0}.shape[1] * {0}.shape[2], {0}.shape[2], 1))"

Changes = list[tuple[str, str]]
# What is changed in RIGHT, the rung where that shows, and what is said of it.
BROKEN: dict[str, tuple[Changes, str, list[str]]] = {
    "the scale is missing": (
        [("        scale = q.shape[-1] ** -0.5\n        keys", "        scale = 1.0\n        keys")],
        "one tile",
        ["off by up to", "all 16 queries", "comes out without the scale 1/√d", "No scale 1/√d"],
    ),
    "the maximum is not subtracted": (
        [("m_new = torch.maximum(m, S.amax(-1))", "m_new = torch.zeros_like(m)")],
        "large scores",
        ["the output is NaN", "maximum of a row is not subtracted"],
    ),
    "nothing is rescaled": (
        [("rescale = torch.exp(m - m_new)", "rescale = torch.ones_like(m)")],
        "several tiles",
        ["the output is off by up to", "of 256 queries", "rescales both l and the accumulator"],
    ),
    "the sum is not rescaled": (
        [("l = rescale * l", "l = l")],
        "several tiles",
        ["rescales both l and the accumulator"],
    ),
    "the maximum starts at 0": (
        [("full_like(q[..., 0], -math.inf)", "zeros_like(q[..., 0])")],
        "rising maximum",
        ["the output is NaN", "all 256 queries", "m starts at 0 instead of −∞"],
    ),
    "keys beyond the end count": (
        [("S = S.masked_fill(columns >= keys, -math.inf)", "pass")],
        "ragged tiles",
        ["17 queries, 17 keys", "loaded as 0", "raise an exception for other lengths"],
    ),
    "the last tile is left out": (
        [("range(0, padded, TILE)", "range(0, keys // TILE * TILE, TILE)")],
        "ragged tiles",
        ["the output is off by up to"],
    ),
    "one length is used for both": (
        [("range(0, padded, TILE)", "range(0, min(padded, q.shape[1]), TILE)")],
        "different lengths",
        ["64 queries, 256 keys", "One length is used for both"],
    ),
    "the scale is that of the padded dimension": (
        [
            (
                "scale = q.shape[-1] ** -0.5\n        keys",
                "scale = (1 << (q.shape[-1] - 1).bit_length()) ** -0.5\n        keys",
            )
        ],
        "head dimension 80",
        ["scale is that of the padded dimension"],
    ),
    "the keys are those of the first item": (
        [("q @ k[:, start", "q @ k[:1, start")],
        "batch items",
        ["of the 3 batch items only 1 to 2", "index or stride is missing"],
    ),
    "strides are assumed": (
        [("# forward begins", f"Q = {DENSE.format('Q')}")],
        "strided inputs",
        ["in memory: dimension before length", "Strides are assumed"],
    ),
    "is_causal is ignored": (
        [("if is_causal:", "if False:")],
        "causal, one tile",
        ["queries 0 to 14; right: 15", "comes out without the mask", "is_causal is ignored"],
    ),
    "the mask is one too high": (
        [("columns > rows", "columns > rows + 1")],
        "causal, one tile",
        ["comes out when a query also sees the key after its own"],
    ),
    "the mask is one too low": (
        [("columns > rows", "columns >= rows")],
        "causal, one tile",
        ["NaN: queries 0; right: 1 to 15", "comes out when a query does not see its own key"],
    ),
    "the mask goes by positions in the tile": (
        [("columns > rows", "columns - start > rows % TILE")],
        "causal, several tiles",
        ["Positions inside the tile are compared"],
    ),
    "the mask is aligned at the lower right": (
        [("columns > rows", "columns > rows + keys - q.shape[1]")],
        "causal, different lengths",
        ["comes out with the mask aligned at the lower right", "64 queries, 256 keys"],
    ),
    "no logsumexp is saved": (
        [("(Q, K, V, O, L)\n        ctx", "(Q, K, V, O)\n        ctx")],
        "logsumexp",
        ["0 saved tensors are of shape (2, 128), not 1", "(2, 128, 32)"],
    ),
    "the maximum is saved as well": (
        [("(Q, K, V, O, L)\n        ctx", "(Q, K, V, O, L, m)\n        ctx")],
        "logsumexp",
        ["2 saved tensors are of shape (2, 128), not 1"],
    ),
    "the logsumexp is in base 2": (
        [("L = m + torch.log(l)", "L = (m + torch.log(l)) / math.log(2)")],
        "logsumexp",
        ["saved logsumexp is off", "comes out in base 2"],
    ),
    "the logsumexp has no logarithm": (
        [("L = m + torch.log(l)", "L = m + l")],
        "logsumexp",
        ["comes out with m + ℓ in place of m + log ℓ"],
    ),
    "dV goes without the transposition": (
        [("dV = P.mT @ do", "dV = P @ do")],
        "gradient of V",
        ["the gradient of V is off", "all 128 keys", "comes out with P in place of its transpose"],
    ),
    "dV is accumulated into what was never written": (
        [("dV = P.mT @ do", "dV = torch.empty_like(v)\n        dV += P.mT @ do")],
        "gradient of V",
        ["the gradient of V is NaN", "memory that was not set to 0"],
    ),
    "D is missing": (
        [("(do @ v.mT - D)", "(do @ v.mT)")],
        "gradient of Q",
        ["comes out without D = rowsum(dO ∘ O)"],
    ),
    "dQ has no scale": ([("scale * dS @ k", "dS @ k")], "gradient of Q", ["comes out without the scale 1/√d"]),
    "dQ is not there": ([("return dQ.to(Q.dtype)", "return None")], "gradient of Q", ["no gradient of Q", "gave None"]),
    "dK has no scale": ([("scale * dS.mT @ q", "dS.mT @ q")], "gradient of K", ["comes out without the scale 1/√d"]),
    "dK goes without the transposition": (
        [("scale * dS.mT @ q", "scale * dS @ q")],
        "gradient of K",
        ["comes out with dS in place of its transpose"],
    ),
    "backward is not masked": (
        [("if ctx.is_causal", "if False")],
        "causal gradients",
        ["comes out when P is recomputed without the mask", "ctx.is_causal = is_causal"],
    ),
    "L is that of the first item": (
        [("S - L[..., None]", "S - L[:1, :, None]")],
        "gradients of batch items and heads",
        ["of the 2 batch items", "missing for dO, O, L or D"],
    ),
    "dO is taken to be contiguous": (
        [("# backward begins", f"dO = {DENSE.format('dO')}")],
        "another upstream gradient",
        ["in backward, it raised RuntimeError: setStorage"],
    ),
    "Q is scaled in place": (
        [
            ("# forward begins", "Q.mul_(Q.shape[-1] ** -0.5)"),
            ("S = scale * q @ k[", "S = q @ k["),
            ("S = scale * q @ k.mT", "S = q @ k.mT"),
            ("scale * dS.mT @ q", "dS.mT @ q"),
        ],
        "unchanged inputs",
        ["forward changed Q in place", "write q = q * scale"],
    ),
    "dO is scaled in place": (
        [("# backward begins", "dO = dO.mul_(2) / 2 if dO.is_contiguous() else dO")],
        "unchanged inputs",
        ["backward changed dO in place"],
    ),
    "the output stays in float32": (
        [("O = (acc / l[..., None]).to(Q.dtype)", "O = acc / l[..., None]")],
        "bfloat16",
        ["the output is torch.float32 for inputs of torch.bfloat16"],
    ),
    "products of two precisions": (
        [("P @ v[:, start:start + TILE]", "P @ v.to(V.dtype)[:, start:start + TILE]")],
        "bfloat16",
        ["it raised RuntimeError: expected"],
    ),
}


def broken(changes: Changes) -> str:
    source = RIGHT
    for old, new in changes:
        assert old in source, old
        source = source.replace(old, new)
    return source


def first_not_passed(function: AttentionFunction, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Outcome:
    return next(outcome for outcome in climb(function, device, dtype) if outcome.status not in ("passed", "skipped"))


def test_what_is_broken_here_is_right_before(write_module: Callable[[str], str]) -> None:
    function = resolve_attention(f"{write_module(RIGHT)}:Mine")
    assert [outcome.rung.name for outcome in climb(function) if outcome.status != "passed"] == []


@pytest.mark.parametrize("fault", BROKEN)
def test_a_fault_stops_at_its_rung_with_words_that_tell_of_it(fault: str, write_module: Callable[[str], str]) -> None:
    changes, rung, words = BROKEN[fault]
    outcome = first_not_passed(resolve_attention(f"{write_module(broken(changes))}:Mine"))
    told = f"{outcome.text}\n{outcome.cause}"
    assert (outcome.rung.name, outcome.status) == (rung, "failed"), told
    assert not [part for part in words if part not in told], told


# What it returns or raises ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("return value[..., :3]", "the output is of shape (1, 1, 16, 3), not (1, 1, 16, 16)"),
        ("return value, value", "it returned a tuple of 2, where one tensor of shape (1, 1, 16, 16) is expected"),
        ("pass", "it returned a NoneType"),
        ("return value.double()", "the output is torch.float64 for inputs of torch.float32"),
        ("return value * float('inf')", "the output is infinite. Infinite: all 16 queries."),
        ("return value * 0", "It is 0 everywhere."),
        ("return value.new_empty(value.shape)", "the output is NaN. NaN: all 16 queries."),
        ("raise KeyError('block')", "it raised KeyError: 'block' at students_module_"),
    ],
)
def test_what_is_no_result_is_told_at_the_first_rung(
    source: str, told: str, write_module: Callable[[str], str]
) -> None:
    name = write_module(f"def mine(query, key, value, *, is_causal):\n    {source}\n")
    outcome = first_not_passed(resolve_attention(f"{name}:mine"))
    assert (outcome.rung.name, outcome.status) == ("one tile", "failed")
    assert told in outcome.text


def test_an_exception_is_told_with_the_line_of_the_students_file_and_no_cause(
    write_module: Callable[[str], str],
) -> None:
    source = (
        "def inner(x):\n    return x.view(3)\n\ndef mine(query, key, value, *, is_causal):\n    return inner(query)\n"
    )
    name = write_module(source)
    outcome = first_not_passed(resolve_attention(f"{name}:mine"))
    assert f"RuntimeError: shape '[3]' is invalid for input of size 256 at {name}.py:2 (16 queries" in outcome.text
    assert outcome.cause == ""


def test_a_function_of_another_signature_is_told_without_a_line_of_ours(write_module: Callable[[str], str]) -> None:
    name = write_module("def mine(query, key, value):\n    return value\n")
    outcome = first_not_passed(resolve_attention(f"{name}:mine"))
    assert "TypeError: mine() got an unexpected keyword argument 'is_causal' (16 queries" in outcome.text


def test_an_output_without_a_gradient_is_told(write_module: Callable[[str], str]) -> None:
    source = inspect.cleandoc("""
        import torch
        from cs336_systems.attention.flash import attention

        @torch.no_grad()
        def mine(query, key, value, *, is_causal):
            return attention(query, key, value, is_causal=is_causal)
    """)
    outcome = first_not_passed(resolve_attention(f"{write_module(source)}:mine"))
    assert outcome.rung.name == "gradient of V"
    assert "the output has no gradient: it was computed under no_grad, or detached" in outcome.text


def test_what_the_course_does_not_ask_for_may_be_refused(write_module: Callable[[str], str]) -> None:
    refusal = """
        for length in (*Q.shape[1:], K.shape[1]):
            if length & (length - 1):
                raise ValueError(f"powers of two alone, not {length}")
        if not Q.is_contiguous():
            raise ValueError("contiguous tensors alone")
    """
    function = resolve_attention(f"{write_module(broken([('        # forward begins', refusal)]))}:Mine")
    outcomes = {outcome.rung.name: outcome for outcome in climb(function) if outcome.status != "passed"}
    assert {outcome.status for outcome in outcomes.values()} == {"not supported"}
    assert list(outcomes) == ["ragged tiles", "head dimension 80", "strided inputs", "gradients of ragged tiles"]
    assert "ValueError: powers of two alone, not 17" in outcomes["ragged tiles"].text


def test_bfloat16_is_not_asked_of_tritons_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    rung = next(rung for rung in RUNGS if rung.name == "bfloat16")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert attempt(rung, flash_attention).status == "skipped"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert attempt(rung, flash_attention).status == "passed"


@pytest.mark.slow
def test_an_implementation_named_to_pytest_is_set_on_every_rung_and_nothing_else_is_run(
    write_module: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    name = write_module(broken(BROKEN["D is missing"][0]))
    settings = ["-c", str(repository_root() / "pyproject.toml"), "-p", "no:cacheprovider", "--verbose"]
    command = [sys.executable, "-m", "pytest", str(Path(__file__).resolve()), *settings, "--attention", f"{name}:Mine"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    told = re.findall(rf"\[{name}:Mine: (.*?): .*\] (PASSED|FAILED|SKIPPED)", done.stdout)
    assert [rung for rung, _ in told] == [rung.name for rung in RUNGS]
    assert next(rung for rung, outcome in told if outcome == "FAILED") == "gradient of Q"
    assert "comes out without D = rowsum(dO ∘ O)" in done.stdout
    assert "deselected" in done.stdout


def test_what_cannot_run_there_at_all_says_so_itself() -> None:
    with pytest.raises(UserError, match="CUDNN_ATTENTION takes no"):
        next(climb(resolve_attention("sdpa-cudnn")))


def test_a_function_shows_no_logsumexp_and_its_class_does() -> None:
    rung = next(rung for rung in RUNGS if rung.name == "logsumexp")
    assert attempt(rung, flash_attention).status == "skipped"
    assert attempt(rung, resolve_attention("cs336_systems.attention.flash:FlashAttention")).status == "passed"


def test_every_rung_has_a_name_a_test_and_a_cause_of_its_own() -> None:
    assert len({rung.name for rung in RUNGS}) == len(RUNGS)
    assert len({rung.tests for rung in RUNGS}) == len(RUNGS)
    assert all(rung.cause.endswith(".") for rung in RUNGS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_ours_climb_in_other_precisions(dtype: torch.dtype) -> None:
    outcomes = list(climb(flash_attention, "cpu", dtype))
    assert {outcome.status for outcome in outcomes} == {"passed", "skipped"}


def test_a_device_that_an_earlier_kernel_broke_is_told_without_a_traceback() -> None:
    def check(_: Subject) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore of it")

    outcome = attempt(Rung("any", "anything", "Nothing.", check), flash_attention)
    assert outcome.status == "failed"
    assert outcome.text.endswith("run before: AcceleratorError: CUDA error: an illegal memory access was encountered")


def test_nothing_saved_is_told_of_an_output_that_has_no_gradient(write_module: Callable[[str], str]) -> None:
    name = write_module(broken([("return O", "ctx.mark_non_differentiable(O)\n        return O")]))
    rung = next(rung for rung in RUNGS if rung.name == "logsumexp")
    outcome = attempt(rung, resolve_attention(f"{name}:Mine"))
    assert outcome.text == "0 saved tensors are of shape (2, 128), not 1; saved: none"


def test_a_trial_leaves_the_choice_of_deterministic_algorithms_as_it_was() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    attempt(RUNGS[0], flash_attention)
    assert torch.are_deterministic_algorithms_enabled() is before


# What is compared with -------------------------------------------------------------------------------------------


def drawn_exact(offset: int | None, dtype: torch.dtype = torch.float64) -> Exact:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, 2, length, 8, generator=generator, dtype=torch.float64) for length in (5, 7, 7, 5)]
    query, key, value, grad_output = (x.to(dtype) for x in tensors)
    return Exact.of(query, key, value, grad_output, offset)


@pytest.mark.parametrize("offset", [None, 0, 2])
def test_the_oracle_is_pytorchs_attention_and_its_gradients_in_float64(offset: int | None) -> None:
    exact = drawn_exact(offset)
    query, key, value = (x.clone().requires_grad_() for x in (exact.query, exact.key, exact.value))
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=exact.visible)
    grads = torch.autograd.grad(output, (query, key, value), exact.grad_output)
    found: tuple[Tensor, ...] = (exact.output, exact.grad_query, exact.grad_key, exact.grad_value)
    for one, other in zip(found, (output, *grads), strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-12, atol=1e-13)
    scores = (exact.query @ exact.key.mT / 8**0.5).masked_fill(~exact.visible, -torch.inf)
    torch.testing.assert_close(exact.logsumexp, scores.logsumexp(-1))


def test_more_is_allowed_the_coarser_the_precision_and_never_as_much_as_a_mistake_makes() -> None:
    exact = drawn_exact(0)
    allowed = {
        "float64": allowed_errors(exact, torch.float64),
        "float32": allowed_errors(exact, torch.float32),
        "TF32": allowed_errors(exact, torch.float32, tf32=True),
        "bfloat16": allowed_errors(exact, torch.bfloat16),
    }
    for name in ("output", "grad_query", "grad_key", "grad_value"):
        errors = [errors[name] for errors in allowed.values()]
        assert errors == sorted(errors)
        assert errors[0] < 1e-12
        assert 0 < errors[-1] < 0.2 * float(getattr(exact, name).abs().max())


def test_positions_are_told_as_ranges() -> None:
    assert ranges([True, True, False, True]) == ["0 to 1", "3"]
    assert ranges([False, False]) == []
    assert ranges([False, True, True]) == ["1 to 2"]
