"""Where: a basis rule as data."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.core import linalg
from lowrank_optax.core.frame import Frame, eye_basis
from lowrank_optax.core.linalg import Decomposition
from lowrank_optax.core.stage import Clock

# The keys are None for a rule without a key.
Choose = Callable[[Frame, Any, Clock], jax.Array]


class BasisState(NamedTuple):
    """State of a basis rule; its trees have one array for each parameter.

    Attributes:
      rng_key: a typed key, split at a refresh and at no other time; None for a rule
        that draws nothing.
      basis: what is kept of S: S itself, (*batch, m, r), or (*batch, r) integers where
        its columns are coordinates; a `QuantizedBasis` of trees for `quantize_basis`,
        and for `gaussian` the one typed key that all bases are drawn from.
      started: (*batch,) bool, whether a gradient that is not zero was seen.
    """

    rng_key: jax.Array | None
    basis: Any
    started: Any


class Storage(NamedTuple):
    """How a basis is kept between steps.

    Attributes:
      pack: from a Frame and S_t (*batch, m, r) to what is stored, a tree of arrays with
        the batch axes in front.
      unpack: from a Frame and what is kept to S_t.
      like: a tree of the structure of what is stored.
    """

    pack: Callable[[Frame, jax.Array], Any]
    unpack: Callable[[Frame, Any], jax.Array]
    like: Any = 0


AS_IT_IS = Storage(pack=lambda _, s: s, unpack=lambda _, s: s)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """A basis rule as data; `basis_rule` says what the fields mean.

    Attributes:
      first: the basis before the first refresh, from a Frame.
      storage: how bases are stored.
      once: whether a basis is for good.
      batched: whether small matrices are best asked for in one batch (`is_batched`):
        `choose` has no conditional, and looks at nothing but gradients and keys.
      by_path: whether `choose` goes by a leaf's path, and must see all of its matrices.
    """

    choose: Choose
    key: jax.Array | int | None = None
    orthonormal: bool = True
    coordinates: bool = False
    svd_until: int | jax.Array = 0
    decomposition: Decomposition | None = None
    from_gradient: bool = True
    storage: Storage = AS_IT_IS
    once: bool = False
    batched: bool = False
    by_path: bool = False

    def is_batched(self, frame: Frame) -> bool:
        """Whether the matrices of a leaf take less time in one batch than in a loop."""
        return self.batched and frame.basis_shape[-2] <= linalg.TOGETHER

    def first(self, frame: Frame) -> jax.Array:
        if self.coordinates:
            return jnp.broadcast_to(jnp.arange(frame.rank), (*frame.batch, frame.rank))
        return eye_basis(frame)


class BasisRule(optax.GradientTransformationExtraArgs):
    """A stage that chooses bases, and the `Rule` that it follows."""

    rule: Rule


def rule_of(rule: optax.GradientTransformation, wrapper: str) -> Rule:
    """The `Rule` of a basis rule that `wrapper` goes around."""
    if isinstance(rule, BasisRule):
        return rule.rule
    raise ValueError(
        f"{wrapper} goes around a basis rule, such as dominant_svd() or what "
        "basis_rule() returns; online_pca() moves its basis at every step, and "
        "lazy_refresh() goes outside of the others"
    )
