"""Step: Adam with moments that low-rank factors fit online (LoRA-Pre)."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.core.aliases import Key, Number, Tree
from lowrank_optax.core.frame import Frame
from lowrank_optax.core.keys import check_key
from lowrank_optax.core.linalg import (
    average_weight,
    eigh,
    gram,
    largest,
    matmul,
    ratio,
    select,
    transpose,
)
from lowrank_optax.core.stage import check_first, timed_frame_stage
from lowrank_optax.full_rank.factors import left_zeros, random_right


class LoraPreState(NamedTuple):
    """State of `scale_by_lora_pre`; False at leaves of full rank.

    Attributes:
      mu_left: B, (*batch, m, r).
      mu_right: A, (*batch, r, n).
      nu_left: B_v, (*batch, m, r).
      nu_right: A_v, (*batch, r, n).
    """

    mu_left: optax.Params
    mu_right: optax.Params
    nu_left: optax.Params
    nu_right: optax.Params


def scale_by_lora_pre(
    b1: Number = 0.9,
    b2: Number = 0.95,
    eps: Number = 1e-8,
    *,
    scale: Number = 1.0,
    key: Key,
) -> optax.GradientTransformationExtraArgs:
    """Adam's step, with moments that low-rank factors fit online (LoRA-Pre).

        M = b1 B A + (1 - b1) G,    V = b2 (B_v A_v)^2 + (1 - b2) G^2
        step = scale M^ / (sqrt(V^) + eps)
        B <- (1 - g) B + g G A^T (A A^T)^-1
        A <- (1 - g) A + g (B^T B)^-1 B^T G,       1 - g = sqrt(b1)

    with B (m, r) and A (r, n), both moved from where they were, squares entry by entry,
    and Adam's correction for bias. B_v and A_v are fitted to |G| in the same way, with
    1 - g = b2^(1/4). Each factor takes a step of Newton's method on ||B A - G||_F^2
    (Wang et al. 2026, "Taming Momentum: Rethinking Optimizer States Through Low-Rank
    Approximation", Theorem 3.1 and Algorithm 1). Use it alone inside
    `full_matrices(rank=r)` or `low_rank`.

    B begins as zero and A at random. B is sharded as a basis is, and A as G is along n.

    Deviations: no code is published, and Algorithm 1 was read from descriptions of it
    only. In these M and V are made of the factors of the last step. All eigenvalues of
    a Gram matrix are raised by r eps times the largest, so that it has an inverse. A
    zero gradient leaves the factors: while B decayed, A's step would grow as 1 / B.

    Args:
      b1: decay rate of M.
      b2: decay rate of V.
      eps: added to the root of V^.
      scale: a factor on the step.
      key: a seed or a typed key for the first A and A_v.

    Raises:
      ValueError: a key that is neither an int nor typed; at update, outside `low_rank`.

    Example:
      >>> stages = lro.steps.with_rest(lro.full_rank.scale_by_lora_pre(key=0))
      >>> tx = lro.full_rank.full_matrices(stages, rank=2)
      >>> state = tx.init({"w": jnp.ones((6, 8))})
      >>> optax.tree.get(state, "mu_left")["w"].shape
      (6, 2)
    """
    check_key(key)
    first = (
        left_zeros,
        lambda frame: random_right(frame, key, 0),
        left_zeros,
        lambda frame: random_right(frame, key, 1),
    )

    def one(frame: Frame, *row: Tree) -> tuple[Tree, ...]:
        check_first(frame, "step")
        *factors, now = row
        G, mu, nu = frame.gradient, factors[:2], factors[2:]
        product = partial(jnp.matmul, precision=frame.precision)
        mean = b1 * product(*mu) + (1 - b1) * G
        squares = b2 * jnp.square(product(*nu)) + (1 - b2) * jnp.square(G)
        mean, squares = (
            moment / average_weight(jnp.asarray(1 - b, G.dtype), now.step + 1)
            for moment, b in ((mean, b1), (squares, b2))
        )
        step = jnp.multiply(scale, ratio(mean, jnp.sqrt(squares), eps))
        units = [x / largest(x) for x in factors]
        inverses = _inverses(units)

        def moved(i: int, target: jax.Array, keep: Number) -> tuple[jax.Array, ...]:
            (left, right), (a, b) = factors[i : i + 2], units[i : i + 2]
            new_left = matmul(product(target, transpose(b)), inverses[i + 1])
            new_right = matmul(inverses[i], product(transpose(a), target))
            new_left = keep * left + (1 - keep) * new_left / largest(right)
            new_right = keep * right + (1 - keep) * new_right / largest(left)
            nonzero = frame.nonzero()
            return (
                select(nonzero, new_left, left),
                select(nonzero, new_right, right),
            )

        new_mu = moved(0, G, b1**0.5)
        new_nu = moved(2, jnp.abs(G), b2**0.25)
        return frame.replace(step=step), *new_mu, *new_nu

    return timed_frame_stage(LoraPreState, one, *first)


def _inverses(factors: list[jax.Array]) -> list[jax.Array]:
    """The inverses of the Gram matrices of B, A, B_v and A_v, (*batch, r, r).

    One eigendecomposition for all four. A zero factor has the identity.
    """
    tall = [transpose(x) if i % 2 else x for i, x in enumerate(factors)]
    values, vectors = eigh(jnp.stack([gram(x) for x in tall]))
    eps = jnp.finfo(values.dtype).eps
    floor = values.shape[-1] * eps * values[..., -1:]
    raised = jnp.maximum(values, 0) + floor
    raised = jnp.where(floor > 0, raised, 1)
    scaled = vectors / raised[..., None, :]
    return list(matmul(scaled, transpose(vectors)))
