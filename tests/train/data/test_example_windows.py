"""Examples in windows: each once, kept apart, resumable, the same for any processes."""

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.chat import said, write_lines, write_tokenizer
from train.data import open_examples
from train.data.dataset import Data, DataConfig, open_data
from train.data.example_windows import ExampleTokens, example_window, pack
from train.data.fingerprint import changed, read_fingerprint
from train.data.tokenizer import open_tokenizer

T = 64
NAMES = {"tokens", "weights", "segment_ids", "positions"}


@given(st.lists(st.integers(1, 12), max_size=60), st.integers(12, 20))
def test_bins_have_each_length_once_and_are_few(lengths, size):
    bins = pack(lengths, size)
    assert sorted(itertools.chain(*bins)) == [*range(len(lengths))]
    used = [sum(lengths[i] for i in own) for own in bins]
    assert all(0 < n <= size for n in used)
    # Best fit leaves no two bins that would fit into one.
    assert sum(sorted(used)[:2]) > size or len(bins) < 2


def test_best_fit_is_the_best():
    assert pack([6, 7, 4, 3], size=10) == [[1, 3], [0, 2]]
    with pytest.raises(ValueError, match="length of 11 does not fit into 10"):
        pack([11], size=10)


@given(st.lists(st.integers(1, 6), max_size=5), st.integers(30, 33))
def test_a_window_keeps_examples_apart(lengths, length):
    examples = [
        ExampleTokens(np.arange(10 * i, 10 * i + n, dtype=np.int32), np.arange(n) > 1)
        for i, n in enumerate(lengths)
    ]
    window = example_window(examples, length)
    assert {name: (x.shape, x.dtype) for name, x in window.items()} == {
        name: ((length,), np.float32 if name == "weights" else np.int32)
        for name in NAMES
    }
    segments = window["segment_ids"]
    assert segments.tolist() == [
        *(i for i, n in enumerate(lengths, start=1) for _ in range(n)),
        *[0] * (length - sum(lengths)),
    ]
    for i, (tokens, targets) in enumerate(examples, start=1):
        own = segments == i
        np.testing.assert_array_equal(window["tokens"][own], tokens)
        np.testing.assert_array_equal(window["weights"][own], targets)
        np.testing.assert_array_equal(window["positions"][own], np.arange(len(tokens)))
    for name in NAMES:
        assert not window[name][segments == 0].any()


def records(count: int) -> list[dict]:
    rng = np.random.default_rng(0)

    def words(most: int) -> str:
        return " ".join(f"{n}" for n in rng.integers(0, 999, rng.integers(1, most)))

    return [{"messages": said(words(5), f"{i}: {words(8)}")} for i in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    write_tokenizer(folder)
    write_lines(folder / "a.jsonl", records(60))
    return folder


def opened(folder: Path, source: str = "a.jsonl", **options) -> Data:
    names = ("seq_len", "batch_size", "seed", "process_index", "process_count")
    own = {name: options.pop(name) for name in names if name in options}
    chosen = {
        "source": source if source == "sotu" else str(folder / source),
        "tokenizer": str(folder / "tokenizer.json"),
        "windows": "examples",
        "chat_template": "chatml",
    }
    config = DataConfig(**(chosen | options))
    return open_data(config, **({"seq_len": T, "batch_size": 2} | own))


def examples_in(batch: dict[str, np.ndarray]) -> list[tuple[int, ...]]:
    """The tokens of each example, of rows that are well formed."""
    found = []
    for row in zip(*(batch[name] for name in sorted(NAMES)), strict=True):
        positions, segments, tokens, weights = row
        for i in range(1, segments.max() + 1):
            (own,) = np.nonzero(segments == i)
            assert own.tolist() == [*range(own[0], own[-1] + 1)]
            assert positions[own].tolist() == [*range(len(own))]
            assert weights[own[0]] == 0
            assert weights[own].any()
            found.append(tuple(tokens[own].tolist()))
    return found


def texts(folder: Path, found: list[tuple[int, ...]]) -> Counter:
    tokenizer = open_tokenizer(folder / "tokenizer.json")
    return Counter(tokenizer.decode(tokens) for tokens in found)


def test_every_example_is_there_once_an_epoch_and_the_held_out_ones_once(folder):
    data = opened(folder, batch_size=1)
    expected = Counter(
        "user\n{}\nassistant\n{}\n".format(*(m["content"] for m in r["messages"]))
        for r in records(60)
    )
    held_out = texts(
        folder, [x for batch in data.evaluation for x in examples_in(batch)]
    )
    assert held_out == Counter([*expected][19::20])
    batches = iter(data.train)
    epochs = []
    for _ in range(2):
        found: list[tuple[int, ...]] = []
        order = []
        while len(found) < 57:
            new = examples_in(next(batches))
            order.append(new[0])
            found += new
        assert texts(folder, found) == expected - held_out
        epochs.append(order)
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])


def test_only_answers_are_learned_unless_all_is(folder):
    tokenizer = open_tokenizer(folder / "tokenizer.json")
    row = next(iter(opened(folder, batch_size=1).train))
    text = tokenizer.decode(row["tokens"][0].tolist())
    answers = re.findall(r"assistant\n(.*)\n", text)
    assert tokenizer.decode(row["tokens"][row["weights"] > 0]) == "".join(answers)
    row = next(iter(opened(folder, batch_size=1, train_on="all").train))
    np.testing.assert_array_equal(
        row["weights"], (row["segment_ids"] > 0) & (row["positions"] > 0)
    )


def taken(batches, count: int) -> list[dict[str, np.ndarray]]:
    return [*itertools.islice(batches, count)]


def test_the_state_is_small_json_and_goes_on_at_the_next_batch(folder):
    batches = iter(opened(folder).train)
    for _ in range(3):
        taken(batches, 7)  # the third is past the first epoch
        state = json.dumps(batches.get_state())
        assert len(state) < 200
        resumed = iter(opened(folder).train)
        resumed.set_state(json.loads(state))
        for mine, theirs in zip(taken(batches, 3), taken(resumed, 3), strict=True):
            for name in NAMES:
                np.testing.assert_array_equal(mine[name], theirs[name])


def test_processes_share_the_batches_of_one(folder):
    for split in ("train", "evaluation"):
        whole = taken(getattr(opened(folder, batch_size=4), split), 4)
        parts = [
            taken(
                getattr(
                    opened(folder, batch_size=4, process_index=p, process_count=2),
                    split,
                ),
                4,
            )
            for p in range(2)
        ]
        for one, *shares in zip(whole, *parts, strict=True):
            for name in NAMES:
                joined = np.concatenate([share[name] for share in shares])
                np.testing.assert_array_equal(one[name], joined)


def test_the_seed_decides_the_order_and_not_what_is_held_out(folder):
    first, second = opened(folder), opened(folder, seed=1)
    assert any(
        (next(iter(first.train))[n] != next(iter(second.train))[n]).any() for n in NAMES
    )
    for a, b in zip(first.evaluation, second.evaluation, strict=True):
        np.testing.assert_array_equal(a["tokens"], b["tokens"])


def test_how_many_are_encoded_at_a_time_does_not_matter(folder, monkeypatch):
    whole = taken(opened(folder).train, 6)
    monkeypatch.setattr(open_examples, "_TEXTS", 7)
    for one, other in zip(whole, taken(opened(folder).train, 6), strict=True):
        for name in NAMES:
            np.testing.assert_array_equal(one[name], other[name])


def test_long_examples_are_cut_or_left_out_and_it_is_said(folder, capsys):
    long = [
        {"messages": said("a", "b" * 200)},  # its answer is cut
        {"messages": said("a" * 200, "b")},  # its answer is beyond the window
    ]
    write_lines(folder / "long.jsonl", [*records(30), *long])
    data = opened(folder, "long.jsonl", eval_source=str(folder / "a.jsonl"))
    captured = capsys.readouterr()
    assert "of 32 examples 1 lost what is beyond the 64 tokens" in captured.err
    assert "and 1 are left out" in captured.err
    assert "31 examples in" in captured.out
    lengths = Counter(
        len(example)
        for batch in taken(data.train, 30)
        for example in examples_in(batch)
    )
    assert max(lengths) == T


def test_the_chat_template_is_part_of_the_data(folder, tmp_path):
    data = opened(folder)
    path = tmp_path / "data.json"
    path.write_text(json.dumps(data.fingerprint))
    stored = read_fingerprint(path)
    assert changed(stored, opened(folder).fingerprint) == []
    (difference,) = changed(stored, opened(folder, chat_template="plain").fingerprint)
    assert difference.startswith("chat_template: sha256 ")


ERRORS = {
    "no tokenizer": (
        {"tokenizer": None},
        "needs the tokenizer of the model: set --tok",
    ),
    "no template": ({"chat_template": None}, "no chat template beside it"),
    "text": ({"source": "sotu"}, "source 'sotu' has no examples"),
    "few": ({"batch_size": 90}, "but a batch has 90: add examples, or lower --seq-len"),
    "short": ({"seq_len": 4}, "no example with an answer in its first 4 tokens"),
}


@pytest.mark.parametrize("what", ERRORS)
def test_what_cannot_be_opened_is_said(folder, what):
    options, problem = ERRORS[what]
    with pytest.raises((FileNotFoundError, ValueError), match=problem):
        opened(folder, **options)


def test_files_without_records_and_single_examples_are_named(folder):
    (folder / "a.txt").write_text("Hi")
    with pytest.raises(ValueError, match=r"a\.txt has no examples: .* \.parquet"):
        opened(folder, "a.txt")
    write_lines(folder / "one.jsonl", records(1))
    with pytest.raises(ValueError, match="has 1 examples, so none can be held out"):
        opened(folder, "one.jsonl")


def test_options_of_examples_need_windows_of_examples():
    with pytest.raises(ValueError, match="chat_template=chatml is read with windows="):
        DataConfig(chat_template="chatml")
    with pytest.raises(ValueError, match="text_field=body is not read with windows="):
        DataConfig(windows="examples", text_field="body")
