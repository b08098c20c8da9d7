"""How weights are sharded over the mesh, and gathered where they are used.

A layer's kernel is (..., in, out); the layer axis, before that, is not sharded.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro
from lowrank_optax.core.paths import path_of
from lowrank_optax.core.rules import Square, side_of
from lowrank_optax.core.sharding import mesh_axes_of, shards_of
from models import Params
from models.cross_entropy import Spread
from train.engine.mesh import BATCH_AXES

IN, OUT = -2, -1

# The axis that tensor parallelism shards (Shoeybi et al. 2019, "Megatron-LM"): each
# device has its heads and its part of the MLP, so o and down sum over devices.
TENSOR_AXES = (
    (r"(^|/)(q|k|v|gate|up|head)/kernel$", OUT),
    (r"(^|/)(o|down)/kernel$", IN),
)
EMBEDDING = r"(^|/)embed/embedding$"


class WeightSpecs(NamedTuple):
    """How a weight is sharded.

    Attributes:
      stored: between two uses, like its gradient and the optimizer's state.
      used: where a product takes it.
    """

    stored: P = P()
    used: P = P()


def specs_of_weight(
    path: str, shape: tuple[int, ...], sizes: Mapping[str, int], square: Square
) -> WeightSpecs | None:
    """The specs of a weight on a mesh of these sizes; None for a scale or a bias.

    The axis "fsdp" shards the side without a subspace, the larger one or, of a square
    matrix, the one that is not projected: an ordinary step of the optimizer is then
    local. If that side does not divide, the other is sharded. An embedding is sharded
    along the hidden axis, so that rows are moved and never the table.
    """
    axis = next((axis for rule, axis in TENSOR_AXES if re.search(rule, path)), None)
    if re.search(EMBEDDING, path):
        orders = {"fsdp": (OUT, IN), "tensor": (OUT, IN)}
    elif axis is None:
        return None  # a norm's scale, or a bias
    else:
        wide = shape[IN] < shape[OUT]
        if shape[IN] == shape[OUT]:
            wide = side_of(square, path) == "input"
        largest = (OUT, IN) if wide or path.endswith("head/kernel") else (IN, OUT)
        orders = {"tensor": (axis, -3 - axis), "fsdp": largest}
    axes: dict[int, tuple[str, ...]] = {IN: (), OUT: ()}
    for name, order in orders.items():
        for side in order:
            parts = math.prod(sizes[n] for n in (*axes[side], name))
            if sizes[name] > 1 and shape[side] % parts == 0:
                axes[side] += (name,)
                break
    if axis is None:
        used = {OUT: axes[OUT]}
    else:
        used = {axis: tuple(name for name in axes[axis] if name == "tensor")}
    return WeightSpecs(_spec(axes, len(shape)), _spec(used, len(shape)))


def _spec(axes: Mapping[int, tuple[str, ...]], ndim: int) -> P:
    entries = [axes.get(side, ()) for side in (IN, OUT)]
    return P(
        *[None] * (ndim - 2), *(e[0] if len(e) == 1 else e or None for e in entries)
    )


@dataclasses.dataclass(frozen=True)
class Shards:
    """How the weights of one run are sharded, on any mesh; hashable.

    In a step it uses the mesh that is set (`jax.set_mesh`), and does nothing if that
    shards no weights.

    Attributes:
      square: the side of square matrices that is projected.
      dtype: weights are moved between devices in this dtype if it is narrower.
    """

    square: Square
    dtype: str

    def shardings(self, mesh: Mesh | AbstractMesh, params: Params) -> Params:
        """A tree of shardings for the weights, stored or dense."""

        def of(keys: jax.tree_util.KeyPath, w: Any) -> Any:
            specs = (
                specs_of_weight(path_of(keys), w.shape, mesh.shape, self.square)
                or WeightSpecs()
            )
            return jax.tree.map(
                lambda x: NamedSharding(mesh, _fitted(specs.stored, x, mesh)), w
            )

        return jax.tree_util.tree_map_with_path(of, params, is_leaf=_is_quantized)

    def gather(self, weights: Params) -> Params:
        """Gathers weights for their products; each gradient is sharded again."""

        def of(keys: jax.tree_util.KeyPath, w: jax.Array) -> jax.Array:
            specs = self._specs(keys, w)
            narrow = jnp.promote_types(w.dtype, self.dtype) == w.dtype
            # A token's gradients are summed in float32, one by one.
            rounds = narrow and not re.search(EMBEDDING, path_of(keys))
            dtype = self.dtype if rounds else w.dtype.name
            return w if specs is None else _gather(specs, dtype, w.dtype.name, w)

        return jax.tree_util.tree_map_with_path(of, weights)

    def shard(self, weights: Params) -> Params:
        """Shards a tree like the weights, or gradients, as weights are stored."""

        def of(keys: jax.tree_util.KeyPath, w: jax.Array) -> jax.Array:
            specs = self._specs(keys, w)
            return w if specs is None else _constrained(w, specs.stored)

        return jax.tree_util.tree_map_with_path(of, weights)

    def remarks(self, mesh: Mesh, weights: Params) -> list[str]:
        """Names the weights whose sides do not divide over the mesh."""
        parts, fewer, together = mesh.shape["fsdp"] * mesh.shape["tensor"], [], []
        for keys, w in jax.tree_util.tree_leaves_with_path(weights):
            path = path_of(keys)
            specs = specs_of_weight(path, w.shape, mesh.shape, self.square)
            if specs is None:
                continue
            found = math.prod(shards_of(entry, mesh) for entry in specs.stored)
            if found < parts:
                fewer.append(f"{path} ({found})")
            if mesh.shape["tensor"] > 1 and "tensor" not in str(specs.used):
                together.append(path)
        remarks = {
            f"cut into fewer parts than {parts}": fewer,
            "not parallel along tensor": together,
        }
        return [f"{what}: {', '.join(x)}" for what, x in remarks.items() if x]

    def parts(self) -> int:
        """How many devices share each weight.

        That many layers together take no more of a device than one does of one device,
        and what needs whole matrices gives each device some.
        """
        mesh = _sharding_mesh()
        return 1 if mesh is None else mesh.shape["fsdp"] * mesh.shape["tensor"]

    def spread(self, kernel: jax.Array, tied: bool = False) -> Spread:
        """How the work of the output head, (D, V), is spread.

        A tied one is the transposed embedding: it is stored as that is, and used as a
        head is.
        """
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return Spread()
        specs = (
            specs_of_weight("head/kernel", kernel.shape, mesh.shape, self.square)
            or WeightSpecs()
        )
        if tied:
            own = specs_of_weight(
                "embed/embedding", kernel.shape[::-1], mesh.shape, "input"
            )
            specs = WeightSpecs(P(*(own or specs).stored[::-1]), specs.used)
        return Spread(shards_of(BATCH_AXES, mesh), BATCH_AXES, *specs)

    def _specs(self, keys: jax.tree_util.KeyPath, w: jax.Array) -> WeightSpecs | None:
        mesh = _sharding_mesh()
        if mesh is None:
            return None
        return specs_of_weight(path_of(keys), w.shape, mesh.shape, self.square)


def sharded_weights() -> bool:
    """Whether the mesh that is set shards weights."""
    return _sharding_mesh() is not None


def shard_rows(x: jax.Array) -> jax.Array:
    """(B, ...), each device with its rows."""
    return _constrained(x, P(BATCH_AXES)) if sharded_weights() else x


def look_up(
    embed: Callable[[jax.Array], jax.Array], embedding: jax.Array, tokens: jax.Array
) -> jax.Array:
    """`embed(tokens)` (B, T, D), each device with its rows.

    Each device looks up its part of D for the rows of all its neighbours along fsdp;
    then they exchange them.
    """
    mesh = _sharding_mesh()
    if mesh is None:
        return embed(tokens)
    specs = (
        specs_of_weight("embed/embedding", embedding.shape, mesh.shape, "input")
        or WeightSpecs()
    )
    names = mesh_axes_of(specs.used[1])
    x = embed(_constrained(tokens, P("data")))
    # First those of tensor: both at once are no exchange that the compiler knows.
    for parts in (names, tuple(name for name in names if name == "fsdp")):
        x = _constrained(x, P("data", None, parts))
    return shard_rows(x)


def _constrained(x: jax.Array, spec: P) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, spec)


def _forward(
    specs: WeightSpecs, dtype: str, own: str, w: jax.Array
) -> tuple[jax.Array, None]:
    # Cut first: else all layers may be gathered, and this one read of them.
    narrow = _constrained(w, specs.stored).astype(dtype)
    return _constrained(narrow, specs.used), None


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gather(specs: WeightSpecs, dtype: str, own: str, w: jax.Array) -> jax.Array:
    return _forward(specs, dtype, own, w)[0]


def _backward(
    specs: WeightSpecs, dtype: str, own: str, _: None, gradient: jax.Array
) -> tuple[jax.Array]:
    return (_constrained(gradient.astype(own), specs.stored),)


_gather.defvjp(_forward, _backward)


def _sharding_mesh() -> Any:
    """The mesh that is set, if it shards weights."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] * mesh.shape["tensor"] == 1:
        return None
    return mesh


def _fitted(spec: P, x: Any, mesh: Mesh | AbstractMesh) -> P:
    """The spec without the axes that do not divide x."""
    entries = zip(spec, x.shape, strict=False)
    return P(*(e if size % shards_of(e, mesh) == 0 else None for e, size in entries))


def _is_quantized(x: object) -> bool:
    return isinstance(x, lro.weights.QuantizedWeights)
