"""Writing files so that none is ever half written, on a full disk or in a crash."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """All of a file or nothing, under another name first; OSError leaves it as it was.

    What is there is never written to.
    """
    part = path.with_name(path.name + ".tmp")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


class Appender:
    """Appends to a file all of a content, or after an OSError nothing."""

    def __init__(self, path: Path, size: int | None = None) -> None:
        """Cut the file off after `size` bytes, if there is one."""
        self.path = path
        self._size = 0
        if path.exists():
            self._size = path.stat().st_size if size is None else size
            os.truncate(path, self._size)

    def append(self, content: bytes) -> None:
        with self.path.open("ab", buffering=0) as file:
            left = memoryview(content)
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                file.truncate(self._size)
                raise
        self._size += len(content)
