"""Which text a record's field holds, and files that hold one document or an array."""

import gzip
import json
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import train.data.tokenizer
from train.config.config import Config
from train.data import text_fields, text_formats
from train.data.dataset import DataConfig, open_data
from train.data.text_fields import LONGEST, TextField, text_at
from train.data.text_formats import BadLines, read_texts
from train.data.tokenizer import document_tokens, train_tokenizer
from train.prepare import PrepareConfig

TEXT = "a quick brown fox jumps over the lazy dog and an owl sleeps"
WORDS = TEXT.split()


def texts_in(path, field="text", bad=None) -> list[str]:
    return [*read_texts(path, field, bad or BadLines(), lambda _: None)]


@pytest.mark.parametrize(
    ("record", "field", "text"),
    [
        ({"text": "a"}, "text", "a"),
        ({"text": "é".encode()}, "text", "é"),
        ({"meta": {"text": "a"}}, "meta.text", "a"),
        ({"meta.text": "a", "meta": {"text": "b"}}, "meta.text", "a"),
        ({"a": {"b": {"c": "d"}}}, "a.b.c", "d"),
        ({"text": ["a", b"b"]}, "text", "a\nb"),
        ({"turns": [{"say": "a"}, {"say": "b"}]}, "turns.say", "a\nb"),
    ],
)
def test_a_text_is_found(record, field, text):
    assert text_at(record, field) == text


def test_an_array_of_records_is_a_document_each(tmp_path):
    records = [{"meta": {"text": text}, "id": i} for i, text in enumerate(WORDS)]
    for name, write in (("a.json", bytes), ("a.json.gz", gzip.compress)):
        for indent in (None, 2):
            content = json.dumps(records, indent=indent).encode()
            (tmp_path / name).write_bytes(write(content))
            assert texts_in(tmp_path / name, "meta.text") == WORDS
    with pytest.raises(
        ValueError, match=r"a\.json, element 1: no text in field 'text'"
    ):
        texts_in(tmp_path / "a.json")
    bad = BadLines("skip")
    (tmp_path / "a.json").write_text(' \n[{"text": "a"}, {"text": 1}, "b"]')
    assert texts_in(tmp_path / "a.json", bad=bad) == ["a"]
    assert bad.count == 2
    (tmp_path / "a.json").write_text('[{"text": "a"}')
    with pytest.raises(ValueError, match=r"a\.json begins as a JSON array and is none"):
        texts_in(tmp_path / "a.json")


def test_columns_of_bytes_lists_and_structs(tmp_path):
    path = tmp_path / "a.parquet"
    columns = {
        "bytes": pyarrow.array([text.encode() for text in WORDS], pyarrow.binary()),
        "list": [[text, "end"] for text in WORDS],
        "meta": [{"text": text, "id": 3} for text in WORDS],
        "turns": [[{"say": text}] for text in WORDS],
        "large": pyarrow.array(WORDS, pyarrow.large_string()),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    for field in ("bytes", "meta.text", "turns.say", "large"):
        assert texts_in(path, field) == WORDS
    assert texts_in(path, "list") == [f"{text}\nend" for text in WORDS]
    for field, message in (
        (
            "meta",
            r"it holds fields \['id', 'text'\]: set .* one of .* meta.id",
        ),
        ("meta.id", "row 1: no text in field 'meta.id'; it holds int"),
        ("meta.tex", r"there is only \['id', 'text'\]"),
        ("body", r"the columns are \['bytes', "),
    ):
        with pytest.raises(ValueError, match=rf"a\.parquet.*{message}"):
            texts_in(path, field)


def test_a_line_of_200_mb_is_refused_within_seconds(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "a"}\n{"text": "')
        for _ in range(200):
            file.write(b"long word " * 10**5)
        file.write(b'"}\n{"text": "b"}\n')
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: .* more than 32 MiB"):
        texts_in(path)
    bad = BadLines("skip")
    assert texts_in(path, bad=bad) == ["a", "b"]
    assert (bad.count, LONGEST) == (1, 32 * 2**20)
    assert time.monotonic() - start < 10


def test_the_limit_is_a_length_to_the_byte(tmp_path, monkeypatch):
    lines = [json.dumps({"text": "x" * n}) for n in (4, 5, 6)]
    monkeypatch.setattr(text_formats, "LONGEST", len(lines[1]))
    monkeypatch.setattr(text_fields, "LONGEST", len(lines[1]))
    path = tmp_path / "a.jsonl"
    for end in ("\n", ""):
        path.write_text("\n".join(lines) + end)
        bad = BadLines("skip")
        assert texts_in(path, bad=bad) == ["x" * 4, "x" * 5]
        assert bad.count == 1
    monkeypatch.setattr(text_fields, "LONGEST", 5)
    (tmp_path / "a.json").write_text(f"[{','.join(lines)}]")
    with pytest.raises(ValueError, match="element 3: a document of more than"):
        texts_in(tmp_path / "a.json")


def test_a_long_text_in_pieces_has_the_same_tokens(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    text = " ".join(rng.choice(WORDS, 500)) + "\n\n" + "  ".join(WORDS) + "word" * 99
    tokenizer = train_tokenizer([text], vocab_size=290, cache_dir=str(tmp_path))
    whole = [*tokenizer.encode(text), tokenizer.eos_id]
    assert document_tokens(tokenizer, text).tolist() == whole
    monkeypatch.setattr(train.data.tokenizer, "_PIECE", 200)
    monkeypatch.setattr(train.data.tokenizer, "_SEARCHED", 50)
    pieces = document_tokens(tokenizer, text)
    assert tokenizer.decode(pieces.tolist()) == text
    assert pieces[:400].tolist() == whole[:400]  # before the word without a space
    assert document_tokens(tokenizer, "").tolist() == [tokenizer.eos_id]


def one_text(folder, **options):
    config = DataConfig(
        source=str(folder / "book.txt"), cache_dir=str(folder / "cache"), **options
    )
    return open_data(config, seq_len=8, batch_size=4, vocab_size=280)


def test_a_single_text_holds_out_its_last_tokens(tmp_path, capsys):
    text = " ".join(np.random.default_rng(0).choice(WORDS, 400))
    (tmp_path / "book.txt").write_text(text)
    data = one_text(tmp_path, eval_fraction=0.25)
    held = np.concatenate(
        [b["tokens"][b["weights"] > 0] for b in data.evaluation]
    ).tolist()
    last = data.tokenizer.decode(held)
    assert text.endswith(last)
    assert 0.2 < len(last) / len(text) < 0.3
    said = capsys.readouterr().out
    trained = document_tokens(data.tokenizer, text[: -len(last)])
    assert f"is a single document: its first {len(trained)} tokens are" in said
    assert f"its last {len(held)} are held out" in said
    count = len(trained) // 8
    batches = iter(data.train)
    rows = [row.tolist() for _ in range(count // 4) for row in next(batches)["tokens"]]
    windows = [w.tolist() for w in trained[: count * 8].reshape(-1, 8)]
    assert all(row in windows for row in rows)
    assert rows != windows[: len(rows)]  # shuffled
    state = batches.get_state()
    following = next(batches)["tokens"]
    again = iter(one_text(tmp_path, eval_fraction=0.25).train)
    again.set_state(json.loads(json.dumps(state)))
    assert (next(again)["tokens"] == following).all()


@pytest.mark.parametrize(
    "url",
    [
        "https://me:s3cr3t@host/a.txt",
        "b.txt,ftp://me:s3cr3t@host/a.txt",
        "filecache::https://me:s3cr3t@host/*.jsonl",
        "https://host/a.txt?X-Amz-Signature=s3cr3t",
        "https://host/a.txt?x=1&access_token=s3cr3t",
    ],
)
@pytest.mark.parametrize("field", ["source", "eval_source", "tokenizer"])
def test_a_password_in_a_url_is_refused_and_not_repeated(url, field):
    with pytest.raises(ValueError, match=f"{field}: the URL has a password") as raised:
        DataConfig(**{field: url})
    assert "s3cr3t" not in str(raised.value)
    with pytest.raises(ValueError, match="init_from: the URL has a password"):
        Config(init_from=url)
    with pytest.raises(ValueError, match="the URL has a password"):
        PrepareConfig((url,), tokenizer="a.json", out="out")


@pytest.mark.parametrize(
    "url",
    [
        "gs://bucket/a@b:c.txt",
        "abfs://data@account.dfs.core.windows.net/a",
        "a:b@c.txt",
    ],
)
def test_other_names_are_taken(url):
    assert DataConfig(source=url).source == url


def test_records_that_are_examples_are_named_as_such():
    for record in ({"messages": []}, {"id": 1, "prompt": "a", "completion": "b"}):
        with pytest.raises(
            ValueError, match=r"set --windows examples to .* or --text-f"
        ):
            text_at(record, "text")
    with pytest.raises(ValueError, match=r"\['prompt'\]: set --text-field"):
        text_at({"prompt": "a"}, "text")
    with pytest.raises(ValueError, match=r"set --windows examples to .* or --text-f"):
        TextField("text").columns(["id", "conversations"])
