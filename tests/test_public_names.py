"""What `import lowrank_optax` promises: its names, their docstrings, its imports."""

import ast
import inspect
import pathlib
import subprocess
import sys
from typing import Any

import pytest

import lowrank_optax as lro

SOURCES = sorted(pathlib.Path(lro.__file__).parent.glob("*.py"))
NAMES = [
    "BasisState",
    "Clock",
    "Frame",
    "LowRankState",
    "MemoryReport",
    "MemoryRow",
    "RecoverState",
    "Rotation",
    "STACKED",
    "TRANSFORMER_MATRICES",
    "basis_rule",
    "dominant_svd",
    "fira",
    "galore",
    "grass_jump",
    "grass_walk",
    "grassmann_jump",
    "grassmann_walk",
    "in_subspace",
    "low_rank",
    "map_frames",
    "memory_report",
    "project",
    "project_back",
    "recover_residual",
    "register_rotation",
    "replay",
    "rotate_moments",
    "sara_sample",
    "static_args",
    "update_frames",
]
FUNCTIONS = [name for name in NAMES if inspect.isfunction(getattr(lro, name))]
CLASSES = [name for name in NAMES if inspect.isclass(getattr(lro, name))]
# Tree helpers and the report raise nothing of their own.
SILENT = {
    "map_frames",
    "memory_report",
    "register_rotation",
    "static_args",
    "update_frames",
}
RAISING = sorted({*FUNCTIONS} - SILENT)


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


@pytest.mark.parametrize("name", ["galore", "fira", "grass_walk", "grass_jump"])
def test_every_argument_is_in_the_docstring(name: str) -> None:
    doc = inspect.getdoc(getattr(lro, name)) or ""
    listed = doc.split("Args:")[1].split("Raises:")[0]
    for argument in inspect.signature(getattr(lro, name)).parameters:
        assert argument in listed, argument


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
        cwd=SOURCES[0].parents[1],
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


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
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
