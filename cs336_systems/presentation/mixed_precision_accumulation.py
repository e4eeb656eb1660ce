"""Problem `mixed_precision_accumulation` as tables, a figure and sentences."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pandas as pd

from cs336_systems.bench import remarks
from cs336_systems.bench.remarks import circumstances, marks, staleness
from cs336_systems.bench.report import (
    BOUND,
    COLOURS,
    MISSING,
    Column,
    Finding,
    Findings,
    Picture,
    Table,
    figure_style,
    number,
    percent,
    plural,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DECIMALS = 6
MOST_STRETCHES = 5
"""Of one accumulation: the last, which have most of the additions."""


def prediction(predicted: pd.DataFrame) -> Table:
    """What must come of every accumulation, in exact arithmetic."""
    columns = [
        *_identity(),
        Column("sum", lambda row: _decimal(row.expected)),
        *_error_columns(),
    ]
    return Table.of(predicted, columns, caption=f"{_task(predicted)}: the sums that must come", notes=_notes())


def table(summary: pd.DataFrame) -> Table:
    """The sums, beside what must come and what others printed, and what makes their errors."""
    columns = [
        *_identity(),
        Column("measured sum", lambda row: _decimal(row.total) + marks(row) if row.status == "ok" else row.status),
        Column("predicted sum", lambda row: _decimal(row.expected)),
        Column("printed by others", lambda row: MISSING if row.printed != row.printed else f"{row.printed:.4f}"),
        *_error_columns(),
    ]
    notes = [*_notes(), *notes_below(summary)]
    return Table.of(summary, columns, caption=caption(summary), notes=notes)


def _identity() -> list[Column]:
    return [
        Column("accumulator", lambda row: row.accumulator, "left"),
        Column("addend", lambda row: row.addend_in_words, "left"),
    ]


def _error_columns() -> list[Column]:
    return [
        Column("error", lambda row: _signed(row.error)),
        Column("of the addend", lambda row: _signed(row.of_the_addend)),
        Column("of rounding the sums", lambda row: _signed(row.of_rounding)),
        Column("at most", lambda row: number(row.worst_of_rounding, 2)),
    ]


def _notes() -> list[str]:
    return [
        "The addend's error is its own rounding, as often as it was added. Each sum is rounded by half a spacing at "
        "most; added up, that is the most that rounding the sums can do. Errors are of the predicted sum, which is "
        "computed in exact arithmetic."
    ]


def elsewhere(summary: pd.DataFrame) -> Table | Finding:
    """The published records of all machines."""
    return remarks.by_machine(summary, table)


def stretches(summary: pd.DataFrame) -> Table | Finding:
    """Why a sum in half precision goes wrong: what one addition amounts to, from binade to binade."""
    rows = [
        {
            "accumulator": case.accumulator,
            "first": float(stretch.first),
            "last": float(stretch.last),
            "spacing": float(stretch.spacing),
            "spacings": float(stretch.addend / stretch.spacing),
            "rounded": round(stretch.addend / stretch.spacing),
            "step": float(stretch.step),
            "additions": stretch.additions,
            "error": float(stretch.error),
        }
        for case in _of_half_precision(summary).itertuples()
        for stretch in case.stretches[-MOST_STRETCHES:]
    ]
    if not rows:
        return Finding("No accumulation in half precision was asked for.")
    columns = [
        Column("accumulator", lambda row: row.accumulator, "left"),
        Column("from", lambda row: number(row.first, 4)),
        Column("to", lambda row: number(row.last, 4)),
        Column("spacing", lambda row: number(row.spacing, 4)),
        Column("addend in spacings", lambda row: number(row.spacings)),
        Column("rounded", lambda row: str(row.rounded)),
        Column("so one addition is", lambda row: number(row.step, 4)),
        Column("additions", lambda row: str(row.additions)),
        Column("error they make", lambda row: _signed(row.error)),
    ]
    note = f"The last {MOST_STRETCHES} binades of each sum; those before have few additions. Computed, not measured."
    what = "What adding amounts to in each binade, where the accumulator is in half precision"
    return Table.of(pd.DataFrame(rows), columns, caption=what, notes=[note])


def _of_half_precision(summary: pd.DataFrame) -> pd.DataFrame:
    return summary[summary["accumulator"] != "float32"] if len(summary) else summary


def _task(rows: pd.DataFrame) -> str:
    if not len(rows):
        return "No records"
    first = rows.iloc[0]
    return f"{first['value']:g} added {first['count']} times"


def caption(summary: pd.DataFrame) -> str:
    """What is added, and where."""
    return f"{_task(summary)}: {circumstances(summary)}" if len(summary) else "No records"


def notes_below(summary: pd.DataFrame) -> list[str]:
    return remarks.notes_below(summary, _name) if len(summary) else []


def _name(row: pd.Series) -> str:
    return f"{row['accumulator']} += {row['addend_in_words']}"


def _decimal(value: float) -> str:
    return MISSING if value != value else f"{value:.{DECIMALS}f}"


def _signed(value: float) -> str:
    return "0" if value == 0 else f"{'+' if value > 0 else '-'}{number(abs(value))}"


# The figure ----------------------------------------------------------------------------------------------------


def figure(summary: pd.DataFrame) -> Picture:
    """How the error of the sum grows, in a panel per accumulation, with the band that it must lie in."""
    return Picture(f"The error as the sum grows; {caption(summary)}", partial(_draw, summary))


def _draw(summary: pd.DataFrame) -> Figure:
    from matplotlib.figure import Figure

    cases = [row for row in summary.itertuples() if row.addend == row.addend_in_words]
    columns = max(1, (len(cases) + 1) // 2)
    with figure_style():
        drawing = Figure(figsize=(3.0 * columns + 0.6, 4.6))
        panels = drawing.subplots(2, columns, squeeze=False, sharex=True).ravel()
        for panel, row in zip(panels, cases, strict=False):
            _draw_case(panel, row)
        for panel in panels[len(cases) :]:
            panel.set_visible(False)
        for panel in panels[max(0, len(cases) - columns) : len(cases)]:
            panel.set_xlabel("additions")
            panel.tick_params(labelbottom=True)
        for panel in panels[::columns]:
            panel.set_ylabel("sum − what was meant")
        shown = [zip(*panel.get_legend_handles_labels(), strict=True) for panel in panels[: len(cases)]]
        entries = {label: handle for pairs in shown for handle, label in pairs}
        if entries:
            drawing.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4)
    return drawing


def _draw_case(panel: Any, row: Any) -> None:
    expected, every = row.expected_sums, row.count_between
    places = [every * (index + 1) for index in range(len(expected))]
    meant = [row.exact * place / row.count for place in places]
    least, most = zip(*row.band, strict=True)
    band = {"color": COLOURS[4], "alpha": 0.35, "linewidth": 0, "label": "must lie within"}
    panel.fill_between(places, least, most, **band)
    middle = [(low + high) / 2 for low, high in row.band]
    panel.plot(places, middle, ":", color=BOUND, marker="none", label="the addend's own error")
    errors = [total - target for total, target in zip(expected, meant, strict=True)]
    panel.plot(places, errors, "-", color=COLOURS[0], marker="none", linewidth=1.2, label="predicted")
    if row.sums:
        errors = [total - target for total, target in zip(row.sums, meant, strict=True)]
        seen = {"color": COLOURS[1], "markerfacecolor": "none", "markersize": 4}
        panel.plot(places[4::8], errors[4::8], "o", **seen, label="measured")
    panel.set_title(f"{row.accumulator} += {row.addend_in_words}")
    panel.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))


# Findings ------------------------------------------------------------------------------------------------------


def findings(summary: pd.DataFrame) -> Findings:
    """How accurate each accumulation is, and why."""
    if not len(summary):
        return Findings([Finding("Nothing was added: run `python scripts/measure.py mixed_precision_accumulation`.")])
    return Findings(
        [
            *Finding.from_all(summary, "Whether the sums are as predicted", _as_predicted),
            *Finding.from_all(summary, "Whose error it is", _of_the_addend),
            *Finding.from_all(_of_half_precision(summary), "What a half-precision accumulator does", _in_half),
            *Finding.from_all(summary, "Whether others printed the same", _as_printed),
            *staleness(summary),
        ]
    )


def _as_predicted(rows: pd.DataFrame) -> Finding | None:
    measured = rows[rows["status"] == "ok"]
    if not len(measured):
        return None
    agreeing, seen = int(measured["agreeing"].sum()), int(measured["sums"].map(len).sum())
    return Finding.checked(
        f"{agreeing} of {plural(seen, 'recorded sum')} are bit for bit what exact arithmetic with rounding to the "
        "nearest predicts",
        agreeing == seen,
        so=": nothing about these errors is random.",
        but=": this device rounds otherwise.",
    )


def _of_the_addend(rows: pd.DataFrame) -> Finding | None:
    """A float32 accumulator: which part of the error is the addend's."""
    wide = rows[(rows["status"] == "ok") & (rows["accumulator"] == "float32") & (rows["addend"] != "float32")]
    if not len(wide):
        return None
    texts = [f"{row.addend_in_words} {_decimal(row.total)}" for row in wide.itertuples()]
    return Finding.checked(
        f"With a float32 accumulator, addends of lower precision give {'; '.join(texts)}. Of these errors rounding the "
        f"sums makes {number(wide['of_rounding'].abs().max())} at most",
        bool((wide["of_rounding"].abs() < 0.01 * wide["error"].abs()).all()),
        so=": it is the addend's own rounding, as often as it was added. Casting it afterwards brings nothing back.",
        but=": not all of it is the addend's own rounding.",
    )


def _in_half(rows: pd.DataFrame) -> Finding | None:
    measured = rows[rows["status"] == "ok"]
    if not len(measured):
        return None
    texts = []
    for row in measured.itertuples():
        final = row.stretches[-1]
        told = f"{row.accumulator} ends at {_decimal(row.total)}"
        if final.step == 0:
            told += (
                f", where it stands still for the last {final.additions} additions, since the addend is "
                f"{number(float(final.addend / final.spacing), 2)} of a spacing"
            )
        else:
            share = float(final.step / final.addend) - 1
            told += f", where an addition amounts to {percent(abs(share))} {'more' if share > 0 else 'less'} than meant"
        texts.append(told)
    argued, all_of_them = int(measured["as_argued"].sum()), int(measured["count"].sum())
    return Finding.checked(
        f"{'; '.join(texts)}. Of {all_of_them:,} additions {argued:,} amount to the addend rounded to the "
        "accumulator's spacing",
        argued > 0.98 * all_of_them,
        so=": every addition errs by as much and to the same side until the sum passes a power of two.",
        but=": that argument does not explain these sums.",
    )


def _as_printed(rows: pd.DataFrame) -> Finding | None:
    printed = rows[rows["status"] == "ok"].dropna(subset=["printed"])
    if not len(printed):
        return None
    same = int((printed["total"].round(4) == printed["printed"]).sum())
    return Finding.checked(
        f"{same} of the {len(printed)} sums that others printed to four decimals are the same",
        same == len(printed),
        so=".",
        but=": another device or another PyTorch adds otherwise.",
    )
