"""The folder of a run: whether a run may use it, one run at a time."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import filelock
import jax
from jax.experimental import multihost_utils
from upath import UPath

from train.config.agreement import check_same_run
from train.config.config import Config, resolved, to_json
from train.data.fingerprint import Fingerprint, changed, read_fingerprint
from train.host.atomic import write_text
from train.host.console import say
from train.host.paths import AnyPath
from train.run.stored import read_config


@contextmanager
def own_folder(config: Config, fingerprint: Fingerprint) -> Iterator[None]:
    """Reserves a resolved config's folder for this run until the block ends.

    It stores the config and the fingerprint of the data, which identify a run that is
    resumed. The lock is the operating system's (flock): that of a dead process is free.
    On NFS it is as good as the server's locks (not tried); in a bucket, and on a file
    system without locks, two runs are not kept apart, and a line says so. Process 0
    acts for all.

    Args:
      config: of the run.
      fingerprint: of its data (`Data.fingerprint`).

    Raises:
      BlockingIOError: another run is at work in the folder.
      OSError, ValueError: as `check_folder`; or `resume`, but the data has changed.
    """
    problem: Exception | None = None
    with ExitStack() as stack:
        if jax.process_index() == 0:
            try:
                _enter(config, fingerprint, stack)
            except (OSError, ValueError) as error:
                problem = error
        if jax.process_count() > 1:
            entered = multihost_utils.broadcast_one_to_all(problem is None)
            if not entered and problem is None:
                problem = ValueError("process 0 may not work in the folder; see there")
        if problem is not None:
            raise problem
        yield
        if jax.process_count() > 1:  # the first has more to write than the others
            multihost_utils.sync_global_devices("done")


def _enter(config: Config, fingerprint: Fingerprint, stack: ExitStack) -> None:
    folder: AnyPath = resolved(config, "out")
    try:
        _lock(folder, stack)
    except filelock.Timeout as error:
        raise BlockingIOError(
            f"another run is at work in {folder}: wait for it or stop it, or give "
            "another folder to --out"
        ) from error
    except NotImplementedError:
        print(
            f"{folder} is where there are no locks: see to it yourself that no other "
            "run works in it"
        )
    check_folder(config)
    data = folder / "data.json"
    if config.resume:
        check_same_data(read_fingerprint(data), fingerprint, data)
    else:
        write_text(data, json.dumps(fingerprint, indent=2) + "\n")
    if not config.resume or _is_extended(read_config(folder), config):
        write_text(folder / "config.json", to_json(config))


def _is_extended(stored: Config, config: Config) -> bool:
    """Whether a run that goes on ends, or slows down, at another step."""
    decay = stored.optimizer.decay != config.optimizer.decay
    return decay or stored.steps != config.steps


def _lock(folder: AnyPath, stack: ExitStack) -> None:
    """Makes the folder and holds its lock; NotImplementedError if it has no locks."""
    if isinstance(folder, UPath):
        raise NotImplementedError
    folder.mkdir(parents=True, exist_ok=True)
    stack.enter_context(filelock.FileLock(folder / "lock", blocking=False))


def resumed_if_there(config: Config) -> Config:
    """Sets `resume` for `resume_or_start`: whether the folder holds a run."""
    if not config.resume_or_start:
        return config
    path = resolved(config, "out") / "config.json"
    there = path.exists()
    if jax.process_count() > 1:  # the first may have written it before another looks
        there = bool(multihost_utils.broadcast_one_to_all(there))
    say(f"{path.parent} holds {'a run: going on with it' if there else 'no run yet'}")
    return dataclasses.replace(config, resume=there or config.resume)


def check_folder(config: Config) -> None:
    """Checks whether a resolved config may run in its folder; changes nothing.

    Raises:
      FileExistsError: a new run, but the folder holds one already.
      FileNotFoundError: `resume`, but the folder holds no run, or a run without its
        config.
      ValueError: `resume`, but the run there has another configuration; the message
        names the fields.
    """
    path = resolved(config, "out") / "config.json"
    folder = path.parent
    left = [x for x in ("checkpoints", "metrics.jsonl") if (folder / x).exists()]
    if left and not path.exists():
        raise FileNotFoundError(
            f"{folder} has {' and '.join(left)} of a run, but no config.json that says "
            "which: put it back, or give another folder to --out"
        )
    if config.resume:
        if not path.exists():
            raise FileNotFoundError(
                f"{folder} holds no run to resume; leave out --resume to start one"
            )
        read_config(folder)
        check_same_run(json.loads(path.read_text()), json.loads(to_json(config)), path)
    elif path.exists() and jax.process_index() == 0:
        raise FileExistsError(
            f"{folder} holds a run already; go on with it by --resume, or give "
            "another folder to --out"
        )


def check_same_data(stored: Fingerprint, given: Fingerprint, path: AnyPath) -> None:
    """ValueError unless a run would read what it read before."""
    if differences := changed(stored, given):
        raise ValueError(
            "the data is not what the run began with; put that back, or start a new "
            f"run in another --out ({path} has what it was):\n  "
            + "\n  ".join(differences)
        )
