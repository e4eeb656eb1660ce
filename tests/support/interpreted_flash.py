"""Run the Triton kernels over a table of cases and print what each gave as JSON: `interpreted_flash.py DEVICE`.

Whether Triton interprets its kernels is settled when it is imported, hence a process of its own, started with
TRITON_INTERPRET=1 where there is no GPU. What the kernels forget to write is NaN: uninitialized memory is filled.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from float64_attention import Results, float64_attention, largest_error, materialised_errors
from torch import Tensor

from cs336_systems.attention import flash_launch
from cs336_systems.attention.flash_launch import (
    Problem,
    launch_delta,
    launch_forward,
    launch_grad_key_value,
    launch_grad_query,
)
from cs336_systems.attention.flash_tiles import KERNELS, ROWS, Kernel, Precision, Tiles, candidates
from cs336_systems.attention.flash_triton import (
    Backward,
    FlashAttentionTriton,
    attention,
    flash_backward,
    flash_forward,
)
from cs336_systems.attention.inputs import Alignment, diagonal
from cs336_systems.attention.recompute import compiled_backward, recomputed_backward
from cs336_systems.errors import UserError

MASKS: dict[str, tuple[bool, Alignment]] = {
    "no mask": (False, "top-left"),
    "top-left": (True, "top-left"),
    "lower-right": (True, "lower-right"),
}
LENGTHS = [(1, 1), (15, 15), (16, 16), (17, 70), (33, 33), (70, 17), (1, 130), (130, 1), (70, 130)]
HEAD_DIMS = [16, 20, 32, 64, 80]
# Heads of queries and of keys; None: three dimensions.
HEADS = [None, (2, 1), (1, 1), None, (2, 2), (4, 2), None]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "dimension first": lambda x: x.mT.contiguous().mT,
    "batch last": lambda x: x.movedim(0, -2).contiguous().movedim(-2, 0),
    "a part of a wider tensor": lambda x: torch.cat([x, torch.full_like(x, math.nan)], -1)[..., : x.shape[-1]],
    "one for the whole batch": lambda x: x[:1].expand(x.shape),
}
DTYPES = {"float32": torch.float32, "float16": torch.float16}
SMALL_HEAD_DIMS: tuple[int, ...] = (16, 32, 64)
INTERPRETED_PRECISIONS: dict[str, tuple[Precision, ...]] = {"float32": ("ieee", "tf32"), "float16": ("half",)}
GPU_PRECISIONS: dict[str, tuple[Precision, ...]] = {"float32": ("ieee",), "float16": ("half",), "bfloat16": ("half",)}


class Case(NamedTuple):
    lengths: tuple[int, int]
    mask: str
    dtype: str
    head_dim: int
    heads: tuple[int, int] | None
    layout: str
    backward: Backward = "triton"

    def __str__(self) -> str:
        (queries, keys), heads = self.lengths, "3-D" if self.heads is None else "heads {} {}".format(*self.heads)
        return f"{queries}x{keys} d{self.head_dim} {heads}, {self.mask}, {self.dtype}, {self.layout}, {self.backward}"


def table() -> list[Case]:
    """Every length with every mask and precision; the rest in turn, so that each meets many of the others."""
    rest = zip(
        itertools.cycle(HEAD_DIMS), itertools.cycle(HEADS), itertools.cycle([*LAYOUTS, "contiguous"]), strict=False
    )
    crossed = itertools.product(LENGTHS, MASKS, DTYPES)
    cases = [Case(*chosen, *others) for chosen, others in zip(crossed, rest, strict=False)]
    cases.append(Case((130, 130), "top-left", "float16", 20, (2, 1), "contiguous"))
    compiled = [
        Case((33, 33), "top-left", "float32", 16, (4, 2), "contiguous", "compiled"),
        Case((70, 17), "lower-right", "float32", 20, (4, 2), "contiguous", "compiled"),
        Case((17, 33), "no mask", "float16", 16, None, "dimension first", "compiled"),
    ]
    return cases + compiled


def drawn(case: Case, device: str, batch: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query, key, value and the gradient of the output."""
    generator = torch.Generator().manual_seed(sum(case.lengths) + case.head_dim)
    num_queries, num_keys = case.lengths

    def draw(length: int, which: int) -> Tensor:
        leading = (batch,) if case.heads is None else (batch, case.heads[which])
        found = torch.randn(*leading, length, case.head_dim, generator=generator)
        return LAYOUTS[case.layout](found.to(device, getattr(torch, case.dtype)))

    return draw(num_queries, 0), draw(num_keys, 1), draw(num_keys, 1), draw(num_queries, 0)


def run(
    inputs: tuple[Tensor, ...],
    mask: str,
    backward: Backward = "triton",
    function: Callable[..., Tensor] = FlashAttentionTriton.apply,
) -> Results:
    *three, grad_output = inputs
    leaves = [x.detach().requires_grad_() for x in three]
    output = function(*leaves, *MASKS[mask], "ieee", backward)
    grads = torch.autograd.grad(output, leaves, grad_output, retain_graph=True)
    logsumexp = output.new_zeros(())
    if function == FlashAttentionTriton.apply:  # the outermost layer, which is where it is looked for
        saved: Any = output.grad_fn
        (logsumexp,) = [x for x in saved.saved_tensors if x.shape == output.shape[:-1]]
    return Results(output.detach(), logsumexp, *grads)


def errors(case: Case, device: str) -> dict[str, tuple[float, float]]:
    """Of the tiles that are taken untimed, or won; see `compared`."""
    inputs = drawn(case, device)
    return compared(inputs, diagonal(*inputs[:2], *MASKS[case.mask]), run(inputs, case.mask, case.backward))


def compared(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor], offset: int | None, found: Results
) -> dict[str, tuple[float, float]]:
    """Per result: its largest error, and the most it may be.

    A small multiple of what the same precision errs with every intermediate stored, and some roundings: dP − D may
    cancel, and then errs by roundings of its terms.
    """
    expected = float64_attention(*inputs, offset)
    allowed = materialised_errors(*inputs, offset)
    _, _, value, grad_output = (x.double() for x in inputs)
    terms = float((grad_output.flatten(0, -2) @ value.flatten(0, -2).mT).abs().max())
    report = {}
    for name, result, exact in zip(Results._fields, found, expected, strict=True):
        eps = torch.finfo(torch.float32 if name == "logsumexp" else inputs[0].dtype).eps
        size = float(exact.where(exact.isfinite(), 0.0).abs().max().clamp_min(1))
        if name in ("grad_query", "grad_key"):
            size = max(size, terms)
        report[name] = (largest_error(result, exact), 8 * allowed.get(name, 0.0) + 16 * eps * size)
        if result.shape != exact.shape:
            raise AssertionError(f"{name} of shape {tuple(result.shape)}, expected {tuple(exact.shape)}")
    return report


class Cut(NamedTuple):
    """What is launched with one candidate of each kernel."""

    head_dim: int
    dtype: str
    tiles: dict[Kernel, Tiles]

    def __str__(self) -> str:
        numbers = {kernel: "/".join(map(str, dataclasses.astuple(tiles))) for kernel, tiles in self.tiles.items()}
        cut = ", ".join(f"{kernel} {each}" for kernel, each in numbers.items())
        return f"d{self.head_dim}, {self.dtype}: {cut}"


def cuts(device: str) -> list[Cut]:
    """Every candidate: on a GPU those of that GPU, elsewhere those for small head dimensions before Hopper and on it.

    The interpreter knows nothing of warps, stages and TF32, so there tiles of one size are one.
    """
    on_gpu = device == "cuda"
    capabilities: tuple[int, ...] = (80, 90)
    head_dims, of_dtype = SMALL_HEAD_DIMS, INTERPRETED_PRECISIONS
    if on_gpu:
        capabilities = (_capability(),)
        head_dims, of_dtype = ROWS, GPU_PRECISIONS
    found = []
    for head_dim, dtype in itertools.product(head_dims, of_dtype):
        distinct: dict[Kernel, list[Tiles]] = {}
        for kernel in KERNELS:
            known = [
                tiles
                for precision, capability in itertools.product(of_dtype[dtype], capabilities)
                for tiles in candidates(kernel, head_dim, precision, capability)
            ]
            distinct[kernel] = [*{tiles if on_gpu else (tiles.queries, tiles.keys): tiles for tiles in known}.values()]
        found += [
            Cut(head_dim, dtype, {kernel: of[index % len(of)] for kernel, of in distinct.items()})
            for index in range(max(map(len, distinct.values())))
        ]
    return found


def _capability() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def errors_of_cut(cut: Cut, device: str) -> dict[str, tuple[float, float]]:
    """The errors of kernels that are cut like this, at lengths that leave ragged tiles at both ends; see `compared`."""
    case = Case((70, 130), "lower-right", cut.dtype, cut.head_dim, (2, 1), "contiguous")
    query, key, value, grad_output = inputs = drawn(case, device, batch=1)
    offset = diagonal(query, key, *MASKS[case.mask])
    problem = Problem.of(query, key, offset, "ieee")
    output, logsumexp = launch_forward(query, key, value, problem, cut.tiles["forward"])
    saved = (query, key, value, grad_output, logsumexp, launch_delta(output, grad_output))
    grad_key, grad_value = launch_grad_key_value(*saved, problem, cut.tiles["grad_key_value"])
    grad_query = launch_grad_query(*saved, problem, cut.tiles["grad_query"])
    return compared(inputs, offset, Results(output, logsumexp, grad_query, grad_key, grad_value))


def failures(errors_of: Callable[[Any, str], Any], cases: Iterable[Any], device: str) -> list[str]:
    """The cases whose results err too much, or whose launch raises, each with what is wrong."""
    told = []
    for case in cases:
        found = outcome(functools.partial(errors_of, case, device))
        if "raised" in found:
            told.append(f"{case}: {found['raised'].strip().splitlines()[-1]}")
        else:
            wrong = [
                f"{name} {error:.3g} > {bound:.3g}" for name, (error, bound) in found.items() if not error <= bound
            ]
            told += [f"{case}: {', '.join(wrong)}"] if wrong else []
    return told


def same_bits(first: Results, second: Results, items: Any = ...) -> list[bool]:
    return [torch.equal(a[items], b[items]) for a, b in zip(first, second, strict=True)]


def properties(device: str) -> dict[str, Callable[[], Any]]:
    """What holds beyond single cases; each is a list of booleans, all of which must be true, or a message."""
    case = Case((33, 40), "lower-right", "float16", 20, (4, 2), "contiguous")
    inputs = drawn(case, device, batch=3)

    def second_run() -> list[bool]:
        return same_bits(run(inputs, "lower-right"), run(inputs, "lower-right"))

    def other_items() -> list[bool]:
        changed = [x.clone() for x in inputs]
        for x in changed:
            x[1] *= -3
        before, after = run(inputs, "lower-right"), run(tuple(changed), "lower-right")
        return same_bits(before, after, slice(None, None, 2)) + [not same for same in same_bits(before, after, 1)]

    def other_heads() -> list[bool]:
        changed = [x.clone() for x in inputs]
        for x in changed:
            x[:, x.shape[1] // 2 :] *= -3
        before, after = run(inputs, "no mask"), run(tuple(changed), "no mask")
        return [torch.equal(*(x[:, : x.shape[1] // 2] for x in pair)) for pair in zip(before, after, strict=True)]

    def parts() -> list[bool]:
        """As where batch and heads are more than a grid has room for."""
        whole, most = run(inputs, "top-left"), flash_launch.MOST_ITEMS
        flash_launch.MOST_ITEMS = inputs[0].shape[1]
        try:
            return [len(flash_launch.parts_of_batch(inputs[0])) > 1, *same_bits(run(inputs, "top-left"), whole)]
        finally:
            flash_launch.MOST_ITEMS = most

    def masked_keys() -> list[bool]:
        long = drawn(case._replace(lengths=(33, 150), heads=None), device)
        changed = [x.clone() for x in long]
        changed[1][..., 33:, :], changed[2][..., 33:, :] = 3e4, -3e4
        before, after = run(long, "top-left"), run(tuple(changed), "top-left")
        return [*same_bits(before, after), *(bool((x[..., 33:, :] == 0).all()) for x in after[3:])]

    def hidden_rows() -> list[bool]:
        given = drawn(case._replace(lengths=(70, 20), heads=(2, 1)), device)
        found = run(given, "lower-right")
        hidden = [
            found.output[..., :50, :] == 0,
            found.logsumexp[..., :50] == -math.inf,
            found.grad_query[..., :50, :] == 0,
        ]
        return [bool(x.all()) for x in hidden] + [not x.isnan().any() for x in found]

    def model_form() -> list[bool]:
        query, key, value, _ = inputs
        return [
            torch.equal(attention(query, key, value, is_causal=c), FlashAttentionTriton.apply(query, key, value, c))
            for c in (False, True)
        ]

    def exact_values() -> list[bool]:
        # One key per query, whose score is so far above the others that their weights are 0: values as they are.
        only = torch.randperm(64, generator=torch.Generator().manual_seed(0))
        key = 64 * torch.eye(64, device=device)[None]
        value = torch.arange(-32.0, 32.0, device=device)[:, None].expand(64, 64)[None].contiguous()
        dtypes = [*DTYPES.values()] + ([torch.bfloat16] if device == "cuda" else [])
        found = [FlashAttentionTriton.apply(*(x.to(dtype) for x in (key[:, only], key, value))) for dtype in dtypes]
        # And the mean of 64 integers where no query prefers a key.
        even = [FlashAttentionTriton.apply(*(x.to(dtype) for x in (0 * key, key, value))) for dtype in dtypes]
        return [torch.equal(x.float(), value[:, only]) for x in found] + [bool((x == -0.5).all()) for x in even]

    def operators() -> list[bool]:
        found = []
        for offset in (None, -3):
            query, key, value, grad = (x[:1].detach() for x in inputs)
            output, logsumexp = flash_forward(query, key, value, offset, "ieee")
            # They have no autograd of their own: that is FlashAttentionTriton's.
            tests = ("test_schema", "test_faketensor")
            for operator, arguments in (
                (flash_forward, (query, key, value, offset, "ieee")),
                (flash_backward, (query, key, value, output, logsumexp, grad, offset, "ieee")),
            ):
                outcome = torch.library.opcheck(operator, arguments, test_utils=tests)
                found += [outcome[test] == "SUCCESS" for test in tests]
        return found

    def without_graph_break() -> list[bool]:
        def scaled(*arguments: Any) -> Tensor:
            return 2 * FlashAttentionTriton.apply(*arguments)

        found = []
        for mask in ("lower-right", "no mask"):
            plain = run(inputs, mask, function=scaled)
            compiled = run(inputs, mask, function=torch.compile(scaled, fullgraph=True, backend="aot_eager"))
            found += same_bits(plain, compiled)
        return found

    def compiled_equals_plain() -> list[bool]:
        given = drawn(case._replace(dtype="float32"), device)
        found = run(given, "lower-right")
        query, key, value, grad = given
        arguments = (query, key, value, found.output, found.logsumexp, grad, 7)
        pairs = zip(compiled_backward(*arguments), recomputed_backward(*arguments), strict=True)
        return [torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs]

    def refusal(*inputs: Tensor, arguments: tuple[Any, ...] = ()) -> Callable[[], str]:
        def refused() -> str:
            try:
                FlashAttentionTriton.apply(*inputs, *arguments)
            except UserError as error:
                return str(error)
            return "taken"

        return refused

    small, wide = torch.zeros(1, 4, 16, device=device), torch.zeros(1, 4, 257, device=device)
    return {
        "a second run": second_run,
        "other items": other_items,
        "other heads": other_heads,
        "parts of the batch": parts,
        "masked keys": masked_keys,
        "hidden rows": hidden_rows,
        "the model's form": model_form,
        "exact values": exact_values,
        "the operators": operators,
        "no graph break": without_graph_break,
        "compiled equals plain": compiled_equals_plain,
        "refuses head dimension 257": refusal(wide, wide, wide),
        "refuses float64": refusal(*[small.double()] * 3),
        "refuses values of another width": refusal(small, small, small[..., :8]),
        "refuses an unknown precision": refusal(small, small, small, arguments=(False, "top-left", "tf64")),
        "refuses an unknown backward": refusal(small, small, small, arguments=(False, "top-left", "ieee", "tritn")),
        "refuses an unknown alignment": refusal(small, small, small, arguments=(True, "middle")),
    }


def outcome(work: Callable[[], Any]) -> Any:
    """What it gave, or the traceback of what it raised."""
    try:
        return work()
    except Exception:
        return {"raised": traceback.format_exc()}


def main() -> None:
    (device,) = sys.argv[1:]
    # The kernels of ours warn of nothing; what PyTorch's compiler and Triton's interpreter warn of is theirs.
    warnings.simplefilter("ignore")
    # Deterministic: so is uninitialized memory, which is filled with NaN.
    torch.use_deterministic_algorithms(True, warn_only=device == "cuda")
    report = {str(case): outcome(functools.partial(errors, case, device)) for case in table()}
    report["every candidate"] = failures(errors_of_cut, cuts(device), device)
    report |= {name: outcome(work) for name, work in properties(device).items()}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
