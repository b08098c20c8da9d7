"""Output whose loss ends nothing: a full disk, a reader that is gone."""

import io
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


def keep_output() -> None:
    """Makes the output and the error output such that no write to them raises an error.

    What cannot be written is dropped, be it printed here, or by a bar, a warning or a
    traceback; a letter that the encoding lacks is escaped. An output that is closed is
    opened as none: the next file would take its number, and what libraries print there.
    Outputs that were replaced already, as by a test, are left alone.
    """
    for number in range(3):
        _open_if_closed(number)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            nowhere = open(os.devnull, "w", errors="backslashreplace")  # noqa: SIM115
            setattr(sys, name, nowhere)
        elif stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _kept(stream))


def _open_if_closed(number: int) -> None:
    try:
        os.fstat(number)
    except OSError:
        opened = os.open(os.devnull, os.O_RDWR)  # the lowest that is free: this one
        os.set_inheritable(opened, True)


def _kept(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    with suppress(OSError):
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Dropping(stream.fileno(), "wb", closefd=False)),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Dropping(io.FileIO):
    """Takes all that is written to it, and drops what cannot be written."""

    def write(self, content: "ReadableBuffer", /) -> int:
        written = None
        with suppress(OSError):
            written = super().write(content)
        return memoryview(content).nbytes if written is None else written
