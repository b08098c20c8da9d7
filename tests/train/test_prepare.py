"""`python -m train.prepare`: the trainer's own tokens, however many make them."""

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import filelock
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

import train.data.tokenize_shards
import train.prepare
from tests.helpers.marks import slow_but
from tests.helpers.text_files import (
    TEXTS,
    lines_of,
    parquet_of,
    prepared,
    sources_of,
    t5_like,
    write_tfds,
    zstd,
)
from train.data.documents import open_documents
from train.data.text_formats import BadLines
from train.data.tokenizer import open_tokenizer
from train.prepare import PrepareConfig, main


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """A folder with shards of every kind, and a tokenizer."""
    folder = tmp_path_factory.mktemp("texts")
    for chunk in 1, 2:  # of one name, as SlimPajama's
        (folder / f"chunk{chunk}").mkdir()
        content = zstd.compress(lines_of(TEXTS[chunk * 7 : chunk * 7 + 9]))
        (folder / f"chunk{chunk}" / "example_train_0.jsonl.zst").write_bytes(content)
    for i in range(3):
        name = f"c4-train.{i:05d}-of-01024.json.gz"
        (folder / name).write_bytes(gzip.compress(lines_of(TEXTS[i * 9 : i * 9 + 9])))
        (folder / f"{i}.txt").write_text(TEXTS[i])
    (folder / "train-00000-of-00001.parquet").write_bytes(parquet_of(TEXTS[20:33]))
    t5_like(folder)
    return folder


def tokens_in(out: Path) -> np.ndarray:
    paths = sorted(out.glob("*.u16")) or sorted(out.glob("*.u32"))
    return np.concatenate(
        [np.fromfile(p, f"<{p.suffix[1]}{int(p.suffix[2:]) // 8}") for p in paths]
    )


def tokens_of(
    folder: Path, sources: Sequence[str], tokenizer: Path | None = None
) -> list:
    """As the trainer joins them."""
    own = open_tokenizer(tokenizer or folder / "spiece.model")
    documents = open_documents(",".join(sources), BadLines())
    return [i for text in documents for i in [*own.encode(text), own.eos_id]]


def content_of(out: Path, *names: str) -> dict[str, bytes]:
    """Of the token files, the tokenizer and the manifest."""
    names = names or ("*.u16", "tokenizer*", "manifest.json")
    return {path.name: path.read_bytes() for name in names for path in out.glob(name)}


def test_token_files_are_what_the_trainer_would_join(texts, tmp_path):
    manifest = prepared(texts, tmp_path)
    assert tokens_in(tmp_path).tolist() == tokens_of(texts, sources_of(texts))
    assert [path.name for path in sorted(tmp_path.glob("*.u16"))] == [
        *(f"{i:05d}-c4-train.{i:05d}-of-01024.u16" for i in range(3)),
        *(f"{i:05d}-example_train_0.u16" for i in (3, 4)),
        *("00005-0.u16", "00006-train-00000-of-00001.u16"),
    ]
    tokenizer = texts / "spiece.model"
    assert (tmp_path / "tokenizer.model").read_bytes() == tokenizer.read_bytes()
    assert manifest == json.loads((tmp_path / "manifest.json").read_text())
    totals = manifest["documents"], manifest["tokens"], manifest["skipped"]
    assert totals == (3 * 9 + 2 * 9 + 3 + 13, len(tokens_in(tmp_path)), 0)
    assert [row["documents"] for row in manifest["shards"]] == [9, 9, 9, 9, 9, 3, 13]
    assert manifest["tokenizer"]["eos_id"] == 1


def test_the_number_of_workers_changes_nothing(texts, tmp_path):
    for workers in 1, 2, 3:
        prepared(texts, tmp_path / str(workers), workers=workers)
    one, two, three = (content_of(tmp_path / str(workers)) for workers in (1, 2, 3))
    assert len(one) == 9
    assert one == two == three


def test_every_document_of_a_t5_like_tokenizer_ends_with_its_end_token(texts, tmp_path):
    """No begin token, and the end token is 1, as t5-base's."""
    prepared(texts, tmp_path, sources_of(texts)[:1])
    tokens = tokens_in(tmp_path)
    assert tokens[-1] == 1
    assert (tokens == 1).sum() == 27
    own = open_tokenizer(texts / "spiece.model")
    first = tokens[: int(np.flatnonzero(tokens == 1)[0])]
    assert own.decode(first.tolist()) == " ".join(TEXTS[0].split())


def test_many_words_need_wider_numbers(texts, tmp_path):
    for size, suffix in (2**16, ".u16"), (2**16 + 1, ".u32"):
        words = ["?", "</s>", *map(str, range(size - 2))]
        vocabulary = {word: i for i, word in enumerate(words)}
        tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        path = tmp_path / f"{size}.json"
        tokenizer.save(str(path))
        (tmp_path / "a.jsonl").write_bytes(lines_of([f"0 {size - 3}", "x"]))
        out = tmp_path / str(size)
        prepared(texts, out, [f"{tmp_path}/a.jsonl"], tokenizer=str(path))
        assert [p.suffix for p in out.glob("*.u*")] == [suffix]
        assert tokens_in(out).tolist() == [2, size - 1, 1, 0, 1]
        assert (out / "tokenizer.json").read_bytes() == path.read_bytes()


def test_records_of_tfds_are_shards_of_so_many(texts, tmp_path):
    write_tfds(tmp_path)
    options = {"data_dir": str(tmp_path), "records": 25}
    for workers in 1, 2:
        out = tmp_path / f"out{workers}"
        manifest = prepared(texts, out, ["tfds:c4/en"], workers=workers, **options)
        rows = manifest["shards"]
        assert [row["documents"] for row in rows] == [25, 25, 10]
        assert [row["file"] for row in rows] == [
            f"0000{i}-c4-en.{start}.u16" for i, start in enumerate((0, 25, 50))
        ]
    own = open_tokenizer(texts / "spiece.model")
    documents = open_documents("tfds:c4/en", BadLines(), data_dir=str(tmp_path))
    expected = [i for k in range(60) for i in [*own.encode(documents[k]), own.eos_id]]
    assert tokens_in(tmp_path / "out1").tolist() == expected
    assert content_of(tmp_path / "out1") == content_of(tmp_path / "out2")
    part = prepared(texts, tmp_path / "part", ["tfds:c4/en@train[:50%]"], **options)
    assert [row["documents"] for row in part["shards"]] == [25, 5]


def test_only_so_many_shards_and_documents(texts, tmp_path):
    manifest = prepared(texts, tmp_path / "a", shards=2, documents=4)
    assert [row["documents"] for row in manifest["shards"]] == [4, 4]
    own = open_tokenizer(texts / "spiece.model")
    taken = [*TEXTS[:4], *TEXTS[9:13]]
    expected = [i for text in taken for i in [*own.encode(text), own.eos_id]]
    assert tokens_in(tmp_path / "a").tolist() == expected
    with pytest.raises(ValueError, match="with another documents_of_a_shard: give the"):
        prepared(texts, tmp_path / "a", shards=2)
    more = prepared(texts, tmp_path / "a", shards=3, documents=4)  # the others are kept
    assert [row["documents"] for row in more["shards"]] == [4, 4, 4]


def test_small_texts_are_one_shard_up_to_a_size(texts, tmp_path, monkeypatch):
    sizes = [len(TEXTS[i].encode()) for i in range(3)]
    monkeypatch.setattr(train.data.tokenize_shards, "_SMALL_FILES", sizes[0] + sizes[1])
    sources = [f"{texts}/*.txt"]
    rows = prepared(texts, tmp_path, sources)["shards"]
    assert [row["documents"] for row in rows] == [2, 1]
    assert tokens_in(tmp_path).tolist() == tokens_of(texts, sources)


def times(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*.u16")}


def test_what_is_done_is_not_done_again(texts, tmp_path, capsys):
    prepared(texts, tmp_path, shards=4)
    before = times(tmp_path)
    prepared(texts, tmp_path)
    assert "4 of 7 shards are done already" in capsys.readouterr().out
    assert {name: times(tmp_path)[name] for name in before} == before
    prepared(texts, tmp_path / "whole")
    assert content_of(tmp_path) == content_of(tmp_path / "whole")
    before = times(tmp_path)
    prepared(texts, tmp_path, workers=3)
    assert times(tmp_path) == before


def test_a_shard_is_done_again_if_its_input_or_its_tokens_changed(texts, tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jsonl").write_bytes(lines_of(TEXTS[i : i + 5]))
    sources, out = [f"{tmp_path}/*.jsonl"], tmp_path / "out"
    prepared(texts, out, sources)
    before = times(out)
    (tmp_path / "1.jsonl").write_bytes(lines_of(TEXTS[30:35]))
    os.truncate(out / "00002-2.u16", 10)
    prepared(texts, out, sources)
    assert times(out)["00000-0.u16"] == before["00000-0.u16"]
    assert tokens_in(out).tolist() == tokens_of(texts, sources)


def large(folder: Path, count: int) -> str:
    """Shards that take a second or so each."""
    rng = np.random.default_rng(0)
    words = [*"".join(TEXTS[:5]).split()]
    for i in range(count):
        texts = [" ".join(rng.choice(words, 800)) for _ in range(600)]
        (folder / f"{i}.jsonl").write_bytes(lines_of(texts))
    return f"{folder}/*.jsonl"


def command(folder: Path, source: str, out: Path, workers: int) -> list[str]:
    return [
        *(sys.executable, "-m", "train.prepare", source, "--out", str(out)),
        *("--tokenizer", str(folder / "spiece.model"), "--workers", str(workers)),
    ]


def until(what, patience: float = 120) -> None:
    end = time.monotonic() + patience
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def lines_in(out: Path) -> int:
    path = out / "shards.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture(scope="module")
def work(texts, tmp_path_factory) -> tuple[str, dict[str, bytes]]:
    """A source that takes some seconds, and what becomes of it."""
    folder = tmp_path_factory.mktemp("large")
    source = large(folder, 5)
    prepared(texts, folder / "whole", [source])
    return source, content_of(folder / "whole")


STOPS = {
    "Ctrl-C": (signal.SIGINT, 130, 1),
    "Ctrl-C, workers": (signal.SIGINT, 130, 2),
    "SIGTERM, workers": (signal.SIGTERM, 143, 2),
    "SIGKILL": (signal.SIGKILL, -9, 1),
    "SIGKILL, workers": (signal.SIGKILL, -9, 2),
}


@pytest.mark.parametrize(
    "case", slow_but([], STOPS, slow=["SIGTERM, workers", "SIGKILL"])
)
def test_what_was_stopped_goes_on(texts, tmp_path, work, case):
    """No half file is there in between; at the end all is as of one that was not."""
    number, status, workers = STOPS[case]
    source, whole = work
    argv = command(texts, source, tmp_path, workers)
    process = subprocess.Popen(
        argv,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until(lambda: lines_in(tmp_path) >= 2 and [*tmp_path.glob("*.u16.*.tmp")])
    if number == signal.SIGINT:  # as a terminal sends it, to all of them
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in errors
    if number != signal.SIGKILL:
        done = lines_in(tmp_path) - 1
        assert f"{done} of 5 shards are done; the same command goes on" in errors
        assert f"{number.name}: ended" in errors
        assert not [*tmp_path.glob("*.tmp")]
    assert not (tmp_path / "manifest.json").exists()
    there = content_of(tmp_path, "*.u16")
    assert 1 <= len(there) < 5
    assert {name: whole[name] for name in there} == there
    until(lambda: not alive(process.pid))
    subprocess.run(argv, check=True, capture_output=True)
    assert content_of(tmp_path) == whole
    assert not [*tmp_path.glob("*.tmp")]


def alive(session: int) -> bool:
    """Whether any process of the session is."""
    try:
        os.killpg(session, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_work(texts, tmp_path, work):
    source, whole = work
    argv = command(texts, source, tmp_path, 2)
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    until(lambda: [*tmp_path.glob("*.u16.*.tmp")])
    (part, *_) = tmp_path.glob("*.u16.*.tmp")
    os.kill(int(part.name.split(".")[-2]), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "a worker was ended from outside, perhaps for want of memory" in errors
    assert "Traceback" not in errors
    subprocess.run(argv, check=True, capture_output=True)
    assert content_of(tmp_path) == whole


def test_a_record_that_was_cut_short_is_done_again(texts, tmp_path):
    prepared(texts, tmp_path)
    whole = content_of(tmp_path)
    journal = tmp_path / "shards.jsonl"
    content = journal.read_bytes()
    for size in len(content) - 1, content.rfind(b"\n", 0, -1) + 9, 30, 0:
        journal.write_bytes(content[:size])
        assert prepared(texts, tmp_path)["documents"] == 61
        assert content_of(tmp_path) == whole
    journal.write_bytes(b"nonsense\n")
    with pytest.raises(ValueError, match=r"shards\.jsonl cannot be read .*remove it"):
        prepared(texts, tmp_path)


def test_options_may_change_until_a_shard_is_done(texts, tmp_path):
    with pytest.raises(ValueError, match="no text in field 'words'"):
        prepared(texts, tmp_path, text_field="words")
    assert prepared(texts, tmp_path)["documents"] == 61
    with pytest.raises(ValueError, match="work with another text_field"):
        prepared(texts, tmp_path, text_field="words")


def bad_source(folder: Path) -> str:
    lines = lines_of(TEXTS[:5]).splitlines(keepends=True)
    (folder / "0.jsonl").write_bytes(b"".join(lines))
    (folder / "1.jsonl").write_bytes(b"".join([*lines[:2], b"{}\n[\n", *lines[2:]]))
    content = gzip.compress(lines_of(TEXTS))
    (folder / "2.json.gz").write_bytes(content[: len(content) // 2])
    (folder / "3.jsonl").write_bytes(b"3\n4\n")
    return f"{folder}/?.json*"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_line_is_an_error_that_names_it(texts, tmp_path, workers):
    source, out = bad_source(tmp_path), tmp_path / "out"
    message = r"(1\.jsonl, line 3: no text|2\.json\.gz cannot be|3\.jsonl, line 1: no)"
    with pytest.raises(ValueError, match=message + ".*or set --bad-lines skip"):
        prepared(texts, out, [source], workers=workers)
    assert {*content_of(out, "*.u16")} <= {"00000-0.u16"}
    assert not [*out.glob("*.tmp")]


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_lines_are_skipped_by_choice_and_counted(texts, tmp_path, workers):
    source, out = bad_source(tmp_path), tmp_path / "out"
    options = {"bad_lines": "skip", "workers": workers}
    manifest = prepared(texts, out, [source], **options)
    first, second, third, fourth = manifest["shards"]
    assert [first["skipped"], first["first_skipped"]] == [0, []]
    assert [second["documents"], second["skipped"]] == [5, 2]
    places = [text.split(": ")[0] for text in second["first_skipped"]]
    assert places == [f"{tmp_path}/1.jsonl, line {i}" for i in (3, 4)]
    assert third["skipped"] == 1
    assert f"after line {third['documents']}: " in third["first_skipped"][0]
    assert [fourth["documents"], fourth["tokens"], fourth["skipped"]] == [0, 0, 2]
    assert manifest["skipped"] == 5
    files = [path.name for path in sorted(out.glob("*.u16"))]
    assert files == ["00000-0.u16", "00001-1.u16", "00002-2.u16"]  # no empty one
    before = times(out)
    assert prepared(texts, out, [source], **options) == manifest
    assert times(out) == before
    with pytest.raises(ValueError, match=r"1\.jsonl, line 3: no text in field"):
        prepared(texts, out, [source])


def test_what_was_an_error_may_be_skipped_afterwards(texts, tmp_path):
    source, out = bad_source(tmp_path), tmp_path / "out"
    with pytest.raises(ValueError, match=r"1\.jsonl, line 3"):
        prepared(texts, out, [source])
    before = times(out)
    assert prepared(texts, out, [source], bad_lines="skip")["skipped"] == 5
    assert times(out)["00000-0.u16"] == before["00000-0.u16"]


def test_a_record_of_tfds_that_cannot_be_read(texts, tmp_path, monkeypatch):
    write_tfds(tmp_path)
    options = {"data_dir": str(tmp_path)}
    whole = train.data.documents.TfdsDocuments.__getitem__

    def damaged(self, index: int) -> str:
        if index == 7:
            raise ValueError("record 7 of TFDS c4/en/3.1.0 cannot be read")
        return whole(self, index)

    monkeypatch.setattr(train.data.documents.TfdsDocuments, "__getitem__", damaged)
    with pytest.raises(ValueError, match="record 7 of TFDS"):
        prepared(texts, tmp_path / "a", ["tfds:c4/en"], **options)
    manifest = prepared(
        texts, tmp_path / "a", ["tfds:c4/en"], bad_lines="skip", **options
    )
    assert [manifest["documents"], manifest["skipped"]] == [59, 1]


def test_a_folder_holds_the_tokens_of_one_work(texts, tmp_path):
    out = tmp_path / "out"
    prepared(texts, out, shards=3)
    path = tmp_path / "t.json"
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"?": 0, "</s>": 1}, "?"))
    tokenizer.save(str(path))
    before = content_of(out)
    for options, message in (
        ({"tokenizer": str(path)}, "with another tokenizer: give the same, or another"),
        ({"text_field": "url"}, "with another text_field"),
        (
            {"shards": 2},
            r"has 1 token files .* 00002-c4-train.00002-of-01024.u16 first",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            prepared(texts, out, **({"shards": 3} | options))
        assert content_of(out) == before
    with (
        filelock.FileLock(out / "lock"),
        pytest.raises(BlockingIOError, match=f"another is at work in {out}"),
    ):
        prepared(texts, out, shards=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": ()}, "sources: name at least one"),
        ({"out": "gs://bucket/tokens"}, "is not on this machine; give a folder here"),
        ({"workers": 0}, "workers=0 must be above 0"),
        ({"shards": 0}, "shards=0 must be above 0"),
        ({"documents": -1}, "documents=-1 must be above 0"),
        ({"records": 0}, "records=0 must be above 0"),
    ],
)
def test_bad_options(options, message):
    given = {"sources": ("a.txt",), "tokenizer": "t.json", "out": "tokens"}
    with pytest.raises(ValueError, match=message):
        PrepareConfig(**(given | options))


def test_the_command_line(texts, tmp_path, capsys):
    argv = [*sources_of(texts), "--tokenizer", str(texts / "spiece.model")]
    main([*argv, "--out", str(tmp_path / "a"), "--workers", "1"])
    shown = capsys.readouterr()
    assert "7 of 7 shards: 61 documents, " in shown.out
    assert f"python -m train --source '{tmp_path}/a/*.u16' --vocab-size " in shown.out
    assert shown.err == ""
    bad = [bad_source(tmp_path), *argv[-2:], "--out", str(tmp_path / "b")]
    with pytest.raises(SystemExit, match=r"^error: .*1\.jsonl, line 3: no text"):
        main([*bad, "--workers", "1"])
    main([*bad, "--workers", "1", "--bad-lines", "skip"])
    assert "warning: skipped 5: " in capsys.readouterr().err
    for flags, message in (
        ([f"{tmp_path}/none*.txt", *argv[-2:]], "no file matches"),
        ([f"{tmp_path}/a/*.u16", *argv[-2:]], "is not a text file"),
        ([argv[0], "--tokenizer", "none.json"], "none.json does not exist"),
    ):
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            main([*flags, "--out", str(tmp_path / "c")])
    with pytest.raises(SystemExit) as helped:
        main(["--help"])
    assert helped.value.code == 0
    assert "c4-train.*.json.gz" in capsys.readouterr().out


def test_a_terminal_has_a_bar_and_no_lines(texts, tmp_path, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    prepared(texts, tmp_path, shards=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared(texts, tmp_path)
    bars = [x for x in sys.stderr.getvalue().splitlines() if "of 7 shards" in x]
    assert "86%" in bars[0]
    assert "6.0 of 7 shards" in bars[0]
    assert "100%" in bars[-1]
    assert "7.0 of 7 shards" in bars[-1]
    assert ", 13 documents, " in bars[-1]
    assert "documents" not in capsys.readouterr().out


def test_a_worker_imports_neither_jax_nor_tfds():
    program = "import sys, train.prepare; print({'jax', 'grain', 'tensorflow_datasets'}"
    ran = subprocess.run(
        [sys.executable, "-c", program + " & {*sys.modules})"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout == "set()\n"
