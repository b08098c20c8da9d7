"""How the state is cut over a mesh, as the types of its arrays say."""

import re
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lowrank_optax.core.layout import (
    DimensionNumbers,
    Rules,
    layout_of,
    path_of,
    specs_of,
)
from lowrank_optax.core.sharding import mesh_axes_of, padded_spec, shards_of


def state_shardings(
    tx: optax.GradientTransformation,
    params: optax.Params,
    param_shardings: Any = None,
) -> optax.OptState:
    """How `tx.init(params)` is best cut over the mesh that the parameters are on.

    The idea: of G (m, n) cut along n, G~ = S^T G, both moments, the column norms and
    S G~^O are cut so too, and an ordinary step moves no more between devices than
    AdamW's but for the basis and a number for each limiter:

        moments (r, n)   r as G's m, where that divides it, and n as G's n
        basis (m, r)     along m, or r, over all axes that cut G; gathered for its use
        error (m, n)     as G

    Spec weights along the larger side then, and square ones along the side that is not
    projected (`square_sides`). Where m is cut, S^T G is summed over devices: r rows in
    place of m. Leaves of full rank have moments like themselves. On
    2, 4, 8 ... devices 8-bit moments keep their blocks whole (`quantize_moments`).

    Nothing is guessed from shapes: `tx.init` is traced on parameters whose types say
    how they are cut (JAX's Explicit axes), and the types of what it returns are read.
    So it works for whatever is chained, nested or wrapped, optax' own and yours; on a
    mesh of Explicit axes `tx.init(params)` itself returns arrays so cut, and this is
    for Auto ones:

        state = jax.jit(tx.init, out_shardings=shardings)(params)

    Args:
      tx: any optax transformation.
      params: a tree of arrays, or of `jax.ShapeDtypeStruct`.
      param_shardings: a `NamedSharding` for each; None for the parameters' own.

    Returns:
      A tree like the state, of `NamedSharding` on the same mesh.

    Raises:
      ValueError: shardings of another kind, or on several meshes.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro, optax
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> mesh = jax.sharding.Mesh(jax.devices()[:1], ("fsdp",))
      >>> params = {"mlp": {"kernel": jnp.ones((16, 64))}}
      >>> cut = {"mlp": {"kernel": NamedSharding(mesh, P(None, "fsdp"))}}
      >>> tx = lro.grass_jump(2e-3, rank=4, refresh_every=100, key=0)
      >>> shardings = lro.state_shardings(tx, params, cut)
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


def _mesh_of(shardings: Any) -> Any:
    leaves = jax.tree.leaves(shardings)
    if not leaves or not all(isinstance(x, NamedSharding) for x in leaves):
        raise ValueError(
            "state_shardings() takes a jax.sharding.NamedSharding for each parameter; "
            "place the parameters on a mesh, or give param_shardings"
        )
    meshes = {x.mesh for x in leaves}
    if len(meshes) > 1:
        raise ValueError(f"the parameters are on {len(meshes)} meshes: give one")
    return meshes.pop()


def square_sides(
    params: optax.Params,
    param_shardings: Any,
    dimension_numbers: DimensionNumbers = None,
) -> Rules:
    """For `low_rank(square=...)`: of each square matrix the side that is not cut.

    Megatron's cut of a transformer has the inputs of `o` and `down` over devices, and
    the outputs of q, k, v, gate and up. What is projected should be the other side,
    which a square matrix leaves open.

    That is a choice of the method, and not of where it runs: which side is projected
    changes what is trained (and no size of anything). So keep the rules with a run, and
    give them again when it goes on with another mesh.

    Args:
      params: a tree of arrays, or of `jax.ShapeDtypeStruct`.
      param_shardings: a `NamedSharding` for each.
      dimension_numbers: as for `low_rank`.

    Returns:
      Pairs (regular expression, side), the last for all that is not named.

    Raises:
      ValueError: what `dimension_numbers` raises in `low_rank`.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> mesh = jax.sharding.Mesh(jax.devices()[:1], ("tensor",))
      >>> params = {"q": jnp.ones((8, 8)), "o": jnp.ones((8, 8))}
      >>> cut = {"q": NamedSharding(mesh, P(None, "tensor")),
      ...        "o": NamedSharding(mesh, P("tensor"))}
      >>> lro.training.square_sides(params, cut)
      [('^o$', 'output'), ('', 'input')]
    """
    specs = specs_of(dimension_numbers, params)

    def parts(axes: Any, sharding: NamedSharding, ndim: int) -> tuple[int, int]:
        """How many devices cut these axes, and by how many names."""
        axes = (axes,) if isinstance(axes, int) else axes
        cut = padded_spec(sharding.spec, ndim)
        names = [name for a in axes for name in mesh_axes_of(cut[a])]
        return shards_of(tuple(names), sharding.mesh), len(names)

    def is_cut_along_its_input(path: str, x: Any, sharding: NamedSharding) -> bool:
        if (spec := specs[path]) is None:
            return False
        layout, ndim = layout_of(path, x.shape, spec), len(x.shape)
        inputs = parts(spec.reduction_axis, sharding, ndim)
        outputs = parts(spec.output_axis, sharding, ndim)
        return layout.m == layout.n and inputs > outputs

    leaves = jax.tree_util.tree_leaves_with_path(params)
    rows = [
        (path_of(keys), x, sharding)
        for (keys, x), sharding in zip(
            leaves, jax.tree.leaves(param_shardings), strict=True
        )
    ]
    found = [row[0] for row in rows if is_cut_along_its_input(*row)]
    return [*((f"^{re.escape(path)}$", "output") for path in found), ("", "input")]


def _trimmed(spec: P) -> P:
    """Without what says that the last axes are whole."""
    entries = list(spec)
    while entries and entries[-1] is None:
        entries.pop()
    return P(*entries)
