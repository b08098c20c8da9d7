"""Where: bases of left singular vectors, the top r or a sample of them."""

import jax
import jax.numpy as jnp

from lowrank_optax.bases.follow import follow
from lowrank_optax.bases.rule import BasisRule, Rule, small
from lowrank_optax.core import linalg, singular
from lowrank_optax.core.aliases import Key
from lowrank_optax.core.frame import Frame, eye_basis
from lowrank_optax.core.keys import check_key, sample_indices
from lowrank_optax.core.singular import Decomposition
from lowrank_optax.core.stage import Clock


def dominant_svd(
    *, decomposition: Decomposition | None = None, key: Key | None = None
) -> BasisRule:
    """The r leading left singular vectors of the gradient (GaLore).

    G_t = U diag(s) V^T, S_t = U[:, :r]    (GrassWalk paper, section 2, eq. 2)

    This is the nearest rank-r subspace, but it freezes. After the early phase of
    training, the top r vectors barely change, and neither does what the weights can
    learn (SARA paper, section 3.1). For a zero or rank-deficient gradient the basis is
    filled up with any orthonormal vectors.

    Args:
      decomposition: "svd"; "gram", eigenvectors of G G^T; None: "svd" on a CPU, "gram"
        on an accelerator; or one of two that compute only r + 8 directions, much
        faster for large matrices (docs/results/refresh_time.md): "randomized", a
        range finder with two power steps, and "iterate", two steps of subspace
        iteration that start from the old basis. In float32 both lose directions whose
        singular values are below 3e-4 of the largest.
      key: a seed or a typed key, for "randomized" and "iterate".

    Raises:
      ValueError: "randomized" or "iterate" without a key, or an unknown decomposition.

    Example:
      >>> stages = optax.chain(lro.dominant_svd(), lro.project(),
      ...     lro.in_subspace(optax.identity()), lro.project_back())
      >>> tx = lro.low_rank(stages, rank=1, refresh_every=1)
      >>> g = {"w": jnp.outer(jnp.arange(3.), jnp.arange(4.))}   # rank one
      >>> bool(jnp.allclose(tx.update(g, tx.init(g))[0]["w"], g["w"], atol=1e-5))
      True
    """
    if decomposition not in (None, "svd", "gram", "randomized", "iterate"):
        raise ValueError(
            f"decomposition={decomposition!r}: choose "
            '"svd", "gram", "randomized", "iterate" or None'
        )
    sketched = decomposition in ("randomized", "iterate")
    if sketched and key is None:
        raise ValueError(f"decomposition={decomposition!r} draws a sketch: pass a key")

    def choose(frame: Frame, keys: jax.Array, _: Clock) -> jax.Array:
        start = _start(frame, keys) if decomposition == "iterate" else None
        args = frame.gradient, frame.rank, decomposition, keys, start
        return singular.leading(*args)

    if sketched and key is not None:
        return follow(Rule(choose=choose, key=check_key(key), batched=_few))
    return follow(Rule(choose=choose, batched=small))


def _start(frame: Frame, keys: jax.Array) -> jax.Array:
    """S_{t-1}, and a Gaussian matrix where no basis has been chosen yet."""
    old = frame.need("basis")
    none = jnp.all(old == eye_basis(frame), axis=(-2, -1))
    # Keys of their own: those given draw the columns beyond the rank.
    keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
    x = linalg.normal(keys, old.shape[-2:], old.dtype)
    return linalg.select(none, linalg.fence(x), old)


def _few(m: int, r: int) -> bool:
    return m <= singular.ONE_CALL and r + singular.OVERSAMPLING <= linalg.TOGETHER


def sara_sample(key: Key, *, decomposition: Decomposition | None = None) -> BasisRule:
    """r left singular vectors, sampled by singular value without replacement (SARA).

    G_t = U diag(s) V^T, w_i = s_i / sum_j s_j, I = sort(sample r of m by w without
    replacement), S_t = U[:, I] (SARA paper, section 3.2, Algorithm 2). The first index
    is drawn with the probabilities w. Each later index is drawn with the weights of
    those that are left. Sorting keeps moments that are not rotated aligned. If fewer
    than r singular values are nonzero, the first vectors of singular value zero fill
    the basis.

    On LLaMA-60M (docs/results/ablations.md) the subspace moves: its overlap with the
    one before is 0.37 instead of 0.65. The loss of `galore` changed by 0.001 +- 0.059,
    and that of `fira` by -0.022 +- 0.014.

    Args:
      key: a seed or a typed key.
      decomposition: "svd", "gram" or None, as in `dominant_svd`. "gram" rounds singular
        values under sqrt(eps) times the largest to about that, which moves their
        probability by less than 1e-3 of the largest one's in float32.

    Raises:
      ValueError: "randomized" (a sketch has no tail to sample from) or an unknown
        decomposition; a key that is neither an int nor typed.

    Example:
      >>> tx = lro.galore(1e-2, rank=4, refresh_every=50,
      ...     basis=lro.sara_sample(key=0), dimension_numbers=None)
    """
    if decomposition not in (None, "svd", "gram"):
        raise ValueError(
            f"sara_sample() needs all singular values, not decomposition="
            f'{decomposition!r}; choose "svd", "gram" or None'
        )

    def choose(frame: Frame, keys: jax.Array, _: Clock) -> jax.Array:
        u, s = singular.left_singular(frame.gradient, decomposition)
        index = sample_indices(keys, s, frame.rank)
        return jnp.take_along_axis(u, index[..., None, :], axis=-1)

    return follow(Rule(choose=choose, key=check_key(key), batched=small))
