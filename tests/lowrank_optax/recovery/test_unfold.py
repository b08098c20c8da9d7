"""FOAM's and GWT's ways back, where the renderings of ten steps do not look."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.helpers.rules import normal, same_bits
from tests.helpers.stages import chain_of

STEPS = 4
METHODS = {
    "foam": lro.recipes.foam,
    "gwt": functools.partial(lro.recipes.gwt, limit=1e9),
}


def gradients() -> dict[str, Any]:
    layers = np.float32(jnp.asarray(normal(STEPS, 2, 5, 9), jnp.bfloat16))
    late = normal(STEPS, 6, 9, seed=1)
    late[0] = 0
    return {
        "layers": layers,
        "layers_turned": layers.mT,
        "first": layers[:, 0],
        "narrow": jnp.asarray(layers[:, 0], jnp.bfloat16),
        "zeros": np.zeros((STEPS, 6, 9), np.float32),
        "late": late,
        "tiny": normal(STEPS, 1, 1),
        "thin": normal(STEPS, 2, 9),
    }


@functools.cache
def walk_of(name: str) -> Any:
    """From gradients to updates and states, compiled."""
    tx = METHODS[name](
        -1.0,
        rank=2,
        scale=1.0,
        dimension_numbers=[("layers", lro.STACKED), ("", "matrix")],
    )

    def step(state: Any, g: Any) -> Any:
        updates, state = tx.update(g, state, g)
        return state, (updates, state)

    def run(gs: Any) -> Any:
        return jax.lax.scan(step, tx.init(jax.tree.map(lambda x: x[0], gs)), gs)[1]

    return jax.jit(run)


each = pytest.mark.parametrize("name", METHODS)
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


@each
def test_shapes_layouts_and_dtypes(name: str) -> None:
    grads = gradients()
    found, states = walk_of(name)(grads)
    close(found["layers_turned"].mT, found["layers"])
    close(found["first"], found["layers"][:, 0])
    assert found["narrow"].dtype == jnp.bfloat16
    # The same step of the same gradient, rounded to 8 bits.
    close(np.float32(found["narrow"]), found["first"], rtol=2**-8)
    nu = states[0].inner_state.inner_state[-1].nu
    assert (nu["narrow"].shape[1:], nu["narrow"].dtype) == ((2, 9), jnp.float32)
    # As many blocks as rows: no residual, and Adam's step.
    adam = optax.scale_by_adam()
    for leaf in ("tiny", "thin"):
        state = adam.init(grads[leaf][0])
        for t in range(STEPS):
            step, state = adam.update(grads[leaf][t], state)
            close(found[leaf][t], step)


@each
def test_zeros_and_bad_numbers_leave_nothing_behind(name: str) -> None:
    grads = gradients()
    found, states = walk_of(name)(grads)
    nu = states[0].inner_state.inner_state[-1].nu
    assert not found["zeros"].any()
    assert not nu["zeros"].any()
    assert not found["late"][0].any()
    assert (np.abs(found["late"][1:]).max(axis=(1, 2)) > 0.1).all()
    order = [0, 0, 1, 2]
    bad = jax.tree.map(lambda x: x[np.array(order)], grads)
    bad["layers"][1, 1, 4, 8] = np.inf
    after, states = walk_of(name)(bad)
    assert int(states[0].skipped[-1]) == 1
    for leaf, steps in found.items():
        assert not np.any(np.asarray(after[leaf][1]))
        assert same_bits(after[leaf][jnp.array([0, 2, 3])], steps[:3])


def test_details_over_a_root_of_zero_take_no_step() -> None:
    """Rows of a block that cancel each other have no second moment to divide by."""
    g = {"w": jnp.array([[1.0, 2.0, 3.0], [-1.0, 2.0, 1.0]])}
    tx = lro.recipes.gwt(1.0, rank=1, dimension_numbers=None)
    updates, _ = tx.update(g, tx.init(g), g)
    assert not updates["w"][:, 0].any()
    assert (updates["w"][0, 1:] != 0).all()
    assert jnp.abs(updates["w"]).max() < 10


def haar(x: Any) -> list[Any]:
    """The approximation at level 2, its details, and those of level 1."""
    details = []
    for _ in range(2):
        x, lost = (x[::2] + x[1::2]) / np.sqrt(2), (x[::2] - x[1::2]) / np.sqrt(2)
        details.insert(0, lost)
    return [x, *details]


def inverse(parts: list[Any]) -> Any:
    x, *details = parts
    for lost in details:
        pair = np.stack([x + lost, x - lost], axis=1) / np.sqrt(2)
        x = pair.reshape(-1, x.shape[-1])
    return x


def test_gwt_divides_the_details_of_every_level_by_their_blocks_root() -> None:
    g = normal(8, 9)
    stages = chain_of(
        basis=lro.bases.fold(),
        step=lro.in_subspace(optax.ema(0.9)),
        back=lro.recovery.scale_details(),
    )
    tx = lro.low_rank(stages, rank=2, refresh_every=1, dimension_numbers=None)
    first, *details = haar(g)
    root = np.abs(first) + 1e-8  # of the first step
    scaled = [d / np.repeat(root, len(d) // 2, axis=0) for d in details]
    expected = inverse([first / root, *scaled])
    found = jax.jit(lambda g: tx.update(g, tx.init(g))[0])(g)
    close(found, expected)


@pytest.mark.parametrize("name", ["unfold_moments", "scale_details"])
def test_only_blocks_can_be_unfolded(name: str) -> None:
    back = getattr(lro.recovery, name)()
    tx = lro.low_rank(
        chain_of(back=back), rank=2, refresh_every=1, dimension_numbers=None
    )
    g = {"w": jax.ShapeDtypeStruct((8, 9), jnp.float32)}
    with pytest.raises(ValueError, match=rf"w: {name}\(\) repeats .* put fold\(\)"):
        jax.eval_shape(lambda g: tx.update(g, tx.init(g)), g)
