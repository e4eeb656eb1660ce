"""What others published for the same work, to stand beside what is measured here.

The tables are in data/reference/, each with its source and hardware in the README there; this module knows which of
their rows is which work. Times are in milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

import pandas as pd

from cs336_systems.model import TransformerConfig

A100 = "A100 40 GB"
H100 = "H100 80 GB"
NAN = float("nan")

# Standard setting: five warm-ups, vocabulary 10,000, TF32 off.
_A100_TABLES = MappingProxyType(
    {
        ("forward", "none"): "e2e_forward_a100",
        ("forward-backward", "none"): "e2e_forward_backward_a100",
        ("step", "none"): "e2e_train_step_a100",
        ("step", "bfloat16"): "e2e_train_step_bf16_autocast_a100",
    }
)
_A100_FEW_WARMUPS = MappingProxyType({0: "e2e_forward_no_warmup_a100", 1: "e2e_forward_one_warmup_a100"})
PUBLISHED_WARMUPS = (*_A100_FEW_WARMUPS, 5)
"""The numbers of warm-ups that the published tables were taken with."""
PUBLISHED_STEPS = 10
"""How many steps their means and deviations are taken over."""
PUBLISHED_DECIMALS_MS = 1
"""The A100's means and deviations are published to a tenth of a millisecond, so a deviation of 0 is one below that."""
_MODEL = ("d_model", "d_ff", "num_layers", "num_heads", "context_length")
_H100_TABLE = "transformer_train_step_h100"


class PublishedSteps:
    """Published times of the handout's model sizes: A100 in eager float32 (and bf16 autocast), H100 full steps."""

    def __init__(self, reference: Callable[[str], pd.DataFrame]) -> None:
        """`reference` reads a table by its name."""
        self._tables = {
            name: reference(name) for name in (*_A100_TABLES.values(), *_A100_FEW_WARMUPS.values(), _H100_TABLE)
        }
        self._tables[_H100_TABLE] = self._tables[_H100_TABLE].assign(batch_size=4)

    def beside(
        self,
        config: TransformerConfig,
        *,
        phase: str,
        batch_size: int,
        autocast: str = "none",
        tf32: bool = False,
        compiled: bool = False,
        warmup: int = 5,
    ) -> dict[str, float]:
        """Columns `a100_ms`, `a100_std_ms` and `h100_ms`; NaN where nothing was published for this work.

        After two warm-ups steps are taken to be as steady as after the five of the published tables.
        """
        found = {"a100_ms": NAN, "a100_std_ms": NAN, "h100_ms": NAN}
        if config.vocab_size != 10_000:
            return found
        table = _A100_TABLES.get((phase, autocast))
        if warmup in _A100_FEW_WARMUPS:
            table = _A100_FEW_WARMUPS[warmup] if (phase, autocast) == ("forward", "none") else None
        if table is not None and not compiled and not tf32:
            row = self._row(table, config, batch_size)
            if row is not None:
                found |= {"a100_ms": 1e3 * row["mean_s"], "a100_std_ms": 1e3 * row["std_s"]}
        if (phase, autocast) == ("step", "none") and warmup not in _A100_FEW_WARMUPS:
            column = ("compile" if compiled else "eager") + ("_tf32" if tf32 else "") + "_s"
            row = self._row(_H100_TABLE, config, batch_size)
            if row is not None and column in row:
                found["h100_ms"] = 1e3 * row[column]
        return found

    def by_warmups(self) -> pd.DataFrame:
        """The A100's forward times by number of warm-ups: columns `mean_ms_<n>` and `std_ms_<n>` in milliseconds."""
        tables = {**_A100_FEW_WARMUPS, 5: _A100_TABLES["forward", "none"]}
        rows = self._tables[tables[5]][[*_MODEL, "batch_size"]].reset_index(drop=True)
        for count, name in tables.items():
            table = rows.merge(self._tables[name], on=[*_MODEL, "batch_size"], how="left")
            rows = rows.assign(**{f"mean_ms_{count}": 1e3 * table["mean_s"], f"std_ms_{count}": 1e3 * table["std_s"]})
        return rows

    def _row(self, table: str, config: TransformerConfig, batch_size: int) -> pd.Series | None:
        """The row of the same model, context and batch, if the table has one."""
        rows = self._tables[table]
        rows = rows[rows["batch_size"] == batch_size]
        for name in _MODEL:
            rows = rows[rows[name] == getattr(config, name)]
        return rows.iloc[0] if len(rows) else None
