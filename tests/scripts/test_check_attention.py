"""scripts/check_attention.py says rung by rung how an implementation does, and stops where it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from source_files import load_script, status_of

from cs336_systems.attention.ladder import RUNGS
from cs336_systems.repository import repository_root

# A mask that is not asked for, and no mask where it is.
WRONG = """
from cs336_systems.attention.flash import attention

def mine(query, key, value, *, is_causal):
    return attention(query, key, value, is_causal=not is_causal)
"""
# No mask, and no head dimension of 80.
NO_MASK = """
from cs336_systems.attention.flash import attention

def mine(query, key, value, *, is_causal):
    if key.shape[-1] == 80:
        raise NotImplementedError("powers of two alone")
    return attention(query, key, value, is_causal=False)
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("check_attention")


def test_a_right_implementation_has_a_line_per_rung_and_status_0(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(script, "cs336_systems.attention.flash:FlashAttention", "--device", "cpu") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[: len(RUNGS)] == [f"{'ok':<13}  {rung.name}" for rung in RUNGS]
    assert lines[-1] == f"cs336_systems.attention.flash:FlashAttention on cpu in float32: {len(RUNGS)} passed"


def test_a_wrong_one_stops_at_the_first_failure_with_what_is_wrong_and_what_usually_causes_it(
    script: ModuleType, capsys: pytest.CaptureFixture[str], write_module: Callable[[str], str]
) -> None:
    name = write_module(WRONG)
    assert status_of(script, f"{name}:mine", "--device", "cpu") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "FAILED         one tile"
    assert [line[4:13].strip() for line in lines[1:-2] if line[4] != " "] == ["tests", "found", "usually"]
    told = " ".join(line.strip() for line in lines)
    assert "Wrong: queries 0 to 14; right: 15." in told
    assert "This is what comes out with a mask that is not asked for." in told
    assert lines[-1] == f"{name}:mine on cpu in float32: 1 failed, {len(RUNGS) - 1} not tried"
    assert max(map(len, lines)) <= 110


def test_all_rungs_are_tried_when_asked_for_and_a_refusal_is_told_beside_its_rung(
    script: ModuleType, capsys: pytest.CaptureFixture[str], write_module: Callable[[str], str]
) -> None:
    name = write_module(NO_MASK)
    assert status_of(script, f"{name}:mine", "--device", "cpu", "--all") == 1
    lines = capsys.readouterr().out.splitlines()
    of_rungs = [line for line in lines[:-2] if not line.startswith("    ")]
    assert [line[15:].partition(":")[0] for line in of_rungs] == [rung.name for rung in RUNGS]
    told = {line[15:].partition(":")[0]: line[:15].strip() for line in of_rungs}
    assert told["causal, several tiles"] == told["causal gradients"] == "FAILED"
    assert told["gradient of K"] == "ok"
    assert told["logsumexp"] == "skipped"
    (refused,) = [line for line in of_rungs if line.startswith("not supported")]
    assert f"head dimension 80: it raised NotImplementedError: powers of two alone at {name}.py:6" in refused


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["flahs"], "unknown attention 'flahs': did you mean 'flash'?"),
        (["flash", "--dtype", "float31"], "unknown dtype 'float31': did you mean 'float32'?"),
        (["sdpa-cudnn"], "PyTorch's backend CUDNN_ATTENTION takes no torch.float32"),
        (["math:pi"], "math:pi must be a function"),
    ],
)
def test_what_cannot_be_tried_is_one_line_and_status_2(
    script: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    assert status_of(script, *arguments, "--device", "cpu") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {told}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("source", "told"),
    [("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"), ("def", "SyntaxError")],
)
def test_a_module_that_cannot_be_imported_is_one_line_without_a_traceback(
    tmp_path: Path, source: str, told: str
) -> None:
    (tmp_path / "unimportable.py").write_text(source, encoding="utf-8")
    program = repository_root() / "scripts" / "check_attention.py"
    paths = os.pathsep.join(filter(None, [str(repository_root()), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, str(program), "unimportable:mine", "--device", "cpu"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: cannot import 'unimportable' for 'unimportable:mine': {told}")
    assert done.stderr.count("\n") == 1


def test_on_a_cpu_the_triton_kernels_say_where_they_run(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton is for Linux only")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert status_of(script, "flash-triton", "--device", "cpu") == 2
    assert capsys.readouterr().err.startswith("error: the Triton kernels need tensors on a CUDA device, found cpu")
