"""Config dataclasses from a command line, and the checks of their numbers; no JAX."""

import dataclasses
import functools
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import tyro

from train.config.presets import from_preset
from train.host.output import keep_output

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

C = TypeVar("C", bound="DataclassInstance")


def parse(
    config_type: type[C],
    description: str,
    argv: Sequence[str] | None,
    prog: str,
    default: C | None = None,
) -> C:
    """Returns a config dataclass from the command line's short flags.

    A `--preset` among them sets the defaults of the others; `default` has them without.
    """
    keep_output()
    words = sys.argv[1:] if argv is None else argv
    read = functools.partial(
        tyro.cli,
        config_type,
        args=words,
        prog=prog,
        description=description,
        config=(
            tyro.conf.OmitArgPrefixes,
            tyro.conf.FlagCreatePairsOff,
            tyro.conf.SuppressFixed,
        ),
    )
    if "preset" not in {field.name for field in dataclasses.fields(config_type)}:
        return read()
    return read(default=from_preset(default or config_type(), words))


def check_numbers(
    config: "DataclassInstance",
    positive: Sequence[str] = (),
    not_negative: Sequence[str] = (),
) -> None:
    """ValueError for a number that is NaN or infinite, or too small for its field."""
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}={value} must be a finite number")
        if name in positive and value is not None and value <= 0:
            raise ValueError(f"{name}={value} must be above 0")
        if name in not_negative and value is not None and value < 0:
            raise ValueError(f"{name}={value} must not be negative")


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} must lie in [0, 2**32)")
