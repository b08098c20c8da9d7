"""Writes files so that none is ever half written, on a full disk or in a crash."""

import errno
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from upath import UPath

from train.host.paths import AnyPath


def write_text(path: AnyPath, text: str) -> None:
    """`write_bytes`, in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: AnyPath, content: bytes) -> None:
    """Writes all of a file or, after an OSError, nothing.

    A file gets another name first, and then replaces what is there. A bucket replaces a
    complete object by itself.
    """
    if isinstance(path, UPath):
        return _put(path, content)
    with written_whole(path) as file:
        file.write(content)


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the path's place if the block ends well.

    It is on the disk by then. Its name until then has the process' id in it, and ends
    in `.tmp`.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # which a write does not know
        raise


def _put(path: UPath, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except Exception as error:  # stores have classes of their own
        what = " ".join(str(error).split()) or type(error).__name__
        raise OSError(errno.EIO, what[:200], str(path)) from error


class Appender:
    """Appends all of a content to a file or, after an OSError, nothing.

    A bucket's object cannot be appended to: its content is held here, and written
    again.
    """

    def __init__(self, path: AnyPath, size: int | None = None) -> None:
        """Truncates the file, if there is one, after `size` bytes."""
        self.path = path
        self._size = 0
        self._whole = b""
        if isinstance(path, UPath):
            self._whole = path.read_bytes()[:size] if path.exists() else b""
        elif path.exists():
            self._size = path.stat().st_size if size is None else size
            os.truncate(path, self._size)

    def append(self, content: bytes) -> None:
        if isinstance(self.path, UPath):
            _put(self.path, self._whole + content)
            self._whole += content
        else:
            self._append(self.path, content)

    def _append(self, path: Path, content: bytes) -> None:
        with path.open("ab", buffering=0) as file:
            left = memoryview(content)
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                file.truncate(self._size)
                raise
        self._size += len(content)


def check_writable(folder: AnyPath) -> None:
    """OSError unless the folder can be made or written to; changes nothing."""
    if isinstance(folder, UPath):
        probe = folder / f"writable-{socket.gethostname()}-{os.getpid()}"
        try:
            write_bytes(probe, b"")
            probe.unlink()
        except OSError as error:
            raise PermissionError(
                f"out: {folder} cannot be written to ({error.strerror}); check its "
                "name and your credentials, or give another"
            ) from error
        return
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(
            f"out: {nearest} is a file, so {folder} cannot be a folder; give another"
        )
    try:
        tempfile.TemporaryDirectory(dir=nearest).cleanup()
    except OSError as error:
        raise PermissionError(
            f"out: {nearest} cannot be written to ({error.strerror}); give another"
        ) from error
