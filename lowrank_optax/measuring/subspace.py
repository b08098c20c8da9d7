"""Measured: how much of the gradient a subspace holds, and how far it moves."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.core import linalg
from lowrank_optax.core.frame import BASIS_RULE, Frame, ProjectedAway, are_coordinates
from lowrank_optax.core.layout import path_of
from lowrank_optax.core.linalg import column_norms_squared, ratio, select
from lowrank_optax.core.sharding import shard_basis, shard_batch
from lowrank_optax.core.stage import Clock, branch, timed_stage
from lowrank_optax.core.trees import frames_of, map_frames, nothing, update_frames

NONE_YET = -1.0
"""In the state, where there is no value: no NaN, which `jax_debug_nans` would find."""


class MeasureState(NamedTuple):
    """State of `measure_subspace`; None for what is not measured.

    Each is a tree like the parameters, with False at leaves without a subspace. Numbers
    are float32 (float64 for float64 leaves), and -1 where there is none yet.

    Attributes:
      energy: (*batch,), of the last step.
      overlap: (*batch,), of the last basis with the one before it.
      anchor_overlap: (*batch,), of the last basis with the anchor.
      spectrum: (*batch, k), at the last refresh.
      started: (*batch,) bool, whether a basis was chosen from a gradient that is not
        zero; what stood there before is no subspace.
      anchor: (*batch, m, r), the basis that later ones are compared with.
    """

    energy: Any = None
    overlap: Any = None
    anchor_overlap: Any = None
    spectrum: Any = None
    started: Any = None
    anchor: Any = None


class Measurement(NamedTuple):
    """What is known of one parameter's subspaces; None for what was not asked for.

    NaN where there is no value yet. The batch axes are the layers of a stacked kernel.

    Attributes:
      energy: (*batch,), ||S^T G||_F / ||G||_F at the last step.
      overlap: (*batch,), of the last two bases, in [0, 1].
      anchor_overlap: (*batch,), of the last basis with the anchor, in [0, 1].
      spectrum: (*batch, k), singular values of the estimation error's derivative at the
        last refresh, descending.
    """

    energy: Any = None
    overlap: Any = None
    anchor_overlap: Any = None
    spectrum: Any = None


def measure_subspace(
    *,
    energy: bool = True,
    overlap: bool = True,
    anchor: int | None = None,
    spectrum: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Measures each matrix' subspace, and changes no step.

    The share of the gradient that lies in it, at every step (GrassWalk paper, section
    3, eq. 3, Figure 1):

        R_t = ||S_t^T G_t||_F / ||G_t||_F       0 for a gradient of zero

    a ratio of norms; of a subspace that knows nothing of G, R^2 is r / m in the mean.
    How much of the last basis is in the next, at each that is chosen (SARA paper,
    section 4.3, Figures 2 and 3a), and how much of one that is kept as an anchor in
    all later ones (Figure 3b):

        overlap(U, V) = sum_i ||U^T V_:,i||^2 / r = ||U^T V||_F^2 / r

    1 for one subspace, 0 for two that are orthogonal, r / m in the mean for random
    ones. And how steep the error of the old basis is at the gradient that the new one
    is chosen from, with A = S_{t-1}^T G_t the best that S_{t-1} can do (GrassWalk
    paper, section 3, Figure 2): the k leading singular values of

        D = 2 (G_t - S_{t-1} A) A^T             minus d ||S A - G||_F^2 / dS

    in squared units of the gradient. Between refreshes what they left is kept. For a
    matrix' first basis there is nothing to compare.

    A stage, anywhere behind the basis rule in the chain inside `low_rank`; so it can
    stand in the `basis` of a named optimizer, `optax.chain(sara_sample(0),
    measure_subspace())`, and `add_stage` puts it at the end of any. `measurements`
    reads the numbers off the state.

    What it costs: nothing between refreshes but for the energy, which reads G once
    more, mn numbers, unless the residual's column norms are there already, and rn of
    S^T G; S^T G itself is the projection's. At a refresh the overlap takes r^2 numbers
    that are there, the anchor 2mr^2 operations and mr numbers of state, the spectrum
    4mnr operations and an r x r eigenproblem.

    Deviation: the square is that of the metric's source (Gur-Ari et al. 2018, "Gradient
    Descent Happens in a Tiny Subspace"); without it the sum depends on which basis of
    the two subspaces is taken. The spectrum is taken from an r x r Gram matrix, and
    values under sqrt(eps) times the largest are rounding.

    Args:
      energy: whether R is measured; needs the gradient itself.
      overlap: whether the overlap is.
      anchor: the refresh whose basis is the anchor, counted from 0 (of a matrix that
        has had no gradient by then, the first one after it); None for no anchor.
      spectrum: k, or all r if that is less; 0 for none. Needs the gradient itself.

    Raises:
      ValueError: nothing to be measured, a negative anchor or spectrum; at update,
        outside `low_rank`, before the basis rule, for a basis that is not orthonormal,
        or where gradients are summed in the subspace and the gradient itself is asked
        for.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> tx = lro.galore(0.01, rank=2, refresh_every=1, dimension_numbers=None,
      ...     basis=optax.chain(lro.bases.coordinates(order="ascending"),
      ...                       lro.measure_subspace()))
      >>> g = {"w": jnp.ones((4, 6))}
      >>> state = tx.init(g)
      >>> for _ in range(2):  # rows 0 and 1, then rows 2 and 3
      ...     updates, state = tx.update(g, state, g)
      >>> found = lro.measurements(state)["w"]
      >>> round(float(found.energy) ** 2, 3), float(found.overlap)
      (0.5, 0.0)
    """
    for name, value in (("anchor", anchor or 0), ("spectrum", spectrum)):
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"{name} must be an int of at least 0, not {value!r}")
    at_refreshes = overlap or anchor is not None or spectrum > 0
    if not (energy or at_refreshes):
        raise ValueError("measure_subspace() has nothing to measure: ask for something")

    asked = {
        "energy": energy,
        "overlap": overlap,
        "anchor_overlap": anchor is not None,
        "spectrum": spectrum > 0,
        "started": at_refreshes,
        "anchor": anchor is not None,
    }

    def init(params: optax.Params) -> MeasureState:
        return _empty(params, [name for name, yes in asked.items() if yes], spectrum)

    def update(
        frames: optax.Updates, state: MeasureState, now: Clock
    ) -> tuple[optax.Updates, MeasureState]:
        for frame in frames_of(frames):
            _check(frame, of_gradient=energy or spectrum > 0)
        shares = _map(_energy, frames, MeasureState(energy=state.energy))
        bases = branch(
            _has_moved(frames, now),
            partial(_map, partial(_compared, now=now, anchor=anchor or 0), frames),
            lambda same: same,
            state._replace(energy=None),
        )
        return frames, bases._replace(energy=shares.energy)

    return timed_stage(init, update)


def _empty(params: optax.Params, fields: list[str], spectrum: int) -> MeasureState:
    """The state before anything was measured."""

    def number(frame: Frame, *shape: int) -> jax.Array:
        none = jnp.full((*frame.batch, *shape), NONE_YET, frame.gradient.dtype)
        return shard_batch(frame, none)

    def values(frame: Frame) -> jax.Array:
        return number(frame, min(spectrum, frame.rank))

    def started(frame: Frame) -> jax.Array:
        return shard_batch(frame, jnp.zeros(frame.batch, bool))

    def anchor(frame: Frame) -> jax.Array:
        return shard_basis(frame, jnp.zeros(frame.basis_shape, frame.gradient.dtype))

    makers = {"spectrum": values, "started": started, "anchor": anchor}

    def tree(make: Callable[..., jax.Array]) -> Any:
        return map_frames(
            lambda frame: nothing() if frame.full_rank else make(frame),
            params,
            plain=nothing,
        )

    return MeasureState(**{name: tree(makers.get(name, number)) for name in fields})


def _map(
    f: Callable[..., MeasureState], frames: optax.Updates, state: MeasureState
) -> MeasureState:
    """The trees of f(frame, what is kept for it), a `MeasureState` of arrays each."""
    kept = {name: tree for name, tree in state._asdict().items() if tree is not None}
    if not kept:
        return state

    def one(frame: Frame, *old: jax.Array) -> tuple[Any, ...]:
        if frame.full_rank:
            return frame, *old
        new = f(frame, MeasureState(**dict(zip(kept, old, strict=True))))
        values = (getattr(new, name) for name in kept)
        return frame, *(x.astype(y.dtype) for x, y in zip(values, old, strict=True))

    _, *trees = update_frames(one, frames, *kept.values())
    return state._replace(**dict(zip(kept, trees, strict=True)))


def _check(frame: Frame, *, of_gradient: bool) -> None:
    """ValueError where something is not defined."""
    if frame.full_rank:
        return
    frame.need("basis", BASIS_RULE)
    reason = ""
    if not frame.orthonormal:
        reason = (
            "the basis is not orthonormal, so that ||S^T G|| is no share of ||G||, and "
            "S^T S' no overlap; leave it out, or take another basis rule"
        )
    elif frame.refreshed is None or frame.rotation is None:
        reason = "this basis rule does not say when and how its basis moves"
    elif of_gradient and isinstance(frame.gradient, ProjectedAway):
        reason = (
            "energy and spectrum are the gradient's, and where gradients are summed in "
            "the subspace S^T G alone is there; take energy=False and spectrum=0, or "
            "sum whole gradients"
        )
    if reason:
        raise ValueError(
            f"{frame.path}: measure_subspace() does not work here: {reason}"
        )


def _has_moved(frames: optax.Updates, now: Clock) -> bool | jax.Array:
    """Whether a basis may have been chosen: one predicate for all matrices."""
    if isinstance(now.refresh, bool):
        return now.refresh
    subspaces = [frame for frame in frames_of(frames) if not frame.full_rank]
    refreshed = [jnp.any(frame.need("refreshed", BASIS_RULE)) for frame in subspaces]
    return jnp.any(jnp.stack([now.refresh, *refreshed]))


def _energy(frame: Frame, _: MeasureState) -> MeasureState:
    """||S^T G||_F / ||G||_F (eq. 3)."""
    low = frame.down(frame.gradient) if frame.low is None else frame.low
    inside = jnp.sum(jnp.square(low), axis=(-2, -1))
    # Fenced, the column sums are the residual's own; else they would be one sum.
    columns = linalg.fence(column_norms_squared(frame.gradient))
    share = ratio(inside, jnp.sum(columns, axis=-1), 0.0)
    return MeasureState(energy=jnp.sqrt(jnp.minimum(share, 1)))  # above: rounding


def _compared(frame: Frame, old: MeasureState, now: Clock, anchor: int) -> MeasureState:
    """What a new basis says beside the one before, and beside the anchor."""
    refreshed = frame.need("refreshed", BASIS_RULE)
    started = old.started | refreshed & frame.nonzero()
    comparable, new = refreshed & old.started, old._replace(started=started)
    if old.overlap is not None:
        overlap = _overlap(frame, frame.need("rotation", BASIS_RULE))
        new = new._replace(overlap=select(comparable, overlap, old.overlap))
    if old.spectrum is not None:
        values = _derivative(frame, old.spectrum.shape[-1])
        new = new._replace(spectrum=select(comparable, values, old.spectrum))
    if old.anchor is not None:
        has = old.anchor_overlap >= 0
        due = now.refresh & started & (now.cycle >= anchor)
        kept = select(due & ~has, _columns(frame), old.anchor)
        exact = frame.replace(precision="highest")
        overlap = jnp.where(due | has, _overlap(frame, exact.down(kept)), NONE_YET)
        new = new._replace(anchor=kept, anchor_overlap=overlap)
    return new


def _overlap(frame: Frame, product: jax.Array) -> jax.Array:
    """||U^T V||_F^2 / r; above 1 it is rounding."""
    squares = jnp.sum(jnp.square(product), axis=(-2, -1))
    return jnp.minimum(squares / frame.rank, 1)


def _columns(frame: Frame) -> jax.Array:
    """S as (*batch, m, r), where it is coordinates too."""
    basis = frame.need("basis", BASIS_RULE)
    return frame.up(frame.no_rotation()) if are_coordinates(basis) else basis


def _derivative(frame: Frame, count: int) -> jax.Array:
    """The leading singular values of D for the basis before: (*batch, count).

    D = 2 (I - S S^T) G A^T, so that no residual is formed. Scaled, or its Gram matrix,
    of fourth order in G, would leave float32.
    """
    g, old = frame.gradient, frame.need("previous", BASIS_RULE)
    before = frame.replace(basis=old, precision="highest")
    a, s = before.down(g), _columns(before)
    d = linalg.matmul(g, linalg.transpose(linalg.unit_largest(a)))
    d = d - linalg.matmul(s, linalg.matmul(linalg.transpose(s), d))
    squares, _ = linalg.eigh(linalg.gram(linalg.unit_largest(d)))
    sigma = jnp.sqrt(jnp.maximum(squares[..., ::-1][..., :count], 0))
    return 2 * (linalg.largest(a) * linalg.largest(d))[..., 0] * sigma


def measurements(state: optax.OptState) -> dict[str, Measurement]:
    """What `measure_subspace` measured last, by the parameter's path.

    Args:
      state: of any optax transformation, with the stage anywhere in it; arrays on the
        device, on the host, or traced.

    Returns:
      A `Measurement` for each matrix that has a subspace; no entry where the stage is
      not in the state.

    Raises:
      ValueError: something of one parameter was measured by two stages.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> tx = lro.add_stage(lro.galore(0.01, rank=2, refresh_every=200,
      ...     dimension_numbers=None), lro.measure_subspace(spectrum=1))
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), tx)
      >>> params = {"w": jnp.eye(4, 8), "b": jnp.ones(4)}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> [*lro.measurements(state)], lro.measurements(state)["w"].spectrum.shape
      (['w'], (1,))
    """

    def is_measured(x: object) -> bool:
        return isinstance(x, MeasureState)

    rows: dict[str, dict[str, Any]] = {}
    for part in filter(is_measured, jax.tree.leaves(state, is_leaf=is_measured)):
        for name in Measurement._fields:
            for keys, x in jax.tree_util.tree_leaves_with_path(getattr(part, name)):
                if x.dtype == jnp.bool_:  # `nothing`
                    continue
                row = rows.setdefault(path_of(keys), {})
                if name in row:
                    raise ValueError(
                        f"{path_of(keys)}: two measure_subspace() stages measured its "
                        f"{name}; keep one, or look at a part of the state"
                    )
                row[name] = jnp.where(x == NONE_YET, jnp.nan, x)
    return {path: Measurement(**row) for path, row in rows.items()}
