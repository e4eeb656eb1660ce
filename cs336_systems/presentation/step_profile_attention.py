"""Problem `nsys_profile` (e): the parts of attention, which are ranges of their own, beside one another."""

from __future__ import annotations

import math

import pandas as pd


def attention_rows(summary: pd.DataFrame) -> pd.DataFrame:
    """A row per forward with the times of attention's parts beside one another, where its scores are materialised."""
    rows = []
    forward = summary[(summary["phase"] == "forward")] if len(summary) else summary
    for _, group in forward.groupby("case", sort=False) if len(forward) else ():
        parts = group.set_index("range")
        if "softmax" in parts.index:
            rows.append({**group.iloc[0].to_dict(), **_parts_of_attention(parts)})
    return pd.DataFrame(rows, columns=None if rows else [*summary.columns, "time_ratio"])


def _parts_of_attention(parts: pd.DataFrame) -> dict[str, float]:
    scores, softmax, value_product, attention = (
        parts.loc[name] for name in ("scores", "softmax", "value product", "attention")
    )
    products_ms = sum(part["total_ms"] * part["product_share"] for part in (scores, value_product))
    return {
        "scores_ms": scores["total_ms"],
        "scores_product_ms": scores["total_ms"] * scores["product_share"],
        "softmax_ms": softmax["total_ms"],
        "value_product_ms": value_product["total_ms"],
        "attention_ms": attention["total_ms"],
        "attention_floor_ms": attention["range_bound_ms"],
        "time_ratio": softmax["total_ms"] / products_ms if products_ms else math.nan,
    }
