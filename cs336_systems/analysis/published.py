"""What others published for the same work, to stand beside what is measured here.

The tables are in data/reference/, each with its source and hardware in the README there; this module knows which of
their rows is which work. Times are in milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MappingProxyType

import pandas as pd

from cs336_systems.analysis.attention import AttentionShape
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

    def by_autocast(self) -> pd.DataFrame:
        """The A100's training steps of which both are published: `none_ms`, and `bfloat16_ms` under autocast."""
        tables = (self._tables[_A100_TABLES["step", autocast]] for autocast in ("none", "bfloat16"))
        plain, mixed = (table[[*_MODEL, "batch_size", "mean_s"]] for table in tables)
        rows = plain.merge(mixed, on=[*_MODEL, "batch_size"], suffixes=("", "_mixed"))
        rows = rows.assign(none_ms=1e3 * rows["mean_s"], bfloat16_ms=1e3 * rows["mean_s_mixed"])
        return rows.drop(columns=["mean_s", "mean_s_mixed"])

    def _row(self, table: str, config: TransformerConfig, batch_size: int) -> pd.Series | None:
        """The row of the same model, context and batch, if the table has one."""
        rows = self._tables[table]
        rows = rows[rows["batch_size"] == batch_size]
        for name in _MODEL:
            rows = rows[rows[name] == getattr(config, name)]
        return rows.iloc[0] if len(rows) else None


LEADERBOARD_2025_MS = 5.36
"""Forward with backward of causal bfloat16 attention, batch 1, 16 heads, d 64, length 16,384: the best that is
published for the spring 2025 leaderboard of CS336, assignment 2."""
_WORKSPACE_BYTES = 64 * 2**20
"""What the matrix library had reserved on the published H100, beyond what attention itself keeps."""


class PublishedAttention:
    """Published times and memory of one-head attention, batch 8, causal, float32, on an H100."""

    def __init__(self, reference: Callable[[str], pd.DataFrame]) -> None:
        """`reference` reads a table by its name."""
        names = ["d_model", "seq_len"]
        self._rows = reference("attention_eager_h100").merge(reference("attention_compile_h100"), on=names)

    def beside(self, shape: AttentionShape, *, compiled: bool, tf32: bool) -> dict[str, float]:
        """Columns `h100_forward_ms`, `h100_backward_ms` and `h100_kept_bytes`; NaN where nothing was published."""
        found = {"h100_forward_ms": NAN, "h100_backward_ms": NAN, "h100_kept_bytes": NAN}
        if (shape.batch_size, shape.heads, shape.is_causal, shape.itemsize) != (8, 1, True, 4) or (tf32 > compiled):
            return found
        rows = self._rows[(self._rows["d_model"] == shape.head_dim) & (self._rows["seq_len"] == shape.seq_len)]
        if not len(rows):
            return found
        row, column = rows.iloc[0], ("compile_tf32" if tf32 else "compile" if compiled else "eager")
        # Seconds of a hundred passes: ten times as many milliseconds per pass.
        found |= {f"h100_{phase}_ms": 10 * row[f"{column}_{phase}_s_per_100"] for phase in ("forward", "backward")}
        if not compiled:
            found["h100_kept_bytes"] = row["memory_after_forward_mib_x"] * 2**20 - _WORKSPACE_BYTES
        return found


class PublishedFlash:
    """Published times of a Triton FlashAttention-2 forward with a compiled backward, beside eager attention.

    Batch 1, one head, causal, on an H100.
    """

    def __init__(self, reference: Callable[[str], pd.DataFrame]) -> None:
        """`reference` reads a table by its name."""
        self._rows = pd.concat([reference(f"flash_{dtype}_h100") for dtype in ("float32", "bfloat16")])

    def rows(self) -> Iterator[tuple[str, int, int, dict[str, float]]]:
        """Every shape as (dtype, seq_len, head_dim), with its row."""
        for shape in self._rows.itertuples():
            found = self.row(shape.seq_len, shape.d_model, shape.dtype)
            if found is not None:
                yield str(shape.dtype), int(shape.seq_len), int(shape.d_model), found

    def row(self, seq_len: int, head_dim: int, dtype: str) -> dict[str, float] | None:
        """The published row of a shape: tiles, and `<forward|backward|forward-backward>_<eager|triton>_ms`."""
        of_shape = (self._rows["seq_len"] == seq_len) & (self._rows["d_model"] == head_dim)
        rows = self._rows[of_shape & (self._rows["dtype"] == dtype)]
        if not len(rows):
            return None
        row = rows.iloc[0]
        return {
            "q_tile": row["q_tile"],
            "k_tile": row["k_tile"],
            "forward_eager_ms": row["forward_eager_ms"],
            "forward_triton_ms": row["forward_triton_ms"],
            "backward_eager_ms": row["backward_eager_ms"],
            "backward_triton_ms": row["backward_triton_forward_compiled_backward_ms"],
            "forward-backward_eager_ms": row["end_to_end_eager_ms"],
            "forward-backward_triton_ms": row["end_to_end_triton_ms"],
        }


class PublishedAllReduce:
    """Published seconds of an all-reduce of float32 over Gloo, on one CPU machine; sizes in 10⁶ bytes."""

    HARDWARE = "one CPU machine"

    def __init__(self, reference: Callable[[str], pd.DataFrame]) -> None:
        """`reference` reads a table by its name."""
        rows = reference("all_reduce_gloo_cpu")
        self._seconds = {(10**6 * row.megabytes, row.world_size): float(row.seconds) for row in rows.itertuples()}

    def milliseconds(self, size_bytes: int, world_size: int, operation: str, backend: str) -> float:
        """NaN where nothing was published for this work; what was, is the library's own all-reduce."""
        if (operation, backend) != ("all_reduce", "gloo"):
            return NAN
        return 1e3 * self._seconds.get((size_bytes, world_size), NAN)
