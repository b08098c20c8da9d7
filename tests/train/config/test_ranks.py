"""Ranks by the command line: their forms, and whether they fit the matrices."""

import jax
import pytest

import lowrank_optax as lro
from models import LlamaConfig, init_params
from train.config.config import Config, OptimizerConfig
from train.config.ranks import check_ranks, parse_rank
from train.config.resolve import resolve
from train.engine.optimizer import make_optimizer, parted, smaller_sides

SIDES = {"layers/attention/q/kernel": 16, "layers/mlp/up/kernel": 24}
MODEL = LlamaConfig(64, 16, 24, num_heads=2, num_layers=2, compute_dtype="float32")


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        (64, 64),
        (0.25, 0.25),
        (1.0, 1.0),
        ("attention=8, mlp=0.25", [("attention", 8), ("mlp", 0.25)]),
        ("q|k=full,.=4", [("q|k", None), (".", 4)]),
        ("(?=a)b=1", [("(?=a)b", 1)]),  # the last = is the one that counts
    ],
)
def test_a_rank_has_three_forms(given, parsed):
    found = parse_rank(given)
    assert found == parsed
    assert type(found) is type(parsed)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (0, "rank=0 must be above 0"),
        (1.5, r"rank=1.5 is a fraction and must lie in \(0, 1\]"),
        (float("nan"), "rank=nan is a fraction"),
        ("mlp", r"rank 'mlp': it is no REGULAR_EXPRESSION=RANK"),
        ("=4", "rank '=4': it is no"),
        ("mlp=4,", "rank '': it is no"),
        ("mlp=many", "rank 'mlp=many': could not convert"),
        ("mlp=0", "rank 'mlp=0': rank=0 must be above 0"),
        ("mlp=nan", "rank 'mlp=nan': rank=nan is a fraction"),
        ("(mlp=4", r"rank '\(mlp=4': missing \)"),
    ],
)
def test_another_form_is_an_error_that_shows_the_three(given, message):
    with pytest.raises(ValueError, match=message):
        parse_rank(given)


@pytest.mark.parametrize("rank", [16, 0.5, 1.0, "attention=16,mlp=24", "q=3,.=full"])
def test_a_rank_up_to_the_smaller_side_fits(rank):
    check_ranks(rank, SIDES)


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (17, "rank 17 is above the smaller side, 16, of layers/attention/q/kernel; 16"),
        (
            25,
            "16, of layers/attention/q/kernel; 16 would be full rank, and 15 is the l",
        ),
        (
            "mlp=25,.=3",
            "rank 25 is above the smaller side, 24, of layers/mlp/up/kernel",
        ),
        (
            "mlp=4",
            "no expression is found in layers/attention/q/kernel; add one .* mlp",
        ),
        (
            "attn=4,mlp=4",
            r"'attn' decides for no matrix .*attention/q/kernel, layers/m",
        ),
        ("mlp=4,up=5,.=2", "'up' decides for no matrix"),
    ],
)
def test_a_rank_that_does_not_fit_is_an_error_that_names_the_matrices(rank, message):
    with pytest.raises(ValueError, match=message):
        check_ranks(rank, SIDES)


def test_each_matrix_has_the_rank_of_the_first_expression_found():
    rank = "attention/[qk]=2,attention=full,mlp=0.25"
    config = resolve(Config(optimizer=OptimizerConfig("galore", rank=rank)))
    optimizer = make_optimizer(config.optimizer, 10, jax.random.key(0))
    shapes = jax.eval_shape(lambda: init_params(MODEL, jax.random.key(0)))
    rows = lro.memory_report(optimizer.tx, shapes).rows
    ranks = {row.path: row.rank for row in rows if row.rank is not None}
    assert ranks == {
        **{f"layers/attention/{x}/kernel": 2 for x in "qk"},
        **{f"layers/mlp/{x}/kernel": 4 for x in ("gate", "up", "down")},
    }
    sides = smaller_sides(parted(shapes).layers)
    assert sides == {
        **{f"layers/attention/{x}/kernel": 16 for x in "qkvo"},
        **{f"layers/mlp/{x}/kernel": 16 for x in ("gate", "up", "down")},
    }
