"""Step: moments that turn with the basis."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.basis import clock_of
from lowrank_optax.frame import Clock, Frame, frames_of, is_frame, map_frames
from lowrank_optax.step import PerMatrixState, in_subspace


def rotate_moments(
    inner: optax.GradientTransformation,
    *,
    moments: Literal["both", "first"] = "both",
) -> optax.GradientTransformationExtraArgs:
    """`in_subspace`, with `inner`'s moments turned into the new basis at a refresh.

    With C = S_t^T S_{t-1} and Adam's bias-corrected moments M^, V^ of step t - 1:

        M_{t-1} <- C M_{t-1}                                             (eq. 7)
        V_{t-1} <- (1 - beta2^{t-1}) |C^2 (V^ - M^^2) + (C M^)^2|        (eq. 8)

    squares being entry by entry, before the usual update with G~_t (GrassWalk paper,
    section 4). V stays non-negative. Step 0 never turns anything.

    Eq. 8 is written there without hats. Read literally, with raw moments, the factor
    1 - beta2^{t-1} would enter twice and shrink V; with bias-corrected moments it is
    the rule of LDAdam (Robert et al. 2025), which the paper builds on.

    Handles `optax.ScaleByAdamState`, and the states that hold a first moment alone:
    `TraceState` (momentum), `EmaState`, `ScaleByLionState`; also inside `chain`,
    `masked`, `partition`, `inject_hyperparams`. `register_rotation` adds others. The
    decay rates are read off one step of `inner` from zero, so they need not be
    given twice.

    Args:
      inner: the transformation, `optax.scale_by_adam()` for example.
      moments: "first" turns M alone and leaves V as it is (GoLore).

    Raises:
      ValueError: at init, when `inner` keeps arrays in a state that has no rotation;
        at update, when `project` does not stand before it, or for a second moment in
        bases that are not orthonormal, for which eq. 8 does not hold.

    Example:
      >>> import lowrank_optax as lro
      >>> stages = optax.chain(lro.sara_sample(key=0), lro.project(),
      ...     lro.rotate_moments(optax.scale_by_adam()), lro.project_back())
    """
    if moments not in ("both", "first"):
        raise ValueError(f'moments={moments!r}: choose "both" or "first"')
    stage = in_subspace(inner)

    def rotate(frames: Any, state: Any) -> Any:
        ones = map_frames(
            lambda f: jnp.ones(f.low_shape, f.gradient.dtype),
            frames,
            plain=jnp.ones_like,
        )
        _, unit = inner.update(ones, inner.init(ones), ones)
        return rotate_state(state, unit, Rotation(frames, moments))

    def init(params: Any) -> Any:
        state = stage.init(params)
        if frames_of(params):
            # Finds a state without a rotation now, not at the first refresh.
            def with_turn(f: Frame) -> Frame:
                shape = (*f.batch, f.rank, f.rank)
                return f.replace(turn=jnp.zeros(shape, f.gradient.dtype))

            jax.eval_shape(lambda s: rotate(map_frames(with_turn, params), s), state)
        return state

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        clock: Clock | None = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        frames, now = updates, clock_of(clock)
        if frames_of(frames):
            state = jax.lax.cond(
                now.refresh & (now.step > 0),
                lambda s: rotate(frames, s),
                lambda s: s,
                state,
            )
        return stage.update(frames, state, params, clock=now, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


class Rotation:
    """Turns moment trees by the Frames' `turn`; leaves of full rank stay.

    Attributes:
      looks_only: whether nothing is turned, and the moments are only looked for.
    """

    looks_only = False

    def __init__(self, frames: Any, moments: Literal["both", "first"] = "both"):
        self._frames = frames
        self._moments = moments

    def first(self, moment: Any) -> Any:
        """M <- C M at every (*batch, r, n) leaf (eq. 7)."""
        return self._map(lambda c, m: _matmul(c, m), moment)

    def second(self, nu: Any, mu: Any, nu_weight: Any, mu_weight: Any) -> Any:
        """V <- w_V |C^2 (V^ - M^^2) + (C M^)^2|, M^ = M / w_M, V^ = V / w_V (eq. 8).

        Args:
          nu: V, raw.
          mu: M, raw, of the same step.
          nu_weight: w_V = 1 - beta2^{t-1}, the sum of the average's weights, in a tree
            like `nu`.
          mu_weight: w_M = 1 - beta1^{t-1}, likewise.
        """
        if self._moments == "first":
            return nu
        for frame in frames_of(self._frames):
            if not frame.orthonormal:
                raise ValueError(
                    f"{frame.path}: a second moment turns with orthonormal bases only "
                    '(eq. 8); take rotate_moments(inner, moments="first") or '
                    "in_subspace(inner)"
                )

        def turned(c: Any, v: Any, m: Any, w_v: Any, w_m: Any) -> jax.Array:
            m_hat = m.astype(v.dtype) / w_m
            variance = v / w_v - jnp.square(m_hat)
            mean = _matmul(c, m_hat)
            return w_v * jnp.abs(_matmul(jnp.square(c), variance) + jnp.square(mean))

        return self._map(turned, nu, mu, nu_weight, mu_weight)

    def _map(self, f: Callable[..., jax.Array], moment: Any, *rest: Any) -> Any:
        def one(frame: Frame, m: Any, *others: Any) -> Any:
            if isinstance(m, optax.MaskedNode):
                return m
            if frame.turn is None and frame.basis is not None:
                raise ValueError(
                    f"{frame.path}: this basis rule does not say how its basis turns; "
                    "take in_subspace(inner), which leaves the moments as they are"
                )
            turn = frame.need("turn", "a basis rule such as dominant_svd()")
            return f(turn, m, *others).astype(m.dtype)

        return map_frames(one, self._frames, moment, *rest, plain=lambda _, m, *__: m)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


class _FirstMoments(Rotation):
    """Turns nothing, and keeps what `first` was given."""

    looks_only = True

    def __init__(self) -> None:
        self.found: list[Any] = []

    def first(self, moment: Any) -> Any:
        self.found.append(moment)
        return moment

    def second(self, nu: Any, mu: Any, nu_weight: Any, mu_weight: Any) -> Any:
        return nu


def first_moments(state: Any) -> list[Any]:
    """The trees of first moments in the stages' states, that `Rotation.first` turns.

    A `PerMatrixState`, which has one for each leaf, is returned as it is.
    """
    seen = _FirstMoments()

    def visit(state: Any) -> None:
        if type(state) in _ROTATIONS:
            _ROTATIONS[type(state)](state, state, seen)
        elif isinstance(state, PerMatrixState):
            seen.found.append(state)
        elif isinstance(state, dict):
            visit(tuple(state.values()))
        elif isinstance(state, (tuple, list)):
            for part in state:
                visit(part)

    visit(state)
    return seen.found


def with_momentum(frames: Any, state: Any) -> Any:
    """The Frames with the first moment that the stages' states hold for them."""
    leaves, structure = jax.tree.flatten(frames, is_leaf=is_frame)
    for found in first_moments(state):
        if isinstance(found, PerMatrixState):
            states = structure.flatten_up_to(found.states)
            moments = [next(iter(first_moments(s)), None) for s in states]
        else:
            try:
                moments = structure.flatten_up_to(found)
            except ValueError:  # no moment per leaf, as under optax.flatten
                continue
        for i, (leaf, m) in enumerate(zip(leaves, moments, strict=True)):
            # A basis may have an optimizer of its own, with moments of its shape.
            if (
                is_frame(leaf)
                and leaf.momentum is None
                and getattr(m, "shape", None) == leaf.low_shape
            ):
                leaves[i] = leaf.replace(momentum=m)
    return structure.unflatten(leaves)


Rotate = Callable[[Any, Any, Rotation], Any]

_ROTATIONS: dict[type, Rotate] = {}


def register_rotation(state_type: type) -> Callable[[Rotate], Rotate]:
    """Tells `rotate_moments` how a state's moments turn with the basis.

    Args:
      state_type: the NamedTuple class of the state.

    Returns:
      A decorator for a function (state, unit, rotation) to the turned state, of the
      same structure, shapes and dtypes. `unit` is the same state after one step from
      zero on a gradient of ones, from which decay rates can be read; `rotation` is
      the `Rotation`.

    Example:
      >>> import optax, lowrank_optax as lro
      >>> @lro.register_rotation(optax.TraceState)
      ... def _(state, unit, rotation):
      ...     return state._replace(trace=rotation.first(state.trace))
    """

    def register(rotate: Rotate) -> Rotate:
        _ROTATIONS[state_type] = rotate
        return rotate

    return register


@register_rotation(optax.ScaleByAdamState)
def _adam(state: Any, unit: Any, rotation: Rotation) -> Any:
    def weight(gain: jax.Array) -> jax.Array:
        # 1 - beta^t with gain = 1 - beta, which beta^t in float32 would round away.
        gain = gain.astype(jnp.promote_types(gain.dtype, jnp.float32))
        count = state.count  # one per matrix inside in_subspace(..., per_matrix=True)
        count = count.reshape(count.shape + (1,) * (gain.ndim - count.ndim))
        return -jnp.expm1(count * jnp.log1p(-gain))

    return state._replace(
        mu=rotation.first(state.mu),
        nu=rotation.second(
            state.nu,
            state.mu,
            jax.tree.map(weight, unit.nu),
            jax.tree.map(weight, unit.mu),
        ),
    )


@register_rotation(optax.TraceState)
def _trace(state: Any, unit: Any, rotation: Rotation) -> Any:
    return state._replace(trace=rotation.first(state.trace))


@register_rotation(optax.EmaState)
def _ema(state: Any, unit: Any, rotation: Rotation) -> Any:
    return state._replace(ema=rotation.first(state.ema))


@register_rotation(optax.ScaleByLionState)
def _lion(state: Any, unit: Any, rotation: Rotation) -> Any:
    return state._replace(mu=rotation.first(state.mu))


def rotate_state(state: Any, unit: Any, rotation: Rotation, owner: str = "") -> Any:
    """Rotates the registered states in a nest of tuples, lists and dicts."""
    kind = type(state)
    if kind in _ROTATIONS:
        return _ROTATIONS[kind](state, unit, rotation)
    if isinstance(state, dict):
        return kind(
            (k, rotate_state(v, unit[k], rotation, owner)) for k, v in state.items()
        )
    if isinstance(state, (tuple, list)):
        owner = kind.__name__ if hasattr(state, "_fields") else owner
        parts = [
            rotate_state(s, u, rotation, owner)
            for s, u in zip(state, unit, strict=True)
        ]
        return kind(*parts) if hasattr(state, "_fields") else kind(parts)
    arrays = [x for x in jax.tree.leaves(state) if jnp.ndim(x)]
    if arrays:
        raise ValueError(
            f"rotate_moments does not know how {owner or kind.__name__} turns with the "
            f"basis (it holds an array of shape {arrays[0].shape}); add a rule with "
            "lowrank_optax.register_rotation, or take in_subspace(inner), which "
            "leaves the moments as they are"
        )
    return state
