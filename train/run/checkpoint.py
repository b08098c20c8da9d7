"""A run's checkpoints: saved asynchronously, checked when they are read."""

import json
import zlib
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from typing import Any, NamedTuple

import grain
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    LatestN,
)

from train.engine.step import TrainState
from train.host.agreement import (
    ElsewhereError,
    LostProcessError,
    Meetings,
    agree,
    gathered,
)
from train.host.console import warn
from train.host.paths import AnyPath, for_orbax, move_folder
from train.host.quiet import quiet
from train.records.metrics import Record, read_metrics
from train.run.checksum import checksums
from train.run.keep_healthy import KeepHealthy
from train.run.place import ONE_FOLDER, MovedError, Place, check_shared, remove_all

UNFINISHED = "*.orbax-checkpoint-tmp*"
"""The folders in which orbax writes."""

Position = dict[str, Any]
"""The data iterator's state, and losses that no record has yet; as JSON."""


class Restored(NamedTuple):
    """The state a run starts from, and the losses since the last record of metrics."""

    state: TrainState
    losses: list[float]


class CheckpointError(Exception):
    """No checkpoint can be used."""


class Checkpoints:
    """Saves and restores a training state together with the data's position.

    Saving is asynchronous; leaving the `with` block waits for what is pending. A
    checkpoint gets its final name only when it is complete. If one cannot be saved (a
    full disk), a warning is printed and the run goes on; `unsaved` has the message if
    it was the last. Of several processes all read and save the same steps, or none
    does: what fails for one fails for all.
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
        self._keep, self._manager = keep, self._opened(keep)
        self._place = Place(folder)
        own = jax.process_index()  # reads without waiting for the others
        self._reader = ocp.Checkpointer(
            ocp.CompositeCheckpointHandler(),
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=own, active_processes={own}
            ),
        )

    def _opened(self, keep: int) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy(
                    [LatestN(keep), self._healthy]
                ),
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(barrier_sync_fn=Meetings()),
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
            self._prepare(step)
        except (OSError, ElsewhereError) as error:
            self._lost(error)
        else:
            self._begin(step, args)

    def _begin(self, step: int, args: ocp.args.Composite) -> None:
        try:
            self._manager.save(step, args=args)
        except jax.errors.JaxRuntimeError:
            raise
        except Exception as error:  # whatever class the file system's errors come in
            if jax.process_count() == 1:
                self._lost(error)
                return
            raise CheckpointError(  # the others may have begun
                f"the checkpoint of step {step} could not be saved: {brief(error)}"
            ) from error

    def _prepare(self, step: int) -> None:
        """Finds out before a save whether it would fail: all processes, or none, go on.

        Raises:
          OSError, ElsewhereError: it would.
          MovedError, LostProcessError: so would all later ones.
        """
        problem = None
        try:
            self.check_place()
            if jax.process_index() == 0:
                remove_all(self._folder.glob(UNFINISHED))
        except (MovedError, OSError) as error:
            problem = error
        agree(problem, ends=isinstance(problem, MovedError))
        check_shared(self._steps, f"{step}.mark")

    def check_place(self) -> None:
        """MovedError if the run's folder is no longer under its name."""
        self._place.check()

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
          ElsewhereError: another process could not restore it.
          LostProcessError: another process' device has no memory left.
          Exception: of many classes, for files that are missing or damaged.
        """
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(like),
            position=ocp.args.JsonRestore(),
            checksums=ocp.args.JsonRestore(),
        )
        saved, problem, seal = {}, None, 0
        try:
            saved = self._reader.restore(self._folder / str(step), args=args)
            seal = zlib.crc32(json.dumps(saved["checksums"], sort_keys=True).encode())
        except Exception as error:  # damaged files give errors of every class
            problem = error
        agree(problem, ends=isinstance(problem, jax.errors.JaxRuntimeError))
        seals = gathered([seal >> 1])  # of 31 bits
        if any(other != seals[0] for other in seals):
            raise ValueError("the processes see another checkpoint each")
        state, position = saved["state"], saved["position"]
        whole = _checksums_of(state, position) == saved["checksums"]
        agree(None if whole else ValueError("it does not hold what was saved"))
        data.set_state(position["data"])
        return Restored(state, position["losses"])

    def restore_newest(
        self, like: TrainState, data: grain.DatasetIterator, step: int | None = None
    ) -> Restored | None:
        """Restores the newest checkpoint that can be read; None if there is none.

        Of several processes each must see it, and read its part. Later ones are moved
        into the folder `aside`: the run will save these steps again.

        Args:
          like, data: as for `restore`.
          step: restore this one, not the newest.

        Raises:
          CheckpointError: none can be read, or there is none of `step`.
        """
        steps = self._seen_by_all()
        for tried in reversed(
            steps if step is None else [s for s in steps if s == step]
        ):
            try:
                restored = self.restore(tried, like, data)
            except (jax.errors.JaxRuntimeError, LostProcessError):
                raise  # of the device's memory
            except Exception as error:
                text = f"the checkpoint of step {tried} cannot be used: {brief(error)}"
                warn(text, each=True)
            else:
                self._set_aside(tried)
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

    def _seen_by_all(self) -> list[int]:
        """The steps of which every process sees a complete checkpoint, in order."""
        own = self.steps
        most = max(row[0] for row in gathered([len(own)]))
        if most == 0:
            return []
        rows = gathered([*own, *[-1] * (most - len(own))])
        common = set.intersection(*map(set, rows)) - {-1}
        if not common:
            raise CheckpointError(
                f"no checkpoint in {self._folder} is seen by all processes; process "
                f"{jax.process_index()} sees the steps {own}: {ONE_FOLDER}"
            )
        for step in own:
            if step > max(common):
                warn(f"not all processes see the checkpoint of step {step}", each=True)
        return sorted(common)

    def _set_aside(self, newest: int) -> None:
        """Moves checkpoints of later steps; each process what it alone still sees."""
        later = [s for s in self.steps if s > newest]
        if not any(row[0] for row in gathered([len(later)])):
            return
        for process in range(jax.process_count()):
            problem = None
            if process == jax.process_index():
                try:
                    self._move_aside(later)
                except OSError as error:
                    problem = error
            agree(problem, ends=True)
        self._manager.reload()

    def _move_aside(self, steps: Sequence[int]) -> None:
        moved = [s for s in steps if (self._steps / str(s)).exists()]
        for step in map(str, moved):
            move_folder(self._steps / step, self._aside / step)
        if moved:
            where = f"set aside into {self._aside}"
            warn(f"{where}: the checkpoints of steps {moved}", each=True)

    def _settle(self) -> None:
        """Waits for a pending checkpoint, and finds out whether it was saved."""
        if self._pending is None:
            return
        problem = None
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            problem = error
        try:
            agree(problem)
        except Exception as error:
            self._lost(error)
        else:
            self._pending = self.unsaved = None

    def _lost(self, error: Exception) -> None:
        self.unsaved = (
            f"the checkpoint of step {self._pending} could not be saved: {brief(error)}"
        )
        self._pending = None
        warn(f"{self.unsaved}; the run goes on, and saves the next", each=True)
        if jax.process_index() == 0:
            # What it wrote of it may be what fills the disk. (None in a bucket.)
            with suppress(OSError):
                remove_all(self._folder.glob(UNFINISHED))
        if jax.process_count() > 1:  # barriers that failed cannot be used again
            self._manager = self._opened(self._keep)
        else:
            self._manager.reload()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Where one process has an error, the others may be elsewhere, and not answer.
        together = kind is None or jax.process_count() == 1
        with closing(self._place):
            if together:
                self._settle()
                self._manager.close()
            else:
                self._close_alone()
            if kind is None:
                self.check_place()
        if self.unsaved is None:  # else its threads may still have things to say
            self._open.close()

    def _close_alone(self) -> None:
        try:
            self._manager.close()
        except Exception as error:
            text = f"the checkpoint of step {self._pending} could not be saved"
            warn(f"{text}: {brief(error)}", each=True)


def _checksums_of(state: TrainState, position: Position) -> dict[str, Any]:
    """Checksums of the state and of the position."""
    text = json.dumps(position, sort_keys=True)
    return {"state": checksums(state), "position": zlib.crc32(text.encode())}


def stored_checksums(checkpoint: AnyPath) -> dict[str, Any]:
    """The checksums that a checkpoint's folder stores."""
    return json.loads((checkpoint / "checksums" / "metadata").read_text())


def brief(error: BaseException) -> str:
    """The first line of an error, and its class; of what failed here, if any did."""
    if isinstance(error, ElsewhereError) and error.__context__ is not None:
        return brief(error.__context__)  # which kept this process from a meeting
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[0][:200] if lines else 'no more is known'} ({type(error).__name__})"
