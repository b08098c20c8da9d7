"""What is wrong with a source is said with its path and the fix."""

import gzip
import json
import lzma
import sys

import numpy as np
import pytest

from train.data import DataConfig, open_data


def open_files(folder, pattern: str, **options):
    config = {name: options.pop(name) for name in list(options) if name in FIELDS}
    options = {"seq_len": 8, "batch_size": 2, "vocab_size": 300} | options
    source = ",".join(str(folder / name) for name in pattern.split(","))
    cache = str(folder / "cache")
    return open_data(DataConfig(source=source, cache_dir=cache, **config), **options)


FIELDS = DataConfig.__dataclass_fields__
TOKENS = np.arange(200, dtype="<u2").tobytes()
BAD_FILES = {
    "empty.txt": (b"", "is empty"),
    "latin.txt": ("é".encode("latin-1"), "not UTF-8"),
    "empty.jsonl": (b"", "is empty"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2: not valid JSON"),
    "blank.jsonl": (b'{"text": "a"}\n\n{"text": "b"}\n', "line 2: not valid JSON"),
    "field.jsonl": (b'{"text": "a"}\n{"body": "b"}\n', r"line 2: no text .*'body'"),
    "number.jsonl": (b'{"text": 3}\n', "line 1: no text in field 'text'"),
    "list.jsonl": (b"[1]\n", "line 1: no text in field 'text'"),
    "half.jsonl": (b'{"text": "\\ud800"}\n', "line 1: half a surrogate"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 99)[:-9], "cannot be read"),
    "not.jsonl.gz": (b'{"text": "a"}\n', "cannot be read"),
    "cut.u16.xz": (lzma.compress(TOKENS)[:-20], "cannot be read"),
    "not.u16.xz": (TOKENS, "cannot be read"),
    "odd.u16": (TOKENS[:-1], "399 bytes, not a multiple of 2"),
    "odd.bin": (TOKENS[:-1], "399 bytes, not a multiple of 2"),
    "odd.u32": (TOKENS[:-2], "398 bytes, not a multiple of 4"),
    "odd.u16.xz": (lzma.compress(TOKENS[:-1]), "399 bytes, not a multiple of 2"),
    "empty.u16": (b"", "is empty"),
    "empty.u32.xz": (lzma.compress(b""), "is empty"),
    "not.npy": (TOKENS, "cannot be read as .npy"),
    "large.u16": (TOKENS + b"\x2c\x01", "token id 300, outside the vocabulary of 300"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_named(tmp_path, name):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        open_files(tmp_path, name)
    assert str(tmp_path / name) in str(raised.value)


@pytest.mark.parametrize(
    "array", [np.zeros((4, 50), np.uint16), np.zeros(200, np.int64), np.zeros(0, "u2")]
)
def test_npy_must_be_a_vector_of_unsigned_ids(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(
        ValueError, match=r"a\.npy holds .* expected a non-empty vector"
    ):
        open_files(tmp_path, "a.npy")


@pytest.mark.parametrize("name", ["nothing.txt", "*.jsonl", "."])
def test_no_file_matches(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="no file matches"):
        open_files(tmp_path, name)


@pytest.mark.parametrize("names", ["a.pdf", "a.txt,a.u16", "a.npy.xz"])
def test_unknown_or_mixed_suffixes(tmp_path, names):
    for name in names.split(","):
        (tmp_path / name).write_bytes(TOKENS)
    with pytest.raises(ValueError, match=r"expected"):
        open_files(tmp_path, names)


def test_too_little_text_for_a_batch(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    with pytest.raises(ValueError, match=r"4 tokens .* at least 16 are needed"):
        open_files(tmp_path, "*.txt")


def test_too_few_windows_for_a_batch(tmp_path):
    np.arange(200, dtype="<u2").tofile(tmp_path / "a.u16")
    with pytest.raises(ValueError, match=r"192 tokens in 24 documents or windows"):
        open_files(tmp_path, "a.u16", batch_size=25)
    with pytest.raises(ValueError, match=r"0 tokens"):
        open_files(tmp_path, "a.u16", seq_len=300)


def test_one_document_cannot_be_split(tmp_path):
    (tmp_path / "a.txt").write_text("the only one")
    with pytest.raises(ValueError, match="single document"):
        open_files(tmp_path, "a.txt")


def test_eval_source_must_be_apart_and_of_the_same_kind(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 99)
    np.arange(200, dtype="<u2").tofile(tmp_path / "a.u16")
    with pytest.raises(ValueError, match=r"b\.txt is in both"):
        open_files(tmp_path, "*.txt", eval_source=str(tmp_path / "b.txt"))
    with pytest.raises(ValueError, match=r"is text but the source is tokens"):
        open_files(tmp_path, "a.u16", eval_source=str(tmp_path / "a.txt"))
    with pytest.raises(ValueError, match=r"a\.u16 is not a text file"):
        open_files(tmp_path, "*.txt", eval_source=str(tmp_path / "a.u16"))
    with pytest.raises(ValueError, match="sotu is in both"):
        open_data(DataConfig(eval_source="sotu"), seq_len=8, batch_size=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"process_count": 4}, "batch_size 2 must be a positive multiple of the 4"),
        ({"batch_size": 0}, "batch_size 0 must be a positive multiple"),
        ({"process_index": 1}, "process_index 1 is not below 1"),
        ({"seq_len": 1}, "seq_len 1"),
        ({"eval_fraction": 0.0}, "eval_fraction 0.0 must be above 0"),
        ({"eval_fraction": 0.6}, "eval_fraction 0.6 must be above 0 and at most 0.5"),
        ({"vocab_size": None}, "give a vocab_size"),
        ({"vocab_size": 256}, "vocab_size 256 is too small"),
    ],
)
def test_bad_arguments(tmp_path, options, message):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 99)
    with pytest.raises(ValueError, match=message):
        open_files(tmp_path, "*.txt", **options)


def test_packages_that_are_missing_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"lowrank-optax\[tfds\]"):
        open_data(DataConfig(source="tfds:c4/en"), seq_len=8, batch_size=2)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"lowrank-optax\[train\]"):
        open_data(DataConfig(), seq_len=8, batch_size=2)


def test_tfds_without_a_prepared_copy(tmp_path):
    config = DataConfig(source="tfds:c4/en", data_dir=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"'c4/en' in .*array_record") as raised:
        open_data(config, seq_len=8, batch_size=2)
    assert str(tmp_path) in str(raised.value)


def test_a_good_jsonl_shard_opens(tmp_path):
    """The files above fail for the reason tested, not for another."""
    lines = "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(9))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    batch = next(iter(open_files(tmp_path, "a.jsonl.gz").train))
    assert batch["tokens"].shape == (2, 8)
