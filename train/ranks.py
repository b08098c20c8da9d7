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
    """What `lowrank_optax` takes as a rank, from 64, 0.25 or "attention=64,mlp=0.25".

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
    used = set()
    for path, side in sides.items():
        which = [i for i, (pattern, _) in enumerate(rules) if re.search(pattern, path)]
        if not which:
            raise ValueError(
                f"rank={rank}: no expression is found in {path}; add one for it, or "
                "one for all that is left, as in mlp=64,.=full"
            )
        used.add(which[0])
        value = rules[which[0]][1]
        if isinstance(value, int) and value > side:
            raise ValueError(
                f"rank={rank}: {value} is more than {path} has, whose smaller side is "
                f"{side}: {side} is full rank, {side - 1} the largest that saves "
                "anything; " + _all(sides)
            )
    for i, (pattern, _) in enumerate(rules):
        if i not in used:
            raise ValueError(
                f"rank={rank}: {pattern!r} decides for no matrix (the first expression "
                "that is found in a path does); " + _all(sides)
            )


def _all(sides: Mapping[str, int]) -> str:
    """The matrices, those of one size together."""
    by_side: dict[int, list[str]] = {}
    for path, side in sides.items():
        by_side.setdefault(side, []).append(path)
    return "the smaller sides are " + "; ".join(
        f"{side} of {', '.join(paths)}" for side, paths in by_side.items()
    )
