"""The methods and the basis rules by the names that the command line gives them."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Set
from typing import Any, Unpack

import optax

import lowrank_optax as lro
from lowrank_optax.core.dimensions import specs_of
from lowrank_optax.core.paths import map_with_paths
from lowrank_optax.optimizers.options import Options, passes_on
from lowrank_optax.steps.rotation import Outside

Make = Callable[..., optax.GradientTransformation]

# Options of a run whose names differ from the library's arguments.
ARGUMENTS = {"switch": "switch_step"}

# Numbers whose default is the method's own; a method without one refuses it.
NUMBERS = ("scale", "b1", "b2")

# Options that a method passes to its own basis; another basis has its own.
OF_THE_BASIS = frozenset({"key", "angle", "walk_rank"})


def options_of(make: Make) -> dict[str, Any]:
    """The options of `make` by a run's names, with their defaults; None if required."""
    names = {argument: option for option, argument in ARGUMENTS.items()}
    return {
        names.get(argument, argument): None if p.default is p.empty else p.default
        for argument, p in inspect.signature(make).parameters.items()
    }


def make_with(
    make: Make, read: Set[str], values: Mapping[str, Any]
) -> optax.GradientTransformation:
    """Calls `make` with the options that it reads; None stands for its own default."""
    given = {o: values[o] for o in read if values.get(o) is not None}
    return make(**{ARGUMENTS.get(o, o): value for o, value in given.items()})


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table: all that the trainer knows of a method.

    Attributes:
      make: from the learning rate, and options by their names, to the optimizer.
      rate: the peak learning rate, unless a run names another.
      own: options that the method decides for itself, whatever a run says.
    """

    make: Make
    rate: float
    own: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """Lists the options with their defaults; None if required."""
        return options_of(self.make)

    @property
    def low_rank(self) -> bool:
        """Whether it has a rank, of a subspace or of stored moments alone."""
        return "rank" in self.options

    @property
    def projects(self) -> bool:
        """Whether it has a subspace."""
        return self.interval is not None

    @property
    def interval(self) -> int | None:
        """Steps between two refreshes, unless a run names others; None: no subspace."""
        return self.own.get("refresh_every", self.options.get("refresh_every"))

    def reads(self, basis: str = "default") -> frozenset[str]:
        """The options of a run that change something, with a basis by its name."""
        read = self.options.keys() - self.own.keys()
        if basis != "default":
            read -= OF_THE_BASIS - options_of(BASES[basis]).keys()
            read |= OF_THE_BASIS & options_of(BASES[basis]).keys()
        return frozenset(read)

    def build(self, values: Mapping[str, Any]) -> optax.GradientTransformation:
        """The optimizer, from the values of the options that it reads."""
        return make_with(self.make, self.options.keys(), {**values, **self.own})


def _fira(step: Make) -> Make:
    """Fira with `step` in place of Adam, which gets the options that it has."""
    of_fira, own = (inspect.signature(f).parameters for f in (lro.fira, step))

    def make(*args: Any, **options: Any) -> optax.GradientTransformation:
        of_step = {name: options.pop(name) for name in own if name in options}
        return lro.fira(*args, **options, step=step(**of_step))

    rest = [p for name, p in of_fira.items() if name not in ("step", "b1", "b2")]
    vars(make)["__signature__"] = inspect.Signature([*rest, *own.values()])
    return make


# What subspace_adam adds of the gradient outside of its subspace.
BACKS: dict[str, Make] = {
    "project": lambda scale, _: lro.project_back(scale),
    "rescale": lambda scale, _: lro.recover_residual(scale=scale),
    "sign": lambda _, outside: lro.sign_residual(outside),
    "compensate": lambda scale, outside: lro.compensate_columns(
        scale=scale, residual_scale=outside / scale
    ),
    "spectral": lambda scale, outside: lro.spectral_residual(outside, scale=scale),
    "feedback": lambda scale, _: lro.project_back(scale),  # in the next gradient
}


@passes_on(lro.low_rank_optimizer, refresh_every=40)
def subspace_adam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    basis: optax.GradientTransformation | None = None,
    rotate: str = "on",
    outside: Outside = "zero",
    back: str = "rescale",
    residual_scale: float = 1.0,
    scale: float = 1.0,
    b1: float = 0.9,
    b2: float = 0.999,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    """Adam in any subspace, with or without rotation, any way back: for ablations."""
    where = optax.chain(lro.dominant_svd() if basis is None else basis, lro.project())
    if back == "feedback":
        where = lro.error_feedback(where, b1=b1)
    if outside != "zero" and rotate != "on":
        raise ValueError(
            f"outside={outside}: rotate={rotate} rotates no second moment; take "
            "rotate=on, or leave out outside"
        )
    rotations: dict[str, Make] = {
        "on": functools.partial(lro.rotate_moments, outside=outside),
        "first": functools.partial(lro.rotate_moments, moments="first"),
        "off": lro.in_subspace,
    }
    step = rotations[rotate](optax.scale_by_adam(b1, b2))
    stages = optax.chain(where, step, BACKS[back](scale, residual_scale))
    return lro.low_rank_optimizer(stages, learning_rate, **options)


def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    scale: float = 0.2,
    weight_decay: float = 0.0,
    mask: Any = None,
    dimension_numbers: Any = "auto",
) -> optax.GradientTransformation:
    """optax's Muon for the matrices that others project, its NAdam for the rest.

    Its steps have entries of the root mean square `scale` (Liu et al. 2025, "Muon is
    Scalable for LLM Training", section 2.2), so that Adam's rates fit.
    """

    def matrices(params: optax.Params) -> Any:
        specs = specs_of(dimension_numbers, params)
        return map_with_paths(lambda path, _: specs[path], params)

    return optax.contrib.muon(
        learning_rate,
        adam_b1=b1,
        adam_b2=b2,
        consistent_rms=scale,
        weight_decay=weight_decay,
        adam_weight_decay=weight_decay,
        weight_decay_mask=mask,
        muon_weight_dimension_numbers=matrices,
    )


def _adam8bit() -> optax.GradientTransformation:
    return lro.in_subspace(lro.quantize_moments(optax.scale_by_adam()))


ONCE = 2**31 - 1  # a basis is chosen at the first step alone

# SCALE normalises embedding and head too, which for all others have full rank.
WEIGHT_MATRICES = (
    (r"^layers/(attention|mlp)/\w+/kernel$", lro.STACKED),
    (r"^(embed|head)/", "matrix"),
    (r"^norm/|^layers/\w+_norm/|/bias$", None),
)

# Options that a method of the library decides for itself.
OWN: dict[str, Mapping[str, Any]] = {
    "ldadam": {"refresh_every": 1, "stagger": False},
    "apollo_mini": {"rank": 1},
    "scale_sgd": {"dimension_numbers": WEIGHT_MATRICES},
    "dct_adamw": {"refresh_every": 1, "stagger": False},
    "online_subspace_descent": {"refresh_every": ONCE},
    "foam": {"refresh_every": ONCE, "stagger": False},
    "gwt": {"refresh_every": ONCE, "stagger": False},
}

# The library's, and what the trainer has beside them: peak learning rates are the best
# of those tried on the same work (docs/results/losses_60m.md).
METHODS = {
    "adamw": Method(optax.adamw, 2e-3),
    "muon": Method(muon, 3e-3),
    **{
        name: Method(row.make, row.learning_rate, OWN.get(name, {}))
        for name, row in lro.METHODS.items()
    },
    "alice_0": Method(functools.partial(lro.recipes.alice, b3=None), 5e-3),
    "fira_adafactor": Method(
        _fira(
            lambda: lro.in_subspace(
                lro.steps.per_matrix(lro.steps.scale_by_adafactor())
            )
        ),
        3e-3,
    ),
    "fira_adam_mini": Method(
        _fira(lambda: lro.in_subspace(lro.steps.scale_by_adam_mini())), 3e-3
    ),
    "fira_adam8bit": Method(_fira(_adam8bit), 3e-3),
    "subspace_adam": Method(subspace_adam, 2e-3),
}

# A rule gets the key, angle, walk_rank and b1 of a run, if it has them.
BASES: dict[str, Make] = {
    "svd": lro.dominant_svd,
    "sketch": functools.partial(lro.dominant_svd, decomposition="randomized"),
    "iterate": functools.partial(lro.dominant_svd, decomposition="iterate"),
    "lotus": lambda key: lro.bases.adaptive_refresh(
        lro.dominant_svd(decomposition="randomized", key=key)
    ),
    "sara": lro.sara_sample,
    "walk": lro.grassmann_walk,
    "jump": lro.grassmann_jump,
    "track": lro.bases.grassmann_track,
    "power": lro.bases.power_iterate,
    "frozen": lambda: lro.bases.frozen(lro.dominant_svd()),
    "coordinates": lro.bases.coordinates,
}


def basis_of(name: str, values: Mapping[str, Any]) -> optax.GradientTransformation:
    """A basis rule, from the values of a run's options that it reads."""
    read = options_of(BASES[name]).keys() & (OF_THE_BASIS | {"b1"})
    return make_with(BASES[name], read, values)
