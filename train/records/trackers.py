"""The services that show a run's curves: Weights & Biases, and Trackio."""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from upath import UPath

from train.host.errors import STOPPED, StoppedError
from train.host.paths import AnyPath

TrackerName = Literal["wandb", "trackio"]


class Tracked(NamedTuple):
    """A run, as a tracker knows it.

    Attributes:
      folder: of the run.
      project: that the run is shown in.
      name: that is shown.
      id: of the run in its project; of a new one, or of one to go on with.
      config: the run's options, as JSON.
    """

    folder: AnyPath
    project: str
    name: str
    id: str
    config: Mapping[str, Any]


class Tracker(Protocol):
    """A service that the records of one run are sent to."""

    def __init__(self, run: Tracked) -> None: ...

    def last_step(self) -> int | None:
        """The last step that the service has, 0 for none; None if it cannot tell."""
        ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sends the metrics of a step, which is later than all before."""
        ...

    def finish(self, error: BaseException | None) -> None:
        """Ends the run, well or by the error."""
        ...


class Wandb:
    """A run of Weights & Biases; its files are in `folder/wandb`, or $WANDB_DIR."""

    UPLOAD_S = 10.0
    """Seconds that the end of a run waits for the upload; the files stay.

    wandb takes one limit for every end. The other processes of a run wait `PARTING_S`,
    and a cluster kills a stopped run after perhaps 30 s.
    """

    LOGIN_S = 60.0
    """Seconds that wandb's question for a key waits for an answer."""

    def __init__(self, run: Tracked) -> None:
        import wandb  # type: ignore[import-not-found]

        # The login does not read the settings of `init`.
        process = wandb.setup(settings=wandb.Settings(login_timeout=self.LOGIN_S))
        meant = process.settings.mode == "disabled"
        elsewhere = isinstance(run.folder, UPath) or "WANDB_DIR" in os.environ
        self._run = wandb.init(
            project=run.project,
            id=run.id,
            name=run.name,
            config=dict(run.config),
            resume="allow",
            allow_val_change=True,  # such as more steps
            dir=None if elsewhere else str(run.folder),
            settings=wandb.Settings(
                finish_timeout=self.UPLOAD_S,
                # Neither the machine, the user, the command line nor what it prints.
                console="off",
                disable_code=True,
                disable_git=True,
                save_code=False,
                x_disable_meta=True,
                x_save_requirements=False,
                # What is in its buffer is lost if the run is killed.
                x_transaction_log_flush_interval=1.0,
            ),
        )
        if self._run.disabled and not meant:
            raise TimeoutError(
                f"nobody logged in within {self.LOGIN_S:.0f} s; call `wandb login`, or "
                "set WANDB_MODE=offline"
            )

    def last_step(self) -> int | None:
        return None if self._run.offline else max(0, self._run.starting_step - 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def finish(self, error: BaseException | None) -> None:
        status = 0 if error is None else 1
        if isinstance(error, StoppedError) and error.saved:
            self._run.mark_preempting()  # shown as preempted rather than failed
            status = STOPPED
        self._run.finish(exit_code=status)


class Trackio:
    """A run of Trackio, in the database of $TRACKIO_DIR that `trackio show` reads.

    Trackio knows a run by its name, which therefore has the id in it, and has no status
    of a run: an alert says how one ended that did not finish.
    """

    def __init__(self, run: Tracked) -> None:
        import trackio  # type: ignore[import-not-found]

        self._trackio = trackio
        self._run = trackio.init(
            project=run.project,
            name=f"{run.name}-{run.id}",
            config=dict(run.config),
            resume="allow",
            embed=False,
        )

    def last_step(self) -> int | None:
        # No public name has it; without this one, the run's own file is believed.
        following = getattr(self._run, "_next_step", None)
        return None if following is None else max(0, following - 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def finish(self, error: BaseException | None) -> None:
        if isinstance(error, StoppedError):
            self._run.alert("stopped", level=self._trackio.AlertLevel.WARN)
        elif error is not None:
            title = f"ended by {type(error).__name__}"
            self._run.alert(title, level=self._trackio.AlertLevel.ERROR)
        self._trackio.finish()


TRACKERS: Mapping[TrackerName, type[Tracker]] = {"wandb": Wandb, "trackio": Trackio}


def check_installed(names: Sequence[TrackerName]) -> None:
    """Checks that the trackers' packages are here, without importing them.

    Raises:
      ImportError: one is not; the message names the extra that installs it.
    """
    for name in names:
        found = importlib.util.find_spec(name)
        # A folder ./wandb, which wandb makes, is found too, without a file of its own.
        if found is None or found.origin is None:
            raise ImportError(
                f"--track {name} needs the package {name}: pip install "
                f"'lowrank-optax[{name}]'"
            )
