"""Where: a basis rule as data."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.core import linalg
from lowrank_optax.core.aliases import Key, Step, Tree
from lowrank_optax.core.frame import Frame, eye_basis
from lowrank_optax.core.singular import Decomposition
from lowrank_optax.core.stage import Clock

# The keys are None for a rule without a key.
Choose = Callable[[Frame, Tree, Clock], jax.Array]


class BasisState(NamedTuple):
    """State of a basis rule; its trees have one array for each parameter.

    Attributes:
      rng_key: the data of a key, uint32, split at every refresh; None for a rule that
        draws nothing.
      basis: the stored S: (*batch, m, r), or (*batch, r) integers where its columns are
        coordinates; a `QuantizedBasis` of trees for `quantize_basis`; for `gaussian`
        the data of one key that all bases are drawn from.
      started: (*batch,) bool, whether the matrix has had a nonzero gradient.
    """

    rng_key: jax.Array | None
    basis: Tree
    started: Tree


class Storage(NamedTuple):
    """How a basis is stored between steps.

    Attributes:
      pack: from a Frame and S_t (*batch, m, r) to what is stored, a tree of arrays with
        the batch axes in front.
      unpack: from a Frame and what is stored to S_t.
      like: a tree of the structure of what is stored.
    """

    pack: Callable[[Frame, jax.Array], Tree]
    unpack: Callable[[Frame, Tree], jax.Array]
    like: Tree = 0


AS_IT_IS = Storage(pack=lambda _, s: s, unpack=lambda _, s: s)


def never(m: int, r: int) -> bool:
    """For `Rule.batched`."""
    del m, r
    return False


def small(m: int, r: int) -> bool:
    """For `Rule.batched`: whether one matrix does not fill a device."""
    del r
    return m <= linalg.TOGETHER


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """A basis rule as data; `basis_rule` documents the other fields.

    Attributes:
      first: the basis before the first refresh, from a Frame.
      storage: how bases are stored.
      once: whether the basis of step 0 stays.
      batched: from m and r to whether one call for many matrices is faster than a
        loop; `choose` then has no conditional or loop but those of `orthonormalize`,
        which `jax.vmap` does not batch.
      by_path: whether `choose` reads a leaf's path, and needs all of its matrices.
      reads_gradient: whether `choose` reads gradients; where it does not, only the
        singular vectors of `svd_until` do.
    """

    choose: Choose
    key: Key | None = None
    orthonormal: bool = True
    coordinates: bool = False
    svd_until: Step = 0
    decomposition: Decomposition | None = None
    from_gradient: bool = True
    storage: Storage = AS_IT_IS
    once: bool = False
    batched: Callable[[int, int], bool] = never
    by_path: bool = False
    reads_gradient: bool = True

    def is_batched(self, frame: Frame) -> bool:
        """Whether the matrices of a leaf take less time in one batch than in a loop."""
        return self.batched(*frame.basis_shape[-2:])

    def first(self, frame: Frame) -> jax.Array:
        if self.coordinates:
            return jnp.broadcast_to(jnp.arange(frame.rank), (*frame.batch, frame.rank))
        return eye_basis(frame)


class BasisRule(optax.GradientTransformationExtraArgs):
    """A stage that chooses bases, and the `Rule` that it follows."""

    rule: Rule


def rule_of(rule: optax.GradientTransformation, wrapper: str) -> Rule:
    """The `Rule` of a basis rule; ValueError, in the name of `wrapper`, for others."""
    if isinstance(rule, BasisRule):
        return rule.rule
    raise ValueError(
        f"{wrapper} wraps a basis rule, such as dominant_svd() or what basis_rule() "
        "returns; online_pca() is none, since it changes its basis at every step, and "
        "lazy_refresh() and adaptive_refresh() must be the outermost wrapper"
    )
