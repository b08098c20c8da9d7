"""Decides which leaves are matrices, and which axes are rows and columns."""

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers

from lowrank_optax.core.by_name import Decision, Shape, decide_by_name
from lowrank_optax.core.layout import STACKED, layout_of
from lowrank_optax.core.paths import by_path, with_paths
from lowrank_optax.core.rules import Rules, is_rules, match

# What is said of one leaf: its axes; "matrix", a leaf of two axes; "auto", what its
# name and shape say; None, full rank.
Dimensions = MuonDimensionNumbers | Literal["auto", "matrix"] | None
DimensionNumbers = (
    Dimensions | Rules | Mapping[str, Any] | Callable[[optax.Params], Any]
)
Specs = dict[str, MuonDimensionNumbers | None]

_NO_RULE = object()


def specs_of(
    dimension_numbers: DimensionNumbers, tree: optax.Params, *, sliced: bool = False
) -> Specs:
    """The axes of each leaf by path, or None for full rank.

    Args:
      dimension_numbers: one value or rules for all leaves, a tree of values like the
        parameters, or a function from the parameters to any of these. None alone is
        "matrix": every leaf of two axes.
      tree: the parameters.
      sliced: whether the layers' axis is gone, since layers are updated one at a time.

    Raises:
      ValueError: for leaves that nothing decides, all in one error, with rules to
        paste; for a value that is none.
    """
    specs, undecided = _decide(dimension_numbers, tree, sliced)
    if undecided:
        shapes = {path: np.shape(x) for path, x in by_path(tree).items()}
        reasons = [f"  {p} {shapes[p]}: {why}" for p, why in undecided.items()]
        raise ValueError(
            "which axes of these parameters are rows and columns of a matrix?\n"
            + "\n".join(reasons)
            + "\nPass dimension_numbers with these rules (lowrank_optax.print_rules("
            'params) prints them too). Where they say undecided, write "matrix" (two '
            "axes), lro.STACKED (the last two of more), optax.contrib."
            "MuonDimensionNumbers(rows, columns), or leave None (full rank):\n"
            + _as_text(shapes, specs, undecided)
        )
    return specs


def print_rules(
    params: optax.Params, dimension_numbers: DimensionNumbers = "auto"
) -> None:
    """Prints rules that say of every leaf what `dimension_numbers` decides.

    The list can be pasted as `dimension_numbers=[...]` and changed. A leaf that nothing
    decides is marked "undecided"; its rule says full rank.

    Args:
      params: the parameters, or their shapes from `jax.eval_shape`.
      dimension_numbers: as for `low_rank`.

    Raises:
      ValueError: a value of `dimension_numbers` that is none.

    Example:
      >>> shapes = {"layers": {"q": jnp.ones((3, 8, 8)), "norm": jnp.ones((3, 8))},
      ...           "dense": {"kernel": jnp.ones((8, 4))}}
      >>> lro.print_rules(shapes)
      [
          (r"^dense/kernel$", None),  # (8, 4), undecided
          (r"^layers/norm$", None),  # (3, 8)
          (r"^layers/q$", lro.STACKED),  # (3, 8, 8)
      ]
    """
    specs, undecided = _decide(dimension_numbers, params, sliced=False)
    shapes = {path: np.shape(x) for path, x in by_path(params).items()}
    print(_as_text(shapes, specs, undecided))


def _decide(
    dimension_numbers: DimensionNumbers, tree: optax.Params, sliced: bool
) -> tuple[Specs, dict[str, str]]:
    """The axes of each leaf, and why some have none."""
    shapes = {path: np.shape(x) for path, x in by_path(tree).items()}
    by_name = functools.cache(lambda: decide_by_name(shapes, sliced=sliced))
    values, own = _values(dimension_numbers, tree, list(shapes))
    # Without leaves of three axes STACKED means a matrix of two.
    stacks = not own and any(len(shape) > 2 for shape in shapes.values())
    one = isinstance(dimension_numbers, MuonDimensionNumbers)
    specs: Specs = dict.fromkeys(shapes)
    undecided: dict[str, str] = {}
    for path, value in values.items():
        shape, why = shapes[path], None
        # Scalars, vectors and what is empty have full rank whatever is said of them.
        if len(shape) < 2 or not math.prod(shape):
            continue
        if value == "auto":
            value, why = _by_name(by_name()[path])
        elif value == "matrix":
            value, why = _two_axes(shape)
        elif value is _NO_RULE:
            value, why = None, "no dimension_numbers rule covers it"
        elif value == STACKED and stacks:
            why = _why_not_stacked(path, shape, by_name()[path], one)
        if not isinstance(value, MuonDimensionNumbers | None):
            raise ValueError(
                f'{path}: {value!r} is none of MuonDimensionNumbers, "auto", '
                '"matrix" and None'
            )
        if why is None:
            specs[path] = value
        else:
            undecided[path] = why
    return specs, undecided


def _by_name(seen: Decision) -> tuple[MuonDimensionNumbers | None, str | None]:
    unknown = "its name and shape do not say"
    return seen.spec, unknown if seen.undecided else None


def _two_axes(shape: Shape) -> tuple[MuonDimensionNumbers | None, str | None]:
    if len(shape) == 2:
        return MuonDimensionNumbers(), None
    return None, f'"matrix" has two axes, and this leaf {len(shape)}'


def _values(
    dimension_numbers: Any, tree: optax.Params, paths: list[str]
) -> tuple[dict[str, Any], bool]:
    """The value for each leaf, and whether each leaf has its own."""
    if dimension_numbers is None:
        return dict.fromkeys(paths, "matrix"), False
    if _is_value(dimension_numbers):
        return dict.fromkeys(paths, dimension_numbers), False
    entries = dict(with_paths(dimension_numbers, is_leaf=_is_value))
    if entries.keys() >= set(paths) and not is_rules(dimension_numbers):
        return {path: entries[path] for path in paths}, True
    if is_rules(dimension_numbers):
        rules = [*dimension_numbers, ("", _NO_RULE)]
        return {p: match(rules, p, "dimension_numbers") for p in paths}, False
    # Last, since a tree may be callable too, as Equinox' modules are.
    if callable(dimension_numbers):
        return _values(dimension_numbers(tree), tree, paths)
    missing = sorted(set(paths) - entries.keys())
    raise ValueError(
        f"dimension_numbers has no entry for {missing}; pass rules, a value, a tree of "
        'them like the parameters, or a function to one; a value is "auto", '
        '"matrix", None, or MuonDimensionNumbers'
    )


def _is_value(x: object) -> bool:
    return x is None or isinstance(x, (MuonDimensionNumbers, str))


def _why_not_stacked(
    path: str, shape: Shape, seen: Decision, one_for_all: bool
) -> str | None:
    """Why a rule that says STACKED would not make what its author means."""
    if seen.kind == "vector":
        return "lro.STACKED would make one matrix of vectors that are stacked"
    if seen.kind not in ("matrix", "unknown") and one_for_all:
        return f"lro.STACKED for all leaves would take the {seen.kind} too"
    if seen.spec is not None and _batch(path, shape, seen.spec) != _batch(path, shape):
        return f"lro.STACKED would make matrices of {shape[-2]} x {shape[-1]}"
    return None


def _batch(
    path: str, shape: Shape, spec: MuonDimensionNumbers = STACKED
) -> tuple[int, ...]:
    layout = layout_of(path, shape, spec)
    return layout.axes[: len(layout.batch)]


def _as_text(
    shapes: Mapping[str, Shape], specs: Specs, undecided: Mapping[str, str]
) -> str:
    """Rules for all leaves of two or more axes, one for all layers alike."""
    alike: dict[str, list[str]] = {}
    for path in (path for path, shape in shapes.items() if len(shape) > 1):
        pattern = re.sub(r"\d+", r"\\d+", re.escape(path))
        alike.setdefault(pattern, []).append(path)

    def said(path: str) -> tuple[str, str]:
        mark = ", undecided" if path in undecided else ""
        return _spec_as_text(len(shapes[path]), specs[path]), mark

    lines: list[str] = []
    for pattern, paths in alike.items():
        one = len({said(path) for path in paths}) == 1
        for path in paths[:1] if one else paths:
            value, mark = said(path)
            found_in = ", ".join(
                dict.fromkeys(str(shapes[p]) for p in paths if one or p == path)
            )
            several = f"{len(paths)} of " if one and len(paths) > 1 else ""
            found = pattern if one else re.escape(path)
            lines.append(f'    (r"^{found}$", {value}),  # {several}{found_in}{mark}')
    return "\n".join(["[", *lines, "]"])


def _spec_as_text(ndim: int, spec: MuonDimensionNumbers | None) -> str:
    if spec is None:
        return "None"
    if spec == STACKED:
        return "lro.STACKED"
    if spec == MuonDimensionNumbers() and ndim == 2:
        return '"matrix"'
    return f"optax.contrib.MuonDimensionNumbers{tuple(spec)}"
