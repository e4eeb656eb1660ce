"""What a block is accounted to keep for backward is what autograd saves and the allocator holds, to the byte."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cs336_systems.analysis.activations import (
    BLOCK_INPUT,
    SCALE_BYTES,
    cast_parameters_of_block,
    gradient_bytes_of_block,
    held_after_forward,
    residual_bytes,
    saved_by_block,
    score_matrix_bytes,
)
from cs336_systems.analysis.cuda_autocast import cuda_rules
from cs336_systems.analysis.hardware import GPUS
from cs336_systems.analysis.published_profiles import PublishedPeaks
from cs336_systems.bench.allocator import allocated_bytes
from cs336_systems.bench.records import Store
from cs336_systems.errors import UserError
from cs336_systems.model import SIZES, TransformerConfig, build_model
from cs336_systems.profiling.saved_tensors import OF_THE_CALL, SavedTensors, saved_by_middle_block

pytestmark = pytest.mark.problem("memory_profiling")

# No two symbols have the same value, so that none can stand for another; then what is special about a 1.
ODD = TransformerConfig(d_model=24, d_ff=56, num_layers=3, num_heads=2, vocab_size=97, context_length=40)
NARROW = TransformerConfig(d_model=64, d_ff=40, num_layers=1, num_heads=8, vocab_size=30, context_length=16)
ONE_HEAD = TransformerConfig(d_model=16, d_ff=48, num_layers=2, num_heads=1, vocab_size=50, context_length=64)
CASES = [(ODD, 3, 17), (NARROW, 5, 11), (NARROW, 1, 16), (ONE_HEAD, 2, 64), (ONE_HEAD, 1, 13), (ODD, 2, 1)]
PRECISIONS = [("float64", "none"), ("float32", "none"), ("bfloat16", "none")]
PRECISIONS += [("float32", "bfloat16"), ("float32", "float16")]
CHOICES = [
    {"rope": rope, "formulation": formulation} for rope in ("2025", "2026") for formulation in ("reference", "fused")
]

every_case = pytest.mark.parametrize(("config", "batch_size", "seq_len"), CASES)
every_precision = pytest.mark.parametrize(("dtype", "autocast"), PRECISIONS)
every_choice = pytest.mark.parametrize("choices", CHOICES, ids=lambda choices: "-".join(choices.values()))
every_device = pytest.mark.parametrize("device", ["cpu", "cuda"])


def rules_of(device: str) -> contextlib.AbstractContextManager[None]:
    """A CPU's own rules, or those of CUDA followed on it."""
    return cuda_rules() if device == "cuda" else contextlib.nullcontext()


def built(config: TransformerConfig, choices: dict[str, Any], dtype: str = "float32") -> nn.Module:
    return build_model(config, **choices).to(getattr(torch, dtype))


def first_block(model: nn.Module) -> nn.Module:
    assert isinstance(model.layers, nn.ModuleList)
    return model.layers[0]


def is_exact(saved: SavedTensors, accounted: dict[str, int]) -> bool:
    """Whether every item is one storage, and every storage one item, in the same order."""
    return [tensor.bytes for tensor in saved.of(*OF_THE_CALL)] == list(accounted.values())


@every_case
@every_precision
@every_choice
@every_device
def test_every_item_is_one_storage_that_autograd_saves(
    config: TransformerConfig, batch_size: int, seq_len: int, dtype: str, autocast: str, choices: Any, device: Any
) -> None:
    with rules_of(device):
        saved = saved_by_middle_block(
            built(config, choices, dtype), batch_size, seq_len, config.d_model, autocast=autocast
        )
    itemsize = getattr(torch, dtype).itemsize
    accounted = saved_by_block(
        config, batch_size, seq_len, itemsize=itemsize, autocast=autocast, device=device, **choices
    )
    assert is_exact(saved, accounted)
    (*inputs,) = saved.of("input")
    assert [tensor.bytes for tensor in inputs] == [accounted[name] for name in accounted if name == BLOCK_INPUT]
    assert saved.total_bytes("cast of a parameter") == cast_parameters_of_block(config, autocast)


@pytest.mark.parametrize(("config", "batch_size", "seq_len"), [CASES[0], CASES[2]])
@every_precision
@every_choice
@every_device
def test_the_sum_is_what_the_allocator_holds_after_a_forward(
    config: TransformerConfig, batch_size: int, seq_len: int, dtype: str, autocast: str, choices: Any, device: Any
) -> None:
    """Beside the block's output and the casts of parameters, and without its input, which was there before."""
    block: Any = first_block(built(config, choices, dtype))
    x = torch.randn(batch_size, seq_len, config.d_model, dtype=getattr(torch, dtype), requires_grad=True)
    outputs: list[Tensor] = []

    def forward() -> None:
        with torch.autocast("cpu", dtype=getattr(torch, autocast, None), enabled=autocast != "none"):
            outputs.append(block(x))

    with rules_of(device):
        forward()
        outputs.clear()
        _, left = allocated_bytes(forward, "cpu")
    accounted = saved_by_block(
        config, batch_size, seq_len, itemsize=x.itemsize, autocast=autocast, device=device, **choices
    )
    beside = outputs[0].nbytes + cast_parameters_of_block(config, autocast) + SCALE_BYTES
    assert left == sum(accounted.values()) - accounted.get(BLOCK_INPUT, 0) + beside


@pytest.mark.parametrize(("config", "batch_size", "seq_len"), [CASES[0]])
@every_precision
@every_choice
@every_device
def test_the_whole_model_holds_what_is_accounted_after_a_forward(
    config: TransformerConfig, batch_size: int, seq_len: int, dtype: str, autocast: str, choices: Any, device: Any
) -> None:
    model = built(config, choices, dtype)
    tokens = torch.randint(config.vocab_size, (batch_size, seq_len))
    logits: list[Tensor] = []

    def forward() -> None:
        with torch.autocast("cpu", dtype=getattr(torch, autocast, None), enabled=autocast != "none"):
            logits.append(model(tokens))

    with rules_of(device):
        forward()
        logits.clear()
        _, left = allocated_bytes(forward, "cpu")
    itemsize = getattr(torch, dtype).itemsize
    held = held_after_forward(
        config, batch_size, seq_len, itemsize=itemsize, autocast=autocast, device=device, **choices
    )
    before = {"parameters": sum(p.nbytes for p in model.parameters()), "tokens": tokens.nbytes}
    before["rotary table"] = sum(buffer.nbytes for buffer in {id(b): b for b in model.buffers()}.values())
    assert {name: held[name] for name in before} == before
    # Where the norms cast, the last block's output is held by nobody; and somebody holds the logits.
    assert left == sum(held.values()) - sum(before.values()) + SCALE_BYTES * config.num_layers


@pytest.mark.gpu
@pytest.mark.parametrize(("config", "batch_size", "seq_len"), CASES)
@pytest.mark.parametrize("autocast", ["none", "bfloat16", "float16"])
@every_choice
def test_every_item_is_one_storage_that_autograd_saves_on_a_gpu(
    config: TransformerConfig, batch_size: int, seq_len: int, autocast: str, choices: Any
) -> None:
    model = built(config, choices).to("cuda")
    saved = saved_by_middle_block(model, batch_size, seq_len, config.d_model, autocast=autocast)
    assert is_exact(saved, saved_by_block(config, batch_size, seq_len, autocast=autocast, **choices))
    assert saved.total_bytes("cast of a parameter") == cast_parameters_of_block(config, autocast)


def test_autocast_keeps_more_of_softmax_on_cuda_than_on_a_cpu() -> None:
    on_cuda, on_cpu = (saved_by_block(ODD, 3, 17, autocast="bfloat16", device=device) for device in ("cuda", "cpu"))
    wider = [name for name in on_cuda if on_cuda[name] != on_cpu[name]]
    assert wider == ["exponentials of softmax", "row sums of softmax"]
    assert all(on_cuda[name] == 2 * on_cpu[name] for name in wider)


# Sizes of the handouts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["small", "gpt2-xl", "xl"])
@pytest.mark.parametrize("seq_len", [128, 512])
def test_the_blocks_of_real_sizes_keep_what_is_accounted(size: str, seq_len: int) -> None:
    """On PyTorch's device without data, where every operator is called and nothing is computed."""
    config = SIZES[size]
    with torch.device("meta"):
        model = build_model(dataclasses.replace(config, num_layers=1))
    saved = saved_by_middle_block(model, 4, seq_len, config.d_model)
    assert is_exact(saved, saved_by_block(config, 4, seq_len))
    assert saved.total_bytes("parameter") == gradient_bytes_of_block(config)


def test_a_score_matrix_of_gpt2_xl_is_the_allocation_that_was_published() -> None:
    """Of 104,857,600 bytes at batch 4 and context 512; softmax keeps two of them."""
    config = SIZES["gpt2-xl"]
    assert score_matrix_bytes(config, 4, 512) == 104_857_600
    saved = saved_by_block(config, 4, 512)
    assert [name for name, size in saved.items() if size == 104_857_600] == [
        "exponentials of softmax",
        "weights of softmax",
    ]


@pytest.mark.parametrize("itemsize", [2, 4])
def test_single_sizes_are_those_of_tensors(itemsize: int) -> None:
    dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
    block = first_block(built(ODD, {}, str(dtype).removeprefix("torch.")))
    assert gradient_bytes_of_block(ODD, itemsize) == sum(p.nbytes for p in block.parameters())
    assert residual_bytes(ODD, 3, 17, itemsize) == torch.empty(3, 17, ODD.d_model, dtype=dtype).nbytes
    scores = torch.empty(3, ODD.num_heads, 17, 17, dtype=dtype)
    assert score_matrix_bytes(ODD, 3, 17, itemsize) == scores.nbytes


@pytest.mark.parametrize(("context", "autocast"), [(c, a) for a in ("none", "bfloat16") for c in (128, 256, 512)])
def test_what_is_held_after_forward_is_the_published_peak_of_gpt2_xl(store: Store, context: int, autocast: str) -> None:
    peak = PublishedPeaks(store.reference).peak("forward", context, autocast)
    assert peak is not None
    config = dataclasses.replace(SIZES["gpt2-xl"], context_length=context)
    held = sum(held_after_forward(config, 4, context, autocast=autocast).values())
    assert peak.at_least_bytes <= held < peak.below_bytes


def test_the_doubtful_published_peak_cannot_be_of_the_context_that_is_printed(store: Store) -> None:
    """A step holds both moments beside, twice the parameters, when backward begins."""
    published = PublishedPeaks(store.reference)
    (doubtful,) = [peak for peak in published.rows() if peak.remark]

    def least(context: int) -> int:
        config = dataclasses.replace(SIZES["gpt2-xl"], context_length=context)
        held = held_after_forward(config, 4, context, autocast=doubtful.autocast)
        return sum(held.values()) + 2 * held["parameters"]

    assert (doubtful.phase, doubtful.context_length) == ("step", 512)
    assert least(512) > max(doubtful.below_bytes, GPUS["a100-40gb"].memory_bytes)
    assert least(256) < doubtful.below_bytes


# What cannot be accounted --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "flash"}, "only what the reference attention saves .* found attention 'flash': measure"),
        ({"rope": "2024"}, "unknown rope '2024'.*2025, 2026"),
        ({"formulation": "fuse"}, "unknown formulation 'fuse': did you mean 'fused'"),
        ({"autocast": "bf16"}, "unknown autocast 'bf16'.*none, bfloat16, float16"),
        ({"device": "mps"}, "unknown device 'mps'.*cuda, cpu"),
        ({"autocast": "bfloat16", "itemsize": 2}, "parameters in float32, of 4 bytes, found 2: leave one"),
    ],
)
def test_what_is_not_accounted_for_is_an_error_that_says_so(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        saved_by_block(ODD, 2, 7, **options)
