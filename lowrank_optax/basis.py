"""Where: what all basis rules share, and the rule that replays given bases."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from lowrank_optax import linalg
from lowrank_optax.frame import (
    Clock,
    Frame,
    are_coordinates,
    each_apart,
    frames_of,
    in_turn,
    is_frame,
    nothing,
    stage,
)
from lowrank_optax.layout import path_of
from lowrank_optax.linalg import Decomposition, replicated, transpose

# The keys are None for a rule without a key.
Choose = Callable[[Frame, Any, Clock], jax.Array]


class BasisState(NamedTuple):
    """State of a basis rule; its trees have one array for each parameter.

    Attributes:
      rng_key: a typed key, split at a refresh and at no other time; None for a rule
        that draws nothing.
      basis: what is kept of S: S itself, (*batch, m, r), or (*batch, r) integers where
        its columns are coordinates; a `QuantizedBasis` of trees for `quantize_basis`,
        and for `gaussian` the one typed key that all bases are drawn from.
      begun: (*batch,) bool, whether a gradient that is not zero was seen.
    """

    rng_key: jax.Array | None
    basis: Any
    begun: Any


class Storage(NamedTuple):
    """How a basis is kept between steps.

    Attributes:
      pack: from a Frame, S_t (*batch, m, r) and the key of the refresh to what is kept,
        arrays with the batch axes in front.
      unpack: from a Frame and what is kept to S_t.
      like: a tree of the structure of what is kept.
      shared: whether one thing is kept for all matrices, and not one for each.
    """

    pack: Callable[[Frame, jax.Array, Any], Any]
    unpack: Callable[[Frame, Any], jax.Array]
    like: Any = 0
    shared: bool = False


AS_IT_IS = Storage(pack=lambda _, s, __: s, unpack=lambda _, s: s)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """A basis rule as data; `basis_rule` says what the fields mean.

    Attributes:
      first: the basis before the first refresh, from a Frame.
      storage: how bases are kept.
      once: whether a basis is for good.
    """

    choose: Choose
    key: jax.Array | int | None = None
    orthonormal: bool = True
    coordinates: bool = False
    svd_until: int | jax.Array = 0
    decomposition: Decomposition | None = None
    from_gradient: bool = True
    storage: Storage = AS_IT_IS
    once: bool = False

    def first(self, frame: Frame) -> jax.Array:
        if self.coordinates:
            return jnp.broadcast_to(jnp.arange(frame.rank), (*frame.batch, frame.rank))
        return eye_basis(frame)


def eye_basis(frame: Frame) -> jax.Array:
    """The first r coordinates, (*batch, m, r)."""
    eye = jnp.eye(*frame.basis_shape[-2:], dtype=frame.gradient.dtype)
    return jnp.broadcast_to(eye, frame.basis_shape)


class BasisRule(optax.GradientTransformationExtraArgs):
    """A stage that chooses bases, and the `Rule` that it follows."""

    rule: Rule


def basis_rule(
    choose: Choose,
    key: jax.Array | int | None = None,
    *,
    orthonormal: bool = True,
    coordinates: bool = False,
    svd_until: int | jax.Array = 0,
    decomposition: Decomposition | None = None,
    from_gradient: bool = True,
) -> BasisRule:
    """A basis rule from a function that chooses S_t at a refresh.

    Sets `basis`, `moved` and `turn` = S_t^T S_{t-1} of each Frame. The basis before the
    first refresh is the first r coordinates.

    A matrix whose gradient has been zero so far (behind a projection that starts at
    zero, say) has no subspace to choose: whatever a refresh takes then is replaced at
    its first gradient that is not zero, be a refresh due there or not. So no rule is
    anchored to directions that mean nothing.

    Args:
      choose: from a Frame of L matrices (gradient G_t (L, m, n), basis S_{t-1}
        (L, m, r), momentum (L, r, n) or None; L = 1 for a single matrix), L keys
        (None without `key`) and the `Clock` to S_t (L, m, r), orthonormal also for a
        zero or a rank-deficient gradient. `linalg.per_matrix` or `jax.vmap` make it
        from a function of one matrix.
      key: a seed or a typed key.
      orthonormal: False for a rule whose bases are not. Stages that need S^T S = I then
        refuse it.
      coordinates: True for a rule that returns (L, r) distinct integers, the
        coordinates that are S's columns; products with S are then a gather and a
        scatter.
      svd_until: before this step, and for a matrix's first gradient that is not zero,
        S = U[:, :r] of G, and only then what `choose` says; 0 leaves all to `choose`.
      decomposition: of those G, "svd", "gram" or None, as in `dominant_svd`.
      from_gradient: False for a rule that does not look at gradients, to which it does
        not matter whether they are zero.

    Raises:
      ValueError: a key that is neither an int nor typed, another decomposition; at
        update, outside `low_rank`.

    Example:
      A rule that keeps the top 1 and samples the rest by singular value:

      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> def top_and_sample(frame, keys, clock):
      ...     u, s = lro.left_singular(frame.gradient)
      ...     rest = 1 + lro.sample_indices(keys, s[:, 1:], frame.rank - 1)
      ...     index = jnp.concatenate([jnp.zeros_like(rest[:, :1]), rest], axis=1)
      ...     return jnp.take_along_axis(u, index[:, None, :], axis=-1)
      >>> tx = lro.galore(0.01, rank=4, refresh_every=200,
      ...     basis=lro.basis_rule(top_and_sample, key=0))
    """
    linalg.check_full(decomposition)
    return follow(
        Rule(
            choose=choose,
            key=None if key is None else check_key(key),
            orthonormal=orthonormal,
            coordinates=coordinates,
            svd_until=svd_until,
            decomposition=decomposition,
            from_gradient=from_gradient,
        )
    )


def rule_of(rule: optax.GradientTransformation, wrapper: str) -> Rule:
    """The `Rule` of a basis rule that `wrapper` goes around."""
    if isinstance(rule, BasisRule):
        return rule.rule
    raise ValueError(
        f"{wrapper} goes around a basis rule, such as dominant_svd() or what "
        "basis_rule() returns; online_pca() moves its basis at every step, and "
        "lazy_refresh() goes outside of the others"
    )


class Chosen(NamedTuple):
    """One leaf's basis.

    Attributes:
      kept: as in `BasisState.basis`, of this leaf.
      begun: as in `BasisState`.
      turn: (*batch, r, r), S_t^T S_{t-1}.
      moved: (*batch,) bool, whether it was chosen at this step.
    """

    kept: Any
    begun: jax.Array
    turn: jax.Array
    moved: jax.Array


def follow(rule: Rule) -> BasisRule:
    """The stage that follows a rule."""

    def init(params: optax.Params) -> BasisState:
        key = None if rule.key is None else canonical_key(rule.key)
        leaves, structure = jax.tree.flatten(params)
        begun = [not_begun(rule, x) for x in leaves]
        first = [(f, rule.first(f)) for f in chosen_of(leaves)[1]]
        kept = [rule.storage.pack(f, s, key) for f, s in first]
        return BasisState(
            key, joined(rule, leaves, structure, kept), structure.unflatten(begun)
        )

    def update(
        updates: optax.Updates,
        state: BasisState,
        params: optax.Params | None = None,
        *,
        clock: Clock | None = None,
        **_: Any,
    ) -> tuple[optax.Updates, BasisState]:
        del params
        now, leaves = clock_of(clock), Leaves(rule, updates, state)
        if not leaves.frames:
            return updates, state
        due = now.refresh & (now.step == 0) if rule.once else now.refresh

        def refresh(key: jax.Array | None) -> tuple[jax.Array | None, list[Chosen]]:
            key, sub = (None, None) if key is None else jax.random.split(key)
            both = zip(leaves.frames, leaves.last, strict=True)
            return key, [choose_anew(rule, f, c, sub, now, due) for f, c in both]

        rng_key, new = jax.lax.cond(
            due | starts(rule, leaves.frames, leaves.last),
            refresh,
            lambda key: (key, leaves.last),
            state.rng_key,
        )
        return leaves.with_bases(rng_key, new)

    made = BasisRule(*stage(init, update))
    made.rule = rule
    return made


class Leaves:
    """The matrices that a rule chooses for, with the basis that each has so far."""

    def __init__(self, rule: Rule, updates: optax.Updates, state: BasisState):
        self._rule = rule
        self._leaves, self.structure = jax.tree.flatten(updates)
        self._begun = self.structure.flatten_up_to(state.begun)
        self.places, self.frames = chosen_of(self._leaves)
        if rule.storage.shared:
            kept = [state.basis] * len(self._leaves)
        else:
            inside = jax.tree.structure(rule.storage.like)
            kept = each_apart(self.structure, inside, state.basis)
        self.last = [
            Chosen(kept[i], self._begun[i], f.still(), jnp.zeros(f.batch, bool))
            for i, f in zip(self.places, self.frames, strict=True)
        ]

    def with_bases(
        self, rng_key: jax.Array | None, new: list[Chosen]
    ) -> tuple[optax.Updates, BasisState]:
        """The tree of Frames with their bases set, and the state for the next step."""
        rule, leaves, begun = self._rule, [*self._leaves], [*self._begun]
        rows = zip(self.places, self.frames, self.last, new, strict=True)
        for i, frame, before, after in rows:
            begun[i] = after.begun
            leaves[i] = frame.replace(
                basis=rule.storage.unpack(frame, after.kept),
                previous=rule.storage.unpack(frame, before.kept),
                turn=after.turn,
                moved=after.moved,
                orthonormal=rule.orthonormal,
            )
        basis = joined(rule, leaves, self.structure, [c.kept for c in new])
        begun = self.structure.unflatten(begun)
        return self.structure.unflatten(leaves), BasisState(rng_key, basis, begun)


def joined(rule: Rule, leaves: list[Any], structure: Any, kept: list[Any]) -> Any:
    """`BasisState.basis` from what is kept of each chosen basis."""
    if rule.storage.shared:
        return kept[0] if kept else nothing()
    inside = jax.tree.structure(rule.storage.like)
    parts = [
        inside.unflatten([nothing() for _ in range(inside.num_leaves)]) for _ in leaves
    ]
    for i, x in zip(chosen_of(leaves)[0], kept, strict=True):
        parts[i] = x
    return in_turn(structure, inside, parts)


def chosen_of(leaves: list[Any]) -> tuple[list[int], list[Frame]]:
    """The Frames that need a basis, all but those of full rank, and their places."""
    places = [i for i, x in enumerate(leaves) if is_frame(x) and not x.whole]
    return places, [leaves[i] for i in places]


def not_begun(rule: Rule, leaf: Any) -> jax.Array:
    if not is_frame(leaf):
        return nothing()
    return jnp.full(leaf.batch, not rule.from_gradient)


def starts(rule: Rule, frames: list[Frame], last: list[Chosen]) -> jax.Array:
    """() bool: whether a matrix has its first gradient that is not zero."""
    if not rule.from_gradient:
        return jnp.array(False)
    begun = jnp.array([jnp.all(c.begun) for c in last])

    def look() -> jax.Array:
        both = zip(frames, last, strict=True)
        return jnp.any(jnp.array([jnp.any(~c.begun & nonzero(f)) for f, c in both]))

    # Gradients are looked at only until all have begun.
    return jax.lax.cond(jnp.all(begun), lambda: jnp.array(False), look)


def nonzero(frame: Frame) -> jax.Array:
    """(*batch,) bool, whether G is not zero."""
    return jnp.any(frame.gradient != 0, axis=(-2, -1))


def choose_anew(
    rule: Rule,
    frame: Frame,
    last: Chosen,
    key: jax.Array | None,
    now: Clock,
    due: jax.Array,
) -> Chosen:
    """The basis of one leaf, for those of its matrices that are due or just begin."""
    pack, unpack, _, shared = rule.storage
    begun = last.begun | nonzero(frame) if rule.from_gradient else last.begun
    moved = due | begun & ~last.begun
    old = unpack(frame, last.kept)
    s = choose_flat(rule, frame, old, last.begun, key, now)
    kept = pack(frame, s, key)
    if not shared:
        # A rule may keep its basis at a refresh; to round it again would move it.
        stays = ~moved | jnp.all(s == old, axis=tuple(range(len(frame.batch), s.ndim)))
        kept = jax.tree.map(lambda x, y: select(stays, x, y), last.kept, kept)
    turn = turn_between(unpack(frame, kept), old, frame.gradient.dtype)
    return Chosen(kept, begun, select(moved, turn, frame.still()), moved)


def select(which: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """x for the matrices for which `which` (*batch,) holds, y for the others."""
    return jnp.where(which.reshape(which.shape + (1,) * (x.ndim - which.ndim)), x, y)


def choose_flat(
    rule: Rule,
    frame: Frame,
    old: jax.Array,
    begun: jax.Array,
    key: jax.Array | None,
    now: Clock,
) -> jax.Array:
    """What the rule chooses, asked with one batch axis: (*batch, m, r)."""
    count, axes = math.prod(frame.batch), len(frame.batch)

    def flat(x: jax.Array) -> jax.Array:
        # The same bits on every sharding: factorise whole matrices.
        return replicated(x).reshape(count, *x.shape[axes:])

    seen = frame.replace(
        gradient=flat(frame.gradient),
        momentum=None if frame.momentum is None else flat(frame.momentum),
        basis=flat(old),
    )
    keys = None if key is None else frame.keys(key)

    def choose() -> jax.Array:
        return rule.choose(seen, keys, now)

    def leading() -> jax.Array:
        return linalg.leading(seen.gradient, frame.rank, rule.decomposition)

    if isinstance(rule.svd_until, int) and rule.svd_until == 0:
        return choose().reshape(old.shape)
    early = ~begun.reshape(count) | (now.step < rule.svd_until)
    first = jax.lax.cond(jnp.any(early), leading, lambda: flat(old))
    later = jax.lax.cond(jnp.all(early), lambda: flat(old), choose)
    return select(early, first, later).reshape(old.shape)


def check_key(key: jax.Array | int) -> jax.Array | int:
    """`key`; ValueError unless it is a seed or a typed key. Creates no array."""
    dtype = getattr(key, "dtype", type(key))
    typed = jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if jnp.ndim(key) or not (typed or jnp.issubdtype(dtype, jnp.integer)):
        raise ValueError(
            f"key must be an int or a typed key from jax.random.key, not {key!r}"
        )
    return key


def canonical_key(key: jax.Array | int) -> jax.Array:
    """A typed key of its own from a seed or a typed key, so that it can be donated."""
    check_key(key)
    typed = isinstance(key, jax.Array) and jnp.issubdtype(
        key.dtype, jax.dtypes.prng_key
    )
    return jax.random.clone(key) if typed else jax.random.key(key)


def clock_of(clock: Clock | None) -> Clock:
    if clock is None:
        raise ValueError("this stage works inside low_rank(), which tells it the time")
    return clock


def turn_between(new: jax.Array, old: jax.Array, dtype: DTypeLike) -> jax.Array:
    """S_t^T S_{t-1}, (*batch, r, r)."""
    if are_coordinates(new):
        return (new[..., :, None] == old[..., None, :]).astype(dtype)
    return jnp.matmul(transpose(new), old, precision="highest")


def sample_indices(keys: jax.Array, scores: jax.Array, count: int) -> jax.Array:
    """`count` of the indices, drawn by score without replacement and sorted.

    The first is drawn with probabilities scores / sum(scores), each next one with those
    of the indices that are left; zero scores come last, the first in order.

    Args:
      keys: (L,) typed keys, one for each matrix, as `basis_rule` hands them out.
      scores: (L, m), not negative; all zeros count as equal.
      count: how many, at most m.

    Returns:
      (L, count) integers.

    Raises:
      ValueError: a count above m.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> keys = jax.random.split(jax.random.key(0), 2)
      >>> scores = jnp.array([[0.0, 1.0, 0.0, 2.0], [5.0, 0.0, 0.0, 1.0]])
      >>> lro.sample_indices(keys, scores, 2).tolist()
      [[1, 3], [0, 3]]
    """
    m = scores.shape[-1]
    if count > m:
        raise ValueError(f"cannot draw {count} of {m} indices without replacement")
    total = jnp.sum(scores, axis=-1, keepdims=True)
    weights = jnp.where(total > 0, scores / jnp.where(total > 0, total, 1), 1 / m)

    def sample(key: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sort(jax.random.choice(key, m, (count,), replace=False, p=w))

    return jax.vmap(sample)(keys, weights)


def replay(bases: optax.Params, *, orthonormal: bool = True) -> BasisRule:
    """Given bases: the k-th refresh takes the k-th.

    To compare two optimizers on one trajectory of subspaces, singular vectors being
    defined up to sign.

    Args:
      bases: a tree like the parameters with (K, *batch, m, r) at each matrix leaf, in
        the orientation of the Frame (m <= n). After K refreshes the last one stays.
        Other leaves are not looked at.
      orthonormal: whether they are.

    Raises:
      ValueError: for a matrix that has no bases, or bases of another shape.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> stages = optax.chain(lro.replay({"w": jnp.eye(4, 2)[None]}), lro.project(),
      ...     lro.in_subspace(optax.identity()), lro.project_back())
      >>> tx = lro.low_rank(stages, rank=2, refresh_every=1)
      >>> g = {"w": jnp.ones((4, 6))}
      >>> tx.update(g, tx.init(g))[0]["w"][:, 0].tolist()
      [1.0, 1.0, 0.0, 0.0]
    """
    by_path = {path_of(k): s for k, s in jax.tree_util.tree_leaves_with_path(bases)}

    def given(path: str, shape: tuple[int, ...]) -> jax.Array:
        if path not in by_path:
            raise ValueError(f"{path}: replay() has no bases for this matrix")
        s = jnp.asarray(by_path[path])
        if s.shape[1:] != shape or not s.shape[0]:
            raise ValueError(
                f"{path}: replay() was given bases of shape {s.shape}; "
                f"needed is (K, {', '.join(map(str, shape))})"
            )
        return s

    def choose(frame: Frame, _: None, clock: Clock) -> jax.Array:
        s = jnp.asarray(by_path[frame.path], frame.gradient.dtype)
        return jnp.take(s, clock.cycle, 0, mode="clip").reshape(frame.basis_shape)

    rule = basis_rule(choose, orthonormal=orthonormal, from_gradient=False)

    def init(params: optax.Params) -> BasisState:
        for frame in frames_of(params):
            if not frame.whole:
                given(frame.path, frame.basis_shape)
        return cast(BasisState, rule.init(params))

    made = BasisRule(*stage(init, rule.update))
    made.rule = rule.rule
    return made
