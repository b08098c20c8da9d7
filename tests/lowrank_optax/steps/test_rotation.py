"""Moments follow the basis: eqs. 7 and 8, in every nest, and for no unknown state."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lowrank_optax as lro
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.moments import Moments
from lowrank_optax.steps.rotation import Rotation

M, N, R = 8, 12, 3
B1, B2 = 0.9, 0.99


def bases(seed, count=2, m=M, r=R):
    """(count, m, r) random orthonormal bases, float64."""
    x = np.random.default_rng(seed).normal(size=(count, m, r))
    return np.linalg.qr(x)[0]


def bracket(inner, given_bases, *, refresh_every=1, wrap=lro.rotate_moments):
    """`inner` in the given bases of the leaf "w"; the vector "b" is of full rank."""
    stages = optax.chain(
        lro.bases.replay({"w": given_bases}),
        lro.project(),
        wrap(inner),
        lro.project_back(),
    )
    rank = given_bases.shape[-1]
    return lro.low_rank(stages, rank=rank, refresh_every=refresh_every)


def gradients(count, seed=0):
    rng = np.random.default_rng(seed)
    # Columns of different size and mean, so that V and M^2 differ everywhere.
    w = rng.normal(size=(count, M, N)) * np.geomspace(0.1, 10, N) + 0.3
    return [{"w": w[t], "b": rng.normal(size=5)} for t in range(count)]


def float32(tree):
    return jax.tree.map(np.float32, tree)


def run(tx, grads):
    """The state after each step and the last update, in float64."""
    with jax.enable_x64(True):
        state, states, updates = tx.init(grads[0]), [], None
        update = jax.jit(tx.update)
        for g in grads:
            updates, state = update(g, state, g)  # any params: some inners ask
            states.append(jax.device_get(state))
        return states, jax.device_get(updates)


def moment(state, name):
    return np.asarray(optax.tree.get(state, name)["w"], np.float64)


def rotated(c, m, v, t, outside="zero"):
    """Eqs. 7 and 8 on raw Adam moments after t steps, read with bias correction."""
    if t == 0:
        return m, v
    w_m, w_v = 1 - B1**t, 1 - B2**t
    m_hat, v_hat = m / w_m, v / w_v
    k = c / np.linalg.norm(c, axis=1, keepdims=True) if outside == "alike" else c
    return c @ m, w_v * np.abs(k**2 @ (v_hat - m_hat**2) + (k @ m_hat) ** 2)


# --- the equations ---


@pytest.mark.parametrize(
    ("t", "outside"), [(1, "zero"), (2, "zero"), (100, "zero"), (2, "alike")]
)
def test_adam_rotates_by_equations_7_and_8(t, outside):
    """Steps 0 .. t - 1 in one basis, then one step in the next."""
    s = bases(0)
    grads = gradients(t + 1)
    adam = optax.scale_by_adam(B1, B2, eps=1e-8)
    wrap = functools.partial(lro.rotate_moments, outside=outside)
    states, updates = run(bracket(adam, s, wrap=wrap, refresh_every=t), grads)
    m, v = np.zeros((2, R, N))
    for g in grads[:t]:
        low = s[0].T @ g["w"]
        m, v = B1 * m + (1 - B1) * low, B2 * v + (1 - B2) * low**2
    # Float64 throughout on both sides: rounding over up to 100 steps.
    close: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-14}
    np.testing.assert_allclose(moment(states[-2], "mu"), m, **close)
    np.testing.assert_allclose(moment(states[-2], "nu"), v, **close)

    m, v = rotated(s[1].T @ s[0], m, v, t, outside)
    low = s[1].T @ grads[t]["w"]
    m, v = B1 * m + (1 - B1) * low, B2 * v + (1 - B2) * low**2
    np.testing.assert_allclose(moment(states[-1], "mu"), m, **close)
    np.testing.assert_allclose(moment(states[-1], "nu"), v, **close)
    step = (m / (1 - B1 ** (t + 1))) / (np.sqrt(v / (1 - B2 ** (t + 1))) + 1e-8)
    np.testing.assert_allclose(updates["w"], s[1] @ step, rtol=1e-9, atol=1e-12)


def test_default_decay_rates_keep_their_float32_digits():
    """1 - 0.999^t from float32: naively the first step's weight has three digits."""
    s = bases(1).astype(np.float32)
    stages = bracket(optax.scale_by_adam(), s)
    grads = [float32(g) for g in gradients(2)]
    state = stages.init(grads[0])
    for g in grads:
        _, state = stages.update(g, state)
    low = s[0].astype(np.float64).T @ grads[0]["w"].astype(np.float64)
    c = s[1].astype(np.float64).T @ s[0].astype(np.float64)
    v = 0.001 * np.abs(c**2 @ (low**2 - low**2) + (c @ low) ** 2)
    v = 0.999 * v + 0.001 * (s[1].astype(np.float64).T @ grads[1]["w"]) ** 2
    # Cancellation in V^ - M^^2 at t = 1, where both are G~^2 (up to 1e3 here): a few
    # float32 eps of that, times 0.001.
    np.testing.assert_allclose(moment(state, "nu"), v, rtol=1e-4, atol=1e-6)


def test_step_zero_rotates_nothing():
    """The basis before step 0 is a placeholder: its turn must not be used."""
    s = bases(2, 1)
    g = gradients(1)
    inner = optax.trace(0.9)
    tx = bracket(inner, s)
    with jax.enable_x64(True):
        state = tx.init(g[0])
        loaded = optax.tree.set(state, trace={"w": np.ones((R, N)), "b": np.zeros(5)})
        _, after = tx.update(g[0], loaded)
    np.testing.assert_allclose(
        moment(after, "trace"), 0.9 + s[0].T @ g[0]["w"], rtol=1e-12
    )


def test_step_zero_of_adam_is_adam_in_the_subspace():
    s, g = bases(3), gradients(1)
    states, updates = run(bracket(optax.scale_by_adam(B1, B2), s), g)
    plain, expected = run(
        bracket(optax.scale_by_adam(B1, B2), s, wrap=lro.in_subspace), g
    )
    np.testing.assert_array_equal(updates["w"], expected["w"])
    np.testing.assert_array_equal(moment(states[0], "nu"), moment(plain[0], "nu"))


def second_moments_of_noise(outside):
    """The mean of V at each step of a jump every 40, on noise of mean square one."""
    m, n, r, every = 128, 128, 32, 40
    adam = lro.rotate_moments(optax.scale_by_adam(b2=0.999), outside=outside)
    stages = (lro.grassmann_jump(key=0), lro.project(), adam, lro.project_back())
    tx = lro.low_rank(
        optax.chain(*stages),
        rank=r,
        refresh_every=every,
        dimension_numbers=None,
    )

    def step(state, key):
        gradient = {"w": jax.random.normal(key, (m, n))}
        _, state = tx.update(gradient, state, gradient)
        return state, jnp.mean(optax.tree.get(state, "nu")["w"])

    keys = jax.random.split(jax.random.key(1), 12 * every)
    _, seen = jax.lax.scan(step, tx.init({"w": jnp.zeros((m, n))}), keys)
    return seen, every, r / m


def test_of_v_a_random_basis_keeps_what_lay_in_the_old_one():
    """Eq. 8 takes the rest for zero, so a jump leaves r / m of V on noise that is one.

    So V stays far below the gradient's square, and Adam's steps are too long.
    """
    seen, every, kept = second_moments_of_noise("zero")
    wanted, v = [], 0.0
    for t in range(len(seen)):
        v = 0.999 * (v * kept if t and t % every == 0 else v) + 0.001
        wanted.append(v)
    # The first basis is its gradient's own, in which V begins larger.
    # The squares of C sum to r^2 / m = 8 with a deviation of 0.27, 3.3 %: thrice it.
    np.testing.assert_allclose(seen[3 * every :], wanted[3 * every :], rtol=0.1)
    corrected = seen / (1 - 0.999 ** np.arange(1, len(seen) + 1))
    # As docs/results/ablations.md has it, as closely as above.
    assert corrected[-every] == pytest.approx(0.042, rel=0.1)
    assert corrected[-1] == pytest.approx(0.139, rel=0.1)


def test_with_an_outside_that_is_alike_v_keeps_its_size():
    seen, every, _ = second_moments_of_noise("alike")
    corrected = seen / (1 - 0.999 ** np.arange(1, len(seen) + 1))
    # The first basis is its gradient's own: its V is larger, with a falling weight.
    np.testing.assert_allclose(corrected[6 * every :], 1, rtol=0.03)


# --- invariants ---


@pytest.mark.parametrize("name", ["mu", "nu"])
def test_a_subspace_that_stays_leaves_the_moments(name):
    s = bases(4, 1).repeat(2, 0)
    grads = gradients(6)
    adam = optax.scale_by_adam(B1, B2)
    turned, _ = run(bracket(adam, s, refresh_every=2), grads)
    plain, _ = run(bracket(adam, s, refresh_every=2, wrap=lro.in_subspace), grads)
    # C is the identity up to float64 rounding.
    np.testing.assert_allclose(
        moment(turned[-1], name), moment(plain[-1], name), rtol=1e-12, atol=1e-14
    )


def full_first_moments(given_bases, grads, wrap=lro.rotate_moments):
    tx = bracket(optax.scale_by_adam(B1, B2), given_bases, refresh_every=2, wrap=wrap)
    states, _ = run(tx, grads)
    k = np.minimum(np.arange(len(grads)) // 2, len(given_bases) - 1)
    return [given_bases[i] @ moment(s, "mu") for i, s in zip(k, states, strict=True)]


def test_another_basis_of_the_same_subspace_keeps_the_first_moment():
    s = bases(5, 1)[0]
    signs = np.array([1, -1, -1])
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(R, R)))[0]
    changing = np.stack([s, s * signs, s @ q])
    grads = gradients(6)
    for a, b in zip(
        full_first_moments(changing, grads),
        full_first_moments(s[None], grads),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)  # float64 rounding
    # Without rotation it does not hold, so the test can fail.
    moved = full_first_moments(changing, grads, lro.in_subspace)
    assert np.abs(moved[-1] - full_first_moments(s[None], grads)[-1]).max() > 0.1


def test_signs_of_the_basis_do_not_change_the_update():
    s = bases(6, 3)
    signs = np.array([[1, 1, 1], [-1, 1, -1], [1, -1, -1]])[:, None]
    grads = gradients(6)
    adam = optax.scale_by_adam(B1, B2)
    _, a = run(bracket(adam, s, refresh_every=2), grads)
    _, b = run(bracket(adam, s * signs, refresh_every=2), grads)
    # A sign is exact, but not the order of a matrix product's sums: float64 rounding.
    np.testing.assert_allclose(a["w"], b["w"], rtol=1e-11, atol=1e-13)


def test_the_common_part_of_the_first_moment_is_kept():
    """S_t M_t = S_t S_t^T S_{t-1} M_{t-1} when the next gradient is zero and b1 = 1."""
    s = bases(7)
    grads = gradients(2)
    grads[1] = jax.tree.map(np.zeros_like, grads[1])
    states, _ = run(bracket(optax.trace(1.0), s), grads)
    before = s[0] @ moment(states[0], "trace")
    after = s[1] @ moment(states[1], "trace")
    np.testing.assert_allclose(after, s[1] @ s[1].T @ before, atol=1e-13)
    # A direction in both subspaces survives whole.
    shared = np.linalg.qr(np.random.default_rng(0).normal(size=(M, 5)))[0]
    s = np.stack([shared[:, :3], shared[:, 2:]])
    states, _ = run(bracket(optax.trace(1.0), s), grads)
    before = s[0] @ moment(states[0], "trace")
    after = s[1] @ moment(states[1], "trace")
    np.testing.assert_allclose(shared[:, 2] @ after, shared[:, 2] @ before, rtol=1e-12)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 2**32 - 1),
    t=st.integers(1, 10_000),
    scale=st.floats(1e-12, 1e12),
    orthonormal=st.booleans(),
)
def test_equation_8_is_never_negative(seed, t, scale, orthonormal):
    rng = np.random.default_rng(seed)
    c = rng.normal(size=(R, R)).astype(np.float32)
    if orthonormal:
        c = np.linalg.qr(c)[0]
    # Any M and V, not only such as gradients can give: V < M^2 too.
    nu = (scale * rng.exponential(size=(R, N))).astype(np.float32)
    mu = (np.sqrt(scale) * rng.normal(size=(R, N))).astype(np.float32)
    out = _second(c, nu, mu, jnp.int32(t))
    assert np.isfinite(out).all()
    assert (np.asarray(out) >= 0).all()


@jax.jit
def _second(c, nu, mu, t):
    frame = Frame(gradient=jnp.zeros((M, N)), rank=R, path="w", rotation=c)
    state = optax.ScaleByAdamState(t, {"w": mu}, {"w": nu})
    gain = {"w": jnp.full((R, N), 0.001)}
    unit = optax.ScaleByAdamState(jnp.int32(1), gain, gain)
    turned = Rotation({"w": frame}).moments(Moments("mu", "nu", "count"), state, unit)
    return turned.nu["w"]


# --- states and nests ---


def by_hand(s, grads, decay, gain, c_of=lambda s: s[1].T @ s[0]):
    """A first moment after two steps with a refresh in between."""
    m = gain * (s[0].T @ grads[0]["w"])
    return decay * (c_of(s) @ m) + gain * (s[1].T @ grads[1]["w"])


@pytest.mark.parametrize(
    ("inner", "name", "decay", "gain"),
    [
        (optax.trace(0.9), "trace", 0.9, 1.0),
        (optax.trace(0.9, nesterov=True), "trace", 0.9, 1.0),
        (optax.ema(0.8), "ema", 0.8, 0.2),
        (optax.scale_by_lion(0.9, 0.95), "mu", 0.95, 0.05),
        (optax.lion(1.0, 0.9, 0.95), "mu", 0.95, 0.05),
        (optax.sgd(1.0, momentum=0.7), "trace", 0.7, 1.0),
        (optax.scale_by_adam(0.9, 0.99), "mu", 0.9, 0.1),
    ],
    ids=["trace", "nesterov", "ema", "scale_by_lion", "lion", "sgd", "adam"],
)
def test_first_moments_of_other_states(inner, name, decay, gain):
    s, grads = bases(8), gradients(2)
    states, _ = run(bracket(inner, s), grads)
    expected = by_hand(s, grads, decay, gain)
    np.testing.assert_allclose(moment(states[-1], name), expected, rtol=1e-11)


def is_matrix(tree):
    return jax.tree.map(lambda x: jnp.ndim(x) >= 2, tree)


def label(tree):
    return {"w": "matrix", "b": "vector"}


NESTS = {
    "chain": lambda adam: optax.chain(optax.scale(1.0), (adam)),
    "named_chain": lambda adam: optax.named_chain(("adam", adam)),
    "masked": lambda adam: optax.masked(adam, {"w": True, "b": False}),
    "masked by shape": lambda adam: optax.masked(adam, is_matrix),
    "partition": lambda adam: optax.partition(
        {"matrix": adam, "vector": optax.sgd(1.0)}, label
    ),
    "inject": lambda adam: optax.inject_hyperparams(optax.scale_by_adam)(b1=B1, b2=B2),
    "inject schedule": lambda adam: optax.inject_hyperparams(optax.adam)(
        learning_rate=lambda _: -1.0, b1=B1, b2=B2
    ),
    "deep": lambda adam: optax.chain(
        optax.masked(optax.chain(optax.identity(), adam), {"w": True, "b": False}),
        optax.scale_by_schedule(lambda _: 1.0),
    ),
    "apply_if_finite": lambda adam: optax.apply_if_finite(adam, 3),
    "per_matrix": lro.steps.per_matrix,
}


@functools.cache
def adam_alone():
    return run(bracket(optax.scale_by_adam(B1, B2), bases(9, 3)), gradients(3))


@pytest.mark.parametrize("nest", NESTS.values(), ids=NESTS)
def test_adam_in_a_nest(nest):
    inner = nest(optax.scale_by_adam(B1, B2))
    states, updates = run(bracket(inner, bases(9, 3)), gradients(3))
    plain, expected = adam_alone()
    # inject_hyperparams keeps its numbers in float32: b2 = 0.99 to 1e-8, and
    # 1 - b2 to 1e-6.
    for name in ("mu", "nu"):
        np.testing.assert_allclose(
            moment(states[-1], name), moment(plain[-1], name), rtol=1e-5
        )
    np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-5)


def test_moments_in_bfloat16():
    s, grads = bases(10).astype(np.float32), gradients(3)
    grads = [float32(g) for g in grads]
    update = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        tx = bracket(optax.scale_by_adam(B1, B2, mu_dtype=dtype), s)
        state = tx.init(grads[0])
        for g in grads:
            update[dtype], state = jax.jit(tx.update)(g, state)
        assert optax.tree.get(state, "mu")["w"].dtype == dtype
        assert optax.tree.get(state, "nu")["w"].dtype == jnp.float32
    # mu has 8 bits, rounded in three steps and a rotation; updates are about one.
    np.testing.assert_allclose(
        update[jnp.bfloat16]["w"], update[jnp.float32]["w"], atol=0.05
    )


@pytest.mark.parametrize("wrap", [lambda adam: adam, lro.steps.per_matrix])
def test_stacked_layers_turn_one_by_one(wrap):
    s = np.stack([bases(11), bases(12)], axis=1)
    grads = [
        {"w": np.stack([a["w"], 2 * b["w"]])}
        for a, b in zip(gradients(3), gradients(3, seed=1), strict=True)
    ]
    stages = optax.chain(
        lro.bases.replay({"w": s}),
        lro.project(),
        lro.rotate_moments(wrap(optax.scale_by_adam(B1, B2))),
        lro.project_back(),
    )
    tx = lro.low_rank(stages, rank=R, refresh_every=2, dimension_numbers=lro.STACKED)
    states, updates = run(tx, grads)
    for i in range(2):
        alone = bracket(optax.scale_by_adam(B1, B2), s[:, i], refresh_every=2)
        one, expected = run(alone, [{"w": g["w"][i]} for g in grads])
        # Batched products may sum in another order: float64 rounding.
        np.testing.assert_allclose(updates["w"][i], expected["w"], rtol=1e-10)
        np.testing.assert_allclose(
            moment(states[-1], "nu")[i], moment(one[-1], "nu"), rtol=1e-10
        )


# --- states without a rotation ---


@pytest.mark.parametrize(
    ("inner", "name"),
    [
        (optax.scale_by_factored_rms(), "FactoredState"),
        (optax.scale_by_amsgrad(), "ScaleByAmsgradState"),
        (optax.scale_by_rms(), "ScaleByRmsState"),
        (
            optax.chain(
                optax.identity(),
                optax.masked(optax.scale_by_rms(), {"w": True, "b": True}),
            ),
            "ScaleByRmsState",
        ),
    ],
    ids=["factored", "amsgrad", "rms", "nested"],
)
def test_a_state_without_a_rotation_is_an_error_at_init(inner, name):
    tx = bracket(inner, bases(13).astype(np.float32))
    with pytest.raises(ValueError, match=f"cannot rotate {name}, which has") as caught:
        tx.init(float32(gradients(1)[0]))
    assert "lowrank_optax.steps.register_moments" in str(caught.value)
    assert "in_subspace(inner)" in str(caught.value)
    # The advice is good.
    plain = bracket(inner, bases(13), wrap=lro.in_subspace)
    _, updates = run(plain, gradients(2))
    assert np.isfinite(updates["w"]).all()


def test_such_a_state_is_no_error_where_nothing_turns():
    tx = lro.low_rank(lro.rotate_moments(optax.scale_by_rms()), rank=2, refresh_every=1)
    g = {"b": jnp.ones(5)}
    updates: Any = tx.update(g, tx.init(g))[0]
    expected: Any = optax.scale_by_rms().update(g, optax.scale_by_rms().init(g))[0]
    np.testing.assert_array_equal(updates["b"], expected["b"])


class _Heavy(NamedTuple):
    ball: Any


def test_register_moments():
    alike = []

    def init(params):
        return _Heavy(jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None):
        pairs = jax.tree.map(lambda g, b: (g.shape, b.shape), updates, state.ball)
        alike.extend(a == b for a, b in pairs.values())
        ball = jax.tree.map(lambda g, b: 0.5 * b + g, updates, state.ball)
        return ball, _Heavy(ball)

    heavy = optax.GradientTransformation(init, update)
    s, grads = bases(14), gradients(2)
    first = float32(grads[0])
    with pytest.raises(ValueError, match="_Heavy"):
        bracket(heavy, s).init(first)
    stages = optax.chain(
        lro.bases.power_iterate(), lro.project(), lro.in_subspace(heavy)
    )
    follows = lro.low_rank(
        optax.chain(stages, lro.project_back()), rank=R, refresh_every=1
    )
    with pytest.raises(ValueError, match=r"power_iterate\(\) follows the first moment"):
        jax.eval_shape(follows.update, first, follows.init(first))

    lro.steps.register_moments(_Heavy, first="ball")  # of a state without a count

    states, _ = run(bracket(heavy, s), grads)
    np.testing.assert_allclose(
        moment(states[-1], "ball"), by_hand(s, grads, 0.5, 1.0), rtol=1e-12
    )
    # The gradients of the step from zero moments, by which decay rates are read, are
    # like the state, so that rules by shape see the same leaves.
    assert alike
    assert all(alike)
    # Basis rules find the moment by it too.
    jax.eval_shape(follows.update, first, follows.init(first))


class _Renamed(NamedTuple):
    steps: Any
    speed: Any
    noise: Any


def test_register_moments_by_any_name():
    adam = optax.scale_by_adam(B1, B2)

    def update(updates, state, params=None):
        step, new = adam.update(updates, optax.ScaleByAdamState(*state), params)
        return step, _Renamed(*new)

    renamed = optax.GradientTransformation(lambda p: _Renamed(*adam.init(p)), update)
    lro.steps.register_moments(_Renamed, first="speed", second="noise", count="steps")
    s, grads = bases(16, 3), gradients(3)
    states, updates = run(bracket(renamed, s), grads)
    plain, expected = run(bracket(adam, s), grads)
    # The same program.
    np.testing.assert_array_equal(updates["w"], expected["w"])
    for ours, theirs in (("speed", "mu"), ("noise", "nu")):
        np.testing.assert_array_equal(
            moment(states[-1], ours), moment(plain[-1], theirs)
        )


@pytest.mark.parametrize(
    ("fields", "missing"),
    [
        ({"first": "mass"}, "mass"),
        ({"first": "speed", "second": "nu"}, "count', 'nu"),
        ({"first": "speed", "second": "noise"}, "count"),
    ],
)
def test_moments_that_are_no_fields(fields, missing):
    with pytest.raises(ValueError, match=rf"_Renamed has no fields \['{missing}'\]"):
        lro.steps.register_moments(_Renamed, **fields)


def test_rotate_moments_needs_its_stages():
    s = bases(15).astype(np.float32)
    inner = lro.rotate_moments(optax.trace(0.9))
    g = float32(gradients(1)[0])
    tx = lro.low_rank(
        optax.chain(lro.bases.replay({"w": s}), inner, lro.project_back()),
        rank=R,
        refresh_every=1,
    )
    with pytest.raises(ValueError, match=r"w: .*put project\(\) before"):
        tx.update(g, tx.init(g))
    tx = lro.low_rank(optax.chain(inner, lro.project_back()), rank=R, refresh_every=1)
    with pytest.raises(ValueError, match=r"w: .*put a basis rule"):
        tx.update(g, tx.init(g))
    with pytest.raises(ValueError, match=r"inside low_rank\(\)"):
        inner.update(g, inner.init(g))
