"""LoRA around the linear layers of a `Llama`: its weights stay, adapters are added."""

from dataclasses import dataclass, replace
from typing import Any

import jax
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax.ad_checkpoint import checkpoint_name

from models import Llama
from models.llama import Block, Context
from models.padding import PadKernel, aligned, pad_to

OUTPUT = "adapted"


@dataclass(frozen=True)
class PadAdapter:
    """The `promote_dtype` of an `nnx.LoRA` beside a layer that has `PadKernel`."""

    base: PadKernel

    def __call__(self, args: Any, *, dtype: Any) -> tuple[Any, ...]:
        inputs, a, b = promote_dtype(args, dtype=dtype)
        if self.base.inputs:
            a = pad_to(a, aligned(a.shape[0]), 0)
        if self.base.outputs:
            b = pad_to(b, aligned(b.shape[1]), 1)
        return inputs, a, b


class Adapted(nnx.Module):
    """x W + scale x A B, with A (in, r) and B (r, out) in float32 (Hu et al. 2021).

    `nnx.LoRA` has no scale of its own. A is drawn by `nnx.LoRA`, and B is 0.
    """

    def __init__(self, base: nnx.Linear, lora: nnx.LoRA, scale: float):
        self.base, self.lora, self.scale = base, lora, scale

    def __call__(self, inputs: jax.Array) -> jax.Array:
        outputs = self.base(inputs) + self.scale * self.lora(inputs)
        return checkpoint_name(outputs, OUTPUT)


class StoredOutputs(nnx.Module):
    """A block whose backward pass has the outputs of adapted layers, and no more.

    As `remat="dots"` does for plain layers. By itself that stores the products of base
    and adapter apart, twice the memory.
    """

    def __init__(self, block: Block):
        self.block = block

    def __call__(self, x_BTD: jax.Array, context: Context) -> jax.Array:
        graph, state = nnx.split(self.block)

        def run(state: Any, x_BTD: jax.Array) -> jax.Array:
            return nnx.merge(graph, state)(x_BTD, context)

        policy = jax.checkpoint_policies.save_only_these_names(OUTPUT)
        return jax.checkpoint(run, prevent_cse=False, policy=policy)(state, x_BTD)


def adapt(model: Llama, rank: int, alpha: float, key: jax.Array) -> Llama:
    """Wraps q, k, v, o, gate, up and down of all layers, in place; scale alpha / rank.

    The layers are stacked, and so are their adapters. `nnx.LoRAParam` selects what is
    trained.
    """
    layers, rngs = model.layers, nnx.Rngs(key)
    for owner, names in ((layers.attention, "q k v o"), (layers.mlp, "gate up down")):
        for name in names.split():
            base = getattr(owner, name)
            lora = _stacked(base, rank, model.config.num_layers, rngs)
            setattr(owner, name, Adapted(base, lora, alpha / rank))
    if model.config.remat == "dots":
        model.config = replace(model.config, remat="none")
        model.layers = StoredOutputs(layers)
    return model


def _stacked(base: nnx.Linear, rank: int, layers: int, rngs: nnx.Rngs) -> nnx.LoRA:
    @nnx.split_rngs(splits=layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def draw(rngs: nnx.Rngs) -> nnx.LoRA:
        return nnx.LoRA(
            base.in_features,
            rank,
            base.out_features,
            dtype=base.dtype,
            promote_dtype=PadAdapter(base.promote_dtype),
            rngs=rngs,
        )

    return draw(rngs)
