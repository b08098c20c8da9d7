"""Before the step: gradients without spikes and of a steady norm (Stable-SPAM)."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.bracket.finite import at_least_f32
from lowrank_optax.bracket.inside import NOTHING_INSIDE, Inside
from lowrank_optax.bracket.leaf import Leaf, decide_leaves, is_leaf
from lowrank_optax.core.aliases import Number, Tree
from lowrank_optax.core.dimensions import DimensionNumbers
from lowrank_optax.core.frame import Frame, is_frame
from lowrank_optax.core.linalg import average_weight
from lowrank_optax.core.paths import boxed, unboxed
from lowrank_optax.core.stage import stage
from lowrank_optax.core.trees import each_apart, frames_of, in_turn, map_frames


class StabilizerState(NamedTuple):
    """State of `stabilize_gradient`: trees of numbers, one for each tensor.

    Attributes:
      count: int32, how many gradients the averages have seen.
      largest: c, without bias correction.
      norm: mu, without bias correction.
      root: sqrt(nu), without bias correction.
    """

    count: Tree
    largest: Tree
    norm: Tree
    root: Tree


def stabilize_gradient(
    *,
    decay: Number = 0.999,
    b1: Number = 0.7,
    b2: Number = 0.9,
    dimension_numbers: DimensionNumbers = "auto",
) -> optax.GradientTransformationExtraArgs:
    """Clips the spikes of each tensor, and gives it a steady norm (Stable-SPAM).

    With g the largest |G_ij|, and running means without hats:

        c <- decay c + (1 - decay) g,      c^ = c / (1 - decay^t)
        G'_ij = G_ij c^ / g  where |G_ij| > c^,  else G_ij               (AdaClip)
        mu <- b1 mu + (1 - b1) ||G'||,     nu <- b2 nu + (1 - b2) ||G'||^2
        G'' = (mu^ / sqrt(nu^)) G' / ||G'||                              (AdaGN)

    (Huang et al. 2025, "Stable-SPAM", arXiv 2502.17055.) ||G''|| is about one, and
    at most 1.4 with these decays. So the learning rate of a step without normalization,
    such as SGD, means something else after it; Adam's does not. State of a tensor: four
    numbers.

    A tensor is a matrix of a leaf, each layer of a stack for itself, and any other leaf
    as a whole. The transformation stands in front of any optimizer, `optax.chain(
    stabilize_gradient(), lro.galore(...))`, or is the first stage in `low_rank` or
    `full_matrices`, which name the matrices themselves.

    Deviations: the source adds an eps to sqrt(nu^). A gradient that is zero or not
    finite changes no average, and passes as it is.

    Args:
      decay: theta, the decay rate of the threshold.
      b1: gamma_1, the decay rate of the norm.
      b2: gamma_2, the decay rate of its square.
      dimension_numbers: which leaves are matrices, as in `low_rank`; not read in it.

    Raises:
      ValueError: as `low_rank` does for dimension numbers.

    Example:
      >>> tx = lro.full_rank.stabilize_gradient()
      >>> state = tx.init({"bias": jnp.ones(8)})
      >>> for spike in (1.0, 1000.0):
      ...     g = {"bias": jnp.ones(8).at[0].set(spike)}
      ...     updates, state = tx.update(g, state)
      ...     print(updates["bias"][:2].round(3))
      [0.354 0.354]
      [0.814 0.002]
    """

    def tensors(
        tree: optax.Updates, *, sliced: bool = False
    ) -> list[tuple[Frame | jax.Array, tuple[int, ...]]]:
        """The leaves, and the axes of the tensors in each; the others are layers."""
        arrays = map_frames(lambda f: f.gradient, tree)
        # Frames are matrices already, and all other leaves there have full rank.
        numbers = [("", None)] if frames_of(tree) else dimension_numbers
        found = decide_leaves(arrays, numbers, 1.0, "input", sliced=sliced)
        decided: list[Leaf] = jax.tree.leaves(found, is_leaf=is_leaf)
        leaves = jax.tree.leaves(tree)
        return [(x, _axes(x, leaf)) for x, leaf in zip(leaves, decided, strict=True)]

    def init(params: optax.Params) -> StabilizerState:
        params = unboxed(params)

        def zeros(x: Frame | jax.Array, axes: tuple[int, ...]) -> StabilizerState:
            g = at_least_f32(x.gradient if is_frame(x) else jnp.asarray(x))
            number = jnp.zeros_like(jnp.max(g, axes, initial=0))
            count = number.astype(jnp.int32)
            return StabilizerState(count, number, jnp.copy(number), jnp.copy(number))

        states = [zeros(x, axes) for x, axes in tensors(params)]
        return in_turn(jax.tree.structure(params), _ONE, states)

    def update(
        updates: optax.Updates,
        state: StabilizerState,
        params: optax.Params | None = None,
        *,
        inside: Inside = NOTHING_INSIDE,
        **_: object,
    ) -> tuple[optax.Updates, StabilizerState]:
        del params
        if inside.low:
            raise ValueError(
                "stabilize_gradient() needs the full gradient G, but gradients are "
                "summed in the subspace, where only S^T G exists; sum full gradients"
            )
        boxes, updates = updates, unboxed(updates)
        leaves = tensors(updates, sliced=inside.layer is not None)
        structure = jax.tree.structure(updates)
        states = each_apart(structure, _ONE, state)
        rows = [
            _stabilized(x, axes, own, (decay, b1, b2))
            for (x, axes), own in zip(leaves, states, strict=True)
        ]
        new = structure.unflatten([x for x, _ in rows])
        state = in_turn(structure, _ONE, [own for _, own in rows])
        return boxed(new, boxes), state

    return stage(init, update)


_ONE = jax.tree.structure(StabilizerState(0, 0, 0, 0))


def _axes(x: Frame | jax.Array, leaf: Leaf) -> tuple[int, ...]:
    """The axes of a leaf over which one tensor extends."""
    if is_frame(x):
        return (-2, -1)
    if leaf.layout is None:
        return tuple(range(len(leaf.shape)))
    return leaf.layout.axes[len(leaf.layout.batch) :]


def _stabilized(
    x: Frame | jax.Array,
    axes: tuple[int, ...],
    state: StabilizerState,
    decays: tuple[Number, Number, Number],
) -> tuple[Frame | jax.Array, StabilizerState]:
    if is_frame(x):
        g, state = _stabilized(x.gradient, axes, state, decays)
        return x.replace(gradient=g), state
    g = at_least_f32(jnp.asarray(x))
    gain, gain1, gain2 = (1 - jnp.asarray(b, g.dtype) for b in decays)
    over = partial(jnp.expand_dims, axis=axes)

    # Of a largest entry of 1, because squares of small entries underflow.
    size = jnp.max(jnp.abs(g), axes, initial=0)
    # By entries: on a CPU, XLA's maximum may leave out a NaN.
    seen = (size > 0) & jnp.all(jnp.isfinite(g), axes)
    unit = g / over(jnp.where(seen, size, 1))
    count = state.count + 1
    largest = (1 - gain) * state.largest + gain * size
    bound = over(largest / average_weight(gain, count) / jnp.where(seen, size, 1))
    unit = jnp.where(jnp.abs(unit) > bound, bound * unit, unit)

    length = jnp.sqrt(jnp.sum(jnp.square(unit), axes))
    norm = (1 - gain1) * state.norm + gain1 * size * length
    # The root of nu, whose terms may underflow.
    root = jnp.hypot(jnp.sqrt(1 - gain2) * state.root, jnp.sqrt(gain2) * size * length)
    mean = norm / average_weight(gain1, count)
    rms = root / jnp.sqrt(average_weight(gain2, count))
    steady = over(jnp.where(seen, mean / jnp.where(seen, rms * length, 1), 1)) * unit
    new = StabilizerState(count, largest, norm, root)
    new = jax.tree.map(lambda a, b: jnp.where(seen, a, b), new, state)
    return jnp.where(over(seen), steady, g).astype(jnp.result_type(x)), new
