"""Bases stored in few bits."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.bases.lazy import lazy_refresh
from lowrank_optax.bases.storage import QuantizedBasis, quantize_basis
from lowrank_optax.steps.quantize import (
    quantize_moments,
)
from tests.helpers import numpy_reference as reference

M, N, R = 8, 37, 3  # 37: blocks of 19 and 18 at block size 32
B1, B2, EPS = 0.9, 0.99, 1e-8


def bases(seed, count=2):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(count, M, R)))[0]


def gradients(count, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(count, M, N)) * np.geomspace(0.1, 10, N) + 0.3
    return [
        {"w": w[t].astype(dtype), "b": rng.normal(size=5).astype(dtype)}
        for t in range(count)
    ]


def run(tx, grads):
    """All updates, and the last state."""
    state, updates = jax.jit(tx.init)(grads[0]), []
    update = jax.jit(tx.update)
    for g in grads:
        u, state = update(g, state, g)
        updates.append(u["w"])
    return np.stack(updates), state


def eight_bit(inner=None, *, block_size=32, min_size=20):
    """Of gradients(): the (3, 37) moments are quantised, the vector's are not."""
    inner = inner or optax.scale_by_adam(B1, B2, EPS)
    return quantize_moments(inner, block_size=block_size, min_size=min_size)


def affine(s, bits, size):
    """Q-GaLore's group quantisation with zero in the range: values, and scales."""
    flat, scales = np.array(s, np.float64).ravel(), []
    for start in range(0, flat.size, size):
        x = flat[start : start + size]
        low, high = min(x.min(), 0), max(x.max(), 0)
        scale = (high - low) / (2**bits - 1)
        scales.append(np.full(x.size, scale))
        if scale:
            zero = np.round(-low / scale)
            q = np.clip(np.round(x / scale) + zero, 0, 2**bits - 1)
            flat[start : start + size] = (q - zero) * scale
    return flat.reshape(s.shape), np.concatenate(scales).reshape(s.shape)


class SpyState(NamedTuple):
    """The last step's basis and turn, and how often the basis has changed."""

    s: Any
    c: Any
    changes: Any


def spy():
    """A stage that keeps what the basis rule gave the Frame of a tree of one matrix."""

    def init(frames):
        (f,) = jax.tree.leaves(
            frames, is_leaf=lambda x: isinstance(x, lro.stages.Frame)
        )
        square = (*f.batch, f.rank, f.rank)
        return SpyState(jnp.zeros(f.basis_shape), jnp.zeros(square), jnp.int32(0))

    def update(frames, state, params=None):
        (f,) = jax.tree.leaves(
            frames, is_leaf=lambda x: isinstance(x, lro.stages.Frame)
        )
        return frames, SpyState(
            f.basis, f.rotation, state.changes + jnp.any(f.basis != state.s)
        )

    return optax.GradientTransformation(init, update)


def packed_bracket(rule, *, rank=R, refresh_every=1, inner=None, **options):
    stages = optax.chain(
        quantize_basis(rule, **options),
        spy(),
        lro.project(),
        lro.in_subspace(inner or optax.identity()),
        lro.project_back(),
    )
    return lro.low_rank(
        stages, rank=rank, refresh_every=refresh_every, dimension_numbers=lro.STACKED
    )


def spied(state):
    (found,) = [
        x
        for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, SpyState))
        if isinstance(x, SpyState)
    ]
    return found


def packed_leaf(state):
    """What is kept of the basis of the leaf "w"."""
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, QuantizedBasis))
    (found,) = [x for x in leaves if isinstance(x, QuantizedBasis)]
    return QuantizedBasis(*(tree["w"] for tree in found))


def replayed(*s):
    """A rule that replays bases of the leaf "w", orthonormal or not."""
    return lro.bases.replay({"w": jnp.stack(s)}, orthonormal=False)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("shape", "rank", "size"),
    [((8, 12), 4, 16), ((7, 9), 3, 8), ((5, 9), 3, 256), ((3, 7, 9), 3, 5)],
    ids=["divides", "odd size", "one group", "stacked"],
)
def test_a_basis_comes_back_to_half_a_scale(bits, shape, rank, size):
    rng = np.random.default_rng(0)
    s = rng.normal(size=(*shape[:-1], rank)).astype(np.float32)
    g = {"w": rng.normal(size=shape).astype(np.float32)}
    tx = packed_bracket(replayed(s), rank=rank, bits=bits, group_size=size)
    _, state = jax.jit(tx.update)(g, jax.jit(tx.init)(g))
    q, back = packed_leaf(state), np.asarray(spied(state).s, np.float64)
    count = shape[-2] * rank
    assert q.codes.shape == (*shape[:-2], -(-count * bits // 8))
    assert q.codes.dtype == q.zero_points.dtype == jnp.uint8
    assert q.scales.shape == (*shape[:-2], -(-count // size))
    pairs = [affine(x, bits, size) for x in s.reshape(-1, *s.shape[-2:])]
    expected, scale = (np.stack(x).reshape(s.shape) for x in zip(*pairs, strict=True))
    # Half a scale; codes are at most 255, and float32 rounds them times the scale.
    assert (np.abs(back - s) <= scale * (0.5 + 1e-4)).all()
    np.testing.assert_allclose(back, expected, rtol=1e-5, atol=1e-7)


def test_two_codes_share_a_byte():
    s = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)
    g = {"w": np.ones((5, 9), np.float32)}
    tx = packed_bracket(replayed(s))
    _, state = jax.jit(tx.update)(g, jax.jit(tx.init)(g))
    q = packed_leaf(state)
    low_high = [c for byte in np.asarray(q.codes) for c in (byte & 15, byte >> 4)]
    codes = np.array(low_high[:15], np.int64).reshape(5, 3)
    assert codes.min() == 0
    assert codes.max() == 15
    by_hand = (codes - int(q.zero_points[0])) * float(q.scales[0])
    np.testing.assert_allclose(spied(state).s, by_hand, rtol=1e-6)  # one product


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [0.0, 0.7, -0.7])
def test_a_constant_group(bits, value):
    s = np.full((4, 2), value, np.float32)
    g = {"w": np.ones((4, 6), np.float32)}
    tx = packed_bracket(replayed(s), rank=2, bits=bits)
    _, state = jax.jit(tx.update)(g, jax.jit(tx.init)(g))
    np.testing.assert_allclose(spied(state).s, s, rtol=1e-6)  # a quotient, a product


def test_bytes_of_a_basis():
    g = {"w": jnp.ones((64, 100))}
    for bits in (4, 8):
        tx = packed_bracket(lro.dominant_svd(), rank=32, bits=bits)
        q = packed_leaf(jax.eval_shape(tx.init, g))
        used = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(q))
        assert used == 64 * 32 * bits // 8 + 5 * (64 * 32 // 256)
    # Nothing else is kept of it, but whether it has begun.
    frame = lro.stages.Frame(gradient=g["w"], rank=32, path="w")
    rule = quantize_basis(lro.dominant_svd())
    state = jax.eval_shape(lambda: rule.init({"w": frame}))
    assert isinstance(state, lro.bases.BasisState)
    used = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert used == 64 * 32 // 2 + 5 * (64 * 32 // 256) + 1


@pytest.mark.parametrize("bits", [4, 8])
def test_a_basis_does_not_drift(bits):
    """A thousand steps between two refreshes: the same bits, in store and in use."""
    rule = lro.sara_sample(key=0)
    tx = packed_bracket(rule, refresh_every=2000, bits=bits, group_size=5)
    grads = np.random.default_rng(2).normal(size=(1000, M, N)).astype(np.float32)
    state = jax.jit(tx.init)({"w": grads[0]})
    _, first = jax.jit(tx.update)({"w": grads[0]}, state)
    last, _ = jax.lax.scan(
        lambda state, g: (tx.update({"w": g}, state)[1], None), first, grads[1:]
    )
    jax.tree.map(np.testing.assert_array_equal, packed_leaf(first), packed_leaf(last))
    np.testing.assert_array_equal(spied(first).s, spied(last).s)
    assert spied(last).changes == spied(first).changes == 1


def test_a_basis_that_a_refresh_keeps_does_not_drift_either():
    s = np.random.default_rng(3).normal(size=(M, R)).astype(np.float32)

    def keep(frame, keys, clock):
        start = jnp.asarray(s)
        return jnp.where(clock.step == 0, start, frame.need("basis"))

    tx = packed_bracket(lro.basis_rule(keep, orthonormal=False))
    g = {"w": np.ones((M, N), np.float32)}
    _, state = (update := jax.jit(tx.update))(g, tx.init(g))
    first = packed_leaf(state)
    for _ in range(50):
        _, state = update(g, state)
    jax.tree.map(np.testing.assert_array_equal, first, packed_leaf(state))


def test_the_turn_is_that_of_the_rounded_bases():
    s = bases(8, 2).astype(np.float32)
    tx = packed_bracket(replayed(*s), refresh_every=2)
    grads = gradients(3, dtype=np.float32)
    state, seen, update = jax.jit(tx.init)({"w": grads[0]["w"]}), [], jax.jit(tx.update)
    for g in grads:
        _, state = update({"w": g["w"]}, state)
        seen.append(spied(state))
    np.testing.assert_array_equal(seen[1].c, np.eye(R))
    expected = np.float64(seen[2].s).T @ np.float64(seen[1].s)
    np.testing.assert_allclose(seen[2].c, expected, atol=1e-6)  # a sum of 8 of size 1
    # And not that of the bases before rounding.
    assert np.abs(expected - s[1].T @ s[0]).max() > 1e-3


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["dominant_svd", "sara_sample"])
def test_galore_on_rounded_bases_by_the_equations(name, bits):
    rule = lro.dominant_svd() if name == "dominant_svd" else lro.sara_sample(key=0)
    grads = [g["w"] for g in gradients(6)]
    rules = reference.Rules(lambda _: 1.0, 2, b1=B1, b2=B2)
    adam = optax.scale_by_adam(B1, B2, EPS)
    with jax.enable_x64(True):
        tx = packed_bracket(rule, refresh_every=2, inner=adam, bits=bits, group_size=10)
        updates, _ = run(tx, [{"w": g} for g in grads])
        if name == "dominant_svd":
            exact = [reference.left_singular_vectors(g)[:, :R] for g in grads[::2]]
        else:  # the sample itself is the rule's; both draw with the same key
            exact = _bases_of(rule, grads)[::2]
    packed = [affine(s, bits, 10)[0] for s in exact]
    weights = reference.low_rank_adamw(np.zeros((M, N)), grads, packed, rules)
    # Float64; an entry of S at the middle of two codes could go either way.
    np.testing.assert_allclose(-np.cumsum(updates, 0), weights, rtol=1e-8, atol=1e-10)


def _bases_of(rule, grads):
    stages = optax.chain(rule, lro.project(), lro.in_subspace(optax.identity()))
    tx = lro.low_rank(optax.chain(stages, lro.project_back()), rank=R, refresh_every=2)
    state, out, update = tx.init({"w": grads[0]}), [], jax.jit(tx.update)
    for g in grads:
        _, state = update({"w": g}, state)
        out.append(np.asarray(optax.tree.get(state, "basis")["w"]))
    return out


def test_leaves_of_full_rank_pass():
    tx = lro.galore(
        1.0,
        rank=R,
        refresh_every=1,
        dimension_numbers=None,
        basis=quantize_basis(lro.dominant_svd()),
    )
    grads = gradients(2, dtype=np.float32)
    state = tx.init(grads[0])
    for g in grads:
        updates, state = jax.jit(tx.update)(g, state, g)
    assert updates["b"].shape == (5,)
    vector = {"b": grads[0]["b"]}  # and a tree without a matrix
    tx.update(vector, tx.init(vector), vector)


def test_rounded_bases_have_no_residual_to_give_back():
    g = {"w": jnp.ones((M, N))}

    def init_and_update(*rest):
        stages = optax.chain(quantize_basis(lro.dominant_svd()), lro.project(), *rest)
        tx = lro.low_rank(stages, rank=R, refresh_every=1)
        jax.eval_shape(tx.update, g, tx.init(g))

    adam = optax.scale_by_adam()
    with pytest.raises(ValueError, match=r"w: .*the basis is not orthonormal"):
        init_and_update(lro.in_subspace(adam), lro.recover_residual())
    with pytest.raises(
        ValueError, match="w: second moments rotate between orthonormal"
    ):
        init_and_update(lro.rotate_moments(adam), lro.project_back())
    first = lro.rotate_moments(adam, moments="first")
    init_and_update(first, lro.project_back())
    init_and_update(lro.in_subspace(adam), lro.project_back())


def test_q_galore():
    """Rounded bases, each leaf's refreshed in its own time, under 8-bit Adam."""
    rule = lazy_refresh(quantize_basis(lro.dominant_svd()), threshold=0.0, window=1)
    inner = lro.in_subspace(eight_bit())
    stages = optax.chain(rule, spy(), lro.project(), inner, lro.project_back())
    tx = lro.low_rank(stages, rank=R, refresh_every=1)
    state, update = (
        jax.jit(tx.init)({"w": np.zeros((M, N), np.float32)}),
        jax.jit(tx.update),
    )
    changes = []
    for g in gradients(8, dtype=np.float32):
        _, state = update({"w": g["w"]}, state)
        changes.append(int(spied(state).changes))
    # At steps 0 and 1, then after 2 steps, then after 4.
    assert changes == [1, 2, 2, 3, 3, 3, 3, 4]


def test_refusals():
    rows = lro.basis_rule(
        lambda f, *_: jnp.broadcast_to(jnp.arange(f.rank), (*f.batch, f.rank)),
        coordinates=True,
    )
    for rule in (rows, lro.bases.sample_rows(0), lro.bases.gaussian(0)):
        with pytest.raises(ValueError, match="this rule stores coordinates, a key or"):
            quantize_basis(rule)
    for rule in (
        optax.chain(lro.dominant_svd()),
        lro.bases.online_pca(),
        lazy_refresh(lro.dominant_svd()),
    ):
        with pytest.raises(
            ValueError,
            match=r"quantize_basis\(\) wraps a basis .* lazy_refresh\(\) .* must",
        ):
            quantize_basis(rule)
    with pytest.raises(ValueError, match="bits=2: choose 4 or 8"):
        quantize_basis(lro.dominant_svd(), bits=2)
    with pytest.raises(ValueError, match="group_size must be an int of at least 1"):
        quantize_basis(lro.dominant_svd(), group_size=0)
    rule = quantize_basis(lro.dominant_svd())
    with pytest.raises(ValueError, match=r"inside low_rank\(\)"):
        rule.update({}, rule.init({}))
