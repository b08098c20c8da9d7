"""What people fell over: each case was wrong, silent, or an obscure error once."""

import functools
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.linalg import subspace_angles

import lowrank_optax as lro
from lowrank_optax.bases.grassmann import geodesic
from tests.helpers.battery import ALL, options_of

M, N = 8, 64


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Any:
    x = np.random.default_rng(seed).normal(size=shape) * scale
    return jnp.asarray(x, jnp.float32)


def stages(*, basis: Any = None, step: Any = None, back: Any = None) -> Any:
    return optax.chain(
        basis or lro.dominant_svd(),
        lro.project(),
        step or lro.in_subspace(optax.scale_by_adam()),
        back or lro.project_back(),
    )


def run(tx: Any, grads: list[Any], params: Any = None) -> tuple[list[Any], list[Any]]:
    """The updates and the states of each step."""
    state, update, out, states = tx.init(grads[0]), jax.jit(tx.update), [], []
    for g in grads:
        u, state = update(g, state, g if params is None else params)
        out.append(u)
        states.append(state)
    return out, states


# --- a rank of the smaller side or more ---


def length(x: Any) -> float:
    return float(jnp.linalg.norm(x))


# One of each step and each way back.
EACH_WAY = [
    *("galore", "galore_published", "galore_adafactor", "galore_adam8bit", "flora"),
    *("fira", "grass_jump", "ldadam", "apollo", "apollo_mini", "frugal", "q_galore"),
]


@pytest.mark.filterwarnings("ignore:low_rank projects")
@pytest.mark.parametrize("name", EACH_WAY)
def test_the_rate_does_not_jump_where_the_rank_reaches_the_smaller_side(
    name: str,
) -> None:
    """From r = 7 to r = 8 of an 8 x 64 matrix, GaLore's movement grew fourfold."""
    moved = {}
    for rank in (M - 1, M, 5 * M):
        make, options = options_of(
            name, rank=rank, learning_rate=1.0, dimension_numbers=None, weight_decay=0.0
        )
        updates, _ = run(make(**options), [{"w": normal(M, N, seed=s)} for s in (1, 2)])
        moved[rank] = length(updates[-1]["w"])
    assert moved[M] == moved[5 * M]
    # One more of eight directions, and, of Fira and FRUGAL, no more of the residual,
    # which has a scale of its own.
    assert 0.4 < moved[M] / moved[M - 1] < 1.5


@pytest.mark.filterwarnings("ignore:low_rank projects")
def test_at_full_rank_a_matrix_keeps_scale_and_way_back() -> None:
    g = {"w": normal(M, N)}
    adam = optax.scale_by_adam()
    step: Any = adam.update(g, adam.init(g))[0]

    def moved(make: Any, **options: Any) -> Any:
        tx = make(1.0, rank=M, refresh_every=5, dimension_numbers=None, **options)
        return -run(tx, [g])[0][0]["w"]

    for variant in ("paper", "published"):
        eps = {"eps": 1e-30}  # the variants differ by where it stands
        ours = moved(lro.galore, scale=0.25, variant=variant, **eps)
        np.testing.assert_allclose(ours, 0.25 * step["w"], atol=1e-5)
        ours = moved(lro.fira, scale=0.25, variant="paper", **eps)
        np.testing.assert_allclose(ours, 0.25 * step["w"], atol=1e-5)
        ratio = length(step["w"]) / length(g["w"])
        ours = moved(lro.apollo_mini, key=0, scale=128.0, variant=variant, **eps)
        # The variants correct for bias by 1 - b^t, which optax rounds to 1e-5.
        np.testing.assert_allclose(
            ours, math.sqrt(128) * ratio * np.asarray(g["w"]), rtol=2e-5
        )


# --- the walk's rank ---


@pytest.mark.parametrize("k", [1, 2, 5])
def test_so_many_directions_turn(k: int) -> None:
    with jax.enable_x64(True):
        s = jnp.linalg.qr(jnp.asarray(normal(20, 5), jnp.float64))[0]
        x = jnp.asarray(normal(20, 5, seed=1), jnp.float64)
        new = np.asarray(geodesic(s, x, 0.4, k))
    angles = np.sort(subspace_angles(np.asarray(s), new))
    assert abs(angles[-1] - 0.4) < 1e-7
    assert (angles[-k:] > 0.01).all()
    assert (angles[:-k] < 1e-7).all()
    np.testing.assert_allclose(new.T @ new, np.eye(5), atol=1e-14)
    # Eq. 4 of the GrassWalk paper, with the truncated decomposition of a tangent X.
    s = np.asarray(s)
    tangent = np.asarray(x) - s @ (s.T @ np.asarray(x))
    u, sigma, vt = np.linalg.svd(tangent, full_matrices=False)
    u, sigma, v = u[:, :k], sigma[:k] / sigma[0], vt[:k].T
    turned = s @ v @ np.diag(np.cos(0.4 * sigma)) + u @ np.diag(np.sin(0.4 * sigma))
    expected = turned @ v.T + s @ (np.eye(5) - v @ v.T)
    np.testing.assert_allclose(new, expected, atol=1e-13)


def test_a_walk_of_rank_one_stays_near_its_start() -> None:
    """A hundred refreshes of 0.3 rad: all directions forget S_0, one does not."""
    m, r = 128, 32
    grads = [{"w": normal(m, 2 * m)}] * 101
    overlap = {}
    for k in (None, 1):
        rule = lro.grassmann_walk(0, 0.3, walk_rank=k)
        step = lro.in_subspace(optax.identity())
        tx = lro.low_rank(stages(basis=rule, step=step), rank=r, refresh_every=1)
        _, states = run(tx, grads)
        first, last = (optax.tree.get(states[i], "basis")["w"] for i in (0, -1))
        overlap[k] = length(first.T @ last) ** 2 / r
    assert overlap[None] < 1.3 * r / m  # as far as a random subspace
    assert overlap[1] > 2.5 * r / m


def test_a_walk_of_no_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="walk_rank must be at least 1, not 0"):
        lro.grassmann_walk(0, walk_rank=0)
    g = {"w": normal(M, N)}
    tx = lro.low_rank(
        stages(basis=lro.grassmann_walk(0, walk_rank=5)), rank=4, refresh_every=1
    )
    with pytest.raises(ValueError, match="w: walk_rank=5 directions of a basis of 4"):
        tx.update(g, tx.init(g))


# --- second moments that are none ---


@pytest.mark.parametrize(
    "inner",
    [optax.scale_by_adamax(), optax.scale_by_yogi(), optax.contrib.scale_by_adopt()],
    ids=["adamax", "yogi", "adopt"],
)
def test_rotation_refuses_what_is_no_average_of_squares(inner: Any) -> None:
    g = {"w": normal(M, N), "b": normal(3)}

    def bracket(step: Any) -> Any:
        return lro.low_rank(stages(step=step), rank=3, refresh_every=2)

    init = bracket(lro.rotate_moments(inner)).init
    for make in (init, jax.jit(init), functools.partial(jax.eval_shape, init)):
        with pytest.raises(ValueError, match="no running average of squared gradients"):
            make(g)
    # The advice is good.
    for step in (lro.rotate_moments(inner, moments="first"), lro.in_subspace(inner)):
        updates, _ = run(bracket(step), [g] * 4)
        assert np.isfinite(updates[-1]["w"]).all()


@pytest.mark.parametrize(
    "inner",
    [
        optax.scale_by_adam(),
        optax.scale_by_adam(0.0, 0.0),
        optax.scale_by_adam(nesterov=True, mu_dtype=jnp.bfloat16),
        optax.scale_by_radam(),
        lro.steps.per_matrix(optax.scale_by_adam()),
        lro.quantize_moments(optax.scale_by_adam(), min_size=1),
        optax.inject_hyperparams(optax.scale_by_adam)(b2=optax.constant_schedule(0.99)),
    ],
    ids=["adam", "b2 = 0", "nadam", "radam", "per_matrix", "8 bits", "injected"],
)
def test_rotation_takes_what_is_one(inner: Any) -> None:
    tx = lro.low_rank(stages(step=lro.rotate_moments(inner)), rank=3, refresh_every=2)
    updates, _ = run(tx, [{"w": normal(M, N, seed=s)} for s in range(4)])
    assert np.isfinite(updates[-1]["w"]).all()


def test_rotation_takes_decay_rates_that_are_traced() -> None:
    """They are known when the program runs, and not looked at."""

    def updates_at(b2: Any) -> list[Any]:
        step = lro.rotate_moments(optax.scale_by_adam(b2=b2))
        tx = lro.low_rank(stages(step=step), rank=3, refresh_every=1)
        g = {"w": jnp.asarray(normal(M, N))}
        first, state = tx.update(g, tx.init(g))
        return [first, tx.update(g, state)[0]]

    ours, theirs = jax.jit(updates_at)(0.9), updates_at(0.9)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), ours, theirs)


def test_eq_8_goes_by_the_decay_rates_of_now() -> None:
    """A b2 changed by hand in inject_hyperparams' state was not seen."""
    grads = [{"w": normal(M, N, seed=s)} for s in range(5)]
    bases = {"w": jnp.stack([jnp.linalg.qr(normal(M, 3, seed=s))[0] for s in (1, 2)])}

    def bracket(inner: Any) -> Any:
        step = lro.rotate_moments(inner)
        return lro.low_rank(
            stages(basis=lro.bases.replay(bases), step=step), rank=3, refresh_every=4
        )

    # Four steps at b2 = 0.9; the fifth turns V, with 0.99.
    injected = bracket(optax.inject_hyperparams(optax.scale_by_adam)(b2=0.9))
    _, states = run(injected, grads[:4])
    state = optax.tree.set(states[-1], b2=jnp.float32(0.99))
    updates, _ = jax.jit(injected.update)(grads[4], state)
    _, states = run(bracket(optax.scale_by_adam(b2=0.9)), grads[:4])
    expected, _ = jax.jit(bracket(optax.scale_by_adam(b2=0.99)).update)(
        grads[4], states[-1]
    )
    # inject_hyperparams keeps 0.99 in float32: 1 - b2 to 1e-6.
    np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-5, atol=1e-6)


# --- a residual of rounding size ---


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-5])
def test_a_first_gradient_of_low_rank_does_not_hold_the_residual_back(
    dtype: str, noise: float
) -> None:
    """The limiter let it grow from rounding, 1 % a step: 300 steps late."""
    with jax.enable_x64(dtype == "float64"):
        low = normal(M, 3) @ normal(3, N, seed=1)
        first = jnp.asarray(low + noise * normal(M, N, seed=2), dtype)
        grads = [{"w": first}] + [
            {"w": jnp.asarray(normal(M, N, seed=s), dtype)} for s in (3, 4)
        ]
        tx = lro.low_rank(
            stages(back=lro.recover_residual()), rank=3, refresh_every=100
        )
        updates, states = run(tx, grads)
        s = np.float64(optax.tree.get(states[0], "basis")["w"])
        outside = np.float64(updates[1]["w"]) - s @ (s.T @ np.float64(updates[1]["w"]))
    if dtype == "float64" and noise:  # that is no rounding there
        assert np.linalg.norm(outside) < 0.1
    else:
        assert np.linalg.norm(outside) > 1.0


# --- gradients that begin at zero ---

STARTS = {
    "frozen": lambda: lro.bases.frozen(lro.dominant_svd()),
    "walk": lambda: lro.grassmann_walk(0, 0.1),
    "track": lambda: lro.bases.grassmann_track(0.0),
    "svd": lro.dominant_svd,
    "jump": lambda: lro.grassmann_jump(0),
    "lazy": lambda: lro.bases.lazy_refresh(lro.dominant_svd()),
    "lazy walk": lambda: lro.bases.lazy_refresh(lro.grassmann_walk(0, 0.1)),
    "4 bits": lambda: lro.bases.quantize_basis(lro.dominant_svd()),
}


@pytest.mark.parametrize("rule", STARTS)
def test_the_first_basis_is_that_of_the_first_gradient(rule: str) -> None:
    """Layers behind a projection that starts at zero have no gradient at step 0."""
    zero, g = jnp.zeros((2, M, N)), normal(2, M, N)
    late = zero.at[0].set(normal(M, N, seed=1))  # the second layer begins a step later
    grads = [
        {"w": x, "other": normal(M, N, seed=i)}
        for i, x in enumerate([zero, zero, late, g, g, g])
    ]
    tx = lro.low_rank(
        stages(
            basis=STARTS[rule](),
            step=lro.rotate_moments(optax.scale_by_adam(), moments="first"),
        ),
        rank=3,
        refresh_every=100,
        dimension_numbers=lro.STACKED,
    )
    updates, _ = run(tx, grads)

    def outside(x: Any, gradient: Any) -> float:
        """How much of x lies outside the gradient's three leading directions."""
        u = np.linalg.svd(np.asarray(gradient))[0][:, :3]
        return float(np.linalg.norm(x - u @ (u.T @ x)) / np.linalg.norm(x))

    loose = 0.2 if rule == "4 bits" else 1e-4
    for t in (2, 3, 4, 5):
        assert outside(updates[t]["w"][0], grads[2]["w"][0]) < loose
        if t > 2:
            assert outside(updates[t]["w"][1], grads[3]["w"][1]) < loose
        # What began at step 0 is not asked again.
        assert outside(updates[t]["other"], grads[0]["other"]) < loose


def test_a_walk_goes_on_from_the_first_gradient() -> None:
    zero, g = {"w": jnp.zeros((M, N))}, {"w": normal(M, N)}
    tx = lro.low_rank(stages(basis=lro.grassmann_walk(0, 0.1)), rank=3, refresh_every=3)
    _, states = run(tx, [zero] * 4 + [g] * 4)
    bases = [np.asarray(optax.tree.get(s, "basis")["w"]) for s in states]
    u = np.linalg.svd(np.asarray(g["w"]))[0][:, :3]
    assert subspace_angles(bases[4], u).max() < 1e-3
    assert abs(subspace_angles(bases[6], u).max() - 0.1) < 1e-3  # and then it walks


# --- resets where the basis stands still ---


def test_moments_are_reset_only_where_the_basis_moves() -> None:
    grads = [{"w": normal(M, N, seed=s)} for s in range(7)]

    def counts(rule: Any) -> list[int]:
        step = lro.reset_moments(optax.scale_by_adam())
        tx = lro.low_rank(stages(basis=rule, step=step), rank=3, refresh_every=2)
        _, states = run(tx, grads)
        return [int(s.inner_state[2].inner_state.count["w"]) for s in states]

    assert counts(lro.dominant_svd()) == [1, 2, 1, 2, 1, 2, 1]
    assert counts(lro.bases.frozen(lro.dominant_svd())) == [1, 2, 3, 4, 5, 6, 7]
    lazy = lro.bases.lazy_refresh(lro.dominant_svd(), threshold=0.0, window=1)
    assert counts(lazy) == [1, 2, 1, 2, 3, 4, 1]


# --- full rank without a word ---


@pytest.mark.parametrize(
    "path",
    [
        "PreNorm_0/Attention_0/to_qkv/kernel",
        "ScaledDotProductAttention/kernel",
        "embedded_attention/q/kernel",
        "rescaled/mlp/up/kernel",
        "normal_ffn/w",
        "attention/head_0/q/kernel",
        "attention/heads/kernel",
        "unbiased_attn/w",
    ],
)
def test_names_match_by_whole_parts_of_a_path(path: str) -> None:
    tree: Any = normal(16, 32)
    for part in reversed(path.split("/")):
        tree = {part: tree}
    (row, _) = lro.memory_report(lro.galore(0.1, rank=4, refresh_every=9), tree).rows
    assert row.rank == 4


def test_a_matrix_has_full_rank_by_its_rank_only_with_a_warning() -> None:
    params = {"mlp": {"kernel": normal(64, 256)}, "attn": {"kernel": normal(256, 512)}}
    tx = lro.grass_jump(0.1, rank=128, refresh_every=9, key=0)
    with pytest.warns(UserWarning, match=r"projects 1 of 2 matrices.*mlp/kernel") as w:
        jax.eval_shape(tx.init, params)
    assert len(w) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = lro.memory_report(tx, params)
        jax.eval_shape(lro.galore(0.1, rank=32, refresh_every=9).init, params)
    assert {r.path: (r.rank, r.full_rank) for r in report.rows[:2]} == {
        "attn/kernel": (128, False),
        "mlp/kernel": (64, True),
    }
    assert "64 (all)" in str(report)
    # A row is a vector, and silently of full rank.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lro.galore(0.1, rank=4, refresh_every=9).init({"mlp": {"row": normal(1, 9)}})
    rules = (("", None),)
    tx = lro.galore(0.1, rank=32, refresh_every=9, dimension_numbers=rules)
    with pytest.warns(UserWarning, match=r"projects 0 of 2 .*by its rule"):
        tx.init(params)


# --- errors that say what to write ---


@pytest.mark.parametrize(
    "stage",
    [
        optax.scale(2.0),
        optax.clip(1.0),
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(),
        optax.trace(0.9),
        optax.add_decayed_weights(0.1),
        optax.zero_nans(),
        optax.normalize_by_update_norm(),
        optax.apply_if_finite(optax.identity(), 3),
    ],
    ids=lambda s: s.update.__qualname__.split(".")[0],
)
def test_a_stock_transformation_between_stages_is_an_error(stage: Any) -> None:
    params = {"mlp": {"kernel": normal(M, N)}}
    chain = optax.chain(lro.dominant_svd(), stage, lro.project())
    tx = lro.low_rank(chain, rank=3, refresh_every=1)
    with pytest.raises(TypeError) as caught:
        tx.update(params, tx.init(params), params)
    # jax.numpy's own functions say so too, "during handling" of what a Frame says.
    said = f"{caught.value} {caught.value.__context__}"
    assert "mlp/kernel: inside low_rank() a Frame stands for this matrix" in said
    assert "in_subspace(inner)" in said


def test_a_stage_that_returns_an_array_for_its_frame() -> None:
    params = {"mlp": {"kernel": normal(M, N)}}
    lost = optax.stateless(
        lambda frames, _: lro.stages.map_frames(lambda f: f.step, frames)
    )
    chain = optax.chain(stages(), lost)
    tx = lro.low_rank(chain, rank=3, refresh_every=1)
    with pytest.raises(TypeError, match=r"mlp/kernel: a stage put .* Frame's place"):
        jax.eval_shape(tx.update, params, tx.init(params))


def test_two_parameters_of_one_path() -> None:
    params = {"mlp/up": {"w": normal(M, N)}, "mlp": {"up": {"w": normal(N, M)}}}
    with pytest.raises(ValueError, match="two parameters have the path mlp/up/w"):
        lro.galore(0.1, rank=3, refresh_every=5).init(params)


def test_a_step_or_a_basis_that_is_none() -> None:
    params = {"mlp": {"kernel": normal(M, N)}}
    with pytest.raises(TypeError, match=r"mlp/kernel: .*write in_subspace\(inner\)"):
        lro.galore(0.1, rank=3, refresh_every=5, step=optax.scale_by_adam()).init(
            params
        )
    for make in (lro.galore, lro.fira, lro.grass_jump, lro.frugal):
        bad: Any = "sara"
        with pytest.raises(ValueError, match=r"basis is a stage.*sara_sample\(key=0\)"):
            make(0.1, rank=3, refresh_every=5, basis=bad)
    with pytest.raises(ValueError, match="step is a stage"):
        lro.fira(0.1, rank=3, refresh_every=5, step=bad)


def test_numpy_integers_are_integers() -> None:
    make: Any = lro.galore
    for rank, every in ((np.int64(3), np.int32(5)), (np.float32(0.5), 5)):
        tx = make(0.1, rank=rank, refresh_every=every, dimension_numbers=None)
        tx.init({"w": normal(M, N)})


def test_the_report_does_not_guess_at_other_optimizers() -> None:
    params = {"w": normal(M, N), "b": normal(3)}
    report = lro.memory_report(optax.contrib.galore(0.1, rank=2), params)
    assert [row.rank for row in report.rows] == [None] * 3
    assert report.state_bytes > 0


def test_a_chain_of_ones_own_skips_as_the_named_optimizers_do() -> None:
    params = {"w": normal(M, N), "b": normal(3)}
    tx = lro.low_rank_optimizer(
        stages(), 0.1, rank=3, refresh_every=2, weight_decay=0.1, dimension_numbers=None
    )
    named = lro.galore(
        0.1,
        rank=3,
        refresh_every=2,
        weight_decay=0.1,
        scale=1.0,
        dimension_numbers=None,
    )
    bad = {**params, "w": params["w"].at[0, 0].set(jnp.nan)}
    for ours, theirs in zip(
        *(run(t, [params, bad, params])[0] for t in (tx, named)), strict=True
    ):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert not np.any(run(tx, [params, bad])[0][1]["b"])


# --- edges that fuzzing found ---


@pytest.mark.parametrize("dtype", ["int32", "complex64"])
def test_matrices_of_other_numbers_are_refused(dtype: str) -> None:
    params = {"mlp": {"kernel": jnp.ones((M, N), dtype)}}
    with pytest.raises(ValueError, match=f"mlp/kernel: a {dtype} matrix of shape"):
        lro.galore(0.1, rank=3, refresh_every=5).init(params)


@pytest.mark.parametrize("every", [2**31, 2**40, 0, -1, True, 1.5])
def test_intervals_out_of_range(every: Any) -> None:
    with pytest.raises(ValueError, match="refresh_every must be an int from 1 to"):
        lro.galore(0.1, rank=3, refresh_every=every)


@pytest.mark.parametrize("option", ["rank", "dimension_numbers"])
def test_a_rule_that_is_no_regular_expression(option: str) -> None:
    rules: Any = {"rank": (("(", 3),), "dimension_numbers": (("(", None),)}
    options: Any = {"rank": 3, "dimension_numbers": None, option: rules[option]}
    tx = lro.low_rank(stages(), refresh_every=5, **options)
    with pytest.raises(ValueError, match=r"w: the \w+ rule '\(' is no regular expr"):
        tx.init({"w": normal(M, N)})


@pytest.mark.parametrize("name", ALL)
def test_leaves_without_numbers(name: str) -> None:
    make, options = options_of(name, dimension_numbers=None)
    params = {"none": jnp.zeros((0, 4)), "empty": jnp.zeros((3, 0)), "w": normal(4, 6)}
    tx = make(**options)
    state = jax.eval_shape(lambda tree: tx.init(tree), params)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    assert updates["none"].shape == (0, 4)
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_leaves_without_numbers_do_not_spoil_the_others() -> None:
    params = {"none": jnp.zeros((0, 4)), "empty": jnp.zeros((3, 0)), "w": normal(4, 6)}
    tx = lro.recipes.galore_adam_mini(
        0.1, rank=2, refresh_every=2, dimension_numbers=None
    )
    updates, states = run(tx, [params] * 3)
    assert np.any(updates[-1]["w"])
    assert int(states[-1][0].skipped) == 0


@pytest.mark.parametrize("name", ALL)
def test_leaves_of_two_widths_keep_theirs(name: str) -> None:
    with jax.enable_x64(True):
        make, options = options_of(name, dimension_numbers=None)
        params = {
            "a": normal(4, 6),
            "b": jnp.asarray(normal(4, 6), jnp.float64),
            "c": normal(3),
            "d": jnp.asarray(normal(3), jnp.float64),
        }
        tx = make(**options)
        state = jax.eval_shape(lambda tree: tx.init(tree), params)
        updates, after = jax.eval_shape(tx.update, params, state, params)
    assert [u.dtype.name for u in updates.values()] == ["float32", "float64"] * 2
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.dtype, b.dtype), state, after)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_weight_decay_does_not_change_the_dtype(name: str, decay: float) -> None:
    make, options = options_of(name, dimension_numbers=None, weight_decay=decay)
    params = {"w": normal(4, 6), "b": normal(3)}
    grads = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    tx = make(**options)
    state = jax.eval_shape(lambda tree: tx.init(tree), params)
    updates, _ = jax.eval_shape(tx.update, grads, state, params)
    assert {u.dtype.name for u in updates.values()} == {"bfloat16"}


@pytest.mark.parametrize("name", ALL)
def test_one_huge_gradient_does_not_end_the_run(name: str) -> None:
    """Finite, but V is not: weights were NaN then, or at the next refresh."""
    make, options = options_of(name, dimension_numbers=None)
    tx = make(**options)
    update = jax.jit(tx.update)
    for size in (1e17, 1e19, 1e20, 1e30, 3e38):
        survives(tx, update, size)


def survives(tx: Any, update: Any, size: float) -> None:
    params = {"w": normal(4, 6), "b": normal(3)}
    state, updates = tx.init(params), params
    for t in range(8):
        grads = {"w": normal(4, 6, seed=t), "b": normal(3, seed=t)}
        if t == 3:
            grads["w"] = grads["w"].at[1, 2].set(size)
        if t == 5:
            grads["b"] = grads["b"].at[1].set(-size)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        assert np.isfinite(params["w"]).all()
        assert np.isfinite(params["b"]).all()
    assert np.any(updates["w"])
    floats = [
        x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    assert all(np.isfinite(x).all() for x in floats)
