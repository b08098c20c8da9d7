"""A signed or scaled step on the part of the gradient outside the subspace."""

from typing import Any

import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.helpers.ways_back import (
    BASIS,
    GRADIENT,
    R,
    bracket,
    run,
)

# ------------------------------------------------------------------ sign_residual


@pytest.mark.parametrize("step", ["sign", "sgd"])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_rest_takes_a_step_without_a_state(step: Any, scale: float) -> None:
    # Momentum inside, so that the two parts are told apart.
    gradients = np.stack([GRADIENT, -2 * GRADIENT, 0.5 * GRADIENT])
    back = lro.sign_residual(scale, step=step)
    found, _ = run(bracket(back, optax.trace(0.5)), gradients)
    s, moment = np.float64(BASIS), 0.0
    for g, update in zip(np.float64(gradients), found, strict=True):
        moment = 0.5 * moment + s.T @ g
        rest = g - s @ (s.T @ g)
        assert np.abs(rest).min() > 1e-5  # no sign here is decided by rounding
        rest = np.sign(rest) if step == "sign" else rest
        # Float32 sums of up to M products of numbers of a few.
        np.testing.assert_allclose(update, s @ moment + scale * rest, atol=5e-6)


def test_nothing_moves_without_a_gradient_and_rows_are_whole() -> None:
    rows = lro.bases.coordinates(order="ascending")
    for step in ("sign", "sgd"):
        tx = bracket(lro.sign_residual(7.0, step=step), optax.identity(), rows)
        found, _ = run(tx, np.stack([0 * GRADIENT, GRADIENT]))
        np.testing.assert_array_equal(found[0], 0)
        # Rows inside are the step's alone, to the bit; a residual there is 0 exactly.
        np.testing.assert_array_equal(found[1, :R], GRADIENT[:R])
        rest = GRADIENT[R:]
        rest = np.sign(rest) if step == "sign" else rest
        np.testing.assert_array_equal(found[1, R:], np.float32(7) * rest)


def test_which_steps_there_are() -> None:
    step: Any = "adam"
    with pytest.raises(ValueError, match='step=\'adam\': choose "sign" or "sgd"'):
        lro.sign_residual(step=step)
