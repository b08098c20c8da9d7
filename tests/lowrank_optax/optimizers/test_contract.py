"""What every optimizer promises, alone and among optax's own parts."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import lowrank_optax as lro
from tests.helpers.battery import (
    ADAM_8BIT,
    ALL,
    CODE,
    EVERY,
    KINDS,
    RATE,
    TOLERANCE,
    WRAPPED,
    _run,
    build,
    close,
    compiled,
    full_tree,
    gradients,
    options_of,
    paths,
    plain,
    raw_keys,
    run,
    stack,
    tree_of,
    types,
    unstack,
    zeros,
)
from tests.helpers.marks import slow_but
from tests.helpers.stages import normal


def test_every_named_optimizer_is_here() -> None:
    public = [getattr(lro, name) for name in lro.__all__]
    recipes = [getattr(lro.recipes, name) for name in lro.recipes.__all__]
    named = {
        f.__name__
        for f in [*public, *recipes]
        if inspect.isfunction(f) and "learning_rate" in inspect.signature(f).parameters
    }
    # The assembly that they are made by is no method.
    assert named == {"low_rank_optimizer", *(make.__name__ for make, _ in ALL.values())}


@pytest.mark.parametrize("name", slow_but(KINDS, ALL))
def test_the_state_of_a_model(name: str) -> None:
    """One `init` for what a state must be, and steps that keep it as it was."""
    tx, params = build(name), full_tree()
    state = tx.init(params)
    check_params_are_found(tx, state)
    check_map_params_takes_trees(tx, params, state)
    check_no_array_is_there_twice(state)
    check_steps_keep_the_state_and_compile_once(tx, params, state)
    check_shapes_and_dtypes(name, types(state))


def check_params_are_found(tx: Any, state: Any) -> None:
    """By optax, in the state."""
    same = optax.tree.map_params(tx, lambda x: x, state)
    assert jax.tree.structure(same) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, *map(raw_keys, (same, state)))
    marked = paths(optax.tree.map_params(tx, lambda _: "of a parameter", state))
    of_parameters = {path for path, x in marked.items() if isinstance(x, str)}
    leaves = ("embedding", "layers/kernel", "matrix", "vector")
    named = {path for path in marked if any(f"/{x}" in path for x in leaves)}
    assert of_parameters == named
    assert {x for x in leaves if any(f"/{x}" in path for path in named)} == {*leaves}


def check_map_params_takes_trees(tx: Any, params: Any, state: Any) -> None:
    """Trees like the parameters, beside the state."""
    shapes = {path: x.shape for path, x in paths(params).items()}
    specs = jax.tree_util.tree_map_with_path(
        lambda keys, _: PartitionSpec(jax.tree_util.keystr(keys)), params
    )
    calls = []

    def spec_of(x: jax.Array, parameter: jax.Array, spec: PartitionSpec) -> Any:
        calls.append((id(x), parameter.shape, spec))
        return spec

    def other(_: Any) -> PartitionSpec:
        return PartitionSpec("not a parameter's")

    out = optax.tree_map_params(
        tx, spec_of, state, params, specs, transform_non_params=other
    )
    assert jax.tree.structure(out) == jax.tree.structure(state)
    marked, expected = paths(out), []
    for path, x in paths(state).items():
        found = [p for p in shapes if f"/{p}" in path]
        if found:
            spec = paths(specs)[found[0]]
            expected.append((id(x), shapes[found[0]], spec))
        assert marked[path] == (spec if found else other(x)), path
    assert sorted(calls, key=str) == sorted(expected, key=str)


def check_no_array_is_there_twice(state: Any) -> None:
    """So that it can be donated."""
    arrays = [id(x) for x in jax.tree.leaves(state)]
    assert len(set(arrays)) == len(arrays)


def check_steps_keep_the_state_and_compile_once(
    tx: Any, params: Any, state: Any
) -> None:
    traces = []

    @jax.jit
    def update(grad: Any, state: Any) -> tuple[Any, Any]:
        traces.append(1)
        return tx.update(grad, state, params)

    before = types(state)
    for grad in gradients(2 * EVERY + 1, full_tree):  # refreshes at 0, 3 and 6
        updates, state = update(grad, state)
        assert types(state) == before
        assert types(updates) == types(grad)
        assert updates["frozen"] is None
        assert all(np.any(np.asarray(u)) for u in jax.tree.leaves(updates))
    assert len(traces) == 1
    assert int(optax.tree.get(state, "skipped")) == 0


def check_shapes_and_dtypes(name: str, concrete: Any) -> None:
    """Updates have the gradients' dtype, state is wide, and shapes suffice for both."""
    for weights, grads in (
        ("bfloat16", "bfloat16"),
        ("bfloat16", "float32"),
        ("float32", "bfloat16"),
        ("float64", "float64"),
    ):
        with jax.enable_x64(weights == "float64"):
            check_dtypes(name, weights, grads)
    # Of all leaves, where there is an array to compare each with.
    assert types(check_dtypes(name, "float32", "float32", full_tree())) == concrete
    check_dtypes(name, "float32", "bfloat16", weight_decay=0.1)


def check_dtypes(
    name: str, weights: str, grads: str, tree: Any = None, **options: Any
) -> Any:
    tree = tree_of() if tree is None else tree

    def abstract(dtype: str) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), tree
        )

    tx = build(name, **options)
    state = jax.eval_shape(tx.init, abstract(weights))
    updates, after = jax.eval_shape(
        tx.update, abstract(grads), state, abstract(weights)
    )
    assert types(updates) == types(abstract(grads))
    assert types(after) == types(state)
    floats = {
        path: x.dtype.name
        for path, x in paths(state).items()
        if jnp.issubdtype(x.dtype, jnp.floating)
    }
    lazy = {path: floats.pop(path) for path in [*floats] if "/similarities/" in path}
    assert {*lazy.values()} <= {"float32"}  # a statistic, whatever the weights are
    assert {*floats.values()} == {"float64" if weights == "float64" else "float32"}
    return state


# Adam's moments, two other steps, an error that is fed back, a basis that is trained.
WIDTHS = ["grass_walk", "galore_adafactor", "q_galore", "ldadam", "apollo"]
WIDTHS += ["online_subspace_descent"]


@pytest.mark.parametrize("name", slow_but(WIDTHS, ALL))
def test_leaves_without_numbers_and_of_two_widths(name: str) -> None:
    """Each leaf's dtype is its own."""
    with jax.enable_x64(True):
        tx = build(name, dimension_numbers=None)
        params = {
            "a": normal(4, 6),
            "b": jnp.asarray(normal(4, 6), jnp.float64),
            "c": normal(3),
            "d": jnp.asarray(normal(3), jnp.float64),
            "empty": jnp.zeros((3, 0), jnp.float32),
            "none": jnp.zeros((0, 4), jnp.float64),
        }
        state = jax.eval_shape(lambda tree: tx.init(tree), params)
        updates, after = jax.eval_shape(tx.update, params, state, params)
    dtypes = [u.dtype.name for u in updates.values()]
    assert dtypes == ["float32", "float64"] * 3
    assert updates["none"].shape == (0, 4)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.dtype, b.dtype), state, after)


@pytest.mark.parametrize("name", slow_but(KINDS, ALL))
def test_one_huge_gradient_does_not_end_the_run(name: str) -> None:
    """Finite, but V is not: weights were NaN then, or at the next refresh."""
    tx, update = compiled(name)
    params = {"matrix": normal(4, 6), "vector": normal(3), "frozen": None}
    start = tx.init(params)
    for size in (1e17, 1e19, 1e20, 1e30, 3e38):
        survives(update, params, start, size)


def survives(update: Any, params: Any, state: Any, size: float) -> None:
    updates = params
    for t in range(8):
        matrix, vector = normal(4, 6, seed=t), normal(3, seed=t)
        if t == 3:
            matrix = matrix.at[1, 2].set(size)
        if t == 5:
            vector = vector.at[1].set(-size)
        grads = {"matrix": matrix, "vector": vector, "frozen": None}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        assert np.isfinite(params["matrix"]).all()
        assert np.isfinite(params["vector"]).all()
    assert np.any(updates["matrix"])
    floats = [
        x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    assert all(np.isfinite(x).all() for x in floats)


def full_rank(name: str) -> optax.GradientTransformation:
    """What the optimizer is for leaves of full rank."""

    def after(*stages: optax.GradientTransformation) -> optax.GradientTransformation:
        end = optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(RATE)
        return optax.chain(*stages, *end)

    def decay_last(u: jax.Array, w: jax.Array) -> jax.Array:
        return u - RATE * 0.1 * (w + u)

    momentum = optax.ema(0.9, debias=False)
    second = optax.scale_by_factored_rms()  # Adafactor's, unfactored for vectors
    if name.endswith("adafactor"):
        return after(second, optax.clip_by_block_rms(1.0), momentum)
    if name.endswith("adam_mini"):
        return after(lro.steps.scale_by_adam_mini())
    if name.endswith("8bit"):
        return after(ADAM_8BIT)
    if name.endswith("published"):
        return optax.chain(
            optax.adam(RATE, eps=1e-30),
            optax.stateless(lambda us, ws: jax.tree.map(decay_last, us, ws)),
        )
    others = {
        "msgd": after(momentum),
        "flora": after(second, momentum),
        "ldadam": optax.adamw(RATE, 0.908, 0.99, weight_decay=0.1),
        "spectral_adam": optax.adamw(RATE, 0.908, 0.99, weight_decay=0.1),
        "coap": optax.adamw(RATE, eps=1e-6, weight_decay=0.1),
        "lora_pre": optax.adamw(RATE, 0.9, 0.95, weight_decay=0.1),
        "stable_spam": after(
            lro.full_rank.stabilize_gradient(dimension_numbers=[("", None)]),
            lro.steps.restart_every(optax.scale_by_adam(), EVERY),
        ),
    }
    return others.get(name, optax.adamw(RATE, weight_decay=0.1))


# One of each kind of step that `full_rank` tells apart.
STEPS = ["galore_published", "msgd", "flora", "spectral_adam", "coap"]


@pytest.mark.parametrize("name", slow_but([*KINDS, *STEPS], ALL))
def test_trees_without_a_matrix_get_the_full_rank_optimizer(name: str) -> None:
    params = {"vector": jnp.arange(3.0), "frozen": None, "scalar": jnp.ones([])}
    grads = [jax.tree.map(lambda x, k=k: x - k, params) for k in (0.5, 1.5, -3.5)]
    options, tolerance = {}, 1e-6  # the same operations
    if name.endswith("published"):
        # Bias correction on the step size: eps does not do the same, and what optax
        # corrects by is rounded.
        options, tolerance = {"eps": 1e-30}, TOLERANCE
    tx = build(name, weight_decay=0.1, **options)
    ours, theirs = run(tx, grads, params)[0], run(full_rank(name), grads, params)[0]
    close(ours, theirs, atol=tolerance * RATE)
    updates, state = tx.update({}, tx.init({}), {})
    assert updates == {}
    assert int(optax.tree.get(state, "skipped")) == 0


@pytest.mark.parametrize("name", KINDS)
def test_all_of_optax_around_it_in_one_scan(name: str) -> None:
    """Clipping, apply_if_finite, partition (so masked), MultiSteps, a schedule, extra
    arguments, cond and scan; one wrapper at a time below."""
    scheduled = build(name, learning_rate=lambda count: RATE / (1.0 + count))
    many = optax.MultiSteps(scheduled, 2)
    # Its own gradient_transformation() takes no extra arguments.
    low = optax.GradientTransformationExtraArgs(many.init, many.update)
    labels = {"matrix": "low", "vector": "low", "frozen": None, "other": "sgd"}
    parts = optax.partition({"low": low, "sgd": optax.sgd(1.0)}, labels)
    tx = optax.chain(optax.clip_by_global_norm(0.5), optax.apply_if_finite(parts, 3))
    grads = [{**g, "other": jnp.ones(2) * t} for t, g in enumerate(gradients(10))]
    params = {**tree_of(), "other": jnp.ones(2)}
    bad = {**grads[0], "matrix": grads[0]["matrix"].at[1, 2].set(jnp.nan)}
    steps = [*grads[:3], bad, *grads[3:5], bad, *grads[5:]]
    taken = jnp.arange(len(steps)) != 6  # the second bad one

    @jax.jit
    def scan(state: Any) -> Any:
        def body(state: Any, x: Any) -> Any:
            grad, take = x
            updates, state = jax.lax.cond(
                take,
                lambda s: tx.update(grad, s, params, value=1.0, unheard_of={"a": 2.0}),
                lambda s: (optax.tree.zeros_like(grad), s),
                state,
            )
            return state, updates

        return jax.lax.scan(body, state, (stack(steps), taken))

    state, out = scan(tx.init(params))
    out = unstack(out, len(steps))
    zeros([out[3], out[6]])
    out = out[:3] + out[4:6] + out[7:]
    assert int(optax.tree.get(state, "total_notfinite")) == 1
    assert int(optax.tree.get(state, "skipped")) == 0  # the wrappers were there first

    clipped = [
        jax.tree.map(lambda x, g=g: x * 0.5 / optax.tree.norm(g), g) for g in grads
    ]
    close([u.pop("other") for u in out], [-g.pop("other") for g in clipped])
    zeros(out[::2])
    mean = [
        jax.tree.map(lambda a, b: (a + b) / 2, *pair)
        for pair in zip(clipped[::2], clipped[1::2], strict=True)
    ]
    scaled = [
        jax.tree.map(lambda u, t=t: u / (1 + t), u)
        for t, u in enumerate(plain(name, mean))
    ]
    close(out[1::2], scaled)


@pytest.mark.parametrize("name", slow_but(KINDS, ALL))
def test_gradients_that_are_not_finite_change_nothing(name: str) -> None:
    """Without any wrapper: at a refresh, between two, in a matrix and in a vector."""
    grads = gradients(EVERY + 1)
    for leaf, at, value in (
        ("matrix", (0, 5), jnp.nan),
        ("matrix", (3, 0), -jnp.inf),
        ("vector", (1,), jnp.inf),
    ):
        bad = {**grads[0], leaf: grads[0][leaf].at[at].set(value)}
        steps = [bad, *grads[:2], bad, grads[2], bad, *grads[3:]]
        out, state = _run(*compiled(name), steps)
        zeros([out[i] for i in (0, 3, 5)])
        close([out[i] for i in (1, 2, 4, 6)], plain(name, grads), atol=0)
        assert int(optax.tree.get(state, "skipped")) == 3


# Each operation is compiled by itself.
@pytest.mark.parametrize("name", slow_but([], KINDS, slow=["q_galore"]))
def test_nothing_depends_on_jit(name: str) -> None:
    grads = gradients(EVERY + 1)
    with jax.disable_jit():
        tx = build(name)
        out, _ = _run(tx, tx.update, grads)
    close(out, plain(name, grads))


@pytest.mark.parametrize("name", KINDS)
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


# What a number is changed to; half of it where nothing is said.
CHANGED = {"eps": 1.0, "weight_decay": 0.5, "threshold": 0.0, "penalty": 1.0}


def numbers_of(name: str) -> dict[str, Any]:
    """The optimizer's own numbers, those which a given step or basis replaces left."""
    make, options = options_of(name)
    replaced = {"b1", "b2", "eps"} if "step" in options else set()
    replaced |= {"angle"} if "basis" in options else set()
    replaced |= {key for key, value in options.items() if value is None}
    default_eps = 1e-6 if "variant" in options else 1e-8
    numbers = {}
    for key, parameter in inspect.signature(make).parameters.items():
        if key not in {*lro.static_args(make), *replaced}:
            value = options.get(key, parameter.default)
            if value is None and key != "eps":  # what None leaves out, such as NorMuon
                continue
            numbers[key] = default_eps if key == "eps" and value is None else value
    return numbers


@functools.cache
def injected(name: str) -> tuple[Any, Any]:
    make, options = options_of(name, **numbers_of(name))
    tx = optax.inject_hyperparams(make, static_args=lro.static_args(make))(**options)
    return tx, jax.jit(tx.update)


@pytest.mark.parametrize("name", slow_but(KINDS, ALL))
def test_inject_hyperparams_changes_nothing_and_makes_all_schedulable(
    name: str,
) -> None:
    (tx, update), numbers, params = injected(name), numbers_of(name), tree_of()
    # Enough refreshes for q_galore to pass one over.
    grads = gradients(8 * EVERY if "threshold" in numbers else 2 * EVERY + 1)

    def changed(**values: float) -> tuple[list[Any], Any]:
        state: Any = tx.init(params)
        for key, value in values.items():
            state.hyperparams[key] = jnp.full_like(state.hyperparams[key], value)
        out = []
        for grad in grads:
            updates, state = update(grad, state, params)
            out.append(updates)
        return out, state.inner_state

    assert {*numbers} <= {*tx.init(params).hyperparams}
    out = changed()
    # Here 1 - b is taken of a decay rate in float32: 6e-8 of 1e-3, so 6e-5 of V.
    quantised = "q_" in name or "8bit" in name
    close(out[0], plain(name, grads), atol=(CODE if quantised else 1e-3) * RATE)

    close(changed(learning_rate=2 * RATE)[0], jax.tree.map(lambda u: 2 * u, out[0]))
    before = [np.asarray(x) for x in jax.tree.leaves(raw_keys(out))]
    for key, value in numbers.items():
        to = CHANGED.get(key, value / 2)
        after = [np.asarray(x) for x in jax.tree.leaves(raw_keys(changed(**{key: to})))]
        assert any(
            np.abs(a - b).max() > 1e-3 * np.abs(a).max()
            for a, b in zip(before, after, strict=True)
        ), f"{key} does nothing"


@pytest.mark.parametrize("name", ["galore_adafactor", "q_galore", "grass_walk"])
def test_hyperparameters_follow_schedules(name: str) -> None:
    (by_hand, update), numbers, params = injected(name), numbers_of(name), tree_of()
    schedules = {k: lambda count, v=v: v * 0.9**count for k, v in numbers.items()}
    make, options = options_of(name, **schedules)
    tx = optax.inject_hyperparams(make, static_args=lro.static_args(make))(**options)
    state, scheduled = tx.init(params), jax.jit(tx.update)
    expected: Any = by_hand.init(params)
    for t, grad in enumerate(gradients(EVERY + 1)):
        ours, state = scheduled(grad, state, params)
        for key, schedule in schedules.items():
            value = jnp.full_like(expected.hyperparams[key], schedule(t))
            expected.hyperparams[key] = value
        theirs, expected = update(grad, expected, params)
        close(state.hyperparams, expected.hyperparams, 1e-6)
        close(ours, theirs, 1e-3 * RATE)


# The scan above has all of these wrappers at once, around every kind.
each_wrapped = pytest.mark.parametrize("name", slow_but(["grass_walk"], WRAPPED))


@each_wrapped
def test_multi_steps_takes_the_mean_gradients_step(name: str) -> None:
    grads = gradients()
    out, _ = run(optax.MultiSteps(build(name), 2).gradient_transformation(), grads)
    zeros(out[::2])
    mean = [
        jax.tree.map(lambda a, b: (a + b) / 2, *pair)
        for pair in zip(grads[::2], grads[1::2], strict=True)
    ]
    close(out[1::2], plain(name, mean))


@each_wrapped
def test_a_learning_rate_schedule_scales_the_update(name: str) -> None:
    scheduled = build(name, learning_rate=lambda count: RATE / (1.0 + count))
    out, _ = run(scheduled, gradients())
    scaled = [
        jax.tree.map(lambda u, t=t: u / (1 + t), u) for t, u in enumerate(plain(name))
    ]
    close(out, scaled)


@each_wrapped
def test_apply_if_finite_steps_over_a_nan(name: str) -> None:
    grads = gradients(4)
    bad = {**grads[0], "vector": grads[0]["vector"].at[1].set(jnp.nan)}
    tx = optax.apply_if_finite(build(name), max_consecutive_errors=3)
    out, state = run(tx, [grads[0], bad, *grads[1:]])
    zeros(out[1])
    close([out[0], *out[2:]], plain(name)[:4])
    assert int(state.total_notfinite) == 1
    assert int(optax.tree.get(state, "skipped")) == 0  # the wrapper was there first


@each_wrapped
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
    assert not any("vector" in path for path in paths(state))


@each_wrapped
def test_clipping_before_it_and_unknown_extra_arguments(name: str) -> None:
    tx = optax.chain(optax.clip_by_global_norm(0.5), build(name))
    grads = gradients(EVERY + 1)
    out, _ = run(tx, grads, value=jnp.ones([]), unheard_of={"a": jnp.ones(2)})
    clipped = [
        jax.tree.map(lambda x, g=g: x * 0.5 / optax.tree.norm(g), g) for g in grads
    ]
    close(out, plain(name, clipped))


def test_a_callers_key_is_not_the_states() -> None:
    key = jax.random.key(3)
    for rule in (
        lro.sara_sample(key),
        lro.bases.gaussian(key),
        lro.grassmann_jump(key),
    ):
        tx = lro.low_rank(optax.chain(rule, lro.project()), rank=2, refresh_every=1)
        assert not any(x is key for x in jax.tree.leaves(tx.init(tree_of())))
