"""Files as data sets are published; what is wrong with one is an error, or counted."""

import gzip
import sys
from itertools import pairwise
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

import train.data.text_formats
from train.data.dataset import DataConfig, open_data
from train.data.files import find_files, read_file, read_lines
from train.data.text_formats import BadLines, read_texts
from train.host.paths import to_path

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

from tests.helpers.text_files import PACKERS, TEXTS, lines_of, parquet_of


def texts_in(path: Path, bad: BadLines | None = None, field: str = "text") -> list[str]:
    return list(read_texts(path, field, bad or BadLines(), lambda _: None))


PUBLISHED = {
    "c4-train.00000-of-01024.json.gz": gzip.compress(lines_of(TEXTS)),
    "example_train_0.jsonl.zst": zstd.compress(lines_of(TEXTS)),
    "train-00000-of-00002.parquet": parquet_of(TEXTS),
}
FORMATS = PUBLISHED | {
    f"shard{suffix}{packer}": pack(lines_of(TEXTS))
    for suffix in (".json", ".jsonl")
    for packer, pack in PACKERS.items()
}
every_format = pytest.mark.parametrize("name", FORMATS)


@every_format
def test_every_format_gives_its_texts_in_order(tmp_path, name):
    (tmp_path / name).write_bytes(FORMATS[name])
    assert texts_in(tmp_path / name) == TEXTS


@pytest.mark.parametrize("packer", PACKERS)
def test_a_text_file_is_one_document(tmp_path, packer):
    path = tmp_path / f"a.txt{packer}"
    path.write_bytes(PACKERS[packer](TEXTS[4].encode()))
    assert texts_in(path) == [TEXTS[4]]


@pytest.mark.parametrize("name", PUBLISHED)
def test_training_reads_it(tmp_path, name):
    (tmp_path / "a.jsonl").write_bytes(lines_of(TEXTS))
    (tmp_path / name).write_bytes(PUBLISHED[name])

    def first(source: str) -> np.ndarray:
        config = DataConfig(f"{tmp_path}/{source}", cache_dir=str(tmp_path / "cache"))
        data = open_data(config, seq_len=16, batch_size=4, vocab_size=300)
        return next(iter(data.train))["tokens"]

    np.testing.assert_array_equal(first(name), first("a.jsonl"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_bucket_s_files_are_read_as_a_disk_s(name):
    memory = fsspec.filesystem("memory")
    try:
        (to_path("memory://bucket") / name).write_bytes(PUBLISHED[name])
        (path,) = find_files("memory://bucket/*")
        assert texts_in(path) == TEXTS
    finally:
        memory.rm("/", recursive=True)


def test_tokens_may_be_zstandard_s(tmp_path):
    tokens = np.arange(200, dtype="<u2")
    (tmp_path / "a.u16.zst").write_bytes(zstd.compress(tokens.tobytes()))
    config = DataConfig(f"{tmp_path}/a.u16.zst", eval_fraction=0.5)
    data = open_data(config, seq_len=8, batch_size=2)
    held = np.concatenate([x["tokens"][x["weights"] == 1] for x in data.evaluation])
    np.testing.assert_array_equal(held, tokens[-96:])


@pytest.mark.parametrize("packer", [".gz", ".xz", ".zst"])
@given(cuts=st.lists(st.integers(0, 60), max_size=4))
def test_members_of_a_compressed_file_are_joined(tmp_path_factory, packer, cuts):
    """As bgzip, pigz and parallel compressors write them."""
    whole = lines_of(TEXTS)
    ends = [0, *sorted(c * len(whole) // 60 for c in cuts), len(whole)]
    parts = [whole[a:b] for a, b in pairwise(ends)]
    path = tmp_path_factory.mktemp("members") / f"a.jsonl{packer}"
    path.write_bytes(b"".join(map(PACKERS[packer], parts)))
    assert texts_in(path) == TEXTS


@pytest.mark.parametrize("packer", PACKERS)
def test_a_file_is_read_as_far_as_it_is_asked_for(tmp_path, packer):
    """A shard need not fit into memory."""
    noise = np.random.default_rng(0).bytes(100_000).hex()
    path = tmp_path / f"a.jsonl{packer}"
    path.write_bytes(
        PACKERS[packer](lines_of([noise] * 1 + TEXTS + [noise[::-1]] * 50))
    )
    read = [0]
    size = path.stat().st_size
    lines = read_lines(path, lambda n: read.append(n))
    next(lines)
    assert sum(read) < size / 2 or size < 2**21
    assert len([*lines]) == len(TEXTS) + 50
    assert sum(read) == size


GOOD = [b'{"text": "a"}', b'{"text": "b"}', b'{"text": "c"}']
BAD_LINES = {
    "broken": (b'{"text": ', "not valid JSON"),
    "blank": (b"", "not valid JSON"),
    "list": (b'["text"]', "no text in field 'text'; there is a list, and no fields"),
    "number": (b"3", "no text in field 'text'; there is int, and no fields"),
    "other field": (b'{"body": "b"}', r".*there is only \['body'\]: set --text-field"),
    "null": (b'{"text": null}', "no text in field 'text'; it holds null"),
    "object": (b'{"text": {"b": 1, "a": 2}}', r".*'b'\]: .* one of them, as text\.a"),
    "numbers": (b'{"text": ["a", 1]}', "no text in field 'text'; it holds int"),
    "empty list": (b'{"text": []}', "no text in field 'text'; it holds a list"),
    "latin-1": (b'{"text": "\xe9"}', "not valid JSON .*'utf-8' codec"),
    "half": (b'{"text": "\\ud800"}', "half a surrogate"),
    "deep": (b'{"text": %s}' % (b"[" * 99_999), "not valid JSON"),
}


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_an_error_or_counted(tmp_path, case, packer):
    line, message = BAD_LINES[case]
    path = tmp_path / f"a.jsonl{packer}"
    path.write_bytes(PACKERS[packer](b"\n".join([*GOOD[:2], line, GOOD[2], b""])))
    message = rf"a\.jsonl{packer}, line 3: {message}"
    with pytest.raises(ValueError, match=message + ".*or set --bad-lines skip"):
        texts_in(path)
    bad = BadLines("skip")
    assert texts_in(path, bad) == ["a", "b", "c"]
    assert bad.count == 1
    with pytest.raises(ValueError, match="^skipped 1: .*" + message):
        raise ValueError(str(bad))


BAD_ROWS = {
    "null": (None, "row 3: no text in field 'text'; it holds null"),
    "latin-1": (b"\xe9", "row 3: not UTF-8 text"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_an_error_or_counted(tmp_path, case):
    value, message = BAD_ROWS[case]
    values = [b"a", b"b", value, b"c"]
    column = pyarrow.array(values, pyarrow.binary()).view(pyarrow.string())
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet_of(column))
    with pytest.raises(ValueError, match=rf"a\.parquet, {message}"):
        texts_in(path)
    bad = BadLines("skip")
    assert texts_in(path, bad) == ["a", "b", "c"]
    assert (bad.count, len(bad.first)) == (1, 1)


def test_a_column_of_numbers_or_none_of_the_name(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet_of([1, 2, 3]))
    with pytest.raises(ValueError, match=r"row 1: no text .*; it holds int"):
        texts_in(path)
    for choice in "error", "skip":
        with pytest.raises(
            ValueError, match=r"columns are \['url', 'text'\]: set --text"
        ):
            texts_in(path, BadLines(choice), field="body")
    path.write_bytes(parquet_of(TEXTS, "body"))
    assert texts_in(path, field="body") == TEXTS


def damaged(name: str, kind: str) -> bytes:
    whole = FORMATS[name]
    if kind == "cut":
        return whole[:-9]
    if kind == "half":
        return whole[: len(whole) // 2]
    if kind == "another":
        return lines_of(TEXTS)
    middle = len(whole) // 2
    return whole[:middle] + b"\xa5" * 40 + whole[middle + 40 :]


DAMAGED = [name for name in FORMATS if name.endswith((".gz", ".xz", ".zst", "quet"))]


@pytest.mark.parametrize("kind", ["cut", "half", "another", "overwritten"])
@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_an_error_or_counted(tmp_path, name, kind):
    """What comes before is what it was, and what comes after is not lost silently.

    Of what was overwritten, gzip and Parquet know it for whole blocks alone: lines of
    it may be read, and look like lines.
    """
    path = tmp_path / name
    path.write_bytes(damaged(name, kind))
    at_once = kind != "overwritten" or path.suffix in (".xz", ".zst")
    pattern = rf"{name} cannot be read .*cut short or damaged"
    if not at_once:
        pattern = rf"{name}(,| cannot be read)"
    with pytest.raises(ValueError, match=pattern):
        texts_in(path)
    bad = BadLines("skip")
    kept = texts_in(path, bad)
    assert bad.count
    if at_once:
        assert bad.count == 1
        assert kept == TEXTS[: len(kept)]
        place_ = f"after line {len(kept)}: " if kept else ""
        assert bad.first[0].startswith(f"{place_}{path} cannot be read")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json.gz", "a.jsonl.zst"])
def test_an_empty_file_is_an_error_or_counted(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(PACKERS.get(path.suffix, bytes)(b""))
    with pytest.raises(ValueError, match=f"{name} is empty"):
        texts_in(path)
    bad = BadLines("skip")
    assert (texts_in(path, bad), bad.count) == ([], 1)


def test_parquet_without_rows_is_empty(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet_of(pyarrow.array([], "string")))
    with pytest.raises(ValueError, match=r"a\.parquet is empty"):
        texts_in(tmp_path / "a.parquet")


def test_a_text_that_is_not_utf_8_is_an_error_or_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xe9")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 text"):
        texts_in(tmp_path / "a.txt")
    bad = BadLines("skip")
    assert (texts_in(tmp_path / "a.txt", bad), bad.count) == ([], 1)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet"])
def test_a_store_that_fails_is_no_damage(tmp_path, monkeypatch, name):
    """The text is there: it is not to be skipped because of a network."""
    path = tmp_path / name
    path.write_bytes(FORMATS.get(name, parquet_of(TEXTS)))

    class Away:
        def __init__(self, file):
            self._file = file

        def __getattr__(self, attribute):
            return getattr(self._file, attribute)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self._file.close()

        def read(self, *_):
            raise TimeoutError("the store is slow")

    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *how: Away(opened(self, *how)))
    with pytest.raises(ValueError, match=rf"{name} cannot be read \(the store is slow"):
        texts_in(path, BadLines("skip"))


def open_source(folder: Path, **config):
    config = {
        "source": f"{folder}/*.jsonl*",
        "cache_dir": str(folder / "cache"),
    } | config
    return open_data(DataConfig(**config), seq_len=8, batch_size=2, vocab_size=300)


def test_training_skips_by_choice_and_says_what(tmp_path, capsys):
    lines = lines_of(TEXTS).splitlines(keepends=True)
    lines[3:3] = [b"{}\n"] * 4
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    (tmp_path / "b.jsonl.gz").write_bytes(PUBLISHED["c4-train.00000-of-01024.json.gz"])
    content = gzip.compress(lines_of(TEXTS))
    (tmp_path / "c.jsonl.gz").write_bytes(content[: len(content) // 2])
    (tmp_path / "d.jsonl").write_bytes(b"[]\n[]\n" + lines_of(TEXTS[:1]))
    with pytest.raises(ValueError, match=r"a\.jsonl, line 4: no text"):
        open_source(tmp_path)
    data = open_source(tmp_path, bad_lines="skip")
    kept = data.fingerprint["source"]["documents"]
    assert 121 <= kept < 181
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"warning: source '{tmp_path}/*.jsonl*': skipped 7: ")
    for where in "a.jsonl, line 4: ", "a.jsonl, line 7: ", "c.jsonl.gz cannot be read":
        assert where in said
    assert said.endswith("; and 2 more")


def test_a_source_of_nothing_but_bad_lines_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"{}\n" * 9)
    with pytest.raises(ValueError, match=r"holds no text: skipped 9: .*; and 4 more"):
        open_source(tmp_path, bad_lines="skip")


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("a.jsonl.zst", zstd.__name__, "data"),
        ("a.parquet", "pyarrow.parquet", "data"),
    ],
)
def test_packages_that_are_missing_are_named(
    tmp_path, monkeypatch, name, module, package
):
    (tmp_path / name).write_bytes(FORMATS.get(name, parquet_of(TEXTS)))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ModuleNotFoundError, match=rf"{name} needs .*optax\[{package}\]"
    ):
        texts_in(tmp_path / name, BadLines("skip"))


def test_a_file_of_another_kind_is_named(tmp_path):
    for name in "a.pdf", "a.parquet.gz":
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(ValueError, match=f"{name} is not a text file"):
            texts_in(tmp_path / name, BadLines("skip"))


def test_no_more_than_five_places_are_kept():
    bad = BadLines("skip")
    for i in range(9):
        bad.meet(ValueError(f"line {i}"))
    assert str(bad) == "skipped 9: line 0; line 1; line 2; line 3; line 4; and 4 more"
    assert train.data.text_formats._LISTED == 5


def test_a_shard_is_read_whole_as_well(tmp_path):
    for packer, pack in PACKERS.items():
        path = tmp_path / f"a{packer}"
        path.write_bytes(pack(lines_of(TEXTS)))
        assert read_file(path) == lines_of(TEXTS)
