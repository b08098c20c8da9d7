"""Ranks that share a memory budget, against all choices there are."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro

allocate_ranks = lro.measuring.allocate_ranks
RULES = [("layers", lro.STACKED), ("norm", None), ("", "matrix")]


def with_values(values: Any, columns: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    m = len(values)
    u, v = (np.linalg.qr(rng.normal(size=(k, m)))[0] for k in (m, columns))
    return (u * np.asarray(values, float)) @ v.T


def gradients() -> dict[str, Any]:
    steep, flat = 0.3 ** np.arange(6), np.ones(6)
    layers = [with_values(values, 9, seed) for seed, values in enumerate((steep, flat))]
    return jax.tree.map(
        jnp.float32,
        {
            "layers": {"kernel": np.stack(layers)},
            "steep": 100 * with_values(steep, 9, 2),
            "tall": with_values(0.8 ** np.arange(5), 12, 3).T,
            "norm": np.ones(6),
        },
    )


def explained(g: Any, r: int) -> float:
    """The mean of e(r) over a leaf's matrices, by their singular values."""
    values = np.linalg.svd(np.asarray(g, np.float64), compute_uv=False) ** 2
    return float(np.mean(values[..., :r].sum(-1) / values.sum(-1)))


def cost(g: Any, r: int) -> int:
    m, n = sorted(np.shape(g)[-2:])
    return int(np.prod(np.shape(g)[:-2])) * r * (m + 2 * n)


@pytest.mark.parametrize("budget", [2, 3])
def test_no_other_ranks_explain_more_for_their_memory(budget: int) -> None:
    tree = gradients()
    found = allocate_ranks(tree, budget, multiple=1, dimension_numbers=RULES)
    assert [path for path, _ in found] == ["^layers/kernel$", "^steep$", "^tall$"]
    matrices = [tree["layers"]["kernel"], tree["steep"], tree["tall"]]

    def total(f: Any, ranks: Any) -> float:
        return sum(f(g, r) for g, r in zip(matrices, ranks, strict=True))

    ranks = [r for _, r in found]
    spent, limit = total(cost, ranks), total(cost, [budget] * 3)
    assert spent <= limit
    # Greedy choices are the best of all that need no more memory than they do.
    others = itertools.product(range(1, 7), range(1, 7), range(1, 6))
    best = max(total(explained, x) for x in others if total(cost, x) <= spent)
    assert total(explained, ranks) == pytest.approx(best, abs=1e-6)
    assert total(explained, ranks) > total(explained, [budget] * 3)


def test_the_ranks_are_the_optimizers() -> None:
    tree = gradients()
    ranks = allocate_ranks(tree, 2, multiple=1, dimension_numbers=RULES)
    tx = lro.galore(0.1, rank=ranks, refresh_every=1, dimension_numbers=RULES)
    report = {row.path: row.rank for row in lro.memory_report(tx, tree).rows}
    assert {f"^{path}$": r for path, r in report.items() if r} == dict(ranks)
    uniform = lro.galore(0.1, rank=2, refresh_every=1, dimension_numbers=RULES)
    assert (
        lro.memory_report(tx, tree).state_bytes
        <= lro.memory_report(uniform, tree).state_bytes
    )


def test_full_rank_by_the_budgets_rules_stays_full_rank() -> None:
    tree = gradients()
    budget = [("steep", None), ("", 2)]
    ranks = allocate_ranks(tree, budget, multiple=1, dimension_numbers=RULES)
    tx = lro.galore(0.1, rank=ranks, refresh_every=1, dimension_numbers=RULES)
    report = {row.path: row.rank for row in lro.memory_report(tx, tree).rows}
    assert report["steep"] is None
    assert report["tall"] == dict(ranks)["^tall$"]


def test_ranks_are_multiples_and_do_not_depend_on_size() -> None:
    tree = {
        "a": jnp.asarray(with_values(0.9 ** np.arange(40), 64), jnp.float32),
        "b": jnp.asarray(with_values(0.5 ** np.arange(40), 64), jnp.float32),
    }
    ranks = dict(allocate_ranks(tree, 16, dimension_numbers=None))
    assert ranks == {"^a$": 24, "^b$": 8}
    larger = {"a": 1e-20 * tree["a"], "b": 1e20 * tree["b"]}
    assert dict(allocate_ranks(larger, 16, dimension_numbers=None)) == ranks
    # A fraction, and a multiple above the budget's rank.
    few = dict(allocate_ranks(tree, 0.1, dimension_numbers=None))
    assert few == {"^a$": 4, "^b$": 4}


def test_a_zero_gradient_has_the_least_and_one_that_is_not_finite_is_an_error() -> None:
    g = jnp.asarray(with_values(0.9 ** np.arange(8), 9), jnp.float32)
    tree = {"a": g, "b": jnp.zeros((8, 9))}
    found = dict(allocate_ranks(tree, 3, multiple=1, dimension_numbers=None))
    assert found == {"^a$": 5, "^b$": 1}
    with pytest.raises(ValueError, match=r"b: its gradient of shape \(8, 9\) is not"):
        allocate_ranks(
            {"a": g, "b": g.at[0, 0].set(jnp.inf)}, 3, dimension_numbers=None
        )
    with pytest.raises(ValueError, match="found no matrix with a rank"):
        allocate_ranks({"a": jnp.ones(3)}, 3, dimension_numbers=None)
