"""A run's curves for TensorBoard."""

import os
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any

from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar
from upath import UPath

from train.host.atomic import Appender
from train.host.paths import AnyPath
from train.records.tags import tag

Record = dict[str, Any]

Event: Any = event_pb2.Event  # type: ignore[attr-defined]  # made at run time
SessionLog: Any = event_pb2.SessionLog  # type: ignore[attr-defined]


class Board:
    """Writes records to an event file, each at once and by the thread that calls.

    (`tensorboardX.SummaryWriter` writes in a thread, which a full disk ends; the next
    record then waits forever.)
    """

    def __init__(self, folder: AnyPath, purge_step: int) -> None:
        """Discards what the folder's files have from `purge_step` on."""
        self.path = folder
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        self._file = Appender(folder / f"{name}.{os.getpid()}")
        start = SessionLog(status=SessionLog.START)
        self._head = [
            Event(wall_time=time.time(), file_version="brain.Event:2"),
            Event(wall_time=time.time(), step=purge_step, session_log=start),
        ]

    def append(self, records: Sequence[Record]) -> None:
        """Writes all records; OSError, and none is written, if there is no room."""
        if not isinstance(self.path, UPath):
            self.path.mkdir(parents=True, exist_ok=True)
        events = [*self._head, *map(_event, records)]
        self._file.append(b"".join(_framed(event) for event in events))
        self._head = []


def _event(record: Record) -> Any:
    event = Event(wall_time=time.time(), step=record["step"])
    for name, value in record.items():
        if name != "step" and value is not None:
            event.summary.value.extend(scalar(tag(name), value).value)
    return event


def _framed(event: Any) -> bytes:
    """An event as event files store it: length, content, and a checksum of each."""
    content = event.SerializeToString()
    length = struct.pack("<Q", len(content))
    parts = (
        (part, struct.pack("<I", masked_crc32c(part))) for part in (length, content)
    )
    return b"".join(part + crc for part, crc in parts)
