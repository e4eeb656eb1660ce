"""CUDA's rules on a CPU are CUDA's: the same operators, the same casts of each, kept as long, and gone afterwards.

PyTorch's own kernels of autocast for CUDA answer on any machine: on tensors without data, which say that they are on a
CUDA device. What they hand on is caught at the next layer below, where both devices' kernels end.
"""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cs336_systems.analysis import cuda_autocast
from cs336_systems.analysis.cuda_autocast import BANNED, FLOAT32_APPENDED, TREATED, cuda_rules, has_autocast_kernel

pytestmark = pytest.mark.problem("benchmarking_mixed_precision")

HALVES = (torch.bfloat16, torch.float16)
aten = torch.ops.aten


def operators() -> list[str]:
    names = torch._C._dispatch_get_all_op_names()
    return [name.removeprefix("aten::") for name in names if name.startswith("aten::")]


OF_CPU_ALONE = sorted(name for name in operators() if has_autocast_kernel(name, "CPU") and name not in TREATED)


# Which operators have a rule -----------------------------------------------------------------------------------


def test_the_operators_that_have_a_rule_are_those_of_pytorchs_dispatcher() -> None:
    assert {name for name in operators() if has_autocast_kernel(name, "CUDA")} - {"_cudnn_rnn"} == TREATED


def test_no_operator_is_in_two_lists() -> None:
    lists = (cuda_autocast.LOWER_PRECISION, cuda_autocast.FLOAT32, cuda_autocast.FLOAT32_BY_DTYPE)
    rest = (tuple(FLOAT32_APPENDED), cuda_autocast.PROMOTED, BANNED)
    assert sum(map(len, (*lists, *rest))) == len(TREATED)


# What each rule does -------------------------------------------------------------------------------------------


class ArrivedError(Exception):
    """Ends a call where autocast hands it on, with what it hands on."""


def described(value: Any) -> Any:
    if isinstance(value, list):
        return [described(each) for each in value]
    return value.dtype if isinstance(value, Tensor) else value


def catch(name: str) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        raise ArrivedError(name, described(list(arguments)), {key: described(options[key]) for key in options})

    return call


def argument_of(declared: Any, tensors: Iterator[Tensor]) -> Any:
    """Something of an argument's type: it need not make sense, since no kernel sees it."""
    kind = str(declared.type)
    if kind == "List[Optional[Tensor]]":  # positions of elements are whole numbers
        return [torch.empty(2, dtype=torch.int64, device=next(tensors).device)]
    if "Tensor" in kind:
        return [next(tensors), next(tensors)] if kind.startswith("List") else next(tensors)
    if declared.name == "equation":
        return "i"
    simple = {"int": 1, "number": 2, "float": 1.0, "bool": False, "str": "fro"}
    return simple.get(kind.removeprefix("Optional[").removesuffix("]"), [1])


def arrives(name: str, device: str, inputs: Sequence[tuple[torch.dtype, ...]]) -> list[Any]:
    """What the layer below autocast is called with, where the tensors of a call have such precisions in turn."""
    overload = cuda_autocast._overload(name)
    below = {name, FLOAT32_APPENDED.get(name, name)}
    with torch.library._scoped_library("aten", "IMPL") as library, FakeTensorMode():
        for each in below:
            library.impl(each, catch(each), f"Autograd{device.upper()}")
        return [arrived(overload, device, dtypes) for dtypes in inputs]


def arrived(overload: Any, device: str, dtypes: tuple[torch.dtype, ...]) -> Any:
    tensors = (torch.empty(2, dtype=dtype, device=device) for dtype in itertools.cycle(dtypes))
    given = [a for a in overload._schema.arguments if not a.has_default_value() or "Tensor" in str(a.type)]
    try:
        overload(**{argument.name: argument_of(argument, tensors) for argument in given})
    except ArrivedError as call:
        return call.args
    except RuntimeError:
        return "an error"
    raise AssertionError(f"{overload} ended above")


@contextlib.contextmanager
def autocast_of_cuda(dtype: torch.dtype) -> Iterator[None]:
    """Without a GPU `torch.autocast("cuda")` declines, but its kernels are there."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


WIDE, WIDEST, WHOLE = torch.float32, torch.float64, torch.int64


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", sorted(TREATED))
def test_every_operator_is_called_with_what_pytorchs_own_kernel_for_cuda_calls_it_with(
    name: str, half: torch.dtype
) -> None:
    (other,) = set(HALVES) - {half}
    inputs = [(WIDE,), (half,), (other,), (WIDEST,), (WHOLE,), (WIDE, half), (half, WIDE), (WIDEST, half)]
    inputs += [(other, WIDE), (WIDE, other), (WHOLE, half, WIDE)]
    with autocast_of_cuda(half):
        expected = arrives(name, "cuda", inputs)
    with cuda_rules(), torch.autocast("cpu", dtype=half):
        assert dict(zip(inputs, arrives(name, "cpu", inputs), strict=True)) == dict(zip(inputs, expected, strict=True))


def test_operators_that_have_a_rule_on_a_cpu_alone_get_what_they_were_given() -> None:
    inputs = [(WIDE,), (torch.bfloat16,)]
    given = {name: arrives(name, "cpu", inputs) for name in OF_CPU_ALONE}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        of_cpu = {name: arrives(name, "cpu", inputs) for name in OF_CPU_ALONE}
    assert all(of_cpu[name] != given[name] for name in ("trace", "cross_entropy_loss"))
    with cuda_rules(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert {name: arrives(name, "cpu", inputs) for name in OF_CPU_ALONE} == given


def test_a_precision_that_is_asked_for_is_kept() -> None:
    x = torch.ones(2, 3, dtype=torch.float16)
    with cuda_rules(), torch.autocast("cpu", dtype=torch.float16):
        for asked in (torch.float16, torch.float32, torch.float64, torch.bfloat16):
            assert {x.sum(dtype=asked).dtype, x.softmax(-1, dtype=asked).dtype, x.cumsum(0, dtype=asked).dtype} == {
                asked
            }
        assert {x.sum().dtype, x.softmax(-1).dtype, x.cumsum(0).dtype} == {torch.float32}


def test_the_rules_of_cuda_hold_no_longer_than_they_are_asked_for() -> None:
    def precision() -> torch.dtype:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.ones(3, dtype=torch.bfloat16).exp().dtype

    before = precision()
    with cuda_rules():
        within = precision()
    assert [before, within, precision()] == [torch.bfloat16, torch.float32, torch.bfloat16]


def test_nothing_remains_of_the_rules_even_after_an_error() -> None:
    def registered() -> list[object]:
        tables = [torch._C._dispatch_dump(f"aten::{name}") for name in operators()]
        return [tables, torch.clear_autocast_cache, set(torch.library._impls)]

    before = registered()
    within = []
    with contextlib.suppress(KeyError), cuda_rules(), cuda_rules():
        within.append(registered())
        raise KeyError
    assert within != [before]
    assert registered() == before


def test_nobody_hears_of_the_kernels_that_are_put_over_others() -> None:
    """Which PyTorch says once per process, so a process is asked that said nothing yet."""
    program = (
        "import torch\n"
        "from cs336_systems.analysis.cuda_autocast import cuda_rules\n"
        "with cuda_rules(), torch.autocast('cpu', dtype=torch.float16):\n"
        "    print(torch.nn.functional.linear(torch.ones(1, 1), torch.ones(1, 1)).dtype)\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (ran.stdout, ran.stderr) == ("torch.float16\n", "")


# Casts that are kept -------------------------------------------------------------------------------------------


class Copies(TorchDispatchMode):
    """Counts the casts that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        self.count += operator is aten._to_copy.default
        return operator(*args, **(kwargs or {}))


def parameter(*, requires_grad: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(4, 4, dtype=dtype, requires_grad=requires_grad)


def matmul_twice(weight: Tensor) -> None:
    x = torch.ones(4, 4, dtype=torch.bfloat16)
    torch.matmul(x, weight)
    torch.mm(x, weight)


def in_one(weight: Tensor, **options: Any) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16, **options):
        matmul_twice(weight)


def in_two(weight: Tensor) -> None:
    in_one(weight)
    in_one(weight)


def in_nested(weight: Tensor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        in_two(weight)


def without_gradients(weight: Tensor) -> None:
    with torch.no_grad():
        in_one(weight)


def not_kept(weight: Tensor) -> None:
    in_one(weight, cache_enabled=False)


USES = [in_one, in_two, in_nested, without_gradients, not_kept]
WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "parameter": parameter,
    "constant": lambda: parameter(requires_grad=False),
    "computed": lambda: parameter() * 2,
    "view": lambda: torch.ones(16).view(4, 4).requires_grad_(),
    "of float16": lambda: parameter(dtype=torch.float16),
    "of bfloat16": lambda: parameter(dtype=torch.bfloat16),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_cast_is_kept_as_long_as_pytorchs_own_autocast_keeps_it(weight: str, use: Callable[[Tensor], None]) -> None:
    counts = []
    for rules in (contextlib.nullcontext, cuda_rules):
        with rules(), Copies() as copies:
            use(WEIGHTS[weight]())
        counts.append(copies.count)
    assert counts[0] == counts[1]


def test_the_cast_of_a_parameter_is_one_whichever_operators_use_it() -> None:
    """Also those that a CPU knows no rule for, such as einsum."""
    weight, x = parameter(), torch.ones(4, 4, dtype=torch.bfloat16)
    with cuda_rules(), torch.autocast("cpu", dtype=torch.bfloat16), Copies() as copies:
        nn.functional.linear(x, weight)
        torch.einsum("ij,jk->ik", x, weight)
        nn.functional.prelu(x, weight[0])
        before = copies.count
        torch.linalg.multi_dot([x, weight, x])
    assert before == 2  # the row of it is no parameter
    assert copies.count == before


def test_a_parameter_at_the_address_of_one_that_is_gone_gets_a_cast_of_its_own() -> None:
    """Without gradients no graph holds a parameter whose cast is kept."""
    addresses = set()
    with cuda_rules(), torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for value in range(20):
            weight = torch.full((4, 4), float(value), requires_grad=True)
            addresses.add(id(weight))
            assert torch.matmul(torch.ones(4, 4), weight)[0, 0].item() == 4 * value
            del weight
    assert len(addresses) < 20


# Any module, with data or without ------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Convolution, norms of three kinds, attention and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 3, padding="same")
        self.norms = nn.ModuleList([nn.GroupNorm(2, 8), nn.LayerNorm(10), nn.RMSNorm(10)])
        self.attention = nn.MultiheadAttention(10, 2, batch_first=True)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        seen = {"conv": self.conv(x)}
        y = seen["conv"]
        for i, norm in enumerate(self.norms):
            y = seen[f"norm {i}"] = norm(y)
        y = seen["attention"] = self.attention(y, y, y)[0]
        y = seen["gelu"] = nn.functional.gelu(y)
        logits = seen["logits"] = self.head(y)
        seen["joined"] = torch.cat([logits, logits.float()])
        seen["norm of all"] = logits.norm()
        seen["loss"] = nn.functional.cross_entropy(logits.flatten(0, 1), target)
        return seen


def dtypes_of(device: str, half: torch.dtype, *, fake: bool) -> dict[str, torch.dtype]:
    with FakeTensorMode() if fake else contextlib.nullcontext():
        with torch.device(device):
            module = Mixed()
        x, target = torch.ones(2, 3, 10, device=device), torch.zeros(16, dtype=torch.int64, device=device)
        with torch.autocast(device, dtype=half):
            seen = module(x, target)
        seen["loss"].backward()
        gradients = {f"gradient of {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {name: tensor.dtype for name, tensor in (seen | gradients).items()}


@pytest.mark.parametrize("half", HALVES)
def test_tensors_without_data_are_cast_as_those_with_data(half: torch.dtype) -> None:
    with cuda_rules():
        seen = dtypes_of("cpu", half, fake=True)
        assert seen == dtypes_of("cpu", half, fake=False)
    assert {seen["conv"], seen["attention"], seen["gelu"], seen["logits"]} == {half}
    assert {seen["norm 0"], seen["norm 1"], seen["norm 2"], seen["loss"], seen["norm of all"]} == {torch.float32}


@pytest.mark.gpu
@pytest.mark.parametrize("half", HALVES)
def test_a_module_has_the_precisions_on_a_cpu_that_it_has_on_a_gpu(half: torch.dtype) -> None:
    with cuda_rules():
        followed = dtypes_of("cpu", half, fake=False)
    assert followed == dtypes_of("cuda", half, fake=False)


@pytest.mark.parametrize("eps", [None, 1e-5])
@pytest.mark.parametrize("shape", [(6,), (4, 6)])
@pytest.mark.parametrize("affine", [True, False])
def test_the_norm_that_is_one_operator_computes_and_derives_what_the_composed_one_does(
    eps: float | None, shape: tuple[int, ...], affine: bool
) -> None:
    def run() -> list[Tensor]:
        norm = nn.RMSNorm(shape, eps=eps, elementwise_affine=affine, dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(3, 4, 6, dtype=torch.float64, generator=generator).requires_grad_()
        y = norm(x)
        names.append(type(y.grad_fn).__name__)
        (y**3).sum().backward()
        return [y, *(leaf.grad for leaf in (x, *norm.parameters()) if leaf.grad is not None)]

    names: list[str] = []
    composed = run()
    with cuda_rules():
        fused = run()
    assert names[1] == "FusedRmsNormBackward0" != names[0]
    torch.testing.assert_close(fused, composed)
