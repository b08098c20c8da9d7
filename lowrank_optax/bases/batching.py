"""Where: bases of many matrices, chosen in one call, or by each device for some."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_optax.bases.rule import Rule
from lowrank_optax.core import singular
from lowrank_optax.core.aliases import Tree
from lowrank_optax.core.frame import Frame, ProjectedAway, is_frame
from lowrank_optax.core.linalg import select
from lowrank_optax.core.loops import cond_any
from lowrank_optax.core.spread import over_devices, replicated, sharing, spreads
from lowrank_optax.core.stage import Clock

# What a rule looks at, by name, of L matrices of one shape: arrays (L, ...).
Rows = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Request:
    """Asks a rule for bases at one refresh.

    Attributes:
      rule: the rule.
      key: the key of the refresh; None for a rule that draws nothing.
      now: the time.
    """

    rule: Rule
    key: jax.Array | None
    now: Clock

    def of_leaf(self, frame: Frame, stored: Tree, started: jax.Array) -> jax.Array:
        """S_t of one leaf: (*batch, m, r)."""
        s = self._ask(frame, self._rows(frame, stored, started))
        return s.reshape(frame.batch + s.shape[1:])

    def in_batches(
        self, frames: optax.Updates, stored: Sequence[Tree], started: optax.Params
    ) -> optax.Updates:
        """The Frames, with `chosen` set where leaves of one shape share a call.

        Args:
          frames: a tree of Frames and other leaves.
          stored: the stored basis of each leaf, in a list.
          started: as in `BasisState`.
        """
        leaves, structure = jax.tree.flatten(frames)
        starts, keys = structure.flatten_up_to(started), self._keys(leaves)
        joins = [i for i, x in enumerate(leaves) if is_frame(x) and self._joins(x)]
        rows = {
            i: self._rows(leaves[i], stored[i], starts[i], keys.get(i)) for i in joins
        }
        groups: dict[object, list[int]] = {}
        for i in joins:
            groups.setdefault(self._kind(leaves[i]), []).append(i)
        chosen: dict[int, jax.Array] = {}
        for group in groups.values():
            wholly = self._wholly(leaves[group[0]])
            ask, read = (self._ask, rows) if wholly else (self._ask_later, _late(rows))
            ends = np.cumsum([len(rows[i]["started"]) for i in group])[:-1]
            joined = jax.tree.map(
                lambda *xs: jnp.concatenate(xs), *(read[i] for i in group)
            )
            parts = jnp.split(ask(leaves[group[0]], joined), ends)
            chosen |= zip(group, parts, strict=True)
        late = [i for i in joins if not self._wholly(leaves[i])]
        late_rows = [(leaves[i].rank, rows[i], chosen[i]) for i in late]
        chosen |= zip(late, _with_early(self.rule, self.now, late_rows), strict=True)
        for i, s in chosen.items():
            s = s.reshape(leaves[i].batch + s.shape[1:])
            leaves[i] = leaves[i].replace(chosen=s)
        return structure.unflatten(leaves)

    def _keys(self, leaves: Sequence[Tree]) -> dict[int, jax.Array]:
        """`Frame.keys` by the leaf's index, derived in one call for all leaves."""
        frames = {i: frame for i, frame in enumerate(leaves) if is_frame(frame)}
        if self.key is None or not frames:
            return {}
        numbers = jnp.array([frame.number for frame in frames.values()], jnp.uint32)
        own = jax.vmap(jax.random.fold_in, (None, 0))(self.key, numbers)
        return {
            i: f.keys_below(k) for (i, f), k in zip(frames.items(), own, strict=True)
        }

    def _kind(self, frame: Frame) -> object:
        """A key that is equal for Frames that can share a call."""
        own = frame.rank, frame.gradient.dtype
        if not self._wholly(frame):  # n does not matter where gradients are not read
            return frame.gradient.shape[-2], *own
        absent = frame.momentum is None, frame.tracked is None
        return *frame.gradient.shape[-2:], *own, absent

    def _joins(self, frame: Frame) -> bool:
        """Whether a leaf shares a call with other leaves of its shape."""
        if frame.full_rank or frame.chosen is not None or self.rule.by_path:
            return False
        return self._wholly(frame) or not self.rule.reads_gradient

    def _wholly(self, frame: Frame) -> bool:
        """Whether that call is for gradients too, which it copies."""
        # On a mesh one leaf may have fewer matrices than there are devices. In one
        # device's share a call for each leaf would compile a factorisation for each.
        batched = self.rule.reads_gradient and self.rule.is_batched(frame)
        return spreads() or sharing() or batched

    def _rows(
        self,
        frame: Frame,
        stored: Tree,
        started: jax.Array,
        keys: jax.Array | None = None,
    ) -> Rows:
        """Returns a rule's inputs for each matrix of a leaf, with one batch axis."""
        count = math.prod(frame.batch)
        each = {
            "gradient": frame.gradient,
            "momentum": frame.momentum,
            "tracked": frame.tracked,
            "basis": self.rule.storage.unpack(frame, stored),
            "started": started,
        }
        each = {
            name: x.reshape(count, *x.shape[len(frame.batch) :])
            for name, x in each.items()
            if x is not None
        }
        if self.key is None:
            return each
        return each | {"keys": frame.keys(self.key) if keys is None else keys}

    def _ask_later(self, frame: Frame, rows: Rows) -> jax.Array:
        """The choice of a rule that reads keys and bases alone: (L, m, r)."""
        like = frame.gradient
        shape = (len(rows["basis"]), *like.shape[-2:])
        seen = frame.replace(
            gradient=ProjectedAway(frame.path, shape, like.dtype), basis=rows["basis"]
        )
        return self.rule.choose(seen, rows.get("keys"), self.now)

    def _ask(self, frame: Frame, rows: Rows) -> jax.Array:
        """S_t of matrices like those of a Frame: (L, m, r)."""
        now = self.now
        if self.rule.by_path:
            return _answer(self.rule, frame, jax.tree.map(replicated, rows), now)
        # A refresh that the caller asked for is a Python bool, and is not traced.
        static = {"refresh": now.refresh} if isinstance(now.refresh, bool) else {}
        return over_devices(
            lambda rows, arrays: _answer(
                self.rule, frame, rows, now._replace(**arrays, **static)
            ),
            rows,
            {k: x for k, x in now._asdict().items() if k not in static},
        )


def _late(rows: dict[int, Rows]) -> dict[int, Rows]:
    """Keeps the rows that a rule reads which does not read gradients."""
    read = ("basis", "started", "keys")
    return {i: {k: x for k, x in row.items() if k in read} for i, row in rows.items()}


def _answer(rule: Rule, frame: Frame, rows: Rows, now: Clock) -> jax.Array:
    """S_t of the rows' matrices: singular vectors first, then the rule's choice."""
    later = _later(rule, _seen(frame, rows), rows, now)
    (s,) = _with_early(rule, now, [(frame.rank, rows, later)])
    return s


def _seen(frame: Frame, rows: Rows) -> Frame:
    return frame.replace(
        gradient=rows["gradient"],
        momentum=rows.get("momentum"),
        tracked=rows.get("tracked"),
        basis=rows["basis"],
    )


def _early(rule: Rule, rows: Rows, now: Clock) -> jax.Array | None:
    """(L,) bool: whether S_t is of singular vectors; None where that is never so."""
    if isinstance(rule.svd_until, int) and rule.svd_until == 0:
        return None
    return ~rows["started"] | (now.step < rule.svd_until)


def _later(rule: Rule, seen: Frame, rows: Rows, now: Clock) -> jax.Array:
    """The rule's choice, needed unless all matrices are early."""
    early, keys = _early(rule, rows, now), rows.get("keys")
    if early is None:
        return rule.choose(seen, keys, now)
    return cond_any(~early, lambda: rule.choose(seen, keys, now), lambda: rows["basis"])


def _with_early(
    rule: Rule, now: Clock, leaves: Sequence[tuple[int, Rows, jax.Array]]
) -> list[jax.Array]:
    """Singular vectors for the matrices that are early, the rule's choice for others.

    Args:
      rule: the rule.
      now: the time.
      leaves: rank, rows and the rule's choice of each leaf.
    """
    flags = [_early(rule, rows, now) for _, rows, _ in leaves]
    early = [flag for flag in flags if flag is not None]
    if not early:
        return [later for _, _, later in leaves]
    # Layers of one kernel may start at different steps; then both branches run.
    first = cond_any(
        jnp.concatenate(early),
        lambda: [
            singular.leading(rows["gradient"], rank, rule.decomposition)
            for rank, rows, _ in leaves
        ],
        lambda: [rows["basis"] for _, rows, _ in leaves],
    )
    return [
        select(flag, s, later)
        for flag, s, (_, _, later) in zip(early, first, leaves, strict=True)
    ]
