"""Tables of runs: means over seeds, confidence intervals, and differences."""

import csv
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from scipy import stats

from train.records.markdown import Row, markdown
from train.records.perplexity import perplexity


class Interval(NamedTuple):
    """A mean, and half the width of its 95 % confidence interval (Student's t)."""

    mean: float
    half: float | None

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.half is None else f" ± {self.half:.3f}")


def interval(values: Sequence[float]) -> Interval:
    """The interval of independent numbers, such as one for each seed."""
    n = len(values)
    if n == 1:
        return Interval(values[0], None)
    error = statistics.stdev(values) / math.sqrt(n)
    return Interval(statistics.fmean(values), float(stats.t.ppf(0.975, n - 1)) * error)


def grouped(rows: Iterable[Row], axes: Sequence[str]) -> list[tuple[Row, list[Row]]]:
    """Groups rows by their values on the axes, in their first order."""
    groups: dict[tuple[str, ...], tuple[Row, list[Row]]] = {}
    for row in rows:
        values = {axis: row.get(axis) for axis in axes}
        key = tuple(map(str, values.values()))
        groups.setdefault(key, (values, []))[1].append(row)
    return list(groups.values())


def difference(
    group: Sequence[Row], rows: Sequence[Row], axes: Sequence[str], against: Row
) -> Interval | None:
    """Loss minus that of the run with `against` and otherwise the same flags, by seed.

    None if there is no such run, or it is the run itself.
    """

    def key(row: Row, **changed: Any) -> tuple[str, ...]:
        values = {axis: row.get(axis) for axis in axes} | changed
        return *map(str, values.values()), str(row["seed"])

    others = {key(row): row["eval_loss"] for row in rows if "eval_loss" in row}
    pairs = [
        row["eval_loss"] - others[key(row, **against)]
        for row in group
        if "eval_loss" in row
        and any(str(row.get(k)) != str(v) for k, v in against.items())
        and all(row.get(k) is not None for k in against)
        and key(row, **against) in others
    ]
    return interval(pairs) if pairs else None


def table(rows: Sequence[Row], axes: Sequence[str], against: Row | None = None) -> str:
    """A Markdown table, a line for each run, best first; failed runs come last.

    A column for each axis; of more than five, all but the first share one.
    """
    done = [row for row in rows if "eval_loss" in row]
    best_first = sorted(
        grouped(rows, axes),
        key=lambda g: statistics.fmean([r.get("eval_loss", math.inf) for r in g[1]]),
    )
    lines: list[Row] = [
        _named(values) | _numbers(group) | _compared(group, done, axes, against)
        for values, group in best_first
    ]
    return markdown(lines, {key: key for line in lines for key in line})


def _named(values: Row) -> dict[str, str]:
    first, *others = values
    if len(others) < 5:
        return {k: "-" if v is None else str(v) for k, v in values.items()}
    pairs = [f"{k}={values[k]}" for k in others if values[k] is not None]
    return {first: str(values[first]), "with": ", ".join(pairs) or "-"}


def _numbers(group: Sequence[Row]) -> dict[str, str]:
    done = [row for row in group if "eval_loss" in row]
    if not done:
        return {"eval loss": "failed"}

    def mean(key: str, unit: float, digits: int) -> str:
        known = [row[key] / unit for row in done if row.get(key) is not None]
        return f"{statistics.fmean(known):.{digits}f}" if known else "-"

    measured = {
        "overlap at the end": mean("overlap", 1, 3),
        "effective rank of what moved": mean("effective_rank", 1, 1),
    }
    loss = interval([row["eval_loss"] for row in done])
    return {
        "eval loss": str(loss),
        "ppl": f"{perplexity(loss.mean):.2f}",
        "ppl, published divisor": mean("ppl_published", 1, 2),
        "runs": str(len(done))
        + (f", {len(group) - len(done)} failed" if len(done) < len(group) else ""),
        "state, MB": mean("state_bytes", 1e6, 0),
        "peak, GiB": mean("step_bytes", 2**30, 2),
        "ms a step": mean("ms_per_step", 1, 1),
        "minutes": mean("train_s", 60, 1),
        **{name: text for name, text in measured.items() if text != "-"},
    }


def _compared(
    group: Sequence[Row], rows: Sequence[Row], axes: Sequence[str], against: Row | None
) -> dict[str, str]:
    if against is None or not (found := difference(group, rows, axes, against)):
        return {}
    sign = "+" if found.mean > 0 else ""
    values = ", ".join(map(str, against.values()))
    return {f"loss minus {values}'s": f"{sign}{found}"}


def to_csv(rows: Sequence[Row]) -> str:
    """All rows: a line for each run, a column for each value."""
    columns = [*dict.fromkeys(key for row in rows for key in row)]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
