"""Options that many optimizers accept: declared once here, passed on unchanged."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypedDict, TypeVar, cast, get_args, get_type_hints

import jax
import optax

from lowrank_optax.core.aliases import Mask, Number
from lowrank_optax.core.dimensions import DimensionNumbers
from lowrank_optax.core.rules import Rank, Square

F = TypeVar("F", bound=Callable[..., Any])

# Names of other packages for these arguments (docs/guides/migration.md).
ELSEWHERE = {
    "alpha": "scale",
    "betas": "b1 and b2",
    "lr": "learning_rate",
    "proj_type": "square",
    "update_proj_gap": "refresh_every",
    "weight_dimension_numbers": "dimension_numbers",
}


class FullRankOptions(TypedDict, total=False):
    """Options of every optimizer, explained in `low_rank_optimizer`."""

    weight_decay: optax.ScalarOrSchedule
    mask: Mask
    dimension_numbers: DimensionNumbers


class FixedOptions(FullRankOptions, total=False):
    """Options of an optimizer whose basis never changes, and takes no product."""

    rank: Rank
    square: Square


class SubspaceOptions(FixedOptions, total=False):
    """Options of an optimizer with a subspace, explained in `low_rank_optimizer`."""

    precision: jax.lax.PrecisionLike


class Options(SubspaceOptions, total=False):
    """Options of an optimizer that refreshes its subspace every so many steps."""

    refresh_every: int
    stagger: bool


class ScaledOptions(Options, total=False):
    """Options of an optimizer that is `galore` with another step."""

    scale: Number


class AdamOptions(TypedDict, total=False):
    """Options that `galore` passes to Adam, and the scale of its step."""

    scale: Number
    b1: Number
    b2: Number
    eps: Number


class GaloreOptions(Options, AdamOptions, total=False):
    """Options of an optimizer that is `galore` with another basis."""


class NeverRefreshedOptions(SubspaceOptions, AdamOptions, total=False):
    """Options of an optimizer that is `galore` with a basis that moves by itself."""


def passes_on(inner: Callable[..., Any], **defaults: Any) -> Callable[[F], F]:
    """Gives an optimizer's `**options: Unpack[...]` the defaults that `inner` has.

    The signature then lists each option, as `optax.inject_hyperparams` needs it to:
    it binds arguments by `inspect.signature`.

    Args:
      inner: the function that gets the options.
      **defaults: defaults of this optimizer that differ from those of `inner`.

    Raises:
      TypeError: in the optimizer, for an argument that its signature does not list.
    """

    def decorate(make: F) -> F:
        signature = _listed(make, inspect.signature(inner), defaults)

        @functools.wraps(make)
        def optimizer(*args: Any, **kwargs: Any) -> Any:
            for name in sorted(kwargs.keys() - signature.parameters.keys()):
                close = difflib.get_close_matches(name, signature.parameters)
                meant = ELSEWHERE.get(name, close[0] if close else None)
                hint = f"did you mean {meant}" if meant else "see help() for options"
                raise TypeError(f"{make.__name__}(): no argument {name!r}; {hint}")
            try:
                given = signature.bind(*args, **kwargs)
            except TypeError as error:
                hint = ""
                if len(args) > 1:
                    name = [*signature.parameters][1]
                    hint = f"; pass all but the learning rate by name, as {name}=..."
                raise TypeError(f"{make.__name__}(): {error}{hint}") from None
            given.apply_defaults()
            return make(*given.args, **given.kwargs)

        vars(optimizer)["__signature__"] = signature
        return cast(F, optimizer)

    return decorate


def _listed(
    make: Callable[..., Any], inner: inspect.Signature, defaults: dict[str, Any]
) -> inspect.Signature:
    """The signature of `make` with its options one by one, the rank first."""
    own = inspect.signature(make)
    *parameters, options = own.parameters.values()
    (accepted,) = get_args(get_type_hints(make)[options.name])  # of Unpack[...]
    for name, option in inner.parameters.items():
        if name in accepted.__annotations__:
            default = defaults.get(name, option.default)
            parameters.append(option.replace(default=default))
    first = ("rank", "refresh_every")
    parameters.sort(key=lambda p: (p.kind, p.name not in first))
    return own.replace(parameters=parameters)
