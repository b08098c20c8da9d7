"""The head's loss in blocks against its formula, and what it never has in memory."""

import re
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from models import LlamaConfig, bind, init_params
from models.cross_entropy import ALONE, Spread, head_cross_entropy

B, T, D, V = 3, 13, 16, 41
# Float32 rounding (6e-8) of sums over D, V or B * T terms, relative to the whole.
FLOAT32 = 2e-6


def draw(B=B, T=T, D=D, V=V, seed=0):
    """x, kernel, targets and weights (some are 0); the logits spread over some units"""
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.5, 1.5, (B, T)) * (rng.uniform(size=(B, T)) > 0.2)
    return (
        jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32),
        jnp.asarray(rng.normal(size=(D, V)) / 2, jnp.float32),
        jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32),
        jnp.asarray(weights, jnp.float32),
    )


@partial(jax.jit, static_argnums=(0, 1, 6))
def loss(dtype, block_tokens, x, kernel, targets, weights, spread=ALONE):
    return head_cross_entropy(
        *(x, kernel, targets, weights),
        compute_dtype=dtype,
        block_tokens=block_tokens,
        spread=spread,
    )


@cache
def loss_and_gradients(dtype, block_tokens, spread=ALONE):
    def f(*inputs):
        return loss(dtype, block_tokens, *inputs, spread)

    return jax.jit(jax.value_and_grad(f, argnums=(0, 1, 3)))


def reference(dtype, x, kernel, targets, weights):
    """The plain formula in float64, of inputs rounded to dtype."""
    x, kernel = (np.asarray(a.astype(dtype), np.float64) for a in (x, kernel))
    weights = np.asarray(weights, np.float64)
    logits = x @ kernel
    top = logits.max(-1, keepdims=True)
    normalizer = top + np.log(np.exp(logits - top).sum(-1, keepdims=True))
    hit = np.eye(kernel.shape[1])[targets]
    losses = normalizer[..., 0] - (hit * logits).sum(-1)
    slope = weights[..., None] * (np.exp(logits - normalizer) - hit)
    gradients = slope @ kernel.T, np.einsum("btd,btv->dv", x, slope), losses
    return (losses * weights).sum(), gradients


def error(found, expected):
    found = np.asarray(found, np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


# Blocks of 1, 2, 5, 7 and all of the 13 positions.
@pytest.mark.parametrize("block_tokens", [1, 6, 15, 21, 10_000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_loss_and_gradients_follow_the_formula(dtype, block_tokens):
    inputs = draw()
    expected, gradients = reference(dtype, *inputs)
    found, (dx, dkernel, dweights) = loss_and_gradients(dtype, block_tokens)(*inputs)
    assert found.shape == ()
    assert found.dtype == dx.dtype == dkernel.dtype == dweights.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=FLOAT32)
    np.testing.assert_allclose(loss(dtype, block_tokens, *inputs), found, rtol=FLOAT32)
    # bfloat16's 8 bits round each term of a sum by 2**-8 at most.
    bound = 2**-8 if dtype == "bfloat16" else FLOAT32
    assert error(dx, gradients[0]) < bound
    assert error(dkernel, gradients[1]) < bound
    assert error(dweights, gradients[2]) < FLOAT32
    unweighted = np.asarray(inputs[3]) == 0
    assert unweighted.any()
    assert (dx[unweighted] == 0).all()


@cache
def head_loss_and_gradients(dtype):
    """As `loss_and_gradients`, by the model's head and optax, all logits at once."""
    config = LlamaConfig(V, D, 8, num_heads=2, num_layers=1, compute_dtype=dtype)
    params = init_params(config, jax.random.key(0))

    def whole(x, kernel, targets, weights):
        logits = bind(config, {**params, "head": {"kernel": kernel}}).head(x)
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.sum(losses * weights)

    return jax.jit(jax.value_and_grad(whole, argnums=(0, 1, 3)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_it_is_the_models_head_and_optax_loss(dtype):
    inputs = draw()
    expected, gradients = head_loss_and_gradients(dtype)(*inputs)
    found, (dx, dkernel, dweights) = loss_and_gradients(dtype, 15)(*inputs)
    np.testing.assert_allclose(found, expected, rtol=FLOAT32)
    # JAX rounds these two gradients to the compute dtype.
    bound = max(FLOAT32, float(jnp.finfo(dtype).eps))
    assert error(dx, gradients[0]) < bound
    assert error(dkernel, gradients[1]) < bound
    assert error(dweights, gradients[2]) < FLOAT32


def test_bf16_gradients_are_no_worse_than_those_of_the_models_head():
    """With weights of 0 and 1; others are rounded with the logits' gradient."""
    x, kernel, targets, weights = draw()
    inputs = x, kernel, targets, jnp.sign(weights)
    _, exact = reference("bfloat16", *inputs)
    _, whole = head_loss_and_gradients("bfloat16")(*inputs)
    _, blocked = loss_and_gradients("bfloat16", 15)(*inputs)
    for i in range(2):
        assert error(blocked[i], exact[i]) < error(whole[i], exact[i])


@jax.jit
@partial(jax.value_and_grad, argnums=(0, 1))
def plain(x, kernel, targets, weights):
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(x @ kernel, targets)
    return jnp.sum(losses * weights)


@pytest.mark.parametrize("target", [V, V + 1, -1, -V, -V - 1])
@pytest.mark.parametrize("block_tokens", [15, 10_000])
def test_a_target_out_of_range_acts_as_in_optax(target, block_tokens):
    x, kernel, targets, weights = draw()
    targets, weights = targets.at[1, 5].set(target), weights.at[1, 5].set(1.0)

    expected, gradients = plain(x, kernel, targets, weights)
    found = loss_and_gradients("float32", block_tokens)(x, kernel, targets, weights)
    evaluated = loss("float32", block_tokens, x, kernel, targets, weights)
    assert jnp.isnan(expected) == (target not in range(-V, V))
    np.testing.assert_allclose(found[0], expected, rtol=FLOAT32)
    np.testing.assert_allclose(evaluated, expected, rtol=FLOAT32)
    for i in range(2):
        assert error(found[1][i], gradients[i]) < FLOAT32


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32"])
def test_ids_may_be_of_any_integer_type(dtype):
    # More ids than a uint8 holds.
    x, kernel, targets, weights = draw(V=300)
    targets = jnp.minimum(targets, 255)
    run = loss_and_gradients("float32", 15)
    jax.tree.map(
        np.testing.assert_array_equal,
        run(x, kernel, targets.astype(dtype), weights),
        run(x, kernel, targets, weights),
    )


@pytest.mark.parametrize("target", [V, -V - 1, -100, 2**31 - 1])
@pytest.mark.parametrize("block_tokens", [6, 100])
def test_a_target_out_of_range_is_not_read_where_its_weight_is_0(target, block_tokens):
    x, kernel, targets, weights = draw()
    f = loss_and_gradients("float32", block_tokens)
    expected, gradients = f(x, kernel, targets, weights)
    changed = jnp.where(weights == 0, target, targets)
    assert int((weights == 0).sum()) > 3
    got, others = f(x, kernel, changed, weights)
    assert got == expected
    for a, b in zip(gradients[:2], others[:2], strict=True):
        assert (a == b).all()
    assert loss("float32", block_tokens, x, kernel, changed, weights) == loss(
        "float32", block_tokens, x, kernel, targets, weights
    )


def test_gradients_have_the_dtypes_of_what_they_are_for():
    x, kernel, targets, weights = draw()
    kernel = kernel.astype(jnp.bfloat16)
    expected, gradients = reference("bfloat16", x, kernel, targets, weights)
    found, (dx, dkernel, _) = loss_and_gradients("bfloat16", 15)(
        x, kernel, targets, weights
    )
    assert (dx.dtype, dkernel.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(found, expected, rtol=FLOAT32)
    # One more rounding to 8 bits.
    assert error(dkernel, gradients[1]) < 2 * 2**-8
    halves = weights.astype(jnp.float16)
    dhalves = jax.grad(loss, argnums=5)("bfloat16", 15, x, kernel, targets, halves)
    assert dhalves.dtype == jnp.float16
    ones = jnp.ones((B, T), bool)
    np.testing.assert_allclose(
        loss("float32", 15, x, kernel, targets, ones),
        loss("float32", 15, x, kernel, targets, jnp.ones((B, T))),
    )


def test_under_scan_checkpoint_and_a_cotangent():
    """A mean over microbatches, recomputed, is the mean of their sums' gradients."""
    parts = [draw(seed=seed) for seed in range(3)]
    kernel = parts[0][1]
    x, targets, weights = (jnp.stack([p[i] for p in parts]) for i in (0, 2, 3))

    @jax.checkpoint
    def mean(kernel, x, targets, weights):
        return loss("float32", 15, jnp.tanh(x), kernel, targets, weights) / 7

    def add(total, part):
        value, gradient = jax.value_and_grad(mean)(kernel, *part)
        return (total[0] + value, total[1] + gradient), None

    @jax.jit
    def scanned(x, targets, weights):
        zero = jnp.zeros([]), jnp.zeros_like(kernel)
        return jax.lax.scan(add, zero, (x, targets, weights))[0]

    value, gradient = scanned(x, targets, weights)
    exact = [
        reference("float32", jnp.tanh(x), kernel, targets, weights)
        for x, _, targets, weights in parts
    ]
    assert error(value, sum(e[0] for e in exact) / 7) < FLOAT32
    assert error(gradient, sum(e[1][1] for e in exact) / 7) < FLOAT32


def test_eval_shape_and_abstract_ids():
    inputs = jax.eval_shape(draw)
    value, gradients = jax.eval_shape(loss_and_gradients("bfloat16", 15), *inputs)
    assert (value.shape, value.dtype) == ((), jnp.float32)
    assert [g.shape for g in gradients] == [(B, T, D), (D, V), (B, T)]


def test_the_logits_are_computed_once():
    """One product for the loss alone, three with both gradients, in a loop of blocks"""
    inputs = draw(T=12)
    alone = str(jax.make_jaxpr(partial(loss, "float32", 9))(*inputs))
    both = str(jax.make_jaxpr(loss_and_gradients("float32", 9))(*inputs))
    assert alone.count("dot_general[") == 1
    assert both.count("dot_general[") == 3
    # Blocks of three positions, and nowhere the logits of all.
    assert f"f32[{B},3,{V}]" in both
    for program in (alone, both):
        assert f"{B},12,{V}]" not in program


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("length", [512, 509])
def test_compiled_temporaries_are_small(length, dtype):
    inputs = draw(B=8, T=length, D=64, V=8192)
    logits = 8 * length * 8192 * 4

    def temporaries(f):
        memory = f.lower(*inputs).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    # A block has an eighth of the logits, and as much for their gradient. A sixteenth
    # is left for the rest: the kernel in compute_dtype, what is there for each token.
    assert temporaries(loss_and_gradients(dtype, 512)) < (2 / 8 + 1 / 16) * logits
    assert temporaries(jax.jit(partial(loss, dtype, 512))) < (1 / 8 + 1 / 16) * logits


@pytest.mark.parametrize("length", [16, 13])
def test_rows_spread_over_devices_stay_there(length):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    inputs = draw(B=16, T=length)
    placed = [
        jax.device_put(a, s)
        for a, s in zip(inputs, (rows, everywhere, rows, rows), strict=True)
    ]
    spread, whole = Spread(8, ("data",)), loss_and_gradients("float32", 64)
    with_gradients = loss_and_gradients("float32", 64, spread)
    without = jax.jit(lambda *inputs: loss("float32", 64, *inputs, spread))
    for f in (with_gradients, without):
        with jax.set_mesh(mesh):
            compiled = f.lower(*placed).compile()
        # Sums over devices are all that travels: of the loss, and of the gradient of
        # the kernel, which every device has.
        text = str(compiled.as_text())
        moves: list[tuple[str, str]] = re.findall(
            r"= (\S+|\(.*?\)) (all-\w+|collective-\w+|reduce-scatter)[-\w]*\(", text
        )
        assert moves
        for shapes, move in moves:
            assert move == "all-reduce"
            assert set(re.findall(r"\[(.*?)\]", shapes)) <= {"", f"{D},{V}"}
        # Once, and not in the loop over blocks.
        loops = [part for part in text.split("\n\n") if "ENTRY" not in part]
        assert not any(" all-reduce(" in part and f"{D},{V}" in part for part in loops)
        assert f"f32[2,4,{V}]" in text
        alone = whole if f is with_gradients else jax.jit(partial(loss, "float32", 64))
        found, alone = compiled(*placed), alone(*inputs)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(alone), strict=True):
            assert error(a, b) < FLOAT32
    with jax.set_mesh(mesh):
        _, (dx, dkernel, _) = with_gradients(*placed)
    assert dx.sharding.is_equivalent_to(rows, 3)
    assert dkernel.sharding.is_equivalent_to(everywhere, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros((B, D))}, r"x \(3, 16\).*give \(B, T, D\)"),
        ({"x": jnp.zeros(())}, r"x \(\)"),
        ({"x": jnp.zeros((B, T, D + 1))}, "do not fit"),
        ({"kernel": jnp.zeros(D)}, r"kernel \(16,\)"),
        ({"targets": jnp.zeros((B, T - 1), int)}, r"targets \(3, 12\)"),
        ({"weights": jnp.zeros(T)}, r"weights \(13,\)"),
        ({"block_tokens": 0}, "block_tokens=0 must be positive"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_fix(change, message):
    names = ("x", "kernel", "targets", "weights")
    call: dict[str, Any] = dict(zip(names, draw(), strict=True))
    call = {"block_tokens": 15, **call, **change}
    block_tokens = call.pop("block_tokens")
    with pytest.raises(ValueError, match=message):
        loss("float32", block_tokens, *call.values())


def test_no_token_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        loss("float32", 15, *(a[:, :0] if a.shape[0] == B else a for a in draw()))
