"""Pictures of several runs."""

from pathlib import Path

import pytest

from train import picture

RECORDS = [
    {"step": 1, "loss": 5.0, "ms_per_step": 6000.0, "overlap/q": None},
    {"step": 11, "loss": 4.0, "ms_per_step": 600.0, "overlap/q": 0.5},
]


def test_a_records_time_is_the_mean_of_its_steps() -> None:
    assert picture._minutes(RECORDS) == pytest.approx([0.1, 0.2])


def test_what_is_drawn_is_a_picture(tmp_path: Path) -> None:
    runs = {"a": RECORDS, "b": RECORDS[:1]}
    picture.draw_by_time(runs, tmp_path / "time.png", "title")
    picture.draw_measured(runs, "overlap", tmp_path / "overlap.png", "title")
    picture.draw_losses({"a": [4.0, 4.1], "b": [3.0]}, tmp_path / "final.png", "title")
    for name in ("time", "overlap", "final"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
