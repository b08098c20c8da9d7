"""Curves and final losses as PNG."""

import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, cycle, pairwise
from statistics import fmean
from typing import Any

from matplotlib import colormaps, rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

from train.host.atomic import write_bytes
from train.host.paths import AnyPath
from train.records.metrics import Record, mean_ms

Styles = Mapping[str, Mapping[str, Any]]
"""The color and the kind of line of each run."""


def draw_run(records: Sequence[Record], path: AnyPath, title: str) -> None:
    """Draws training loss, raw and smoothed, and evaluation loss of one run."""
    figure, axes = _figure(title)
    steps, losses = _series(records, "loss")
    pale = {"alpha": 0.3, "linewidth": 1, "label": "training, as logged"}
    axes.plot(steps, losses, color="tab:blue", **pale)
    axes.plot(steps, _smooth(losses), color="tab:blue", label="training, smoothed")
    axes.plot(*_series(records, "eval_loss"), "o", color="tab:red", label="held out")
    _save(figure, axes, path)


def styles_of(names: Iterable[str]) -> Styles:
    """A style for each run, which it has in every picture of an experiment."""
    ten = rcParams["axes.prop_cycle"]
    # Ten colors, then the same ones dashed.
    styles = cycle(cycler(linestyle=["-", "--", ":"]) * ten)
    return dict(zip(dict.fromkeys(names), styles, strict=False))


def draw_runs(
    runs: Mapping[str, Sequence[Record]],
    path: AnyPath,
    title: str,
    styles: Styles | None = None,
) -> None:
    """Draws smoothed training losses of runs; dots are final evaluation losses."""
    styles = styles or styles_of(runs)
    figure, axes = _figure(f"{title}\nlines: training, smoothed; dots: held out")
    for name, records in runs.items():
        steps, losses = _series(records, "loss")
        axes.plot(steps, _smooth(losses), label=name, **styles[name])
        eval_steps, eval_losses = _series(records, "eval_loss")
        color = styles[name]["color"]
        axes.plot(eval_steps[-1:], eval_losses[-1:], "o", color=color)
    _save(figure, axes, path)


LABELS = {
    "overlap": "overlap with the basis before",
    "anchor": "overlap with the anchor",
    "energy": "share of the gradient, R",
    "layer_energy": "share of the gradient, R",
    "derivative": "singular values, error's derivative",
}


def draw_subspaces(records: Sequence[Record], path: AnyPath, title: str) -> None:
    """Draws the subspace metrics of one run, a line for each kind of layer.

    Of singular values, the largest one; the layers' energies are left out.
    """
    names = {name for record in records for name in record if "/" in name}
    groups = [g for g in LABELS if g != "layer_energy" and _of(g, names)]
    figure = Figure(figsize=(4 * len(groups) + 2, 4), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, group in zip(panels, groups, strict=True):
        for name in _of(group, names):
            _, kind, *index = name.split("/")
            if index in ([], ["1"]):
                axes.plot(*_series(records, name), ".-", label=kind)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(LABELS[group])
        axes.grid(alpha=0.3)
    _save(figure, panels[-1], path)


def draw_spectra(
    values: Mapping[str, Sequence[float]],
    path: AnyPath,
    title: str,
    styles: Styles | None = None,
) -> None:
    """Draws normalised singular values, descending, a line for each kind or run."""
    styles = styles or styles_of(values)
    figure, axes = _figure(title)
    for kind, line in values.items():
        axes.plot(range(1, len(line) + 1), line, label=kind, **styles[kind])
    axes.set_xlabel("index")
    axes.set_ylabel("singular value over the largest, mean of layers")
    _save(figure, axes, path)


def draw_by_time(
    runs: Mapping[str, Sequence[Record]],
    path: AnyPath,
    title: str,
    styles: Styles | None = None,
) -> None:
    """`draw_runs` over the time that the steps took, compilation left out."""
    styles = styles or styles_of(runs)
    figure, axes = _figure(f"{title}\nlines: training, smoothed")
    for name, records in runs.items():
        _, losses = _series(records, "loss")
        axes.plot(_minutes(records), _smooth(losses), label=name, **styles[name])
    axes.set_xlabel("minutes of training steps, compilation left out")
    _save(figure, axes, path)


def _minutes(records: Sequence[Record]) -> list[float]:
    """Minutes up to each record with a loss; its time is the mean of its steps.

    A record whose steps loaded their programs has no time: it counts as the mean.
    """
    shown = [record for record in records if record.get("loss") is not None]
    mean = mean_ms(records) or 0.0
    taken = (b - a for a, b in pairwise([0, *(r["step"] for r in shown)]))
    times = (r.get("ms_per_step") or mean for r in shown)
    return [*accumulate(n * ms / 6e4 for n, ms in zip(taken, times, strict=True))]


def draw_losses(
    losses: Mapping[str, Sequence[float]],
    path: AnyPath,
    title: str,
    styles: Styles | None = None,
) -> None:
    """Draws final held-out losses, best on top: a dot a run, a bar for their mean."""
    styles = styles or styles_of(losses)
    best_last = sorted(losses.items(), key=lambda item: -fmean(item[1]))
    size = 6 + 0.09 * max(map(len, losses)), 1.5 + 0.3 * len(losses)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    for height, (name, values) in enumerate(best_last):
        color = styles[name]["color"]
        axes.plot(values, [height] * len(values), "o", alpha=0.6, color=color)
        axes.plot(fmean(values), height, "|", color=color, markersize=14)
    axes.set_yticks(range(len(best_last)), [name for name, _ in best_last])
    axes.set_xlabel("held-out loss, nats per token")
    axes.set_title(title)
    axes.grid(axis="x", alpha=0.3)
    _write(figure, path)


def draw_memory(
    losses: Mapping[str, Sequence[float]],
    state: Mapping[str, float],
    path: AnyPath,
    title: str,
    labels: Mapping[str, str],
) -> None:
    """Draws the mean held-out loss of each run over its optimizer state in MB."""
    styles = styles_of(losses)
    points = {name: (state[name], fmean(values)) for name, values in losses.items()}
    figure, axes = _figure(title)
    figure.set_size_inches(9, 6.5)
    axes.set_xlabel("optimizer state, MB")
    axes.set_ylabel("held-out loss, nats per token")
    wide, high = (max(x) - min(x) or 1.0 for x in zip(*points.values(), strict=True))
    for column in _columns(points, 0.12 * wide):
        right = max(points[name][0] for name in column) + 0.03 * wide
        heights = _apart([points[name][1] for name in column], 0.032 * high)
        for name, height in zip(column, heights, strict=True):
            x, y = points[name]
            axes.plot([x, right], [y, height], color="0.7", linewidth=0.8, zorder=1)
            axes.plot(x, y, "o", color=styles[name]["color"])
            axes.text(right, height, f" {labels[name]}", va="center", fontsize="small")
    axes.set_xlim(right=max(state.values()) + 0.3 * wide)
    _write(figure, path)


def _columns(points: Mapping[str, tuple[float, float]], near: float) -> list[list[str]]:
    """Names of points in columns of about one x, from the lowest y to the highest."""
    columns: list[list[str]] = []
    for name in sorted(points, key=lambda name: points[name]):
        if columns and points[name][0] - points[columns[-1][0]][0] < near:
            columns[-1].append(name)
        else:
            columns.append([name])
    return [sorted(column, key=lambda name: points[name][1]) for column in columns]


def _apart(values: Sequence[float], gap: float) -> list[float]:
    """Ascending values, moved as little as gives each neighbor its distance."""
    groups: list[tuple[float, int]] = []  # the lowest value, and how many there are
    for value in values:
        groups.append((value, 1))
        while len(groups) > 1 and groups[-1][0] < groups[-2][0] + groups[-2][1] * gap:
            (b, m), (a, n) = groups.pop(), groups.pop()
            groups.append(((n * a + m * (b - n * gap)) / (n + m), n + m))
    return [low + i * gap for low, n in groups for i in range(n)]


def draw_measured(
    runs: Mapping[str, Sequence[Record]], prefix: str, path: AnyPath, title: str
) -> None:
    """Draws subspace metrics: a panel for each run, a line for each metric.

    Singular values and layers' energies get a panel for each kind of layer of each run,
    and a line for each value or layer, the largest or the first in dark.
    """
    panels: dict[str, list[tuple[str, Sequence[Record], str]]] = {}
    for name, records in runs.items():
        for key in _of(prefix, {k for r in records for k in r}):
            _, kind, *index = key.split("/")
            panel = ", ".join([name, kind] if index else [name])
            panels.setdefault(panel, []).append((key, records, kind))
    lines_of_kinds = all(k.count("/") == 1 for p in panels.values() for k, *_ in p)
    across = min(4, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(4 * across + 1, 4 * down), layout="constrained")
    grid = [*figure.subplots(down, across, sharey=lines_of_kinds, squeeze=False).flat]
    for axes, (name, lines) in zip(grid, panels.items(), strict=False):
        for i, (key, records, kind) in enumerate(lines):
            color = None if lines_of_kinds else colormaps["viridis"](i / len(lines))
            axes.plot(*_series(records, key), ".-", label=kind, color=color)
        axes.set_title(name)
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
    for axes in grid[len(panels) :]:
        axes.remove()
    figure.axes[0].set_ylabel(LABELS[prefix])
    if lines_of_kinds:
        figure.axes[-1].legend(fontsize="small")
    figure.suptitle(title)
    _write(figure, path)


def _of(group: str, names: Iterable[str]) -> list[str]:
    """Names of a group, sorted by kind and by number."""
    found = (name for name in names if name.startswith(f"{group}/"))
    return sorted(found, key=lambda name: (name.split("/")[1], len(name), name))


def _figure(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats per token")
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Figure, axes: Axes, path: AnyPath) -> None:
    handles, names = axes.get_legend_handles_labels()
    if len(names) <= 8:
        axes.legend()
    else:  # beside the axes, not over them
        figure.set_size_inches(12, max(5, 0.2 * len(names) + 0.5))
        figure.legend(handles, names, loc="outside right upper", fontsize="small")
    _write(figure, path)


def _write(figure: Figure, path: AnyPath) -> None:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_bytes(path, image.getvalue())


def _series(records: Sequence[Record], name: str) -> tuple[list[int], list[float]]:
    found = [(r["step"], r[name]) for r in records if r.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _smooth(values: Sequence[float]) -> list[float]:
    """Centred moving average over about a tenth of the values, less near the ends."""
    reach, last = len(values) // 20 + 1, len(values) - 1

    def around(i: int) -> Sequence[float]:
        half = min(reach, i, last - i)
        return values[i - half : i + half + 1]

    return [fmean(around(i)) for i in range(len(values))]
