"""The functional face of the model: plain dicts of arrays in, logits out."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
from flax import nnx

from models.config import LlamaConfig
from models.llama import (
    REMAT,
    Block,
    Head,
    Llama,
    context_of,
    embedding,
    rms_norm,
)

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

    Where the config asks for biases, those of layers/attention/q/kernel are
    layers/attention/q/bias (L, out), zeros at the start. A model with tied embeddings
    has no head.
    """
    model = Llama(config, rngs=nnx.Rngs(key))
    return _pure(model)


def draw_params(
    config: LlamaConfig, key: jax.Array, store: Callable[[Params], Any]
) -> Params:
    """`store` of the weights of `init_params`, drawn one layer at a time.

    So that of what `store` makes smaller never more than a layer is there in float32.
    """
    rngs = nnx.Rngs(key)
    parts: dict[str, nnx.Module] = {"embed": embedding(config, rngs)}
    keys = jax.random.split(rngs(), config.num_layers)

    def draw_layer(key: jax.Array) -> Any:
        return store(_pure(Block(config, rngs=nnx.Rngs(key))))

    layers = jax.lax.map(draw_layer, keys)
    parts["norm"] = rms_norm(config, rngs)
    if not config.tie_embeddings:
        parts["head"] = Head(config, rngs=rngs)
    return {**store({k: _pure(part) for k, part in parts.items()}), "layers": layers}


def _pure(module: nnx.Module) -> Params:
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def bind(config: LlamaConfig, params: Params) -> Llama:
    """The module with these weights.

    Raises:
      ValueError: if a weight is missing, unexpected, or of another shape.
    """
    check_params(config, params)
    return nnx.merge(_abstract(config).graphs["model"], params)


def check_params(config: LlamaConfig, params: Params) -> None:
    """ValueError if a weight is missing, unexpected, or of another shape."""
    expected, found = _abstract(config).shapes, _shapes(params)
    for path in sorted(expected.keys() | found.keys()):
        if expected.get(path) != found.get(path):
            raise ValueError(
                f"params[{path!r}] has shape {found.get(path)}, but the config needs "
                f"{expected.get(path)}; use the config that init_params was given"
            )


def forward(
    config: LlamaConfig,
    params: Params,
    tokens: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
) -> jax.Array:
    """Logits for the token after each position; position t sees tokens 0 to t only.

    Works under jit, grad and eval_shape, and with sharded params.

    Args:
      config: the model's configuration.
      params: its weights, as from `init_params`.
      tokens: int (B, T). An id of V or more turns its sequence's logits to NaN.
      segment_ids: int (B, T), where several examples share a row: 0 for padding, and
        1, 2, ... for the examples, which lie side by side. A token sees its own
        example alone. Attention reads a (B, 1, T, T) mask then.
      positions: int (B, T), those of RoPE; by default 0 to T - 1, counted from 0 in
        every segment.

    Returns:
      float32 (B, T, V).

    Raises:
      ValueError: if `params` do not fit `config`.

    Example:
      >>> import jax
      >>> from models.config import SIZES
      >>> params = init_params(SIZES["tiny"], jax.random.key(0))
      >>> forward(SIZES["tiny"], params, jax.numpy.ones((2, 8), int)).shape
      (2, 8, 4096)
    """
    model = bind(config, params)
    return model(tokens, segment_ids=segment_ids, positions=positions)


# What the head reads, for whoever goes through the layers by himself:
# finish(embed(tokens)), with run_layer in between for each layer.


def embed(config: LlamaConfig, params: Params, tokens: jax.Array) -> jax.Array:
    """int (B, T) tokens -> (B, T, D) in the compute dtype; needs `params["embed"]`."""
    graph = _abstract(config).graphs["embed"]
    x_BTD = nnx.merge(graph, params["embed"])(tokens)
    return x_BTD.astype(config.compute_dtype)


def run_layer(
    config: LlamaConfig,
    layer: Params,
    x: jax.Array,
    gather: Callable[[Params], Params] | None = None,
    *,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
) -> jax.Array:
    """Runs one layer, given its part of `params["layers"]`: (B, T, D).

    `gather` gathers weights that are sharded over devices, by sharding
    constraints: the backward pass does it again, and gathered ones are never stored.
    `segment_ids` and `positions` are those of `forward`.
    """
    own = context_of(config, x.shape[1], segment_ids, positions)

    def run(layer: Params, x: jax.Array) -> jax.Array:
        layer = gather(layer) if gather else layer
        return nnx.merge(_abstract(config).graphs["layer"], layer)(x, own)

    remat = "gathers" if gather and config.remat == "none" else config.remat
    return REMAT[remat](run)(layer, x)


def finish(config: LlamaConfig, params: Params, x: jax.Array) -> jax.Array:
    """The last norm: (B, T, D) -> float32 (B, T, D); needs `params["norm"]`."""
    return nnx.merge(_abstract(config).graphs["norm"], params["norm"])(x)


def count_params(config: LlamaConfig) -> int:
    """Number of weights, read off the abstract model; allocates nothing."""
    shapes = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


class _Abstract(NamedTuple):
    graphs: dict[str, nnx.GraphDef]
    shapes: dict[str, tuple[int, ...]]


@lru_cache
def _abstract(config: LlamaConfig) -> _Abstract:
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    block = nnx.eval_shape(lambda: Block(config, rngs=nnx.Rngs(0)))
    parts = {
        "model": model,
        "layer": block,
        "embed": model.embed,
        "norm": model.norm,
    }
    graphs = {name: nnx.split(part)[0] for name, part in parts.items()}
    return _Abstract(graphs, _shapes(nnx.to_pure_dict(nnx.state(model))))


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
