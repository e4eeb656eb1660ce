"""Which precision every tensor of a small model has under autocast: observed by hooks.

Problem `benchmarking_mixed_precision`, part (a). Two linear layers with ReLU and LayerNorm between them; its forward
and its loss run under autocast, its backward after it. What CUDA's autocast does is observed on a GPU as it is, on a
CPU by CUDA's rules (`analysis/cuda_autocast.py`); beside it stands what a CPU's own does.

Source: CS336 assignment 2, section 1.1.5.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from cs336_systems.analysis.cuda_autocast import cuda_rules
from cs336_systems.analysis.hardware import Peaks
from cs336_systems.bench import grid as grids
from cs336_systems.bench.machine import resolve_device
from cs336_systems.bench.records import Measurement, Record, Store
from cs336_systems.bench.sweep import OnPart
from cs336_systems.errors import unknown_name

RULES = ("cuda", "cpu")
HALVES = ("float16", "bfloat16")
PARAMETERS, LOSS, GRADIENTS = "parameters within autocast", "loss", "gradients"
OBSERVED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        PARAMETERS: (),
        "output of the first linear layer": ("linear",),
        "output of ReLU": ("relu",),
        "output of LayerNorm": ("layer_norm",),
        "logits": ("linear",),
        LOSS: ("cross_entropy_loss", "log_softmax.int", "nll_loss"),
        GRADIENTS: (),
    }
)
"""What is observed, in the order of a step, and the operators of PyTorch that make it."""


class ToyModel(nn.Module):
    """Linear, ReLU, LayerNorm, linear."""

    def __init__(self, in_features: int, out_features: int, hidden: int = 10) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden, bias=False)
        self.relu = nn.ReLU()
        self.ln = nn.LayerNorm(hidden)
        self.fc2 = nn.Linear(hidden, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.ln(self.relu(self.fc1(x))))
        return out


@dataclasses.dataclass(frozen=True)
class Case:
    """The toy model under one autocast.

    Raises:
        UserError: unknown rules, or an unknown precision.
    """

    rules: str
    """Whose autocast: cuda's or a cpu's."""
    autocast: str
    device: str
    in_features: int = 20
    out_features: int = 5
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name, known in (("rules", RULES), ("autocast", HALVES)):
            if getattr(self, name) not in known:
                raise unknown_name(name, getattr(self, name), known)

    def __str__(self) -> str:
        return f"{self.autocast}, {self.rules} rules"


def grid(*, device: str = "auto") -> list[grids.Cell[Case]]:
    """CUDA's rules and a CPU's in both half precisions; a CPU's only where the tensors are on a CPU."""
    return grids.product(Case, rules=RULES, autocast=HALVES, device=resolve_device(device), skip=_not_here)


def _not_here(case: Case) -> str | None:
    return "a CPU's rules are those of tensors on a CPU" if (case.rules, case.device) == ("cpu", "cuda") else None


def measure(case: Case, on_part: OnPart) -> Measurement:
    """One forward, loss and backward; values: `dtypes`, by what was observed."""
    followed = cuda_rules() if (case.rules, case.device) == ("cuda", "cpu") else contextlib.nullcontext()
    torch.manual_seed(0)
    with torch.device(case.device), followed:
        model = ToyModel(case.in_features, case.out_features)
        x = torch.randn(case.batch_size, case.in_features)
        targets = torch.randint(case.out_features, (case.batch_size,))
        dtypes = observe(model, x, targets, case.device, getattr(torch, case.autocast))
    on_part(1.0)
    return Measurement(values={"dtypes": {name: dtypes[name] for name in OBSERVED}})


def observe(model: ToyModel, x: Tensor, targets: Tensor, device: str, half: torch.dtype) -> dict[str, str]:
    """The precisions of a step under autocast, by what they are of."""
    dtypes: dict[str, str] = {}
    modules = (model.fc1, model.relu, model.ln, model.fc2)
    names = [name for name in OBSERVED if name not in (PARAMETERS, LOSS, GRADIENTS)]

    def observer(name: str) -> Any:
        def see(module: nn.Module, inputs: object, output: Tensor) -> None:
            del module, inputs
            dtypes[name] = _told({output.dtype})

        return see

    with contextlib.ExitStack() as stack:
        for name, module in zip(names, modules, strict=True):
            stack.callback(module.register_forward_hook(observer(name)).remove)
        with torch.autocast(device, dtype=half):
            dtypes[PARAMETERS] = _told({parameter.dtype for parameter in model.parameters()})
            loss = nn.functional.cross_entropy(model(x), targets)
    loss.backward()
    dtypes[LOSS] = _told({loss.dtype})
    dtypes[GRADIENTS] = _told({parameter.grad.dtype for parameter in model.parameters() if parameter.grad is not None})
    return dtypes


def _told(dtypes: set[torch.dtype]) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def summarise(
    records: Sequence[Record],
    peaks: Peaks,
    *,
    store: Store | None = None,
    fingerprint: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """One row per record and tensor that is observed: its precision, empty where there is no record."""
    del peaks, store  # arguments of every experiment's
    rows = []
    for record in records:
        shared = {
            "case": record.key,
            **record.case,
            **record.circumstances(fingerprint),
            "noise": "",  # a busy machine changes no precision
        }
        dtypes = record.measurement.values.get("dtypes", {})
        rows += [
            {**shared, "observed": name, "operators": operators, "dtype": dtypes.get(name, "")}
            for name, operators in OBSERVED.items()
        ]
    return pd.DataFrame(rows)


def predicted_seconds(case: Case, peaks: Peaks, slowdown: float) -> float:
    """A model of a hundred parameters."""
    del case, peaks, slowdown
    return STEP_S


STEP_S = 0.1
"""About what building the model and one step of it take."""
