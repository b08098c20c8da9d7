"""Step: moments that rotate with the basis."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.extend.core import jaxpr_as_fun
from jax.sharding import AbstractMesh

from lowrank_optax.core.aliases import Tree
from lowrank_optax.core.checks import transformation
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.linalg import average_weight, product, row_squares, rows_above
from lowrank_optax.core.moments import Moments, SubspaceState, map_moments
from lowrank_optax.core.resolution import row_resolution
from lowrank_optax.core.stage import Clock, both, branch, clock_of, stage
from lowrank_optax.core.trees import frames_of, map_frames
from lowrank_optax.steps.in_turn import map_due
from lowrank_optax.steps.subspace import in_subspace

Outside = Literal["zero", "alike"]


def rotate_moments(
    inner: optax.GradientTransformation,
    *,
    moments: Literal["both", "first"] = "both",
    outside: Outside = "zero",
) -> optax.GradientTransformationExtraArgs:
    """`in_subspace`, with `inner`'s moments rotated into the new basis at a refresh.

    With C = S_t^T S_{t-1} and Adam's bias-corrected moments M^, V^ of step t - 1:

        M_{t-1} <- C M_{t-1}                                             (eq. 7)
        V_{t-1} <- (1 - beta2^{t-1}) |C^2 (V^ - M^^2) + (C M^)^2|        (eq. 8)

    with squares entry by entry, before the usual update with G~_t (GrassWalk paper,
    section 4). V stays non-negative. Step 0 rotates nothing. The decay rates are read
    from one step of `inner` from zero moments.

    Row i of C has the norm ||C_i|| <= 1, since direction i of S_t lies partly outside
    of S_{t-1}, where no moments were observed. Eqs. 7 and 8 take them to be zero. For
    M, whose sign there is not known, that is the mean. V is positive. With
    `outside="alike"` (ours) it is outside what it is inside: C_i / ||C_i|| takes the
    place of C_i in eq. 8.

    When to choose it: for a basis that moves a little at each refresh. Without it
    `ldadam` ended 0.21 higher on LLaMA-60M. When not: for a random basis, where eq. 8
    keeps only r/m of V. With a jump every 40 steps and recovery it raised the loss by
    0.20; with `outside="alike"` it lowered it by 0.030 +- 0.011, but in `grass_jump`
    with 100 steps it ended 0.07 higher (docs/results/ablations.md).

    Works with `optax.ScaleByAdamState`, `TraceState`, `EmaState` and
    `ScaleByLionState`, also inside `chain`, `masked`, `partition` and
    `inject_hyperparams`; `register_moments` adds others.

    Deviation: eq. 8 is written without hats. With raw moments the factor 1 -
    beta2^{t-1} would enter twice. With bias-corrected moments eq. 8 is the rule of
    LDAdam (Robert et al. 2025).

    Args:
      inner: the transformation, `optax.scale_by_adam()` for example.
      moments: "first" rotates M alone and leaves V as it is (GoLore).
      outside: what V is outside of the old subspace: "zero" or "alike".

    Raises:
      ValueError: at init, for a state whose moments are not registered, or a second
        moment that is no running average of squares from zero (Adamax, Yogi, ADOPT); at
        update, without `project` before it, or for a second moment in bases that are
        not orthonormal.

    Example:
      >>> stages = optax.chain(lro.sara_sample(key=0), lro.project(),
      ...     lro.rotate_moments(optax.scale_by_adam()), lro.project_back())
    """
    if moments not in ("both", "first"):
        raise ValueError(f'moments={moments!r}: choose "both" or "first"')
    if outside not in ("zero", "alike"):
        raise ValueError(f'outside={outside!r}: choose "zero" or "alike"')
    inside = in_subspace(transformation("rotate_moments()", inner))

    def init(params: optax.Params) -> SubspaceState:
        state = cast(SubspaceState, inside.init(params))
        if frames_of(params):
            # Raises for a state whose moments are unknown.
            jax.eval_shape(
                lambda s: map_moments(lambda _, known: known, s), state.inner_state
            )
            if moments == "both":
                check_second_moments(inner, params)
        return state

    def update(
        updates: optax.Updates,
        state: SubspaceState,
        params: optax.Params | None = None,
        *,
        clock: Clock | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        frames, now = updates, clock_of(clock)
        if any(not frame.full_rank for frame in frames_of(frames)):
            rotated = partial(
                _rotated,
                inner,
                frames,
                with_second=moments == "both",
                alike=outside == "alike",
            )
            in_turn = any(frame.due is not None for frame in frames_of(frames))
            later = now.step > 0  # step 0 has no moments to rotate
            if in_turn:
                inner_state = rotated(state.inner_state, in_turn=later)
            else:
                due = both(now.refresh, later)
                inner_state = branch(due, rotated, lambda s: s, state.inner_state)
            state = SubspaceState(inner_state)
        return inside.update(frames, state, params, clock=now, **extra_args)

    return stage(init, update)


def _rotated(
    inner: optax.GradientTransformation,
    frames: optax.Updates,
    state: optax.OptState,
    *,
    with_second: bool,
    alike: bool,
    in_turn: jax.Array | None = None,
) -> optax.OptState:
    """The state of `inner` with its moments rotated.

    With `in_turn` those of the matrices with a new basis alone, where it is True.
    """
    ones = map_frames(
        lambda f: jnp.ones(f.low_shape, f.gradient.dtype), frames, plain=jnp.ones_like
    )
    # From this state instead of a new one, for its hyperparameters.
    _, unit = inner.update(ones, map_moments(_zeroed, state), ones)
    rotation = Rotation(frames, with_second=with_second, alike=alike, in_turn=in_turn)
    return map_moments(rotation.moments, state, unit)


ROUNDING = 1e-3
"""The norm of a row of S_t^T S_{t-1} that is rounding: bases may be bfloat16."""


class Rotation:
    """Rotates the moments of a tree of Frames; other leaves stay."""

    def __init__(
        self,
        frames: optax.Updates,
        *,
        with_second: bool = True,
        alike: bool = False,
        in_turn: jax.Array | None = None,
    ):
        self._frames = frames
        self._with_second = with_second
        self._alike = alike
        self._in_turn = in_turn

    def moments(self, kind: Moments, state: Tree, unit: Tree) -> Tree:
        """The state with its moments rotated.

        Args:
          kind: the fields that are moments.
          state: the state.
          unit: the state after one step from zero moments on a gradient of ones, which
            holds 1 - beta.
        """
        mu = getattr(state, kind.first)
        if kind.second is None:
            return state._replace(**{kind.first: self._map(self._first, mu)})
        nu, count = getattr(state, kind.second), getattr(state, kind.count)
        if not self._with_second:
            return state._replace(**{kind.first: self._map(self._first_seen, mu, nu)})
        counts = count
        # Adam counts once for all leaves, per_matrix() for each.
        if jax.tree.structure(count) != jax.tree.structure(nu):
            counts = jax.tree.map(lambda _: count, nu)
        gains = (getattr(unit, field) for field in (kind.second, kind.first))
        if self._in_turn is not None:
            gains = (jax.tree.map(_of_matrix, gain) for gain in gains)
        weights = (jax.tree.map(_weight, gain, counts) for gain in gains)
        return state._replace(
            **{
                kind.first: self._map(self._first, mu),
                kind.second: self._map(self._second, nu, mu, *weights),
            }
        )

    def _first(self, frame: Frame, m: jax.Array) -> jax.Array:
        """C M (eq. 7), and zero in rows of rounding, which Adam would step along."""
        rotated = product(_rotation_of(frame), m)
        return rows_above(rotated, row_resolution(frame, products=False))

    def _first_seen(self, frame: Frame, m: jax.Array, v: jax.Array) -> jax.Array:
        """C M, but zero in rows without a V: M / (sqrt(V) + eps) had no bound."""
        seen = jnp.any(v != 0, axis=-1, keepdims=True)
        return jnp.where(seen, self._first(frame, m), 0)

    def _second(
        self, frame: Frame, v: jax.Array, m: jax.Array, w_v: jax.Array, w_m: jax.Array
    ) -> jax.Array:
        """w_V |C^2 (V^ - M^^2) + (C M^)^2|, M^ = M / w_M, V^ = V / w_V (eq. 8).

        With `alike` the rows of C have length one; one so short that it is rounding
        stays.
        """
        if not frame.orthonormal:
            raise ValueError(
                f"{frame.path}: second moments rotate between orthonormal bases only "
                '(eq. 8); use rotate_moments(inner, moments="first") or '
                "in_subspace(inner)"
            )
        c, m_hat = _rotation_of(frame), m.astype(v.dtype) / w_m
        if self._alike:
            squares = row_squares(c)
            c = c * jax.lax.rsqrt(jnp.where(squares > ROUNDING**2, squares, 1))
        variance = v / w_v - jnp.square(m_hat)
        mean = product(c, m_hat)
        return w_v * jnp.abs(product(jnp.square(c), variance) + jnp.square(mean))

    def _map(self, f: Callable[..., jax.Array], moment: Tree, *rest: Tree) -> Tree:
        if self._in_turn is not None:
            return map_due(f, self._frames, self._in_turn, moment, *rest)

        def one(frame: Frame, m: Tree, *others: Tree) -> Tree:
            if frame.full_rank or isinstance(m, optax.MaskedNode):
                return m
            return f(frame, m, *others).astype(m.dtype)

        return map_frames(one, self._frames, moment, *rest, plain=lambda _, m, *__: m)


def _rotation_of(frame: Frame) -> jax.Array:
    if frame.rotation is None and frame.basis is not None:
        raise ValueError(
            f"{frame.path}: this basis rule does not set `rotation`; "
            "use in_subspace(inner), which does not rotate moments"
        )
    return frame.need("rotation")


def _of_matrix(gain: jax.Array) -> jax.Array:
    """1 - beta for each matrix, (*batch, 1, 1): all entries of one have the same."""
    return gain[..., :1, :1] if gain.ndim > 1 else gain


def _weight(gain: jax.Array, count: jax.Array) -> jax.Array:
    """1 - beta^t with gain = 1 - beta; one count for each matrix, or one for all."""
    gain = gain.astype(jnp.promote_types(gain.dtype, jnp.float32))
    return average_weight(
        gain, count.reshape(count.shape + (1,) * (gain.ndim - count.ndim))
    )


def _zeroed(kind: Moments, state: Tree) -> Tree:
    fields = [kind.first] if kind.second is None else [kind.first, kind.second]
    return state._replace(
        **{field: optax.tree.zeros_like(getattr(state, field)) for field in fields}
    )


def check_second_moments(
    inner: optax.GradientTransformation, params: optax.Params
) -> None:
    """ValueError unless V is a running average of squares from zero.

    That is V <- beta V + (1 - beta) g^2. With V(v, g) one step from V = v on a gradient
    g, on one row of each leaf: V(0, 2) = 4 V(0, 1), V(0, 1) + V(1, 0) = 1, and V(0, 1)
    is the same at the first step as later. Not checked where decay rates are traced.
    """

    def error(v: jax.Array, g: jax.Array, count: jax.Array) -> jax.Array:
        after = jax.vmap(lambda *case: _second_after(inner, params, *case))
        errors = [jnp.zeros([])]
        for first, one, two, rest in after(v, g, count):
            parts = [first - one, two - 4 * one, one + rest - 1]
            errors += [jnp.max(jnp.abs(x), initial=0.0) for x in parts]
        return jnp.max(jnp.stack(errors))

    cases = (
        np.array([0.0, 0.0, 0.0, 1.0]),
        np.array([1.0, 1.0, 2.0, 0.0]),
        np.array([0, 5, 5, 5]),
    )
    # Compiled ahead, it is one program, inside of a trace and of `disable_jit` too.
    on_no_mesh = jax.sharding.use_abstract_mesh(AbstractMesh((), ()))
    with on_no_mesh, jax.disable_jit(False):
        program = jax.make_jaxpr(error)(*cases)
        if any(isinstance(x, Tracer) for x in program.consts):
            return
        (found,) = jax.jit(jaxpr_as_fun(program)).lower(*cases).compile()(*cases)
    # Rounding is 1e-7; 1 - beta, by which Yogi's is off, is 1e-3.
    if float(found) > 1e-5:
        raise ValueError(
            "rotate_moments: the second moment of this transformation is no running "
            "average of squared gradients, and eq. 8 does not hold for it; take "
            'rotate_moments(inner, moments="first"), or in_subspace(inner), which '
            "leaves all moments as they are"
        )


def _second_after(
    inner: optax.GradientTransformation,
    params: optax.Params,
    v: jax.Array,
    g: jax.Array,
    count: jax.Array,
) -> list[jax.Array]:
    """The second moments after one step on rows of g, from V = v and `count` steps."""

    # Only the count is given besides V, since bias correction and warm-up read it. One
    # row is enough, because a running average treats every entry alike.
    def row(x: Frame | jax.Array) -> jax.Array:
        shape = x.low_shape if isinstance(x, Frame) else x.shape
        return jnp.full((1,) * (len(shape) - 1) + shape[-1:], g)

    def start(kind: Moments, state: Tree) -> Tree:
        if kind.second is None:
            return _zeroed(kind, state)
        started = {kind.second: v, kind.count: count}
        return _zeroed(kind, state)._replace(
            **{
                k: optax.tree.full_like(getattr(state, k), x)
                for k, x in started.items()
            }
        )

    seconds: list[jax.Array] = []

    def see(kind: Moments, state: Tree) -> Tree:
        if kind.second is not None:
            seconds.extend(jax.tree.leaves(getattr(state, kind.second)))
        return state

    rows = jax.tree.map(row, params)
    state = map_moments(start, inner.init(rows))
    map_moments(see, inner.update(rows, state, rows)[1])
    return seconds
