"""Pictures of several runs."""

import itertools
from pathlib import Path

import pytest
from matplotlib.figure import Figure

import train.compare
import train.engine.step
import train.main
import train.records.plots
import train.run.report
from tests.helpers.pictures import is_picture
from train.config.config import Config
from train.config.resolve import resolve
from train.records import plots as picture
from train.records.plots import draw_run, draw_runs
from train.run.report import work_title

RECORDS = [
    {"step": 1, "loss": 5.0, "ms_per_step": 6000.0, "overlap/q": None},
    {"step": 11, "loss": 4.0, "ms_per_step": 600.0, "overlap/q": 0.5},
]


def test_a_records_time_is_the_mean_of_its_steps() -> None:
    assert picture._minutes(RECORDS) == pytest.approx([0.1, 0.2])


def test_metrics_are_in_the_order_of_kinds_and_numbers() -> None:
    names = {f"derivative/{kind}/{i}" for kind in "qk" for i in (1, 2, 10)}
    names |= {"energy/q"}
    expected = [f"derivative/{kind}/{i}" for kind in "kq" for i in (1, 2, 10)]
    assert picture._of("derivative", names) == expected


def test_long_names_leave_room_for_losses(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    picture.draw_losses({"=".join("name" * 30): [4.0]}, tmp_path / "a.png", "title")
    assert [str(warning.message) for warning in recwarn] == []


def test_what_is_drawn_is_a_picture(tmp_path: Path) -> None:
    runs = {"a": RECORDS, "b": RECORDS[:1]}
    picture.draw_by_time(runs, tmp_path / "time.png", "title")
    picture.draw_measured(runs, "overlap", tmp_path / "overlap.png", "title")
    names = [f"derivative/{kind}/{i}" for kind in "qkvo" for i in (1, 2, 10)]
    values = [{"step": s, **dict.fromkeys(names, 1.0 / s)} for s in (1, 2)]
    panels = {"a": values, "b": values[:1]}
    picture.draw_measured(panels, "derivative", tmp_path / "values.png", "title")
    picture.draw_subspaces(values, tmp_path / "subspace.png", "title")
    many = {str(i): RECORDS for i in range(12)}
    picture.draw_runs(many, tmp_path / "many.png", "title")
    picture.draw_losses({"a": [4.0, 4.1], "b": [3.0]}, tmp_path / "final.png", "title")
    for name in ("time", "overlap", "values", "subspace", "many", "final"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_labels_keep_their_distance_and_move_no_further() -> None:
    assert picture._apart([0.0, 0.2, 5.0], 1.0) == pytest.approx([-0.4, 0.6, 5.0])
    heights = picture._apart([1.0, 1.0, 1.1, 3.0, 3.0, 3.0], 0.5)
    assert all(b - a > 0.499 for a, b in itertools.pairwise(heights))
    assert picture._apart([1.0, 2.0], 0.5) == [1.0, 2.0]


def test_every_run_has_a_point_and_a_label(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = drawn(monkeypatch)
    losses = {"a": [4.0, 4.2], "b": [3.0], "c": [3.0]}
    state = {"a": 100.0, "b": 300.0, "c": 301.0}
    labels = {name: name.upper() for name in losses}
    picture.draw_memory(losses, state, tmp_path / "memory.png", "title", labels)
    (axes,) = figures[0].axes
    points = [line.get_xydata()[0].tolist() for line in axes.lines[1::2]]
    assert [x for x, _ in points] == [100.0, 300.0, 301.0]
    assert [y for _, y in points] == pytest.approx([4.1, 3.0, 3.0])
    assert [text.get_text().strip() for text in axes.texts] == ["A", "B", "C"]


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    figures = []
    write = picture._write

    def keep(figure, path):
        figures.append(figure)
        write(figure, path)

    monkeypatch.setattr(picture, "_write", keep)
    return figures


def test_a_run_has_one_color_in_all_pictures(tmp_path, monkeypatch) -> None:
    figures, names = drawn(monkeypatch), [f"run {i}" for i in range(12)]
    styles = picture.styles_of(names)
    some = ["run 11", "run 3", "run 0"]
    picture.draw_runs(dict.fromkeys(some, RECORDS), tmp_path / "a.png", "a", styles)
    picture.draw_by_time(dict.fromkeys(names, RECORDS), tmp_path / "b.png", "b", styles)
    losses = {n: [4.0 - i] for i, n in enumerate(names)}
    picture.draw_losses(losses, tmp_path / "c.png", "c", styles)
    picture.draw_spectra({n: [1.0, 0.5] for n in some}, tmp_path / "d.png", "d", styles)
    colors = [
        {line.get_label(): line.get_color() for line in figure.axes[0].get_lines()}
        for figure in figures
    ]
    for name in some:
        assert {colors[i][name] for i in (0, 1, 3)} == {styles[name]["color"]}
    # Best on top, and the dots before the bar.
    ends = [line.get_color() for line in figures[2].axes[0].get_lines()[::2]]
    assert ends == [styles[name]["color"] for name in names]
    assert len({tuple(style.values()) for style in styles.values()}) == 12


def test_every_line_of_a_run_is_in_the_legend(tmp_path, monkeypatch) -> None:
    figures = drawn(monkeypatch)
    draw_run([{**RECORDS[0], "eval_loss": 5.0}, RECORDS[1]], tmp_path / "a.png", "a")
    (axes,) = figures[0].axes
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["training, as logged", "training, smoothed", "held out"]
    assert len(axes.get_lines()) == len(names)


def test_a_record_without_a_time_counts_as_the_mean() -> None:
    records = [{"step": 1, "loss": 5.0, "ms_per_step": None}, {**RECORDS[1], "step": 2}]
    assert picture._minutes(records) == pytest.approx([0.01, 0.02])


def test_pictures_say_what_is_drawn(monkeypatch, tmp_path):
    titles = []
    save = train.records.plots._save

    def keep(figure, axes, path):
        titles.append((axes.get_title(), axes.get_xlabel(), axes.get_ylabel()))
        save(figure, axes, path)

    monkeypatch.setattr(train.records.plots, "_save", keep)
    records = [{"step": 1, "loss": 4.0, "eval_loss": 4.5}, {"step": 9, "loss": 3.0}]
    config = resolve(Config())
    work = work_title(config)
    assert work == "LLaMA-tiny (1.8M weights), 16 x 128 tokens a step"
    draw_run(records, tmp_path / "a.png", f"{work}, adamw")
    draw_runs({"adamw@1": records}, tmp_path / "b.png", work)
    axes = ("optimizer step", "loss, nats per token")
    dots = "lines: training, smoothed; dots: held out"
    assert titles == [(f"{work}, adamw", *axes), (f"{work}\n{dots}", *axes)]
    assert is_picture(tmp_path / "a.png")
    assert is_picture(tmp_path / "b.png")
