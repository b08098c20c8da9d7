"""Reads what wandb has written offline: records of protocol buffers in a log."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEADER, BLOCK = 7, 32 * 1024
WHOLE, LAST = 1, 4


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file, which is laid out as LevelDB lays out its log.

    After the file's own header, blocks of 32 KiB hold pieces of records: a checksum,
    the length, the kind (a whole record, or its first, middle or last piece), and the
    bytes themselves.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, record = path.read_bytes(), HEADER, b""
    while at + HEADER <= len(content):
        if (left := BLOCK - at % BLOCK) < HEADER:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + HEADER])
        at += HEADER
        record += content[at : at + length]
        at += length
        if kind in (WHOLE, LAST):
            yield Record.FromString(record)
            record = b""
