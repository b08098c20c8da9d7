"""README.md's examples run, and its two commands are one line each."""

import re
from typing import Any

from tests.helpers.repository import ROOT

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def test_the_first_example_takes_a_step() -> None:
    names: dict[str, Any] = {}
    exec(blocks("python")[0], names)
    tx, params = names["tx"], names["params"]
    updates, _ = names["jax"].jit(tx.update)(params, tx.init(params), params)
    moved = names["jax"].tree.map(lambda u: bool(abs(u).max() > 0), updates)
    assert moved == {"mlp": {"kernel": True}, "head": {"kernel": True}}


def test_the_other_examples_run() -> None:
    names: dict[str, Any] = {}
    first, *others = blocks("python")
    exec(first, names)
    assert len(others) == 5
    for example in others:
        exec(example, names)


def test_the_two_commands_are_one_line_each() -> None:
    train, test = blocks("bash")
    for command in (train, test):
        assert command.count("\n") == 1
        assert command.startswith("python3 -m venv .venv && ")
    assert train.endswith(".venv/bin/python -m train\n")
    assert ".venv/bin/python -m pytest" in test
