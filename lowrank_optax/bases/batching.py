"""Where: bases of many matrices, chosen in one call, or by each device for some."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.bases.rule import Rule
from lowrank_optax.core import linalg
from lowrank_optax.core.aliases import Tree
from lowrank_optax.core.frame import Frame, is_frame
from lowrank_optax.core.linalg import select
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
        starts = structure.flatten_up_to(started)
        groups: dict[object, list[int]] = {}
        for i, frame in enumerate(leaves):
            if is_frame(frame) and self._joins(frame):
                groups.setdefault(_kind(frame), []).append(i)
        for group in groups.values():
            rows = [self._rows(leaves[i], stored[i], starts[i]) for i in group]
            joined = jax.tree.map(lambda *xs: jnp.concatenate(xs), *rows)
            counts = [len(row["started"]) for row in rows]
            ends = [sum(counts[: i + 1]) for i in range(len(counts))]
            parts = jnp.split(self._ask(leaves[group[0]], joined), ends[:-1])
            for i, s in zip(group, parts, strict=True):
                s = s.reshape(leaves[i].batch + s.shape[1:])
                leaves[i] = leaves[i].replace(chosen=s)
        return structure.unflatten(leaves)

    def _joins(self, frame: Frame) -> bool:
        """Whether a leaf shares the call with other leaves of its shape."""
        if frame.full_rank or frame.chosen is not None:
            return False
        # On a mesh one leaf may have fewer matrices than there are devices. In one
        # device's share a call for each leaf would compile a factorisation for each.
        spread = (spreads() or sharing()) and not self.rule.by_path
        return spread or self.rule.is_batched(frame)

    def _rows(self, frame: Frame, stored: Tree, started: jax.Array) -> Rows:
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
        return each if self.key is None else each | {"keys": frame.keys(self.key)}

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


def _kind(frame: Frame) -> object:
    """Returns a key that is equal for Frames that can share a call."""
    absent = frame.momentum is None, frame.tracked is None
    return *frame.gradient.shape[-2:], frame.rank, frame.gradient.dtype, absent


def _answer(rule: Rule, frame: Frame, rows: Rows, now: Clock) -> jax.Array:
    """S_t of the rows' matrices: singular vectors first, then the rule's choice."""
    seen = frame.replace(
        gradient=rows["gradient"],
        momentum=rows.get("momentum"),
        tracked=rows.get("tracked"),
        basis=rows["basis"],
    )
    keys, old = rows.get("keys"), rows["basis"]
    if isinstance(rule.svd_until, int) and rule.svd_until == 0:
        return rule.choose(seen, keys, now)
    # Layers of one kernel may start at different steps; then both branches run.
    early = ~rows["started"] | (now.step < rule.svd_until)
    first = jax.lax.cond(
        jnp.any(early),
        lambda: linalg.leading(seen.gradient, seen.rank, rule.decomposition),
        lambda: old,
    )
    later = jax.lax.cond(
        jnp.all(early), lambda: old, lambda: rule.choose(seen, keys, now)
    )
    return select(early, first, later)
