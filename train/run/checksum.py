"""One number for an array, which shows whether a checkpoint is damaged."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def checksums(tree: Any) -> dict[str, int]:
    """The checksum of each array of a tree, by path.

    The sum of all 32-bit words x_i, each times an odd number by its position, modulo
    2^32:

        sum_i x_i (2 k i + 1),   k = 1,640,531,527

    One wrong bit, wherever it is, changes the sum; other damage leaves it unchanged
    with probability 2^-32. Computed where the arrays are, and the same for every
    sharding: sums of integers do not round.

    Example:
      >>> checksums({"w": jnp.ones(2, jnp.int32)})
      {"['w']": 3281063056}
    """
    sums = jax.device_get(_checksums(tree))
    leaves = jax.tree_util.tree_leaves_with_path(sums)
    return {jax.tree_util.keystr(path): int(value) for path, value in leaves}


@jax.jit
def _checksums(tree: Any) -> Any:
    return jax.tree.map(_checksum, tree)


def _checksum(x: jax.Array) -> jax.Array:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    size = min(x.dtype.itemsize, 4)  # of eight bytes two words are made
    words = jax.lax.bitcast_convert_type(x, f"uint{8 * size}").astype(jnp.uint32)
    place = jax.lax.iota(jnp.uint32, words.size).reshape(words.shape)
    odd = place * np.uint32(2 * 1640531527) + np.uint32(1)
    return jnp.sum(words * odd, dtype=jnp.uint32)
