"""Step-for-step parity with the released PyTorch packages, run here beside ours.

`pip install '.[parity]'` brings them. Each case trains three weights, which are
projected, and a bias, which is not, on a stream of random gradients. Torch stores a
linear layer's weight as (out, in), so its input side, which the packages project when
the matrix is square, is axis 1.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro

Arrays = dict[str, np.ndarray]

TORCH_LINEAR = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=0)
SHAPES = {"wide": (8, 20), "tall": (20, 8), "square": (12, 12), "bias": (9,)}
WEIGHTS = [name for name, shape in SHAPES.items() if len(shape) == 2]
STEPS, EVERY, RATE, DECAY = 16, 5, 0.05, 0.5

# Relative to the step's largest entry, which a step moves by a few hundredths. Two
# programs that round in another order part by some 6e-8 a step: seen is 8e-7 at most.
TOLERANCE = 1e-5


class Package(NamedTuple):
    """A released optimizer and how it is called, and ours and how."""

    module: str
    name: str
    ours: Any
    group: dict[str, Any]  # of the projected weights
    options: dict[str, Any]
    ours_options: dict[str, Any]
    orthonormal: bool = True


ADAMW = {"no_deprecation_warning": True}
GALORE = {"rank": 3, "scale": 0.25}
PUBLISHED = {"variant": "published"}
PACKAGES = {
    "galore": Package(
        "galore_torch", "GaLoreAdamW", lro.galore, GALORE, ADAMW, GALORE | PUBLISHED
    ),
    "galore_adafactor": Package(
        "galore_torch",
        "GaLoreAdafactor",
        lro.recipes.galore_adafactor,
        GALORE,
        {"scale_parameter": False, "relative_step": False},
        GALORE | {"b1": None},
    ),
    "fira": Package(
        "fira",
        "FiraAdamW",
        lro.fira,
        {"rank": 3, "alpha": 0.25},
        ADAMW,
        GALORE | PUBLISHED,
    ),
    "apollo": Package(
        "apollo_torch",
        "APOLLOAdamW",
        lro.apollo,
        {"rank": 3, "scale": 1.5, "proj": "random", "scale_type": "channel"},
        ADAMW,
        {"rank": 3, "scale": 1.5} | PUBLISHED,
        orthonormal=False,
    ),
    "apollo_mini": Package(
        "apollo_torch",
        "APOLLOAdamW",
        lro.apollo_mini,
        {"rank": 1, "scale": 128.0, "proj": "random", "scale_type": "tensor"},
        ADAMW,
        PUBLISHED,
        orthonormal=False,
    ),
}


def stream() -> tuple[Arrays, Arrays]:
    """The first parameters, and the gradients with the steps in front."""
    random = np.random.default_rng(0)
    params, grads = {}, {}
    for name, shape in SHAPES.items():
        # Sizes that rise and fall, so that the limiters bite and let go; rows that
        # fade, so that singular values lie apart.
        size = np.exp(random.normal(size=(STEPS, *(1 for _ in shape))))
        fade = 0.7 ** np.arange(shape[0]).reshape(-1, *(1 for _ in shape[1:]))
        params[name] = random.normal(size=shape).astype(np.float32)
        grads[name] = (size * fade * random.normal(size=(STEPS, *shape))).astype(
            np.float32
        )
    return params, grads


@functools.cache
def theirs(case: str, every: int) -> tuple[Arrays, Arrays]:
    """The parameters after each step, and the bases, (refreshes, m, r)."""
    package = PACKAGES[case]
    torch = pytest.importorskip("torch", reason="pip install '.[parity]'")
    module = pytest.importorskip(package.module, reason="pip install '.[parity]'")
    start, grads = stream()
    params = {k: torch.nn.Parameter(torch.tensor(x)) for k, x in start.items()}
    weights = {k: params[k] for k in WEIGHTS}
    projected = {"update_proj_gap": every, "proj_type": "std", **package.group}
    optimizer = getattr(module, package.name)(
        [
            {"params": [params["bias"]]},
            {"params": list(weights.values()), **projected},
        ],
        lr=RATE,
        weight_decay=DECAY,
        **package.options,
    )
    steps, bases = [], []
    for t in range(STEPS):
        for k, p in params.items():
            p.grad = torch.tensor(grads[k][t])
        optimizer.step()
        steps.append({k: p.detach().numpy().copy() for k, p in params.items()})
        if t % every == 0:
            found = {k: optimizer.state[p]["projector"] for k, p in weights.items()}
            bases.append({k: x.ortho_matrix.numpy() for k, x in found.items()})
    # Where the package projects from the right, it keeps (r, n).
    return _stack(steps), {
        k: s if SHAPES[k][0] < SHAPES[k][1] else s.swapaxes(1, 2)
        for k, s in _stack(bases).items()
    }


def _stack(trees: list[Arrays]) -> Arrays:
    return jax.tree.map(lambda *x: np.stack(x), *trees)


def ours(case: str, basis: Any, every: int, **changes: Any) -> Arrays:
    options = {
        "refresh_every": every,
        "weight_decay": DECAY,
        "basis": basis,
        "dimension_numbers": [(k, TORCH_LINEAR) for k in WEIGHTS] + [("bias", None)],
        **PACKAGES[case].ours_options,
    }
    tx = PACKAGES[case].ours(RATE, **{**options, **changes})
    start, grads = stream()

    def step(carry: Any, grads: Any) -> Any:
        params, state = carry
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    @jax.jit
    def run(params: Any, grads: Any) -> Any:
        return jax.lax.scan(step, (params, tx.init(params)), grads)[1]

    return jax.tree.map(np.asarray, run(jax.tree.map(jnp.asarray, start), grads))


def errors(ours: Arrays, theirs: Arrays) -> dict[str, float]:
    """The largest difference of any step, relative to that step's largest entry."""
    found = {}
    for k, b in theirs.items():
        assert ours[k].shape == b.shape == (STEPS, *SHAPES[k])
        assert ours[k].dtype == b.dtype == np.float32
        axes = tuple(range(1, b.ndim))
        difference = np.abs(ours[k].astype(np.float64) - b).max(axes)
        found[k] = float((difference / np.abs(b).max(axes)).max())
    return found


def replayed(case: str, bases: Arrays) -> Any:
    return lro.bases.replay(bases, orthonormal=PACKAGES[case].orthonormal)


@pytest.mark.parametrize("case", PACKAGES)
def test_parameters_match_the_package_on_its_own_bases(case: str) -> None:
    expected, bases = theirs(case, EVERY)
    # A new basis at steps 0, 5, 10 and 15, or the replay would show nothing.
    assert {k: len(np.unique(s[:, 0, 0])) for k, s in bases.items()} == dict.fromkeys(
        WEIGHTS, 4
    )
    found = errors(ours(case, replayed(case, bases), EVERY), expected)
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("case", ["galore", "galore_adafactor", "fira"])
def test_parameters_match_the_package_with_our_own_svd(case: str) -> None:
    # With one basis for the whole run its columns' signs cancel.
    expected, _ = theirs(case, STEPS)
    found = errors(ours(case, lro.dominant_svd(), STEPS), expected)
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("galore", {"variant": "paper"}),
        ("galore_adafactor", {"clip": 1.01}),
        ("fira", {"limit": 1.02}),
        ("fira", {"variant": "paper"}),
        ("apollo", {"limit": 1.02}),
        ("apollo", {"variant": "paper"}),
        ("apollo_mini", {"scale": 127.0}),
        ("apollo_mini", {"refresh_every": EVERY + 1}),
    ],
)
def test_the_packages_are_not_matched_by_chance(
    case: str, changes: dict[str, Any]
) -> None:
    """What the comparison must be able to tell apart, it tells apart."""
    expected, bases = theirs(case, EVERY)
    options = {"basis": replayed(case, bases), "every": EVERY}
    found = errors(ours(case, **options, **changes), expected)
    assert min(found[k] for k in WEIGHTS) > 10 * TOLERANCE, found
