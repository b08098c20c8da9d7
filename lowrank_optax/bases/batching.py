"""Where: bases of many matrices, chosen in one call, or each device some of them."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.bases.rule import Rule
from lowrank_optax.core import linalg
from lowrank_optax.core.frame import Frame, is_frame
from lowrank_optax.core.linalg import select
from lowrank_optax.core.spread import over_devices, replicated, sharing, spreads
from lowrank_optax.core.stage import Clock


def is_batched(rule: Rule, frame: Frame) -> bool:
    """Whether its matrices take less time in one batch than one after the other."""
    return rule.batched and frame.basis_shape[-2] <= linalg.TOGETHER


def joins(rule: Rule, frame: Frame) -> bool:
    """Whether its matrices are asked for together with those of other leaves.

    On a mesh they are, so that there are enough for all devices, and in a device's
    share, so that the program has one factorisation for all of one shape.
    """
    return is_batched(rule, frame) or ((spreads() or sharing()) and not rule.by_path)


def choose_in_batches(
    rule: Rule,
    frames: optax.Updates,
    stored: Sequence[Any],
    started: optax.Params,
    key: jax.Array | None,
    now: Clock,
) -> optax.Updates:
    """The Frames, those that are asked for together (`joins`) with what the rule
    chooses, asked once for all that have one shape.

    Args:
      rule: the rule.
      frames: a tree of Frames and other leaves.
      stored: what is kept of each leaf's basis, in a list.
      started: as in `BasisState`.
      key: of the refresh.
      now: the time.
    """
    leaves, structure = jax.tree.flatten(frames)
    groups: dict[Any, list[int]] = {}
    for i, frame in enumerate(leaves):
        if not is_frame(frame) or frame.full_rank or frame.chosen is not None:
            continue
        if joins(rule, frame):
            m, n = frame.gradient.shape[-2:]
            absent = frame.momentum is None, frame.tracked is None
            group = m, n, frame.rank, frame.gradient.dtype, absent
            groups.setdefault(group, []).append(i)
    begins = structure.flatten_up_to(started)
    for group in groups.values():
        rows = [flat(rule, leaves[i], stored[i], begins[i], key) for i in group]
        joined = jax.tree.map(lambda *xs: jnp.concatenate(xs), *rows)
        ends = [
            sum(len(row["started"]) for row in rows[: i + 1]) for i in range(len(rows))
        ]
        parts = jnp.split(ask(rule, leaves[group[0]], joined, now), ends[:-1])
        for i, s in zip(group, parts, strict=True):
            s = s.reshape(leaves[i].batch + s.shape[1:])
            leaves[i] = leaves[i].replace(chosen=s)
    return structure.unflatten(leaves)


def choose(
    rule: Rule,
    frame: Frame,
    stored: Any,
    started: jax.Array,
    key: jax.Array | None,
    now: Clock,
) -> jax.Array:
    """What the rule chooses for one leaf: (*batch, m, r)."""
    s = ask(rule, frame, flat(rule, frame, stored, started, key), now)
    return s.reshape(frame.batch + s.shape[1:])


def flat(
    rule: Rule, frame: Frame, stored: Any, started: jax.Array, key: jax.Array | None
) -> dict[str, jax.Array]:
    """What a rule looks at, of each matrix of a leaf, with one batch axis."""
    count = math.prod(frame.batch)
    each = {
        "gradient": frame.gradient,
        "momentum": frame.momentum,
        "tracked": frame.tracked,
        "basis": rule.storage.unpack(frame, stored),
        "started": started,
    }
    each = {
        name: x.reshape(count, *x.shape[len(frame.batch) :])
        for name, x in each.items()
        if x is not None
    }
    return each if key is None else each | {"keys": frame.keys(key)}


def ask(rule: Rule, frame: Frame, each: dict[str, jax.Array], now: Clock) -> jax.Array:
    """What the rule chooses for matrices like those of a Frame: (L, m, r)."""

    def some(each: dict[str, jax.Array], now: Clock) -> jax.Array:
        seen = frame.replace(
            gradient=each["gradient"],
            momentum=each.get("momentum"),
            tracked=each.get("tracked"),
            basis=each["basis"],
        )
        return _ask(rule, seen, each["started"], each.get("keys"), now)

    if rule.by_path:
        return some(jax.tree.map(replicated, each), now)
    # A refresh that the caller asked for is a Python bool.
    static = {"refresh": now.refresh} if isinstance(now.refresh, bool) else {}
    return over_devices(
        lambda each, arrays: some(each, now._replace(**arrays, **static)),
        each,
        {k: x for k, x in now._asdict().items() if k not in static},
    )


def _ask(
    rule: Rule, seen: Frame, started: jax.Array, keys: jax.Array | None, now: Clock
) -> jax.Array:
    if isinstance(rule.svd_until, int) and rule.svd_until == 0:
        return rule.choose(seen, keys, now)
    old = seen.need("basis", "a basis rule")
    # Layers of one kernel may begin at different steps; where they do, both are asked.
    early = ~started | (now.step < rule.svd_until)
    first = jax.lax.cond(
        jnp.any(early),
        lambda: linalg.leading(seen.gradient, seen.rank, rule.decomposition),
        lambda: old,
    )
    later = jax.lax.cond(
        jnp.all(early), lambda: old, lambda: rule.choose(seen, keys, now)
    )
    return select(early, first, later)
