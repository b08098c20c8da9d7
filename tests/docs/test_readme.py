"""README.md's examples run as they stand, and its two commands are one line each."""

import re
from typing import Any

import jax
import pytest
from flax import nnx

from tests.helpers.repository import ROOT

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


@pytest.mark.parametrize(
    "example", blocks("python"), ids=["optax", "nnx", "linen", "eqx"]
)
def test_an_example_runs_and_trains_every_weight(example: str) -> None:
    names: dict[str, Any] = {}
    exec(example, names)

    def weights() -> list[Any]:
        trained = names.get("state") if hasattr(names.get("state"), "params") else None
        kept = trained.params if trained else names.get("params", names.get("model"))
        if isinstance(kept, nnx.Module):
            kept = nnx.state(kept, nnx.Param)
        return [x for x in jax.tree.leaves(kept) if hasattr(x, "dtype")]

    before = [x.copy() for x in weights()]
    call = re.findall(r"^(?:.*= |print\()?(step\(.*\))\)?$", example, re.M)[-1]
    statement = re.findall(rf"^.*{re.escape(call)}.*$", example, re.M)[-1]
    exec(statement, names)
    moved = [bool((a != b).any()) for a, b in zip(before, weights(), strict=True)]
    assert all(moved)


def test_the_two_commands_are_one_line_each() -> None:
    train, test = blocks("bash")
    for command in (train, test):
        assert command.count("\n") == 1
        assert command.startswith("python3 -m venv .venv && ")
    assert train.endswith(".venv/bin/python -m train\n")
    assert ".venv/bin/python -m pytest" in test
