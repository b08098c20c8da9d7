"""Methods without a subspace, their bracket, and who steps on what."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import lowrank_optax as lro
from lowrank_optax.full_rank.row_column import fitted
from tests.helpers.numpy_reference import Rules, adamw

Array = NDArray[np.float64]
STEPS, RATE, DECAY = 7, 0.1, 0.05
SHAPES = {
    "wide": (4, 7),
    "tall": (6, 3),
    "square": (5, 5),
    "layers": (3, 4, 6),
    "head": (4, 9),
    "norm": (4,),
}
RULES = [("norm", None), ("layers", lro.STACKED), ("", "matrix")]
few = settings(derandomize=True, deadline=None, max_examples=10)


def tree_of(seed: int) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {k: random.normal(size=s) for k, s in SHAPES.items()}


def weights_of(tx: Any, grads: list[dict[str, Array]]) -> list[dict[str, Array]]:
    """The weights after each step, in float64."""
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, tree_of(0))
        state, update, out = tx.init(params), jax.jit(tx.update), []
        for grad in grads:
            updates, state = update(jax.tree.map(jnp.asarray, grad), state, params)
            params = optax.apply_updates(params, updates)
            out.append(jax.tree.map(np.asarray, params))
    return out


def racs(w: Array, grads: list[Array]) -> list[Array]:
    """Algorithm 1, with m <= n, and of a square matrix the inputs as rows."""
    turned = w.shape[0] > w.shape[1]
    rows = columns = last = s = 0.0
    out = []
    for t, full in enumerate(grads):
        g = full.T if turned else full
        q = np.ones(len(g))
        for _ in range(5):
            s = np.diag(g.T @ np.diag(q) @ g) / np.linalg.norm(np.diag(q)) ** 2
            q = np.diag(g @ np.diag(s) @ g.T) / np.linalg.norm(np.diag(s)) ** 2
        rows, columns = 0.9 * rows + 0.1 * q, 0.9 * columns + 0.1 * s
        step = np.diag(rows**-0.5) @ g @ np.diag(columns**-0.5)
        size = float(np.linalg.norm(step))
        step = step * (1.01 / max(size / last, 1.01) if t else 1.0)
        last = float(np.linalg.norm(step))
        w = w - RATE * (0.05 * (step.T if turned else step) + DECAY * w)
        out.append(w)
    return out


def scale(momentum: float) -> Callable[[Array, list[Array]], list[Array]]:
    """Weights are (inputs, outputs)."""

    def steps(w: Array, grads: list[Array]) -> list[Array]:
        m, out = np.zeros_like(w), []
        for g in grads:
            m = momentum * m + (1 - momentum) * g
            step = np.stack([x / np.sqrt(np.mean(x**2)) for x in m.T], axis=1)
            w = w - RATE * (step + DECAY * w)
            out.append(w)
        return out

    return steps


def sinkhorn(w: Array, grads: list[Array]) -> list[Array]:
    """Algorithm 3, with m <= n, and of a square matrix the inputs as rows."""
    turned = w.shape[0] > w.shape[1]
    out = []
    for full in grads:
        x = full.T if turned else full
        m, n = x.shape
        for _ in range(5):
            x = np.sqrt(n) * np.diag(1 / np.linalg.norm(x, axis=1)) @ x
            x = np.sqrt(m) * x @ np.diag(1 / np.linalg.norm(x, axis=0))
        w = w - RATE * (0.05 * (x.T if turned else x) + DECAY * w)
        out.append(w)
    return out


def stable_spam(w: Array, grads: list[Array]) -> list[Array]:
    """AdaClip, AdaGN and Adam, whose moments begin anew after three steps."""
    largest = norm = square = m = v = np.float64(0)
    out = []
    for t, g in enumerate(grads, 1):
        top = np.abs(g).max()
        largest = 0.999 * largest + 0.001 * top
        threshold = largest / (1 - 0.999**t)
        clipped = np.where(np.abs(g) > threshold, g / top * threshold, g)
        size = np.linalg.norm(clipped)
        norm, square = 0.7 * norm + 0.3 * size, 0.9 * square + 0.1 * size**2
        root = np.sqrt(square / (1 - 0.9**t))
        g = clipped / size * norm / (1 - 0.7**t) / root
        if (since := (t - 1) % 3 + 1) == 1:
            m = v = np.float64(0)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        step = m / (1 - 0.9**since) / (np.sqrt(v / (1 - 0.999**since)) + 1e-8)
        w = w - RATE * (step + DECAY * w)
        out.append(w)
    return out


def full_rank(w: Array, grads: list[Array]) -> list[Array]:
    return adamw(w, grads, Rules(lambda _: RATE, 1, weight_decay=DECAY))


COMMON: dict[str, Any] = {"weight_decay": DECAY, "dimension_numbers": RULES}
METHODS: dict[str, tuple[Any, Any]] = {
    "racs": (lro.recipes.racs(RATE, **COMMON), lambda name: racs),
    "scale_sgd": (
        lro.recipes.scale_sgd(RATE, **COMMON),
        lambda name: scale(0.9 if name == "head" else 0.0),
    ),
    "sink_gd": (lro.recipes.sink_gd(RATE, **COMMON), lambda name: sinkhorn),
    "stable_spam": (
        lro.recipes.stable_spam(RATE, restart=3, **COMMON),
        lambda name: stable_spam,
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_step_is_the_sources_in_float64(name: str) -> None:
    tx, rendering = METHODS[name]
    grads = [tree_of(t + 1) for t in range(STEPS)]
    found = weights_of(tx, grads)
    for leaf, start in tree_of(0).items():
        rest = leaf == "norm" and name != "stable_spam"
        steps = full_rank if rest else rendering(leaf)
        own, ours = [g[leaf] for g in grads], np.stack([x[leaf] for x in found])
        if leaf == "layers":
            layers = range(len(start))
            each = [steps(start[i], [g[i] for g in own]) for i in layers]
            expected = np.stack(each, axis=1)
        else:
            expected = np.stack(steps(start, own))
        np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-11, err_msg=leaf)


def test_a_square_matrix_begins_with_the_side_that_is_named() -> None:
    grads = [tree_of(t + 1) for t in range(3)]
    names = ("input", "output")
    a, b = (
        weights_of(lro.recipes.racs(RATE, square=n, **COMMON), grads) for n in names
    )
    assert not np.allclose(a[-1]["square"], b[-1]["square"], atol=1e-6)
    np.testing.assert_array_equal(a[-1]["tall"], b[-1]["tall"])
    turned = [{**g, "square": g["square"].T} for g in grads]
    c = weights_of(lro.recipes.racs(RATE, dimension_numbers=RULES), turned)
    d = weights_of(
        lro.recipes.racs(RATE, dimension_numbers=RULES, square="output"), grads
    )
    start = tree_of(0)["square"]
    np.testing.assert_allclose(
        (c[-1]["square"] - start).T, d[-1]["square"] - start, atol=1e-12
    )


# ------------------------------------------------------------------ invariances


def step_of(tx: Any, grads: Any) -> Any:
    """The updates of each step of one matrix."""
    state, out, params = tx.init(grads[0]), [], jnp.zeros_like(grads[0])
    for g in grads:
        updates, state = tx.update(jnp.asarray(g), state, params)
        out.append(np.asarray(updates))
    return np.stack(out)


@few
@given(
    seed=st.integers(0, 2**32 - 1),
    log_size=st.floats(-15, 15),
    sign=st.sampled_from([-1.0, 1.0]),
    tall=st.booleans(),
)
@pytest.mark.parametrize(
    "make", [lro.recipes.racs, lro.recipes.scale_sgd, lro.recipes.sink_gd]
)
def test_a_step_has_the_gradients_sign_and_not_its_size(
    make: Any, seed: int, log_size: float, sign: float, tall: bool
) -> None:
    g = np.random.default_rng(seed).normal(size=(3, 4, 6)).astype(np.float32)
    g = np.swapaxes(g, 1, 2) if tall else g
    tx: Any = make(1.0, dimension_numbers=None)
    factor = np.float32(sign * 10**log_size)
    np.testing.assert_allclose(
        sign * step_of(tx, factor * g), step_of(tx, g), rtol=1e-4, atol=1e-5
    )


def test_rows_and_columns_of_any_size_are_evened_out() -> None:
    """A rank-one pattern of sizes is taken off: what is left are the signs."""
    random = np.random.default_rng(0)
    signs = np.sign(random.normal(size=(6, 9)))
    sizes = np.outer(10.0 ** random.uniform(-3, 3, 6), 10.0 ** random.uniform(-3, 3, 9))
    for stage in (
        lro.full_rank.scale_by_racs(limit=1e9, decay=0.0),
        lro.full_rank.normalize_by_sinkhorn(),
    ):
        tx: Any = lro.full_rank.full_matrices(stage)
        found = step_of(tx, [np.float32(signs * sizes)])[0]
        np.testing.assert_allclose(found, signs, rtol=1e-4)


def test_the_fit_is_the_leading_singular_pair_of_the_squares() -> None:
    g = np.random.default_rng(1).normal(size=(2, 5, 8)).astype(np.float32)
    q, s = map(np.asarray, fitted(jnp.asarray(g), 50))
    for i in range(2):
        u, sigma, vt = np.linalg.svd(np.float64(g[i]) ** 2)
        np.testing.assert_allclose(
            np.outer(q[i], s[i]), sigma[0] * np.outer(u[:, 0], vt[0]), rtol=1e-4
        )


# ------------------------------------------------------------------ zeros


@pytest.mark.parametrize(
    "make", [lro.recipes.racs, lro.recipes.scale_sgd, lro.recipes.sink_gd]
)
def test_zero_gradients_rows_and_columns_move_nothing(make: Any) -> None:
    g = np.random.default_rng(0).normal(size=(5, 4, 6)).astype(np.float32)
    g[:, 2] = 0
    g[:, :, 3] = 0
    g[0] = g[3] = 0
    found = step_of(make(1.0, dimension_numbers=None), g)
    assert np.isfinite(found).all()
    assert not found[[0, 3]].any()
    assert not found[:, 2].any()
    assert not found[:, :, 3].any()
    others = np.delete(np.delete(found[[1, 2, 4]], 2, axis=1), 3, axis=2)
    assert (others != 0).all()


def test_sinkhorn_takes_rows_whose_squares_underflow() -> None:
    g = np.random.default_rng(0).normal(size=(1, 4, 6)).astype(np.float32)
    tx: Any = lro.recipes.sink_gd(1.0, dimension_numbers=None)
    small = g * np.float32([[1], [1e-25], [1e15], [1]])
    # A factor on a row is taken off again, up to rounding of the five iterations.
    np.testing.assert_allclose(step_of(tx, small), step_of(tx, g), rtol=1e-4)


def test_a_zero_gradient_binds_no_later_step() -> None:
    g = np.random.default_rng(0).normal(size=(3, 4, 6)).astype(np.float32)
    tx: Any = lro.recipes.racs(1.0, dimension_numbers=None)
    without = step_of(tx, g)
    with_zeros = step_of(tx, np.stack([0 * g[0], g[0], 0 * g[0], g[1], g[2]]))
    np.testing.assert_array_equal(with_zeros[[1, 3, 4]], without)


# ------------------------------------------------------------------ who steps on what


def test_momentum_is_kept_where_it_is_asked_for_and_nowhere_else() -> None:
    params = {"head": {"kernel": jnp.ones((4, 9))}, "mlp": jnp.ones((4, 6))}
    state = lro.recipes.scale_sgd(RATE, b1=0.5).init(params)
    momentum = optax.tree.get(state, "momentum")
    assert momentum["head"]["kernel"].shape == (4, 9)
    assert momentum["mlp"].dtype == bool
    with pytest.raises(ValueError, match=r"'\(' is not a regular expression"):
        lro.full_rank.trace_matching("(")


def test_an_embedding_is_normalised_over_its_tokens() -> None:
    g = {"embedding": np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)}
    tx: Any = lro.recipes.scale_sgd(1.0)
    updates, _ = tx.update(g, tx.init(g), g)
    size = np.sqrt(np.mean(np.square(updates["embedding"]), axis=0))
    np.testing.assert_allclose(size, 1, rtol=1e-5)


def test_each_leaf_has_one_optimizer() -> None:
    """As if the two had been given their leaves alone."""
    stages = optax.chain(
        lro.dominant_svd(),
        lro.project(),
        lro.in_subspace(optax.scale_by_adam(0.5)),
        lro.project_back(),
    )
    tree = {"w": jnp.ones((4, 6)), "v": jnp.ones(3)}

    def bracket(inner: Any) -> Any:
        return lro.low_rank(inner, rank=2, refresh_every=2)

    def run(tx: Any, pick: Any) -> list[Any]:
        state, out = tx.init(pick(tree)), []
        for t in range(4):
            random = np.random.default_rng(t)
            g = jax.tree.map(
                lambda x, r=random: jnp.asarray(r.normal(size=x.shape)), tree
            )
            updates, state = tx.update(pick(g), state, pick(tree))
            out.append(updates)
        return out

    lion = optax.chain(optax.add_decayed_weights(0.1), optax.scale_by_lion())
    both = run(bracket(lro.steps.with_rest(stages, lion)), lambda x: x)
    low = run(bracket(stages), lambda x: {"w": x["w"]})
    rest = run(lion, lambda x: {"v": x["v"]})
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6)
    for found, *others in zip(both, low, rest, strict=True):
        expected = {**others[0], **others[1]}
        # Float32 rounding: the programs add up in another order.
        jax.tree.map(close, found, expected)


def test_a_stage_of_whole_matrices_has_no_subspace() -> None:
    g = {"w": jnp.ones((6, 4)), "v": jnp.ones(3)}
    tx: Any = lro.full_rank.full_matrices(lro.project_back())
    with pytest.raises(ValueError, match=r"w: the Frame has no `low_step` yet"):
        tx.update(g, tx.init(g))
    seen = []

    def look(frames: Any, _: Any) -> Any:
        seen.append(frames["w"])
        return lro.stages.map_frames(lambda f: f.replace(step=2 * f.gradient), frames)

    tx = lro.full_rank.full_matrices(optax.stateless(look))
    updates, state = tx.update(g, tx.init(g), refresh=True)
    assert seen[-1].gradient.shape == (4, 6)
    assert seen[-1].full_rank
    np.testing.assert_array_equal(updates["w"], 2 * g["w"])
    assert (int(state.count), int(state.refreshes)) == (1, 0)


def test_bad_numbers_of_iterations() -> None:
    bad: Any
    for bad in (0, -1, 2.5):
        with pytest.raises(ValueError, match="iterations must be an int of at least 1"):
            lro.recipes.racs(0.1, iterations=bad)
