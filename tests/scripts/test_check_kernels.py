"""The kernels fit the GPUs they are cut for, as the compiler says without one being there."""

from __future__ import annotations

from types import ModuleType
from typing import Any, get_args

import pytest
from source_files import load_script, status_of

pytest.importorskip("triton")
from cs336_systems.attention.flash_tiles import KERNELS, SHARED_BYTES, Precision, candidates, tiles_for

pytestmark = pytest.mark.problem("flash_forward")

every_kernel = pytest.mark.parametrize("kernel", KERNELS)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("check_kernels")


def assert_fits_without_a_spill(script: ModuleType, variant: Any) -> None:
    assert variant.may_spill == 0
    found = script.compiled(variant)
    assert (found.stack_bytes, found.local_bytes) == (0, 0)
    assert 0 < found.shared_bytes <= SHARED_BYTES[variant.capability]
    assert script.fault(variant, found) == ""


@every_kernel
@pytest.mark.parametrize("capability", [80, 86, 100])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_no_16_bit_kernel_spills_and_its_tiles_fit_into_shared_memory(
    script: ModuleType, kernel: Any, head_dim: int, capability: int
) -> None:
    tiles = tiles_for(kernel, head_dim, "half", capability)
    variant = script.Variant(kernel, head_dim, "bf16", "half", is_causal=True, capability=capability, tiles=tiles)
    assert_fits_without_a_spill(script, variant)


@every_kernel
def test_nor_does_any_candidate_on_hopper_in_the_largest_usual_head_dimension(script: ModuleType, kernel: Any) -> None:
    for tiles in candidates(kernel, 128, "half", 90):
        variant = script.Variant(kernel, 128, "bf16", "half", is_causal=True, capability=90, tiles=tiles)
        assert_fits_without_a_spill(script, variant)


@every_kernel
def test_a_float32_kernel_of_a_dimension_that_is_no_power_of_two_compiles_in_tf32(
    script: ModuleType, kernel: Any
) -> None:
    tiles = tiles_for(kernel, 80, "tf32", 90)
    variant = script.Variant(kernel, 80, "fp32", "tf32", is_causal=False, capability=90, tiles=tiles)
    found = script.compiled(variant)
    assert found.registers > 0
    assert script.fault(variant, found) == ""


def test_a_spill_that_is_not_known_of_and_too_much_shared_memory_are_faults(script: ModuleType) -> None:
    tiles = tiles_for("forward", 64, "half", 86)
    variant = script.Variant("forward", 64, "bf16", "half", is_causal=True, capability=86, tiles=tiles)
    found = script.Resources(registers=255, stack_bytes=8, local_bytes=0, shared_bytes=SHARED_BYTES[86] + 1)
    told = script.fault(variant, found)
    assert "spills 8 B, 0 are known of" in told
    assert f"{SHARED_BYTES[86]} are there" in told


def test_the_script_prints_a_row_per_variant_with_its_tiles(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(script, "--head-dim", "64", "--dtype", "bf16", "--capability", "90", "--first") == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(KERNELS) * 2
    assert [word in rows[0] for word in ("precision", "tiles")] == [True, True]
    for kernel in KERNELS:
        assert sum(str(tiles_for(kernel, 64, "half", 90)) in row and kernel in row for row in rows) == 2


def test_what_is_compiled_is_every_candidate_in_every_precision_unless_less_is_asked_for(script: ModuleType) -> None:
    def chosen(*options: str) -> set[tuple[Any, ...]]:
        found = script.variants_of(script.parse(["--head-dim", "64", "--capability", "90", *options]))
        return {(each.kernel, each.dtype, each.precision, each.is_causal, each.tiles) for each in found}

    whole, first = chosen(), chosen("--first")
    precisions: dict[str, tuple[Precision, ...]] = {"fp16": ("half",), "bf16": ("half",), "fp32": ("ieee", "tf32")}
    assert whole == {
        (kernel, dtype, precision, is_causal, tiles)
        for kernel in KERNELS
        for dtype in precisions
        for precision in precisions[dtype]
        for is_causal in (True, False)
        for tiles in candidates(kernel, 64, precision, 90)
    }
    assert first < whole
    assert len(first) == len(KERNELS) * 4 * 2
    assert {each[2] for each in chosen("--dtype", "fp32", "--precision", "tf32")} == {"tf32"}


def test_an_unknown_gpu_is_an_error_that_lists_the_known(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(script, "--capability", "70") == 2
    assert "unknown capability '70'" in capsys.readouterr().err


def test_a_head_dimension_that_no_kernel_takes_is_an_error(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(script, "--head-dim", "64", "257") == 2
    assert "up to 256, found 257" in capsys.readouterr().err


@every_kernel
@pytest.mark.parametrize("precision", get_args(Precision))
def test_there_are_two_to_four_candidates_for_every_head_dimension_each_named_once(
    kernel: Any, precision: Precision
) -> None:
    for head_dim in range(1, 257):
        for capability in SHARED_BYTES:
            known = candidates(kernel, head_dim, precision, capability)
            assert 2 <= len(known) <= 4
            assert len(set(known)) == len(known)
            assert min(min(tiles.queries, tiles.keys) for tiles in known) >= 16
            assert tiles_for(kernel, head_dim, precision, capability) == known[0]
    with pytest.raises(ValueError, match="no tiles for head dimension 257"):
        candidates(kernel, 257, precision, 90)
