"""Problem `torch_compile` (b): the whole model eager, compiled whole and by blocks, as tables, a figure, sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pandas as pd

from cs336_systems.analysis.published import H100
from cs336_systems.bench import remarks
from cs336_systems.bench.remarks import circumstances, marks, staleness
from cs336_systems.bench.report import (
    BOUND,
    COLOURS,
    MISSING,
    PUBLISHED,
    Column,
    Finding,
    Findings,
    Picture,
    Table,
    beginning,
    bytes_in_words,
    figure_style,
    number,
    percent,
    plural,
    verbatim,
    with_deviation,
)
from cs336_systems.presentation import transformer_step as steps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EAGER = "none"
FORMS = MappingProxyType({"none": "eager", "model": "whole", "blocks": "blocks"})
"""What a table calls each mode of torch.compile."""
_WORDS = MappingProxyType({"model": "compiled whole", "blocks": "compiled by blocks"})
_SAME = ("case", "phase")
_NUMBERS = ("mean_ms", "std_ms", "median_ms", "status", "peak_bytes", "h100_ms")
SIMILAR_ERROR = 4.0
"""Up to how many times eager's own error a compiled model's may be: another order of the same sums."""


def prediction(predicted: pd.DataFrame) -> Table:
    """The least any form can take, before anything runs."""
    return steps.prediction(predicted)


def table(summary: pd.DataFrame) -> Table:
    """Every model and phase: eager and compiled beside the floor, how much faster, and the published ratio."""
    columns = [
        *identity(summary),
        *(Column(f"{FORMS[mode]} (ms)", partial(_time, mode=mode)) for mode in FORMS),
        Column("floor (ms)", lambda row: number(row.bound_ms)),
        *(Column(f"eager / {FORMS[mode]}", partial(_ratio, what="median_ms", mode=mode)) for mode in _WORDS),
        Column(f"{H100} eager / whole", partial(_ratio, what="h100_ms", mode="model")),
        Column("peak, whole / eager", lambda row: number(_of(row, "peak_bytes", "model") / _of(row, "peak_bytes"), 2)),
    ]
    return Table.of(side_by_side(summary), columns, caption=caption(summary), notes=notes_below(summary))


def elsewhere(summary: pd.DataFrame) -> Table | Finding:
    """The published records of all machines, each with its own floor."""
    return remarks.by_machine(side_by_side(summary), lambda _: table(summary))


def compile_table(summary: pd.DataFrame) -> Table:
    """What compiling took and gave, for the last phase of every model: seconds by stage, graphs, breaks and errors."""
    rows = _compiled_last(summary)
    columns = [
        *(column for column in identity(summary) if column.heading != "phase"),
        Column("form", lambda row: FORMS[row.compile], "left"),
        Column("for", lambda row: row.phase, "left"),
        Column("compiling (s)", lambda row: number(row.compile_s) if row.status == "ok" else str(row.status)),
        Column("Dynamo (s)", lambda row: number(row.dynamo_s, 2)),
        Column("AOTAutograd (s)", lambda row: number(row.aot_autograd_s, 2)),
        Column("Inductor (s)", lambda row: number(row.inductor_s, 2)),
        Column("graphs", lambda row: _count(row.graphs)),
        Column("graph breaks", lambda row: _count(row.graph_breaks)),
        Column("steps to pay back", lambda row: _count(row.steps_to_pay_back)),
        Column("error of logits", lambda row: _tiny(row.logits_error)),
        Column("eager's", lambda row: _tiny(row.eager_logits_error)),
    ]
    note = (
        "Compiling is the first call less the second, with an empty cache; the stages are PyTorch's own clocks within "
        "it. Errors are the distance to float64, relative to its norm."
    )
    breaks = [f"{row['form']}: {told}" for _, row in rows.iterrows() for told in _breaks_of(row)]
    again = summary[summary["compiled_while_timed"] > 0] if len(summary) else summary
    warning = [
        f"Compiled anew while being timed, so that its times are no steady ones: {_case_name(row)}"
        for _, row in again.drop_duplicates("case").iterrows()
    ]
    title = f"Compilation. {caption(summary)}" if len(summary) else caption(summary)
    notes = [note, *dict.fromkeys(breaks), *warning, *notes_below(summary)]
    return Table.of(rows, columns, caption=title, notes=notes)


def _breaks_of(row: pd.Series) -> Iterator[str]:
    for kind, reason, place, count in row["breaks"]:
        times = f", {count} times" if count > 1 else ""
        yield f"{kind} at {verbatim(place)}{times}: {verbatim(reason)}"


def _count(value: float) -> str:
    return MISSING if math.isnan(value) else "never" if math.isinf(value) else f"{value:,.0f}"


def _tiny(value: float) -> str:
    return MISSING if math.isnan(value) else f"{value:.1e}"


def identity(summary: pd.DataFrame) -> list[Column]:
    """Size, context, phase, and whatever choice is not the same for all."""
    rows = summary.drop(columns="compile") if len(summary) else summary
    return steps.identity(rows.assign(compile="") if len(rows) else rows)


def caption(summary: pd.DataFrame) -> str:
    if not len(summary):
        return "No records"
    first = summary.iloc[0]
    rounds = plural(int(first["rounds"]), "round")
    shared = steps.shared_choices(summary.assign(compile=EAGER))
    parts = [circumstances(summary), f"batch {first['batch_size']}", *shared]
    return f"Model eager and compiled: {', '.join(parts)}; mean and deviation of {rounds}"


def notes_below(summary: pd.DataFrame) -> list[str]:
    return remarks.notes_below(summary, _name, _case_name) if len(summary) else []


def _name(row: pd.Series) -> str:
    if row["status"] == "missing":
        return _case_name(row)  # a record is of all forms and phases
    return f"{row['phase']}, {FORMS[row['compile']]}, of {_case_name(row)}"


def _case_name(row: pd.Series) -> str:
    return steps.model_in_words(pd.Series({**row, "compile": EAGER}))


# Side by side --------------------------------------------------------------------------------------------------


def side_by_side(summary: pd.DataFrame) -> pd.DataFrame:
    """One row per case and phase; the numbers of each form in columns that end in its mode."""
    if not len(summary):
        return summary
    keep = ["machine", *_SAME]
    wide = summary.drop_duplicates(keep).drop(columns=["compile"]).reset_index(drop=True)
    for mode in FORMS:
        rows = summary.loc[summary["compile"] == mode, [*keep, *_NUMBERS]]
        wide = wide.merge(rows.rename(columns={name: f"{name}_{mode}" for name in _NUMBERS}), on=keep, how="left")
    return wide


def _of(row: Any, what: str, mode: str = EAGER) -> Any:
    return getattr(row, f"{what}_{mode}")


def _time(row: Any, mode: str) -> str:
    status = _of(row, "status", mode)
    if not isinstance(status, str):
        return MISSING
    if status != "ok":
        return status
    return with_deviation(_of(row, "mean_ms", mode), _of(row, "std_ms", mode)) + marks(row)


def _ratio(row: Any, what: str, mode: str) -> str:
    return number(_of(row, what) / _of(row, what, mode))


def _compiled_last(summary: pd.DataFrame) -> pd.DataFrame:
    """The rows of each case's last phase that are compiled, with eager's numbers beside."""
    if not len(summary):
        return summary
    last = summary.groupby(["machine", "case"], sort=False)["phase"].transform("last") == summary["phase"]
    rows = summary[last & (summary["compile"] != EAGER)].copy()
    of = ["machine", "case"]
    eager = summary[summary["compile"] == EAGER]
    errors = {
        "logits_error": summary.groupby([*of, "compile"])["logits_error"].first(),
        "eager_logits_error": eager.groupby(of)["logits_error"].first(),
    }
    rows["logits_error"] = [errors["logits_error"].get(tuple(key)) for key in rows[[*of, "compile"]].to_numpy()]
    rows["eager_logits_error"] = [errors["eager_logits_error"].get(tuple(key), math.nan) for key in rows[of].to_numpy()]
    times = eager.set_index([*of, "phase"])["median_ms"]
    rows["eager_ms"] = [times.get(tuple(key), math.nan) for key in rows[[*of, "phase"]].to_numpy()]
    rows["form"] = [f"{_case_name(row)}, {FORMS[row['compile']]}" for _, row in rows.iterrows()]
    rows["steps_to_pay_back"] = [pay_back(row.compile_s, row.eager_ms - row.median_ms) for row in rows.itertuples()]
    return rows.reset_index(drop=True)


def pay_back(compile_s: float, saved_ms: float) -> float:
    """After how many steps compiling has paid; infinite where a step is not faster.

    >>> pay_back(12.0, 5.0), pay_back(12.0, -1.0)
    (2400.0, inf)
    """
    if math.isnan(compile_s) or math.isnan(saved_ms):
        return math.nan
    return float(math.ceil(1e3 * compile_s / saved_ms)) if saved_ms > 0 else math.inf


# Figure --------------------------------------------------------------------------------------------------------


def figure(summary: pd.DataFrame) -> Picture:
    """How many times as fast as eager each compiled form is: a panel per phase, published ratios hollow."""
    return Picture(f"{caption(summary)}; above 1 compiled is faster", partial(_draw, summary))


def _draw(summary: pd.DataFrame) -> Figure:
    from matplotlib.figure import Figure

    wide = side_by_side(summary)
    phases = list(dict.fromkeys(wide["phase"])) if len(wide) else [""]
    most = int(wide.groupby("phase").size().max()) if len(wide) else 1
    stacked = most > 6  # many models need the whole width each
    shape = (len(phases), 1) if stacked else (1, len(phases))
    size = (max(6.5, 0.42 * most), 2.2 * len(phases)) if stacked else (max(6.0, 2.5 * len(phases) + 0.6), 3.0)
    with figure_style():
        drawing = Figure(figsize=size)
        panels = drawing.subplots(*shape, sharey=True, squeeze=False).ravel()
        series: dict[str, Any] = {}
        for panel, phase in zip(panels, phases, strict=True):
            rows = wide[wide["phase"] == phase] if len(wide) else wide
            _draw_phase(panel, rows, series)
            panel.axhline(1, color=BOUND, linestyle="--", linewidth=1.2, marker="")
            panel.set(title=phase, ylim=(0, None), xlim=(-0.6, most - 0.4))
            if stacked or panel is panels[0]:
                panel.set_ylabel("eager / compiled")
        if series:
            drawing.legend(series.values(), series.keys(), loc="outside lower center", ncols=3)
    return drawing


def _draw_phase(panel: Any, rows: pd.DataFrame, series: dict[str, Any]) -> None:
    places = range(len(rows))
    for index, mode in enumerate(_WORDS):
        if len(rows):
            at = [place + 0.36 * (index - 0.5) for place in places]
            ratio = rows["median_ms_none"] / rows[f"median_ms_{mode}"]
            look = {"color": COLOURS[3 * index], "hatch": ("", "///")[index], "edgecolor": "white", "width": 0.34}
            series[_WORDS[mode]] = panel.bar(at, ratio.fillna(0), **look)
    if len(rows):
        published = rows["h100_ms_none"] / rows["h100_ms_model"]
        if published.notna().any():
            style = {"color": PUBLISHED, "marker": "D", "markerfacecolor": "white", "linestyle": "none"}
            at = [place - 0.18 for place in places]
            (series[f"published, {H100}, whole"],) = panel.plot(at, published, markersize=5, **style)
        tf32 = rows["float32_matmul"].nunique() > 1
        names = [
            f"{row.size_name}\n{row.context_length}" + ("\nTF32" if tf32 and row.float32_matmul == "high" else "")
            for row in rows.rename(columns={"size": "size_name"}).itertuples()
        ]
        panel.set_xticks(list(places), names, fontsize="small" if len(rows) > 4 else None)
        panel.grid(visible=False, axis="x")


# Findings ------------------------------------------------------------------------------------------------------


def findings(summary: pd.DataFrame) -> Findings:
    """How much each phase gains, what that comes from, when compiling has paid, blocks beside whole, and errors."""
    if not len(summary):
        return Findings([Finding("No case was measured: run `python scripts/measure.py model_compile`.")])
    return Findings(
        [
            *Finding.from_all(summary, "What compiling gains", gains),
            *Finding.from_all(summary, "Where the gain comes from", saved_traffic),
            *Finding.from_all(summary, "When compiling has paid", payback),
            *Finding.from_all(summary, "What compiling by blocks saves", by_blocks),
            *Finding.from_all(summary, "Whether compiled results are as exact", exactness),
            *staleness(summary),
        ]
    )


def gains(rows: pd.DataFrame) -> Finding | None:
    """Eager over compiled by phase, medians of the same rounds."""
    wide = side_by_side(rows)
    texts, ratios = [], []
    for mode, words in _WORDS.items():
        ratio = wide["median_ms_none"] / wide[f"median_ms_{mode}"]
        told = [
            f"{phase} {_span(ratio[wide['phase'] == phase].dropna())}"
            for phase in dict.fromkeys(wide["phase"])
            if ratio[wide["phase"] == phase].notna().any()
        ]
        if told:
            texts.append(f"{words}, {', '.join(told)}")
            ratios.append(ratio.dropna())
    if not texts:
        return None
    fact = f"Times as fast as eager: {'; '.join(texts)}"
    least = pd.concat(ratios).min()
    return Finding.checked(
        fact,
        bool(least > 1),
        so=". No phase is slower.",
        but=f". The least is {number(least, 2)}: compiling does not make every phase of every model faster here.",
    )


def _whole_span(values: pd.Series) -> str:
    least, most = _count(values.min()), _count(values.max())
    return least if least == most else f"{least} to {most}"


def published_findings(others: pd.DataFrame) -> Findings:
    """How the gain of compiling a training step falls with the size of the model, from figures that others published.

    The floor of float32 products is what compiling cannot lower; TF32 lowers the floor itself.
    """
    gain, more = (others["eager_ms"] / others[name] for name in ("compiled_ms", "compiled_tf32_ms"))
    by_width = gain.groupby(others["d_model"]).median()
    small, large = by_width.iloc[0], by_width.iloc[-1]
    fact = (
        f"On an {H100} others measured compiled training steps {_span(gain)} times as fast as eager ones, over "
        f"{plural(len(others), 'model')}: d_model {by_width.index[0]} {number(small)} times, {by_width.index[-1]:,} "
        f"{number(large)} times, by the median over contexts; with TF32 products {_span(more)} times"
    )
    told = Finding.checked(
        fact,
        bool(small > large and more.groupby(others["d_model"]).median().iloc[-1] > large),
        so=(
            ". Compiling saves what lies between products, whose share falls with the width; what then remains is the "
            "products, which only another precision makes faster."
        ),
        but=": the gain does not fall with the width as the share of what lies between products does.",
    )
    return Findings([told])


def _span(values: pd.Series) -> str:
    least, most = number(values.min()), number(values.max())
    return least if least == most else f"{least} to {most}"


def saved_traffic(rows: pd.DataFrame) -> Finding | None:
    """What forward of the largest model saves, beside what the traffic between its products takes from memory."""
    wide = side_by_side(rows)
    forward = wide[wide["phase"].isin(["forward", "inference"])].dropna(subset=["median_ms_none", "other_ms"])
    compiled = forward["median_ms_model"].fillna(forward["median_ms_blocks"])
    forward = forward.assign(compiled_ms=compiled).dropna(subset=["compiled_ms"])
    if not len(forward):
        return None
    row = forward.sort_values(["num_layers", "d_model", "context_length"]).iloc[-1]
    words = "by blocks" if math.isnan(row["median_ms_model"]) else "whole"
    saved, traffic = row["median_ms_none"] - row["compiled_ms"], row["other_ms"]
    fact = (
        f"In {row['phase']} of {_case_name(row)}, {row['other_operators']:,.0f} operators besides products read and "
        f"write {bytes_in_words(row['other_bytes'])}: {number(traffic)} ms at the bandwidth of memory, "
        f"{percent(traffic / row['median_ms_none'])} of the eager time. Compiled {words} it takes "
        f"{number(abs(saved))} ms {'less' if saved > 0 else 'more'}"
    )
    return Finding.checked(
        fact,
        bool(0 < saved <= 1.2 * traffic),
        so=": fusing them saves traffic, since what one hands to the next stays on the chip.",
        but=(
            ", more than their traffic: the calls of so many operators are saved as well."
            if saved > 0
            else ": what fusing them saves is not seen here."
        ),
    )


def payback(rows: pd.DataFrame) -> Finding | None:
    """After how many runs of each model's last phase compiling is paid back."""
    known = _compiled_last(rows).dropna(subset=["steps_to_pay_back"])
    if not len(known):
        return None
    paid = known["steps_to_pay_back"].map(math.isfinite)
    texts = []
    for mode, rows_of_mode in known.groupby("compile", sort=False):
        steps_of_mode = rows_of_mode.loc[paid, "steps_to_pay_back"]
        after = [f"has paid after {_whole_span(steps_of_mode)} runs"] if len(steps_of_mode) else []
        never = len(rows_of_mode) - len(steps_of_mode)
        after += [f"never pays for {plural(never, 'model')}"] if never else []
        texts.append(f"{_WORDS[str(mode)]} takes {_span(rows_of_mode['compile_s'])} s and {' and '.join(after)}")
    phases = " or ".join(dict.fromkeys(known["phase"]))
    return Finding.checked(
        f"Compiling from an empty cache, counted in runs of {phases}: {'; '.join(texts)}",
        bool(paid.all()),
        so=". A training run has many more steps than that; a script that looks at a single loss has not.",
        but=". What saves no time per run is never paid back.",
    )


def by_blocks(rows: pd.DataFrame) -> Finding | None:
    """Compile seconds of the deepest model, whole and by blocks, and what it costs in time per step."""
    last = _compiled_last(rows)
    known = last[(last["status"] == "ok")].dropna(subset=["compile_s", "median_ms"])
    pairs = known[known["compile"] == "model"].merge(
        known[known["compile"] == "blocks"], on=["machine", "case"], suffixes=("_whole", "_blocks")
    )
    if not len(pairs):
        return None
    row = pairs.sort_values(["num_layers_whole", "d_model_whole", "context_length_whole"]).iloc[-1]
    times = row["compile_s_whole"] / row["compile_s_blocks"]
    slower = row["median_ms_blocks"] / row["median_ms_whole"]
    return Finding.checked(
        f"{beginning(str(row['size_whole']))}'s {row['num_layers_whole']} blocks at context "
        f"{row['context_length_whole']} take {number(row['compile_s_whole'])} s to compile as a whole and "
        f"{number(row['compile_s_blocks'])} s one by one, a factor of {number(times, 2)}; a {row['phase_whole']} by "
        f"blocks takes {number(slower, 2)} times that of the whole",
        bool(times > 1),
        so=": all blocks share one block's code, so that the time to compile does not grow with the depth.",
        but=": here the blocks' shared code does not shorten compiling.",
    )


def exactness(rows: pd.DataFrame) -> Finding | None:
    """Compiled logits and loss beside eager's own distance from float64."""
    known = rows[(rows["status"] == "ok")].dropna(subset=["logits_error"])
    of = ["machine", "case", "phase"]
    pairs = known[known["compile"] != EAGER].merge(known[known["compile"] == EAGER], on=of, suffixes=("", "_eager"))
    if not len(pairs):
        return None
    ratio = (pairs["logits_error"] / pairs["logits_error_eager"]).max()
    return Finding.checked(
        f"Compiled logits are off float64 by {_tiny(pairs['logits_error'].max())} of their norm at most, eager's by "
        f"{_tiny(pairs['logits_error_eager'].max())}: {number(ratio, 2)} times eager's own error at most; the loss is "
        f"off by {_tiny(pairs['loss_error'].max())} at most",
        bool(ratio <= SIMILAR_ERROR),
        so=". The compiler adds up in another order, and no worse.",
        but=". That is more than another order of the same sums explains.",
    )
