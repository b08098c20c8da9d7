"""What `import lowrank_optax` promises: its names, their docstrings, its imports."""

import ast
import importlib
import importlib.metadata
import inspect
import pathlib
import pkgutil
import re
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest

import lowrank_optax as lro

ROOT = pathlib.Path(lro.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))
NAMES = [
    "ADAM_MINI_RULES",
    "AdamMiniState",
    "BasisRule",
    "BasisState",
    "Clock",
    "CompensationState",
    "ErrorFeedbackState",
    "Frame",
    "LAYERS",
    "LayerSums",
    "Layers",
    "LazyRefreshState",
    "LimiterState",
    "LowRankState",
    "MeasureState",
    "Measurement",
    "MemoryReport",
    "MemoryRow",
    "MomentumState",
    "OnlinePCAState",
    "Projected",
    "QuantizedArray",
    "QuantizedBasis",
    "QuantizedState",
    "QuantizedWeights",
    "RestState",
    "RowColumnState",
    "STACKED",
    "TRANSFORMER_MATRICES",
    "TrackingState",
    "adam_mini_blocks",
    "add_stage",
    "alice",
    "apollo",
    "apollo_mini",
    "apply_updates",
    "average_gradients",
    "basis_rule",
    "cast_basis",
    "check_heads",
    "close_layers",
    "close_sums",
    "coap",
    "compensate_columns",
    "coordinates",
    "correlation_aware",
    "dct_adamw",
    "dct_columns",
    "dense",
    "dominant_svd",
    "error_feedback",
    "fira",
    "flora",
    "frozen",
    "frugal",
    "galore",
    "galore_adafactor",
    "galore_adam8bit",
    "galore_adam_mini",
    "gaussian",
    "golore",
    "grass_jump",
    "grass_sparse",
    "grass_walk",
    "grassmann_jump",
    "grassmann_track",
    "grassmann_walk",
    "in_full_space",
    "in_subspace",
    "lazy_refresh",
    "ldadam",
    "left_singular",
    "limit_step",
    "linalg",
    "low_rank",
    "low_rank_optimizer",
    "map_frames",
    "measure_subspace",
    "measurements",
    "memory_report",
    "momentum_of",
    "msgd",
    "normalize_outputs",
    "online_pca",
    "online_subspace_descent",
    "open_layers",
    "open_sums",
    "orthogonalize",
    "per_layer",
    "per_matrix",
    "power_iterate",
    "project",
    "project_back",
    "project_gradient",
    "q_galore",
    "quantize_basis",
    "quantize_moments",
    "quantize_weights",
    "racs",
    "random_after",
    "recover_residual",
    "register_moments",
    "replay",
    "reset_moments",
    "rotate_moments",
    "round_stochastically",
    "sample_indices",
    "sample_rows",
    "sara_sample",
    "scale_by_adafactor",
    "scale_by_adam_mini",
    "scale_by_shape",
    "scale_channels",
    "scale_rows_and_columns",
    "scale_sgd",
    "scale_tensor",
    "sign_residual",
    "spectral_adam",
    "spectral_residual",
    "square_sides",
    "state_shardings",
    "static_args",
    "store_weights",
    "subtrack",
    "sum_in_backward",
    "sumo",
    "switch_basis",
    "track_gram",
    "update_frames",
    "update_in_backward",
    "update_layers",
    "whole_matrices",
    "with_rest",
]
FUNCTIONS = [name for name in NAMES if inspect.isfunction(getattr(lro, name))]
CLASSES = [name for name in NAMES if inspect.isclass(getattr(lro, name))]
# These, tree helpers above all, raise nothing of their own.
TREE_HELPERS = {"map_frames", "update_frames"}
SILENT = TREE_HELPERS | {
    "close_layers",
    "close_sums",
    "dense",
    "memory_report",
    "normalize_outputs",
    "scale_by_adafactor",
    "static_args",
}
RAISING = sorted({*FUNCTIONS} - SILENT)
WITH_ARGUMENTS = sorted(
    name
    for name in {*FUNCTIONS} - TREE_HELPERS
    if inspect.signature(getattr(lro, name)).parameters
)
ASSEMBLED = [
    name
    for name in FUNCTIONS
    if "learning_rate" in inspect.signature(getattr(lro, name)).parameters
]
# These have no subspace, and so no rank, and no products with one.
WHOLE = {"racs", "scale_sgd"}
# The assembly of them takes stages, and is no method to choose.
OPTIMIZERS = [name for name in ASSEMBLED if name != "low_rank_optimizer"]
SUBMODULES = sorted(
    module.name for module in pkgutil.walk_packages(lro.__path__, f"{lro.__name__}.")
)


def test_the_public_names_are_these() -> None:
    assert sorted(lro.__all__) == NAMES
    assert len(set(lro.__all__)) == len(lro.__all__)
    for name in NAMES:
        getattr(lro, name)


def test_the_version_is_the_installed_packages() -> None:
    assert lro.__version__ == importlib.metadata.version("lowrank-optax")


def test_every_file_is_a_submodule() -> None:
    files = {path.relative_to(ROOT).with_suffix("").parts for path in SOURCES}
    dotted_names = {".".join((lro.__name__, *parts)) for parts in files}
    found = {name.removesuffix(".__init__") for name in dotted_names}
    assert found == {lro.__name__, *SUBMODULES}


@pytest.mark.parametrize("name", SUBMODULES)
def test_no_public_name_shadows_a_module(name: str) -> None:
    """`import a.b as m` takes the attribute b of a, whatever that is."""
    module = importlib.import_module(name)
    parent, _, last = name.rpartition(".")
    scope: dict[str, Any] = {}
    exec(f"import {name} as m", scope)
    assert isinstance(scope["m"], ModuleType)
    assert scope["m"] is module is sys.modules[name]
    assert getattr(sys.modules[parent], last) is module


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_have_an_example(name: str) -> None:
    doc = inspect.getdoc(getattr(lro, name)) or ""
    assert doc
    assert "." in doc.splitlines()[0]
    assert "Example:\n  >>> " in doc  # run by pytest's --doctest-modules


@pytest.mark.parametrize("name", RAISING)
def test_functions_that_raise_say_so(name: str) -> None:
    doc = inspect.getdoc(getattr(lro, name)) or ""
    assert "Raises:\n  ValueError: " in doc


@pytest.mark.parametrize("name", WITH_ARGUMENTS)
def test_every_argument_is_in_the_docstring(name: str) -> None:
    doc = inspect.getdoc(getattr(lro, name)) or ""
    listed = re.split("Returns:|Raises:|Example:", doc.split("Args:")[1])[0]
    # "key: a seed", or "rank, b1, mask: as in `galore`" over one line or more.
    named = set()
    for names in re.findall(r"^  (\w[\w, ]*(?:\n    [\w, ]+)*):", listed, re.M):
        named |= {*re.split(r",\s*", names)}
    assert named == {*inspect.signature(getattr(lro, name)).parameters}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_say_when_to_choose_them_and_what_they_keep(name: str) -> None:
    doc = " ".join((inspect.getdoc(getattr(lro, name)) or "").split())
    for part in ("When to choose it: ", "When not: ", "State"):
        assert part in doc


@pytest.mark.parametrize("name", ASSEMBLED)
def test_optimizers_share_their_signature(name: str) -> None:
    def kind(parameter: inspect.Parameter) -> tuple[Any, Any]:
        return parameter.kind, parameter.annotation

    ours = inspect.signature(getattr(lro, name)).parameters
    galore = inspect.signature(lro.galore).parameters
    shared = {"learning_rate", "rank", "weight_decay", "mask", "dimension_numbers"}
    shared |= {"precision"}
    if name in WHOLE:
        assert not {*ours} & {"rank", "refresh_every", "precision"}
        shared -= {"rank", "precision"}
    assert shared <= {*ours}
    for key in shared:
        assert kind(ours[key]) == kind(galore[key])
    first = ["stages"] if name not in OPTIMIZERS else []
    subspace = [] if name in WHOLE else ["rank"]
    start = [*first, "learning_rate", *subspace]
    assert [*ours][: len(start)] == start
    keywords = [*ours.values()][len(first) + 1 :]
    assert all(p.kind is p.KEYWORD_ONLY for p in keywords)


@pytest.mark.parametrize("name", CLASSES)
def test_classes_have_a_docstring_of_their_own(name: str) -> None:
    doc = getattr(lro, name).__doc__ or ""
    # Neither NamedTuple's nor dataclass's, which repeat the signature.
    assert doc
    assert not doc.startswith(f"{name}(")


def test_importing_the_library_imports_no_training_package() -> None:
    code = "import sys, lowrank_optax; print(*{m.split('.')[0] for m in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT.parent,
    )
    loaded = set(done.stdout.split())
    assert {"jax", "optax", "lowrank_optax"} <= loaded
    unwanted = {"flax", "grain", "orbax", "tyro", "tokenizers", "models", "train"}
    assert not loaded & unwanted


def imported(tree: ast.AST) -> list[str]:
    """Every module named by an import, "a.b.c" for `from a.b import c` too."""
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def dotted(node: Any) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_library_uses_public_modules_only(path: pathlib.Path) -> None:
    tree = ast.parse(path.read_text())
    used = imported(tree)
    standard = sys.stdlib_module_names
    roots = {name.split(".")[0] for name in used} - standard
    assert roots <= {"jax", "numpy", "optax", "lowrank_optax"}
    used += [dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    others = ("jax.", "jnp.", "optax.", "numpy.", "np.")
    private = [
        name
        for name in used
        if name.startswith(others) and any(p[0] == "_" for p in name.split(".")[1:])
    ]
    assert not private
