"""Whether what a run reads has changed since it stopped is told, and what of it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from tests.helpers.text_files import write_tfds
from train.data.dataset import DataConfig, open_data
from train.data.fingerprint import changed

BYTES = 400_000
"""In a file of tokens: more than is looked at."""


def write(path: Path, seed: int, count: int = BYTES // 2) -> None:
    np.random.default_rng(seed).integers(0, 300, count, "<u2").tofile(path)


@pytest.fixture
def folder(tmp_path):
    """Three files to train on, one to evaluate on, and a tokenizer."""
    here = tmp_path / "here"
    here.mkdir()
    for index in range(3):
        write(here / f"part-{index}.u16", index)
    write(here / "held.bin", 9)
    write_tokenizer(here, "a")
    return here


def write_tokenizer(folder: Path, first: str) -> None:
    letters = [first, *(chr(code) for code in range(200, 499))]
    vocabulary = {letter: i for i, letter in enumerate([*letters, "</s>"])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


def fingerprint(folder: Path, **config) -> dict:
    """As a checkpoint would keep it."""
    given = {
        "source": f"{folder}/part-*.u16",
        "eval_source": f"{folder}/held.bin",
        "tokenizer": f"{folder}/tokenizer.json",
    }
    data = open_data(DataConfig(**(given | config)), seq_len=16, batch_size=4)
    return json.loads(json.dumps(data.fingerprint))


def test_another_folder_or_process_is_no_change(folder, tmp_path):
    stored = fingerprint(folder)
    assert changed(stored, fingerprint(folder)) == []
    shutil.copytree(folder, tmp_path / "there")
    shutil.rmtree(folder)
    assert changed(stored, fingerprint(tmp_path / "there")) == []
    assert str(tmp_path) not in json.dumps(stored)


@pytest.mark.parametrize("place", [0, BYTES // 2, BYTES - 2])
def test_one_byte(folder, place):
    stored = fingerprint(folder)
    path = folder / "part-1.u16"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    (difference,) = changed(stored, fingerprint(folder))
    assert difference.startswith("source: part-1.u16: sha256 ")


def test_files_added_removed_cut_and_exchanged(folder):
    def told() -> str:
        return "; ".join(changed(stored, fingerprint(folder)))

    stored = fingerprint(folder)
    write(folder / "part-3.u16", 3, 50)
    assert told() == (
        "source: tokens 600000 there, 600050 here; source: files 3 there, 4 here; "
        "source: bytes 1200000 there, 1200100 here; source: part-3.u16 is only here"
    )
    (folder / "part-3.u16").unlink()
    assert told() == ""
    (folder / "part-0.u16").rename(folder / "part-7.u16")
    assert told() == (
        "source: part-0.u16 is only there; source: part-7.u16 is only here"
    )
    (folder / "part-1.u16").rename(folder / "part-0.u16")
    (folder / "part-7.u16").rename(folder / "part-1.u16")
    exchanged = changed(stored, fingerprint(folder))
    assert [text[:26] for text in exchanged] == [
        f"source: part-{index}.u16: sha256"[:26] for index in range(2)
    ]
    write(folder / "part-2.u16", 2, 100_000)
    assert "source: part-2.u16: bytes 400000 there, 200000 here" in told()


def test_another_order_of_the_same_files(folder):
    names = [f"{folder}/part-{index}.u16" for index in (2, 0, 1)]
    stored, now = fingerprint(folder), fingerprint(folder, source=",".join(names))
    assert changed(stored, now) == ["source: the files come in another order"]


def test_files_of_one_name_in_two_folders(folder):
    for name in "ab":
        (folder / name).mkdir()
        write(folder / name / "0.u16", 0, 50)
    stored = fingerprint(folder, source=f"{folder}/?/0.u16")
    write(folder / "a/0.u16", 1, 50)
    (difference,) = changed(stored, fingerprint(folder, source=f"{folder}/?/0.u16"))
    assert difference.startswith("source: a/0.u16: sha256 ")


def test_a_tokenizer_of_the_same_size(folder):
    stored = fingerprint(folder)
    write_tokenizer(folder, "b")
    now = fingerprint(folder)
    assert stored["tokenizer"]["vocab_size"] == now["tokenizer"]["vocab_size"] == 301
    digests = [x["tokenizer"]["sha256"][:12] for x in (stored, now)]
    assert changed(stored, now) == [
        f"tokenizer: sha256 {digests[0]} there, {digests[1]} here"
    ]
    assert changed(stored, fingerprint(folder, tokenizer=None)) == [
        "tokenizer: one there, none here"
    ]


def test_the_eval_source(folder):
    stored = fingerprint(folder)
    assert changed(fingerprint(folder, eval_source=None), stored) == [
        "eval_source: none there, one here"
    ]
    write(folder / "held.bin", 10)
    (difference,) = changed(stored, fingerprint(folder))
    assert difference.startswith("eval_source: held.bin: sha256 ")


def test_many_files_are_told_together(folder):
    for index in range(3, 120):
        write(folder / f"part-{index}.u16", index, 20)
    stored = fingerprint(folder)
    assert len(json.dumps(stored)) < 2000
    write(folder / "part-70.u16", 0, 20)
    (difference,) = changed(stored, fingerprint(folder))
    assert difference.startswith("source: sha256 ")


def test_many_differences_are_counted(folder):
    stored = fingerprint(folder)
    for index in range(3, 20):
        write(folder / f"part-{index}.u16", index, 20)
    assert changed(stored, fingerprint(folder))[-1] == "source: 12 more differences"


def test_text(tmp_path):
    """Of text the trained tokenizer changes with it."""
    for index in range(6):
        (tmp_path / f"{index}.txt").write_text(f"text {index} and more " * 9)

    def now() -> dict:
        config = DataConfig(f"{tmp_path}/*.txt", cache_dir=str(tmp_path / "cache"))
        data = open_data(config, seq_len=8, batch_size=2, vocab_size=270)
        return json.loads(json.dumps(data.fingerprint))

    stored = now()
    assert stored["source"]["documents"] == stored["source"]["files"] == 6
    assert changed(stored, now()) == []
    (tmp_path / "0.txt").write_text("text X and more " * 9)
    source, tokenizer = changed(stored, now())
    assert source.startswith("source: 0.txt: sha256 ")
    assert tokenizer.startswith("tokenizer: sha256 ")


def test_tfds_records(tmp_path):
    write_tfds(tmp_path)

    def now(split: str) -> dict:
        config = DataConfig(
            f"tfds:c4/en@{split}", data_dir=str(tmp_path), cache_dir=str(tmp_path)
        )
        data = open_data(config, seq_len=8, batch_size=2, vocab_size=270)
        return json.loads(json.dumps(data.fingerprint))

    stored = now("train[:40]")
    assert stored["source"]["data_set"] == "c4/en/3.1.0"
    assert changed(stored, now("train[:40]")) == []
    name = "c4-train.array_record-00000-of-00001"
    assert changed(stored, now("train[:41]"))[:3] == [
        "source: documents 40 there, 41 here",
        f"source: {name}, records 0 to 39, is only there",
        f"source: {name}, records 0 to 40, is only here",
    ]
    assert changed(now("train[:9]+train[20:]"), now("train[:9]+train[20:59]"))[1:3] == [
        f"source: {name}, records 20 to 59, is only there",
        f"source: {name}, records 20 to 58, is only here",
    ]
