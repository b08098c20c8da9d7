"""What `import lowrank_optax` promises: its names, their docstrings, its imports."""

import ast
import inspect
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest

import lowrank_optax as lro

ROOT = pathlib.Path(lro.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))
NAMES = [
    "ADAM_MINI_RULES",
    "AdamMiniState",
    "BasisState",
    "Clock",
    "ErrorFeedbackState",
    "Frame",
    "GaussianState",
    "LAYERS",
    "LazyRefreshState",
    "LowRankState",
    "MemoryReport",
    "MemoryRow",
    "OnlinePCAState",
    "PerMatrixState",
    "QuantizedArray",
    "QuantizedBasis",
    "QuantizedBasisState",
    "QuantizedState",
    "RecoverState",
    "ResetState",
    "Rotation",
    "STACKED",
    "TRANSFORMER_MATRICES",
    "adam_mini_blocks",
    "apollo",
    "apollo_mini",
    "basis_rule",
    "check_heads",
    "coap",
    "coordinates",
    "correlation_aware",
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
    "low_rank",
    "map_frames",
    "memory_report",
    "msgd",
    "online_pca",
    "online_subspace_descent",
    "power_iterate",
    "project",
    "project_back",
    "q_galore",
    "quantize_basis",
    "quantize_moments",
    "random_after",
    "recover_residual",
    "register_rotation",
    "replay",
    "reset_moments",
    "rotate_moments",
    "sample_rows",
    "sara_sample",
    "scale_by_adafactor",
    "scale_by_adam_mini",
    "scale_channels",
    "scale_tensor",
    "sign_residual",
    "static_args",
    "subtrack",
    "update_frames",
]
FUNCTIONS = [name for name in NAMES if inspect.isfunction(getattr(lro, name))]
CLASSES = [name for name in NAMES if inspect.isclass(getattr(lro, name))]
# Tree helpers, the report and a chain of optax's parts raise nothing of their own.
TREE_HELPERS = {"map_frames", "update_frames"}
SILENT = TREE_HELPERS | {
    "memory_report",
    "register_rotation",
    "scale_by_adafactor",
    "static_args",
}
RAISING = sorted({*FUNCTIONS} - SILENT)
OPTIMIZERS = [
    name
    for name in FUNCTIONS
    if "learning_rate" in inspect.signature(getattr(lro, name)).parameters
]


def test_the_public_names_are_these() -> None:
    assert sorted(lro.__all__) == NAMES
    assert len(set(lro.__all__)) == len(lro.__all__)
    for name in NAMES:
        getattr(lro, name)


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


@pytest.mark.parametrize("name", sorted({*FUNCTIONS} - TREE_HELPERS - {"project"}))
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


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_share_their_signature(name: str) -> None:
    def kind(parameter: inspect.Parameter) -> tuple[Any, Any]:
        return parameter.kind, parameter.annotation

    ours = inspect.signature(getattr(lro, name)).parameters
    galore = inspect.signature(lro.galore).parameters
    shared = {"learning_rate", "rank", "weight_decay", "mask", "dimension_numbers"}
    shared |= {"precision"}
    assert shared <= {*ours}
    for key in shared:
        assert kind(ours[key]) == kind(galore[key])
    assert [*ours][:2] == ["learning_rate", "rank"]
    assert all(p.kind is p.KEYWORD_ONLY for p in [*ours.values()][1:])


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
