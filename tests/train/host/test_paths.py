"""Data and run folders that a URL names, in the memory of the test."""

import gzip
import json
import lzma
from dataclasses import replace

import fsspec
import matplotlib.image
import numpy as np
import pytest
from upath import UPath

from train.config.command_line import parse
from train.config.config import Config, from_json
from train.config.resolve import resolve
from train.data.dataset import DataConfig, open_data
from train.data.files import find_files, read_file, read_range
from train.data.fingerprint import of_files
from train.data.token_files import open_tokens
from train.host.atomic import Appender, check_writable, write_bytes
from train.host.paths import move_folder, run_folder, to_path
from train.records.metrics import MetricsWriter, read_metrics
from train.records.plots import draw_run
from train.run.folder import check_folder, own_folder, resumed_if_there
from train.run.stored import run_and_step

TEXTS = [f"Speech {i}: " + "the people of the union " * 9 for i in range(40)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


@pytest.fixture
def bucket():
    memory = fsspec.filesystem("memory")
    yield to_path("memory://bucket")
    memory.rm("/", recursive=True)


def config_of(*argv: str) -> Config:
    return resolve(parse(Config, "", argv, "python -m train"))


def test_what_is_no_url_is_a_path(tmp_path):
    assert to_path(str(tmp_path)) == tmp_path
    assert to_path("~/x").is_absolute()
    assert isinstance(to_path("memory://bucket/x"), UPath)
    assert run_and_step("memory://bucket/run@30") == (
        to_path("memory://bucket/run"),
        30,
    )


def test_a_url_that_cannot_be_used_is_a_sentence(monkeypatch):
    with pytest.raises(ValueError, match="no store is named ftpx://; give a path"):
        to_path("ftpx://bucket/x")
    with pytest.raises(ValueError, match=r"in a folder or in gs://; .* or mount"):
        run_folder("s3://bucket/run")

    def missing(scheme: str) -> None:
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(
        ValueError, match=r"gcsfs; pip install 'lowrank-optax\[cloud\]'"
    ):
        to_path("gs://bucket/x")


def batches(source: str, cache: str) -> list[np.ndarray]:
    data = open_data(
        DataConfig(source=source, cache_dir=cache),
        seq_len=16,
        batch_size=4,
        vocab_size=300,
    )
    train = iter(data.train)
    return [next(train)["tokens"] for _ in range(3)]


def test_text_is_read_from_a_bucket_as_from_a_disk(bucket, tmp_path):
    names = ["a.jsonl.gz", "b.jsonl.gz"]
    for folder in tmp_path, bucket:
        for name in names:
            (folder / name).write_bytes(gzip.compress(LINES))
    there = [path.name for path in find_files(f"{bucket}/*.gz")]
    assert there == names
    assert find_files(f"{bucket}/a*.gz, {bucket}/*.gz")[0].name == "a.jsonl.gz"
    assert read_file(bucket / names[0]) == LINES
    local = batches(f"{tmp_path}/*.gz", str(tmp_path))
    np.testing.assert_array_equal(batches(f"{bucket}/*.gz", str(tmp_path)), local)


@pytest.mark.parametrize("name", ["t.u16", "t.u32", "t.npy", "t.u16.xz"])
def test_tokens_are_read_from_a_bucket_as_from_a_disk(bucket, tmp_path, name):
    tokens = np.arange(5000, dtype=np.uint32 if "u32" in name else np.uint16) % 300
    file = tmp_path / name
    if name.endswith("npy"):
        np.save(file, tokens)
    elif name.endswith("xz"):
        file.write_bytes(lzma.compress(tokens.tobytes()))
    else:
        file.write_bytes(tokens.tobytes())
    (bucket / name).write_bytes(file.read_bytes())
    (span,), size = open_tokens(f"{bucket}/{name}")
    assert (span.stop, size) == (5000, 300)
    np.testing.assert_array_equal(span.file[700:1300], tokens[700:1300])


def test_tokens_that_are_cut_short_in_a_bucket_are_a_sentence(bucket):
    path = bucket / "t.u16"
    path.write_bytes(bytes(2000))
    (span,), _ = open_tokens(str(path), vocab_size=300)
    path.write_bytes(bytes(1000))
    with pytest.raises(ValueError, match="has 1000 bytes, but had at least 2000"):
        span.file[900:1000]
    path.unlink()
    with pytest.raises(ValueError, match=r"t\.u16 cannot be read"):
        span.file[0:10]


def test_a_bucket_without_the_file_is_a_sentence(bucket):
    with pytest.raises(FileNotFoundError, match="check the bucket and the name"):
        find_files(f"{bucket}/*.txt")


def test_data_may_move_from_a_disk_into_a_bucket(bucket, tmp_path):
    for folder in tmp_path / "data", bucket / "other" / "place":
        for name in "x.txt", "y.txt":
            path = folder / "sub" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(name.encode() * 90_000)
    local = of_files(find_files(f"{tmp_path}/data/**/*.txt"))
    assert of_files(find_files(f"{bucket}/other/place/**/*.txt")) == local
    assert [part["name"] for part in local["parts"]] == ["x.txt", "y.txt"]


def test_a_range_ends_where_the_file_does(bucket, tmp_path):
    for folder in tmp_path, bucket:
        (folder / "x").write_bytes(b"0123456789")
        assert read_range(folder / "x", 3, 6) == b"345"
        assert read_range(folder / "x", 8, 99) == b"89"


def test_an_object_is_written_whole_or_not_at_all(bucket, monkeypatch):
    write_bytes(bucket / "x", b"one")
    appender = Appender(bucket / "x", size=2)
    appender.append(b"x")
    assert (bucket / "x").read_bytes() == b"onx"

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("the service\nis away")

    with monkeypatch.context() as patch:
        patch.setattr(type(bucket.fs), "pipe_file", refuse)
        patch.setattr(type(bucket.fs), "_open", refuse)
        with pytest.raises(OSError, match="the service is away"):
            appender.append(b"lost")
    appender.append(b"y")
    assert (bucket / "x").read_bytes() == b"onxy"
    assert Appender(bucket / "x")._whole == b"onxy"


def test_a_run_in_a_bucket_leaves_what_one_on_a_disk_does(bucket, capsys):
    folder = bucket / "run"
    for life, steps in enumerate(([1, 2, 3], [3, 4])):
        with MetricsWriter(folder, steps[0] - 1) as writer:
            for step in steps:
                writer.write({"step": step, "loss": float(10 * life + step)})
    records = read_metrics(folder)
    assert [r["loss"] for r in records] == [1, 2, 13, 14]
    assert len([*(folder / "tensorboard").glob("events*")]) >= 1
    draw_run(records, folder / "loss.png", "a run")
    with (folder / "loss.png").open("rb") as file:
        assert matplotlib.image.imread(file).shape[2] == 4
    assert capsys.readouterr().err == ""


def test_a_folder_in_a_bucket_belongs_to_one_run(bucket, capsys):
    config = replace(config_of("--resume-or-start"), out=bucket / "run")
    check_writable(config.out)
    assert not (bucket / "run").exists()
    first = resumed_if_there(config)
    check_folder(first)
    with own_folder(first, {"source": None}):
        pass
    assert "there are no locks: see to it yourself" in capsys.readouterr().out
    assert from_json((bucket / "run" / "config.json").read_text()) == first
    again = resumed_if_there(config)
    assert again.resume
    check_folder(again)
    with pytest.raises(FileExistsError, match="holds a run already"):
        check_folder(first)


def test_a_bucket_that_cannot_be_written_to_is_a_sentence(bucket, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("403")

    monkeypatch.setattr(type(bucket.fs), "pipe_file", refuse)
    monkeypatch.setattr(type(bucket.fs), "_open", refuse)
    with pytest.raises(PermissionError, match=r"\(403\); check its name and your"):
        check_writable(bucket / "run")


def test_a_folder_is_moved_whole(tmp_path):
    for life in "one", "two":
        (tmp_path / "from" / "sub").mkdir(parents=True)
        (tmp_path / "from" / "sub" / life).write_text(life)
        move_folder(tmp_path / "from", tmp_path / "aside" / "7")
    assert [path.name for path in (tmp_path / "aside" / "7" / "sub").iterdir()] == [
        "two"
    ]
    assert not (tmp_path / "from").exists()
