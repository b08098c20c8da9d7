"""The optimizers and basis rules against the papers' equations in numpy and float64."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

import lowrank_optax as lro
from lowrank_optax.bases.grassmann import geodesic
from tests.helpers import numpy_reference as reference
from tests.helpers.marks import slow_but

RANK, EVERY, STEPS = 3, 7, 25  # bases at steps 0, 7, 14 and 21
SHAPES = {
    "wide": (6, 14),
    "tall": (14, 6),
    "square": (8, 8),
    "square_turned": (8, 8),
    "stacked": (2, 6, 10),
    "stacked_tall": (2, 10, 6),
    "query": (9, 2, 4),
    "output": (2, 4, 12),
    "bias": (5,),
}
# The layouts are tested on the two cheapest optimizers; these do for the others.
FEWER = ("wide", "tall", "square", "stacked", "output", "bias")
DIMENSION_NUMBERS = [
    ("turned", MuonDimensionNumbers(reduction_axis=1, output_axis=0)),
    ("stacked", lro.STACKED),
    ("query", MuonDimensionNumbers(reduction_axis=0, output_axis=(1, 2))),
    ("output", MuonDimensionNumbers(reduction_axis=(0, 1), output_axis=2)),
    ("", "matrix"),
]


def matrices(name: str, x: np.ndarray) -> list[np.ndarray]:
    """A leaf as the papers see it: matrices with m <= n, one per layer."""
    match name:
        case "tall" | "square_turned":
            return [x.T]
        case "stacked_tall":
            return [layer.T for layer in x]
        case "stacked":
            return list(x)
        case "query":
            return [x.reshape(9, 8).T]
        case "output":
            return [x.reshape(8, 12)]
        case _:
            return [x]


def schedule(step: Any) -> Any:
    return 0.02 / (1 + 0.1 * step)


@dataclasses.dataclass(frozen=True)
class Case:
    build: Any
    rules: reference.Rules
    by_svd: bool = False  # the bases are numpy's, not read from the library's state


def rules_for(rate: Any = 0.02, **kwargs: Any) -> reference.Rules:
    rate = rate if callable(rate) else (lambda _, value=rate: value)
    return reference.Rules(rate, EVERY, **kwargs)


COMMON: dict[str, Any] = {
    "rank": RANK,
    "refresh_every": EVERY,
    "dimension_numbers": DIMENSION_NUMBERS,
}
GRASS = {"limit": 1.01, "rotate": True}
CASES = {
    "galore": Case(
        lambda: lro.galore(schedule, weight_decay=0.1, **COMMON),
        rules_for(schedule, scale=0.25, weight_decay=0.1),
        by_svd=True,
    ),
    "galore_sara": Case(
        lambda: lro.galore(0.02, basis=lro.sara_sample(3), b1=0.8, eps=1e-3, **COMMON),
        rules_for(scale=0.25, b1=0.8, eps=1e-3),
    ),
    "fira": Case(
        lambda: lro.fira(0.02, b2=0.95, scale=0.5, **COMMON),
        rules_for(scale=0.5, limit=1.01, b2=0.95),
        by_svd=True,
    ),
    "fira_sara": Case(
        lambda: lro.fira(schedule, basis=lro.sara_sample(4), limit=1.2, **COMMON),
        rules_for(schedule, scale=0.25, limit=1.2),
    ),
    "grass_walk": Case(
        lambda: lro.grass_walk(schedule, key=5, weight_decay=0.05, **COMMON),
        rules_for(schedule, weight_decay=0.05, **GRASS),
    ),
    "grass_jump": Case(
        lambda: lro.grass_jump(0.02, key=6, b1=0.8, b2=0.95, scale=0.7, **COMMON),
        rules_for(b1=0.8, b2=0.95, scale=0.7, **GRASS),
    ),
    "grass_jump_svd": Case(
        lambda: lro.grass_jump(0.02, basis=lro.dominant_svd(), **COMMON),
        rules_for(**GRASS),
        by_svd=True,
    ),
}


def leaves_for(case: str) -> tuple[str, ...]:
    return tuple(SHAPES) if case in ("galore", "fira") else FEWER


def problem() -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """Weights, and gradients with a drift, dead columns and a step of zeros."""
    random = np.random.default_rng(0)

    def tree() -> dict[str, np.ndarray]:
        return {k: random.normal(size=shape) for k, shape in SHAPES.items()}

    def exact(tree: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        # Values that float32 holds, so that both widths see the same problem.
        return {k: x.astype(np.float32).astype(np.float64) for k, x in tree.items()}

    weights, drift, grads = tree(), tree(), []
    for t in range(STEPS):
        noise = tree()
        grad = {k: 0.5 * drift[k] + noise[k] for k in SHAPES}
        grad["wide"][:, 4] = 0.0
        grad["tall"][2, :] *= t % 2
        # Grows steadily: V^ - M^^2 turns negative, and what eq. 8 takes |.| of.
        grad["square"] = 1.2**t * (drift["square"] + 0.05 * noise["square"])
        if t == 10:
            grad = {k: np.zeros_like(g) for k, g in grad.items()}
        grads.append(exact(grad))
    return exact(weights), grads


@functools.cache
def library_run(
    case: str, dtype: Any, names: tuple[str, ...]
) -> tuple[list[Any], list[Any]]:
    """Weights after each step, and the basis of each refresh, by the library."""
    tx = CASES[case].build()

    def chosen(tree: Any) -> dict[str, jax.Array]:
        return {name: jnp.asarray(tree[name], dtype) for name in names}

    @jax.jit
    def step(params: Any, state: Any, grad: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    weights, grads = problem()
    params = chosen(weights)
    state, trajectory, bases = tx.init(params), [], []
    for t, grad in enumerate(grads):
        params, state = step(params, state, chosen(grad))
        trajectory.append(jax.tree.map(np.asarray, params))
        if t % EVERY == 0:
            bases.append(jax.tree.map(np.asarray, bases_in(state)))
    return trajectory, bases


def bases_in(state: Any) -> dict[str, Any]:
    def is_basis(x: Any) -> bool:
        return isinstance(x, lro.bases.BasisState)

    (found,) = filter(is_basis, jax.tree.leaves(state, is_leaf=is_basis))
    return found.basis


def numpy_run(name: str, case: Case, bases: list[Any]) -> np.ndarray:
    """The leaf after each step, (steps, layers, m, n), by the reference."""
    weights, grads = problem()
    if name == "bias":
        leaf = [grad["bias"] for grad in grads]
        return np.array(reference.adamw(weights["bias"], leaf, case.rules))[:, None]
    layers = []
    for i, w in enumerate(matrices(name, weights[name])):
        leaf = [matrices(name, grad[name])[i] for grad in grads]
        if case.by_svd:
            chosen = [
                reference.left_singular_vectors(g)[:, :RANK] for g in leaf[::EVERY]
            ]
        else:
            chosen = [
                s[name].reshape(-1, *s[name].shape[-2:])[i].astype(np.float64)
                for s in bases
            ]
        layers.append(reference.low_rank_adamw(w, leaf, chosen, case.rules))
    return np.array(layers).swapaxes(0, 1)


def errors(
    case: str, dtype: Any, names: tuple[str, ...], **changes: Any
) -> dict[str, float]:
    """Per leaf, the largest difference over the largest way that a weight went."""
    trajectory, bases = library_run(case, dtype, names)
    expected = CASES[case]
    expected = dataclasses.replace(
        expected,
        rules=dataclasses.replace(expected.rules, **changes),
        by_svd=expected.by_svd and dtype == np.float64,
    )
    start, worst = problem()[0], {}
    for name in names:
        assert {step[name].dtype for step in trajectory} == {np.dtype(dtype)}
        ours = np.array([matrices(name, step[name]) for step in trajectory])
        theirs = numpy_run(name, expected, bases)
        assert ours.shape == theirs.shape
        way = np.abs(theirs - np.array(matrices(name, start[name]))).max()
        worst[name] = float(np.abs(ours - theirs).max() / way)
    return worst


@pytest.mark.parametrize("case", CASES)
def test_every_step_is_the_papers_in_float64(case: str) -> None:
    with jax.enable_x64(True):
        worst = errors(case, np.float64, leaves_for(case))
    # Rounding in another order, 1e-16 of weights that are ten times the way they go,
    # and once 1 / (1 - b2) = 1e3 of it, at the first step.
    assert all(error < 1e-12 for error in worst.values()), worst  # NaN fails


@pytest.mark.parametrize(
    "case",
    slow_but(["grass_walk"], ["fira_sara", "grass_walk", "grass_jump"]),
)
def test_every_step_is_the_papers_in_float32(case: str) -> None:
    worst = errors(case, np.float32, ("wide", "stacked", "bias"))
    # At step t, optax rounds 1 - b2^t by 6e-8, which is 6e-5 of it at the first step,
    # and half of that in its root; that step is a tenth of the way.
    assert all(error < 5e-5 for error in worst.values()), worst  # NaN fails


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("grass_jump", {"rotate": False}),
        ("grass_jump", {"limit": 1.02}),
        ("grass_jump", {"limit": None}),
        ("grass_jump", {"scale": 0.71}),
        ("grass_walk", {"rotate": False}),
        ("grass_walk", {"b2": 0.998}),
        ("grass_walk", {"weight_decay": 0.06}),
        ("fira", {"rotate": True}),
        ("fira", {"limit": None}),
        ("galore", {"rotate": True}),
        ("galore", {"eps": 1e-6}),
        ("galore_sara", {"learning_rate": schedule}),
    ],
)
def test_other_equations_would_be_noticed(case: str, changes: dict[str, Any]) -> None:
    with jax.enable_x64(True):
        worst = errors(case, np.float64, leaves_for(case), **changes)
    del worst["bias"]
    # On every matrix, and far above what the tests above let pass.
    assert all(error > 1e-7 for error in worst.values()), worst


def chain(rule: Any) -> optax.GradientTransformation:
    return optax.chain(
        rule, lro.project(), lro.in_subspace(optax.identity()), lro.project_back()
    )


def walk_of(
    rule: Any, grads: list[np.ndarray], rank: int = RANK
) -> tuple[list[np.ndarray], list[Any]]:
    """The basis after each of the given gradients, and the key before each."""
    tx = lro.low_rank(
        chain(rule), rank=rank, refresh_every=1, dimension_numbers=lro.STACKED
    )
    state = tx.init({"w": jnp.asarray(grads[0])})
    bases, keys = [], []
    for grad in grads:
        keys.append(optax.tree.get(state, "rng_key"))
        _, state = jax.jit(tx.update)({"w": jnp.asarray(grad)}, state)
        bases.append(np.asarray(bases_in(state)["w"]))
    return bases, keys


def gaussian(key: jax.Array, shape: tuple[int, ...], rank: int) -> np.ndarray:
    """What a random rule draws: `key` is split, and Frame.keys gives one per matrix."""
    gradient = jnp.zeros(shape)
    frame = lro.stages.Frame(gradient=gradient, rank=rank, path="w", precision=None)
    keys = frame.keys(jax.random.split(key)[1])
    draws = [
        jax.random.normal(keys[i], frame.basis_shape[1:], gradient.dtype)
        for i in range(shape[0])
    ]
    return np.asarray(draws)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=shape)


@pytest.mark.parametrize("decomposition", ["svd", "gram", "randomized"])
def test_dominant_svd_is_the_nearest_subspace(decomposition: Any) -> None:
    # Singular values 8, 4, 2, ...; two power steps shrink what a sketch of all but
    # none of the 14 rows has missed by (1/2)^5 a row: nothing is left in float64.
    u, v = np.linalg.qr(normal(2, 14, 14))[0], np.linalg.qr(normal(2, 20, 14))[0]
    g = u * 2.0 ** np.arange(3, -11, -1) @ v.swapaxes(1, 2)
    with jax.enable_x64(True):
        rule = lro.dominant_svd(decomposition=decomposition, key=0)
        (s,), _ = walk_of(rule, [g])
    top = u[..., :RANK]
    # The largest of what rounding 8 does to a gap of 1, and of the sketch's last row.
    atol = 1e-7 if decomposition == "randomized" else 1e-12
    for a, b in zip(s, top, strict=True):
        np.testing.assert_allclose(a @ a.T, b @ b.T, atol=atol)


def test_sara_takes_singular_vectors_in_order() -> None:
    grads = list(normal(6, 3, 7, 9))
    with jax.enable_x64(True):
        bases, _ = walk_of(lro.sara_sample(key=0), grads)
    chosen = set()
    for g, s in zip(np.concatenate(grads), np.concatenate(bases), strict=True):
        u = reference.left_singular_vectors(g)
        index = np.abs(u.T @ s).argmax(0)
        np.testing.assert_allclose(u[:, index], s, atol=1e-12)  # signs included
        assert all(np.diff(index) > 0), index
        chosen.add(tuple(index))
    assert len(chosen) > 10  # of 35 index sets in 18 draws: it samples


def test_sara_samples_by_singular_value_without_replacement() -> None:
    values, count = [4.0, 2.0, 1.0, 0.5], 4000
    g = np.eye(4, 5) * np.array(values)[:, None]
    (s,), _ = walk_of(lro.sara_sample(key=0), [np.tile(g, (count, 1, 1))], rank=2)
    pairs = [tuple(int(i) for i in np.abs(x).argmax(0)) for x in s]
    for pair, p in reference.sample_probabilities(values).items():
        # Four and a half standard deviations of a frequency, on fixed seeds.
        bound = 4.5 * np.sqrt(p * (1 - p) / count)
        assert abs(pairs.count(pair) / count - p) < bound, (pair, p)


one_geodesic = jax.jit(geodesic, static_argnums=3)


@pytest.mark.parametrize("angle", [0.0, 0.3, 1.5])
@pytest.mark.parametrize(
    ("m", "r", "rank"),
    [(9, 3, None), (9, 1, None), (6, 5, None), (9, 3, 1), (9, 3, 2), (6, 5, 5)],
)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_geodesic_is_equation_4(
    m: int, r: int, rank: int | None, angle: float, dtype: Any
) -> None:
    s = np.linalg.qr(normal(m, r))[0].astype(dtype)
    x = normal(m + 1, r)[1:].astype(dtype)
    with jax.enable_x64(dtype == np.float64):
        ours = np.asarray(one_geodesic(s, x, angle, rank))
    assert ours.dtype == dtype
    wide = s.astype(np.float64), x.astype(np.float64)
    theirs = reference.geodesic(*wide, angle, rank)
    # A few roundings of numbers of order 1.
    np.testing.assert_allclose(ours, theirs, atol=20 * np.finfo(dtype).eps)


@pytest.mark.parametrize("walk_rank", [1, 2, None])
def test_the_walk_follows_equation_4_by_its_key(walk_rank: int | None) -> None:
    grads = list(normal(4, 2, 6, 9))
    with jax.enable_x64(True):
        rule = lro.grassmann_walk(key=3, angle=0.2, walk_rank=walk_rank)
        bases, keys = walk_of(rule, grads)
        draws = [gaussian(key, (2, 6, 9), RANK) for key in keys]
    for layer in range(2):
        first = reference.left_singular_vectors(grads[0][layer])[:, :RANK]
        np.testing.assert_allclose(bases[0][layer], first, atol=1e-13)
        for t in range(1, 4):
            before, after = bases[t - 1][layer], bases[t][layer]
            moved = reference.geodesic(before, draws[t][layer], 0.2, walk_rank)
            np.testing.assert_allclose(after, moved, atol=1e-13)
            cosines = np.linalg.svd(before.T @ after, compute_uv=False)
            np.testing.assert_allclose(np.arccos(cosines.min()), 0.2, atol=1e-12)
            turned = np.count_nonzero(cosines < 1 - 1e-12)
            assert turned == (walk_rank or RANK)


def test_the_jump_is_q_of_a_gaussian_by_its_key() -> None:
    grads = list(normal(4, 2, 6, 9))
    with jax.enable_x64(True):
        bases, keys = walk_of(lro.grassmann_jump(key=3), grads)
        draws = [gaussian(key, (2, 6, 9), RANK) for key in keys]
    for layer in range(2):
        first = reference.left_singular_vectors(grads[0][layer])[:, :RANK]
        np.testing.assert_allclose(bases[0][layer], first, atol=1e-13)
        for t in range(1, 4):
            q, upper = np.linalg.qr(draws[t][layer])
            q = q * np.sign(np.diag(upper))  # unique with R's diagonal positive
            # Times the condition number of a Gaussian of 6 by 3, a few tens at most.
            np.testing.assert_allclose(bases[t][layer], q, atol=1e-13)


def test_jumps_are_uniform_on_the_grassmannian() -> None:
    m, count = 6, 4000
    grads = [np.tile(np.eye(m, 8), (count, 1, 1))] * 2
    (_, s), _ = walk_of(lro.grassmann_jump(key=0), grads)
    projector = (s @ s.swapaxes(1, 2)).mean(0)
    # Four and a half standard deviations: of a diagonal entry, Beta(r/2, (m - r)/2).
    deviation = np.sqrt(2 * RANK * (m - RANK) / (m**2 * (m + 2)) / count)
    np.testing.assert_allclose(projector, RANK / m * np.eye(m), atol=4.5 * deviation)
