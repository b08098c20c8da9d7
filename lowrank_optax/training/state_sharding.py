"""Derives the shardings of an optimizer's state from those of its parameters."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lowrank_optax.core.dimensions import DimensionNumbers, specs_of
from lowrank_optax.core.layout import layout_of
from lowrank_optax.core.paths import with_paths
from lowrank_optax.core.rules import Rules
from lowrank_optax.core.sharding import mesh_axes_of, padded_spec, shards_of

# A tree like the parameters, of `NamedSharding`.
Shardings = Any


def state_shardings(
    tx: optax.GradientTransformation,
    params: optax.Params,
    param_shardings: Shardings | None = None,
) -> optax.OptState:
    """The shardings of `tx.init(params)`, from those of the parameters.

        state = jax.jit(tx.init, out_shardings=state_shardings(tx, params))(params)

    For a gradient G (m, n) sharded along n, a step without a refresh then communicates
    little more than AdamW's:

        moments (r, n)   n as G's n; r as G's m where that divides r
        basis (m, r)     along m, or r, over all mesh axes that shard G
        error (m, n)     as G

    Leaves of full rank have moments sharded like themselves. `tx.init` is traced on
    parameters whose types have the shardings (JAX's Explicit axes), so that this works
    for every chain and wrapper of optax transformations. On a mesh of Explicit axes
    `tx.init(params)` itself returns sharded arrays.

    Args:
      tx: any optax transformation.
      params: a tree of arrays, or of `jax.ShapeDtypeStruct`.
      param_shardings: a tree of `NamedSharding`; None for the shardings of `params`.

    Returns:
      A tree like the state, of `NamedSharding` on the same mesh.

    Raises:
      ValueError: shardings of another kind, or on several meshes.

    Example:
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> mesh = jax.sharding.Mesh(jax.devices()[:1], ("fsdp",))
      >>> params = {"mlp": {"kernel": jnp.ones((16, 64))}}
      >>> shards = {"mlp": {"kernel": NamedSharding(mesh, P(None, "fsdp"))}}
      >>> tx = lro.grass_jump(2e-3, rank=4, refresh_every=100, key=0)
      >>> shardings = lro.state_shardings(tx, params, shards)
      >>> tuple(optax.tree.get(shardings, "mu")["mlp"]["kernel"].spec)
      (None, 'fsdp')
    """
    if param_shardings is None:
        param_shardings = jax.tree.map(lambda x: x.sharding, params)
    mesh = _mesh_of(param_shardings)
    explicit = AbstractMesh(
        mesh.axis_sizes, mesh.axis_names, (AxisType.Explicit,) * len(mesh.axis_names)
    )

    def typed(x: jax.Array, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        own = NamedSharding(explicit, sharding.spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own)

    with jax.sharding.use_abstract_mesh(explicit):
        traced, state = jax.make_jaxpr(tx.init, return_shape=True)(
            jax.tree.map(typed, params, param_shardings)
        )
    return jax.tree.unflatten(
        jax.tree.structure(state),
        [NamedSharding(mesh, _trimmed(x.sharding.spec)) for x in traced.out_avals],
    )


def _mesh_of(shardings: Shardings) -> Mesh:
    """Returns the one mesh of all shardings."""
    leaves = jax.tree.leaves(shardings)
    if not leaves or not all(isinstance(x, NamedSharding) for x in leaves):
        raise ValueError(
            "state_shardings() needs a jax.sharding.NamedSharding for each parameter; "
            "place the parameters on a mesh, or pass param_shardings"
        )
    meshes = {x.mesh for x in leaves}
    if len(meshes) > 1:
        raise ValueError(
            f"the parameters are on {len(meshes)} meshes; place all on one"
        )
    return meshes.pop()


def square_sides(
    params: optax.Params,
    param_shardings: Shardings,
    dimension_numbers: DimensionNumbers = None,
) -> Rules:
    """The unsharded side of each square matrix, for `low_rank(square=...)`.

    Megatron's tensor parallelism shards the inputs of `o` and `down`, and the outputs
    of q, k, v, gate and up. The projection should remove the other side. If a matrix is
    not square, its shape already decides the side. The projected side changes what is
    trained: store the rules with a run, and pass the same rules when it resumes on
    another mesh.

    Args:
      params: a tree of arrays, or of `jax.ShapeDtypeStruct`.
      param_shardings: a tree of `NamedSharding`.
      dimension_numbers: as for `low_rank`.

    Returns:
      Pairs (regular expression, side); the last one matches all other matrices.

    Raises:
      ValueError: `dimension_numbers` that `low_rank` refuses.

    Example:
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> mesh = jax.sharding.Mesh(jax.devices()[:1], ("tensor",))
      >>> params = {"q": jnp.ones((8, 8)), "o": jnp.ones((8, 8))}
      >>> shards = {"q": NamedSharding(mesh, P(None, "tensor")),
      ...           "o": NamedSharding(mesh, P("tensor"))}
      >>> lro.training.square_sides(params, shards)
      [('^o$', 'output'), ('', 'input')]
    """
    specs = specs_of(dimension_numbers, params)

    def shards(
        axes: int | Sequence[int], sharding: NamedSharding, ndim: int
    ) -> tuple[int, int]:
        """Counts the shards along these axes, and the mesh axes that make them."""
        axes = (axes,) if isinstance(axes, int) else axes
        spec = padded_spec(sharding.spec, ndim)
        names = [name for a in axes for name in mesh_axes_of(spec[a])]
        return shards_of(tuple(names), sharding.mesh), len(names)

    def is_sharded_along_input(
        path: str, x: jax.Array, sharding: NamedSharding
    ) -> bool:
        if (spec := specs[path]) is None:
            return False
        layout, ndim = layout_of(path, x.shape, spec), len(x.shape)
        inputs = shards(spec.reduction_axis, sharding, ndim)
        outputs = shards(spec.output_axis, sharding, ndim)
        return layout.m == layout.n and inputs > outputs

    shardings = jax.tree.leaves(param_shardings)
    rows = [
        (path, x, sharding)
        for (path, x), sharding in zip(with_paths(params), shardings, strict=True)
    ]
    found = [row[0] for row in rows if is_sharded_along_input(*row)]
    return [*((f"^{re.escape(path)}$", "output") for path in found), ("", "input")]


def _trimmed(spec: P) -> P:
    """Removes trailing None entries, so that equal shardings have equal specs."""
    entries = list(spec)
    while entries and entries[-1] is None:
        entries.pop()
    return P(*entries)
