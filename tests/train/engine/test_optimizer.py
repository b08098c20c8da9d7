"""From a config to an optimizer: schedule, methods and bases, weight decay."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from models import LlamaConfig, init_params
from tests.helpers.marks import NIGHTLY, slow_but
from train.config.config import Config, OptimizerConfig
from train.config.methods import BASES, METHODS, ONCE, Method
from train.config.named import named
from train.config.resolve import resolve
from train.engine.optimizer import Optimizer, decayed, make_optimizer, make_schedule
from train.run.loop import kinds_of_steps

LOW_RANK = [name for name, method in METHODS.items() if method.low_rank]
# The others that have a rank store their moments at it.
PROJECT = [name for name in LOW_RANK if METHODS[name].projects]
WITHOUT = ["adamw", "muon", "racs", "scale_sgd", "sink_gd", "stable_spam"]
MODEL = LlamaConfig(64, 16, 24, num_heads=2, num_layers=2, compute_dtype="float32")


def resolved_optimizer(**fields) -> OptimizerConfig:
    return resolve(Config(optimizer=OptimizerConfig(**fields))).optimizer


def test_schedule_warms_up_linearly_and_ends_at_a_tenth():
    config = resolved_optimizer(learning_rate=0.5, warmup=0.1, final=0.1)
    rates = [float(make_schedule(config, 100)(count)) for count in range(100)]
    expected = [0.5 * (count + 1) / 10 for count in range(10)]
    expected += [
        0.5 * (0.1 + 0.45 * (1 + math.cos(math.pi * (count + 1 - 10) / 90)))
        for count in range(10, 100)
    ]
    # optax evaluates the schedule in float32.
    np.testing.assert_allclose(rates, expected, rtol=1e-5)
    assert rates[-1] == pytest.approx(0.05)


@pytest.mark.parametrize("warmup", [0, 3])
def test_stable_schedules_keep_the_peak_and_wsd_falls_in_a_straight_line(warmup):
    rise = [(i + 1) / warmup for i in range(warmup)]
    stable = [1.0] * (8 - warmup)
    for fields, end in (
        ({"schedule": "constant"}, [1.0] * 4),
        ({"schedule": "wsd", "decay": 4, "final": 0.2}, [0.8, 0.6, 0.4, 0.2]),
        ({"schedule": "wsd", "decay": 0}, [1.0] * 4),
    ):
        config = resolved_optimizer(learning_rate=0.3, warmup=warmup, **fields)
        schedule = make_schedule(config, 12)
        rates = [float(schedule(count)) for count in range(12)]
        expected = 0.3 * np.array([*rise, *stable, *end])
        np.testing.assert_allclose(rates, expected, rtol=1e-6)
        # To the last bit: a run that is extended has taken the same steps.
        assert {*rates[warmup:8]} == {float(np.float32(0.3))}


def test_wsd_ends_at_zero_to_the_bit() -> None:
    """A compiled x / 49 is x * (1 / 49), and 49 of these are not one."""
    rates = {}
    for decay in (7, 49, 98, 107, 270):
        config = resolved_optimizer(
            learning_rate=4.5e-3, warmup=0.1, schedule="wsd", decay=decay, final=0.0
        )
        rates[decay] = float(jax.jit(make_schedule(config, 300))(299))
    assert rates == dict.fromkeys(rates, 0.0)


def test_a_schedule_without_warm_up_falls_from_near_the_peak():
    config = resolved_optimizer(learning_rate=1.0, warmup=0.0, final=0.0)
    schedule = make_schedule(config, 10)
    expected = [0.5 * (1 + math.cos(math.pi * (count + 1) / 10)) for count in range(10)]
    rates = [float(schedule(count)) for count in range(10)]
    # float32 again; the last rate is 0 up to its rounding.
    np.testing.assert_allclose(rates, expected, atol=1e-6)


first_params = jax.jit(lambda: init_params(MODEL, jax.random.key(0)))
SHAPES = jax.eval_shape(lambda: init_params(MODEL, jax.random.key(0)))
MATRICES = {
    *(f"layers/attention/{x}/kernel" for x in "qkvo"),
    *(f"layers/mlp/{x}/kernel" for x in ("gate", "up", "down")),
}


def first_update(tx: optax.GradientTransformation, grads, params):
    """Steps in one program."""
    return jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])(grads, params)


def ranks_after_a_step(optimizer: Optimizer) -> dict[str, int]:
    """The rank of every parameter of low rank; by shapes alone."""
    state = jax.eval_shape(optimizer.tx.init, SHAPES)
    updates, after = jax.eval_shape(optimizer.tx.update, SHAPES, state, SHAPES)
    assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, SHAPES)
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
    for read in (optimizer.skipped, optimizer.refreshes, optimizer.learning_rate):
        assert jax.eval_shape(read, after).shape == ()
    rows = lro.memory_report(optimizer.tx, SHAPES).rows
    return {row.path: row.rank for row in rows if row.rank is not None}


def made(**fields) -> Optimizer:
    config = resolved_optimizer(**{"rank": 4, **fields})
    return make_optimizer(config, 10, jax.random.key(0))


@pytest.mark.parametrize(
    "name", slow_but([], METHODS, slow=["galore", "ldadam", "apollo_mini", "racs"])
)
def test_every_optimizer_steps_at_the_rank_asked_for(name):
    ranks = ranks_after_a_step(made(name=name))
    rank = {"apollo_mini": 1}.get(name, 4)
    assert ranks == ({} if name in WITHOUT else dict.fromkeys(MATRICES, rank))


# One for each place of the basis in a signature: alone, quantised, beside a key.
@pytest.mark.parametrize(
    ("name", "basis"),
    [
        *(("frugal", basis) for basis in ("default", *BASES)),
        *(("q_galore", basis) for basis in ("sara", "coordinates", "frozen")),
        *(("grass_walk", basis) for basis in ("sara", "coordinates")),
        *(
            pytest.param(name, basis, marks=NIGHTLY)
            for name, quick in (
                ("q_galore", {"sara", "coordinates", "frozen"}),
                ("grass_walk", {"sara", "coordinates"}),
            )
            for basis in ("default", *BASES)
            if basis not in quick
        ),
    ],
)
def test_methods_take_every_basis(name, basis):
    refused = {
        "coordinates": "use the rule without it",
        "lotus": r"adaptive_refresh\(\) must be the outermost wrapper",
        "frozen": r"lazy_refresh\(\) compares .*frozen\(\), which chooses only one",
    }
    if name == "q_galore" and basis in refused:
        with pytest.raises(ValueError, match=refused[basis]):
            made(name=name, basis=basis)
        return
    optimizer = made(name=name, basis=basis)
    assert ranks_after_a_step(optimizer) == dict.fromkeys(MATRICES, 4)


HAVE_THEIR_OWN = {
    "golore",
    "subtrack",
    "ldadam",
    "grass_sparse",
    "flora",
    "coap",
    "dct_adamw",
    "online_subspace_descent",
    "foam",
    "gwt",
}


def test_methods_without_a_subspace_refuse_a_basis():
    assert {*METHODS} == {*LOW_RANK, *WITHOUT}
    for name in {*WITHOUT, *LOW_RANK} - {*PROJECT}:
        with pytest.raises(ValueError, match=f"{name} has no subspace, so basis='svd'"):
            made(name=name, basis="svd")


@pytest.mark.parametrize("name", PROJECT)
def test_a_method_whose_basis_is_its_own_refuses_another(name):
    if "basis" in METHODS[name].options:
        assert name not in HAVE_THEIR_OWN
        made(name=name, basis="svd")
        return
    error = f"{name} has its own basis: leave out basis='svd'"
    with pytest.raises(ValueError, match=error):
        made(name=name, basis="svd")


@pytest.mark.parametrize(
    ("name", "option"),
    [("frugal", "scale"), ("msgd", "b2"), ("galore_adafactor", "b2")],
)
def test_an_option_that_a_method_does_not_have_is_refused(name, option):
    with pytest.raises(ValueError, match=f"{name} has no {option}: leave it out"):
        made(name=name, **{option: 0.5})


def test_adamw_in_a_comparison_ignores_what_is_said_of_the_subspace():
    adamw = made(name="adamw", rank=8, refresh_every=7, scale=0.5, walk_rank=1)
    assert adamw.refresh_every is None
    assert ranks_after_a_step(adamw) == {}


def test_scale_embedding_and_head_are_normalised_and_the_head_has_momentum():
    tx = made(name="scale_sgd").tx
    state = jax.eval_shape(tx.init, SHAPES)
    momentum = optax.tree.get_all_with_path(state, "momentum")
    kept = {
        jax.tree_util.keystr(path, simple=True, separator="/"): x.shape
        for _, tree in momentum
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
        if x.dtype != bool
    }
    assert kept == {"head/kernel": SHAPES["head"]["kernel"].shape}


@pytest.mark.parametrize("name", slow_but(["racs"], ["racs", "alice"]))
def test_a_scale_is_a_run_s(name):
    (a, b), (c, d) = (updates_of(name=name, scale=s) for s in (0.1, 0.2))
    np.testing.assert_allclose(np.stack([c, d]), 2 * np.stack([a, b]), rtol=1e-5)


@pytest.mark.slow
def test_ldadam_is_the_ablations_method_with_its_parts():
    like_it = {"basis": "power", "back": "feedback", "b1": 0.908, "b2": 0.99}
    parts = updates_of(name="subspace_adam", learning_rate=3e-3, **like_it)
    whole = updates_of(name="ldadam", learning_rate=3e-3)
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-8)
    without = updates_of(
        name="subspace_adam", learning_rate=3e-3, **like_it | {"back": "project"}
    )
    assert far_apart(without[1], parts[1])  # the first step has lost nothing yet


def test_the_first_moment_turns_alone_where_a_run_says_so():
    like_it = {"name": "subspace_adam", "basis": "jump"}
    on, first, off = (updates_of(rotate=r, **like_it) for r in ("on", "first", "off"))
    np.testing.assert_array_equal(first[0], on[0])  # there is nothing to turn yet
    assert far_apart(first[1], on[1])
    assert far_apart(first[1], off[1])
    alike = updates_of(outside="alike", **like_it)
    assert far_apart(alike[1], on[1])
    with pytest.raises(ValueError, match="outside=alike: rotate=off rotates no second"):
        updates_of(rotate="off", outside="alike", **like_it)


@pytest.mark.parametrize(
    "name",
    slow_but(["frugal"], ["alice", "frugal", "spectral_adam", "sumo"], slow=["alice"]),
)
def test_what_is_given_back_is_scaled_by_a_run(name):
    """Linear in the factor, of the first step: nothing was limited yet."""
    a, b, c = (updates_of(name=name, residual_scale=s)[0] for s in (0.2, 0.3, 0.5))
    assert far_apart(a, b)
    np.testing.assert_allclose(c - b, 2 * (b - a), rtol=1e-3, atol=1e-6)


def test_a_row_is_all_that_a_new_method_needs(monkeypatch):
    row = Method(lro.galore, 0.5, own={"rank": 2, "refresh_every": 3})
    monkeypatch.setitem(METHODS, "new", row)
    work = Config(optimizer=named("new+sara", OptimizerConfig()))
    config = resolve(work).optimizer
    assert (config.learning_rate, config.scale, config.b1) == (0.5, 0.25, 0.9)
    optimizer = make_optimizer(config, 10, jax.random.key(0))
    assert optimizer.refresh_every == 3
    assert ranks_after_a_step(optimizer) == dict.fromkeys(MATRICES, 2)


def test_a_new_method_may_be_of_full_rank(monkeypatch):
    monkeypatch.setitem(METHODS, "sgd", Method(optax.sgd, 0.5))
    optimizer = made(name="sgd")
    assert optimizer.refresh_every is None
    assert ranks_after_a_step(optimizer) == {}
    with pytest.raises(ValueError, match="sgd has no b1: leave it out"):
        made(name="sgd", b1=0.5)
    with pytest.raises(ValueError, match="sgd has no subspace, so basis='svd'"):
        made(name="sgd", basis="svd")


def test_a_basis_that_moves_at_every_step_is_counted_at_every_step():
    every = {name: made(name=name, refresh_every=7).refresh_every for name in LOW_RANK}
    moving = {name for name, steps in every.items() if steps == 1}
    assert moving == {"ldadam", "dct_adamw"}
    # Bases that move by themselves, or never.
    for name in ("online_subspace_descent", "foam", "gwt"):
        assert every.pop(name) == ONCE
    assert {every[name] for name in {*every} - moving} == {7}


def test_staggered_refreshes_are_part_of_all_steps_but_the_first():
    staggered = made(name="galore", refresh_every=7, stagger=True)
    assert staggered.refresh_every == ONCE
    assert kinds_of_steps(staggered) == [False, True]
    assert made(name="galore", refresh_every=1, stagger=True).refresh_every == 1
    assert made(name="ldadam", refresh_every=7, stagger=True).refresh_every == 1
    assert made(name="adamw", stagger=True).refresh_every is None


def test_muon_is_for_the_matrices_alone():
    config = resolved_optimizer(name="muon", learning_rate=1.0, warmup=0.0, final=1.0)
    tx = make_optimizer(config, 10, jax.random.key(0)).tx
    params = first_params()
    updates = first_update(tx, params, params)
    others = first_update(optax.nadam(1.0), params, params)

    def check(path, muon, nadam):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in MATRICES:  # 0.2, as far as Newton-Schulz gets
            assert 0.1 < jnp.sqrt(jnp.mean(jnp.square(muon))) < 0.25, name
        else:
            np.testing.assert_allclose(muon, nadam, rtol=1e-5, err_msg=name)

    jax.tree_util.tree_map_with_path(check, updates, others)


def test_steps_are_of_two_kinds_only_where_some_are_refreshes():
    kinds = {name: kinds_of_steps(made(name=name, refresh_every=7)) for name in METHODS}
    assert all(kinds.pop(name) == [False] for name in WITHOUT)
    assert kinds.pop("ldadam") == kinds.pop("dct_adamw") == [True]
    assert {*map(tuple, kinds.values())} == {(False, True)}
    assert kinds_of_steps(made(name="galore", refresh_every=1)) == [True]


def updates_of(seed: int = 0, **fields) -> list[np.ndarray]:
    """Two updates of one stack of matrices, with a basis of its own for each."""
    config = resolved_optimizer(rank=4, refresh_every=1, **fields)
    tx = make_optimizer(config, 10, jax.random.key(seed)).tx
    kernels = jnp.asarray(np.random.default_rng(0).standard_normal((2, 2, 8, 16)))
    params, *grads = (
        {"layers": {"mlp": {"up": {"kernel": kernel}}}}
        for kernel in (kernels[0], *kernels)
    )
    state, update, found = jax.jit(tx.init)(params), jax.jit(tx.update), []
    for grad in grads:
        updates, state = update(grad, state, params)
        found.append(np.asarray(updates["layers"]["mlp"]["up"]["kernel"]))
    return found


def far_apart(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.abs(a - b).max() > 1e-2 * np.abs(a).max())


def test_a_basis_replaces_the_method_s_own():
    own = updates_of(name="galore")
    np.testing.assert_array_equal(own, updates_of(name="galore", basis="svd"))
    for basis in ("sara", "walk", "jump"):
        # Walks and jumps start from the SVD, so only their second basis is another.
        assert far_apart(own[1], updates_of(name="galore", basis=basis)[1])


@pytest.mark.parametrize(
    ("name", "basis"),
    [("galore", "walk"), pytest.param("grass_walk", "default", marks=NIGHTLY)],
)
def test_the_angle_and_the_rank_of_a_walk_reach_it(name, basis):
    walk = partial(updates_of, name=name, basis=basis)
    for a, b in ({"angle": 0.1}, {"angle": 1.0}), ({"walk_rank": 1}, {"walk_rank": 3}):
        start, other = walk(**a), walk(**b)
        np.testing.assert_array_equal(start[0], other[0])  # the SVD's step
        assert far_apart(start[1], other[1])


def test_the_key_decides_a_random_basis():
    jumps = updates_of(name="grass_jump")
    np.testing.assert_array_equal(jumps, updates_of(name="grass_jump"))
    assert far_apart(jumps[1], updates_of(seed=1, name="grass_jump")[1])


def test_a_number_that_is_not_given_is_the_optimizer_s_own():
    own = updates_of(name="galore")
    given = updates_of(name="galore", scale=0.25, b1=0.9, b2=0.999)
    np.testing.assert_array_equal(own, given)
    doubled = updates_of(name="galore", scale=0.5)
    np.testing.assert_array_equal(np.multiply(own, 2), doubled)
    for change in ({"b1": 0.5}, {"b2": 0.5}):
        assert far_apart(own[1], updates_of(name="galore", **change)[1])


@pytest.mark.slow
def test_golore_switches_after_its_part_of_the_steps():
    def second(switch: float) -> np.ndarray:
        return updates_of(name="golore", switch=switch)[1]  # of 10 steps, number 1

    np.testing.assert_array_equal(second(0.2), second(1.0))
    assert far_apart(second(0.1), second(0.2))


def test_matrices_and_embedding_decay_and_norm_scales_do_not():
    params = first_params()
    mask = {
        jax.tree_util.keystr(path, simple=True, separator="/"): decays
        for path, decays in jax.tree_util.tree_leaves_with_path(decayed(params))
    }
    assert {path for path, decays in mask.items() if not decays} == {
        "norm/scale",
        "layers/attention_norm/scale",
        "layers/mlp_norm/scale",
    }
    zero = jax.tree.map(jnp.zeros_like, params)
    for name in ("adamw", "galore"):
        optimizer = made(name=name, weight_decay=0.1, learning_rate=1.0)
        updates = first_update(optimizer.tx, zero, params)
        rate = float(optimizer.schedule(0))
        # A gradient of 0 leaves only the decay: -rate * 0.1 * weight, in float32.
        np.testing.assert_allclose(
            updates["embed"]["embedding"],
            -rate * 0.1 * params["embed"]["embedding"],
            rtol=1e-5,
        )
        assert not updates["norm"]["scale"].any()


def test_a_parameter_without_a_rule_is_an_error():
    config = resolved_optimizer(name="galore", rank=4)
    optimizer = make_optimizer(config, 10, jax.random.key(0))
    with pytest.raises(ValueError, match="adapter/kernel"):
        optimizer.tx.init({**SHAPES, "adapter": {"kernel": jnp.ones((8, 8))}})
