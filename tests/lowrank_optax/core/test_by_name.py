"""The default rules on the parameter trees that people have."""

import re

import jax
import jax.numpy as jnp
import pytest

import lowrank_optax as lro
from lowrank_optax.core.by_name import decide_by_name
from lowrank_optax.core.dimensions import specs_of
from tests.helpers.trees import TREES, parsed


def axes_of(spec, ndim):
    """ "batch|rows|columns" of a spec, as the table has it."""

    def side(axes):
        axes = (axes,) if isinstance(axes, int) else axes
        return sorted(a % ndim for a in axes)

    rows, cols = side(spec.reduction_axis), side(spec.output_axis)
    batch = [a for a in range(ndim) if a not in (*rows, *cols)]
    return "|".join(",".join(map(str, part)) for part in (batch, rows, cols))


def said(decision, ndim):
    if decision.undecided:
        return "?"
    return "full" if decision.spec is None else axes_of(decision.spec, ndim)


@pytest.mark.parametrize("name", TREES)
def test_every_leaf_of_a_tree(name):
    tree = parsed(TREES[name])
    found = decide_by_name({path: shape for path, (shape, _) in tree.items()})
    assert {
        path: said(found[path], len(shape)) for path, (shape, _) in tree.items()
    } == {path: want for path, (_, want) in tree.items()}


@pytest.mark.parametrize("name", TREES)
def test_a_layer_of_a_stack_is_what_the_stack_is(name):
    """As layer-wise updates see it: without the first axis, which is the layers'."""
    rows = parsed(TREES[name])
    stacks = {path: row for path, row in rows.items() if row[1].startswith("0|")}
    if any("expert" in path for path in stacks):
        return
    found = decide_by_name(
        {p: shape[1:] for p, (shape, _) in stacks.items()}, sliced=True
    )
    for path, (shape, want) in stacks.items():
        sides = want.split("|")[1:]
        sides = [",".join(str(int(a) - 1) for a in x.split(",")) for x in sides]
        assert said(found[path], len(shape) - 1) == "|".join(["", *sides]), path


def nested(tree):
    """A tree of zeros in nested dicts."""
    out = {}
    for path, (shape, _) in tree.items():
        *parts, last = path.split("/")
        inner = out
        for part in parts:
            inner = inner.setdefault(part, {})
        inner[last] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return out


@pytest.mark.parametrize("name", TREES)
def test_the_printed_rules_work_and_say_the_same(name, capsys):
    rows = parsed(TREES[name])
    lro.print_rules(nested(rows))
    text = capsys.readouterr().out
    rules = eval(text, {"lro": lro, "optax": __import__("optax")})
    found = specs_of(rules, nested(rows))
    for path, (shape, want) in rows.items():
        spec = found[path]
        assert (spec and axes_of(spec, len(shape))) == (
            None if want in ("?", "full") else want
        )
    assert ("undecided" in text) == any(want == "?" for _, want in rows.values())


def test_one_error_lists_every_leaf_that_is_undecided_and_rules_that_work():
    params = {
        "Dense_0": {"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6)},
        "Dense_1": {"kernel": jnp.ones((6, 4))},
        "stem": {"kernel": jnp.ones((3, 3, 2, 8))},
        "layers": [{"mlp": {"up": jnp.ones((8, 16))}} for _ in range(2)],
    }
    tx = lro.galore(0.1, rank=2)
    with pytest.raises(ValueError, match="which axes of these parameters") as caught:
        tx.init(params)
    text = str(caught.value).split("\n--------------------")[0]
    for leaf in ("Dense_0/kernel (8, 6)", "Dense_1/kernel (6, 4)", "(3, 3, 2, 8)"):
        assert leaf in text
    assert "bias" not in text
    rules = eval(text[text.index("\n[") :], {"lro": lro})
    report = lro.memory_report(lro.galore(0.1, rank=2, dimension_numbers=rules), params)
    assert {row.path: row.rank for row in report.rows if row.rank} == {
        "layers/0/mlp/up": 2,
        "layers/1/mlp/up": 2,
    }


def test_rules_may_leave_the_rest_to_names():
    params = {"Dense_0": {"kernel": jnp.ones((8, 6))}, "mlp": {"up": jnp.ones((8, 6))}}
    for value, ranks in [("matrix", (2, 2)), (None, (None, 2))]:
        rules = [("Dense", value), ("", "auto")]
        tx = lro.galore(0.1, rank=2, dimension_numbers=rules)
        rows = lro.memory_report(tx, params).rows
        assert tuple(row.rank for row in rows[:2]) == ranks


STACKED = {
    "embed": {"embedding": jnp.ones((30, 8))},
    "layers": {
        "attention_norm": {"scale": jnp.ones((3, 8))},
        "attention": {"q": {"kernel": jnp.ones((3, 8, 8)), "bias": jnp.ones((3, 8))}},
        "mlp": {"up": jnp.ones((3, 8, 16)), "b_up": jnp.ones((3, 16))},
    },
    "head": {"kernel": jnp.ones((8, 30))},
}


@pytest.mark.parametrize(
    ("numbers", "refused"),
    [
        (
            [("attention|mlp", lro.STACKED), ("", None)],
            {"attention/q/bias", "attention_norm/scale", "mlp/b_up"},
        ),
        (
            lro.STACKED,
            {
                *("attention/q/bias", "attention_norm/scale", "mlp/b_up"),
                *("embed/embedding", "head/kernel"),
            },
        ),
    ],
)
def test_stacked_makes_no_matrix_of_vectors(numbers, refused):
    with pytest.raises(ValueError, match=r"lro\.STACKED") as caught:
        specs_of(numbers, STACKED)
    message = str(caught.value)
    listed = re.findall(r"^  (?:layers/)?(\S+) \(", message, re.MULTILINE)
    assert {*listed} == refused


def test_stacked_refuses_layers_on_another_axis():
    tree = nested(parsed(TREES["MaxText, layers on the second axis"]))
    with pytest.raises(ValueError, match=r"wi_0/kernel.*matrices of 3 x 176"):
        specs_of([("kernel", lro.STACKED), ("", None)], tree)
    # A tree of values is what each leaf's author wants, and is obeyed.
    specs = jax.tree.map(lambda _: lro.STACKED, STACKED)
    assert {*specs_of(specs, STACKED).values()} == {lro.STACKED}


def test_a_bare_array_is_undecided_and_not_a_crash():
    with pytest.raises(ValueError, match=r"\(8, 12\): its name and shape"):
        lro.galore(0.1, rank=2).init(jnp.ones((8, 12)))


def test_printed_rules_show_every_shape(capsys):
    shapes = {"mlp": {"w1": jnp.ones((8, 16)), "w2": jnp.ones((16, 8))}}
    lro.print_rules(shapes)
    assert "# 2 of (8, 16), (16, 8)" in capsys.readouterr().out
