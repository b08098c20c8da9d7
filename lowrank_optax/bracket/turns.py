"""When: refreshes that are spread over the interval, each matrix in its turn."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_optax.bracket.inside import Inside
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.trees import frames_of, map_subspaces


def with_turns(
    frames: optax.Updates, count: jax.Array, refresh_every: int, inside: Inside
) -> optax.Updates:
    """The Frames with `due` set, where each matrix has its turn in the interval.

    With K matrices that have a subspace, numbered layer by layer, and T steps from one
    refresh of a matrix to the next, matrix k is due at the steps

        t = floor(k T / K)  (mod T)

    so that no step has more than ceil(K / T) of them. The numbers are the same whether
    the layers come stacked or one at a time.

    Args:
      frames: a tree of Frames and other leaves.
      count: () int32, t.
      refresh_every: T.
      inside: which layer of how many the tree is, where it is one.
    """
    subspaces = [frame for frame in frames_of(frames) if not frame.full_rank]
    turns = iter(_turns(subspaces, refresh_every, inside.layers))
    now = count % refresh_every

    def one(frame: Frame) -> Frame:
        turn = jnp.asarray(next(turns))
        if frame.layer is not None and inside.layers is not None:
            turn = turn[frame.layer]
        return frame.replace(due=turn.reshape(frame.batch) == now)

    return map_subspaces(one, frames)


def _turns(
    frames: list[Frame], refresh_every: int, layers: int | None
) -> list[np.ndarray]:
    """For each leaf its matrices' steps in the interval, (layers, matrices) int32."""
    # The first batch axis is that of the layers, where they come stacked.
    shapes = [
        (layers or math.prod(f.batch[:1]), math.prod(f.batch[0 if layers else 1 :]))
        for f in frames
    ]
    if not shapes:
        return []
    layer = np.concatenate([np.repeat(np.arange(n), each) for n, each in shapes])
    turn = np.empty(len(layer), np.int32)
    # Layers side by side have matrices of all kinds, so that steps take alike long.
    order = np.argsort(layer, kind="stable")
    turn[order] = np.arange(len(layer)) * refresh_every // len(layer)
    ends = np.cumsum([n * each for n, each in shapes])[:-1]
    return [
        part.reshape(shape)
        for part, shape in zip(np.split(turn, ends), shapes, strict=True)
    ]
