"""The host says when a basis is due, and whether a step is taken."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.helpers.battery import (
    ALL,
    EVERY,
    FIXED,
    RATE,
    WHOLE,
    compiled,
    gradients,
    raw_keys,
    tree_of,
    types,
)
from tests.helpers.marks import slow_but

# Of the battery's settings, those that make every step a refresh.
EVERY_STEP = {name for name, (_, o) in ALL.items() if o.get("refresh_every") == 1}
NAMES = [name for name in ALL if name not in EVERY_STEP | WHOLE]
# Moments that turn and a key, a state for each leaf, a basis that is trained, lazy
# refreshes in few bits, a key for all bases.
KINDS = [
    *("grass_walk", "galore_adafactor", "online_subspace_descent"),
    *("q_galore_sara_8bit", "flora"),
]
STEPS = 3 * EVERY
# What is stored: moments that turn and a key; and quantised, lazily.
FEW = ["grass_walk", "q_galore_sara_8bit"]
few_kinds = pytest.mark.parametrize("name", slow_but(FEW, [*KINDS, "ldadam"]))


@functools.cache
def program(name: str, kind: str = "refresh") -> tuple[Any, Any]:
    """The optimizer, and its update with a static argument."""
    tx, _ = compiled(name)
    return tx, jax.jit(tx.update, static_argnames=kind)


def walk(tx: Any, update: Any, grads: list[Any], extra: Any = lambda t: {}) -> Any:
    """The updates and the states of each step."""
    state, params, out = tx.init(tree_of()), tree_of(), []
    for t, g in enumerate(grads):
        updates, state = update(g, state, params, **extra(t))
        out.append((updates, state))
    return out


def due(t: int) -> dict[str, Any]:
    return {"refresh": t % EVERY == 0}


def close(ours: Any, theirs: Any, atol: float) -> None:
    """Of the same structure and dtypes; of the same bits with 0."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(raw_keys(x)) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def whole_numbers_are_equal(ours: Any, theirs: Any) -> None:
    """Counts, keys, flags, coordinates and codes: bits of what was chosen."""
    pairs = zip(*map(jax.tree.leaves, (ours, theirs)), strict=True)
    for a, b in ([np.asarray(raw_keys(x)) for x in pair] for pair in pairs):
        if a.dtype.kind != "f":
            np.testing.assert_array_equal(a, b)


def basis_of(state: Any) -> Any:
    return optax.tree.get(state, "basis")["matrix"]


def kept_of(state: Any) -> Any:
    """The matrix's basis, or the key that all are drawn from."""
    basis = optax.tree.get(state, "basis")
    return basis["matrix"] if isinstance(basis, dict) else basis


# --- refresh ---


@pytest.mark.parametrize("name", slow_but([*KINDS, "racs", "scale_sgd", "ldadam"], ALL))
def test_the_host_refreshes_when_the_count_would(name: str) -> None:
    tx, update = compiled(name)
    every = 1 if name in EVERY_STEP else EVERY
    theirs = walk(tx, update, gradients(STEPS))
    ours = walk(*program(name), gradients(STEPS), lambda t: {"refresh": t % every == 0})
    # The compiler may fuse one program otherwise than the other: here FRUGAL and Grass
    # differ by two units in the last place of an update, all others in no bit.
    for (a, _), (b, _) in zip(ours, theirs, strict=True):
        close(a, b, 1e-6 * RATE)
    (_, ours_state), (_, theirs_state) = ours[-1], theirs[-1]
    assert types(ours_state) == types(theirs_state)
    assert ours_state[0].refreshes == (0 if name in WHOLE else STEPS // every)
    if name in {"online_subspace_descent", *FIXED}:  # by itself at step 0 alone
        ours_state = ours_state[0]._replace(refreshes=jnp.int32(1)), ours_state[1]
    whole_numbers_are_equal(ours_state, theirs_state)


# Of random coordinates, a fixed basis, or one Gaussian matrix: nothing is factorised.
WITHOUT = {
    *("apollo", "apollo_published", "apollo_mini", "flora", "dct_adamw"),
    *("frugal_coordinates", "grass_sparse", *FIXED),
}
FACTORISATION = re.compile(r"lapack|syevd|gesdd|gesvd|geqrf|orgqr|potrf|getrf|cholesky")


def operations(text: str) -> set[str]:
    """Conditionals and factorisations of a compiled or a lowered program."""
    found = set(re.findall(r" (conditional|cholesky|triangular-solve)\(", text))
    calls = re.findall(r'custom_call_target="(\w+)"', text)
    return found | {x for x in calls if FACTORISATION.search(x)}


@pytest.mark.parametrize("name", slow_but([*KINDS, "sumo"], NAMES))
def test_no_conditional_and_no_factorisation_between_refreshes(name: str) -> None:
    tx, update = program(name)
    operands = tree_of(1), tx.init(tree_of()), tree_of()

    def compiled_to(**extra: Any) -> set[str]:
        return operations(update.lower(*operands, **extra).compile().as_text())

    # SUMO's step is an eigendecomposition itself.
    step = {"lapack_ssyevd_ffi"} if name == "sumo" else set()
    assert compiled_to(refresh=False) == step
    asked = compiled_to()
    # So that the search finds what is there.
    assert ("conditional" in asked) == (name not in FIXED)
    if name not in WITHOUT:
        assert any(map(FACTORISATION.search, asked))


@pytest.mark.parametrize("name", ["racs", "scale_sgd"])
def test_without_a_subspace_there_is_nothing_to_refresh(name: str) -> None:
    tx, update = program(name)
    operands = tree_of(1), tx.init(tree_of()), tree_of()
    for extra in ({}, {"refresh": False}, {"refresh": True}):
        text = update.lower(*operands, **extra).compile().as_text()
        assert not operations(text)


@pytest.mark.parametrize(
    "name", slow_but([*FEW, "coap"], [*KINDS, "golore", "coap", "subtrack", "alice"])
)
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_nor_on_other_platforms(name: str, platform: str) -> None:
    """Conditionals are `lax.platform_dependent`'s alone, on a constant."""
    tx, update = program(name)
    operands = tree_of(1), tx.init(tree_of()), tree_of()
    traced = update.trace(*operands, refresh=False)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert not re.findall(r"stablehlo\.(if|cholesky|triangular_solve)\b", text)
    made: dict[str, str] = {}  # a function may use a name again
    for line in text.splitlines():
        for index in re.findall(r"stablehlo\.case\"\((%\w+)\)", line):
            assert made[index] in ("constant", "case")
        made |= re.findall(r"(%\w+) = \"?stablehlo\.(\w+)", line)
    calls = set(re.findall(r"custom_call @(\w+)", text))
    assert calls <= {"Sharding", "TopK", "cu_threefry2x32_ffi", "mhlo"}


@pytest.mark.parametrize("name", slow_but(FEW, KINDS))
def test_a_traced_refresh(name: str) -> None:
    tx, update = compiled(name)
    theirs = walk(*program(name), gradients(STEPS), due)
    ours = walk(
        tx, update, gradients(STEPS), lambda t: {"refresh": jnp.array(t % EVERY == 0)}
    )
    for (a, _), (b, _) in zip(ours, theirs, strict=True):
        close(a, b, 1e-6 * RATE)
    whole_numbers_are_equal(ours[-1][1], theirs[-1][1])


def test_a_numpy_bool_is_a_bool() -> None:
    tx, update = program("galore")
    operands = tree_of(1), tx.init(tree_of()), tree_of()
    texts = {
        update.lower(*operands, refresh=refresh).as_text()
        for refresh in (False, np.bool_(False))
    }
    assert len(texts) == 1


@pytest.mark.parametrize(
    "refresh", [0, 1, "yes", 1.0, np.ones(1, bool), jnp.ones(1, bool), jnp.int32(1)]
)
def test_a_refresh_that_is_no_bool(refresh: Any) -> None:
    tx, _ = compiled("galore")
    with pytest.raises(ValueError, match="pass True or False, best as a static"):
        tx.update(tree_of(1), tx.init(tree_of()), tree_of(), refresh=refresh)


@pytest.mark.parametrize("name", ["galore", "grass_jump", "apollo", "frugal"])
def test_a_refresh_at_any_step(name: str) -> None:
    """At steps 0, 2 and 3, whatever T = 3 says."""
    at = (0, 2, 3)
    out = walk(*program(name), gradients(6), lambda t: {"refresh": t in at})
    kept = [np.asarray(raw_keys(s)) for s in map(kept_of, (s for _, s in out))]
    for t in range(1, 6):
        assert np.array_equal(kept[t], kept[t - 1]) == (t not in at)
    assert [int(s[0].refreshes) for _, s in out] == [1, 1, 2, 3, 3, 3]


def test_coordinates_step_to_the_next_block() -> None:
    stages = optax.chain(
        lro.bases.coordinates(order="ascending"),
        lro.project(),
        lro.in_subspace(optax.identity()),
        lro.project_back(),
    )
    tx = lro.low_rank(stages, rank=2, refresh_every=100, dimension_numbers=None)
    update, at = jax.jit(tx.update, static_argnames="refresh"), (0, 1, 4)
    g, rows = {"w": jnp.ones((6, 8))}, []
    state: Any = tx.init(g)
    for t in range(6):
        updates, state = update(g, state, refresh=t in at)
        rows.append(np.flatnonzero(updates["w"][:, 0]).tolist())
    assert rows == [[0, 1], [2, 3], [2, 3], [2, 3], [4, 5], [4, 5]]
    assert state.refreshes == 3


@pytest.mark.parametrize("name", ["galore", "grass_walk", "q_galore_sara_8bit"])
def test_a_matrix_that_begins_late(name: str) -> None:
    """Its basis waits for the host, who asked for none at its first gradient."""
    zero = jax.tree.map(jnp.zeros_like, tree_of())
    grads = [zero, *gradients(STEPS - 1)]
    out = walk(*program(name), grads, due)
    begun = [bool(optax.tree.get(s, "started")["matrix"]) for _, s in out]
    assert begun == [t >= EVERY for t in range(STEPS)]
    # The first basis is that of the first gradient at which one was asked for.
    first = walk(*program(name), grads[EVERY : EVERY + 1], due)
    if name != "q_galore_sara_8bit":  # its key is split once more
        close(basis_of(out[EVERY][1]), basis_of(first[0][1]), 0)
    # By itself the optimizer does not wait.
    alone = walk(*compiled(name), grads[:2])
    assert optax.tree.get(alone[1][1], "started")["matrix"]


# --- accept ---


@pytest.mark.parametrize("traced", [False, True])
@few_kinds
def test_a_step_that_is_not_accepted(name: str, traced: bool) -> None:
    """Finite or not, and at a refresh too."""
    tx, update = compiled(name) if traced else program(name, "accept")
    no: Any = jnp.array(False) if traced else False
    state = walk(tx, update, gradients(EVERY))[-1][1]
    bad = jax.tree.map(lambda x: x.at[0].set(jnp.nan), tree_of())
    for g in (tree_of(9), bad):
        updates, new = update(g, state, tree_of(), accept=no)
        close(updates, jax.tree.map(jnp.zeros_like, tree_of()), 0)
        assert types(new) == types(state)
        assert new[0].skipped == state[0].skipped + 1
        close((new[0]._replace(skipped=state[0].skipped), new[1]), state, 0)


@pytest.mark.parametrize("traced", [False, True])
@few_kinds
def test_a_step_that_is_accepted(name: str, traced: bool) -> None:
    tx, update = compiled(name) if traced else program(name, "accept")
    yes: Any = jnp.array(True) if traced else True
    ours = walk(tx, update, gradients(STEPS), lambda t: {"accept": yes})
    theirs = walk(*compiled(name), gradients(STEPS))
    for (a, _), (b, _) in zip(ours, theirs, strict=True):
        close(a, b, 1e-6 * RATE)
    whole_numbers_are_equal(ours[-1][1], theirs[-1][1])
    assert types(ours[-1][1]) == types(theirs[-1][1])


def test_true_keeps_no_second_state() -> None:
    """And looks for no NaN."""
    tx, update = program("galore", "accept")
    operands = tree_of(1), tx.init(tree_of()), tree_of()
    texts = [update.lower(*operands, accept=yes).as_text() for yes in (True, None)]
    assert texts[0].count("is_finite") < texts[1].count("is_finite")


# --- behind optax's wrappers ---

WRAPPERS: dict[str, Any] = {
    "chain": lambda tx: optax.chain(optax.clip(1e6), tx),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
    "with_extra_args_support": optax.with_extra_args_support,
}


@functools.cache
def told(wrapper: str | None) -> Any:
    """A walk whose host decides all, behind a wrapper or none."""
    tx, _ = compiled("grass_walk")
    tx = tx if wrapper is None else WRAPPERS[wrapper](tx)
    update = jax.jit(tx.update, static_argnames=("refresh", "accept"))
    return walk(
        tx,
        update,
        gradients(6),
        lambda t: {"refresh": t in (0, 1, 4), "accept": t != 2},
    )


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_arguments_arrive(wrapper: str) -> None:
    ours = told(wrapper)
    for (a, _), (b, _) in zip(ours, told(None), strict=True):
        close(a, b, 1e-6 * RATE)
    state = optax.tree.get_all_with_path(ours[-1][1], "refreshes")
    assert [int(x) for _, x in state] == [3]
