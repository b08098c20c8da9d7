"""Measures how much of the gradient a subspace captures, and how far it moves."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.core import linalg
from lowrank_optax.core.aliases import Tree
from lowrank_optax.core.checks import check_count
from lowrank_optax.core.frame import Frame, ProjectedAway, are_coordinates
from lowrank_optax.core.linalg import column_norms_squared, ratio, select
from lowrank_optax.core.paths import with_paths
from lowrank_optax.core.sharding import shard_basis, shard_batch
from lowrank_optax.core.stage import Clock, branch, check_no_turns, timed_stage
from lowrank_optax.core.trees import frames_of, map_subspaces, nothing, update_frames

NONE_YET = -1.0
"""Marks a missing value in the state; a NaN would trip `jax_debug_nans`."""


class MeasureState(NamedTuple):
    """State of `measure_subspace`; None for a quantity that is not measured.

    Each field is a tree like the parameters, with False at leaves without a subspace.
    Numbers are float32 (float64 for float64 leaves); -1 stands for no value yet.

    Attributes:
      energy, overlap, anchor_overlap, spectrum: as in `Measurement`.
      started: (*batch,) bool, whether a basis was chosen from a nonzero gradient yet;
        an earlier basis is only a placeholder.
      anchor: (*batch, m, r), the basis that later ones are compared with.
    """

    energy: Tree = None
    overlap: Tree = None
    anchor_overlap: Tree = None
    spectrum: Tree = None
    started: Tree = None
    anchor: Tree = None


class Measurement(NamedTuple):
    """The measurements of one parameter; None for a quantity that is not measured.

    NaN where there is no value yet. The batch axes are the layers of a stacked kernel.

    Attributes:
      energy: (*batch,), ||S^T G||_F / ||G||_F at the last step.
      overlap: (*batch,), overlap of the last two bases, in [0, 1].
      anchor_overlap: (*batch,), overlap of the last basis with the anchor, in [0, 1].
      spectrum: (*batch, k), singular values of the estimation error's derivative at the
        last refresh, descending.
    """

    energy: jax.Array | None = None
    overlap: jax.Array | None = None
    anchor_overlap: jax.Array | None = None
    spectrum: jax.Array | None = None


def measure_subspace(
    *,
    energy: bool = True,
    overlap: bool = True,
    anchor: int | None = None,
    spectrum: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Measures each matrix's subspace; changes no step.

        energy     ||S_t^T G_t||_F / ||G_t||_F, at every step; 0 for a zero gradient
        overlap    ||S_{t-1}^T S_t||_F^2 / r, at a refresh; in [0, 1]
        spectrum   the k leading singular values of 2 (G_t - S_{t-1} A) A^T with
                   A = S_{t-1}^T G_t, at a refresh

    (Energy and spectrum: GrassWalk paper, section 3, eq. 3 and Figure 2. Overlap: SARA
    paper, section 4.3, and Gur-Ari et al. 2018, squared as there.) The stage stands
    behind the basis rule; `add_stage` appends it to a named optimizer. `measurements`
    reads the values. Spectrum values below sqrt(eps) times the largest are rounding,
    because they come from a Gram matrix.

    Args:
      energy: whether to measure the energy; needs the full gradient.
      overlap: whether to measure the overlap.
      anchor: index of the refresh, from 0, whose basis later ones are compared with (or
        the first basis after it from a nonzero gradient); None for no anchor.
      spectrum: k, at most r; 0 for none. Needs the full gradient.

    Raises:
      ValueError: nothing to measure, a negative anchor or spectrum; at init, what is
        measured at refreshes with `stagger=True`; at update, outside `low_rank`, before
        the basis rule, a basis that is not orthonormal, or energy and spectrum of
        gradients summed in the subspace.

    Example:
      >>> tx = lro.galore(0.01, rank=2, refresh_every=1, dimension_numbers=None,
      ...     basis=optax.chain(lro.bases.coordinates(order="ascending"),
      ...                       lro.measure_subspace()))
      >>> g = {"w": jnp.ones((4, 6))}
      >>> updates, state = tx.update(g, tx.init(g), g)
      >>> updates, state = tx.update(g, state, g)  # rows 0 and 1, then rows 2 and 3
      >>> found = lro.measurements(state)["w"]
      >>> round(float(found.energy) ** 2, 3), float(found.overlap)
      (0.5, 0.0)
    """
    check_count("anchor", anchor or 0, least=0)
    check_count("spectrum", spectrum, least=0)
    at_refreshes = overlap or anchor is not None or spectrum > 0
    if not (energy or at_refreshes):
        raise ValueError(
            "measure_subspace() has nothing to measure: set energy, overlap, anchor or "
            "spectrum"
        )

    wanted = {
        "energy": energy,
        "overlap": overlap,
        "anchor_overlap": anchor is not None,
        "spectrum": spectrum > 0,
        "started": at_refreshes,
        "anchor": anchor is not None,
    }

    def init(params: optax.Params) -> MeasureState:
        if at_refreshes:
            check_no_turns(
                params,
                "measure_subspace()",
                "measure the energy alone, with overlap=False and neither anchor nor "
                "spectrum, or leave out stagger",
            )
        return _empty(params, [name for name, yes in wanted.items() if yes], spectrum)

    def update(
        frames: optax.Updates, state: MeasureState, now: Clock
    ) -> tuple[optax.Updates, MeasureState]:
        for frame in frames_of(frames):
            _check(frame, needs_gradient=energy or spectrum > 0)
        measured = _map(_energy, frames, MeasureState(energy=state.energy))
        bases = branch(
            _any_refreshed(frames, now),
            partial(_map, partial(_compare, now=now, anchor=anchor or 0), frames),
            lambda same: same,
            state._replace(energy=None),
        )
        return frames, bases._replace(energy=measured.energy)

    return timed_stage(init, update)


def _empty(params: optax.Params, fields: list[str], spectrum: int) -> MeasureState:
    """Makes the state before the first measurement."""

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

    def tree(make: Callable[..., jax.Array]) -> optax.Params:
        return map_subspaces(make, params, other=nothing)

    return MeasureState(**{name: tree(makers.get(name, number)) for name in fields})


def _map(
    f: Callable[..., MeasureState], frames: optax.Updates, state: MeasureState
) -> MeasureState:
    """Applies f(frame, values) to each Frame, the values its part of the state."""
    fields = {name: tree for name, tree in state._asdict().items() if tree is not None}
    if not fields:
        return state

    def one(frame: Frame, *old: jax.Array) -> tuple[Frame | jax.Array, ...]:
        if frame.full_rank:
            return frame, *old
        new = f(frame, MeasureState(**dict(zip(fields, old, strict=True))))
        values = (getattr(new, name) for name in fields)
        return frame, *(x.astype(y.dtype) for x, y in zip(values, old, strict=True))

    _, *trees = update_frames(one, frames, *fields.values())
    return state._replace(**dict(zip(fields, trees, strict=True)))


def _check(frame: Frame, *, needs_gradient: bool) -> None:
    """Raises ValueError where a measurement is not defined."""
    if frame.full_rank:
        return
    frame.need("basis")
    reason = ""
    if not frame.orthonormal:
        reason = (
            "the basis is not orthonormal, so ||S^T G|| / ||G|| is not the energy and "
            "S^T S' not the overlap; remove this stage, or use another basis rule"
        )
    elif frame.refreshed is None or frame.rotation is None:
        reason = (
            "this basis rule does not set the Frame's `refreshed` and `rotation`; make "
            "the rule with basis_rule()"
        )
    elif needs_gradient and isinstance(frame.gradient, ProjectedAway):
        reason = (
            "energy and spectrum need the full gradient G, but gradients are summed in "
            "the subspace, where only S^T G exists; pass energy=False and spectrum=0, "
            "or sum full gradients"
        )
    if reason:
        raise ValueError(
            f"{frame.path}: measure_subspace() does not work here: {reason}"
        )


def _any_refreshed(frames: optax.Updates, now: Clock) -> bool | jax.Array:
    """Whether any basis may have been chosen at this step."""
    if isinstance(now.refresh, bool):
        return now.refresh
    # One predicate for all matrices: a cond for each would make the host wait for each.
    subspaces = [frame for frame in frames_of(frames) if not frame.full_rank]
    refreshed = [jnp.any(frame.need("refreshed")) for frame in subspaces]
    return jnp.any(jnp.stack([now.refresh, *refreshed]))


def _energy(frame: Frame, _: MeasureState) -> MeasureState:
    """Measures ||S^T G||_F / ||G||_F (eq. 3)."""
    rows = frame.low_squares  # which `project` has summed
    if rows is None:
        low = frame.down(frame.gradient) if frame.low is None else frame.low
        rows = linalg.row_squares(low)
    inside = jnp.sum(rows, axis=(-2, -1))
    # With the fence the compiler shares the column sums with `recover_residual`.
    # Without it, it would merge both sums into one and read G a second time.
    columns = linalg.fence(column_norms_squared(frame.gradient))
    squared = ratio(inside, jnp.sum(columns, axis=-1), 0.0)
    return MeasureState(energy=jnp.sqrt(jnp.minimum(squared, 1)))  # above 1 by rounding


def _compare(frame: Frame, old: MeasureState, now: Clock, anchor: int) -> MeasureState:
    """Compares a new basis with the one before it and with the anchor."""
    refreshed = frame.need("refreshed")
    started = old.started | refreshed & frame.nonzero()
    comparable, new = refreshed & old.started, old._replace(started=started)
    if old.overlap is not None:
        overlap = _overlap(frame, frame.need("rotation"))
        new = new._replace(overlap=select(comparable, overlap, old.overlap))
    if old.spectrum is not None:
        values = _derivative(frame, old.spectrum.shape[-1])
        new = new._replace(spectrum=select(comparable, values, old.spectrum))
    if old.anchor is not None and old.anchor_overlap is not None:
        has = old.anchor_overlap >= 0
        due = now.refresh & started & (now.cycle >= anchor)
        basis = select(due & ~has, _columns(frame), old.anchor)
        exact = frame.replace(precision="highest")
        overlap = jnp.where(due | has, _overlap(frame, exact.down(basis)), NONE_YET)
        new = new._replace(anchor=basis, anchor_overlap=overlap)
    return new


def _overlap(frame: Frame, product: jax.Array) -> jax.Array:
    """||U^T V||_F^2 / r of a product U^T V, at most 1 whatever the rounding."""
    squares = jnp.sum(jnp.square(product), axis=(-2, -1))
    return jnp.minimum(squares / frame.rank, 1)


def _columns(frame: Frame) -> jax.Array:
    """S as a matrix (*batch, m, r), also where the basis is coordinates."""
    basis = frame.need("basis")
    return frame.up(frame.no_rotation()) if are_coordinates(basis) else basis


def _derivative(frame: Frame, count: int) -> jax.Array:
    """The leading singular values of D for the previous basis, (*batch, count).

    D = 2 (I - S S^T) G A^T, which needs no residual of the gradient's size. A and D are
    scaled, because the Gram matrix of D is of fourth order in G and overflows float32.
    """
    g, old = frame.gradient, frame.need("previous")
    before = frame.replace(basis=old, precision="highest")
    a, s = before.down(g), _columns(before)
    d = linalg.matmul(g, linalg.transpose(linalg.unit_largest(a)))
    d = d - linalg.matmul(s, linalg.matmul(linalg.transpose(s), d))
    squares, _ = linalg.eigh(linalg.gram(linalg.unit_largest(d)))
    sigma = jnp.sqrt(jnp.maximum(squares[..., ::-1][..., :count], 0))
    return 2 * (linalg.largest(a) * linalg.largest(d))[..., 0] * sigma


def measurements(state: optax.OptState) -> dict[str, Measurement]:
    """Returns what `measure_subspace` measured last, by the parameter's path.

    Args:
      state: the state of any optax transformation that contains the stage; arrays on
        the device, on the host, or traced.

    Returns:
      A `Measurement` for each matrix with a subspace; empty without the stage.

    Raises:
      ValueError: if two stages measured the same quantity of one parameter.

    Example:
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

    rows: dict[str, dict[str, jax.Array]] = {}
    for part in filter(is_measured, jax.tree.leaves(state, is_leaf=is_measured)):
        for name in Measurement._fields:
            for path, x in with_paths(getattr(part, name)):
                if x.dtype == jnp.bool_:  # `nothing`
                    continue
                row = rows.setdefault(path, {})
                if name in row:
                    raise ValueError(
                        f"{path}: two measure_subspace() stages measured its "
                        f"{name}; remove one, or pass the part of the state with one"
                    )
                row[name] = jnp.where(x == NONE_YET, jnp.nan, x)
    return {path: Measurement(**row) for path, row in rows.items()}
