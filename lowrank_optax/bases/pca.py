"""Where: a basis trained by an optimizer of its own, every step (online PCA)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.core import linalg, singular
from lowrank_optax.core.aliases import Number, Tree
from lowrank_optax.core.checks import transformation
from lowrank_optax.core.frame import Frame, eye_basis
from lowrank_optax.core.sharding import shard_basis, shard_batch
from lowrank_optax.core.singular import Decomposition
from lowrank_optax.core.spread import over_devices, replicated
from lowrank_optax.core.stage import Clock, both, branch, check_only_rule, timed_stage
from lowrank_optax.core.trees import map_frames


class OnlinePCAState(NamedTuple):
    """State of `online_pca`; its trees have a scalar for a leaf of full rank.

    Attributes:
      basis: P, (*batch, m, r), for the next step.
      inner_state: the state of the optimizer of P.
      loss: (*batch,), ||P P^T G^ - G^||_F^2 of the last step, in [0, 1] for an
        orthonormal P.
      drift: (*batch,), max |P^T P - I| of the last step's P.
    """

    basis: Tree
    inner_state: Tree
    loss: Tree
    drift: Tree


def online_pca(
    optimizer: optax.GradientTransformation | None = None,
    *,
    penalty: Number = 0.0,
    decomposition: Decomposition | None = None,
) -> optax.GradientTransformationExtraArgs:
    """P takes an optimizer's step on the reconstruction loss at every step.

    P_0 = U[:, :r] of G_0; then with G^ = G / ||G||_F, after P_t has been used,

        L(P) = ||P P^T G^ - G^||_F^2 + penalty ||P^T P - I||_F^2
        P_{t+1} = P_t + optimizer(grad L(P_t))

    (Liang et al. 2024, "Memory-Efficient LLM Training with Online Subspace Descent",
    section 4). P does not change at step 0, where it is the minimum. With A = P^T G^
    the gradient of the first term is 2 (P A A^T + G^ A^T P^T P - 2 G^ A^T).

    P is only as orthonormal as L makes it. The state reports `drift` and `loss`, and
    stages that need an orthonormal basis raise an error. P changes at every step, and
    moments do not rotate, as in the source. The source's released code has no penalty.

    Args:
      optimizer: any optax optimizer, learning rate and sign included; by default
        `optax.adamw(1 / 200, weight_decay=0.01)`, the released code's at T = 200, whose
        rate also follows the weights' schedule.
      penalty: lambda.
      decomposition: of G_0, "svd", "gram" or None, as in `dominant_svd`.

    Raises:
      ValueError: another decomposition; at update, outside `low_rank`.

    Example:
      >>> stages = optax.chain(lro.bases.online_pca(optax.adam(1e-3)), lro.project(),
      ...     lro.in_subspace(optax.scale_by_adam()), lro.project_back(0.25))
    """
    singular.check_full(decomposition)
    if optimizer is None:
        optimizer = optax.adamw(1 / 200, weight_decay=0.01)
    optimizer = transformation("online_pca()", optimizer, "optax.adam(1e-3)")

    def init(params: optax.Params) -> OnlinePCAState:
        basis = _on_subspaces(lambda f: shard_basis(f, eye_basis(f)), params)
        loss, drift = (_on_subspaces(_number, params) for _ in range(2))
        return OnlinePCAState(basis, optimizer.init(basis), loss, drift)

    def update(
        frames: optax.Updates, state: OnlinePCAState, now: Clock
    ) -> tuple[optax.Updates, OnlinePCAState]:
        check_only_rule(frames)
        start = now.step == 0
        basis = _on_subspaces(
            lambda f, p: _started(f, p, both(now.refresh, start), decomposition),
            frames,
            state.basis,
        )
        grad, loss, drift = (
            _on_subspaces(lambda f, p, i=i: learn(f, p, penalty)[i], frames, basis)
            for i in range(3)
        )
        steps, inner_state = optimizer.update(grad, state.inner_state, basis)
        # At step 0 P is the minimum already, and its optimizer's moments stay zero.
        steps, inner_state = jax.tree.map(
            lambda new, old: jnp.where(start, old, new),
            (steps, inner_state),
            (optax.tree.zeros_like(steps), state.inner_state),
        )
        frames = map_frames(
            lambda f, p: f if f.full_rank else f.replace(basis=p, orthonormal=False),
            frames,
            basis,
        )
        new = optax.apply_updates(basis, steps)
        return frames, OnlinePCAState(new, inner_state, loss, drift)

    return timed_stage(init, update)


def _number(frame: Frame) -> jax.Array:
    """Zero, for each matrix."""
    return shard_batch(frame, jnp.zeros(frame.batch, frame.gradient.dtype))


def _on_subspaces(f: Callable[..., jax.Array], frames: Tree, *rest: Tree) -> Tree:
    """A tree of f(frame, ...) with scalar zeros, which an optimizer can take, where
    there is no basis.
    """

    def one(x: Tree, *xs: Tree) -> jax.Array:
        if isinstance(x, Frame):
            if not x.full_rank:
                return f(x, *xs)
            x = x.gradient
        return jnp.zeros([], jnp.promote_types(x.dtype, jnp.float32))

    return jax.tree.map(one, frames, *rest)


def _started(
    frame: Frame,
    p: jax.Array,
    start: bool | jax.Array,
    decomposition: Decomposition | None,
) -> jax.Array:
    """P_0 at the start, and P after it."""

    def leading() -> jax.Array:
        g = frame.gradient.reshape(-1, *frame.gradient.shape[-2:])
        s = over_devices(lambda g, _: singular.leading(g, frame.rank, decomposition), g)
        return replicated(s).reshape(frame.basis_shape)

    return branch(start, leading, lambda: p)


def learn(
    frame: Frame, p: jax.Array, penalty: Number
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """grad L, L without its penalty, and the drift, of each matrix."""
    g = linalg.unit_largest(frame.gradient)
    norm = jnp.linalg.norm(g, axis=(-2, -1), keepdims=True)
    g = g / jnp.where(norm > 0, norm, 1)
    a = frame.replace(basis=p).down(g)
    b = jnp.einsum("...mn,...rn->...mr", g, a, precision=frame.precision)
    aa = linalg.gram(linalg.transpose(a))
    pp = linalg.gram(p)
    excess = linalg.minus_identity(pp)
    grad = 2 * (linalg.matmul(p, aa) + linalg.matmul(b, excess) - b)
    grad = grad + 4 * penalty * linalg.matmul(p, excess)
    traces = jnp.sum(pp * aa, axis=(-2, -1)) - 2 * jnp.trace(aa, axis1=-2, axis2=-1)
    loss = jnp.sum(jnp.square(g), axis=(-2, -1)) + traces
    return grad, loss, jnp.max(jnp.abs(excess), axis=(-2, -1))
