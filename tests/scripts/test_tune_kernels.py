"""scripts/tune_kernels.py tunes what the workbook measures, in a time that has a bound; without a GPU it says so."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
from source_files import load_script, status_of

from cs336_systems.repository import MARKER, repository_root

pytest.importorskip("triton", reason="Triton is for Linux only")
from cs336_systems.attention import flash_tuning
from cs336_systems.attention.flash_launch import Problem
from cs336_systems.attention.flash_tiles import KERNELS

pytestmark = pytest.mark.problem("flash_forward")

SECONDS_PER_COMPILATION = 0.35
SECONDS_PER_TIMING = 0.08


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("tune_kernels")


@pytest.fixture
def _on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))


def problems(script: ModuleType) -> list[Problem]:
    return [
        Problem(
            1,
            setting.heads,
            setting.heads,
            setting.length,
            setting.length,
            setting.head_dim,
            script.DTYPES[setting.dtype],
            0 if setting.is_causal else None,
            setting.precision,
            torch.device("cuda"),
        )
        for setting in script.settings(list(script.HEAD_DIMS), list(script.DTYPES))
    ]


def test_every_setting_is_of_a_class_of_its_own(script: ModuleType) -> None:
    keys = [flash_tuning.key_of("forward", problem) for problem in problems(script)]
    assert len(set(keys)) == len(keys)
    # 16 bits: three lengths of one and of many heads, for every head dimension and for two of them without a mask, too;
    # float32: two lengths in two precisions.
    assert len(keys) == (4 + 2) * 3 * 2 + 4 * 2 * 2 * 2


@pytest.mark.usefixtures("_on_hopper")
def test_from_empty_caches_it_is_a_matter_of_minutes(script: ModuleType) -> None:
    compiled = set()
    timed = 0
    for problem in problems(script):
        for kernel in KERNELS:
            for tiles in flash_tuning.known_tiles(kernel, problem):
                timed += 1
                # Triton compiles anew for another number of heads if it is 1, not for another length.
                kind = (kernel, problem.head_dim, problem.dtype, problem.precision, problem.offset is None)
                compiled.add((*kind, problem.heads == 1, tiles))
    assert len(compiled) * SECONDS_PER_COMPILATION + timed * SECONDS_PER_TIMING < 180


def test_options_leave_fewer_settings(script: ModuleType) -> None:
    found = script.settings([64], ["fp32"])
    assert {(each.head_dim, each.dtype) for each in found} == {(64, "fp32")}
    assert {each.precision for each in found} == {"ieee", "tf32"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_without_a_gpu_it_is_one_line(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(script, "--head-dim", "64") == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: tiles are timed on a CUDA device, and there is none")
    assert len(told.err.splitlines()) == 1


def test_a_head_dimension_that_is_not_tuned_is_an_error(script: ModuleType) -> None:
    with pytest.raises(SystemExit):
        script.parse(["--head-dim", "48"])


@pytest.mark.gpu
def test_on_a_gpu_what_is_found_is_shown_and_kept(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copy(repository_root() / MARKER, tmp_path)
    monkeypatch.setenv("CS336_ROOT", str(tmp_path))
    monkeypatch.setattr(script, "LENGTHS", {"bf16": (256,)})
    flash_tuning.winners.cache_clear()
    for new in (2 * 2 * len(KERNELS), 0):  # two masks, two numbers of heads
        assert status_of(script, "--head-dim", "64", "--dtype", "bf16") == 0
        told = capsys.readouterr().out
        assert len([line for line in told.splitlines() if line.startswith("|")]) == 2 + 2 * 2 * len(KERNELS)
        assert f"{2 * 2 * len(KERNELS)} winners, {new} of them new" in told
    assert flash_tuning.winners_file(torch.device("cuda")).is_relative_to(tmp_path)
    flash_tuning.winners.cache_clear()
