"""Options of a run that mean nothing to its method and basis."""

import dataclasses

from train.config.config import OptimizerConfig
from train.config.methods import METHODS, OF_THE_BASIS


def unread(optimizer: OptimizerConfig) -> list[str]:
    """The options that some method reads, and not this one with this basis."""
    by_some = OF_THE_BASIS.union(*(method.reads() for method in METHODS.values()))
    read = METHODS[optimizer.name].reads(optimizer.basis)
    read |= {"basis"}  # has an error of its own
    fields = (field.name for field in dataclasses.fields(OptimizerConfig))
    return [name for name in fields if name in by_some and name not in read]
