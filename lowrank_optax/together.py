"""Where: the bases of many small matrices, chosen in one call."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import linalg
from lowrank_optax.frame import Clock, Frame, frames_of, map_frames
from lowrank_optax.linalg import replicated
from lowrank_optax.rule import Rule


def flat_batch(frame: Frame, x: jax.Array) -> jax.Array:
    """x (*batch, ...) with one batch axis, whole on every device."""
    # The same bits on every sharding: factorise whole matrices.
    return replicated(x).reshape(math.prod(frame.batch), *x.shape[len(frame.batch) :])


def in_one_call(rule: Rule, frame: Frame) -> bool:
    return rule.together and frame.basis_shape[-2] <= linalg.TOGETHER


def chosen_in_batches(
    rule: Rule, frames: optax.Updates, key: jax.Array | None, now: Clock
) -> optax.Updates:
    """The Frames, those `in_one_call` with what the rule chooses, asked once for all
    that have one shape.
    """
    groups: dict[Any, list[Frame]] = {}
    for frame in frames_of(frames):
        if in_one_call(rule, frame) and not frame.whole and frame.chosen is None:
            m, n = frame.gradient.shape[-2:]
            group = m, n, frame.rank, frame.gradient.dtype
            groups.setdefault(group, []).append(frame)

    def ask(group: list[Frame]) -> list[jax.Array]:
        flat = [flat_batch(frame, frame.gradient) for frame in group]
        keys = None
        if key is not None:
            keys = jnp.concatenate([frame.keys(key) for frame in group])
        all_of_it = group[0].replace(gradient=jnp.concatenate(flat))
        ends = [sum(map(len, flat[: i + 1])) for i in range(len(flat) - 1)]
        return jnp.split(rule.choose(all_of_it, keys, now), ends)

    chosen = {
        frame.path: s.reshape(frame.basis_shape)
        for group in groups.values()
        for frame, s in zip(group, ask(group), strict=True)
    }
    return map_frames(lambda f: f.replace(chosen=chosen.get(f.path, f.chosen)), frames)
