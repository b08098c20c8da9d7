"""The place of a run: the same folder as before, and the same for all processes."""

import os
import time
from collections.abc import Iterable
from pathlib import Path

import jax
from etils import epath
from upath import UPath

from train.host.agreement import agree
from train.host.atomic import write_bytes
from train.host.paths import AnyPath

SEEN_WITHIN_S = 10
"""Seconds until what one host writes is seen by all, at most."""

ONE_FOLDER = "--out must be one folder that all processes see"


class MovedError(Exception):
    """The folder of a run was moved, replaced or removed while the run went on."""


class Place:
    """A run's folder on this machine, held open: it is known again under its name."""

    def __init__(self, folder: AnyPath) -> None:
        self._folder = folder
        self._has_config = self._config_is_there()
        self._held = None if isinstance(folder, UPath) else os.open(folder, os.O_RDONLY)

    def check(self) -> None:
        """MovedError unless the folder's name still names it, with what was in it."""
        if self._held is None:
            return
        try:
            same = os.path.samestat(os.stat(str(self._folder)), os.fstat(self._held))
        except OSError:
            same = False
        if same and self._has_config and not self._config_is_there():
            raise MovedError(
                f"{self._folder}/config.json was removed, without which the run cannot "
                "be resumed; steps since its last checkpoint are lost"
            )
        if not same:
            raise MovedError(
                f"{self._folder} is no longer this run's folder, which "
                f"{self._fate(self._held)}; steps since its last checkpoint are lost"
            )

    def _config_is_there(self) -> bool:
        return (self._folder / "config.json").exists()

    def _fate(self, held: int) -> str:
        """Says what became of it; only Linux knows the new name of an open folder."""
        try:
            now = Path(os.readlink(f"/proc/self/fd/{held}"))
        except OSError:
            return "was moved or removed: go on by --resume with --out as it is now"
        if not now.exists():
            return "was removed"
        return f"was moved: go on by --resume --out {now}"

    def close(self) -> None:
        if self._held is not None:
            os.close(self._held)
            self._held = None


def check_shared(folder: AnyPath, name: str) -> None:
    """Checks on all processes whether each sees what process 0 writes in the folder.

    It writes a file of this name, which must be a new one, and removes it. One process
    alone does so on its own machine: orbax would wait for a folder that cannot be made.

    Raises:
      OSError: process 0 cannot write, or this process does not see it.
      ElsewhereError: so it is on another process.
    """
    if jax.process_count() == 1 and isinstance(folder, UPath):
        return
    mark, problem = folder / name, None
    try:
        if jax.process_index() == 0:
            write_bytes(mark, bytes(4096))
    except OSError as error:
        problem = error
    agree(problem)
    lacks = f"what process 0 writes in {folder} is not seen here: {ONE_FOLDER}"
    try:
        agree(None if _appears(mark) else FileNotFoundError(lacks))
    finally:
        if jax.process_index() == 0:
            mark.unlink(missing_ok=True)


def _appears(path: AnyPath) -> bool:
    end = time.monotonic() + SEEN_WITHIN_S
    while not (seen := path.exists()) and time.monotonic() < end:
        time.sleep(0.1)
    return seen


def remove_all(paths: Iterable[Path | epath.Path]) -> None:
    """Removes folders, and links and files that have taken their names."""
    for path in paths:
        if path.is_dir() and not Path(path).is_symlink():
            epath.Path(path).rmtree(missing_ok=True)
        else:
            path.unlink(missing_ok=True)
