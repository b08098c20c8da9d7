"""Leaves of full rank beside low-rank ones, and what a leaf must be."""

import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.helpers.battery import options_of
from tests.helpers.stages import M, N, chain_of, length, normal, run

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


def test_a_stage_that_returns_an_array_for_its_frame() -> None:
    params = {"mlp": {"kernel": normal(M, N)}}
    lost = optax.stateless(
        lambda frames, _: lro.stages.map_frames(lambda f: f.step, frames)
    )
    chain = optax.chain(chain_of(), lost)
    tx = lro.low_rank(chain, rank=3, refresh_every=1)
    with pytest.raises(
        TypeError, match=r"mlp/kernel: a stage returned .* place of its Frame"
    ):
        jax.eval_shape(tx.update, params, tx.init(params))


def test_two_parameters_of_one_path() -> None:
    params = {"mlp/up": {"w": normal(M, N)}, "mlp": {"up": {"w": normal(N, M)}}}
    with pytest.raises(ValueError, match="two parameters have the path mlp/up/w"):
        lro.galore(0.1, rank=3, refresh_every=5).init(params)


@pytest.mark.parametrize("dtype", ["int32", "complex64"])
def test_matrices_of_other_numbers_are_refused(dtype: str) -> None:
    params = {"mlp": {"kernel": jnp.ones((M, N), dtype)}}
    with pytest.raises(ValueError, match=f"mlp/kernel: a {dtype} matrix of shape"):
        lro.galore(0.1, rank=3, refresh_every=5).init(params)
