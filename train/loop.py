"""The training loop: steps, evaluations and checkpoints, in that order."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from models import LlamaConfig, Params
from train.checkpoint import Checkpoints, store_config
from train.config import Config, model_config, resolved
from train.data import Data
from train.mesh import by_row, replicated, to_devices
from train.metrics import Meter, MetricsWriter, Record
from train.optimizer import Optimizer, make_optimizer
from train.step import Batch, LossSums, TrainState, init_state, loss_sums, train_step

Rows = Mapping[str, np.ndarray]
"""This process' rows of a batch."""


class Program(NamedTuple):
    """What runs on the devices, compiled for one mesh.

    Attributes:
      step: (state, batch) to (state, metrics); consumes the state.
      loss_sums: (params, batch) to the summed loss and weight.
      put: a batch of this process' rows to the global batch.
      compile_s: seconds to compile `step`.
      step_bytes: memory that `step` needs on one device, None if unknown.
    """

    step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
    loss_sums: LossSums
    put: Callable[[Rows], Batch]
    compile_s: float
    step_bytes: int | None


class Trained(NamedTuple):
    """A run at its end."""

    state: TrainState
    model: LlamaConfig
    optimizer: Optimizer
    program: Program


def train(config: Config, data: Data, mesh: Mesh) -> Trained:
    """Run, or go on with, the work of a resolved config in its folder.

    Raises:
      FloatingPointError: after `max_skipped` steps in a row without a finite gradient,
        or if the held-out loss is not finite.
    """
    folder: Path = resolved(config, "out")
    store_config(config)
    model = model_config(config.model)
    init_key, optimizer_key = jax.random.split(jax.random.key(config.seed))
    optimizer = make_optimizer(config.optimizer, config.steps, optimizer_key)
    with (
        jax.set_mesh(mesh),
        Checkpoints(folder / "checkpoints", config.report.keep) as checkpoints,
    ):
        init = jax.jit(
            partial(init_state, model, optimizer.tx), out_shardings=replicated(mesh)
        )
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)),
            jax.eval_shape(init, init_key),
        )
        program = build_program(config, mesh, model, optimizer, like)
        batches = iter(data.train)
        if checkpoints.latest is None:
            state = init(init_key)
        else:
            state = checkpoints.restore(checkpoints.latest, like, batches)
        with MetricsWriter(folder, int(state.step)) as writer:
            state = fit(
                config, program, state, batches, data.evaluation, writer, checkpoints
            )
    return Trained(state, model, optimizer, program)


def build_program(
    config: Config, mesh: Mesh, model: LlamaConfig, optimizer: Optimizer, like: Any
) -> Program:
    """Compile the training step for states of the shapes in `like`."""
    sums = partial(loss_sums, model)
    everywhere, rows = replicated(mesh), by_row(mesh)
    step = jax.jit(
        partial(train_step, sums, optimizer, config.microbatches),
        in_shardings=(everywhere, rows),
        out_shardings=everywhere,
        donate_argnums=0,
    )
    tokens = jax.ShapeDtypeStruct((config.batch_size, config.seq_len), jnp.int32)
    start = time.perf_counter()
    compiled = step.lower(like, {"tokens": tokens}).compile()
    seconds = time.perf_counter() - start
    return Program(
        step=compiled,
        loss_sums=jax.jit(sums, in_shardings=(everywhere, rows)),
        put=partial(to_devices, mesh),
        compile_s=seconds,
        step_bytes=program_bytes(compiled),
    )


def program_bytes(compiled: jax.stages.Compiled) -> int | None:
    """Arguments, results and temporaries; None where the compiler does not say."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def fit(
    config: Config,
    program: Program,
    state: TrainState,
    batches: grain.DatasetIterator,
    evaluation: Iterable[Rows],
    writer: MetricsWriter,
    checkpoints: Checkpoints,
) -> TrainState:
    """Take the steps that are left.

    The host runs ahead of the device, so the next batch is ready when a step ends; it
    waits only where it writes a record, and then for the record before.
    """
    report, last, start = config.report, config.steps, int(state.step)
    meter = Meter(start, config.batch_size * config.seq_len)
    bar = progress_bar(start, last)

    def write(record: Record | None) -> None:
        if record is not None:
            writer.write(record)
            bar.set_postfix(loss=f"{record['loss']:.3f}", refresh=False)
            check_finite(record, config.optimizer.max_skipped)

    for step in bar:
        state, metrics = program.step(state, program.put(next(batches)))
        meter.add(metrics)
        evaluating = step == last or is_due(step, report.eval_every)
        saving = is_due(step, report.checkpoint_every, last)
        if step == 1 or evaluating or saving or is_due(step, report.log_every):
            write(meter.log(step, metrics))
        if evaluating or saving:
            record = meter.flush()
            if record is not None and evaluating:
                record["eval_loss"] = evaluate(program, state.params, evaluation)
            write(record)
            if saving:
                checkpoints.save(step, state, batches)
            meter.resume(step)
    return state


def is_due(step: int, every: int, last: int | None = None) -> bool:
    """Whether something done every so many steps, 0 for never, and at `last` is due."""
    return every > 0 and (step % every == 0 or step == last)


def progress_bar(start: int, last: int) -> tqdm:
    """Over the steps that are left; shown by process 0, and on a terminal only."""
    return tqdm(
        range(start + 1, last + 1),
        initial=start,
        total=last,
        unit="step",
        disable=None if jax.process_index() == 0 else True,
    )


def evaluate(program: Program, params: Params, batches: Iterable[Rows]) -> float:
    """Mean loss over all held-out tokens, in nats: sums first, one division.

    Raises:
      FloatingPointError: if it is NaN or infinite.
    """
    sums = [program.loss_sums(params, program.put(batch)) for batch in batches]
    losses, weights = zip(*jax.device_get(sums), strict=True)
    loss = math.fsum(losses) / math.fsum(weights)
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the held-out loss is {loss}; lower --learning-rate and start again"
        )
    return loss


def check_finite(record: Record, limit: int) -> None:
    if record["skipped_in_a_row"] >= limit:
        raise FloatingPointError(
            f"step {record['step']}: {record['skipped_in_a_row']} steps in a row had a "
            "gradient that is NaN or infinite, and were skipped; lower --learning-rate "
            "and start again, or resume the latest checkpoint"
        )
