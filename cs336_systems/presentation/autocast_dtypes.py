"""Problem `benchmarking_mixed_precision`, part (a), as a table and sentences."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pandas as pd

from cs336_systems.analysis.cuda_autocast import rule_of
from cs336_systems.bench import remarks
from cs336_systems.bench.remarks import circumstances, marks, staleness
from cs336_systems.bench.report import MISSING, Column, Finding, Findings, Table, verbatim
from cs336_systems.experiments.autocast_dtypes import OBSERVED

_RULES = {
    "lower precision": "in autocast's precision",
    "float32": "in float32",
    "float32 by dtype": "with a result in float32",
    "float32 appended": "with a result in float32",
    "promoted": "in the widest of its inputs'",
    "banned": "an error",
}


def table(summary: pd.DataFrame) -> Table:
    """A row per tensor, a column per autocast, beside CUDA's rules for the operators that make it."""
    columns = [
        Column("tensor", lambda row: row.observed, "left"),
        *(Column(heading, partial(_dtype, column=heading), "left") for heading in _headings(summary)),
        Column("CUDA's rules for what makes it", lambda row: rules_in_words(row.operators), "left"),
    ]
    return Table.of(_by_tensor(summary), columns, caption=caption(summary), notes=notes_below(summary))


def elsewhere(summary: pd.DataFrame) -> Table | Finding:
    """The published records of all machines, each precision in a row of its own."""
    return remarks.by_machine(summary, _listed)


def _listed(summary: pd.DataFrame) -> Table:
    columns = [
        Column("autocast", lambda row: row.autocast, "left"),
        Column("rules", lambda row: row.rules, "left"),
        Column("tensor", lambda row: row.observed, "left"),
        Column("precision", _dtype_of, "left"),
    ]
    return Table.of(summary, columns, caption="Precisions under autocast by machine", notes=notes_below(summary))


def _headings(summary: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(map(_heading, summary.itertuples()))) if len(summary) else []


def _heading(row: Any) -> str:
    return f"{row.autocast}, {'CUDA' if row.rules == 'cuda' else 'a CPU'}'s rules"


def _by_tensor(summary: pd.DataFrame) -> pd.DataFrame:
    """A row per tensor; what each autocast made of it is in `found`, by heading."""
    found: dict[str, dict[str, str]] = {}
    for row in summary.itertuples():
        found.setdefault(row.observed, {})[_heading(row)] = _dtype_of(row)
    return pd.DataFrame(
        {"observed": name, "operators": OBSERVED[name], "found": dtypes} for name, dtypes in found.items()
    )


def _dtype_of(row: Any) -> str:
    return f"{row.dtype or MISSING}{marks(row)}" if row.status == "ok" else str(row.status)


def _dtype(row: Any, column: str) -> str:
    return str(row.found.get(column, MISSING))


def rules_in_words(operators: Sequence[str]) -> str:
    """What CUDA's autocast does with some operators; "none" leaves an operator to the precision of its inputs."""
    texts = []
    for operator in operators:
        rule = rule_of(operator)
        texts.append(f"{verbatim(operator.partition('.')[0])}: {_RULES[rule] if rule else 'none'}")
    return "; ".join(texts) or "not cast"


def caption(summary: pd.DataFrame) -> str:
    """What is observed, and where."""
    if not len(summary):
        return "No records"
    return f"Precisions of a small model under autocast: {circumstances(summary)}"


def notes_below(summary: pd.DataFrame) -> list[str]:
    return remarks.notes_below(summary, _name) if len(summary) else []


def _name(row: pd.Series) -> str:
    return _heading(next(pd.DataFrame([row]).itertuples()))


# Findings ------------------------------------------------------------------------------------------------------


def findings(summary: pd.DataFrame) -> Findings:
    """The answer to (a), and where a CPU's autocast differs."""
    if not len(summary):
        return Findings([Finding("Nothing was observed: run `python scripts/measure.py autocast_dtypes`.")])
    return Findings(
        [
            *Finding.from_all(summary[summary["rules"] == "cuda"], "What autocast does on CUDA", _on_cuda),
            *Finding.from_all(summary, "Where a CPU's autocast differs", _on_a_cpu),
            *staleness(summary),
        ]
    )


def _on_cuda(rows: pd.DataFrame) -> Finding | None:
    measured = rows[rows["status"] == "ok"]
    if not len(measured):
        return None
    how = "On a GPU" if measured["device"].iloc[0] == "cuda" else "By CUDA's rules on a CPU"
    texts, off = [], []
    for half, group in measured.groupby("autocast", sort=False):
        seen = ", ".join(f"{row.observed} {row.dtype}" for row in group.itertuples())
        texts.append(f"under {half} autocast {seen}")
        off += [
            f"{row.observed} under {half}" for row in group.itertuples() if row.dtype != expected(row.observed, half)
        ]
    return Finding.checked(
        f"{how}, {'; '.join(texts)}",
        not off,
        so=(
            ". So it is by the rules of the operators: products in half precision, norm and loss in float32; and "
            "parameters stay what they are, so that gradients have their precision."
        ),
        but=f". By the rules of the operators it is otherwise for: {', '.join(off)}.",
    )


def expected(observed: str, half: str) -> str:
    """The precision that CUDA's rules give a tensor: each operator's, or else that of its input before it."""
    if not OBSERVED[observed]:
        return "float32"  # parameters, and what is added to them
    names = list(OBSERVED)
    precision = half
    for name in names[: names.index(observed) + 1]:
        for operator in OBSERVED[name]:
            rule = rule_of(operator)
            precision = {None: precision, "lower precision": half}.get(rule, "float32")
    return precision


def _on_a_cpu(rows: pd.DataFrame) -> Finding | None:
    measured = rows[rows["status"] == "ok"]
    same = ["autocast", "observed"]
    on_cuda, on_cpu = (measured[measured["rules"] == rules] for rules in ("cuda", "cpu"))
    pairs = on_cuda.merge(on_cpu, on=same, suffixes=("", "_cpu"))
    if not len(pairs):
        return None
    other = pairs[pairs["dtype"] != pairs["dtype_cpu"]]
    names = list(dict.fromkeys(other["observed"]))
    texts = [f"{row.observed} is {row.dtype_cpu} under {row.autocast}, not {row.dtype}" for row in other.itertuples()]
    return Finding.checked(
        f"A CPU's own autocast gives another precision to {len(other)} of {len(pairs)} tensors"
        f"{': ' if texts else ''}{'; '.join(texts)}",
        names == ["output of LayerNorm"],
        so=". It has no rule for LayerNorm, whose result has the precision of its input there.",
        but=".",
    )
