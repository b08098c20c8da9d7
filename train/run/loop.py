"""The training loop: steps, evaluations and checkpoints, in that order."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from models import Params
from train.config.config import Config, model_config, resolved, title
from train.data.dataset import Data
from train.engine.memory import StepMemory, step_memory
from train.engine.mesh import by_row, like_batch, replicated, to_devices
from train.engine.optimizer import Optimizer, make_optimizer
from train.engine.schedule import last_stable_step
from train.engine.step import (
    Batch,
    LossSums,
    TrainState,
    Work,
    dense,
    loss_sums,
    train_step,
)
from train.host.console import say
from train.host.paths import AnyPath
from train.host.signals import Stop
from train.records.metrics import Meter, MetricsWriter, Record
from train.records.progress import Progress
from train.run.checkpoint import Checkpoints, Restored
from train.run.first_state import initial, like_of
from train.run.start import begun_from, weights_for
from train.run.stored import (
    store_chat_template,
    store_settings,
    store_tokenizer,
)
from train.run.tracked import tracked

HostBatch = Mapping[str, np.ndarray]
"""This process' rows of a batch."""


class Program(NamedTuple):
    """The programs of a run, compiled for one mesh.

    Attributes:
      step: (state, batch, refresh) to (state, metrics); consumes the state.
      loss_sums: (params, batch) to the summed loss and weight.
      put: a batch of this process' rows to the global batch.
      refresh_every: steps from one refresh of all bases to the next; None for none.
      compile_s: seconds to compile `step`.
      memory: of each kind of step, by whether it is a refresh.
      adamw: of AdamW's step with all gradients first; None if it was not asked for.
    """

    step: Callable[[TrainState, Batch, bool], tuple[TrainState, dict[str, jax.Array]]]
    loss_sums: LossSums
    put: Callable[[HostBatch], Batch]
    refresh_every: int | None
    compile_s: float
    memory: dict[bool, StepMemory]
    adamw: StepMemory | None = None

    @property
    def step_bytes(self) -> int | None:
        """Memory of a step on one device; of an ordinary one, if there are any."""
        return self.memory[min(self.memory)].peak


class Outputs(NamedTuple):
    """The outputs of a run, and the signals that stop it."""

    writer: MetricsWriter
    checkpoints: Checkpoints
    progress: Progress
    stop: Stop

    def write(self, record: Record | None, max_skipped: int) -> None:
        """Writes a record, if there is one.

        Raises:
          FloatingPointError: as `check_finite`.
          MovedError: the folder is no longer there; of several processes all find that
            out together, when they save.
        """
        if record is not None:
            if jax.process_count() == 1:
                self.checkpoints.check_place()
            self.writer.write(record)
            self.progress.record(record)
            check_finite(record, max_skipped, self.checkpoints.healthy)


class DataError(Exception):
    """The data changed during the run, or cannot be read any more."""


class Trained(NamedTuple):
    """A finished run; `unsaved` says why its last checkpoint is missing, if it is."""

    state: TrainState
    work: Work
    program: Program
    unsaved: str | None = None

    @property
    def weights(self) -> Params:
        """The weights as the model takes them."""
        return dense(self.work, self.state.params)


def train(config: Config, data: Data, mesh: Mesh) -> Trained:
    """Runs, or resumes, a resolved config in its folder (`own_folder`).

    Raises:
      CheckpointError: no checkpoint can be read, or not the one that was asked for.
      DataError: the data cannot be read any more.
      FloatingPointError: after `max_skipped` steps in a row without a finite gradient,
        or if the held-out loss is not finite.
      LostProcessError: another process had to end.
      MovedError: the folder was moved or removed.
      OSError: as `tracked`.
      StoppedError: by a signal.
    """
    folder: AnyPath = resolved(config, "out")
    # Before the tokenizer: a resumed run that has that looks beside it.
    store_chat_template(folder, data.chat and data.chat.template)
    store_settings(folder, begun_from(config), data.tokenizer)
    store_tokenizer(folder, data.tokenizer)
    init_key, optimizer_key = jax.random.split(jax.random.key(config.seed))
    work = work_of(config, optimizer_key)
    with (
        tracked(config) as trackers,  # ends last: its upload may take long
        jax.set_mesh(mesh),
        Checkpoints(folder, config.report.keep) as checkpoints,
    ):
        given = None if config.init_from is None else partial(weights_for, config)
        make, like = initial(work, mesh, given)
        kinds, name = kinds_of_steps(work.optimizer), title(config.optimizer)
        weights = jax.eval_shape(partial(dense, work), like.params)
        for remark in work.shards.remarks(mesh, weights):
            say(f"{name}: {remark}")
        say(
            f"{name}: compiling the training step of {config.model.name}, "
            f"{config.batch_size} x {config.seq_len} tokens ..."
        )
        program = build_program(
            config, mesh, work, like, kinds, adamw_work(config, work)
        )
        say(f"{name}: compiled in {program.compile_s:.1f} s")
        batches = iter(data.train)
        begun = checkpoints.restore_newest(like, batches, config.resume_from)
        if begun is None:
            begun = Restored(make(init_key), [])
        start = int(begun.state.step)
        with (
            MetricsWriter(folder, start, trackers) as writer,
            Progress(name, start, config.steps) as progress,
            Stop() as stop,
        ):
            outputs = Outputs(writer, checkpoints, progress, stop)
            state = fit(config, program, begun, batches, data.evaluation, outputs)
    return Trained(state, work, program, checkpoints.unsaved)


def work_of(config: Config, key: jax.Array) -> Work:
    """The work of a resolved config; the key is the optimizer's."""
    return Work(
        model_config(config.model),
        make_optimizer(config.optimizer, config.steps, key),
        jax.random.fold_in(key, 0),
        weight_dtype=config.model.weight_dtype,
        microbatches=config.microbatches,
        layerwise=resolved(config, "layerwise") == "on",
    )


def adamw_work(config: Config, work: Work) -> Work | None:
    """The same work with AdamW, gradients first; None if that is this work."""
    if config.optimizer.name == "adamw" and not work.layerwise:
        return None
    adamw = dataclasses.replace(
        config.optimizer, name="adamw", basis="default", basis_dtype="float32"
    )
    optimizer = make_optimizer(adamw, config.steps, jax.random.key(0))
    return work._replace(optimizer=optimizer, layerwise=False)


def build_program(
    config: Config,
    mesh: Mesh,
    work: Work,
    like: TrainState,
    kinds: Iterable[bool],
    adamw: Work | None = None,
) -> Program:
    """Compiles the training step for states of the shapes in `like`.

    There is one program for each of `kinds`, whether it is a refresh
    (`kinds_of_steps`). One for `adamw` shows its memory, except on a CPU, whose cores
    are all busy compiling.
    """
    start = time.perf_counter()
    lowered: dict[Any, jax.stages.Lowered] = {
        refresh: lower_step(config, mesh, work, like, refresh) for refresh in kinds
    }
    beside = None if adamw is None else (adamw, like_of(adamw, mesh))
    if beside is not None and jax.default_backend() != "cpu":
        lowered["adamw"] = lower_step(config, mesh, *beside, False)
    with ThreadPoolExecutor() as pool:  # compiling holds no lock of Python's
        compiled = dict(
            zip(lowered, pool.map(lambda x: x.compile(), lowered.values()), strict=True)
        )
    of_adamw = compiled.pop("adamw", None)
    seconds = time.perf_counter() - start

    shardings = jax.tree.map(lambda x: x.sharding, like.params)
    return Program(
        step=lambda state, batch, refresh: compiled[refresh](state, batch),
        loss_sums=jax.jit(
            partial(loss_sums, work),
            in_shardings=(shardings, by_row(mesh)),
            out_shardings=replicated(mesh),
        ),
        put=partial(to_devices, mesh),
        refresh_every=work.optimizer.refresh_every,
        compile_s=seconds,
        memory={kind: step_memory(work, like, x) for kind, x in compiled.items()},
        adamw=beside and step_memory(*beside, of_adamw),
    )


def lower_step(
    config: Config, mesh: Mesh, work: Work, like: TrainState, refresh: bool
) -> jax.stages.Lowered:
    """Lowers the training step for states like `like_of(work, mesh)`.

    It allocates nothing; the mesh may be of devices that are not here.
    """
    shardings = jax.tree.map(lambda x: x.sharding, like)
    step = jax.jit(
        partial(train_step, work, refresh=refresh),
        in_shardings=(shardings, by_row(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return step.lower(like, like_batch(config))


def kinds_of_steps(optimizer: Optimizer) -> list[bool]:
    """Whether steps are refreshes: False and True, unless all are of one kind."""
    if optimizer.refresh_every is None:
        return [False]
    return [True] if optimizer.refresh_every == 1 else [False, True]


def fit(
    config: Config,
    program: Program,
    begun: Restored,
    batches: grain.DatasetIterator,
    evaluation: Iterable[HostBatch],
    outputs: Outputs,
) -> TrainState:
    """Takes the remaining steps.

    The host runs ahead of the device, so that the next batch is ready when a step ends.
    It waits for the previous record when it writes one, and at a refresh for whether
    the refresh was skipped: it is then due again at the next step.
    """
    _, checkpoints, progress, stop = outputs
    report, last, state = config.report, config.steps, begun.state
    start, every = int(state.step), program.refresh_every
    checkpoints.preserve(stable := last_stable_step(config))
    meter = Meter(start, config.batch_size * config.seq_len, begun.losses)
    write = partial(outputs.write, max_skipped=config.optimizer.max_skipped)
    until = int(state.until_refresh)
    for step in range(start + 1, last + 1):
        refresh = every is not None and until == 0
        state, metrics = program.step(state, put_next(program, batches), refresh)
        if every != 1:
            until = int(state.until_refresh) if refresh else until - 1
        meter.add(metrics, refresh)
        progress.step(metrics)
        evaluating = step == last or is_due(step, report.eval_every)
        saving = is_due(step, report.checkpoint_every, last, stable)
        if step == 1 or evaluating or saving or is_due(step, report.log_every):
            write(meter.log(step, metrics))
        if evaluating or saving:
            record = meter.flush()
            if record is not None and evaluating:
                record |= evaluate(program, state.params, evaluation)
            write(record)
            if saving:
                checkpoints.save(step, state, batches, record)
            meter.resume(step)
        if stop.reached(step) and step < last:
            write(meter.flush())
            if report.checkpoint_every and not saving:
                checkpoints.save(step, state, batches, losses=meter.losses)
            raise stop.error(step, saved=checkpoints.has(step))
    return state


def put_next(program: Program, batches: grain.DatasetIterator) -> Batch:
    """The next batch, on its way to the devices."""
    try:
        rows = next(batches)
    except (OSError, ValueError) as error:
        raise DataError(str(error)) from error
    return program.put(rows)


def is_due(step: int, every: int, *also: int | None) -> bool:
    """Whether something is due every so many steps, 0 for never, and at some others."""
    return every > 0 and (step % every == 0 or step in also)


def evaluate(program: Program, params: Params, batches: Iterable[HostBatch]) -> Record:
    """Mean loss over all held-out tokens, in nats, and the number of batches.

    Raises:
      FloatingPointError: the loss is NaN or infinite.
    """
    sums: list[Any] = []
    for batch in batches:
        rows = program.put(batch)
        # One at a time: of several that exchange sums, and do not need each other's,
        # the threads of a CPU's virtual devices may each begin another, and wait.
        jax.block_until_ready(sums[-1:])
        sums.append(program.loss_sums(params, rows))
    losses, weights = zip(*jax.device_get(sums), strict=True)
    loss = math.fsum(losses) / math.fsum(weights)
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the held-out loss is {loss}; lower --learning-rate and start again"
        )
    return {"eval_loss": loss, "eval_batches": len(sums)}


def check_finite(record: Record, limit: int, healthy: int | None) -> None:
    """FloatingPointError for too many skipped steps in a row; names a checkpoint."""
    if record["skipped_in_a_row"] < limit:
        return
    advice = (
        "no checkpoint is from before that"
        if healthy is None
        else f"the checkpoint of step {healthy} is from before that: a new run can "
        f"begin with its weights, by --init-from FOLDER@{healthy}"
    )
    raise FloatingPointError(
        f"step {record['step']}: {record['skipped_in_a_row']} steps in a row had a "
        "gradient that is NaN or infinite, and were skipped; lower --learning-rate "
        f"and start again ({advice})"
    )
