"""A run's checkpoints: saved asynchronously, checked when they are read."""

import json
import shutil
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import grain
import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    LatestN,
    PreservationPolicy,
)

from train.engine.step import TrainState
from train.host.console import warn
from train.host.paths import AnyPath, for_orbax, move_folder
from train.host.quiet import quiet
from train.records.metrics import Record, is_healthy, read_metrics
from train.run.checksum import checksums

Position = dict[str, Any]
"""The data iterator's state, and losses that no record has yet; as JSON."""


class Restored(NamedTuple):
    """The state a run starts from, and the losses since the last record of metrics."""

    state: TrainState
    losses: list[float]


class CheckpointError(Exception):
    """No checkpoint can be used."""


class KeepHealthy(PreservationPolicy):
    """Preserves the newest checkpoint at which the run was healthy.

    That is the newest with a finite held-out loss, if any, else with a finite gradient
    at its step: a run that diverged may have only broken newer ones. And what else is
    asked for, `also`.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self._records = {record["step"]: record for record in records}
        self.also: set[int] = set()

    def add(self, record: Record) -> None:
        self._records[record["step"]] = record

    def newest(self, steps: Sequence[int]) -> int | None:
        """The newest healthy one of these steps, which are in order."""
        records = {s: self._records[s] for s in steps if s in self._records}
        well = [step for step, record in records.items() if is_healthy(record)]
        evaluated = [step for step in well if "eval_loss" in records[step]]
        return max(evaluated or well, default=None)

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: Any
    ) -> Sequence[bool]:
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        newest = self.newest(steps)
        return [step == newest or step in self.also for step in steps]


class Checkpoints:
    """Saves and restores a training state together with the data's position.

    Saving is asynchronous; leaving the `with` block waits for what is pending. A
    checkpoint gets its final name only when it is complete. If one cannot be saved (a
    full disk), a warning is printed and the run goes on; `unsaved` has the message if
    it was the last.
    """

    def __init__(self, folder: AnyPath, keep: int) -> None:
        self._aside = folder / "aside"
        self._steps = folder / "checkpoints"
        self._folder = for_orbax(self._steps)
        self._healthy = KeepHealthy(read_metrics(folder))
        self._pending: int | None = None
        self.unsaved: str | None = None
        self._open = ExitStack()
        self._open.enter_context(quiet())
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy(
                    [LatestN(keep), self._healthy]
                ),
                cleanup_tmp_directories=True,
            ),
        )

    @property
    def steps(self) -> list[int]:
        """The steps with a complete checkpoint, in order."""
        return sorted(self._manager.all_steps())

    @property
    def healthy(self) -> int | None:
        """The newest checkpoint at which the run was healthy."""
        return self._healthy.newest(self.steps)

    def preserve(self, step: int | None) -> None:
        """Preserves the checkpoint of a step, if there is one to be made."""
        if step is not None:
            self._healthy.also.add(step)

    def has(self, step: int) -> bool:
        """Whether `step` has a checkpoint; waits for what is pending."""
        self._settle()
        return step in self.steps

    def save(
        self,
        step: int,
        state: TrainState,
        data: grain.DatasetIterator,
        record: Record | None = None,
        losses: Sequence[float] = (),
    ) -> None:
        """Begins to save the run after `step`.

        Args:
          step: how many steps are done.
          state: of the training.
          data: the iterator of the batches.
          record: of the metrics at this step.
          losses: of the steps since the last record.
        """
        self._settle()
        if record is not None:
            self._healthy.add(record)
        # Besides the state: where the iterator stands, the same on all processes.
        position = {"data": data.get_state(), "losses": [float(x) for x in losses]}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            position=ocp.args.JsonSave(position),
            checksums=ocp.args.JsonSave(_checksums_of(state, position)),
        )
        self._pending = step
        try:
            self._manager.save(step, args=args)
        except jax.errors.JaxRuntimeError:
            raise
        except Exception as error:  # whatever class the file system's errors come in
            self._lost(error)

    def restore(
        self, step: int, like: TrainState, data: grain.DatasetIterator
    ) -> Restored:
        """Restores the state of `step`, and the iterator's position.

        Args:
          step: of the checkpoint.
          like: a tree of `jax.ShapeDtypeStruct` with shardings: without them the state
            would come back only on the devices it was saved from.
          data: an iterator of the same batches.

        Raises:
          ValueError: an array is not what was saved.
          Exception: of many classes, for files that are missing or damaged.
        """
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(like),
            position=ocp.args.JsonRestore(),
            checksums=ocp.args.JsonRestore(),
        )
        saved = self._manager.restore(step, args=args)
        state, position = saved["state"], saved["position"]
        if _checksums_of(state, position) != saved["checksums"]:
            raise ValueError("it does not hold what was saved")
        data.set_state(position["data"])
        return Restored(state, position["losses"])

    def restore_newest(
        self, like: TrainState, data: grain.DatasetIterator, step: int | None = None
    ) -> Restored | None:
        """Restores the newest checkpoint that can be read; None if there is none.

        Later ones are moved into the folder `aside`: the run will save these steps
        again.

        Args:
          like, data: as for `restore`.
          step: restore this one, not the newest.

        Raises:
          CheckpointError: none can be read, or there is none of `step`.
        """
        steps = self.steps if step is None else [s for s in self.steps if s == step]
        for tried in reversed(steps):
            try:
                restored = self.restore(tried, like, data)
            except jax.errors.JaxRuntimeError:  # of the device's memory
                raise
            except Exception as error:  # damaged files give errors of every class
                warn(f"the checkpoint of step {tried} cannot be used: {brief(error)}")
            else:
                self._set_aside([s for s in self.steps if s > tried])
                return restored
        if step is not None:
            raise CheckpointError(
                f"there is no checkpoint of step {step} that can be used; there are "
                f"{self.steps}"
            )
        if steps:
            raise CheckpointError(
                f"none of the checkpoints in {self._folder} can be used: put one back, "
                "or start a new run in another --out"
            )
        return None

    def _set_aside(self, steps: Sequence[int]) -> None:
        if not steps:
            return
        if jax.process_index() == 0:
            for step in map(str, steps):
                move_folder(self._steps / step, self._aside / step)
            warn(f"set aside into {self._aside}: the checkpoints of steps {steps}")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("set aside")
        self._manager.reload()

    def _settle(self) -> None:
        """Waits for a pending checkpoint, and finds out whether it was saved."""
        if self._pending is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._lost(error)
        else:
            self._pending = self.unsaved = None

    def _lost(self, error: Exception) -> None:
        self.unsaved = (
            f"the checkpoint of step {self._pending} could not be saved: {brief(error)}"
        )
        self._pending = None
        warn(f"{self.unsaved}; the run goes on, and saves the next")
        if jax.process_index() == 0:
            # What it wrote of it may be what fills the disk. (None in a bucket.)
            for path in self._folder.glob("*orbax-checkpoint-tmp*"):
                shutil.rmtree(path, ignore_errors=True)
        self._manager.reload()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._settle()
        self._manager.close()
        if self.unsaved is None:  # else its threads may still have things to say
            self._open.close()


def _checksums_of(state: TrainState, position: Position) -> dict[str, Any]:
    """Checksums of the state and of the position."""
    text = json.dumps(position, sort_keys=True)
    return {"state": checksums(state), "position": zlib.crc32(text.encode())}


def stored_checksums(checkpoint: AnyPath) -> dict[str, Any]:
    """The checksums that a checkpoint's folder stores."""
    return json.loads((checkpoint / "checksums" / "metadata").read_text())


def brief(error: Exception) -> str:
    """The first line of an error, and its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[0][:200] if lines else 'no more is known'} ({type(error).__name__})"
