"""The table of methods, and what the library's docstrings say of them."""

import inspect
import re
from typing import Any

import pytest

import lowrank_optax as lro
from train.config.methods import METHODS

PUBLIC: dict[str, Any] = {
    name: getattr(module, name)
    for module in (lro, lro.recipes)
    for name in module.__all__
    if name in METHODS
}


def test_all_named_optimizers_are_in_the_table() -> None:
    assert len(PUBLIC) > 20
    assert all(METHODS[name].make is make for name, make in PUBLIC.items())


@pytest.mark.parametrize("name", PUBLIC)
def test_an_example_uses_the_rate_that_was_measured_as_best(name: str) -> None:
    text = inspect.getdoc(PUBLIC[name]) or ""
    rates = re.findall(
        rf"lro\.(?:recipes\.)?{name}\(([^,)]+)", text.split("Example:")[1]
    )
    assert rates
    assert {float(x) for x in rates} == {METHODS[name].rate}


@pytest.mark.parametrize("name", PUBLIC)
def test_an_option_is_explained_at_most_one_docstring_away(name: str) -> None:
    """Which names the next one, and has the option among its own arguments."""
    options = [*inspect.signature(PUBLIC[name]).parameters]
    known = explained(PUBLIC[name])
    for names, other in re.findall(r"^\s+([*\w, ]+): as in `(\w+)`", args(name), re.M):
        make = PUBLIC.get(other, lro.low_rank_optimizer)
        assert make.__name__ == other, f"{other} is no named optimizer"
        there = explained(make)
        named = [x.strip() for x in names.split(",")]
        taken = options if named == ["**options"] else named
        if named != ["**options"]:
            assert {*taken} <= there, (names, other)
        known |= there & {*taken}
    assert {*options} <= known, {*options} - known


def args(name: str) -> str:
    text = inspect.getdoc(PUBLIC[name]) or ""
    return text.split("Args:")[1].split("Raises:")[0]


def explained(make: Any) -> set[str]:
    """The arguments that a docstring explains itself."""
    text = (inspect.getdoc(make) or "").split("Args:")[1].split("Raises:")[0]
    found = re.findall(r"^\s+(\w+(?:, \w+)*): (?!as in `)", text, re.M)
    return {x for names in found for x in names.split(", ")}
