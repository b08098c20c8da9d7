"""The memory of a training step on a device, as the compiler counts it."""

from functools import partial
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jax.sharding import NamedSharding

from train.engine.optimizer import parted
from train.engine.step import TrainState, Work, dense

GIB, MIB = 2**30, 2**20


class StepMemory(NamedTuple):
    """Bytes of a step on one device; None if the compiler reports none.

    Attributes:
      weights: as stored.
      state: the optimizer's.
      gradients: the most that live at once: of all weights or, layer by layer, of one
        layer and of embedding, head and norm.
      temporaries: what lives during the step alone: gradients, activations, updates.
      peak: weights, state, temporaries and the batch.
    """

    weights: int
    state: int
    gradients: int
    temporaries: int | None
    peak: int | None


def step_memory(
    work: Work, like: TrainState, compiled: jax.stages.Compiled | None
) -> StepMemory:
    """The memory of a compiled step; `like` has the shapes of its (donated) state."""
    weights, state = tree_bytes(like.params), tree_bytes(like.opt_state)
    gradient = jax.eval_shape(partial(dense, work), like.params)
    sharding = cast(NamedSharding, like.step.sharding)
    shardings = work.shards.shardings(sharding.mesh, gradient)
    parts = parted(
        jax.tree.map(lambda x, own: x.update(sharding=own), gradient, shardings)
    )
    at_once = work.model.num_layers if work.layerwise else 1
    gradients = tree_bytes(parts.layers) // at_once + tree_bytes(parts.rest)
    memory = None if compiled is None else compiled.memory_analysis()
    if memory is None:
        return StepMemory(weights, state, gradients, None, None)
    lasting = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )
    temporaries = memory.temp_size_in_bytes
    return StepMemory(weights, state, gradients, temporaries, lasting + temporaries)


def describe(memory: dict[bool, StepMemory], adamw: StepMemory | None) -> str:
    """Formats a table of steps by kind, in MiB, and the device's own peak."""
    rows = {("a refresh" if kind else "ordinary"): x for kind, x in memory.items()}
    if adamw is not None:
        rows["adamw, ordinary"] = adamw
    lines = ["MiB on a device " + "".join(f"{x:>13}" for x in StepMemory._fields)]
    for kind, numbers in rows.items():
        cells = ("-" if x is None else f"{x / MIB:,.1f}" for x in numbers)
        lines.append(f"{kind:<16}" + "".join(f"{x:>13}" for x in cells))
    if (peak := device_peak()) is not None:
        lines.append(f"the device's own peak: {peak / MIB:,.1f} MiB")
    return "\n".join(lines)


def tree_bytes(tree: Any) -> int:
    """The bytes that one device stores of all arrays, by their types' shardings."""

    def size(x: Any) -> int:
        return int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))


def device_peak() -> int | None:
    """The most memory this process has used of its first device; None if unknown."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
