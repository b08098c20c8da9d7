"""The names of published tensors, and the leaves of the parameters they belong to."""

from functools import partial
from typing import NamedTuple

import jax

from models.config import LlamaConfig
from models.params import init_params

# A leaf of the layers is one tensor in each layer.
LAYER = {
    "attention_norm": "input_layernorm",
    "attention/q": "self_attn.q_proj",
    "attention/k": "self_attn.k_proj",
    "attention/v": "self_attn.v_proj",
    "attention/o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}
REST = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Leaf(NamedTuple):
    """A leaf of the parameters, and the tensors that hold it.

    Attributes:
      path: "layers/attention/q/kernel".
      shape: its shape, with the layers first where it is stacked.
      names: of its tensors, one for each layer, or one.
      stacked: whether it has a layer axis.
      transposed: whether the tensors are (out, in), and the leaf (in, out).
    """

    path: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    stacked: bool
    transposed: bool

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of each tensor."""
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transposed else shape


def leaves_of(config: LlamaConfig) -> list[Leaf]:
    """The leaves of `init_params(config, key)`, in the order of a tree's leaves."""
    like = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    return [
        _leaf(config, jax.tree_util.keystr(path, simple=True, separator="/"), x.shape)
        for path, x in jax.tree_util.tree_leaves_with_path(like)
    ]


def _leaf(config: LlamaConfig, path: str, shape: tuple[int, ...]) -> Leaf:
    module, _, kind = path.rpartition("/")
    suffix = "bias" if kind == "bias" else "weight"
    transposed = kind == "kernel"
    if module in REST:
        return Leaf(path, shape, (f"{REST[module]}.{suffix}",), False, transposed)
    own = LAYER[module.removeprefix("layers/")]
    layers = range(config.num_layers)
    names = tuple(f"model.layers.{i}.{own}.{suffix}" for i in layers)
    return Leaf(path, shape, names, True, transposed)
