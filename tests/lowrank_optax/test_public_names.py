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
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import lowrank_optax as lro
from tests.helpers.battery import ALL

ROOT = pathlib.Path(lro.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))
# The names of the top level (""), and of each namespace.
NAMES = {
    "": """
        LAYERS METHODS STACKED add_stage apollo apollo_mini bases
        basis_rule compensate_columns dominant_svd error_feedback fira frugal
        full_rank galore grass_jump grass_walk grassmann_jump grassmann_walk
        in_subspace ldadam low_rank low_rank_optimizer measure_subspace measurements
        measuring memory_report print_rules project
        project_back quantize_moments recipes
        recover_residual recovery reset_moments rotate_moments sara_sample
        scale_gradient sign_residual spectral_adam spectral_residual stages
        state_shardings static_args steps training weights
    """,
    "bases": """
        AdaptiveRefreshState BasisRule BasisState LazyRefreshState OnlinePCAState
        QuantizedBasis TrackingState adaptive_refresh basis_rule cast_basis coordinates
        correlation_aware dct_columns dominant_svd fold frozen gaussian grassmann_jump
        grassmann_track grassmann_walk lazy_refresh online_pca orthogonal_iterate
        power_iterate
        quantize_basis random_after replay sample_rows sara_sample switch_basis
        track_gram
    """,
    "steps": """
        ADAM_MINI_RULES AdamMiniState FactoredState FullMomentumState QuantizedArray
        QuantizedState RestState RestartState SubspaceState adam_mini_blocks check_heads
        factor_moments in_full_space in_subspace per_matrix quantize_moments
        register_moments reset_moments restart_every rotate_moments scale_by_adafactor
        scale_by_adam_mini scale_by_full_momentum scale_by_polar_factor with_rest
    """,
    "recovery": """
        CompensationState DetailState ErrorFeedbackState LimiterState NeuronState
        UnfoldState clip_step_growth compensate_columns error_feedback
        normalized_spectral_residual project project_back
        recover_residual scale_by_shape scale_details scale_gradient sign_residual
        spectral_residual unfold_moments
    """,
    "full_rank": """
        LoraPreState MomentumFactorsState MomentumState RowColumnState StabilizerState
        full_matrices full_step normalize_by_output_rms normalize_by_sinkhorn
        scale_by_lora_pre scale_by_mofasgd scale_by_racs stabilize_gradient
        trace_matching
    """,
    "measuring": """
        MeasureState Measurement MemoryReport MemoryRow allocate_ranks measure_subspace
        measurements memory_report
    """,
    "training": """
        LayerSums Layers Projected average_gradients per_layer project_gradient
        square_sides state_shardings sum_in_backward update_in_backward
        update_layers update_projected
    """,
    "weights": """
        QuantizedWeights add_updates dense quantize round_stochastically store
    """,
    # Each has a row in the battery; those at the top are not here.
    "recipes": " ".join(
        sorted({f.__name__ for f, _ in ALL.values()} - {*lro.__all__}),
    ),
    "stages": """
        Clock Frame LowRankState left_singular linalg map_frames sample_indices
        update_frames
    """,
}
# These raise nothing of their own.
SILENT = {
    "dense",
    "map_frames",
    "memory_report",
    "normalize_by_output_rms",
    "scale_by_adafactor",
    "static_args",
    "update_frames",
}
# Tree helpers like `jax.tree.map`, explained in a sentence.
TREE_HELPERS = {"map_frames", "update_frames"}
# These have no subspace, and so no rank, and no products with one.
WITHOUT_RANK = {"racs", "scale_sgd", "sink_gd", "stable_spam"}
# Their products with the subspace are sums, exact at any precision.
WITHOUT_PRODUCTS = {*WITHOUT_RANK, "foam", "gwt"}


def members(space: str) -> dict[str, Any]:
    """The public names of a namespace; of the top level for ""."""
    module = getattr(lro, space) if space else lro
    defined = [
        name
        for name, x in vars(module).items()
        if getattr(x, "__module__", "") == module.__name__ and name[0] != "_"
    ]
    names = getattr(module, "__all__", defined)
    assert len({*names}) == len(names)
    return {name: getattr(module, name) for name in names}


def functions() -> dict[str, Any]:
    """Every public function by its dotted name; one of two namespaces once."""
    found: dict[int, tuple[str, Any]] = {}
    for space in NAMES:
        for name, x in members(space).items():
            if inspect.isfunction(x):
                found.setdefault(id(x), (f"{space}.{name}".lstrip("."), x))
    return dict(found.values())


def optimizers() -> dict[str, Any]:
    """The named ones, and `low_rank_optimizer`, which assembles them."""
    return {
        name: f
        for name, f in functions().items()
        if "learning_rate" in inspect.signature(f).parameters
    }


def last(name: str) -> str:
    return name.rpartition(".")[2]


def submodules() -> list[str]:
    walk = pkgutil.walk_packages(lro.__path__, f"{lro.__name__}.")
    return sorted(module.name for module in walk)


def documented(f: Any) -> set[str]:
    """The arguments that the docstring explains.

    "key: a seed", or "rank, b1, mask: as in `galore`" over one line or more.
    """
    doc = inspect.getdoc(f) or ""
    listed = re.split("Returns:|Raises:|Example:", doc.partition("Args:")[2])[0]
    found: set[str] = set()
    for names in re.findall(r"^  (\*{0,2}\w[\w, ]*(?:\n    [\w, ]+)*):", listed, re.M):
        found |= {*re.split(r",\s*", names.lstrip("*"))}
    return found


def test_the_public_names_are_these() -> None:
    for space, names in NAMES.items():
        assert sorted(members(space)) == names.split(), space


def test_a_name_of_two_namespaces_is_one_thing() -> None:
    top = members("")
    for space in NAMES:
        for name, x in members(space).items():
            assert top.get(name, x) is x, (space, name)


def test_the_version_is_the_installed_packages() -> None:
    assert lro.__version__ == importlib.metadata.version("lowrank-optax")


def test_every_file_is_a_submodule_that_no_public_name_shadows() -> None:
    """`import a.b as m` takes the attribute b of a, whatever that is."""
    files = {path.relative_to(ROOT).with_suffix("").parts for path in SOURCES}
    dotted_names = {".".join((lro.__name__, *parts)) for parts in files}
    found = {name.removesuffix(".__init__") for name in dotted_names}
    assert found == {lro.__name__, *submodules()}
    for name in submodules():
        module = importlib.import_module(name)
        parent, _, attribute = name.rpartition(".")
        scope: dict[str, Any] = {}
        exec(f"import {name} as m", scope)
        assert isinstance(scope["m"], ModuleType), name
        assert scope["m"] is module is sys.modules[name], name
        assert getattr(sys.modules[parent], attribute) is module, name


def test_functions_have_an_example_and_say_what_they_raise() -> None:
    def faults(name: str, f: Any) -> Iterable[str]:
        doc = inspect.getdoc(f) or ""
        if not doc or "." not in doc.splitlines()[0]:
            yield "no first sentence"
        if "Example:\n  >>> " not in doc:  # run by pytest's --doctest-modules
            yield "no example"
        if "Raises:\n  ValueError: " not in doc and last(name) not in SILENT:
            yield "no errors"

    offenders = {name: [*faults(name, f)] for name, f in functions().items()}
    assert not {name: what for name, what in offenders.items() if what}


def test_every_argument_is_in_the_docstring() -> None:
    """Of its own, or of `low_rank_optimizer` where it refers there for the others."""
    offenders = {}
    for name, f in functions().items():
        arguments = {*inspect.signature(f).parameters}
        if not arguments or last(name) in TREE_HELPERS:
            continue
        named = documented(f)
        if "options" in named - arguments:
            doc = " ".join((inspect.getdoc(f) or "").split())
            assert "options: as in `low_rank_optimizer`" in doc, name
            named = named - {"options"} | arguments & documented(lro.low_rank_optimizer)
        if named != arguments:
            offenders[name] = named ^ arguments
    assert not offenders


def test_optimizers_say_when_to_choose_them_and_what_they_store() -> None:
    parts = ("When to choose it: ", "When not: ", "State")
    missing = [
        (name, part)
        for name, f in optimizers().items()
        if f is not lro.low_rank_optimizer
        for part in parts
        if part not in " ".join((inspect.getdoc(f) or "").split())
    ]
    assert not missing


def test_optimizers_share_their_signature() -> None:
    def kind(parameter: inspect.Parameter) -> tuple[Any, Any]:
        return parameter.kind, parameter.annotation

    galore = inspect.signature(lro.galore).parameters
    for name, f in optimizers().items():
        ours = inspect.signature(f).parameters
        shared = {"learning_rate", "rank", "weight_decay", "mask", "dimension_numbers"}
        shared |= {"precision"}
        if last(name) in WITHOUT_RANK:
            assert not {*ours} & {"rank", "refresh_every"}, name
            shared -= {"rank"}
        if last(name) in WITHOUT_PRODUCTS:
            assert "precision" not in ours, name
            shared -= {"precision"}
        assert shared <= {*ours}, name
        for key in shared:
            assert kind(ours[key]) == kind(galore[key]), (name, key)
        first = ["stages"] if f is lro.low_rank_optimizer else []
        subspace = [] if last(name) in WITHOUT_RANK else ["rank"]
        start = [*first, "learning_rate", *subspace]
        assert [*ours][: len(start)] == start, name
        keywords = [*ours.values()][len(first) + 1 :]
        assert all(p.kind is p.KEYWORD_ONLY for p in keywords), name


def test_classes_have_a_docstring_of_their_own() -> None:
    for space in NAMES:
        for name, x in members(space).items():
            if inspect.isclass(x):
                # Neither NamedTuple's nor dataclass's, which repeat the signature.
                doc = x.__doc__ or ""
                assert doc, (space, name)
                assert not doc.startswith(f"{name}("), (space, name)


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


def test_the_library_uses_public_modules_only() -> None:
    standard = sys.stdlib_module_names
    others = ("jax.", "jnp.", "optax.", "numpy.", "np.")
    offenders = {}
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        used = imported(tree)
        roots = {name.split(".")[0] for name in used} - standard
        unwanted = sorted(roots - {"jax", "numpy", "optax", "lowrank_optax"})
        attributes = [x for x in ast.walk(tree) if isinstance(x, ast.Attribute)]
        used += [dotted(node) for node in attributes]
        unwanted += [
            name
            for name in used
            if name.startswith(others) and any(p[0] == "_" for p in name.split(".")[1:])
        ]
        if unwanted:
            offenders[str(path.relative_to(ROOT))] = unwanted
    assert not offenders
