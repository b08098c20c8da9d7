"""Random keys, and indices drawn with them."""

import jax
import jax.numpy as jnp

from lowrank_optax.core.aliases import Key


def check_key(key: Key) -> jax.Array | int:
    """`key`; ValueError unless it is a seed or a typed key.

    It creates no array, which would start a backend.
    """
    dtype = getattr(key, "dtype", type(key))
    typed = jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if jnp.ndim(key) or not (typed or jnp.issubdtype(dtype, jnp.integer)):
        raise ValueError(
            f"key must be an int or a typed key from jax.random.key, not {key!r}"
        )
    return key


def canonical_key(key: Key) -> jax.Array:
    """A new typed key from a seed or a typed key; a copy, which can be donated."""
    check_key(key)
    typed = isinstance(key, jax.Array) and jnp.issubdtype(
        key.dtype, jax.dtypes.prng_key
    )
    return jax.random.clone(key) if typed else jax.random.key(key)


def stored_key(key: Key) -> jax.Array:
    """A key as a state has it: its data, uint32.

    Wrappers and serializers do arithmetic on states, or write their bytes, which typed
    keys refuse.
    """
    return jax.random.key_data(canonical_key(key))


def typed_key(data: jax.Array, key: Key) -> jax.Array:
    """The typed key of `stored_key(key)`, or of what followed it."""
    typed = isinstance(key, jax.Array) and jnp.issubdtype(
        key.dtype, jax.dtypes.prng_key
    )
    impl = jax.random.key_impl(key) if typed else None
    return jax.random.wrap_key_data(data, impl=impl)


def split(data: jax.Array, key: Key) -> tuple[jax.Array, jax.Array]:
    """The next stored key, and a typed one to draw from."""
    following, drawn = jax.random.split(typed_key(data, key))
    return jax.random.key_data(following), drawn


def sample_indices(keys: jax.Array, scores: jax.Array, count: int) -> jax.Array:
    """`count` of the indices, drawn by score without replacement and sorted.

    The first is drawn with probabilities scores / sum(scores), each next one with those
    of the indices that are left; zero scores come last, the first in order.

    Args:
      keys: (L,) typed keys, one for each matrix, as `basis_rule` passes them.
      scores: (L, m), not negative; all zeros count as equal.
      count: how many, at most m.

    Returns:
      (L, count) integers.

    Raises:
      ValueError: a count above m.

    Example:
      >>> keys = jax.random.split(jax.random.key(0), 2)
      >>> scores = jnp.array([[0.0, 1.0, 0.0, 2.0], [5.0, 0.0, 0.0, 1.0]])
      >>> lro.stages.sample_indices(keys, scores, 2).tolist()
      [[1, 3], [0, 3]]
    """
    m = scores.shape[-1]
    if count > m:
        raise ValueError(
            f"cannot draw {count} of {m} indices without replacement; lower the count"
        )
    total = jnp.sum(scores, axis=-1, keepdims=True)
    weights = jnp.where(total > 0, scores / jnp.where(total > 0, total, 1), 1 / m)

    def sample(key: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sort(jax.random.choice(key, m, (count,), replace=False, p=w))

    return jax.vmap(sample)(keys, weights)
