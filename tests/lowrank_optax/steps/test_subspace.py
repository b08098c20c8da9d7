"""Steps: one matrix at a time, started anew, in full space, and turned in part."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lowrank_optax as lro
from tests.helpers import stages

M, N, R, STEPS, EVERY = 6, 8, 2, 5, 2
B1, B2 = 0.9, 0.99
# One matrix, two batch shapes, a tall one, and leaves of full rank.
SHAPES = {
    "one": (M, N),
    "tall": (N, M),
    "layers": (3, M, N),
    "experts": (2, 3, M, N),
    "vector": (7,),
    "scalar": (),
}
MATRICES = [name for name, shape in SHAPES.items() if len(shape) > 1]


def tree(seed: int, *steps: int) -> Any:
    rng = np.random.default_rng(seed)

    def leaf(shape: tuple[int, ...]) -> Any:
        # Layers of very different size, so that their means tell them apart.
        x = rng.normal(size=(*steps, *shape))
        if len(shape) > 2:
            x *= np.geomspace(0.01, 10, shape[-3])[:, None, None]
        return x.astype(np.float32)

    return {name: leaf(shape) for name, shape in SHAPES.items()}


# Given orthonormal bases, three for each matrix: no test here is about a rule.
BASES = {
    name: np.linalg.qr(
        np.random.default_rng(i).normal(size=(3, *SHAPES[name][:-2], M, R))
    )[0].astype(np.float32)
    for i, name in enumerate(MATRICES)
}


def bracket(
    step: Any, rule: Any = None, *, back: Any = None, before: Any = None
) -> Any:
    stages = optax.chain(
        before or optax.identity(),
        rule or lro.bases.replay(BASES | each_alone(BASES)),
        lro.project(),
        step,
        back or lro.project_back(),
    )
    return lro.low_rank(
        stages, rank=R, refresh_every=EVERY, dimension_numbers=lro.STACKED
    )


def run(tx: Any, gradients: Any, params: Any) -> Any:
    """Updates and states, stacked."""

    def step(state: Any, g: Any) -> Any:
        updates, state = tx.update(g, state, params)
        return state, (updates, state)

    def scan(gs: Any, params: Any) -> Any:
        return jax.lax.scan(step, tx.init(params), gs)[1]

    return jax.jit(scan)(gradients, params)


def each_alone(x: Any) -> Any:
    """The same tree, with a leaf of its own for each matrix of a stack."""

    def split(name: str, leaf: Any) -> Any:
        axes = leaf.ndim - len(SHAPES[name])
        count = int(np.prod(SHAPES[name][:-2])) if name in MATRICES else 1
        if count == 1:
            return {name: leaf}
        flat = leaf.reshape(*leaf.shape[:axes], count, *leaf.shape[-2:])
        return {f"{name} {i}": np.take(flat, i, axis=axes) for i in range(count)}

    parts = [split(name, np.asarray(leaf)) for name, leaf in x.items()]
    return {k: v for part in parts for k, v in part.items()}


def check_close(found: Any, expected: Any) -> None:
    for name in expected:
        # A few dozen float32 roundings of numbers of size one; sums of a batch may be
        # in another order.
        np.testing.assert_allclose(
            found[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name
        )


# ------------------------------------------------------------------ per_matrix


def adafactor() -> Any:
    return optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=1),
        optax.clip_by_block_rms(0.5),
    )


INNERS = {
    "adafactor": adafactor,
    "trust ratio": lambda: optax.chain(optax.trace(0.9), optax.scale_by_trust_ratio()),
}


@pytest.mark.parametrize("name", INNERS)
def test_per_matrix_is_each_layer_apart(name: str) -> None:
    gradients, params = tree(0, STEPS), tree(1)
    stacked, _ = run(
        bracket(lro.in_subspace(lro.steps.per_matrix(INNERS[name]()))),
        gradients,
        params,
    )
    alone, _ = run(
        bracket(lro.in_subspace(INNERS[name]())),
        each_alone(gradients),
        each_alone(params),
    )
    check_close(each_alone(stacked), alone)
    # Without it the layers are mixed.
    mixed, _ = run(bracket(lro.in_subspace(INNERS[name]())), gradients, params)
    for leaf, shape in SHAPES.items():
        gap = np.abs(mixed[leaf] - stacked[leaf]).max() / np.abs(stacked[leaf]).max()
        if len(shape) > 2:
            assert gap > 0.01, leaf
        else:  # one matrix or none is as before, to rounding
            assert gap < 1e-5, leaf


def test_entry_by_entry_it_makes_no_difference() -> None:
    gradients, params = tree(0, STEPS), tree(1)
    adam = optax.scale_by_adam(B1, B2)
    with_it, without = (
        run(bracket(lro.in_subspace(inner)), gradients, params)[0]
        for inner in (lro.steps.per_matrix(adam), adam)
    )
    check_close(with_it, without)


def test_its_state_is_one_for_each_leaf() -> None:
    tx = bracket(lro.in_subspace(lro.steps.per_matrix(optax.scale_by_adam())))
    state = tx.init(tree(1)).inner_state[3].inner_state
    assert isinstance(state, optax.ScaleByAdamState)
    # Moments in the subspace, and a count for each matrix of a leaf.
    assert jax.tree.map(jnp.shape, state.nu) == jax.tree.map(jnp.shape, state.mu)
    shapes = {k: (mu.shape, state.count[k].shape) for k, mu in state.mu.items()}
    assert shapes == {
        "one": ((R, N), ()),
        "tall": ((R, N), ()),
        "layers": ((3, R, N), (3,)),
        "experts": ((2, 3, R, N), (2, 3)),
        "vector": ((7,), ()),
        "scalar": ((), ()),
    }


def test_params_in_the_subspace_are_projected_weights() -> None:
    """S^T W for each matrix, the weights themselves for the others."""
    seen: list[Any] = []

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        seen.append(jax.tree.map(jnp.shape, params))
        return params, state

    inner = optax.GradientTransformation(lambda _: optax.EmptyState(), update)
    params, gradients = tree(1), tree(0)
    tx = bracket(lro.in_subspace(lro.steps.per_matrix(inner)))
    updates, state = jax.jit(tx.update)(gradients, tx.init(params), params)
    bases = optax.tree.get(state, "basis")
    for name in MATRICES:
        s = np.float64(bases[name])
        w = np.float64(params[name])
        w = np.swapaxes(w, -1, -2) if name == "tall" else w
        expected = s @ np.swapaxes(s, -1, -2) @ w
        expected = np.swapaxes(expected, -1, -2) if name == "tall" else expected
        # Float32 sums of M products of numbers of up to 30.
        np.testing.assert_allclose(updates[name], expected, rtol=1e-5, atol=1e-4)
    assert np.array_equal(updates["vector"], params["vector"])
    # One matrix at a time, and each other leaf by itself.
    assert sorted(seen) == sorted([(R, N)] * len(MATRICES) + [(7,), ()])


# ------------------------------------------------------------------ reset_moments


def test_matrices_start_anew_at_a_refresh_and_other_leaves_go_on() -> None:
    gradients, params = tree(0, 7), tree(1)
    adam = optax.scale_by_adam(B1, B2)
    reset, states = run(bracket(lro.reset_moments(adam)), gradients, params)
    plain, _ = run(bracket(lro.in_subspace(adam)), gradients, params)
    for name in ("vector", "scalar"):  # as if nothing were reset, bias correction too
        np.testing.assert_allclose(reset[name], plain[name], rtol=1e-6)  # two programs
    for start in range(0, 7, EVERY):
        for name in MATRICES:
            # The bias correction of a first step: sign(S^T G), up to eps = 1e-8.
            s = np.float64(optax.tree.get(states, "basis")[name][start])
            g = np.float64(gradients[name][start : start + 2])
            g = np.swapaxes(g, -1, -2) if name == "tall" else g
            low = np.swapaxes(s, -1, -2) @ g
            steps = [low[0] / (np.abs(low[0]) + 1e-8)]
            if len(low) == 2:  # and of a second one
                mu = (B1 * (1 - B1) * low[0] + (1 - B1) * low[1]) / (1 - B1**2)
                nu = (B2 * low[0] ** 2 + low[1] ** 2) / (1 + B2)
                steps.append(mu / (np.sqrt(nu) + 1e-8))
            step = s @ np.stack(steps)
            step = np.swapaxes(step, -1, -2) if name == "tall" else step
            # Entries of G~ near zero round relative to their column: 1e-7 to 1e-3.
            np.testing.assert_allclose(
                reset[name][start : start + 2], step, atol=1e-3, err_msg=name
            )
    counts = states.inner_state[3].inner_state.count
    for name, shape in SHAPES.items():
        each = np.asarray(counts[name]).reshape(7, -1)
        assert each.shape[1] == np.prod(shape[:-2])  # one for each matrix
        expected = [1, 2, 1, 2, 1, 2, 1] if name in MATRICES else [*range(1, 8)]
        assert all(count.tolist() == expected for count in each.T), name
    assert not np.allclose(reset["one"][EVERY], plain["one"][EVERY], atol=0.1)


def test_a_matrix_starts_anew_when_its_own_basis_moves_and_at_no_other_time() -> None:
    """No refresh that a frozen basis passes over, and each layer of a stack apart."""
    gradients = {"layers": np.ones((7, 3, M, N), np.float32)}
    gradients["layers"][:3, 1] = 0  # its basis is chosen at its first gradient
    rule = lro.bases.frozen(lro.dominant_svd())
    step = lro.reset_moments(optax.scale_by_adam(B1, B2))
    _, states = run(bracket(step, rule), gradients, {"layers": gradients["layers"][0]})
    on, anew = [*range(1, 8)], [1, 2, 3, 1, 2, 3, 4]
    assert states.inner_state[3].inner_state.count["layers"].T.tolist() == [
        on,
        anew,
        on,
    ]


def test_without_matrices_or_without_other_leaves() -> None:
    adam = optax.scale_by_adam(B1, B2)
    for names in (["one"], ["vector"]):
        gradients = {k: tree(0, STEPS)[k] for k in names}
        params = {k: tree(1)[k] for k in names}
        found, _ = run(bracket(lro.reset_moments(adam)), gradients, params)
        assert np.isfinite(found[names[0]]).all()


def test_each_needs_its_stages() -> None:
    params = {"mlp": {"kernel": np.ones((M, N), np.float32)}}
    for stage in (
        lro.in_subspace(lro.steps.per_matrix(optax.scale_by_adam())),
        lro.reset_moments(optax.scale_by_adam()),
    ):
        chain = optax.chain(lro.dominant_svd(), stage, lro.project_back())
        tx = lro.low_rank(chain, rank=R, refresh_every=1)
        with pytest.raises(ValueError, match=r"mlp/kernel: .*put project\(\) before"):
            jax.eval_shape(tx.update, params, tx.init(params))
    # A basis rule too, one that says when its basis moves.
    stages = optax.chain(
        lro.bases.online_pca(), lro.project(), stage, lro.project_back()
    )
    tx = lro.low_rank(stages, rank=R, refresh_every=1)
    with pytest.raises(
        ValueError, match="mlp/kernel: this basis rule changes its basis at every step"
    ):
        jax.eval_shape(tx.update, params, tx.init(params))


def test_outside_of_low_rank_nothing_is_reset() -> None:
    """There are no bases that could move: each matrix has its own Adam."""
    gradients, params = tree(0, STEPS), tree(1)
    adam = optax.scale_by_adam(B1, B2)
    found, states = run(lro.reset_moments(adam), gradients, params)
    expected, _ = run(adam, gradients, params)
    check_close(found, expected)
    count = states.inner_state.count["layers"]
    assert count.tolist() == [[t + 1] * 3 for t in range(STEPS)]


# ------------------------------------------------------------------ in_full_space


@pytest.mark.parametrize("per_matrix", [True, False])
def test_what_runs_in_full_space_decides_the_basis_too(per_matrix: bool) -> None:
    """GaLore on inner(G), for inner before the bracket or inside it."""
    gradients, params = tree(0, STEPS), tree(1)
    if not per_matrix:  # entry by entry, so that the canonical orientation is no matter
        inner: Any = optax.scale_by_adam(B1, B2)
        before = run(inner, gradients, params)[0]
    else:
        inner = lro.steps.per_matrix(adafactor())
        whole = run(adafactor(), each_alone(gradients), each_alone(params))[0]
        before = {}
        for name, shape in SHAPES.items():
            own = [np.asarray(v) for k, v in whole.items() if k.split()[0] == name]
            before[name] = np.stack(own, 1).reshape(STEPS, *shape)
    step = lro.in_subspace(optax.trace(0.9))
    inside, _ = run(
        bracket(step, before=lro.steps.in_full_space(inner)), gradients, params
    )
    expected, _ = run(bracket(step), before, params)
    check_close(inside, expected)


# ------------------------------------------------------------------ rotate_moments


def test_the_first_moment_alone_turns() -> None:
    names = ("tall", "layers", "vector")
    gradients = {k: tree(0, STEPS)[k] for k in names}
    params = {k: tree(1)[k] for k in names}
    adam = optax.scale_by_adam(B1, B2)
    steps = {
        "both": lro.rotate_moments(adam),
        "first": lro.rotate_moments(adam, moments="first"),
        "none": lro.in_subspace(adam),
    }
    moments = {}
    for name, step in steps.items():
        _, states = run(bracket(step), gradients, params)
        moments[name] = {k: optax.tree.get(states, k) for k in ("mu", "nu")}
    for leaf in names:
        for k in ("mu", "nu"):
            x = {name: np.asarray(moments[name][k][leaf]) for name in steps}
            # The same operations on the same numbers, in three programs.
            close = {
                pair: np.allclose(x[pair[0]], x[pair[1]], rtol=1e-5, atol=1e-7)
                for pair in (("first", "both"), ("first", "none"))
            }
            if leaf not in MATRICES:
                assert all(close.values()), (leaf, k)
            elif k == "mu":
                assert close == {("first", "both"): True, ("first", "none"): False}
            else:
                assert close == {("first", "both"): False, ("first", "none"): True}


@settings(derandomize=True, deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**31))
def test_a_turned_first_moment_is_a_sum_over_gaussian_bases_too(seed: int) -> None:
    """M_T = sum over t of 0.5^(T - t) C_T ... C_{t+1} S_t^T G_t, with any S."""
    rng = np.random.default_rng(seed)
    bases, gradients = rng.normal(size=(3, M, R)), rng.normal(size=(3, M, N))
    expected = np.zeros((R, N))
    for t in range(3):
        if t:
            expected = bases[t].T @ bases[t - 1] @ expected
        expected = 0.5 * expected + bases[t].T @ gradients[t]
    found = _traced(bases.astype(np.float32), gradients.astype(np.float32))
    # Float32 products of at most three bases, relative to the largest entry.
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@jax.jit
def _traced(bases: Any, gradients: Any) -> Any:
    stages = optax.chain(
        lro.bases.replay({"w": bases}, orthonormal=False),
        lro.project(),
        lro.rotate_moments(optax.trace(0.5)),
        lro.project_back(),
    )
    tx = lro.low_rank(stages, rank=R, refresh_every=1)
    state = tx.init({"w": gradients[0]})
    for g in gradients:
        _, state = tx.update({"w": g}, state)
    return optax.tree.get(state, "trace")["w"]


LOOSE = {
    "gaussian": lro.bases.gaussian(0),
    "stored": lro.bases.gaussian(0, stored=True),
    "4 bits": lro.bases.quantize_basis(lro.dominant_svd()),
    "replay": lro.bases.replay({"w": np.ones((1, M, R))}, orthonormal=False),
    "correlation_aware": lro.bases.correlation_aware(),
}


@pytest.mark.parametrize("rule", LOOSE)
def test_a_second_moment_does_not_turn_with_a_basis_that_is_not_orthonormal(
    rule: str,
) -> None:
    g = {"w": np.ones((M, N), np.float32)}
    tx = bracket(lro.rotate_moments(optax.scale_by_adam()), LOOSE[rule])
    with pytest.raises(
        ValueError, match=r"w: second moments rotate between orthonormal"
    ):
        jax.eval_shape(tx.update, g, tx.init(g))
    # The advice is good, and a step without a second moment needs none.
    for step in (
        lro.rotate_moments(optax.scale_by_adam(), moments="first"),
        lro.in_subspace(optax.scale_by_adam()),
        lro.rotate_moments(optax.ema(0.9)),
    ):
        good = bracket(step, LOOSE[rule])
        jax.eval_shape(good.update, g, good.init(g))


def test_a_basis_that_says_no_turn_turns_nothing() -> None:
    g = {"w": np.ones((M, N), np.float32)}
    for moments in ("both", "first"):
        step = lro.rotate_moments(optax.scale_by_adam(), moments=moments)
        tx = bracket(step, lro.bases.online_pca())
        with pytest.raises(ValueError, match="this basis rule does not set `rotation`"):
            jax.eval_shape(tx.update, g, tx.init(g))


def test_which_moments_there_are() -> None:
    which: Any = "second"
    with pytest.raises(ValueError, match="moments='second': choose \"both\" or"):
        lro.rotate_moments(optax.scale_by_adam(), moments=which)


# ------------------------------------------------------------------ accumulation


def multi_steps() -> Any:
    return optax.MultiSteps(optax.scale_by_adam(), 2).gradient_transformation()


ACCUMULATING = {
    "in_subspace": lambda: lro.in_subspace(multi_steps()),
    "per_matrix": lambda: lro.in_subspace(lro.steps.per_matrix(multi_steps())),
    "nested": lambda: lro.in_subspace(
        optax.chain(optax.scale(1.0), optax.masked(multi_steps(), {"one": True}))
    ),
    "reset_moments": lambda: lro.reset_moments(multi_steps()),
}
REFUSING = {
    "recover_residual": lro.recover_residual,
    "sign_residual": lro.sign_residual,
    "scale_gradient": lro.scale_gradient,
    "scale_gradient/matrix": functools.partial(lro.scale_gradient, per="matrix"),
}


@pytest.mark.parametrize("step", ACCUMULATING)
def test_an_accumulating_step_gives_no_residual_back(step: str) -> None:
    g = {"one": np.ones((M, N), np.float32)}
    sentence = "the step accumulates gradients, and is zero at most steps; accumulate "
    for name, back in REFUSING.items():
        stage = name.split("/")[0]
        tx = bracket(ACCUMULATING[step](), back=back())
        with pytest.raises(
            ValueError, match=rf"one: {stage}\(\) does not work here: {sentence}"
        ):
            jax.eval_shape(tx.update, g, tx.init(g))
    fed_back = lro.error_feedback(optax.chain(lro.dominant_svd(), lro.project()))
    tx = lro.low_rank(
        optax.chain(fed_back, ACCUMULATING[step](), lro.project_back()),
        rank=R,
        refresh_every=1,
    )
    with pytest.raises(
        ValueError, match=rf"one: error_feedback\(\) does not work: {sentence}"
    ):
        jax.eval_shape(tx.update, g, tx.init(g))


@pytest.mark.parametrize("step", ["in_subspace", "per_matrix"])
def test_it_may_be_projected_back(step: str) -> None:
    """One Adam step on the mean of two gradients, in a basis that stays."""
    gradients = {"w": tree(0, 2)["one"]}
    params = {"w": gradients["w"][0]}
    found, states = run(
        bracket(ACCUMULATING[step](), lro.bases.frozen(lro.dominant_svd())),
        gradients,
        params,
    )
    np.testing.assert_array_equal(found["w"][0], 0)
    s = np.float64(optax.tree.get(states, "basis")["w"][1])
    low = s.T @ np.float64(gradients["w"]).mean(0)
    # A first Adam step is a sign, up to eps: float32 rounding.
    expected = s @ (low / (np.abs(low) + 1e-8))
    np.testing.assert_allclose(found["w"][1], expected, atol=1e-5)


def test_moments_are_reset_only_where_the_basis_moves() -> None:
    grads = [{"w": stages.normal(stages.M, stages.N, seed=s)} for s in range(7)]

    def counts(rule: Any) -> list[int]:
        step = lro.reset_moments(optax.scale_by_adam())
        tx = lro.low_rank(
            stages.chain_of(basis=rule, step=step), rank=3, refresh_every=2
        )
        _, states = stages.run(tx, grads)
        return [int(s.inner_state[2].inner_state.count["w"]) for s in states]

    assert counts(lro.dominant_svd()) == [1, 2, 1, 2, 1, 2, 1]
    assert counts(lro.bases.frozen(lro.dominant_svd())) == [1, 2, 3, 4, 5, 6, 7]
    lazy = lro.bases.lazy_refresh(lro.dominant_svd(), threshold=0.0, window=1)
    assert counts(lazy) == [1, 2, 1, 2, 3, 4, 1]
