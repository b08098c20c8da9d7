"""The memory report against sums made by hand and against real arrays."""

import math
import time
import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import lowrank_optax as lro
from tests.helpers.stages import M, N, normal

OPTIMIZERS: dict[str, Any] = {
    "galore": lambda **kw: lro.galore(0.01, **kw),
    "galore_sara": lambda **kw: lro.galore(0.01, basis=lro.sara_sample(0), **kw),
    "fira": lambda **kw: lro.fira(0.01, **kw),
    "fira_published": lambda **kw: lro.fira(0.01, variant="published", **kw),
    "grass_walk": lambda **kw: lro.grass_walk(0.01, key=0, **kw),
    "grass_jump": lambda **kw: lro.grass_jump(0.01, key=0, **kw),
}
COUNT, KEY = 4, 8  # bytes of an int32, and of a threefry key: two uint32
SHARED = {
    "galore": 4 * COUNT,  # the bracket's count, skipped and refreshes, Adam's count
    "galore_sara": 4 * COUNT + KEY,
    "fira": 4 * COUNT,
    "fira_published": 6 * COUNT,  # and those of bias correction and of decay
    "grass_walk": 4 * COUNT + KEY,
    "grass_jump": 4 * COUNT + KEY,
}
RANK = 4
PARAMS = {
    "embed": (50, 16),
    "layers": {"attention": (3, 16, 16), "mlp": (3, 16, 40), "norm": (3, 16)},
}
RULES = [("embed|norm", None), ("layers", lro.STACKED)]


def tree(shapes: Any, make: Any) -> Any:
    return jax.tree.map(make, shapes, is_leaf=lambda x: isinstance(x, tuple))


def abstract(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def build(name: str, rank: Any = RANK, rules: Any = RULES) -> Any:
    return OPTIMIZERS[name](rank=rank, refresh_every=10, dimension_numbers=rules)


def limited(name: str) -> bool:
    return not name.startswith("galore")


def matrix_bytes(name: str, shape: tuple[int, ...], rank: int = RANK) -> int:
    """(m r + 2 n r) float32 numbers per layer, one where a residual is limited, and a
    byte that says whether the gradient was ever not zero.
    """
    *batch, rows, cols = shape
    m, n = sorted((rows, cols))
    return math.prod(batch) * (4 * (m * rank + 2 * n * rank + limited(name)) + 1)


def full_rank_bytes(name: str, shape: tuple[int, ...]) -> int:
    """AdamW's in float32, and a byte for each tree that the leaf has no part in: the
    bases, whether they have begun, and the limiter's norms.
    """
    return 2 * 4 * math.prod(shape) + 2 + limited(name)


def nbytes(state: Any) -> int:
    def one(x: jax.Array) -> int:
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return (jax.random.key_data(x) if is_key else x).nbytes

    return sum(one(x) for x in jax.tree.leaves(state))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_row_is_the_sum_by_hand(name: str) -> None:
    report = lro.memory_report(build(name), tree(PARAMS, abstract))
    expected = {
        "embed": full_rank_bytes(name, (50, 16)),
        "layers/norm": full_rank_bytes(name, (3, 16)),
        "layers/attention": matrix_bytes(name, (3, 16, 16)),
        "layers/mlp": matrix_bytes(name, (3, 16, 40)),
        "(shared)": SHARED[name],
    }
    assert {row.path: row.state_bytes for row in report.rows} == expected
    assert report.state_bytes == sum(expected.values())
    ranks = {row.path: row.rank for row in report.rows}
    low = {"layers/attention": RANK, "layers/mlp": RANK}
    assert ranks == {**dict.fromkeys(expected), **low}
    assert not any(row.full_rank for row in report.rows)
    shapes = {row.path: row.shape for row in report.rows}
    assert shapes["layers/mlp"] == (3, 16, 40)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_totals_are_the_real_states(name: str, dtype: Any) -> None:
    params = tree(PARAMS, lambda shape: jnp.ones(shape, dtype))
    tx = build(name)
    report = lro.memory_report(tx, params)
    assert report.state_bytes == nbytes(tx.init(params))
    assert report.adamw_bytes == nbytes(optax.adamw(1e-3).init(params))
    assert report.ratio == report.state_bytes / report.adamw_bytes
    # AdamW's moments have the weights' dtype, ours float32.
    (mlp,) = (row for row in report.rows if row.path == "layers/mlp")
    assert mlp.adamw_bytes == 2 * jnp.dtype(dtype).itemsize * 3 * 16 * 40
    assert mlp.state_bytes == matrix_bytes(name, (3, 16, 40))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("rank", [16, 17, 1.0])
def test_a_rank_of_the_smaller_side_is_full_rank_adam(name: str, rank: Any) -> None:
    params = {"w": jnp.ones((16, 40))}
    tx = build(name, rank, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the report says it, and does not warn
        report = lro.memory_report(tx, params)
    (row, _) = report.rows
    assert (row.rank, row.full_rank) == (16, True)
    # No basis and a byte in its place, the byte of `begun`, and the limiter's norm.
    assert row.state_bytes == row.adamw_bytes + 2 + 4 * limited(name)
    assert str(report).splitlines()[1].split()[2:4] == ["16", "(all)"]

    with pytest.warns(UserWarning, match=r"0 of 1 matrices.* w \(rank 16 is all of it"):
        state = tx.init(params)
    adam: Any = optax.scale_by_adam()
    if name == "fira_published":  # another epsilon, the same moments
        adam = optax.scale_by_adam(eps=1e-6)
    theirs, grads = adam.init(params), {"w": jnp.arange(640.0).reshape(16, 40) / 640}
    for _ in range(3):
        _, state = tx.update(grads, state, params)
        _, theirs = adam.update(grads, theirs, params)
    for moment in ("mu", "nu", "count"):
        ours = [
            value
            for path, value in optax.tree.get_all_with_path(state, moment)
            if "LowRankState" not in str(path[-1])
        ]
        adams = optax.tree.get(theirs, moment)
        assert any(jax.tree.all(jax.tree.map(jnp.array_equal, x, adams)) for x in ours)


def unrefreshed(make: Any) -> Any:
    """Without the argument that a method without refreshes has not."""
    return lambda rate, refresh_every, **options: make(rate, **options)


# Numbers of four bytes in one matrix's state, as docs/methods/index.md has them.
# optax keeps one unused number for each factored second moment, and a count.
FORMULAS: dict[str, tuple[Any, Any]] = {
    "galore_adafactor": (
        lro.recipes.galore_adafactor,
        lambda m, n, r: m * r + n * r + n + r + 3,
    ),
    "galore_adam_mini": (
        lro.recipes.galore_adam_mini,
        lambda m, n, r: m * r + n * r + n,
    ),
    "galore_adam8bit": (
        lro.recipes.galore_adam8bit,
        lambda m, n, r: m * r + 2 * n * r / 4 * (1 + 4 / 128),
    ),
    "golore": (
        partial(lro.recipes.golore, switch_step=5, key=0),
        lambda m, n, r: m * r + 2 * n * r,
    ),
    "msgd": (partial(lro.recipes.msgd, key=0), lambda m, n, r: m * r + n * r),
    "subtrack": (lro.recipes.subtrack, lambda m, n, r: m * r + 2 * n * r + 1),
    "spectral_adam": (lro.spectral_adam, lambda m, n, r: m * r + 2 * n * r),
    "ldadam": (lro.ldadam, lambda m, n, r: m * r + 2 * n * r + m * n),
    "ldadam_no_feedback": (
        partial(lro.ldadam, feedback=False),
        lambda m, n, r: m * r + 2 * n * r,
    ),
    "apollo": (partial(lro.apollo, key=0), lambda m, n, r: 2 * n * r + 1),
    "apollo_stored": (
        partial(lro.apollo, basis=lro.bases.gaussian(0, stored=True)),
        lambda m, n, r: m * r + 2 * n * r + 1,
    ),
    "apollo_mini": (partial(lro.apollo_mini, key=0), lambda m, n, r: 2 * n * r + 1),
    # Adam's count is one of each matrix, for each begins anew by itself.
    "frugal": (lro.frugal, lambda m, n, r: m * r + 2 * n * r + 1),
    "frugal_coordinates": (
        partial(lro.frugal, basis=lro.bases.coordinates(0)),
        lambda m, n, r: 2 * n * r + r + 1,
    ),
    "grass_sparse": (
        partial(lro.recipes.grass_sparse, key=0),
        lambda m, n, r: 2 * n * r + r + 1,
    ),
    "flora": (partial(lro.recipes.flora, key=0), lambda m, n, r: n * r + m + n + 2),
    "dct_adamw": (lro.recipes.dct_adamw, lambda m, n, r: 2 * n * r + r),
    "dct_adamw_feedback": (
        partial(lro.recipes.dct_adamw, feedback=True),
        lambda m, n, r: 2 * n * r + r + m * n,
    ),
    "coap": (lro.recipes.coap, lambda m, n, r: m * r + 2 * n * r),
    # Two thirds: of AdamW for the rest a zero of each moment, for the three layers.
    "alice": (
        partial(lro.recipes.alice, key=0),
        lambda m, n, r: m * r + 2 * n * r + n + 1 + r * r + 2 / 3,
    ),
    "alice_0": (
        partial(lro.recipes.alice, key=0, b3=None),
        lambda m, n, r: m * r + 2 * n * r + n + 1 + 2 / 3,
    ),
    "sumo": (lro.recipes.sumo, lambda m, n, r: m * r + n * r + 1 + 2 / 3),
    "online_subspace_descent": (
        unrefreshed(lro.recipes.online_subspace_descent),
        lambda m, n, r: 3 * m * r + 2 * n * r + 2,
    ),
    "q_galore": (
        lro.recipes.q_galore,
        # Four bits a number and five bytes a group; eight numbers a leaf for laziness.
        lambda m, n, r: (
            m * r / 8 + m * r / 256 * 5 / 4 + 2 * n * r / 4 * (1 + 4 / 128) + 8 / 3
        ),
    ),
    "foam": (unrefreshed(lro.recipes.foam), lambda m, n, r: 2 * n * r + 2 / 3),
    "gwt": (unrefreshed(lro.recipes.gwt), lambda m, n, r: 2 * n * r + 1 + 2 / 3),
    # Two bytes of a matrix, and of the leaf AdamW's zeros for the rest.
    "mlorc": (
        unrefreshed(partial(lro.recipes.mlorc, key=0)),
        lambda m, n, r: 2 * r * (m + n) + 2 / 4 + 2 / 3,
    ),
    "lora_pre": (
        unrefreshed(partial(lro.recipes.lora_pre, key=0)),
        lambda m, n, r: 2 * r * (m + n) + 2 / 3,
    ),
    "mofasgd": (
        unrefreshed(partial(lro.recipes.mofasgd, key=0)),
        lambda m, n, r: r * (m + n) + r + 2 / 3,
    ),
    "cosmos": (
        lro.recipes.cosmos,
        lambda m, n, r: m * n + n * r + m * r + r * r + 2 / 3,
    ),
}


BEGUN = {"online_subspace_descent", "mlorc", "lora_pre", "mofasgd", "foam", "gwt"}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_state_of_a_matrix_is_what_the_formula_says(name: str) -> None:
    make, numbers = FORMULAS[name]
    layers, m, n, r = 3, 64, 256, 16
    params = {"layers": abstract((layers, n, m)), "norm": abstract((m,))}
    tx = make(0.01, rank=r, refresh_every=10, dimension_numbers=[("", lro.STACKED)])
    rows = {row.path: row for row in lro.memory_report(tx, params).rows}
    # A byte says whether a gradient was ever not zero, of a basis that waits for one.
    begun = 0 if name in BEGUN else 1
    assert rows["layers"].state_bytes == layers * (4 * numbers(m, n, r) + begun)
    assert rows["layers"].rank == r
    assert rows["norm"].rank is None


WHOLE: dict[str, tuple[Any, Any]] = {
    "racs": (lro.recipes.racs, lambda m, n: m + n + 1),
    "scale_sgd": (lro.recipes.scale_sgd, lambda m, n: 0),
    "scale_sgd_head": (
        partial(lro.recipes.scale_sgd, momentum="layers"),
        lambda m, n: m * n,
    ),
    "sink_gd": (lro.recipes.sink_gd, lambda m, n: 0),
    "stable_spam": (lro.recipes.stable_spam, lambda m, n: 2 * m * n + 4),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_method_without_a_subspace_is_listed_as_full(name: str) -> None:
    make, numbers = WHOLE[name]
    layers, m, n = 3, 64, 256
    params = {"layers": abstract((layers, n, m)), "norm": abstract((m,))}
    tx = make(0.01, dimension_numbers=[("", lro.STACKED)])
    report = lro.memory_report(tx, params)
    rows = {row.path: row for row in report.rows}
    # A zero of each of AdamW's moments, and a byte where it has no momentum; Adam is
    # stable_spam's own.
    unused = {"scale_sgd": 9, "stable_spam": 0}.get(name, 8)
    assert rows["layers"].state_bytes == layers * 4 * numbers(m, n) + unused
    assert {row.rank for row in report.rows} == {None}
    assert "full" in str(report).splitlines()[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it projects nothing, and is not to say so
        state = tx.init(tree({"layers": (layers, n, m), "norm": (m,)}, jnp.ones))
    assert report.state_bytes == nbytes(state)


def test_rows_follow_mixed_ranks() -> None:
    params = tree({"a": (8, 20), "b": (20, 8), "c": (8, 8)}, abstract)
    rank = [("a", 2), ("b", 0.5), ("c", None)]
    report = lro.memory_report(build("galore", rank, None), params)
    rows = {row.path: (row.rank, row.state_bytes) for row in report.rows}
    assert rows["a"] == (2, matrix_bytes("galore", (8, 20), 2))
    assert rows["b"] == (4, matrix_bytes("galore", (20, 8), 4))
    assert rows["c"] == (None, full_rank_bytes("galore", (8, 8)))


def test_a_7b_model_is_counted_without_being_made() -> None:
    layers, wide, mlp, vocabulary = 32, 4096, 11008, 32000
    attention = dict.fromkeys("qkvo", (layers, wide, wide))
    shapes = {
        "embed": (vocabulary, wide),
        "layers": {
            "attention": attention,
            "mlp": {"gate": (layers, wide, mlp), "down": (layers, mlp, wide)},
        },
        "head": (wide, vocabulary),
    }
    tx = build("grass_walk", 1024, [("embed|head", None), ("layers", lro.STACKED)])
    start = time.process_time()
    report = lro.memory_report(tx, tree(shapes, lambda x: abstract(x, jnp.bfloat16)))
    # A tenth of this is usual; the state itself has 26 GiB, which no test could make.
    assert time.process_time() - start < 10
    expected = 2 * full_rank_bytes("grass_walk", (vocabulary, wide))
    expected += SHARED["grass_walk"]
    for shape in [*attention.values(), (layers, wide, mlp), (layers, mlp, wide)]:
        expected += matrix_bytes("grass_walk", shape, 1024)
    assert report.state_bytes == expected


def test_printing_it_shows_every_row_and_the_totals() -> None:
    report = lro.memory_report(build("fira"), tree(PARAMS, abstract))
    head, *rows, total = str(report).splitlines()
    assert "state, bytes" in head
    assert [line.split()[0] for line in rows] == [row.path for row in report.rows]
    ratio = f"{report.state_bytes / report.adamw_bytes:.1%}"
    sizes = [f"{report.state_bytes:,}", f"{report.adamw_bytes:,}"]
    assert total.split() == ["total", ratio, *sizes]
    assert len({len(line) for line in (head, *rows, total)}) == 1  # columns align


@pytest.mark.parametrize("tx", [optax.adamw(1e-3), optax.sgd(0.1), optax.identity()])
def test_any_optax_transformation_can_be_counted(tx: Any) -> None:
    params = tree(PARAMS, jnp.ones)
    report = lro.memory_report(tx, params)
    assert report.state_bytes == nbytes(tx.init(params))
    assert {row.rank for row in report.rows} == {None}


def test_the_report_does_not_guess_at_other_optimizers() -> None:
    params = {"w": normal(M, N), "b": normal(3)}
    report = lro.memory_report(optax.contrib.galore(0.1, rank=2), params)
    assert [row.rank for row in report.rows] == [None] * 3
    assert report.state_bytes > 0
