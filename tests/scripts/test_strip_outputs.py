"""scripts/strip_outputs.py removes what running a notebook leaves behind, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
from source_files import load_script, status_of

from cs336_systems.repository import repository_root

SCRIPT = repository_root() / "scripts" / "strip_outputs.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("strip_outputs")


def content() -> dict[str, Any]:
    """A notebook as JupyterLab leaves it after a run under papermill."""
    return {
        "cells": [
            {"cell_type": "markdown", "id": "title", "metadata": {"collapsed": True}, "source": ["# Title – été"]},
            {
                "cell_type": "code",
                "execution_count": 7,
                "id": "parameters",
                "metadata": {
                    "tags": ["parameters"],
                    "execution": {"shell.execute_reply": "2026"},
                    "papermill": {"duration": 1.0},
                    "scrolled": True,
                },
                "outputs": [{"output_type": "stream", "name": "stdout", "text": ["out"]}],
                "source": ["steps = 3\n", "warmup = 1"],
            },
        ],
        "metadata": {
            "kernelspec": {"display_name": "my environment", "language": "python", "name": "mine"},
            "language_info": {"name": "python", "version": "3.12.1"},
            "papermill": {"duration": 2.0},
            "widgets": {"state": {}},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


@pytest.fixture
def notebook(tmp_path: Path) -> Path:
    path = tmp_path / "made.ipynb"
    path.write_text(json.dumps(content()), encoding="utf-8")
    return path


def test_outputs_counts_and_traces_of_the_run_go(script: ModuleType, notebook: Path) -> None:
    assert status_of(script, notebook) == 0
    stripped = json.loads(notebook.read_text(encoding="utf-8"))
    code = stripped["cells"][1]
    assert (code["outputs"], code["execution_count"]) == ([], None)
    assert code["metadata"] == {"tags": ["parameters"]}
    assert set(stripped["metadata"]) == {"kernelspec", "language_info"}


def test_sources_ids_and_tags_stay(script: ModuleType, notebook: Path) -> None:
    assert status_of(script, notebook) == 0
    stripped = json.loads(notebook.read_text(encoding="utf-8"))
    for before, after in zip(content()["cells"], stripped["cells"], strict=True):
        assert [before[name] for name in ("cell_type", "id", "source")] == [
            after[name] for name in ("cell_type", "id", "source")
        ]
    assert (stripped["nbformat"], stripped["nbformat_minor"]) == (4, 5)
    assert "été" in notebook.read_text(encoding="utf-8")


def test_which_python_ran_it_is_no_business_of_the_source(script: ModuleType, notebook: Path) -> None:
    assert status_of(script, notebook) == 0
    metadata = json.loads(notebook.read_text(encoding="utf-8"))["metadata"]
    assert metadata["kernelspec"] == {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert metadata["language_info"] == {"name": "python"}


def test_stripping_twice_changes_nothing_the_second_time(
    script: ModuleType, notebook: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(script, notebook) == 0
    assert capsys.readouterr().out == f"{notebook}: stripped\n"
    once = notebook.read_bytes()
    assert status_of(script, notebook) == 0
    assert capsys.readouterr().out == ""
    assert notebook.read_bytes() == once


def test_checking_ends_with_1_where_there_is_something_to_strip_and_changes_nothing(
    script: ModuleType, notebook: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = notebook.read_bytes()
    assert status_of(script, "--check", notebook) == 1
    assert capsys.readouterr().out.startswith(f"{notebook}: has outputs")
    assert notebook.read_bytes() == before


def test_checking_ends_with_0_where_there_is_nothing_to_strip(
    script: ModuleType, notebook: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(script, notebook) == 0
    capsys.readouterr()
    assert status_of(script, "--check", notebook) == 0
    assert capsys.readouterr().out == ""


def test_the_notebooks_of_the_checkout_are_stripped(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert list((repository_root() / "notebooks").glob("*.ipynb"))
    assert status_of(script, "--check") == 0, capsys.readouterr().out


def test_of_several_notebooks_every_one_with_outputs_is_told(
    script: ModuleType, notebook: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = tmp_path / "second.ipynb"
    second.write_bytes(notebook.read_bytes())
    assert status_of(script, "--check", notebook, second) == 1
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize(
    "text",
    ["", "{", "{}", "[]", "3", '"cells"', '{"cells": 3}', '{"cells": [3], "metadata": {}}', '{"cells": {"a": 1}}'],
)
def test_what_is_no_notebook_is_an_error_that_names_it_and_stays(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    path = tmp_path / "no.ipynb"
    path.write_text(text, encoding="utf-8")
    assert status_of(script, path) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: cannot read the notebook {path}: ")
    assert len(error.splitlines()) == 1
    assert path.read_text(encoding="utf-8") == text


def test_bytes_that_are_no_text_are_an_error(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "no.ipynb"
    path.write_bytes(b"\xff\xfe\x00")
    assert status_of(script, path) == 2
    assert capsys.readouterr().err.startswith(f"error: cannot read the notebook {path}: ")


def test_a_notebook_that_is_not_there_is_an_error(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(script, tmp_path / "nowhere.ipynb") == 2
    assert "nowhere.ipynb" in capsys.readouterr().err


# The git hook --------------------------------------------------------------------------------------------------


def run_in(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A command with pre-commit's own files in a folder of this test's, and nobody's settings of git."""
    environment = os.environ | {"PRE_COMMIT_HOME": str(folder.parent / "pre-commit"), "GIT_CONFIG_GLOBAL": os.devnull}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def commit(folder: Path, message: str) -> subprocess.CompletedProcess[str]:
    identity = ("-c", "user.name=n", "-c", "user.email=n@example.org")
    assert run_in(folder, "git", "add", ".").returncode == 0
    return run_in(folder, "git", *identity, "commit", "-m", message)


def test_a_commit_with_outputs_is_refused_and_stripped_and_then_goes_through(tmp_path: Path) -> None:
    """With the files that the hook needs and no others: it runs before anything is installed."""
    checkout = tmp_path / "checkout"
    needed = ["__init__", "errors", "files", "repository"]
    for name in (".pre-commit-config.yaml", "problems.toml", "scripts/strip_outputs.py"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(repository_root() / name, checkout / name)
    (checkout / "cs336_systems").mkdir()
    for name in needed:
        shutil.copy(repository_root() / "cs336_systems" / f"{name}.py", checkout / "cs336_systems")
    notebook = checkout / "notebooks" / "01_made.ipynb"
    notebook.parent.mkdir()
    cell = nbformat.v4.new_code_cell("1 + 1", execution_count=3, outputs=[nbformat.v4.new_output("stream", text="2")])
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), notebook)
    assert run_in(checkout, "git", "init", "--quiet").returncode == 0
    installed = run_in(checkout, sys.executable, "-m", "pre_commit", "install")
    assert installed.returncode == 0, installed.stderr
    refused = commit(checkout, "with outputs")
    assert refused.returncode != 0
    assert "01_made.ipynb: stripped" in refused.stdout + refused.stderr
    assert nbformat.read(notebook, as_version=4).cells[0].outputs == []
    accepted = commit(checkout, "without")
    assert accepted.returncode == 0, accepted.stdout + accepted.stderr
