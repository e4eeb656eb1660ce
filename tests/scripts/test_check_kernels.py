"""The kernels fit the GPUs they are cut for, as the compiler says without one being there."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
from source_files import load_script, status_of

pytest.importorskip("triton")
from cs336_systems.attention.flash_tiles import KERNELS, SHARED_BYTES, tiles_for

pytestmark = pytest.mark.problem("flash_forward")

every_kernel = pytest.mark.parametrize("kernel", KERNELS)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("check_kernels")


@every_kernel
@pytest.mark.parametrize("capability", [80, 86, 90, 100])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_no_16_bit_kernel_spills_and_its_tiles_fit_into_shared_memory(
    script: ModuleType, kernel: Any, head_dim: int, capability: int
) -> None:
    variant = script.Variant(kernel, head_dim, "bf16", is_causal=True, capability=capability)
    assert variant.may_spill == 0
    found = script.compiled(variant)
    assert (found.stack_bytes, found.local_bytes) == (0, 0)
    assert 0 < found.shared_bytes <= SHARED_BYTES[capability]
    assert script.fault(variant, found) == ""


@every_kernel
def test_a_float32_kernel_of_a_dimension_that_is_no_power_of_two_compiles(script: ModuleType, kernel: Any) -> None:
    found = script.compiled(script.Variant(kernel, 80, "fp32", is_causal=False, capability=90))
    assert found.registers > 0
    assert found.shared_bytes <= SHARED_BYTES[90]


def test_a_spill_that_is_not_known_of_and_too_much_shared_memory_are_faults(script: ModuleType) -> None:
    variant = script.Variant("forward", 64, "bf16", True, 86)
    found = script.Resources(registers=255, stack_bytes=8, local_bytes=0, shared_bytes=SHARED_BYTES[86] + 1)
    told = script.fault(variant, found)
    assert "spills 8 B, 0 are known of" in told
    assert f"{SHARED_BYTES[86]} are there" in told


def test_the_script_prints_a_row_per_variant(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(script, "--head-dim", "64", "--dtype", "bf16", "--capability", "90") == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(KERNELS) * 2


def test_an_unknown_gpu_is_an_error_that_lists_the_known(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(script, "--capability", "70") == 2
    assert "unknown capability '70'" in capsys.readouterr().err


@every_kernel
def test_there_are_tiles_of_at_least_16_for_every_head_dimension(kernel: Any) -> None:
    for head_dim in range(1, 257):
        for itemsize in (2, 4):
            for capability in SHARED_BYTES:
                tiles = tiles_for(kernel, head_dim, itemsize, capability)
                assert min(tiles.queries, tiles.keys) >= 16
    with pytest.raises(ValueError, match="no tiles for head dimension 257"):
        tiles_for(kernel, 257, 2, 90)
