"""pyproject.toml, constraints.txt, environment.yml and scripts/bootstrap.py describe the same environment."""

from __future__ import annotations

import ast
import re
import tomllib
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from cs336_systems.repository import repository_root

ROOT = repository_root()


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def extras() -> dict[str, list[Requirement]]:
    return {name: [Requirement(text) for text in texts] for name, texts in project()["optional-dependencies"].items()}


def requirements() -> list[Requirement]:
    """Of the core and of every extra."""
    core = [Requirement(text) for text in project()["dependencies"]]
    return core + [requirement for extra in extras().values() for requirement in extra]


def pins() -> dict[str, str]:
    """Version by name in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found: dict[str, str] = {}
    for line in lines:
        if line.strip() and not line.startswith("#"):
            name, separator, version = line.partition("==")
            assert separator, f"{line!r} pins no version"
            found[canonicalize_name(name.strip())] = version.strip()
    return found


def conda() -> tuple[list[str], list[str]]:
    """What environment.yml takes from conda, and what by pip."""
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    (by_pip,) = (entry["pip"] for entry in dependencies if isinstance(entry, dict))
    return [entry for entry in dependencies if isinstance(entry, str)], by_pip


def named_extras(text: str) -> set[str]:
    """The extras in `.[a,b]`."""
    match = re.search(r"\[([\w,-]+)\]", text)
    assert match is not None, f"{text!r} names no extras"
    return set(match[1].split(","))


def constant_of_bootstrap(name: str) -> Any:
    for node in ast.parse((ROOT / "scripts" / "bootstrap.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in (name, f"({name})"):
            return ast.literal_eval(node.value)
    raise AssertionError(f"scripts/bootstrap.py has no {name}")


# pyproject.toml ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["3.11.0", "3.12.4", "3.13.9"])
def test_the_supported_pythons_are_admitted(version: str) -> None:
    assert SpecifierSet(project()["requires-python"]).contains(version)


@pytest.mark.parametrize("version", ["3.10.14", "3.14.0"])
def test_other_pythons_are_refused(version: str) -> None:
    assert not SpecifierSet(project()["requires-python"]).contains(version)


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0"])
def test_the_torch_of_clusters_and_the_newest_are_admitted(version: str) -> None:
    (torch,) = (requirement for requirement in requirements() if requirement.name == "torch")
    assert torch.specifier.contains(version)


def test_the_core_needs_neither_jupyter_nor_a_gpu() -> None:
    core = {canonicalize_name(Requirement(text).name) for text in project()["dependencies"]}
    elsewhere = {"triton", "nvtx", "jupyterlab", "ipykernel", "papermill", "nbformat", "nbclient", "submitit", "pytest"}
    assert core & elsewhere == set()


def test_no_package_is_required_twice() -> None:
    names = [canonicalize_name(requirement.name) for requirement in requirements()]
    assert sorted(names) == sorted(set(names))


def test_what_has_no_wheel_for_a_system_is_not_required_there() -> None:
    found = {requirement.name: requirement.marker for requirement in extras()["gpu"]}
    for name, system in (("nvtx", "darwin"), ("triton", "darwin"), ("triton", "win32")):
        marker = found[name]
        assert marker is not None
        assert not marker.evaluate({"sys_platform": system})


# constraints.txt -----------------------------------------------------------------------------------------------


def test_everything_pinned_is_a_dependency_and_the_pin_is_admitted() -> None:
    admitted = {str(canonicalize_name(requirement.name)): requirement.specifier for requirement in requirements()}
    assert pins()
    for name, version in pins().items():
        assert name in admitted, f"{name} is pinned and nothing requires it"
        assert admitted[name].contains(version), f"{name} {version} is pinned against {admitted[name]}"


def test_every_dependency_is_pinned() -> None:
    assert {canonicalize_name(requirement.name) for requirement in requirements()} - set(pins()) == set()


# environment.yml and bootstrap.py ------------------------------------------------------------------------------


def test_conda_provides_the_same_pythons_as_pip_asks_for_and_pip_itself() -> None:
    by_conda, _ = conda()
    pythons = [Requirement(entry) for entry in by_conda if Requirement(entry).name == "python"]
    assert [python.specifier for python in pythons] == [SpecifierSet(project()["requires-python"])]
    assert "pip" in by_conda


def test_conda_installs_the_pinned_torch_and_the_rest_under_the_constraints() -> None:
    _, by_pip = conda()
    assert f"torch=={pins()['torch']}" in by_pip
    assert "--constraint constraints.txt" in by_pip


def test_conda_installs_the_checkout_with_the_extras_that_bootstrap_installs() -> None:
    _, by_pip = conda()
    (editable,) = (entry for entry in by_pip if entry.startswith("-e "))
    assert editable.startswith("-e .[")
    assert named_extras(editable) >= set(constant_of_bootstrap("EXTRAS").split(","))


def test_the_extras_that_are_installed_exist() -> None:
    _, by_pip = conda()
    installed = set().union(*(named_extras(entry) for entry in by_pip if entry.startswith("-e ")))
    assert installed | set(constant_of_bootstrap("EXTRAS").split(",")) <= set(extras())


def test_bootstrap_accepts_the_pythons_that_the_project_supports() -> None:
    oldest, newest = constant_of_bootstrap("OLDEST, NEWEST")
    supported = SpecifierSet(project()["requires-python"])
    minors = [minor for minor in range(40) if supported.contains(f"3.{minor}.0")]
    assert [oldest, newest] == [(3, minors[0]), (3, minors[-1])]
