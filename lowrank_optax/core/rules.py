"""Rules by path: pairs (regular expression, value), and ranks and sides by them."""

import numbers
import re
from collections.abc import Sequence
from typing import Any, TypeGuard

from lowrank_optax.core.layout import Layout, Side

Rules = Sequence[tuple[str | re.Pattern[str], Any]]
Rank = int | float | Rules
Square = Side | Rules


def match(rules: Rules, path: str, what: str) -> Any:
    """The value of the first rule whose regular expression is found in the path."""
    for pattern, value in rules:
        try:
            found = re.search(pattern, path)
        except re.error as error:
            raise ValueError(
                f"{path}: the {what} rule {pattern!r} is not a regular expression: "
                f"{error}"
            ) from error
        if found:
            return value
    raise ValueError(
        f"{path}: no {what} rule covers this parameter; add a pair (regular "
        f"expression, value), with the value None for full rank. "
        f"Rules: {[pattern for pattern, _ in rules]}"
    )


def is_rules(x: object) -> TypeGuard[Rules]:
    """Whether x is a sequence of pairs; lists too, as JSON and YAML have them."""
    return (
        isinstance(x, Sequence)
        and not isinstance(x, str)
        and all(
            isinstance(pair, (tuple, list))
            and len(pair) == 2
            and isinstance(pair[0], (str, re.Pattern))
            for pair in x
        )
    )


def rank_of(rank: Rank, path: str, layout: Layout) -> int | None:
    """r <= m for a matrix, or None for a rule that says full rank."""
    value: Any = match(rank, path, "rank") if is_rules(rank) else rank
    if value is None:
        return None
    check_rank(value, path)
    if isinstance(value, numbers.Integral):
        return min(int(value), layout.m)
    return max(1, round(float(value) * layout.m))


def side_of(square: Square, path: str) -> Side:
    """The side of a square matrix that is projected."""
    rules = [("", square)] if isinstance(square, str) else square
    return match(rules, path, "square")


def check_square(square: object) -> None:
    """ValueError unless it is a side, or rules."""
    sides = [side for _, side in square] if is_rules(square) else [square]
    for side in sides:
        if side not in ("input", "output"):
            raise ValueError(
                f'square={side!r}: choose "input" or "output", or pass (regular '
                "expression, side) pairs"
            )


def check_rank(rank: object, path: str = "low_rank") -> None:
    """ValueError unless rank is an int >= 1, a fraction in (0, 1], or rules."""
    if is_rules(rank):
        for _, value in rank:
            if value is not None:
                check_rank(value, path)
    elif isinstance(rank, bool) or not isinstance(rank, numbers.Real):
        raise ValueError(
            f"{path}: rank must be an int, a float fraction of the smaller side or "
            f"(regular expression, rank) pairs, not {rank!r}; under "
            "optax.inject_hyperparams pass static_args=lowrank_optax.static_args(...)"
        )
    elif isinstance(rank, numbers.Integral):
        if rank < 1:
            raise ValueError(f"{path}: rank must be at least 1, not {rank}")
    elif not 0.0 < float(rank) <= 1.0:
        raise ValueError(f"{path}: a fractional rank must lie in (0, 1], not {rank}")
