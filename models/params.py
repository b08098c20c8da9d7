"""The functional face of the model: plain dicts of arrays in, logits out."""

from functools import lru_cache, partial
from typing import Any

import jax
from flax import nnx

from models.config import LlamaConfig
from models.llama import Llama

Params = dict[str, Any]


@partial(jax.jit, static_argnums=0)
def init_params(config: LlamaConfig, key: jax.Array) -> Params:
    """Draw the weights: normal(0, init_std) matrices, norm scales of 1, float32.

    Runs under `jax.jit` (also with `out_shardings`) and `jax.eval_shape`. The same
    key gives the same bits; another sharding may round a weight's last bits otherwise.
    The layers are stacked, and kernels are (in, out):

        embed/embedding (V, D)          layers/attention_norm/scale (L, D)
        head/kernel (D, V)              layers/attention/{q,k,v,o}/kernel (L, in, out)
        norm/scale (D,)                 layers/mlp_norm/scale (L, D)
                                        layers/mlp/{gate,up}/kernel (L, D, F)
                                        layers/mlp/down/kernel (L, F, D)
    """
    model = Llama(config, rngs=nnx.Rngs(key))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def bind(config: LlamaConfig, params: Params) -> Llama:
    """The module with these weights.

    Raises:
      ValueError: if a weight is missing, unexpected, or of another shape.
    """
    graphdef, expected = _abstract(config)
    found = _shapes(params)
    for path in sorted(expected.keys() | found.keys()):
        if expected.get(path) != found.get(path):
            raise ValueError(
                f"params[{path!r}] has shape {found.get(path)}, but the config needs "
                f"{expected.get(path)}; use the config that init_params was given"
            )
    return nnx.merge(graphdef, params)


def forward(config: LlamaConfig, params: Params, tokens: jax.Array) -> jax.Array:
    """Logits for the token after each position; position t sees tokens 0 to t only.

    int (B, T) tokens -> float32 (B, T, V). Works under jit, grad and eval_shape, and
    with sharded params. An id of V or more turns its sequence's logits to NaN.

    Raises:
      ValueError: if `params` do not fit `config`.

    Example:
      >>> import jax
      >>> from models.config import SIZES
      >>> params = init_params(SIZES["tiny"], jax.random.key(0))
      >>> forward(SIZES["tiny"], params, jax.numpy.ones((2, 8), int)).shape
      (2, 8, 4096)
    """
    return bind(config, params)(tokens)


def count_params(config: LlamaConfig) -> int:
    """Number of weights, read off the abstract model; allocates nothing."""
    shapes = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@lru_cache
def _abstract(config: LlamaConfig) -> tuple[nnx.GraphDef, dict[str, tuple[int, ...]]]:
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
    return graphdef, _shapes(nnx.to_pure_dict(state))


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
