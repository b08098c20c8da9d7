"""Runs of several rates and seeds as one Markdown table."""

import math
import statistics
from collections.abc import Sequence

from train.records.markdown import Row, markdown

COLUMNS = {
    "method": "method",
    "rate": "rate",
    "loss": "held-out loss",
    "trained": "trained numbers",
    "state": "state, MiB",
    "peak": "peak, MiB",
    "device_peak": "the device's own, MiB",
    "step_ms": "ms a step",
}


def mean_loss(rows: Sequence[Row]) -> float:
    """Over the seeds; infinite if one of the runs has no loss."""
    return statistics.fmean(row.get("eval_loss", math.inf) for row in rows)


def table(rows: Sequence[Row]) -> str:
    """A line for each method and rate; each method's lowest loss is bold.

    Losses of several seeds are the mean, and half the range. Times are the median.
    """
    groups: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["rate"]), []).append(row)
    best: dict[str, float] = {}
    for (method, _), group in groups.items():
        best[method] = min(best.get(method, math.inf), mean_loss(group))
    lines = []
    for (method, rate), group in groups.items():
        line = {"method": method, "rate": f"{rate:g}", "loss": _loss(group)}
        if mean_loss(group) == best[method] < math.inf:
            line["loss"] = f"**{line['loss']}**"
        line["trained"] = f"{group[0]['trained']:,}"
        line |= {key: f"{group[0][key]:,.1f}" for key in ("state", "peak")}
        if own := [row["device_peak"] for row in group if "device_peak" in row]:
            line["device_peak"] = f"{max(own):,.1f}"
        if times := [row["step_ms"] for row in group if "step_ms" in row]:
            line["step_ms"] = f"{statistics.median(times):.1f}"
        lines.append(line)
    return markdown(lines, COLUMNS)


def _loss(rows: Sequence[Row]) -> str:
    if any("error" in row for row in rows):
        return "failed"
    losses = [row["eval_loss"] for row in rows]
    spread = f" ± {(max(losses) - min(losses)) / 2:.3f}" if len(losses) > 1 else ""
    return f"{statistics.fmean(losses):.3f}{spread}"
