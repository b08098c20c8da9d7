"""The bracket and the whole chains in it: what must not change a step, and what must
stop one."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

import lowrank_optax as lro

M, N, R, STEPS = 8, 12, 3, 5


@dataclasses.dataclass(frozen=True)
class Chain:
    """An optimizer's stages around any basis rule."""

    step: Any
    back: Any

    def __call__(self, rule, *, rank=R, refresh_every=2, **kwargs):
        stages = optax.chain(rule, lro.project(), self.step(), self.back())
        return lro.low_rank(stages, rank=rank, refresh_every=refresh_every, **kwargs)


def kept():
    return lro.in_subspace(optax.scale_by_adam())


def turned():
    return lro.rotate_moments(optax.scale_by_adam())


CHAINS = {
    "galore": Chain(kept, functools.partial(lro.project_back, 0.25)),
    "fira": Chain(kept, functools.partial(lro.recover_residual, 1.01, scale=0.25)),
    "grass": Chain(turned, functools.partial(lro.recover_residual, 1.01)),
    "rotated galore": Chain(turned, lro.project_back),
}
each_chain = pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
two_chains = pytest.mark.parametrize(
    "chain", [CHAINS["galore"], CHAINS["grass"]], ids=["galore", "grass"]
)


def gradients(*shape, steps=STEPS, seed=0):
    g = np.random.default_rng(seed).normal(size=(steps, *shape)) + 0.2
    return g.astype(np.float32)


def bases(count, *batch, m=M, seed=1):
    x = np.random.default_rng(seed).normal(size=(count, *batch, m, R))
    return np.linalg.qr(x)[0].astype(np.float32)


def run(tx, trees):
    """The updates of every step, for a tree of stacked gradients."""

    def step(state, g):
        updates, state = tx.update(g, state)
        return state, updates

    first = jax.tree.map(lambda g: g[0], trees)
    return jax.jit(lambda gs: jax.lax.scan(step, tx.init(first), gs)[1])(trees)


# Updates are about one (Adam's) or four (with residual). Two programs may sum a dozen
# float32 products in another order, or fuse a product and a sum into one rounding;
# five steps carry that on.
ROUNDING: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


# --- invariances ---


@each_chain
def test_signs_of_the_basis_do_not_change_a_step(chain):
    s = bases(4)
    signs = np.random.default_rng(2).choice([-1.0, 1.0], size=(4, 1, R))
    if chain.step is kept:
        signs[:] = signs[0]  # moments that are not turned need one choice for all
    signs = signs.astype(np.float32)
    g = {"w": gradients(M, N)}
    a = run(chain(lro.bases.replay({"w": s})), g)["w"]
    b = run(chain(lro.bases.replay({"w": s * signs})), g)["w"]
    assert np.any(signs < 0)
    if chain.step is kept:
        # A sign commutes with every rounding as long as no sums are reordered.
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(a, b, **ROUNDING)


def test_without_rotation_a_changing_sign_does_change_the_step():
    """So that the test above would notice."""
    s = bases(1).repeat(4, 0)
    signs = np.asarray([1, -1, 1, -1], np.float32).reshape(4, 1, 1)
    g = {"w": gradients(M, N)}
    chain = CHAINS["galore"]
    a = run(chain(lro.bases.replay({"w": s})), g)["w"]
    b = run(chain(lro.bases.replay({"w": s * signs})), g)["w"]
    assert np.abs(a - b).max() > 0.01


@each_chain
def test_which_side_is_longer_does_not_matter(chain):
    g = gradients(M, N)
    wide = run(chain(lro.dominant_svd()), {"w": g})["w"]
    tall = run(chain(lro.dominant_svd()), {"w": g.swapaxes(1, 2)})["w"]
    np.testing.assert_allclose(wide, np.swapaxes(tall, 1, 2), **ROUNDING)


@two_chains
def test_swapped_dimension_numbers_transpose_a_square_matrix(chain):
    g = gradients(M, M)
    a = run(chain(lro.dominant_svd()), {"w": g})["w"]
    swapped = chain(lro.dominant_svd(), dimension_numbers=MuonDimensionNumbers(1, 0))
    b = run(swapped, {"w": g.swapaxes(1, 2)})["w"]
    np.testing.assert_allclose(a, np.swapaxes(b, 1, 2), **ROUNDING)


@each_chain
def test_stacked_layers_are_separate_leaves(chain):
    g = gradients(3, M, N)
    tx = chain(lro.dominant_svd(), dimension_numbers=lro.STACKED)
    stacked = run(tx, {"w": g})["w"]
    separate = run(tx, {"w": [g[:, i] for i in range(3)]})["w"]
    # Bases are the same bits; batched products may sum in another order.
    np.testing.assert_allclose(stacked, np.stack(separate, 1), **ROUNDING)


def test_stacked_layers_have_the_bases_of_separate_leaves_bit_for_bit():
    g = gradients(3, M, N)[0]
    tx = CHAINS["galore"](lro.dominant_svd(), dimension_numbers=lro.STACKED)
    step = jax.jit(lambda g: optax.tree.get(tx.update(g, tx.init(g))[1], "basis"))
    np.testing.assert_array_equal(
        step({"w": g})["w"], np.stack(step({"w": list(g)})["w"])
    )


@two_chains
def test_the_shape_of_the_batch_does_not_matter(chain):
    g = gradients(6, M, N)
    # A basis rule with draws too: keys go by the flat index of a layer.
    tx = chain(lro.sara_sample(0), dimension_numbers=lro.STACKED)
    flat = run(tx, {"w": g})["w"]
    deep = run(tx, {"w": g.reshape(STEPS, 3, 1, 2, M, N)})["w"]
    np.testing.assert_allclose(deep.reshape(g.shape), flat, **ROUNDING)
    # Layers last instead of first.
    last = chain(lro.sara_sample(0), dimension_numbers=MuonDimensionNumbers(0, 1))
    moved = run(last, {"w": np.moveaxis(g, 1, -1)})["w"]
    np.testing.assert_allclose(np.moveaxis(moved, -1, 1), flat, **ROUNDING)


@two_chains
def test_kernels_of_three_axes_are_their_matrices(chain):
    g = gradients(M, N)
    flat = run(chain(lro.dominant_svd()), {"w": g})["w"]
    q = chain(lro.dominant_svd(), dimension_numbers=MuonDimensionNumbers(0, (1, 2)))
    heads = run(q, {"w": g.reshape(STEPS, M, 3, 4)})["w"]
    np.testing.assert_allclose(heads.reshape(flat.shape), flat, **ROUNDING)
    out = chain(lro.dominant_svd(), dimension_numbers=MuonDimensionNumbers((0, 1), 2))
    g = g.swapaxes(1, 2)
    heads = run(out, {"w": g.reshape(STEPS, 3, 4, M)})["w"]
    swapped = np.swapaxes(flat, 1, 2)
    np.testing.assert_allclose(heads.reshape(g.shape), swapped, **ROUNDING)


@two_chains
def test_other_leaves_do_not_matter(chain):
    g = gradients(M, N)
    alone = run(chain(lro.sara_sample(0)), {"w": g})["w"]
    others = {"a": gradients(6, 6), "b": gradients(5), "w": g}
    beside = run(chain(lro.sara_sample(0)), others)["w"]
    np.testing.assert_allclose(beside, alone, **ROUNDING)


def test_dtypes_of_the_leaves():
    """States are float32 at least; updates come back as the gradient came."""
    tx = CHAINS["grass"](lro.dominant_svd())
    with jax.enable_x64(True):
        g = {
            str(d): jnp.asarray(gradients(M, N)[0], d)
            for d in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)
        }
        updates, state = jax.jit(tx.update)(g, tx.init(g))
        for name, x in g.items():
            assert updates[name].dtype == x.dtype
            wide = jnp.promote_types(x.dtype, jnp.float32)
            for field in ("basis", "mu", "nu", "norm"):
                assert optax.tree.get(state, field)[name].dtype == wide


# --- a gradient that is not finite ---


def tree_of(seed):
    rng = np.random.default_rng(seed)
    shapes = {"w": (M, N), "tall": (2, N, M), "b": (5,), "s": ()}
    return {k: np.asarray(rng.normal(size=s), np.float32) for k, s in shapes.items()}


def bits(tree):
    """A tree of NumPy arrays, typed keys as their words."""

    def one(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    return jax.tree.map(one, tree)


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, bits(a), bits(b))


FINITE_RULES = {
    "dominant_svd": lro.dominant_svd,
    "gram": lambda: lro.dominant_svd(decomposition="gram"),
    "randomized": lambda: lro.dominant_svd(decomposition="randomized", key=0),
    "sara": lambda: lro.sara_sample(0),
    "walk": lambda: lro.grassmann_walk(0),
    "walk of all directions": lambda: lro.grassmann_walk(0, walk_rank=None),
    "jump": lambda: lro.grassmann_jump(0),
}


@pytest.mark.parametrize("rule", FINITE_RULES.values(), ids=FINITE_RULES)
def test_a_step_that_is_not_finite_changes_nothing(rule):
    tx = CHAINS["grass"](rule(), refresh_every=2, dimension_numbers=lro.STACKED)
    update = jax.jit(tx.update)
    state: Any = tx.init(tree_of(0))
    updates: Any = None
    spoiled = [
        ("w", (0, 0), np.nan),
        ("w", (M - 1, N - 1), np.inf),
        ("tall", (1, N - 1, 2), -np.inf),
        ("b", 3, np.nan),
        ("s", (), np.inf),
    ]
    skipped = 0
    for t in range(5):  # steps 0, 2 and 4 are due for a refresh
        for leaf, where, value in spoiled:
            g = tree_of(t)
            g[leaf][where] = value
            updates, after = update(g, state)
            skipped += 1
            for name, u in updates.items():
                np.testing.assert_array_equal(u, np.zeros_like(u), err_msg=name)
            assert (int(after.count), int(after.skipped)) == (t, skipped)
            assert_same_bits(after.inner_state, state.inner_state)
            state = after
        updates, state = update(tree_of(t), state)
        assert all(np.any(u != 0) for u in updates.values())
        assert int(state.count) == t + 1
    # As if the bad steps had not been: the refreshes came with the next good ones.
    clean: Any = tx.init(tree_of(0))
    expected: Any = None
    for t in range(5):
        expected, clean = update(tree_of(t), clean)
    assert_same_bits(state.inner_state, clean.inner_state)
    assert_same_bits(updates, expected)


@pytest.mark.parametrize("where", [(0, 0), (R, 1), (M - 1, N - 1)])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_no_entry_hides(where, value):
    """Also where the basis is zero: it is finiteness of G~ that is looked at."""
    tx = CHAINS["fira"](lro.bases.replay({"w": jnp.eye(M, R)[None]}))
    g = {"w": gradients(M, N)[0]}
    g["w"][where] = value
    updates, state = jax.jit(tx.update)(g, tx.init(g))
    assert int(state.skipped) == 1
    np.testing.assert_array_equal(updates["w"], 0)


@pytest.mark.parametrize(
    "make",
    [
        lambda **k: lro.galore(0.1, basis=lro.sara_sample(0), **k),
        lambda **k: lro.fira(0.1, **k),
        lambda **k: lro.grass_walk(0.1, key=0, **k),
        lambda **k: lro.grass_jump(0.1, key=0, **k),
    ],
    ids=["galore", "fira", "grass_walk", "grass_jump"],
)
def test_named_optimizers_skip_a_bad_step(make):
    tx = make(rank=R, refresh_every=2, dimension_numbers=lro.STACKED)
    params, bad = tree_of(0), tree_of(1)
    bad["w"][2, 2] = np.nan
    state = tx.init(params)
    updates, state = jax.jit(tx.update)(bad, state, params)
    for u in updates.values():
        np.testing.assert_array_equal(u, np.zeros_like(u))
    assert optax.tree.get(state, "skipped") == 1
    updates, state = jax.jit(tx.update)(tree_of(1), state, params)
    assert all(np.isfinite(u).all() and np.any(u != 0) for u in updates.values())


# --- chains that lack a stage ---


def update_with(*stages):
    g = {"mlp": {"kernel": jnp.ones((M, N))}, "b": jnp.ones(3)}
    tx = lro.low_rank(optax.chain(*stages), rank=R, refresh_every=1)
    return tx.update(g, tx.init(g))


WHERE, ADAM = lro.dominant_svd(), lro.in_subspace(optax.scale_by_adam())


@pytest.mark.parametrize(
    ("stages", "fix"),
    [
        ([lro.project(), ADAM, lro.project_back()], "put a basis rule such as"),
        ([WHERE, ADAM, lro.project_back()], r"put project\(\) before"),
        ([ADAM, WHERE, lro.project(), lro.project_back()], r"put project\(\) before"),
        (
            [WHERE, lro.project(), lro.project_back()],
            r"put in_subspace\(\) or rotate_moments\(\) before",
        ),
        (
            [WHERE, lro.project(), lro.recover_residual()],
            r"put in_subspace\(\) or rotate_moments\(\) before",
        ),
        (
            [WHERE, lro.project(), ADAM],
            r"put project_back\(\) or another way back before",
        ),
        ([WHERE], r"put project_back\(\) or another way back before"),
    ],
)
def test_a_stage_that_is_missing(stages, fix):
    with pytest.raises(ValueError, match=f"mlp/kernel: the Frame has no .*{fix}"):
        update_with(*stages)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lro.grass_walk(0.1, rank=2, refresh_every=5), "pass either key"),
        (lambda: lro.grass_jump(0.1, rank=2, refresh_every=5), "pass either key"),
        (
            lambda: lro.grass_walk(
                0.1, rank=2, refresh_every=5, key=0, basis=lro.sara_sample(0)
            ),
            "pass either key",
        ),
        (lambda: lro.grass_walk(0.1, rank=0, refresh_every=5, key=0), "at least 1"),
        (lambda: lro.galore(0.1, rank=2, refresh_every=0), "refresh_every must be"),
    ],
)
def test_named_optimizers_with_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_unknown_variant():
    for make in (lro.galore, lro.fira):
        arguments: dict[str, Any] = {"variant": "torch"}
        with pytest.raises(ValueError, match="variant='torch': choose \"paper\" or"):
            make(0.1, rank=2, refresh_every=5, **arguments)


def test_named_optimizers_name_the_parameter_they_cannot_place():
    params = {"stem": {"kernel": jnp.ones((3, 3, 4, 8))}}
    tx = lro.galore(0.1, rank=2, refresh_every=5)
    with pytest.raises(ValueError, match=r"stem/kernel \(3, 3, 4, 8\): its name"):
        tx.init(params)
    params = {"attn": {"kernel": jnp.ones((8, 2, 4))}}
    with pytest.raises(ValueError, match=r"attn/kernel \(8, 2, 4\): its name"):
        tx.init(params)


@pytest.mark.parametrize("variant", ["paper", "published"])
def test_a_skipped_step_neither_decays_weights_nor_moves_the_schedule(variant):
    """In a named optimizer what follows the bracket skips with it."""
    tx = lro.galore(
        optax.linear_schedule(1.0, 0.0, 9),
        rank=2,
        refresh_every=2,
        weight_decay=0.1,
        dimension_numbers=None,
        variant=variant,
    )
    params = {"w": jnp.ones((4, 6)), "b": jnp.ones(3)}
    _, state = tx.update(params, tx.init(params), params)
    poisoned = {"w": params["w"], "b": jnp.array([1.0, jnp.nan, 1.0])}
    updates, skipped = tx.update(poisoned, state, params)
    assert not any(jnp.any(u != 0) for u in jax.tree.leaves(updates))
    assert skipped[0].skipped == 1
    same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), skipped[1], state[1])
    assert jax.tree.leaves(same)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("before", [optax.zero_nans(), optax.clip(1.0)])
def test_a_stage_cannot_hide_a_gradient_that_is_not_finite(
    before: Any, value: float
) -> None:
    tx = lro.low_rank(
        optax.chain(
            lro.steps.in_full_space(before),
            lro.dominant_svd(),
            lro.project(),
            lro.in_subspace(optax.identity()),
            lro.project_back(),
        ),
        rank=2,
        refresh_every=1,
    )
    grads = {"w": jnp.ones((4, 6)).at[1, 2].set(value)}
    updates, state = tx.update(grads, tx.init(grads))
    assert (int(state.count), int(state.skipped)) == (0, 1)
    assert not np.any(updates["w"])
