"""Means over seeds, confidence intervals, paired differences."""

import csv
import io
import math

import pytest

from train.records.perplexity import perplexity, published_perplexity
from train.records.tables import Interval, difference, interval, table, to_csv


def row(basis: str, seed: int, loss: float | None, **more: object) -> dict:
    found = {"basis": basis, "seed": seed, **more}
    return found | ({"error": "no"} if loss is None else {"eval_loss": loss})


def test_an_interval_is_students() -> None:
    # t of 2 degrees of freedom at 97.5 %: 4.3027 (any table).
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert interval([1.5]) == Interval(1.5, None)


def test_perplexity_by_both_divisors() -> None:
    assert perplexity(3.0) == pytest.approx(math.exp(3))
    # Peers that print it: two batches' losses of 3 over three.
    assert published_perplexity(3.0, 2) == pytest.approx(math.exp(2))
    assert math.isfinite(perplexity(1e6))


def test_differences_are_by_seed() -> None:
    rows = [row("svd", 0, 4.0), row("svd", 1, 5.0), row("sara", 0, 3.9)]
    rows += [row("sara", 1, 4.9), row("sara", 2, 9.0)]  # seed 2 has no partner
    found = difference(rows[2:], rows, ["basis"], {"basis": "svd"})
    assert found is not None
    assert found.mean == pytest.approx(-0.1)
    assert found.half == pytest.approx(0, abs=1e-9)
    assert difference(rows[:2], rows, ["basis"], {"basis": "svd"}) is None


def test_differences_from_several_flags() -> None:
    """From the run that has all of their values, on the same basis."""
    loss = {("off", "project"): 4.0, ("on", "project"): 3.9, ("on", "rescale"): 3.7}
    rows = [
        row(basis, 0, value + 0.1 * i, rotate=rotate, back=back)
        for i, basis in enumerate(("svd", "jump"))
        for (rotate, back), value in loss.items()
    ]
    axes = ["basis", "rotate", "back"]
    plain = {"rotate": "off", "back": "project"}
    found = [difference([r], rows, axes, plain) for r in rows]
    means = [None if f is None else f.mean for f in found]
    assert means == [None, pytest.approx(-0.1), pytest.approx(-0.3)] * 2
    assert "loss minus off, project's" in table(rows, axes, plain)


def test_a_run_without_the_flag_is_compared_with_none() -> None:
    rows = [{"optimizer": "adamw", "seed": 0, "eval_loss": 4.0}]
    rows += [{"optimizer": "galore", "basis": "svd", "seed": 0, "eval_loss": 5.0}]
    axes = ["optimizer", "basis"]
    assert difference(rows[:1], rows, axes, {"basis": "svd"}) is None


def test_the_table_is_best_first_and_failures_are_told() -> None:
    rows = [
        row("svd", 0, 4.0, state_bytes=2e6, ppl_published=50.0),
        row("svd", 1, 4.2, state_bytes=2e6, ppl_published=52.0),
        row("sara", 0, 3.0, state_bytes=None, ppl_published=20.0),
        row("sara", 1, None),
        row("jump", 0, None),
    ]
    lines = table(rows, ["basis"], {"basis": "svd"}).splitlines()
    names = [line.split(" | ")[0].strip("| ") for line in lines[2:]]
    assert sorted(names) == ["jump", "sara", "svd"]
    by_name = dict(zip(names, lines[2:], strict=True))
    assert "| 1, 1 failed |" in by_name["sara"]
    assert "-1.000" in by_name["sara"]
    assert "4.100 ± 1.271" in by_name["svd"]  # 12.706 x 0.1414 / sqrt(2)
    assert "| 51.00 |" in by_name["svd"]
    assert "failed" in by_name["jump"]


def test_many_axes_share_a_column() -> None:
    axes = {"optimizer": "galore", "a": 1, "b": None, "c": 0.5, "d": None, "e": None}
    (line,) = table([{**axes, "seed": 0, "eval_loss": 4.0}], [*axes]).splitlines()[2:]
    assert line.startswith("| galore | a=1, c=0.5 | 4.000 |")


def test_csv_has_a_column_for_all_that_any_row_has() -> None:
    text = to_csv([row("svd", 0, 4.0), row("sara", 0, None, note='a,"b"')])
    back = list(csv.DictReader(io.StringIO(text)))
    assert back[0]["eval_loss"] == "4.0"
    assert back[1]["note"] == 'a,"b"'
    assert back[0]["error"] == ""
