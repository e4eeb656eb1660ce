"""Machines are named by their hardware."""

from __future__ import annotations

import re

import psutil
import pytest
import torch

from cs336_systems.bench import machine
from cs336_systems.errors import UserError


@pytest.mark.parametrize(
    ("vendor", "family", "model", "name", "slug"),
    [
        ("GenuineIntel", "6", "143", "Intel(R) Xeon(R) Processor @ 2.10GHz", "xeon-sapphire-rapids"),
        ("AuthenticAMD", "26", "2", "AMD EPYC", "epyc-turin"),
        ("AuthenticAMD", "25", "33", "AMD Ryzen 9 5950X 16-Core Processor", "amd-ryzen-9-5950x"),
        ("GenuineIntel", "6", "140", "11th Gen Intel(R) Core(TM) i7-1185G7 @ 3.00GHz", "11th-gen-intel-core-i7-1185g7"),
    ],
)
def test_a_processor_is_named_after_its_microarchitecture_or_else_its_own_name(
    monkeypatch: pytest.MonkeyPatch, vendor: str, family: str, model: str, name: str, slug: str
) -> None:
    monkeypatch.setattr(
        machine,
        "_cpuinfo",
        lambda: {"vendor_id": vendor, "cpu family": family, "model": model, "model name": name},
    )
    assert machine.cpu_model() == {"name": name, "slug": slug}


def test_this_machine_has_a_name_fit_for_a_folder_with_its_number_of_cores() -> None:
    found = machine.this_machine("cpu")
    assert re.fullmatch(rf"[a-z0-9-]+-{machine.usable_cores()}c", found.name)
    assert found.description["cores"] == machine.usable_cores()


def test_auto_is_a_gpu_where_there_is_one_and_else_the_cpu() -> None:
    assert machine.resolve_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what is not there")
def test_a_gpu_asked_for_explicitly_never_falls_back() -> None:
    assert machine.resolve_device("cuda") == "cuda"
    with pytest.raises(UserError, match="'cuda' was asked for, but PyTorch finds no CUDA device"):
        machine.this_machine("cuda")


def test_an_unknown_device_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"unknown device 'gpu': did you mean 'cpu'\? Known: cpu, cuda, auto"):
        machine.resolve_device("gpu")


def test_available_memory_is_no_more_than_there_is() -> None:
    assert 0 < machine.available_memory_bytes() <= psutil.virtual_memory().total


@pytest.mark.gpu
def test_a_gpu_machine_is_named_after_its_gpus() -> None:
    found = machine.this_machine("cuda")
    assert found.name.endswith(f"-x{torch.cuda.device_count()}")
    assert found.description["device_memory_gib"] > 0
