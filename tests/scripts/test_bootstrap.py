"""scripts/bootstrap.py installs once for the same files, again for changed ones, and goes on after a failure."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from cs336_systems.repository import repository_root

SCRIPT = repository_root() / "scripts" / "bootstrap.py"


@pytest.fixture
def bootstrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script for a checkout elsewhere, which has no environment yet."""
    spec = importlib.util.spec_from_file_location("scripts_bootstrap", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    root = tmp_path / "checkout"
    (root / "scripts").mkdir(parents=True)
    (root / "pyproject.toml").write_text("[project]\n")
    (root / "constraints.txt").write_text("# known to work\ntorch==2.13.0\nnumpy==2.4.6\n")
    (root / "scripts" / "bootstrap.py").write_text("")
    monkeypatch.setattr(module, "ROOT", root)
    monkeypatch.setattr(module, "VENV", root / ".venv")
    monkeypatch.setattr(module, "STAMP", root / ".venv" / "installed-for")
    return module


@pytest.fixture
def calls(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would have been done: "venv" and the pip command lines, by a Python that is not there."""
    found: list[str] = []

    def create(folder: Path, *, with_pip: bool) -> None:
        assert with_pip
        assert not (folder / "bin").exists(), "an environment that cannot be mended would be kept"
        found.append("venv")
        (folder / "bin").mkdir(parents=True, exist_ok=True)
        (folder / "bin" / "python").touch()

    def run(command: list[str], *, check: bool, **_: Any) -> subprocess.CompletedProcess[str]:
        assert check, "a failing pip would go unnoticed"
        found.append(" ".join(command))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(bootstrap, "venv", SimpleNamespace(create=create))
    monkeypatch.setattr(bootstrap.subprocess, "run", run)
    monkeypatch.setattr(bootstrap, "os", SimpleNamespace(name="posix"))
    return found


def with_python(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, *version: int) -> None:
    """Let the script, and nothing else, think that this Python has another version."""
    text = ".".join(map(str, version))
    monkeypatch.setattr(bootstrap, "sys", SimpleNamespace(version_info=version, version=text, stderr=sys.stderr))


# Without anything installed ------------------------------------------------------------------------------------


def test_it_imports_nothing_but_the_standard_library() -> None:
    imported = set()
    for node in ast.walk(ast.parse(SCRIPT.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).partition(".")[0])
    assert imported
    assert imported <= set(sys.stdlib_module_names)


def test_it_is_importable_where_no_package_is_installed() -> None:
    """-S and -I: no site-packages, no environment variables, not the working directory."""
    call = f"import runpy; print(runpy.run_path({str(SCRIPT)!r})['EXTRAS'])"
    ended = subprocess.run(
        [sys.executable, "-S", "-I", "-c", call], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "dev" in ended.stdout


# When it installs ----------------------------------------------------------------------------------------------


def test_the_first_call_makes_the_environment_and_installs_torch_before_the_rest(
    bootstrap: ModuleType, calls: list[str]
) -> None:
    assert bootstrap.main() == 0
    environment, torch, rest = calls
    assert environment == "venv"
    assert torch.endswith("torch==2.13.0")
    assert "--constraint" in rest
    assert f"--editable {bootstrap.ROOT}[{bootstrap.EXTRAS}]" in rest
    python = str(bootstrap.VENV / "bin" / "python")
    assert [command.startswith(python) for command in (torch, rest)] == [True, True]


def test_unchanged_files_install_nothing(
    bootstrap: ModuleType, calls: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert bootstrap.main() == 0
    calls.clear()
    capsys.readouterr()
    assert bootstrap.main() == 0
    assert calls == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["constraints.txt", "pyproject.toml", "scripts/bootstrap.py"])
def test_a_changed_file_installs_again_into_the_same_environment(
    bootstrap: ModuleType, calls: list[str], name: str
) -> None:
    assert bootstrap.main() == 0
    calls.clear()
    with (bootstrap.ROOT / name).open("a") as file:
        file.write("# changed\n")
    assert bootstrap.main() == 0
    assert "venv" not in calls
    assert len(calls) == 2


def test_a_checkout_that_was_moved_gets_its_environment_afresh(
    bootstrap: ModuleType, calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bootstrap.main() == 0
    calls.clear()
    moved = bootstrap.ROOT.rename(tmp_path / "moved")
    monkeypatch.setattr(bootstrap, "ROOT", moved)
    monkeypatch.setattr(bootstrap, "VENV", moved / ".venv")
    monkeypatch.setattr(bootstrap, "STAMP", moved / ".venv" / "installed-for")
    assert bootstrap.main() == 0
    assert calls[0] == "venv"


def test_another_python_gets_an_environment_afresh(
    bootstrap: ModuleType, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bootstrap.main() == 0
    calls.clear()
    other = (3, 12, 9) if sys.version_info[:2] != (3, 12) else (3, 13, 9)
    with_python(bootstrap, monkeypatch, *other)
    assert bootstrap.main() == 0
    assert calls[0] == "venv"


def test_an_environment_without_a_python_is_made_again(bootstrap: ModuleType, calls: list[str]) -> None:
    assert bootstrap.main() == 0
    calls.clear()
    (bootstrap.VENV / "bin" / "python").unlink()
    (bootstrap.ROOT / "constraints.txt").write_text("torch==2.13.0\n")
    assert bootstrap.main() == 0
    assert calls[0] == "venv"


# When it cannot ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [(3, 10, 14), (3, 14, 0), (2, 7, 18)])
def test_another_python_than_the_supported_ones_is_an_error_that_says_which_are(
    bootstrap: ModuleType,
    calls: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    version: tuple[int, ...],
) -> None:
    with_python(bootstrap, monkeypatch, *version)
    assert bootstrap.main() == 2
    assert calls == []
    error = capsys.readouterr().err
    assert error.startswith("error: expected Python 3.11, 3.12 or 3.13, found " + ".".join(map(str, version)))
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("version", [(3, 11, 0), (3, 12, 4), (3, 13, 1)])
def test_the_supported_pythons_are_accepted(
    bootstrap: ModuleType, calls: list[str], monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...]
) -> None:
    with_python(bootstrap, monkeypatch, *version)
    assert bootstrap.main() == 0
    assert calls


@pytest.mark.parametrize("failing", ["torch==", "--editable"])
def test_a_failing_pip_ends_with_2_and_the_next_call_tries_again(
    bootstrap: ModuleType,
    calls: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    failing: str,
) -> None:
    succeed = bootstrap.subprocess.run

    def run(command: list[str], **keywords: Any) -> Any:
        if failing in " ".join(command):
            raise subprocess.CalledProcessError(1, command)
        return succeed(command, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(bootstrap.subprocess, "run", run)
        assert bootstrap.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: `")
    assert failing in error
    assert bootstrap.STAMP.read_text().endswith(f" {bootstrap.EMPTY}\n")
    calls.clear()
    assert bootstrap.main() == 0
    assert len(calls) >= 2


def test_ctrl_c_during_pip_ends_with_130_and_the_next_call_goes_on(
    bootstrap: ModuleType, calls: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bootstrap.subprocess, "run", run)
        assert bootstrap.main() == 130
    assert "interrupted: " in capsys.readouterr().err
    assert bootstrap.STAMP.read_text().endswith(f" {bootstrap.EMPTY}\n")
    calls.clear()
    assert bootstrap.main() == 0
    assert len(calls) >= 2


def test_an_environment_that_was_being_made_when_ctrl_c_came_is_made_again(
    bootstrap: ModuleType, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python is in it before pip is: without pip nothing could ever be installed into it."""
    create = bootstrap.venv.create

    def interrupted(folder: Path, **keywords: Any) -> None:
        create(folder, **keywords)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bootstrap, "venv", SimpleNamespace(create=interrupted))
        assert bootstrap.main() == 130
    calls.clear()
    assert bootstrap.main() == 0
    assert calls[0] == "venv"


def test_an_environment_that_somebody_else_made_is_not_touched(
    bootstrap: ModuleType, calls: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (bootstrap.VENV / "bin").mkdir(parents=True)
    (bootstrap.VENV / "bin" / "python").write_text("theirs")
    assert bootstrap.main() == 2
    assert "was not made by this script" in capsys.readouterr().err
    assert calls == []
    assert (bootstrap.VENV / "bin" / "python").read_text() == "theirs"


def test_constraints_without_torch_are_an_error_that_says_what_is_missing(
    bootstrap: ModuleType, calls: list[str]
) -> None:
    (bootstrap.ROOT / "constraints.txt").write_text("numpy==2.4.6\n")
    with pytest.raises(SystemExit, match=r"error: expected a line torch==… in .*constraints\.txt"):
        bootstrap.main()
    assert not any("pip" in call for call in calls)
