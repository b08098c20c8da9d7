"""Optimizers by the short names that comparisons use, such as galore+sara@1e-2."""

import dataclasses
from typing import Annotated

import tyro

from train.config.config import Basis, OptimizerConfig, OptimizerName
from train.config.methods import BASES, METHODS, NUMBERS


@dataclasses.dataclass(frozen=True)
class Shared(OptimizerConfig):
    """The options that the optimizers share, where they have them at all."""

    name: Annotated[OptimizerName, tyro.conf.Fixed] = "grass_jump"
    basis: Annotated[Basis, tyro.conf.Fixed] = "default"


def named(name: str, base: OptimizerConfig) -> OptimizerConfig:
    """`base` with the optimizer, basis and peak rate of "galore+sara@1e-2".

    A scale, b1 or b2 that it does not read is left out: it is meant for the other
    optimizers of the same comparison.

    Raises:
      ValueError: a name, basis or rate that does not exist.
    """
    method, _, rate = name.partition("@")
    method, _, basis = method.partition("+")
    basis = basis or "default"
    bases = ("default", *BASES)
    if method not in METHODS or basis not in bases:
        raise ValueError(
            f"{name!r} is not NAME[+BASIS][@RATE] with a NAME of {', '.join(METHODS)} "
            f"and a BASIS of {', '.join(bases)}"
        )
    try:
        learning_rate = float(rate) if rate else base.learning_rate
    except ValueError as error:
        raise ValueError(f"{name!r}: the rate {rate!r} is no number") from error
    nothing = {} if METHODS[method].projects else {"measure": "none", "anchor": None}
    return dataclasses.replace(
        base,
        name=method,
        basis=basis,
        basis_dtype="float32" if basis == "default" else base.basis_dtype,
        learning_rate=learning_rate,
        **dict.fromkeys({*NUMBERS} - METHODS[method].reads()),
        **nothing,
    )
