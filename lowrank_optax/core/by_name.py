"""The default rules: which leaves are matrices, by what names and shapes mean.

A name says what a leaf is: a kernel of attention or MLP, a norm's scale, an embedding,
a router. The shapes of a tree say which axes are layers: in a stack all leaves have
that axis, and a norm's scale has two axes in place of one.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Literal

from optax.contrib import MuonDimensionNumbers

from lowrank_optax.core.names import (
    ADAPTER,
    ATTENTION,
    BLOCK,
    EXPERTS,
    GATED,
    GATES,
    GENERIC,
    IN,
    INDEXED,
    LAST,
    OUT,
    PROJECTION,
    ROUTER,
    STACKS,
    VECTOR,
    Shape,
    has,
    has_feed_forward,
    is_conv,
    is_depthwise,
    is_embedding,
    is_head,
    is_in_block,
    is_norm_of,
    is_table,
    name_of,
    own_index,
    words_of,
)

Axes = tuple[int, ...]
# A "vector" is a norm, a bias, a table of positions and the like, stacked or not.
Kind = Literal["matrix", "vector", "embedding", "head", "adapter", "router", "unknown"]


@dataclasses.dataclass(frozen=True)
class Decision:
    """The default rules' decision on one leaf.

    Attributes:
      kind: what it is; "unknown" where names and shapes do not say.
      spec: the axes of a matrix; None where shapes do not say which.
    """

    kind: Kind
    spec: MuonDimensionNumbers | None = None

    @property
    def undecided(self) -> bool:
        return self.kind == "unknown" or (self.kind == "matrix" and self.spec is None)


def decide_by_name(
    shapes: Mapping[str, Shape], *, sliced: bool = False
) -> dict[str, Decision]:
    """Decides what every leaf of a tree is.

    Args:
      shapes: the leaves' shapes by path.
      sliced: whether the layers' axis is gone, since layers are updated one at a time.
    """
    return _decide(tuple(shapes.items()), sliced)


# An update that is not jitted asks at every step.
@functools.lru_cache(maxsize=64)
def _decide(items: tuple[tuple[str, Shape], ...], sliced: bool) -> dict[str, Decision]:
    below: dict[str, list[str]] = {}
    for path, _ in items:
        parts = path.split("/")
        for depth in range(len(parts)):
            below.setdefault("/".join(parts[:depth]), []).append(path)
    tree = _Tree(dict(items), below, sliced)
    return {path: tree.decision(path) for path, _ in items}


@dataclasses.dataclass(frozen=True, eq=False)
class _Tree:
    """The shapes of a tree by path, and the paths below each prefix of a path."""

    shapes: dict[str, Shape]
    below: dict[str, list[str]]
    sliced: bool
    stacks: dict[tuple[str, Axes], Axes | None] = dataclasses.field(
        default_factory=dict[tuple[str, Axes], Axes | None]
    )

    def decision(self, path: str) -> Decision:
        parts, shape = path.split("/"), self.shapes[path]
        stacked = self.stacked(path)
        axes = [a for a in range(len(shape)) if a not in (stacked or ())]
        sizes = tuple(shape[a] for a in axes)
        if len(sizes) < 2 or math.prod(sizes) == max(sizes):
            return Decision("vector")
        kind = self._kind(path, parts, sizes)
        if kind != "matrix":
            return Decision(kind)
        sides = self._sides(path, parts, sizes, stacked or ())
        if stacked is None or sides is None:
            return Decision("matrix")
        rows, cols = ([axes[i] for i in side] for side in sides)
        return Decision("matrix", _spec(len(shape), rows, cols))

    def _kind(self, path: str, parts: list[str], sizes: Shape) -> Kind:
        own = own_index(parts)
        name, above = parts[own], parts[own - 1 : own]
        if has(ADAPTER, name, *above) and not has({"base"}, name):
            return "adapter"
        if has({"adapter", "adapters"}, *parts):
            return "adapter"
        if is_norm_of(path) or is_depthwise(parts, sizes):
            return "vector"
        if is_conv(parts, sizes):
            return "matrix"
        if self._is_bias(path, name) or has(VECTOR, name):
            return "vector"
        if is_embedding(*parts):
            return "embedding"
        if self._is_router(path, parts, sizes):
            return "router"
        in_block = is_in_block(parts) or has(BLOCK, *parts) or has_feed_forward(parts)
        last = not in_block and (has(LAST, name) or self._is_head(sizes))
        # One of many layers that has a number for its name, as in a Sequential.
        counted = name.isdigit() and not has(BLOCK, *parts) and self._is_head(sizes)
        if is_head(parts) or last or counted:
            return "head"
        named = parts[-1] in GENERIC or has(PROJECTION, name)
        single = re.fullmatch("[A-Z]", name)  # says nothing: A of LoRA, or of Mamba
        return "matrix" if named and in_block and not single else "unknown"

    def _is_bias(self, path: str, name: str) -> bool:
        """`bias`, `b`, `b_up`, and `up_b` beside `up_w`."""
        words = words_of(name)
        stem, _, last = path.rpartition("_")
        beside = last == "b" and (f"{stem}_w" in self.shapes or stem in self.shapes)
        return beside or (name != "B" and words[:1] in (("b",), ("bias",)))

    def _is_router(self, path: str, parts: list[str], sizes: Shape) -> bool:
        """A router by its name, or a gate of experts.

        A sibling of the same shape makes a `gate` the one of a gated linear unit.
        """
        if has(ROUTER, *parts):
            return True
        own, name = own_index(parts), parts[own_index(parts)]
        moe = [i for i, part in enumerate(parts) if has({"moe"}, part)]
        below = parts[moe[-1] :] if moe else []
        gate = words_of(name)[-1:] == ("gate",) or (
            has(GATES, *below)
            and not has({"expert", "experts", "shared", "up"}, *below)
        )
        if not gate or len(sizes) != 2 or has(ATTENTION, *parts):
            return False
        itself = {path, *self.below.get("/".join(parts[: own + 1]), [])}
        return not any(
            other.count("/") == path.count("/")
            and self.shapes[other] in (self.shapes[path], self.shapes[path][::-1])
            for other in self.below["/".join(parts[:own])]
            if other not in itself
        )

    def _is_head(self, sizes: Shape) -> bool:
        """Whether a matrix has the shape of an embedding."""
        return any(sorted(sizes) == sorted(table) for table in self._embeddings)

    @functools.cached_property
    def _embeddings(self) -> list[Shape]:
        return [
            shape
            for path, shape in self.shapes.items()
            if len(shape) == 2 and is_embedding(name_of(path))
        ]

    # --- which axes are layers ---

    def stacked(self, path: str) -> Axes | None:
        """The axes that are layers or experts; None where two of them could be."""
        parts, taken = path.split("/"), ()
        if is_table(path):
            return taken
        for depth in range(len(parts)):
            key = "/".join(parts[:depth]), taken
            if key not in self.stacks:
                self.stacks[key] = self._stack_axis(*key)
            found = self.stacks[key]
            if found is None:
                return None
            taken += found
        return taken

    def _stack_axis(self, prefix: str, taken: Axes) -> Axes | None:
        """The axis that all leaves below a prefix are stacked along, beside `taken`."""
        below = {
            path: [a for a in range(len(self.shapes[path])) if a not in taken]
            for path in self.below[prefix]
            if not is_table(path)
        }
        below = {path: axes for path, axes in below.items() if axes}
        stack = self._is_stack(prefix, below, bool(taken))
        if not stack:
            return () if stack is False else None
        counts: dict[int, int] = {}
        for i in (0, 1):
            sizes = {self.shapes[p][a[i]] for p, a in below.items() if len(a) > i}
            if len(sizes) == 1 and min(map(len, below.values())) > i:
                counts[i] = sizes.pop()
        last = prefix.split("/")[-1]
        if len(counts) == 2 and last != "experts":
            i = self._layers_of_two(*counts.values())
        else:
            i = min(counts, default=None)
        if i is None:
            # By its name a stack, but of leaves that share no axis.
            return None if counts or (has(STACKS, last) and not taken) else ()
        (axis,) = {axes[i] for axes in below.values() if len(axes) > i}
        return (axis,)

    def _is_stack(
        self, prefix: str, below: Mapping[str, list[int]], stacked: bool
    ) -> bool | None:
        """Whether vectors with two axes, or a name and kernels with three, say so.

        None where a stack by its name has vectors with and without the layers' axis.
        """
        vectors = [
            len(axes)
            for path, axes in below.items()
            if is_norm_of(path) or path.split("/")[-1] in ("b", "bias")
        ]
        last = prefix.split("/")[-1]
        one = INDEXED.fullmatch(last) and not has({"scan", "scanned"}, last)
        layers = has(STACKS, last) and not (one or self.sliced or stacked)
        if vectors:
            mixed = layers and min(vectors) == 1 < max(vectors)
            return None if mixed else min(vectors) > 1
        start = len(prefix) + bool(prefix)
        children = {path[start:].split("/")[0] for path in below}
        indexed = any(map(INDEXED.fullmatch, children))
        deepest = max(map(len, below.values()), default=0)
        return (layers or last == "experts") and deepest > 2 and not indexed

    def _layers_of_two(self, first: int, second: int) -> int | None:
        """Decides which of two axes of these sizes is the layers', 0 or 1."""
        widths = {shape[-1] for shape in self._embeddings}
        if (first in widths) != (second in widths):
            return 1 if first in widths else 0
        return 0 if first < second else None

    # --- which axes are rows and columns ---

    def _sides(
        self, path: str, parts: list[str], sizes: Shape, stacked: Axes
    ) -> tuple[Axes, Axes] | None:
        """Indices of `sizes`, rows and columns; other axes are a batch."""
        name = parts[own_index(parts)]
        if len(sizes) == 2:
            return (0,), (1,)
        if is_conv(parts, sizes):
            return tuple(range(len(sizes) - 1)), (len(sizes) - 1,)
        if (sides := self._sides_by_bias(path, sizes, stacked)) is not None:
            return sides
        if len(sizes) == 3 and self._are_experts(parts, sizes):
            return (1,), (2,)
        if has(IN | OUT | {"c"}, name) and (has(ATTENTION, *parts) or has(IN, name)):
            return self._sides_of_heads(parts, sizes)
        if has(GATED, name) and len(sizes) == 3 and 2 in sizes[:2]:
            return ((1,), (2,)) if sizes[0] == 2 else ((0,), (2,))
        return None

    def _are_experts(self, parts: list[str], sizes: Shape) -> bool:
        """By a name, or by a router beside them with as many outputs."""
        if has(ATTENTION, *parts):
            return False
        beside = self.below["/".join(parts[: own_index(parts)])]
        return has(EXPERTS, *parts) or any(
            has(ROUTER, *path.split("/")) and self.shapes[path][-1:] == sizes[:1]
            for path in beside
        )

    def _sides_by_bias(
        self, path: str, sizes: Shape, stacked: Axes
    ) -> tuple[Axes, Axes] | None:
        """The output is what the bias has beyond axes that both begin with."""
        above = path.rpartition("/")[0]
        bias = next(
            (s for b in ("bias", "b") if (s := self.shapes.get(f"{above}/{b}"))), None
        )
        if bias is None:
            return None
        bias = tuple(size for a, size in enumerate(bias) if a not in stacked)
        n = len(sizes)
        found = [
            (tuple(range(k, n - len(bias) + k)), tuple(range(n - len(bias) + k, n)))
            for k in range(len(bias))
            if bias[:k] == sizes[:k] and bias[k:] == sizes[n - len(bias) + k :]
        ]
        found = [(rows, cols) for rows, cols in found if rows and cols]
        return found[0] if len(found) == 1 else None

    def _sides_of_heads(
        self, parts: list[str], sizes: Shape
    ) -> tuple[Axes, Axes] | None:
        """Attention: the model's width is one side, heads and their size the other."""
        name = parts[own_index(parts)]
        widths = {shape[-1] for shape in self._embeddings}
        goes_in = has(IN, name) or not has(OUT, name)
        einsum = has({"einsum"}, name)
        first = 0
        if len(sizes) == 4 and sizes[0] in (2, 3):  # keys and values, or queries too
            first, sizes = 1, sizes[1:]
        if len(sizes) == 4 and sizes[1] in (2, 3) and goes_in:
            return (0,), (1, 2, 3)
        if len(sizes) != 3 or not (einsum or widths or parts[-1] == "kernel"):
            return None
        width = 2
        if goes_in:
            middle = sizes[1] in widths and sizes[0] not in widths
            width = 1 if einsum or middle else 0
        if widths and sizes[width] not in widths:
            return None
        one = (width + first,)
        rest = tuple(i + first for i in range(3) if i != width)
        return (one, rest) if goes_in else (rest, one)


def _spec(ndim: int, rows: list[int], cols: list[int]) -> MuonDimensionNumbers:
    """Counts the axes of a stack from the end, where slices have them too."""
    if ndim > 2:
        rows, cols = ([a - ndim for a in side] for side in (rows, cols))
    one = (side[0] if len(side) == 1 else tuple(side) for side in (rows, cols))
    return MuonDimensionNumbers(*one)
