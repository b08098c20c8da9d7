"""Adam-mini in the subspace: its blocks, its arithmetic, its bytes and its refusals."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.steps.adam_mini import (
    AdamMiniState,
    adam_mini_blocks,
    check_heads,
    scale_by_adam_mini,
)
from lowrank_optax.steps.quantize import QuantizedArray, quantize_moments

L, D, H, V, R = 2, 8, 4, 11, 3  # layers, width, head size, tokens, rank
B1, B2, EPS = 0.9, 0.95, 1e-8
HEADS = [(r"attn/[qk]/", H)]
# Each leaf's shape as the step sees it, and its blocks as the paper has them.
LEAVES = {
    "attn/q/kernel": ((L, R, D), (1, R, H)),
    "attn/v/kernel": ((L, R, D), (1, R, 1)),
    "mlp/down/kernel": ((L, R, 16), (1, R, 1)),  # (16, 8): its columns are inputs
    "attn/q/bias": ((L, D), (1, 1)),
    "attn/norm/scale": ((L, D), (1, D)),
    "embed/embedding": ((V, D), (1, D)),
    "head/kernel": ((D, V), (D, 1)),
    "gain": ((D,), (D,)),
    "temperature": ((), ()),
}


def weights(seed):
    rng = np.random.default_rng(seed)

    def x(*shape):
        return rng.normal(size=shape) * np.geomspace(0.1, 10, shape[-1] if shape else 1)

    return {
        "attn": {
            "q": {"kernel": x(L, D, D), "bias": x(L, D)},
            "v": {"kernel": x(L, D, D)},
            "norm": {"scale": x(L, D)},
        },
        "mlp": {"down": {"kernel": x(L, 16, D)}},
        "embed": {"embedding": x(V, D)},
        "head": {"kernel": x(D, V)},
        "gain": x(D),
        "temperature": x()[0],
    }


def flat(tree):
    return {
        jax.tree_util.keystr(k, simple=True, separator="/"): x
        for k, x in jax.tree_util.tree_leaves_with_path(tree)
    }


MATRICES = [
    (r"(attn/[qv]|mlp/.*)/kernel", lro.STACKED),
    (r"", None),
]


def bases(seed, count):
    rng = np.random.default_rng(seed)

    def s():
        return np.linalg.qr(rng.normal(size=(count, L, D, R)))[0]

    return {
        "attn": {"q": {"kernel": s()}, "v": {"kernel": s()}},
        "mlp": {"down": {"kernel": s()}},
    }


def bracket(s, *, refresh_every=100, wrap=lro.in_subspace, inner=None):
    inner = inner or scale_by_adam_mini(B1, B2, EPS, blocks=adam_mini_blocks(HEADS))
    stages = optax.chain(
        lro.bases.replay(s),
        check_heads(HEADS),
        lro.project(),
        wrap(inner),
        lro.project_back(),
    )
    return lro.low_rank(
        stages, rank=R, refresh_every=refresh_every, dimension_numbers=MATRICES
    )


def means(x, block):
    """The mean over each block, in the array's shape; block by block."""
    out = np.zeros_like(x)
    for corner in np.ndindex(*[d // b for d, b in zip(x.shape, block, strict=True)]):
        part = tuple(
            slice(c * b, (c + 1) * b) for c, b in zip(corner, block, strict=True)
        )
        out[part] = x[part].mean()
    return out


def adam_mini(grads, block, turns=None):
    """All steps on one leaf, v kept in the leaf's shape."""
    m = v = np.zeros_like(grads[0])
    steps = []
    for t, g in enumerate(grads):
        if turns is not None and t:
            m = turns[t] @ m
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * means(g**2, block)
        m_hat, v_hat = m / (1 - B1 ** (t + 1)), v / (1 - B2 ** (t + 1))
        steps.append(m_hat / (np.sqrt(v_hat) + EPS))
    return steps


def run(tx, grads):
    with jax.enable_x64(True):
        state, out, update = tx.init(grads[0]), [], jax.jit(tx.update)
        for g in grads:
            updates, state = update(g, state)
            out.append(flat(jax.device_get(updates)))
        return out, jax.device_get(state)


def as_matrix(path, x):
    """(L, m, n) with m <= n."""
    return np.swapaxes(x, -1, -2) if "down" in path else x


@pytest.mark.parametrize("rotate", [False, True])
def test_by_the_equations(rotate):
    grads = [weights(t) for t in range(4)]
    every, wrap = (2, lro.rotate_moments) if rotate else (100, lro.in_subspace)
    s = bases(0, 2)
    updates, _ = run(bracket(s, refresh_every=every, wrap=wrap), grads)
    s = flat(s)
    for path, (shape, block) in LEAVES.items():
        g = [np.asarray(flat(x)[path]) for x in grads]
        if path not in s:
            expected = adam_mini(g, block)
        else:
            at = [s[path][t // every] for t in range(4)]
            down = [np.swapaxes(x, -1, -2) for x in at]
            g = [d @ as_matrix(path, x) for d, x in zip(down, g, strict=True)]
            assert g[0].shape == shape
            turns = [down[t] @ at[t - 1] for t in range(4)]
            steps = adam_mini(g, block, turns)
            expected = [as_matrix(path, a @ x) for a, x in zip(at, steps, strict=True)]
        for u, e in zip(updates, expected, strict=True):
            # Float64 on both sides.
            np.testing.assert_allclose(u[path], e, rtol=1e-10, atol=1e-12, err_msg=path)


def test_the_default_blocks():
    blocks = adam_mini_blocks(HEADS)
    for path, (shape, block) in LEAVES.items():
        assert blocks(path, shape) == block, path
    assert adam_mini_blocks()("attn/q/kernel", (L, R, D)) == (1, R, 1)
    assert adam_mini_blocks(rules=[("", "element")])("w", (4, 6)) == (1, 1)
    assert adam_mini_blocks(rules=[("", "column")])("w", (6,)) == (1,)
    assert adam_mini_blocks([("", 2)], rules=())("w", (6,)) == (2,)


def test_bytes():
    params = jax.tree.map(np.float32, weights(0))
    state = jax.eval_shape(bracket(bases(0, 1)).init, params)
    leaves = LEAVES.values()
    sizes = [int(np.prod(shape)) for shape, _ in leaves]
    blocks = [
        size // int(np.prod(block))
        for size, (_, block) in zip(sizes, leaves, strict=True)
    ]
    mu, nu = optax.tree.get(state, "mu"), optax.tree.get(state, "nu")
    count = {"mu": sum(sizes), "nu": sum(blocks)}
    for name, tree in (("mu", mu), ("nu", nu)):
        assert {x.dtype.name for x in jax.tree.leaves(tree)} == {"float32"}
        assert sum(x.size for x in jax.tree.leaves(tree)) == count[name]
    # A projected matrix: rn + n numbers; with heads of h, rn + n / h.
    assert nu["mlp"]["down"]["kernel"].shape == (L, 1, 16)
    assert nu["attn"]["q"]["kernel"].shape == (L, 1, D // H)


def test_blocks_of_one_number_are_adam():
    grads = [jax.tree.map(np.float32, weights(t)) for t in range(5)]
    ours = scale_by_adam_mini(0.9, 0.999, blocks=lambda _, shape: (1,) * len(shape))
    adam = optax.scale_by_adam(0.9, 0.999)
    state, plain = ours.init(grads[0]), adam.init(grads[0])
    for g in grads:
        updates, state = jax.jit(ours.update)(g, state)
        expected, plain = jax.jit(adam.update)(g, plain)
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)  # the order of float32 products


def test_v_of_a_column_does_not_depend_on_the_basis_of_a_subspace():
    """Why v is not turned: the steps of S and of S Q are the same in full space."""
    s = bases(1, 1)
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(R, R)))[0]
    turned = jax.tree.map(lambda x: np.concatenate([x, x @ q]), s)
    grads = [weights(t) for t in range(4)]

    def steps(s):
        inner = scale_by_adam_mini(B1, B2, EPS)
        tx = bracket(s, refresh_every=2, wrap=lro.rotate_moments, inner=inner)
        return run(tx, grads)[0][-1]

    a, b = steps(s), steps(turned)
    for path in a:
        np.testing.assert_allclose(a[path], b[path], rtol=1e-10, atol=1e-12)  # float64


def test_in_8_bits_and_in_bfloat16():
    params = {"w": jnp.ones((64, 128), jnp.bfloat16)}
    tx = quantize_moments(scale_by_adam_mini())
    updates, state = jax.jit(tx.update)(params, tx.init(params))
    mu = optax.tree.get(state, "mu")["w"]
    assert (mu.shape, mu.dtype) == ((64, 128), jnp.uint8)
    _, mu_scales, nu_scales = state.scales
    assert mu_scales["w"].shape == (64, 1)
    assert (nu_scales["w"].shape, nu_scales["w"].dtype) == ((), jnp.bool_)
    stored = QuantizedArray(mu, mu_scales["w"]).dequantize()
    # 1 - b1 of ones; all of a block are its largest, which comes back as bfloat16.
    np.testing.assert_allclose(np.float32(stored), 0.1, rtol=2**-8)
    assert optax.tree.get(state, "nu")["w"].shape == (1, 128)
    assert updates["w"].dtype == optax.tree.get(state, "nu")["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(updates["w"]), 1, rtol=0.02)  # a few ulps


def test_state_keeps_its_form():
    grads = jax.tree.map(np.float32, weights(0))
    tx = bracket(bases(0, 1))
    state = tx.init(grads)
    form = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    _, state = jax.jit(tx.update)(grads, state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == form
    assert isinstance(scale_by_adam_mini().init(grads), AdamMiniState)


@pytest.mark.parametrize("block", [(3, 1), (1,), (0, 1), (16, 6)])
def test_blocks_that_do_not_divide(block):
    tx = scale_by_adam_mini(blocks=lambda path, shape: block)
    with pytest.raises(ValueError, match=r"mlp/up: blocks .* do not divide .*\(8, 6\)"):
        tx.init({"mlp": {"up": jnp.ones((8, 6))}})


@pytest.mark.parametrize("kind", ["rows", 0, True, None])
def test_an_unknown_kind(kind):
    with pytest.raises(ValueError, match=r"'q': .* is not \"element\""):
        adam_mini_blocks([("q", kind)])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((16, 8), "attn/k/kernel: the columns are the 16 inputs, because the outputs"),
        ((8, 10), "attn/k/kernel: 10 columns are not a multiple of the head size 4"),
    ],
)
def test_heads_that_a_projection_takes_apart(shape, message):
    params = {"attn": {"k": {"kernel": jnp.ones(shape)}, "v": jnp.ones((16, 8))}}
    stages = optax.chain(
        lro.dominant_svd(), check_heads(HEADS), lro.project(), lro.project_back()
    )
    tx = lro.low_rank(stages, rank=R, refresh_every=1)
    with pytest.raises(ValueError, match=message):
        tx.init(params)
    # Where the heads are not projected they are not this stage's business.
    full: Any = [("k", None), ("", "matrix")]
    lro.low_rank(stages, rank=R, refresh_every=1, dimension_numbers=full).init(params)
