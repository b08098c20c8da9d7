"""Ranks as the command line has them: one for all matrices, or by their paths."""

import re
from collections.abc import Mapping

Number = int | float | None
"""A whole number, a fraction of a matrix' smaller side, or None for full rank."""

FORMS = (
    "give a whole number (64), a fraction of the smaller side (0.25), or both by "
    "regular expressions (attention=64,mlp=0.25,.=full)"
)


def parse_rank(rank: int | float | str) -> int | float | list[tuple[str, Number]]:
    """Parses a rank for `lowrank_optax` from 64, 0.25 or "attention=64,mlp=0.25".

    Raises:
      ValueError: it is none of these, or out of range.
    """
    if not isinstance(rank, str):
        return _checked(rank)
    return [_pair(pair.strip()) for pair in rank.split(",")]


def _pair(text: str) -> tuple[str, Number]:
    pattern, equals, value = text.rpartition("=")
    try:
        re.compile(pattern)
        if not equals or not pattern:
            raise ValueError("it is no REGULAR_EXPRESSION=RANK")
        if value == "full":
            return pattern, None
        return pattern, _checked(int(value) if value.isdigit() else float(value))
    except (re.error, ValueError) as error:
        raise ValueError(f"rank {text!r}: {error}; {FORMS}") from error


def _checked(rank: int | float) -> int | float:
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise ValueError(f"rank={rank} is a fraction and must lie in (0, 1]; {FORMS}")
    if rank <= 0:
        raise ValueError(f"rank={rank} must be above 0")
    return rank


def check_ranks(rank: int | float | str, sides: Mapping[str, int]) -> None:
    """Whether a rank fits all matrices.

    Args:
      rank: as `parse_rank` takes it.
      sides: the smaller side of each matrix, by its path.

    Raises:
      ValueError: a rank above a matrix' smaller side, an expression that decides for no
        matrix, or a matrix for which none does.
    """
    parsed = parse_rank(rank)
    rules = parsed if isinstance(parsed, list) else [(".", parsed)]
    found = {
        path: [i for i, (pattern, _) in enumerate(rules) if re.search(pattern, path)]
        for path in sides
    }
    deciding = {which[0] for which in found.values() if which}
    for i, (pattern, _) in enumerate(rules):
        if i not in deciding:
            raise ValueError(
                f"rank={rank}: {pattern!r} decides for no matrix (the first expression "
                f"that is found in a path does, of {', '.join(sides)})"
            )
    for path, which in found.items():
        if not which:
            raise ValueError(
                f"rank={rank}: no expression is found in {path}; add one for it, or "
                f"one for all that is left: {rank},.=full"
            )
    _check_sides({path: (rules[found[path][0]][1], m) for path, m in sides.items()})


def _check_sides(matrices: Mapping[str, tuple[Number, int]]) -> None:
    """ValueError that names all matrices whose rank is above their smaller side."""
    above = {
        path: (rank, side)
        for path, (rank, side) in matrices.items()
        if isinstance(rank, int) and rank > side
    }
    if above:
        rank, side = min(above.values(), key=lambda x: x[1])
        these = ", ".join(path for path, pair in above.items() if pair == (rank, side))
        raise ValueError(
            f"rank {rank} is above the smaller side, {side}, of {these}; {side} would "
            f"be full rank, and {side - 1} is the largest that saves anything"
        )
