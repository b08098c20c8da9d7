"""Step-for-step parity with the released PyTorch packages, on recorded trajectories.

Each file holds one weight matrix trained by galore-torch 1.0 or fira 1.0.2 on a fixed
stream of gradients. Torch stores a linear layer's weight as (out, in), so its input
side, which the packages project when the matrix is square, is axis 1.
"""

import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro

GOLDEN = pathlib.Path(__file__).parents[2] / "shared" / "golden"
pytestmark = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason=f"no recorded trajectories at {GOLDEN}"
)
OPTIMIZERS = {"galore": lro.galore, "fira": lro.fira}
REFRESHED = ["galore_adamw_square_refresh", "fira_adamw_tall_refresh"]
FIXED = ["galore_adamw_wide", "galore_adamw_tall", "fira_adamw_wide"]
TORCH_LINEAR = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=0)

# Relative to the step's largest weight, as all errors here. Two programs that round
# in another order part by some 6e-8 of a weight per step, and there are 23.
TOLERANCE = 2e-6
# With our own singular vectors their rounding, magnified by the inverse of the gap to
# the next singular value (about 1 % of the largest here), comes on top.
OWN_SVD_TOLERANCE = 1e-5


class Case(NamedTuple):
    config: dict[str, Any]
    w0: np.ndarray
    grads: np.ndarray
    weights: np.ndarray
    bases: np.ndarray  # (refreshes, m, r), in the Frame's orientation


def load(name: str) -> Case:
    with np.load(GOLDEN / f"{name}.npz") as z:
        config = json.loads(str(z["config"]))
        bases = z["bases"][:: config["gap"]]
        if bases.shape[1] == config["rank"]:  # projected from the right: (r, n)
            bases = bases.swapaxes(1, 2)
        return Case(config, z["w0"], z["grads"], z["weights"], bases)


def build(name: str, config: dict[str, Any], **changes: Any):
    b1, b2 = config["betas"]
    options = {
        "rank": config["rank"],
        "refresh_every": config["gap"],
        "scale": config["scale"],
        "b1": b1,
        "b2": b2,
        "weight_decay": config["weight_decay"],
        "dimension_numbers": TORCH_LINEAR,
        "variant": "published",
    }
    if changes.get("variant", "published") == "published":
        options["eps"] = config["eps"]
    return OPTIMIZERS[name.split("_")[0]](config["lr"], **{**options, **changes})


def trajectory(tx: Any, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """The weights after each step, and the basis that each step used."""

    @jax.jit
    def step(params: Any, state: Any, grad: jax.Array) -> tuple[Any, Any]:
        updates, state = tx.update({"w": grad}, state, params)
        return optax.apply_updates(params, updates), state

    params = {"w": jnp.asarray(case.w0)}
    state, weights, bases = tx.init(params), [], []
    for grad in case.grads:
        params, state = step(params, state, grad)
        weights.append(params["w"])
        bases.append(optax.tree.get(state, "basis")["w"])
    return np.array(weights), np.array(bases)


def error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference of any step, relative to that step's largest weight."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype == np.float32
    difference = np.abs(ours.astype(np.float64) - theirs).max((1, 2))
    return float((difference / np.abs(theirs).max((1, 2))).max())


@pytest.mark.parametrize("name", FIXED + REFRESHED)
def test_weights_match_the_package_on_its_own_bases(name: str) -> None:
    case = load(name)
    tx = build(name, case.config, basis=lro.replay({"w": case.bases}))
    weights, bases = trajectory(tx, case)
    assert error(weights, case.weights) < TOLERANCE
    # The replay took the bases at the package's steps, or the above would be luck.
    np.testing.assert_array_equal(bases[:: case.config["gap"]], case.bases)


@pytest.mark.parametrize("name", FIXED)
def test_weights_match_the_package_with_our_own_svd(name: str) -> None:
    case = load(name)
    weights, _ = trajectory(build(name, case.config, basis=lro.dominant_svd()), case)
    # With one basis for the whole run its columns' signs cancel.
    assert error(weights, case.weights) < OWN_SVD_TOLERANCE


@pytest.mark.parametrize("name", ["fira_adamw_wide", *REFRESHED])
@pytest.mark.parametrize(("decomposition", "power"), [("svd", 1), ("gram", 2)])
def test_our_bases_span_the_packages_subspaces(
    name: str, decomposition: Any, power: int
) -> None:
    case = load(name)
    rule = lro.dominant_svd(decomposition=decomposition)
    _, bases = trajectory(build(name, case.config, basis=rule), case)
    gap, rank = case.config["gap"], case.config["rank"]
    ours = bases[::gap]
    assert ours.shape == case.bases.shape
    assert len(ours) == (5 if name in REFRESHED else 1)
    for grad, a, b in zip(case.grads[::gap], ours, case.bases, strict=True):
        s = np.linalg.svd(grad.astype(np.float64), compute_uv=False) ** power
        # A subspace moves by the matrix's rounding over the gap behind it (Davis and
        # Kahan); "gram" factorises the matrix of squared singular values.
        moved = 2 * np.finfo(np.float32).eps * s[0] / (s[rank - 1] - s[rank])
        np.testing.assert_allclose(a @ a.T, b @ b.T, atol=moved)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("galore_adamw_tall", {"variant": "paper"}),
        ("galore_adamw_tall", {"weight_decay": 0.11}),
        ("galore_adamw_wide", {"eps": 1e-8}),
        ("galore_adamw_wide", {"scale": 0.2475}),
        ("galore_adamw_square_refresh", {"b1": 0.89}),
        ("galore_adamw_square_refresh", {"refresh_every": 6}),
        ("galore_adamw_square_refresh", {"dimension_numbers": lro.STACKED}),
        ("fira_adamw_tall_refresh", {"b2": 0.998}),
        ("fira_adamw_tall_refresh", {"limit": 1.02}),
        ("fira_adamw_tall_refresh", {"variant": "paper"}),
        ("fira_adamw_wide", {"variant": "paper", "eps": 1e-6}),
    ],
)
def test_the_packages_are_not_matched_by_chance(
    name: str, changes: dict[str, Any]
) -> None:
    """What the comparison must be able to tell apart, it tells apart."""
    case = load(name)
    replayed = lro.replay({"w": case.bases})
    tx = build(name, case.config, basis=replayed, **changes)
    weights, _ = trajectory(tx, case)
    # A hundred times what is accepted; a step moves the weights by 5 % of the largest.
    assert error(weights, case.weights) > 100 * TOLERANCE


def test_only_epsilon_parts_the_variants_of_galore_without_decay() -> None:
    """Bias correction on the step size or on the moments is the same without eps."""
    case = load("galore_adamw_square_refresh")
    published, paper = (
        trajectory(build("galore", case.config, variant=variant, eps=0.0), case)[0]
        for variant in ("published", "paper")
    )
    # 1 - 0.999^t rounds by 6e-8 / 1e-3 at t = 1 in optax's float32, half of that in
    # its root, times a step of 6 % of the largest weight: 2e-6, here and there again.
    assert error(published, paper) < 1e-5
