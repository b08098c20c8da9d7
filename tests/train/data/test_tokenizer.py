"""Tokenizers: exact round trips, determinism, the cache, and users' files."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors

from train.data.dataset import DataConfig, open_data
from train.data.tokenizer import open_tokenizer, train_tokenizer

TEXTS = [f"the {i}th speech of the union, again and again\n" for i in range(40)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    return train_tokenizer(TEXTS, vocab_size=300, cache_dir=str(folder))


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=35, minloglevel=2
    )
    path = tmp_path_factory.mktemp("model") / "small.model"
    path.write_bytes(model.getvalue())
    return path


@given(st.text())
def test_byte_level_round_trip_is_exact(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert trained.eos_id not in ids
    assert all(0 <= i < trained.vocab_size for i in ids)


def test_special_tokens_in_a_text_are_plain_text(trained):
    text = "before<|endoftext|>after"
    assert trained.eos_id not in trained.encode(text)
    assert trained.decode(trained.encode(text)) == text
    assert trained.decode(np.array([trained.eos_id])) == ""


def test_training_reaches_the_size_asked_and_merges(trained):
    assert trained.vocab_size == 300
    assert len(trained.encode("again and again")) < len("again and again") / 2


def test_training_in_other_processes_gives_the_same_file(tmp_path):
    program = (
        "import sys; from train.data.tokenizer import train_tokenizer;"
        "train_tokenizer([f'the {i}th speech' * 3 for i in range(50)],"
        " vocab_size=290, cache_dir=sys.argv[1])"
    )
    for name, threads in ("a", "1"), ("b", "4"):
        environment = os.environ | {"RAYON_NUM_THREADS": threads}
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / name)],
            env=environment,
            check=True,
        )
    (a,), (b,) = (list((tmp_path / name).iterdir()) for name in "ab")
    assert a.name == b.name
    assert a.read_bytes() == b.read_bytes()


def test_cache_is_used_and_keyed_by_content_and_size(tmp_path):
    def train(texts, vocab_size=270):
        train_tokenizer(texts, vocab_size=vocab_size, cache_dir=str(tmp_path))
        return {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}

    first = train(TEXTS)
    assert len(first) == 1
    assert train(TEXTS) == first
    assert len(train(TEXTS[1:])) == 2
    assert len(train([TEXTS[0] + TEXTS[1], *TEXTS[2:]])) == 3
    assert len(train(TEXTS, vocab_size=271)) == 4


def test_default_cache_is_in_the_users_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    train_tokenizer(TEXTS, vocab_size=260)
    assert len(list((tmp_path / "lowrank_optax").glob("bpe-*.json"))) == 1


def test_damaged_cache_is_named(tmp_path):
    train_tokenizer(TEXTS, vocab_size=260, cache_dir=str(tmp_path))
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match=f"{path} cannot be used.*delete it"):
        train_tokenizer(TEXTS, vocab_size=260, cache_dir=str(tmp_path))


def test_sentencepiece_begins_documents_and_data_ends_them(
    tmp_path, sentencepiece_file
):
    tokenizer = open_tokenizer(sentencepiece_file)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (35, 2)
    text = "the union again"
    assert tokenizer.encode(text)[0] == 1
    assert tokenizer.decode([*tokenizer.encode(text), 2]) == text
    assert 2 not in tokenizer.encode("the </s> union")
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(text)
    config = DataConfig(f"{tmp_path}/*.txt", tokenizer=str(sentencepiece_file))
    data = open_data(config, seq_len=16, batch_size=1)
    tokens = np.concatenate([b["tokens"][b["weights"] == 1] for b in data.evaluation])
    assert tokens.tolist() == [*tokenizer.encode(text), 2]
    with pytest.raises(ValueError, match="35 tokens, more than vocab_size 34"):
        open_data(config, seq_len=16, batch_size=1, vocab_size=34)


def json_tokenizer(words: list[str]) -> tokenizers.Tokenizer:
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([word for word in words if word.startswith("<")])
    return tokenizer


def test_json_file_keeps_its_begin_token_but_no_end_length_or_padding(tmp_path):
    tokenizer = json_tokenizer(["?", "<s>", "</s>", "a", "b"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "t.json"))
    opened = open_tokenizer(tmp_path / "t.json")
    assert (opened.vocab_size, opened.eos_id) == (5, 2)
    assert opened.encode("a b a b") == [1, 3, 4, 3, 4]
    assert opened.decode([1, 3, 4, 2]) == "a b"


def test_token_files_can_be_opened_with_the_tokenizer_that_made_them(tmp_path):
    json_tokenizer(["?", "</s>", "a"]).save(str(tmp_path / "t.json"))
    np.array([2, 1] * 40, "<u2").tofile(tmp_path / "a.u16")
    config = DataConfig(str(tmp_path / "a.u16"), tokenizer=str(tmp_path / "t.json"))
    data = open_data(config, seq_len=4, batch_size=2, vocab_size=99)
    assert data.vocab_size == 3
    assert data.tokenizer.decode(next(iter(data.train))["tokens"][0]) == "a a"
    np.array([2, 3] * 40, "<u2").tofile(tmp_path / "a.u16")
    with pytest.raises(ValueError, match="token id 3, outside the vocabulary of 3"):
        open_data(config, seq_len=4, batch_size=2, vocab_size=99)


def test_json_file_without_an_end_token(tmp_path):
    json_tokenizer(["?", "a"]).save(str(tmp_path / "t.json"))
    with pytest.raises(
        ValueError, match=r"t\.json cannot be used: it has no end token"
    ):
        open_tokenizer(tmp_path / "t.json")


@pytest.mark.parametrize("name", ["a.json", "a.model"])
def test_unreadable_tokenizer_files(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
        open_tokenizer(tmp_path / name)
    for content in b"", b"{}", b"nonsense":
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} cannot be used"):
            open_tokenizer(tmp_path / name)


def test_unknown_tokenizer_suffix(tmp_path):
    with pytest.raises(
        ValueError, match=r"expected a file ending in \.model or \.json"
    ):
        open_tokenizer(tmp_path / "vocab.txt")
