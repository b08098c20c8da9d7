"""The papers' equations once more, in numpy and float64, to test the library against.

Written from the papers and from the deviations that the library's docstrings state,
not from the library's code: one matrix at a time, nothing fused, every product formed.
Steps are counted from 0; W, G are (m, n) with m <= n, S is (m, r).
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Rules:
    """What sets the optimizers apart.

    Attributes:
      learning_rate: from the step's number to the rate.
      refresh_every: T.
      scale: alpha, on the part inside the subspace.
      limit: zeta, or None for an optimizer that gives no residual back.
      rotate: whether the moments follow the basis (eqs. 7 and 8).
    """

    learning_rate: Callable[[int], float]
    refresh_every: int
    scale: float = 1.0
    limit: float | None = None
    rotate: bool = False
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0


def adamw(w: Array, grads: Sequence[Array], rules: Rules) -> list[Array]:
    """AdamW: the weights after each step."""
    m, v, out = np.zeros_like(w), np.zeros_like(w), []
    for t, g in enumerate(grads):
        m = rules.b1 * m + (1 - rules.b1) * g
        v = rules.b2 * v + (1 - rules.b2) * g**2
        m_hat, v_hat = m / (1 - rules.b1 ** (t + 1)), v / (1 - rules.b2 ** (t + 1))
        step = m_hat / (np.sqrt(v_hat) + rules.eps) + rules.weight_decay * w
        w = w - rules.learning_rate(t) * step
        out.append(w)
    return out


def low_rank_adamw(
    w: Array, grads: Sequence[Array], bases: Sequence[Array], rules: Rules
) -> list[Array]:
    """GaLore, Fira, GrassWalk or GrassJump on given bases: the weights of each step.

    Args:
      w: W_0.
      grads: G_0, G_1, ...
      bases: the basis of each refresh, at steps 0, T, 2T, ...
      rules: which of them.
    """
    s = bases[0]
    m = np.zeros((s.shape[1], w.shape[1]))
    v, last, out = np.zeros_like(m), None, []
    for t, g in enumerate(grads):
        if t % rules.refresh_every == 0 and t > 0:
            old, s = s, bases[t // rules.refresh_every]
            if rules.rotate:
                m, v = turned_moments(m, v, s.T @ old, t, rules)
        low = s.T @ g  # eq. 1
        m = rules.b1 * m + (1 - rules.b1) * low  # eq. 5
        v = rules.b2 * v + (1 - rules.b2) * low**2  # eq. 6
        m_hat, v_hat = m / (1 - rules.b1 ** (t + 1)), v / (1 - rules.b2 ** (t + 1))
        low_step = m_hat / (np.sqrt(v_hat) + rules.eps)
        step = rules.scale * s @ low_step
        if rules.limit is not None:
            residual, last = recovered(g, s, low_step, last, rules.limit)
            step = step + residual  # eq. 11
        w = w - rules.learning_rate(t) * (step + rules.weight_decay * w)
        out.append(w)
    return out


def turned_moments(
    m: Array, v: Array, c: Array, steps: int, rules: Rules
) -> tuple[Array, Array]:
    """Eqs. 7 and 8 with bias-corrected moments inside; `steps` have been done."""
    m_hat, v_hat = m / (1 - rules.b1**steps), v / (1 - rules.b2**steps)
    second = (c**2) @ (v_hat - m_hat**2) + (c @ m_hat) ** 2
    return c @ m, (1 - rules.b2**steps) * np.abs(second)


def recovered(
    g: Array, s: Array, low_step: Array, last: float | None, limit: float
) -> tuple[Array, float | None]:
    """Lambda_t after the limiter, and the norm to limit the next one against."""
    low = s.T @ g
    phi = np.zeros(g.shape[1])  # stays 0 where the projected column is 0
    for i in range(g.shape[1]):
        if np.any(low[:, i]):
            phi[i] = np.linalg.norm(low_step[:, i]) / np.linalg.norm(low[:, i])  # eq. 9
    residual = (g - s @ low) * phi
    norm = float(np.linalg.norm(residual))
    if norm == 0.0:
        return residual, last
    if last is not None and norm / last > limit:
        residual = residual * (limit * last / norm)  # eq. 10
        norm = float(np.linalg.norm(residual))
    return residual, norm


def left_singular_vectors(g: Array) -> Array:
    """U of G = U diag(s) V^T, each column's entry of largest magnitude positive."""
    u = np.linalg.svd(g, full_matrices=False)[0]
    for j in range(u.shape[1]):
        if u[np.abs(u[:, j]).argmax(), j] < 0:
            u[:, j] = -u[:, j]
    return u


def geodesic(s: Array, x: Array, angle: float, rank: int | None = None) -> Array:
    """Eq. 4 as written, X^ = U Sigma V^T by an SVD, X^ tangent and of unit norm.

    Of U, Sigma and V the `rank` leading triples, or all.
    """
    x = x - s @ (s.T @ x)
    x = x / np.linalg.norm(x, ord=2)
    u, sigma, v_t = np.linalg.svd(x, full_matrices=False)
    u, sigma, v_t = u[:, :rank], sigma[:rank], v_t[:rank]
    v = v_t.T
    stacked = np.concatenate([s @ v, u], axis=1)
    turn = np.concatenate(
        [np.diag(np.cos(sigma * angle)), np.diag(np.sin(sigma * angle))]
    )
    return stacked @ turn @ v_t + s @ (np.eye(len(v)) - v @ v_t)


def sample_probabilities(weights: Sequence[float]) -> dict[tuple[int, int], float]:
    """Of each pair i < j drawn without replacement (SARA paper, section 3.2)."""
    w = np.asarray(weights) / np.sum(weights)
    return {
        (i, j): float(w[i] * w[j] / (1 - w[i]) + w[j] * w[i] / (1 - w[j]))
        for j in range(len(w))
        for i in range(j)
    }
