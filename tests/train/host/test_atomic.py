"""Files that are whole, whatever the disk does: here it takes no more than a limit."""

import json
import resource
import struct
from contextlib import contextmanager

import pytest
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from train.host.atomic import Appender, write_text
from train.records.metrics import MetricsWriter, read_metrics


@contextmanager
def no_file_longer_than(size: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_append_is_whole_or_not_at_all(tmp_path):
    file = Appender(tmp_path / "a")
    file.append(b"x" * 60)
    with no_file_longer_than(100), pytest.raises(OSError, match="large"):
        file.append(b"y" * 60)
    assert (tmp_path / "a").read_bytes() == b"x" * 60
    file.append(b"z" * 60)
    assert (tmp_path / "a").read_bytes() == b"x" * 60 + b"z" * 60
    Appender(tmp_path / "a", 30).append(b"end")
    assert (tmp_path / "a").read_bytes() == b"x" * 30 + b"end"


def test_a_file_is_replaced_whole_or_stays(tmp_path):
    path = tmp_path / "a.json"
    write_text(path, "before")
    with no_file_longer_than(100), pytest.raises(OSError, match="large"):
        write_text(path, "y" * 200)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    write_text(path, "after")
    assert path.read_text() == "after"


def events(folder) -> list:
    """Every event of every file, each with its checksums right."""
    found = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            length = content[:8]
            end = 12 + struct.unpack("<Q", length)[0]
            parts = (length, content[8:12]), (content[12:end], content[end : end + 4])
            for part, crc in parts:
                assert struct.unpack("<I", crc)[0] == masked_crc32c(part)
            found.append(event_pb2.Event.FromString(content[12:end]))
            content = content[end + 4 :]
    return found


def test_metrics_wait_for_room_and_nothing_is_lost(tmp_path, capsys):
    with MetricsWriter(tmp_path, 0) as writer:
        writer.write({"step": 1, "loss": 2.0})
        sizes = [p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()]
        with no_file_longer_than(min(sizes) + 10):
            writer.write({"step": 2, "loss": 3.0})
            writer.write({"step": 3, "loss": float("nan")})
        assert [r["step"] for r in read_metrics(tmp_path)] == [1]
        writer.write({"step": 4, "loss": 5.0})
    told = capsys.readouterr().err
    assert told.count("metrics.jsonl cannot be written (File too large)") == 1
    assert told.count("tensorboard cannot be written (File too large)") == 1
    losses = [(r["step"], r["loss"]) for r in read_metrics(tmp_path)]
    assert losses == [(1, 2.0), (2, 3.0), (3, None), (4, 5.0)]
    shown = [
        (e.step, value.simple_value)
        for e in events(tmp_path / "tensorboard")
        for value in e.summary.value
    ]
    assert shown == [(1, 2.0), (2, 3.0), (4, 5.0)]


def test_metrics_that_find_no_room_are_named(tmp_path, capsys):
    with no_file_longer_than(0), MetricsWriter(tmp_path, 0) as writer:
        writer.write({"step": 1, "loss": 2.0})
    assert "metrics.jsonl lacks the records of the steps [1]" in capsys.readouterr().err


def test_a_bad_line_is_no_record_and_blocks_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = [{"step": step, "loss": 1.0} for step in (1, 2, 3)]
    first, second, third = (json.dumps(record).encode() + b"\n" for record in good)
    bad = b'{"step": 2, "lo\n\xff\xfe\n[1]\n{"step": "x"}\n' + b"[" * 100_000 + b"\n"
    path.write_bytes(first + bad + second + third + b'{"step": 4')
    assert read_metrics(tmp_path) == good
    with MetricsWriter(tmp_path, 2):
        pass
    assert path.read_bytes() == first + bad + second
