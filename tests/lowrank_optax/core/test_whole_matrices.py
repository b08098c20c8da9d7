"""Matrices whose products need whole ones, distributed over the devices of a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lowrank_optax.core.newton_schulz import FITTED, polar_of_spectrum
from lowrank_optax.core.spread import whole_matrices
from tests.helpers.marks import NIGHTLY
from tests.helpers.sharded import moved

L, M, N = 5, 16, 48
MESHES = {"one axis": (8,), "two axes": (2, 4)}


def mesh_of(name):
    shape = MESHES[name]
    axes = ("fsdp", "tensor")[: len(shape)]
    return jax.make_mesh(shape, axes, (AxisType.Auto,) * len(shape))


def polar(dtype):
    """Rounds to `dtype` at the start alone, and by itself.

    On a CPU XLA may leave out a cast to bfloat16 between two products.
    """

    def f(x):
        if dtype is not None:
            x = jax.lax.reduce_precision(x, 8, 7)
        return polar_of_spectrum(x, FITTED)

    return f


def together(dtype, x):
    return whole_matrices(polar(dtype), x, dtype)


def in_a_vmap(dtype, x):
    return jax.vmap(lambda x: whole_matrices(polar(dtype), x, dtype))(x)


def matrices():
    x = np.random.default_rng(0).standard_normal((L, M, N), np.float32)
    x[3] = 0
    return x


def compiled(f, mesh):
    spec = NamedSharding(mesh, P(None, None, mesh.axis_names))
    own = spec, NamedSharding(mesh, P())
    x = jax.ShapeDtypeStruct((L, M, N), jnp.float32, sharding=spec)
    with jax.set_mesh(mesh):
        return jax.jit(f, out_shardings=own).lower(x).compile(), spec


@pytest.mark.parametrize(
    ("how", "dtype", "mesh"),
    [
        (together, jnp.bfloat16, "two axes"),
        (in_a_vmap, None, "one axis"),
        pytest.param(together, None, "one axis", marks=NIGHTLY),
        pytest.param(in_a_vmap, jnp.bfloat16, "two axes", marks=NIGHTLY),
    ],
)
def test_the_bits_are_those_of_one_device(how, dtype, mesh):
    f = functools.partial(how, dtype)
    alone = jax.jit(f)(matrices())
    step, spec = compiled(f, mesh_of(mesh))
    found = step(jax.device_put(matrices(), spec))
    jax.tree.map(np.testing.assert_array_equal, found, alone)
    outside, squared = jax.device_get(alone)
    assert not outside[3].any()
    sizes = np.linalg.svd(outside[0].astype(np.float32), compute_uv=False)
    assert (sizes > 0.25).all()
    np.testing.assert_allclose(squared[0], np.sum(matrices()[0] ** 2), rtol=1e-2)


@pytest.mark.parametrize(
    ("how", "mesh"), [(together, "two axes"), (in_a_vmap, "one axis")]
)
def test_each_matrix_moves_twice_and_no_sum_is_over_devices(how, mesh):
    step, _ = compiled(functools.partial(how, jnp.bfloat16), mesh_of(mesh))
    large = [kind for kind, size in moved(step) if size > M]  # not the indices
    assert large == ["all-to-all", "all-to-all"]


def test_a_single_matrix_stays_as_it_is_sharded():
    mesh = mesh_of("one axis")
    spec = NamedSharding(mesh, P(None, "fsdp"))
    x = matrices()[0]
    with jax.set_mesh(mesh):
        found, _ = jax.jit(functools.partial(together, None))(jax.device_put(x, spec))
    np.testing.assert_allclose(found, polar(None)(x)[0], rtol=0, atol=1e-5)
    assert not found.sharding.is_fully_replicated
