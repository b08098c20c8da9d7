"""Sends a run's records to a tracker, each once, also if the run is resumed."""

import errno
import json
import uuid
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple

from train.host.atomic import write_text
from train.host.console import warn
from train.host.paths import AnyPath
from train.records.tags import tag
from train.records.tensorboard import Record
from train.records.trackers import TRACKERS, Tracked, TrackerName


class Sent(NamedTuple):
    """The part of a run that a tracker has, as `folder/NAME.json` stores it.

    Attributes:
      project: that has the tracked run.
      id: of the tracked run.
      step: of the last record that was sent; 0 for none.
    """

    project: str
    id: str
    step: int


def new(project: str) -> Sent:
    """The record of a tracked run that is yet to begin."""
    return Sent(project, uuid.uuid4().hex[:12], 0)


def read_sent(folder: AnyPath, name: TrackerName) -> Sent | None:
    """Reads `folder/NAME.json`; None if there is none.

    Raises:
      ValueError: it is damaged.
    """
    path = folder / f"{name}.json"
    if not path.exists():
        return None
    try:
        sent = Sent(**json.loads(path.read_text()))
        return sent._replace(step=int(sent.step))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path} does not name a tracked run ({error}); remove it to begin another"
        ) from error


class Tracking:
    """A tracker, as an output that a run's records are written to.

    Within its `with` block the tracked run goes on; it ends as the block does.
    """

    def __init__(
        self, name: TrackerName, folder: AnyPath, title: str, config: Any, sent: Sent
    ) -> None:
        """Begins the tracked run, or goes on with it.

        Args:
          name: of the tracker.
          folder: of the run.
          title: that the tracker shows the run by.
          config: the run's options, as JSON.
          sent: what the tracker has.

        Raises:
          OSError: it cannot be begun.
        """
        self.path = name
        self._file, self._sent = folder / f"{name}.json", sent
        run = Tracked(folder, sent.project, title, sent.id, config)
        try:
            self._tracker = TRACKERS[name](run)
            there = self._tracker.last_step()
        except Exception as error:  # of its network, its login, its files
            raise OSError(f"{name} did not start ({_line(error)})") from error
        # A kill loses what is on its way, or the note of it in the file.
        if there is not None:
            self._sent = sent._replace(step=there)

    def append(self, records: Sequence[Record]) -> None:
        """Sends the records of steps after the last one sent; OSError if it fails."""
        for record in records:
            step = record["step"]
            if step <= self._sent.step:
                continue
            known = {k: v for k, v in record.items() if k != "step" and v is not None}
            try:
                self._tracker.log(step, {tag(k): v for k, v in known.items()})
            except Exception as error:
                raise OSError(errno.EIO, _line(error)) from error
            self._sent = self._sent._replace(step=step)
        write_text(self._file, json.dumps(self._sent._asdict()) + "\n")

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._tracker.finish(error)
        except Exception as problem:
            warn(f"{self.path} did not end the tracked run ({_line(problem)})")


def _line(error: Exception) -> str:
    """ "ValueError: what it says", on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
