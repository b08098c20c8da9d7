"""The trackers of a run, from its config: `--track wandb trackio`."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import jax
from upath import UPath

from train.config.config import Config, resolved, to_json
from train.host.agreement import agree
from train.host.console import warn
from train.host.paths import AnyPath
from train.records.tracking import Sent, Tracking, new, read_sent

OF_THE_PROCESS = ("processes", "resume", "resume_or_start", "resume_from")


@contextmanager
def tracked(config: Config) -> Iterator[list[Tracking]]:
    """The trackers of a resolved config's run, until the block ends.

    Process 0 alone has any. A run that goes on goes on with the tracked run too. It
    begins another if the project is another, or if the tracked run has later steps than
    `resume_from`, as these may be taken in another way now.

    Raises:
      OSError: a tracker of a new run did not start. A resumed run warns and goes on
        without it, as nobody may be there: when it is resumed again, the tracker gets
        what it missed.
      LostProcessError: on the other processes, if process 0 raises that.
    """
    report, folder = config.report, resolved(config, "out")
    options = {
        name: value
        for name, value in json.loads(to_json(config)).items()
        if name not in OF_THE_PROCESS
    }
    with ExitStack() as stack:
        trackers: list[Tracking] = []
        problem = None
        for name in dict.fromkeys(report.track) if jax.process_index() == 0 else ():
            try:
                sent = read_sent(folder, name) if config.resume else None
                if sent is None or not _goes_on(config, sent):
                    sent = new(report.track_project)
                tracker = Tracking(name, folder, _title(folder), options, sent)
            except (OSError, ValueError) as error:
                if not config.resume:
                    problem = OSError(
                        f"--track {name}: {error}; put that right and go on by "
                        "--resume, or go on without trackers by --resume --track, "
                        "which names none"
                    )
                    break
                warn(f"{error}; the run goes on without it")
            else:
                trackers.append(stack.enter_context(tracker))
        agree(problem, ends=True)
        yield trackers


def _goes_on(config: Config, sent: Sent) -> bool:
    earlier = config.resume_from is not None and config.resume_from < sent.step
    return sent.project == config.report.track_project and not earlier


def _title(folder: AnyPath) -> str:
    """The folder's own name, of "." too."""
    return folder.name if isinstance(folder, UPath) else folder.resolve().name
