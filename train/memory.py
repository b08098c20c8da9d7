"""What a training step needs of a device's memory, as the compiler counts it."""

from typing import Any, NamedTuple

import jax
import numpy as np

GIB = 2**30


class StepMemory(NamedTuple):
    """Bytes of a compiled step on one device; None where the compiler does not say.

    Attributes:
      weights: as they are kept.
      state: the optimizer's.
      temporaries: what lives during the step alone: activations, gradients, updates.
      peak: all of them, and the batch.
    """

    weights: int
    state: int
    temporaries: int | None
    peak: int | None


def step_memory(like: Any, compiled: jax.stages.Compiled) -> StepMemory:
    """That of a step which takes a state of the shapes in `like`, and consumes it."""
    weights, state = tree_bytes(like.params), tree_bytes(like.opt_state)
    memory = compiled.memory_analysis()
    if memory is None:
        return StepMemory(weights, state, None, None)
    kept = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )
    temporaries = memory.temp_size_in_bytes
    return StepMemory(weights, state, temporaries, kept + temporaries)


def tree_bytes(tree: Any) -> int:
    """Of all arrays, on every device that has a copy once."""
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def device_peak() -> int | None:
    """The most that this process has used of its first device; None if unknown."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
