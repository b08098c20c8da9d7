"""Step-for-step parity with the released PyTorch packages, on recorded trajectories.

Each file holds one weight matrix trained by galore-torch 1.0, fira 1.0.2, apollo-torch
1.0.3, FRUGAL's or LDAdam's code on a fixed stream of gradients. Torch stores a linear
layer's weight as (out, in), so its input side, which the packages project when the
matrix is square, is axis 1.
"""

import inspect
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.helpers.repository import ROOT

GOLDEN = ROOT / "tests" / "golden"
OPTIMIZERS = {
    "galore_adamw": lro.galore,
    "galore_adafactor": lro.recipes.galore_adafactor,
    "fira_adamw": lro.fira,
    "apollo_adamw_channel": lro.apollo,
    "apollo_adamw_tensor": lro.apollo_mini,
    "frugal_svd": lro.frugal,
    "ldadam": lro.ldadam,
}
REFRESHED = [
    "galore_adamw_square_refresh",
    "fira_adamw_tall_refresh",
    "frugal_svd_signsgd_wide",
]
FIXED = [
    "galore_adamw_wide",
    "galore_adamw_tall",
    "galore_adafactor_wide",
    "fira_adamw_wide",
]
RANDOM = ["apollo_adamw_channel_wide", "apollo_adamw_tensor_tall"]
TORCH_LINEAR = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=0)

# Relative to the step's largest weight, as all errors here. Two programs that round
# in another order part by some 6e-8 of a weight per step, and there are 23.
TOLERANCE = 2e-6
# optax rounds 1 - b2^t by 6e-8, which is 6e-5 of it at t = 1, and half of that in its
# root; where Adam starts anew five times, that is 1.5e-6 of the weights each time.
# (The other packages' bias correction is not optax's.)
RESTARTED_TOLERANCE = 1e-5
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
        config = {"gap": 1, "scale": 1.0, **json.loads(str(z["config"]))}
        if "density" in config:
            config["rank"] = round(config["density"] * min(config["shape"]))
        bases = z["bases"][:: config["gap"]]
        if bases.shape[1] == config["rank"]:  # projected from the right: (r, n)
            bases = bases.swapaxes(1, 2)
        return Case(config, z["w0"], z["grads"], z["weights"], bases)


def build(name: str, config: dict[str, Any], **changes: Any):
    """The optimizer of a trajectory, with its settings; `changes` go over them."""
    (method,) = (make for key, make in OPTIMIZERS.items() if name.startswith(key))
    (b1, b2) = config["betas"]
    known = {
        "rank": config["rank"],
        "refresh_every": config["gap"],
        "scale": config["scale"],
        "b1": config.get("beta1", b1),
        "b2": b2,
        "eps": config["eps"],
        "weight_decay": config["weight_decay"],
        "dimension_numbers": TORCH_LINEAR,
        "variant": "published",
        "rho": config.get("rho"),
        "feedback": config.get("error_feedback"),
    }
    if changes.get("variant", "published") != "published":
        del known["eps"]
    taken = inspect.signature(method).parameters
    options = {key: value for key, value in known.items() if key in taken}
    return method(config["lr"], **{**options, **changes})


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


@pytest.mark.parametrize("name", FIXED + REFRESHED + RANDOM)
def test_weights_match_the_package_on_its_own_bases(name: str) -> None:
    case = load(name)
    rule = lro.bases.replay({"w": case.bases}, orthonormal=name not in RANDOM)
    weights, bases = trajectory(build(name, case.config, basis=rule), case)
    restarted = name.startswith("frugal")
    tolerance = RESTARTED_TOLERANCE if restarted else TOLERANCE
    assert error(weights, case.weights) < tolerance
    # The replay took the bases at the package's steps, or the above would be luck.
    np.testing.assert_array_equal(bases[:: case.config["gap"]], case.bases)


@pytest.mark.parametrize("name", FIXED)
def test_weights_match_the_package_with_our_own_svd(name: str) -> None:
    case = load(name)
    weights, _ = trajectory(build(name, case.config, basis=lro.dominant_svd()), case)
    # With one basis for the whole run its columns' signs cancel.
    assert error(weights, case.weights) < OWN_SVD_TOLERANCE


@pytest.mark.parametrize("name", ["ldadam_wide", "ldadam_wide_no_feedback"])
def test_ldadam_matches_with_its_own_power_iteration(name: str) -> None:
    case = load(name)
    weights, bases = trajectory(build(name, case.config), case)
    assert error(weights, case.weights) < OWN_SVD_TOLERANCE
    # Twenty power steps, each on the last one's basis, stay on the package's path.
    for a, b in zip(bases, case.bases, strict=True):
        np.testing.assert_allclose(a @ a.T, b @ b.T, atol=1e-4)


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
        ("galore_adafactor_wide", {"decay_rate": 0.81}),
        ("galore_adafactor_wide", {"clip": 0.99}),
        ("galore_adafactor_wide", {"b1": 0.1}),
        ("apollo_adamw_channel_wide", {"variant": "paper"}),
        ("apollo_adamw_channel_wide", {"limit": 1.02}),
        ("apollo_adamw_tensor_tall", {"scale": 127.0}),
        ("frugal_svd_signsgd_wide", {"residual_scale": 0.99}),
        ("frugal_svd_signsgd_wide", {"residual": "sgd"}),
        ("ldadam_wide", {"feedback": False}),
        ("ldadam_wide", {"rho": 0.9}),
        ("ldadam_wide_no_feedback", {"b2": 0.985}),
    ],
)
def test_the_packages_are_not_matched_by_chance(
    name: str, changes: dict[str, Any]
) -> None:
    """What the comparison must be able to tell apart, it tells apart."""
    case = load(name)
    if not name.startswith("ldadam"):
        orthonormal = name not in RANDOM
        changes["basis"] = lro.bases.replay({"w": case.bases}, orthonormal=orthonormal)
    weights, _ = trajectory(build(name, case.config, **changes), case)
    # A hundred times what is accepted; a step moves the weights by 5 % of the largest.
    assert error(weights, case.weights) > 100 * TOLERANCE


def test_only_epsilon_parts_the_variants_of_galore_without_decay() -> None:
    """Bias correction on the step size or on the moments is the same without eps."""
    case = load("galore_adamw_square_refresh")
    published, paper = (
        trajectory(build("galore_adamw", case.config, variant=variant, eps=0.0), case)[
            0
        ]
        for variant in ("published", "paper")
    )
    # 1 - 0.999^t rounds by 6e-8 / 1e-3 at t = 1 in optax's float32, half of that in
    # its root, times a step of 6 % of the largest weight: 2e-6, here and there again.
    assert error(published, paper) < 1e-5
