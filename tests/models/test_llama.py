"""The model against its equations, its contract of paths, and its promises."""

import re
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import models.llama
from models import (
    SIZES,
    LlamaConfig,
    bind,
    count_params,
    forward,
    generate,
    init_params,
)
from models.llama import Block, context_of
from models.padding import pad_to
from models.params import embed, finish, run_layer
from models.rope import rotary_angles, rotate

# A large init_std makes attention and the gates far from linear.
SMALL = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    mlp_size=40,
    num_heads=4,
    num_layers=3,
    init_std=0.3,
    compute_dtype="float32",
)
# Float32 rounding (6e-8 a step) through a few hundred sums a logit, some hundred times.
ROUNDING = {"rtol": 2e-5, "atol": 2e-5}


@cache
def draw(config, seed=0):
    """Weights whose norm scales are not all 1, so that a lost scale is seen."""
    params = init_params(config, jax.random.key(seed))
    rng = np.random.default_rng(seed)

    def perturb(path, x):
        is_scale = path[-1].key == "scale"
        return x * rng.uniform(0.5, 1.5, x.shape).astype("f4") if is_scale else x

    return jax.tree_util.tree_map_with_path(perturb, params)


@cache
def draw_tokens(config, batch, length, seed=0):
    return jax.random.randint(
        jax.random.key(seed), (batch, length), 0, config.vocab_size
    )


def mean_loss(config, params, tokens):
    logp = jax.nn.log_softmax(forward(config, params, tokens)[:, :-1])
    return -jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1).mean()


run = jax.jit(forward, static_argnums=0)
gradient = jax.jit(jax.grad(mean_loss, argnums=1), static_argnums=0)


def reference_logits(config, params, tokens):
    """One sequence, one head and one position at a time, in numpy float64."""
    weights = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    H = config.hidden_size // config.num_heads
    group = config.num_heads // (config.num_kv_heads or config.num_heads)

    def rms_norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale

    def rope(x, t):
        # The pair (i, i + H/2) as one complex number, turned by t / 10000^(2i/H).
        z = x[: H // 2] + 1j * x[H // 2 :]
        z = z * np.exp(1j * t * 10000.0 ** (-2 * np.arange(H // 2) / H))
        return np.concatenate([z.real, z.imag])

    def attend(x, layer):
        q, k, v = (x @ layer["attention"][n]["kernel"] for n in "qkv")
        out = np.zeros_like(q)
        for t in range(len(x)):
            for head in range(config.num_heads):
                own = slice(head * H, (head + 1) * H)
                shared = slice(head // group * H, (head // group + 1) * H)
                query = rope(q[t, own], t)
                keys = [rope(k[s, shared], s) for s in range(t + 1)]
                weight = np.exp([query @ key / np.sqrt(H) for key in keys])
                out[t, own] = weight / weight.sum() @ v[: t + 1, shared]
        return out @ layer["attention"]["o"]["kernel"]

    def mlp(x, layer):
        gate, up, down = (layer["mlp"][n]["kernel"] for n in ("gate", "up", "down"))
        g = x @ gate
        return (g / (1 + np.exp(-g)) * (x @ up)) @ down

    def logits(row):
        x = weights["embed"]["embedding"][row]
        for i in range(config.num_layers):
            layer = jax.tree.map(lambda w, i=i: w[i], weights["layers"])
            x = x + attend(rms_norm(x, layer["attention_norm"]["scale"]), layer)
            x = x + mlp(rms_norm(x, layer["mlp_norm"]["scale"]), layer)
        return rms_norm(x, weights["norm"]["scale"]) @ weights["head"]["kernel"]

    return np.stack([logits(row) for row in np.asarray(tokens)])


@pytest.mark.parametrize(
    "change", [{}, {"num_kv_heads": 2}, {"num_kv_heads": 1}, {"mlp_size": 43}]
)
def test_forward_follows_the_equations(change):
    config = replace(SMALL, **change)
    params, tokens = draw(config), draw_tokens(config, 2, 9)
    expected = reference_logits(config, params, tokens)
    # The logits spread over some units, so the tolerance is far below the signal.
    assert expected.std() > 0.5
    np.testing.assert_allclose(run(config, params, tokens), expected, **ROUNDING)


def test_odd_widths_are_padded_in_the_products_alone():
    config = replace(SMALL, mlp_size=43, vocab_size=61)
    params, tokens = draw(config), draw_tokens(config, 2, 8)
    assert params["layers"]["mlp"]["down"]["kernel"].shape == (3, 43, 32)
    program = gradient.lower(config, params, tokens).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert any("x48x" in line for line in products)
    assert not any(re.search(r"[x<](43|61)[x>]", line) for line in products)


def test_a_gradient_of_odd_widths_is_that_of_zeros_appended_to_the_weights():
    config = replace(SMALL, mlp_size=43)
    params, tokens = draw(config), draw_tokens(config, 2, 8)
    mlp = params["layers"]["mlp"]
    padded = {
        name: {"kernel": pad_to(mlp[name]["kernel"], 48, 1 if name == "down" else 2)}
        for name in mlp
    }
    wider = params | {"layers": params["layers"] | {"mlp": padded}}
    found = gradient(config, params, tokens)
    expected = gradient(replace(config, mlp_size=48), wider, tokens)
    for name, part in found["layers"]["mlp"].items():
        rest = expected["layers"]["mlp"][name]["kernel"]
        rest = rest[:, :43] if name == "down" else rest[..., :43]
        np.testing.assert_allclose(part["kernel"], rest, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_a_later_token_changes_no_earlier_logit(compute_dtype):
    config = replace(SMALL, compute_dtype=compute_dtype)
    params, tokens = draw(config), draw_tokens(config, 2, 12)
    changed = tokens.at[:, 7].set((tokens[:, 7] + 1) % config.vocab_size)
    before, after = run(config, params, tokens), run(config, params, changed)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert (np.asarray(before[:, 7:]) != np.asarray(after[:, 7:])).any(axis=-1).all()


def test_rope_scores_depend_on_the_distance_only():
    T, H = 24, 16
    angle = rotary_angles(jnp.arange(T), H, theta=1e4)
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=H), jnp.float32) for _ in range(2))
    q, k = (rotate(jnp.broadcast_to(x, (1, T, 1, H)), angle)[0, :, 0] for x in (q, k))
    scores = np.asarray(q @ k.T)
    for distance in range(-T + 1, T):
        along = np.diagonal(scores, distance)
        np.testing.assert_allclose(along, along[0], rtol=1e-4, atol=1e-4)
    # It does depend on the distance, and on its sign.
    assert np.ptp(scores[:, 0]) > 1
    assert abs(scores[0, 5] - scores[5, 0]) > 1e-2


def test_remat_recomputes_and_keeps_the_gradients():
    params, tokens = draw(SMALL), draw_tokens(SMALL, 2, 10)
    gradients, dots = {}, {}
    for remat in ("none", "dots", "full"):
        own_gradient = partial(gradient, replace(SMALL, remat=remat))
        gradients[remat] = own_gradient(params, tokens)
        program = jax.make_jaxpr(own_gradient)(params, tokens)
        dots[remat] = str(program).count("dot_general[")
    # "dots" repeats only attention's batched products, "full" the matrix products too.
    assert dots["none"] < dots["dots"] < dots["full"]
    for remat in ("dots", "full"):
        jax.tree.map(
            partial(np.testing.assert_allclose, **ROUNDING),
            gradients[remat],
            gradients["none"],
        )


def test_the_scan_equals_applying_the_layers_one_by_one():
    params, tokens = draw(SMALL), draw_tokens(SMALL, 2, 10)
    block = nnx.graphdef(nnx.eval_shape(lambda: Block(SMALL, rngs=nnx.Rngs(0))))
    model = bind(SMALL, params)
    own = context_of(SMALL, 10)
    apply = jax.jit(lambda layer, x: nnx.merge(block, layer)(x, own))
    x = params["embed"]["embedding"][tokens]
    for i in range(SMALL.num_layers):
        x = apply(jax.tree.map(lambda w, i=i: w[i], params["layers"]), x)
    expected = model.head(model.norm(x))
    # The same products; XLA may sum them in another order inside a loop.
    np.testing.assert_allclose(run(SMALL, params, tokens), expected, **ROUNDING)


@pytest.mark.parametrize(
    ("remat", "compute_dtype"), [("none", "float32"), ("dots", "bfloat16")]
)
def test_the_model_in_three_steps_is_the_model(remat, compute_dtype):
    config = replace(SMALL, remat=remat, compute_dtype=compute_dtype)
    params, tokens = draw(config), draw_tokens(config, 2, 10)
    rest = {name: params[name] for name in ("embed", "norm")}

    @jax.jit
    def in_steps(layers, rest, tokens):
        def body(x, layer):
            assert x.dtype == compute_dtype
            return run_layer(config, layer, x), None

        x, _ = jax.lax.scan(body, embed(config, rest, tokens), layers)
        return finish(config, rest, x)

    found = in_steps(params["layers"], rest, tokens)
    model = bind(config, params)
    assert found.dtype == jnp.float32
    # One scan over the same operations, in another program.
    np.testing.assert_allclose(found, jax.jit(model.hidden)(tokens), **ROUNDING)
    np.testing.assert_allclose(
        model.head(found), run(config, params, tokens), **ROUNDING
    )


def test_the_program_does_not_grow_with_depth():
    def size(num_layers):
        config = replace(SMALL, num_layers=num_layers, remat="dots")
        params = jax.eval_shape(partial(init_params, config), jax.random.key(0))
        tokens = draw_tokens(config, 1, 4)
        program = jax.make_jaxpr(partial(gradient, config))(params, tokens)
        return str(program).count(" = ")

    assert size(2) == size(40)


def test_bf16_compute_keeps_float32_weights_gradients_and_logits():
    config = replace(SMALL, compute_dtype="bfloat16", init_std=0.1)
    params, tokens = draw(config), draw_tokens(config, 2, 16)
    logits = run(config, params, tokens)
    gradients = gradient(config, params, tokens)
    for leaf in jax.tree.leaves((params, gradients, logits)):
        assert leaf.dtype == jnp.float32
    rounded = logits.astype(jnp.bfloat16).astype(jnp.float32)
    assert (logits != rounded).mean() > 0.9
    exact = run(replace(config, compute_dtype="float32"), params, tokens)
    # bfloat16 keeps 8 bits; a few roundings a layer stay within some per cent.
    assert 0 < jnp.linalg.norm(logits - exact) < 0.03 * jnp.linalg.norm(exact)


def test_bf16_compute_sums_a_frequent_tokens_gradient_in_float32():
    config = replace(SMALL, compute_dtype="bfloat16", init_std=0.1, num_layers=1)
    params, tokens = draw(config), jnp.zeros((8, 256), int)

    def embedding_gradient(compute_dtype):
        same = replace(config, compute_dtype=compute_dtype)
        return gradient(same, params, tokens)["embed"]["embedding"][0]

    half, exact = embedding_gradient("bfloat16"), embedding_gradient("float32")
    # 2048 like terms: each is rounded to 8 bits, but the sum must not stall at 256.
    assert jnp.linalg.norm(half - exact) < 0.05 * jnp.linalg.norm(exact)


@pytest.mark.parametrize(
    ("name", "V", "D", "F", "L", "head_size", "count"),
    [
        ("tiny", 4096, 128, 344, 4, 32, 1_840_256),
        ("60m", 32000, 512, 1376, 8, 64, 58_073_600),
        ("130m", 32000, 768, 2048, 12, 64, 134_105_856),
        ("350m", 32000, 1024, 2736, 24, 64, 367_969_280),
        ("1b", 32000, 2048, 5461, 24, 64, 1_339_082_752),
        ("7b", 32000, 4096, 11008, 32, 128, 6_738_415_616),
        ("13b", 32000, 5120, 13824, 40, 128, 13_015_864_320),
        ("70b", 128256, 8192, 28672, 80, 128, 70_553_706_496),
    ],
)
def test_paths_shapes_and_count_of_every_size(name, V, D, F, L, head_size, count):
    config = SIZES[name]
    kv = config.kv_heads * head_size
    outputs = {"q": D, "k": kv, "v": kv, "o": D}
    params = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype.name), params) == jax.tree.map(
        lambda shape: (shape, "float32"),
        {
            "embed": {"embedding": (V, D)},
            "layers": {
                "attention": {n: {"kernel": (L, D, k)} for n, k in outputs.items()},
                "attention_norm": {"scale": (L, D)},
                "mlp": {
                    "gate": {"kernel": (L, D, F)},
                    "up": {"kernel": (L, D, F)},
                    "down": {"kernel": (L, F, D)},
                },
                "mlp_norm": {"scale": (L, D)},
            },
            "norm": {"scale": (D,)},
            "head": {"kernel": (D, V)},
        },
        is_leaf=lambda x: isinstance(x, tuple),
    )
    assert config.head_size == head_size
    assert count_params(config) == count
    attention = 2 * D * D + 2 * D * kv
    assert count == 2 * V * D + L * (attention + 3 * D * F + 2 * D) + D
    tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    logits = jax.eval_shape(partial(forward, config), params, tokens)
    assert (logits.shape, logits.dtype) == ((2, 16, V), jnp.float32)


def test_grouped_query_heads_shrink_only_keys_and_values():
    config = replace(SMALL, num_kv_heads=2)
    params = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    shapes = {n: params["layers"]["attention"][n]["kernel"].shape for n in "qkvo"}
    assert shapes == {n: (3, 32, 16 if n in "kv" else 32) for n in "qkvo"}


def test_init_is_normal_per_layer_and_fixed_by_the_key():
    config = replace(SIZES["tiny"], vocab_size=512)
    params = init_params(config, jax.random.key(3))
    assert all(
        (params["layers"][name]["scale"] == 1).all()
        for name in ("attention_norm", "mlp_norm")
    )
    matrices = [x for x in jax.tree.leaves(params) if x.std() > 0]
    # Both norms' stacked scales and the last norm's are the three constant leaves.
    assert len(matrices) == len(jax.tree.leaves(params)) - 3
    # Each layer holds over 16k draws: five standard errors of a std are under 3 %.
    for layer in (m[i] for m in matrices if m.ndim == 3 for i in range(m.shape[0])):
        np.testing.assert_allclose(layer.std(), 0.02, rtol=0.03)
    firsts = [float(m[i, 0, 0]) for m in matrices if m.ndim == 3 for i in range(4)]
    assert len(set(firsts)) == len(firsts)
    again, other = (init_params(config, jax.random.key(seed)) for seed in (3, 4))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert (params["head"]["kernel"] != other["head"]["kernel"]).mean() > 0.99


def test_sharded_params_start_the_same_and_give_the_same_gradient():
    config = replace(SMALL, vocab_size=64)
    mesh = Mesh(np.array(jax.devices()), ("data",))

    def shard(x):
        wide = x.shape[-1] % mesh.size == 0
        return NamedSharding(
            mesh, PartitionSpec(*[None] * (x.ndim - 1), "data" if wide else None)
        )

    init = partial(init_params, config)
    shardings = jax.tree.map(shard, jax.eval_shape(init, jax.random.key(0)))
    params = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
    alone = init(jax.random.key(0))
    # The same draws; their inverse error function differs in the last bits between the
    # vector and the scalar code that XLA picks by the size of a shard.
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), params, alone)
    assert params["head"]["kernel"].sharding == shardings["head"]["kernel"]

    tokens = draw_tokens(config, mesh.size, 8)
    batch = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec("data")))
    # The same sums, split over devices.
    jax.tree.map(
        partial(np.testing.assert_allclose, **ROUNDING),
        gradient(config, params, batch),
        gradient(config, alone, tokens),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 30}, "multiple of 2 \\* num_heads=8"),
        ({"hidden_size": 36}, "multiple of 2 \\* num_heads=8"),
        ({"num_kv_heads": 3}, "num_kv_heads=3 must divide num_heads=4"),
        ({"num_kv_heads": 8}, "num_kv_heads=8 must divide num_heads=4"),
        ({"num_kv_heads": 0}, "num_kv_heads=0 must be positive"),
        ({"num_layers": 0}, "num_layers=0 must be positive"),
        ({"init_std": 0.0}, "init_std=0.0 must be positive"),
        ({"compute_dtype": "float8"}, "use one of bfloat16, float16, float32"),
        ({"remat": "all"}, "use one of none, full, dots"),
        ({"attention": "flash"}, "use one of auto, xla, cudnn"),
        ({"attention": "cudnn"}, "set compute_dtype='bfloat16'"),
    ],
)
def test_a_bad_config_is_refused_with_the_fix(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


@pytest.mark.parametrize(
    ("platform", "capability", "length", "change", "kernel"),
    [
        ("cuda 13000", "9.0", 4, {}, "cudnn"),
        ("cuda 13000", "9.0", 5, {}, "xla"),
        ("cuda 13000", "9.0", 5, {"attention": "cudnn"}, "cudnn"),
        ("cuda 13000", "9.0", 4, {"compute_dtype": "float32"}, "xla"),
        ("cuda 13000", "7.5", 4, {}, "xla"),
        ("cuda 13000", "9.0", 4, {"hidden_size": 48}, "cudnn"),
        ("cuda 13000", "9.0", 4, {"hidden_size": 1024}, "xla"),
        ("cuda 13000", "9.0", 4, {"attention": "xla"}, "xla"),
        ("rocm 60000", "gfx90a", 4, {}, "xla"),
        ("<unknown>", None, 4, {}, "xla"),
    ],
)
def test_cudnn_is_asked_for_where_it_can_run(
    monkeypatch, platform, capability, length, change, kernel
):
    device = SimpleNamespace(compute_capability=capability)
    backend = SimpleNamespace(platform_version=platform, local_devices=lambda: [device])
    asked = []

    def record(query, key, value, *, scale, is_causal, implementation):
        assert is_causal
        assert scale == 1 / np.sqrt(config.head_size)  # also where a head is padded
        assert implementation == "xla" or query.shape[-1] % 8 == 0
        asked.append(implementation)
        return query

    monkeypatch.setattr(models.llama, "get_backend", lambda: backend)
    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    config = replace(SMALL, **{"compute_dtype": "bfloat16", **change})
    init = partial(init_params, config)
    params = jax.eval_shape(init, jax.random.key(0))
    tokens = draw_tokens(config, 1, length)
    jax.eval_shape(partial(forward, config), params, tokens)
    assert set(asked) == {kernel}


def test_weights_that_do_not_fit_the_config_are_named():
    params, tokens = draw(SMALL), draw_tokens(SMALL, 1, 4)
    with pytest.raises(ValueError, match=r"'layers/attention/k/kernel'.*\(3, 32, 16"):
        forward(replace(SMALL, num_kv_heads=2), params, tokens)
    extra = {**params, "bias": jnp.zeros(3)}
    with pytest.raises(ValueError, match=r"'bias'\] has shape \(3,\).*None"):
        forward(SMALL, extra, tokens)
    del extra["bias"], extra["head"]
    with pytest.raises(ValueError, match="'head/kernel'"):
        forward(SMALL, extra, tokens)


def test_a_token_outside_the_vocabulary_is_loud():
    tokens = jnp.array([[1, SMALL.vocab_size, 2], [1, SMALL.vocab_size - 1, 2]])
    logits = run(SMALL, draw(SMALL), tokens)
    assert jnp.isnan(logits[0]).all()
    assert jnp.isfinite(logits[1]).all()


def test_greedy_generation_is_the_argmax_step_by_step():
    params, prompt = draw(SMALL), draw_tokens(SMALL, 3, 4)
    expected = prompt
    for _ in range(4):
        likeliest = run(SMALL, params, expected)[:, -1].argmax(-1)
        expected = jnp.concatenate([expected, likeliest[:, None]], axis=1)
    for seed in (0, 1):
        key = jax.random.key(seed)
        found = generate(SMALL, params, prompt, steps=4, key=key, temperature=0)
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == prompt.dtype


def test_sampling_is_fixed_by_the_key_and_draws_from_the_model():
    params, key = draw(SMALL), jax.random.key(0)
    prompt = jnp.tile(draw_tokens(SMALL, 1, 4), (4096, 1))
    tokens = generate(SMALL, params, prompt, steps=2, key=key, temperature=2.0)
    again = generate(SMALL, params, prompt, steps=2, key=key, temperature=2.0)
    other = generate(
        SMALL, params, prompt, steps=2, key=jax.random.key(1), temperature=2.0
    )
    np.testing.assert_array_equal(tokens, again)
    assert (tokens[:, 4:] != other[:, 4:]).any()
    np.testing.assert_array_equal(tokens[:, :4], prompt)
    probability = jax.nn.softmax(run(SMALL, params, prompt[:1])[0, -1] / 2.0)
    share = np.bincount(tokens[:, 4], minlength=SMALL.vocab_size) / 4096
    # Five standard errors of a share of 4096 draws, at most 0.5 / sqrt(4096) each.
    np.testing.assert_allclose(share, probability, atol=5 * 0.5 / 64)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (np.ones(4, int), {}, "give \\(batch, tokens\\)"),
        (np.ones((2, 0), int), {}, "at least one token"),
        (np.ones((2, 4)), {}, "integer token ids"),
        (np.ones((2, 4), int), {"steps": -1}, "steps=-1"),
        (np.ones((2, 4), int), {"temperature": -0.5}, "temperature=-0.5"),
    ],
)
def test_a_bad_request_to_generate_is_refused(prompt, options, message):
    options = {"steps": 2, "key": jax.random.key(0), **options}
    with pytest.raises(ValueError, match=message):
        generate(SMALL, draw(SMALL), jnp.asarray(prompt), **options)
