"""A Frame where an array was expected."""

from typing import Any

import optax
import pytest

import lowrank_optax as lro
from tests.helpers.stages import M, N, normal


@pytest.mark.parametrize(
    "stage",
    [
        optax.scale(2.0),
        optax.clip(1.0),
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(),
        optax.trace(0.9),
        optax.add_decayed_weights(0.1),
        optax.zero_nans(),
        optax.normalize_by_update_norm(),
        optax.apply_if_finite(optax.identity(), 3),
    ],
    ids=lambda s: s.update.__qualname__.split(".")[0],
)
def test_a_stock_transformation_between_stages_is_an_error(stage: Any) -> None:
    params = {"mlp": {"kernel": normal(M, N)}}
    chain = optax.chain(lro.dominant_svd(), stage, lro.project())
    tx = lro.low_rank(chain, rank=3, refresh_every=1)
    with pytest.raises(TypeError) as caught:
        tx.update(params, tx.init(params), params)
    # jax.numpy's own functions say so too, "during handling" of what a Frame says.
    said = f"{caught.value} {caught.value.__context__}"
    assert "mlp/kernel: inside low_rank() a Frame stands for this matrix" in said
    assert "in_subspace(inner)" in said
