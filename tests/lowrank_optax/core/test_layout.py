"""Which leaves are matrices, which way they turn, and at which rank."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optax.contrib import MuonDimensionNumbers

import lowrank_optax as lro
from lowrank_optax.core.dimensions import specs_of
from lowrank_optax.core.layout import layout_of
from lowrank_optax.core.rules import check_rank, rank_of
from tests.helpers.stages import M, N, chain_of, normal


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def nest(path, leaf):
    """A tree with one leaf at this path."""
    for name in reversed(path.split("/")):
        leaf = {name: leaf}
    return leaf


def open_at(tree, **kwargs):
    """State shapes of an Adam in a subspace: what the bracket decided, seen outside."""
    stages = optax.chain(
        lro.dominant_svd(),
        lro.project(),
        lro.in_subspace(optax.scale_by_adam()),
        lro.project_back(),
    )
    tx = lro.low_rank(stages, refresh_every=5, **kwargs)
    mu = optax.tree.get(jax.eval_shape(tx.init, tree), "mu")
    return {
        jax.tree_util.keystr(k, simple=True, separator="/"): x.shape
        for k, x in jax.tree_util.tree_leaves_with_path(mu)
    }


# --- orientation and round trip ---


@st.composite
def shapes_and_specs(draw):
    ndim = draw(st.integers(2, 5))
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=ndim, max_size=ndim)))
    axes = draw(st.permutations(range(ndim)))
    rows = draw(st.integers(1, ndim - 1))
    cols = draw(st.integers(1, ndim - rows))
    signed = [a - ndim if draw(st.booleans()) else a for a in axes]

    def maybe_int(part):
        return part[0] if len(part) == 1 and draw(st.booleans()) else tuple(part)

    return shape, MuonDimensionNumbers(
        maybe_int(signed[:rows]), maybe_int(signed[rows : rows + cols])
    )


@settings(derandomize=True, deadline=None, max_examples=200)
@given(shapes_and_specs())
def test_to_matrix_and_back(case):
    shape, spec = case
    layout = layout_of("w", shape, spec)
    x: Any = np.arange(math.prod(shape)).reshape(shape)
    y = layout.to_matrix(x)
    assert layout.m <= layout.n
    assert y.shape == (*layout.batch, layout.m, layout.n)
    np.testing.assert_array_equal(layout.from_matrix(y), x)

    def tuple_of(axes):
        return (axes,) if isinstance(axes, int) else axes

    rows = [a % len(shape) for a in tuple_of(spec.reduction_axis)]
    cols = [a % len(shape) for a in tuple_of(spec.output_axis)]
    batch = [a for a in range(len(shape)) if a not in rows + cols]
    matrix = x.transpose(*batch, *rows, *cols).reshape(
        *(shape[a] for a in batch),
        math.prod(shape[a] for a in rows),
        math.prod(shape[a] for a in cols),
    )
    if matrix.shape[-2] > matrix.shape[-1]:
        matrix = np.swapaxes(matrix, -1, -2)
    np.testing.assert_array_equal(y, matrix)


@pytest.mark.parametrize(
    ("shape", "reduction", "output", "matrix"),
    [
        ((8, 24), 0, 1, (8, 24)),
        ((24, 8), 0, 1, (8, 24)),
        ((8, 8), 0, 1, (8, 8)),
        ((8, 2, 12), 0, (1, 2), (8, 24)),  # q, k, v: (D, heads, head size)
        ((2, 12, 8), (0, 1), 2, (8, 24)),  # attention's output: (heads, size, D)
        ((5, 8, 2, 12), 1, (2, 3), (5, 8, 24)),  # and under a scan over 5 layers
        ((3, 3, 4, 16), (0, 1, 2), 3, (16, 36)),  # a convolution
    ],
)
def test_kernels_as_matrices(shape, reduction, output, matrix):
    spec = MuonDimensionNumbers(reduction, output)
    layout = layout_of("w", shape, spec)
    assert (*layout.batch, layout.m, layout.n) == matrix
    # Seen from outside: Adam's moments are (r, n).
    seen = open_at({"w": struct(*shape)}, rank=3, dimension_numbers=spec)
    assert seen == {"w": (*matrix[:-2], 3, matrix[-1])}


def test_a_square_matrix_keeps_its_reduction_side_or_the_one_that_is_named():
    x = jnp.arange(9.0).reshape(3, 3)
    spec = MuonDimensionNumbers(0, 1)
    np.testing.assert_array_equal(layout_of("w", (3, 3), spec).to_matrix(x), x)
    spec = MuonDimensionNumbers(1, 0)
    np.testing.assert_array_equal(layout_of("w", (3, 3), spec).to_matrix(x), x.T)
    layout = layout_of("w", (3, 3), spec, "output")
    np.testing.assert_array_equal(layout.to_matrix(x), x)
    assert layout.columns == "input"
    for shape in ((3, 4), (4, 3)):  # others are turned as ever
        assert layout_of("w", shape, spec, "output") == layout_of("w", shape, spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (MuonDimensionNumbers(0, 2), r"a/w: .*does not fit the shape \(4, 6\)"),
        (MuonDimensionNumbers(-3, 1), r"a/w: .*does not fit the shape \(4, 6\)"),
        (MuonDimensionNumbers((), 1), r"a/w: .*does not fit the shape \(4, 6\)"),
        (
            MuonDimensionNumbers(0, 0),
            r"a/w: .*names an axis of the shape \(4, 6\) twice",
        ),
        (
            MuonDimensionNumbers(1, -1),
            r"a/w: .*names an axis of the shape \(4, 6\) twice",
        ),
        (
            MuonDimensionNumbers((0, 1), 1),
            r"a/w: .*names an axis of the shape \(4, 6\) twice",
        ),
    ],
)
def test_dimension_numbers_that_do_not_fit(spec, message):
    with pytest.raises(ValueError, match=message):
        open_at(nest("a/w", struct(4, 6)), rank=2, dimension_numbers=spec)


# --- which leaves ---


@pytest.mark.filterwarnings("ignore:low_rank projects 0 of 1")
@pytest.mark.parametrize(
    ("path", "shape", "low"),
    [
        ("transformer/h_0/attn/c_attn/kernel", (8, 24), (3, 24)),
        ("transformer/h_0/attn/c_proj/kernel", (8, 8), (3, 8)),
        ("transformer/h_0/mlp/c_fc/kernel", (8, 32), (3, 32)),
        ("transformer/h_0/mlp/c_proj/kernel", (32, 8), (3, 32)),
        ("transformer/h_0/mlp/c_fc/bias", (32,), (32,)),
        ("transformer/h_0/ln_1/scale", (8,), (8,)),
        ("transformer/wte/embedding", (50, 8), (50, 8)),
        ("transformer/wpe/embedding", (16, 8), (16, 8)),
        ("wte", (50, 8), (50, 8)),
        ("lm_head/kernel", (8, 50), (8, 50)),
        ("head/kernel", (8, 50), (8, 50)),
        ("logits_dense/kernel", (8, 50), (8, 50)),
        ("model/embed_tokens/embedding", (50, 8), (50, 8)),
        ("model/layers/0/self_attn/q_proj/kernel", (8, 8), (3, 8)),
        ("model/layers/0/mlp/down_proj/kernel", (32, 8), (3, 32)),
        ("model/layers/0/input_layernorm/weight", (8,), (8,)),
        ("encoder/layer_0/attention_norm/scale", (8,), (8,)),
        ("encoder/feed_forward/Dense_0/kernel", (8, 32), (3, 32)),
        ("encoder/FFN/Dense_0/kernel", (8, 32), (3, 32)),
    ],
)
def test_transformer_matrices(path, shape, low):
    seen = open_at(nest(path, struct(*shape)), rank=3, dimension_numbers="auto")
    assert seen == {path: low}


def test_a_kernel_of_three_axes_is_an_error_that_says_what_to_do():
    path = "block/unheard_of/kernel"
    tree = nest(path, struct(8, 2, 4))
    for numbers in ("auto", None):
        with pytest.raises(ValueError, match=re.escape(path)) as caught:
            open_at(tree, rank=3, dimension_numbers=numbers)
        for part in ("(8, 2, 4)", "print_rules", "STACKED", "None"):
            assert part in str(caught.value)

    rules = [("unheard_of/kernel", MuonDimensionNumbers(0, (1, 2)))]
    assert open_at(tree, rank=3, dimension_numbers=rules) == {path: (3, 8)}
    stacked = open_at(tree, rank=1, dimension_numbers=lro.STACKED)
    assert stacked == {path: (8, 1, 4)}


def test_a_parameter_that_no_rule_covers():
    tree = {"mlp": {"kernel": struct(8, 32)}, "dense": {"kernel": struct(8, 8)}}
    with pytest.raises(ValueError, match=r"dense/kernel \(8, 8\): its name"):
        open_at(tree, rank=3, dimension_numbers="auto")
    with pytest.raises(ValueError, match=r"dense/kernel \(8, 8\): no dim.* rule"):
        open_at(tree, rank=3, dimension_numbers=[("mlp", "matrix")])
    rules = [("dense", None), ("", "auto")]
    seen = open_at(tree, rank=3, dimension_numbers=rules)
    assert seen == {"mlp/kernel": (3, 32), "dense/kernel": (8, 8)}


@pytest.mark.filterwarnings("ignore:low_rank projects 0 of 1")
def test_the_first_rule_that_is_found_decides():
    tree = nest("mlp/up/kernel", struct(8, 32))
    for rules, shape in [
        ([("up", None), ("mlp", "matrix")], (8, 32)),
        ([("mlp", "matrix"), ("up", None)], (3, 32)),
        ([("^up", None), ("kernel$", "matrix")], (3, 32)),
        ((("mlp", lro.STACKED),), (3, 32)),
        ([["up", None], ["mlp", "matrix"]], (8, 32)),  # as JSON and YAML have them
        ([[re.compile("UP", re.IGNORECASE), None], ["", "matrix"]], (8, 32)),
    ]:
        seen = open_at(tree, rank=3, dimension_numbers=rules)
        assert seen == {"mlp/up/kernel": shape}


def test_a_tree_and_a_function_of_dimension_numbers():
    tree = {"a": struct(4, 6), "b": struct(2, 4, 6), "c": struct(4, 6)}
    numbers = {"a": "matrix", "b": lro.STACKED, "c": None}
    low = {"a": (2, 6), "b": (2, 2, 6), "c": (4, 6)}
    assert open_at(tree, rank=2, dimension_numbers=numbers) == low
    assert open_at(tree, rank=2, dimension_numbers=lambda _: numbers) == low
    in_list = [struct(4, 6), struct(6, 4)]
    seen = open_at(in_list, rank=2, dimension_numbers=[lro.STACKED, None])
    assert seen == {"0": (2, 6), "1": (6, 4)}

    del numbers["b"]
    with pytest.raises(ValueError, match=r"no entry for \['b'\]"):
        open_at(tree, rank=2, dimension_numbers=numbers)
    numbers["b"] = (0, 1)
    with pytest.raises(ValueError, match=r"no entry for \['b'\]"):
        open_at(tree, rank=2, dimension_numbers=numbers)
    with pytest.raises(ValueError, match=r"a: 7 is none of MuonDimensionNumbers"):
        open_at(tree, rank=2, dimension_numbers=[("", 7)])


def test_vectors_and_scalars_are_always_of_full_rank():
    tree = {"scalar": struct(), "vector": struct(6)}
    # Rules need not cover them.
    for numbers in (None, lro.STACKED, [("", "matrix")], [("mlp", "matrix")], []):
        assert open_at(tree, rank=2, dimension_numbers=numbers) == {
            "scalar": (),
            "vector": (6,),
        }


# --- rank ---


@pytest.mark.parametrize(
    ("rank", "r"),
    [
        (1, 1),
        (7, 7),
        (8, 8),
        (100, 8),
        (0.5, 4),
        (0.01, 1),
        (0.9, 7),
        (1.0, 8),
        ([("mlp", 2), ("", 5)], 2),
        ([("attn", 2), ("", 0.25)], 2),
        ([("mlp", None)], None),
    ],
)
def test_rank(rank, r):
    layout = layout_of("mlp/kernel", (16, 8), MuonDimensionNumbers())
    assert rank_of(rank, "mlp/kernel", layout) == r


def test_a_fraction_is_of_each_matrix_smaller_side():
    tree = {"a": struct(8, 32), "b": struct(32, 16), "c": struct(2, 64, 40)}
    numbers = {"a": "matrix", "b": "matrix", "c": lro.STACKED}
    assert open_at(tree, rank=0.25, dimension_numbers=numbers) == {
        "a": (2, 32),
        "b": (4, 32),
        "c": (2, 10, 64),
    }


def test_a_matrix_that_no_rank_rule_covers():
    tree = {"mlp": struct(8, 32), "attn": struct(8, 8)}
    with pytest.raises(ValueError, match="attn: no rank rule covers this parameter"):
        open_at(tree, rank=[("mlp", 2)])
    assert open_at(tree, rank=[("mlp", 2), ("attn", None)]) == {
        "mlp": (2, 32),
        "attn": (8, 8),
    }


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "rank must be at least 1, not 0"),
        (-3, "rank must be at least 1, not -3"),
        (True, "rank must be an int, a float fraction .*not True"),
        (None, "rank must be an int, a float fraction .*not None"),
        ("4", "rank must be an int, a float fraction .*not '4'"),
        (1.5, r"a fractional rank must lie in \(0, 1\], not 1.5"),
        (0.0, r"a fractional rank must lie in \(0, 1\], not 0.0"),
        (-0.5, r"a fractional rank must lie in \(0, 1\], not -0.5"),
        (float("nan"), r"a fractional rank must lie in \(0, 1\], not nan"),
        ([("mlp", 0)], "rank must be at least 1, not 0"),
        (
            [("mlp", 2), ("attn", 2.0)],
            r"a fractional rank must lie in \(0, 1\], not 2.0",
        ),
    ],
)
def test_bad_ranks(rank, message):
    with pytest.raises(ValueError, match=message):
        check_rank(rank)
    with pytest.raises(ValueError, match=message):
        lro.low_rank(optax.identity(), rank=rank, refresh_every=1)


def test_a_traced_rank_says_which_arguments_are_static():
    def build(rank):
        lro.low_rank(optax.identity(), rank=rank, refresh_every=1)
        return rank

    with pytest.raises(ValueError, match=r"static_args=lowrank_optax\.static_args"):
        jax.jit(build)(4)
    with pytest.raises(ValueError, match=r"static_args=lowrank_optax\.static_args"):
        jax.jit(
            lambda t: lro.low_rank(optax.identity(), rank=1, refresh_every=t) and t
        )(4)


@pytest.mark.parametrize("refresh_every", [0, -1, 2.0, 0.5, None, "10", True])
def test_bad_refresh_every(refresh_every):
    message = f"refresh_every must be an int from 1 to 2**31 - 1, not {refresh_every!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        lro.low_rank(optax.identity(), rank=1, refresh_every=refresh_every)


@pytest.mark.parametrize("rank", [4, 100, 1.0])
@pytest.mark.parametrize(
    ("back", "scale", "atol"),
    [
        (lro.project_back(), 1.0, 0.0),
        (lro.project_back(0.25), 0.25, 0.0),  # a power of two is exact
        # G diag(phi) is taken off and added again: two roundings of numbers up to 2,
        # the norm of a column of Adam's step.
        (lro.recover_residual(1.01), 1.0, 2 * np.finfo(np.float32).eps),
    ],
    ids=["project_back", "scaled", "recover_residual"],
)
def test_at_full_rank_the_bracket_is_adam_and_the_way_back(rank, back, scale, atol):
    params = {"w": jnp.ones((4, 6)), "b": jnp.ones(6)}
    stages = optax.chain(
        lro.sara_sample(key=0),
        lro.project(),
        lro.rotate_moments(optax.scale_by_adam()),
        back,
    )
    adam = optax.scale_by_adam()
    tx = lro.low_rank(stages, rank=rank, refresh_every=2)
    with pytest.warns(UserWarning, match=r"projects 0 of 1 matrices.* w \(rank 4 is"):
        ours = tx.init(params)
    theirs = adam.init(params)
    for seed in range(4):
        g = optax.tree.random_like(jax.random.key(seed), params)
        u, ours = tx.update(g, ours)
        v, theirs = adam.update(g, theirs)
        np.testing.assert_array_equal(u["b"], v["b"])
        np.testing.assert_allclose(u["w"], scale * v["w"], rtol=0, atol=atol)
    for name in ("mu", "nu"):
        jax.tree.map(
            np.testing.assert_array_equal,
            optax.tree.get(ours, name),
            optax.tree.get(theirs, name),
        )
    # No basis, no norm, no draw: nothing but Adam's moments and a key takes memory.
    arrays = [x for x in jax.tree.leaves(ours) if jnp.ndim(x)]
    assert len([x for x in arrays if x.dtype != jnp.uint32]) == 4


def test_rules_see_the_index_of_a_list():
    tree = {"layers": [struct(4, 6), struct(4, 6)]}
    specs = specs_of([("layers/1$", None), ("layers/", "matrix")], tree)
    assert specs == {"layers/0": MuonDimensionNumbers(), "layers/1": None}


@pytest.mark.parametrize(
    "path",
    [
        "PreNorm_0/Attention_0/to_qkv/kernel",
        "ScaledDotProductAttention/kernel",
        "embedded_attention/q/kernel",
        "rescaled/mlp/up/kernel",
        "normal_ffn/w",
        "attention/head_0/q/kernel",
        "attention/heads/kernel",
        "unbiased_attn/w",
    ],
)
def test_names_match_by_whole_parts_of_a_path(path: str) -> None:
    tree: Any = normal(16, 32)
    for part in reversed(path.split("/")):
        tree = {part: tree}
    (row, _) = lro.memory_report(lro.galore(0.1, rank=4, refresh_every=9), tree).rows
    assert row.rank == 4


@pytest.mark.parametrize("every", [2**31, 2**40, 0, -1, True, 1.5])
def test_intervals_out_of_range(every: Any) -> None:
    with pytest.raises(ValueError, match="refresh_every must be an int from 1 to"):
        lro.galore(0.1, rank=3, refresh_every=every)


@pytest.mark.parametrize("option", ["rank", "dimension_numbers"])
def test_a_rule_that_is_no_regular_expression(option: str) -> None:
    rules: Any = {"rank": (("(", 3),), "dimension_numbers": (("(", None),)}
    options: Any = {"rank": 3, "dimension_numbers": None, option: rules[option]}
    tx = lro.low_rank(chain_of(), refresh_every=5, **options)
    with pytest.raises(ValueError, match=r"w: the \w+ rule '\(' is not a regular expr"):
        tx.init({"w": normal(M, N)})
