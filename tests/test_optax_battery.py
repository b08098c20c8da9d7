"""Every optimizer among optax's own parts: wrappers, schedules, jit, scan, dtypes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro

RATE, EVERY = 0.01, 3
COMMON: dict[str, Any] = {
    "rank": 2,
    "refresh_every": EVERY,
    "dimension_numbers": [
        ("embedding", None),
        ("layers", lro.STACKED),
        ("", "matrix"),
    ],
}
SARA: dict[str, Any] = {"basis": lro.sara_sample(key=7)}
ALL = {
    "galore": (lro.galore, {}),
    "galore_sara": (lro.galore, SARA),
    "fira": (lro.fira, {}),
    "fira_sara": (lro.fira, SARA),
    "grass_walk": (lro.grass_walk, {"key": 1}),
    "grass_walk_sara": (lro.grass_walk, SARA),
    "grass_jump": (lro.grass_jump, {"key": 2}),
    "grass_jump_sara": (lro.grass_jump, SARA),
}
# A wrapper cannot see the basis rule; each optimizer and each rule is here once.
WRAPPED = ["galore_sara", "fira", "grass_walk", "grass_jump"]

# Compiling takes most of these tests' time, and a third less of it with this.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# Two compiled programs may round in another order; relative to the learning rate,
# which is about the size of an update. Bias correction multiplies by up to 1e3.
TOLERANCE = 1e-4


def build(name: str, **changes: Any) -> optax.GradientTransformationExtraArgs:
    make, options = ALL[name]
    return make(**{"learning_rate": RATE, **COMMON, **options, **changes})


def full_tree(seed: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    shapes = {"embedding": (5, 3), "matrix": (4, 6), "vector": (3,)}
    tree: dict[str, Any] = {
        k: jnp.asarray(random.normal(size=s), jnp.float32) for k, s in shapes.items()
    }
    tree["layers"] = {"kernel": jnp.asarray(random.normal(size=(2, 6, 4)), jnp.float32)}
    tree["frozen"] = None
    return tree


def tree_of(seed: int = 0) -> dict[str, Any]:
    """What compiles fast: one matrix, one vector, and a leaf that is not there."""
    tree = full_tree(seed)
    return {k: tree[k] for k in ("matrix", "vector", "frozen")}


def gradients(steps: int = 8, make: Any = tree_of) -> list[Any]:
    return [make(seed) for seed in range(100, 100 + steps)]


def run(
    tx: Any, grads: list[Any], params: Any = None, **extra_args: Any
) -> tuple[list[Any], Any]:
    """The updates of each step on constant weights, and the last state."""
    return _run(tx, jit(tx.update), grads, params, **extra_args)


def _run(
    tx: Any, jitted: Any, grads: list[Any], params: Any = None, **extra_args: Any
) -> tuple[list[Any], Any]:
    params = tree_of() if params is None else params
    update, state, out = functools.partial(jitted, **extra_args), tx.init(params), []
    for grad in grads:
        updates, state = update(grad, state, params)
        out.append(updates)
    return out, state


@functools.cache
def compiled(name: str) -> tuple[Any, Any]:
    tx = build(name)
    return tx, jit(tx.update)


def plain(name: str, grads: list[Any] | None = None) -> list[Any]:
    """The updates of the optimizer by itself."""
    return _run(*compiled(name), gradients() if grads is None else grads)[0]


def close(ours: Any, theirs: Any, atol: float = TOLERANCE * RATE) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=0, atol=atol
        )


def zeros(tree: Any) -> None:
    assert not any(np.any(np.asarray(x)) for x in jax.tree.leaves(tree))


def types(tree: Any) -> Any:
    """Shape, dtype and weak type of each leaf."""
    return jax.tree.map(jax.typeof, tree)


@pytest.mark.parametrize("name", ALL)
def test_steps_keep_the_state_as_it_was_and_compile_once(name: str) -> None:
    tx, params, traces = build(name), full_tree(), []

    @jit
    def update(grad: Any, state: Any) -> tuple[Any, Any]:
        traces.append(1)
        return tx.update(grad, state, params)

    state = tx.init(params)
    before = types(state)
    for grad in gradients(2 * EVERY + 1, full_tree):  # refreshes at 0, 3 and 6
        updates, state = update(grad, state)
        assert types(state) == before
        assert types(updates) == types(grad)
        assert updates["frozen"] is None
        assert all(np.any(np.asarray(u)) for u in jax.tree.leaves(updates))
    assert len(traces) == 1
    assert int(optax.tree.get(state, "skipped")) == 0


@pytest.mark.parametrize("name", ALL)
def test_init_and_update_work_on_shapes_alone(name: str) -> None:
    tx, params = build(name), full_tree()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    state = jax.eval_shape(tx.init, abstract)
    assert types(tx.init(params)) == types(state)
    updates, after = jax.eval_shape(tx.update, abstract, state, abstract)
    assert (types(updates), types(after)) == (types(params), types(state))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("weights", "grads"),
    [
        ("bfloat16", "bfloat16"),
        ("bfloat16", "float32"),
        ("float32", "bfloat16"),
        ("float32", "float32"),
        ("float64", "float64"),
    ],
)
def test_updates_have_the_gradients_dtype_and_state_is_wide(
    name: str, weights: str, grads: str
) -> None:
    def abstract(dtype: str) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), full_tree()
        )

    with jax.enable_x64(weights == "float64"):
        tx = build(name)
        state = jax.eval_shape(tx.init, abstract(weights))
        updates, after = jax.eval_shape(
            tx.update, abstract(grads), state, abstract(weights)
        )
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(grads)}
    assert types(after) == types(state)
    dtypes = {x.dtype for x in jax.tree.leaves(state)}
    floats = {d for d in dtypes if jnp.issubdtype(d, jnp.floating)}
    assert floats == {jnp.dtype("float64" if weights == "float64" else "float32")}


@pytest.mark.parametrize("name", ALL)
def test_optax_finds_the_parameters_in_the_state(name: str) -> None:
    tx = build(name)
    state = tx.init(tree_of())
    same = optax.tree.map_params(tx, lambda x: x, state)
    assert jax.tree.structure(same) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, *map(raw_keys, (same, state)))
    marked = optax.tree.map_params(tx, lambda _: "of a parameter", state)
    assert optax.tree.get(marked, "basis")["matrix"] == "of a parameter"
    assert optax.tree.get(marked, "mu")["vector"] == "of a parameter"
    assert not isinstance(optax.tree.get(marked, "skipped"), str)


def raw_keys(state: Any) -> Any:
    def raw(x: Any) -> Any:
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(x) if is_key else x

    return jax.tree.map(raw, state)


@pytest.mark.parametrize("name", ALL)
def test_trees_without_a_matrix_are_adamws(name: str) -> None:
    params = {"vector": jnp.arange(3.0), "frozen": None, "scalar": jnp.ones([])}
    grads = [jax.tree.map(lambda x, k=k: x - k, params) for k in (0.5, 1.5)]
    tx, adamw = build(name, weight_decay=0.1), optax.adamw(RATE, weight_decay=0.1)
    ours, theirs = run(tx, grads, params)[0], run(adamw, grads, params)[0]
    close(ours, theirs, atol=1e-6 * RATE)  # the same operations
    updates, state = tx.update({}, tx.init({}), {})
    assert updates == {}
    assert int(optax.tree.get(state, "skipped")) == 0


@pytest.mark.parametrize("name", WRAPPED)
def test_scan_and_cond_carry_the_state(name: str) -> None:
    tx, params, grads = build(name), tree_of(), gradients()
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *grads)
    taken = jnp.arange(len(grads)) != 4

    @jit
    def scan(state: Any) -> Any:
        def body(state: Any, x: Any) -> Any:
            grad, take = x
            updates, state = jax.lax.cond(
                take,
                lambda s: tx.update(grad, s, params),
                lambda s: (optax.tree.zeros_like(grad), s),
                state,
            )
            return state, updates

        return jax.lax.scan(body, state, (stacked, taken))[1]

    ours = scan(tx.init(params))
    at = [jax.tree.map(lambda u, t=t: u[t], ours) for t in range(len(grads))]
    zeros(at[4])
    close(at[:4] + at[5:], plain(name, grads[:4] + grads[5:]))


@pytest.mark.parametrize("name", WRAPPED)
def test_nothing_depends_on_jit(name: str) -> None:
    # Without a jit around the update, and without any at all.
    for jitted, steps in ((True, 1), (False, EVERY + 1)):
        tx, grads = build(name), gradients(steps)
        with jax.disable_jit(not jitted):
            out, _ = _run(tx, tx.update, grads)
        close(out, plain(name, grads))


@pytest.mark.parametrize("name", WRAPPED)
def test_bfloat16_changes_only_the_rounding_of_the_update(name: str) -> None:
    def low(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)

    def back(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    grads = [low(grad) for grad in gradients()]
    ours, _ = run(build(name), grads, low(tree_of()))
    theirs = plain(name, [back(grad) for grad in grads])
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        # The step, the rate and their product are rounded, each by 2^-8 at most.
        np.testing.assert_allclose(
            np.asarray(a, np.float32), b, rtol=3 * 2**-8, atol=TOLERANCE * RATE
        )


@pytest.mark.parametrize("name", WRAPPED)
def test_multi_steps_takes_the_mean_gradients_step(name: str) -> None:
    grads = gradients()
    out, _ = run(optax.MultiSteps(build(name), 2).gradient_transformation(), grads)
    zeros(out[::2])
    mean = [
        jax.tree.map(lambda a, b: (a + b) / 2, *pair)
        for pair in zip(grads[::2], grads[1::2], strict=True)
    ]
    close(out[1::2], plain(name, mean))


@pytest.mark.parametrize("name", WRAPPED)
def test_inject_hyperparams_changes_nothing_and_makes_all_schedulable(
    name: str,
) -> None:
    make, options = ALL[name]
    injected = optax.inject_hyperparams(make, static_args=lro.static_args(make))
    options = {"learning_rate": RATE, "scale": 0.5, **COMMON, **options}
    tx, grads, params = injected(**options), gradients(5), tree_of()
    state: Any = tx.init(params)
    out = []
    expected = {"learning_rate", "scale", "b1", "b2", "weight_decay"}
    if "grass_walk" in name:
        expected |= {"step_size", "limit"}
    assert expected <= set(state.hyperparams)

    update = jit(tx.update)
    for grad in grads:
        updates, state = update(grad, state, params)
        out.append(updates)
    # Here 1 - b is taken of a decay rate in float32: 6e-8 of 1e-3, so 6e-5 of V.
    close(out, run(make(**options), grads)[0], atol=1e-3 * RATE)

    for key, value in {"learning_rate": 0.0, "weight_decay": 0.5}.items():
        state.hyperparams[key] = jnp.full_like(state.hyperparams[key], value)
    zeros(update(grads[0], state, params)[0])


@pytest.mark.parametrize("name", ["galore", "fira", "grass_walk"])
def test_hyperparameters_follow_schedules(name: str) -> None:
    make, options = ALL[name]
    injected = optax.inject_hyperparams(make, static_args=lro.static_args(make))

    def halved(start: float) -> optax.Schedule:
        return lambda count: start * 0.5**count

    grads = gradients(3)
    schedules: dict[str, Any] = {"learning_rate": halved(RATE), "b1": halved(0.8)}
    if name == "galore":
        schedules["scale"] = halved(1.0)
    else:
        schedules["limit"] = halved(1.01)
    if name == "grass_walk":
        schedules["step_size"] = halved(0.5)
    tx = injected(**{**COMMON, **options, **schedules})
    state: Any = tx.init(tree_of())
    update, params = jit(tx.update), tree_of()
    for t, grad in enumerate(grads):
        updates, state = update(grad, state, params)
        for key, schedule in schedules.items():
            np.testing.assert_allclose(
                state.hyperparams[key], schedule(t), rtol=1e-6, err_msg=key
            )
        constants = {key: schedule(t) for key, schedule in schedules.items()}
        if t == 0:
            close(updates, run(build(name, **constants), [grad])[0][0], 1e-3 * RATE)


@pytest.mark.parametrize("name", WRAPPED)
def test_a_learning_rate_schedule_scales_the_update(name: str) -> None:
    scheduled = build(name, learning_rate=lambda count: RATE / (1.0 + count))
    out, _ = run(scheduled, gradients())
    scaled = [
        jax.tree.map(lambda u, t=t: u / (1 + t), u) for t, u in enumerate(plain(name))
    ]
    close(out, scaled)


@pytest.mark.parametrize("name", WRAPPED)
def test_apply_if_finite_steps_over_a_nan(name: str) -> None:
    grads = gradients(4)
    bad = {**grads[0], "vector": grads[0]["vector"].at[1].set(jnp.nan)}
    tx = optax.apply_if_finite(build(name), max_consecutive_errors=3)
    out, state = run(tx, [grads[0], bad, *grads[1:]])
    zeros(out[1])
    close([out[0], *out[2:]], plain(name)[:4])
    assert int(state.total_notfinite) == 1
    assert int(optax.tree.get(state, "skipped")) == 0  # the wrapper was there first


@pytest.mark.parametrize("name", WRAPPED)
def test_partition_and_masked_hand_over_their_leaves_only(name: str) -> None:
    labels = {"matrix": "low", "vector": "sgd", "frozen": None}
    tx = optax.partition({"low": build(name), "sgd": optax.sgd(1.0)}, labels)
    grads = gradients(EVERY + 1)
    out, _ = run(tx, grads)
    expected = [
        {**u, "vector": -g["vector"]} for u, g in zip(plain(name), grads, strict=False)
    ]
    close(out, expected)

    mask = {"matrix": True, "vector": False, "frozen": None}
    out, state = run(optax.masked(build(name), mask), grads)
    expected = [
        {**u, "vector": g["vector"]} for u, g in zip(plain(name), grads, strict=False)
    ]
    close(out, expected)
    assert isinstance(optax.tree.get(state, "mu")["vector"], optax.MaskedNode)


@pytest.mark.parametrize("name", WRAPPED)
def test_clipping_before_it_and_unknown_extra_arguments(name: str) -> None:
    tx = optax.chain(optax.clip_by_global_norm(0.5), build(name))
    grads = gradients(EVERY + 1)
    out, _ = run(tx, grads, value=jnp.ones([]), unheard_of={"a": jnp.ones(2)})
    clipped = [
        jax.tree.map(lambda x, g=g: x * 0.5 / optax.tree.norm(g), g) for g in grads
    ]
    close(out, plain(name, clipped))
