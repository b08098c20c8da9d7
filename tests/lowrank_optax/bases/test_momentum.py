"""Bases that follow the first moment."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import settings
from scipy.linalg import subspace_angles

import lowrank_optax as lro
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.linalg import orthonormality_error
from tests.helpers.rules import B1, M, N, R, bracket, normal, updates_of, walk

few = settings(derandomize=True, deadline=None, max_examples=20)


def fixed_after_another(steps: int) -> Any:
    """One gradient with a gap after its R-th singular value; the first is another."""
    rng = np.random.default_rng(3)
    u, _ = np.linalg.qr(rng.normal(size=(M, M)))
    v, _ = np.linalg.qr(rng.normal(size=(N, M)))
    values = np.array([4.0, 3, 2] + [0.5] * (M - R))
    g = (u * values) @ v.T
    other = rng.normal(size=(M, N))
    gradients = np.stack([other] + [g] * (steps - 1)).astype(np.float32)
    return u[:, :R], gradients


@pytest.mark.parametrize(
    ("rule", "step"),
    [
        (
            lro.bases.power_iterate(b1=B1),
            lro.rotate_moments(optax.scale_by_adam(B1, 0.99)),
        ),
        (
            lro.bases.power_iterate(b1=B1),
            lro.rotate_moments(optax.ema(B1, debias=False)),
        ),
        (
            lro.bases.correlation_aware(recompute_every=2),
            lro.in_subspace(optax.scale_by_adam()),
        ),
    ],
    ids=["power_iterate", "power_iterate with momentum", "correlation_aware"],
)
def test_momentum_bases_converge_to_the_top_of_a_fixed_gradient(
    rule: Any, step: Any
) -> None:
    top, gradients = fixed_after_another(150)
    _, states = updates_of(bracket(rule, step), {"w": gradients})
    bases = np.float64(optax.tree.get(states, "basis")["w"])
    assert subspace_angles(top, bases[0]).max() > 0.3
    # The last recomputation; the momentum of the first gradient is down to 0.9^149.
    # Angles between float32 bases: some 1e-7 times the ratio 4 / (2 - 0.5).
    assert subspace_angles(top, bases[148]).max() < 1e-5


def test_orthogonal_iteration_keeps_its_basis_at_a_zero_gradient() -> None:
    g = normal(3, M, N)
    g[1] = 0
    s = walk(lro.bases.orthogonal_iterate(), g).basis
    np.testing.assert_array_equal(s[1], s[0])
    assert (s[2] != s[1]).any()


@pytest.mark.parametrize("name", ["power_iterate", "correlation_aware"])
@pytest.mark.parametrize(
    "inner",
    [optax.identity(), optax.scale_by_rms(), optax.scale_by_factored_rms()],
    ids=["identity", "rms", "factored"],
)
def test_they_need_a_first_moment(name: str, inner: Any) -> None:
    tx = bracket(getattr(lro.bases, name)(), lro.in_subspace(inner))
    tree = {"mlp": {"kernel": normal(M, N)}}
    with pytest.raises(
        ValueError, match=rf"mlp/kernel: {name}\(\) follows the first moment"
    ) as caught:
        jax.eval_shape(tx.update, tree, tx.init(tree), tree)
    assert "use optax.scale_by_adam()" in str(caught.value)


@pytest.mark.parametrize(
    "step",
    [
        lro.in_subspace(optax.scale_by_adam()),
        lro.in_subspace(lro.steps.per_matrix(optax.scale_by_adam())),
        lro.in_subspace(optax.chain(optax.trace(0.9), optax.scale(0.5))),
        lro.in_subspace(optax.scale_by_lion()),
        lro.reset_moments(optax.scale_by_adam()),
        lro.rotate_moments(optax.scale_by_adam()),
    ],
    ids=["adam", "per matrix", "trace", "lion", "reset", "rotated"],
)
def test_the_moment_is_found_in_every_step(step: Any) -> None:
    seen = []

    def choose(frame: Frame, *_: Any) -> Any:
        seen.append((frame.path, jnp.shape(frame.momentum)))
        return jnp.eye(*frame.basis_shape[-2:]) + jnp.zeros(frame.basis_shape)

    g = {"a": normal(2, M, N), "b": normal(5), "c": normal(N, M)}
    tx = bracket(lro.basis_rule(choose), step)
    jax.eval_shape(tx.update, g, tx.init(g))
    assert seen == [("a", (2, R, N)), ("c", (1, R, N))]


def test_a_recomputed_basis_is_orthonormal_and_a_stepped_one_is_not() -> None:
    gradients = 100 * normal(10, 2, M, N)  # of loss gradients far above norm one
    s = walk(lro.bases.correlation_aware(0.5, recompute_every=3), gradients).basis
    errors = [float(orthonormality_error(x)) for x in s]
    for t, error in enumerate(errors):
        assert (error < 1e-5) == (t % 3 == 0), (t, error)
        if t % 3:  # a clipped step, by no more than its size; rounding of S - step
            moved = np.linalg.norm(s[t] - s[t - 1], axis=(-2, -1))
            np.testing.assert_allclose(moved, 0.5, rtol=1e-4)


@pytest.mark.parametrize("bad", [0, -1, 2.0, None])
def test_recompute_every_is_a_positive_int(bad: Any) -> None:
    with pytest.raises(ValueError, match="recompute_every must be an int of at least"):
        lro.bases.correlation_aware(recompute_every=bad)
