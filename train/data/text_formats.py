"""The records in a file, a line of JSON or a row of Parquet each; or its text."""

import codecs
import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol, TypeVar

from train.data.files import (
    DamagedError,
    OnBytes,
    content_suffix,
    empty,
    read_errors,
    read_file,
    read_lines,
    read_start,
)
from train.data.text_fields import LONGEST, TextField, too_long
from train.host.paths import AnyPath

RECORD_SUFFIXES = (".jsonl", ".json", ".parquet")
TEXT_SUFFIXES = (".txt", *RECORD_SUFFIXES)

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

OnBadLines = Literal["error", "skip"]

_LISTED = 5
_ROWS = 1000


class TakeError(ValueError):
    """An error of `take` itself, not of a record: skipping would not help."""


class Take(Protocol[T_co]):
    """Makes something of each record of a file."""

    def columns(self, there: Sequence[str]) -> list[str]:
        """The columns of a Parquet file that it needs; ValueError if they lack."""
        ...

    def __call__(self, record: Any) -> T_co:
        """Takes something from a record; ValueError if the record is not fit for it.

        A `TakeError` ends the run whatever `BadLines` says.
        """
        ...


class BadLines:
    """Counts text that cannot be read, or raises an error for it.

    Attributes:
      count: how many lines, rows, or remainders of damaged files were skipped.
      first: the first five problems, with file and line.
    """

    def __init__(self, choice: OnBadLines = "error"):
        self._choice = choice
        self.count = 0
        self.first: list[str] = []

    def meet(self, error: Exception) -> None:
        """Counts an error; raises it as ValueError if that is the choice.

        A `TakeError` is always raised.
        """
        if isinstance(error, TakeError):
            raise error
        if self._choice == "error":
            raise ValueError(f"{error}, or set --bad-lines skip") from error
        self.add(1, [str(error)])

    def add(self, count: int, first: Sequence[str]) -> None:
        """Counts what was skipped elsewhere."""
        self.count += count
        self.first = [*self.first, *first][:_LISTED]

    def __str__(self) -> str:
        """ "skipped 7: FILE, line 2: not valid JSON ...; ...; and 2 more"."""
        more = self.count - len(self.first)
        last = [f"and {more} more"] if more else []
        return f"skipped {self.count}: {'; '.join([*self.first, *last])}"


def read_texts(
    path: AnyPath, field: str, bad: BadLines, on_bytes: OnBytes
) -> Iterator[str]:
    """The texts of a file in order; the file need not fit into memory.

    `.txt` is one text; files of records have one in a field of each (`read_records`).

    Args:
      path: the file; `.txt` too may have `.gz`, `.xz` or `.zst` after it.
      field: the field of an object, or the column, that holds the text (`text_at`).
      bad: decides what happens to what cannot be read: besides bad records, text that
        is not UTF-8, and an empty or damaged file. (Overwritten gzip may show only at
        its end.)
      on_bytes: called after every read.

    Raises:
      ModuleNotFoundError: `.zst` and `.parquet` need packages that are not installed.
      ValueError: `bad` refuses a text; the file cannot be read, or is of another kind,
        or Parquet without the column.
    """
    if content_suffix(path) == ".txt":
        yield from _accepted(_full_text(path, on_bytes), bad)
    elif holds_records(path):
        yield from read_records(path, TextField(field), bad, on_bytes)
    else:
        raise ValueError(
            f"{path} is not a text file: expected one of {', '.join(TEXT_SUFFIXES)} "
            "(all but .parquet plain, .gz, .xz or .zst)"
        )


def holds_records(path: AnyPath) -> bool:
    """Whether a file is one of records, by its suffix; Parquet is never compressed."""
    return path.suffix == ".parquet" or content_suffix(path) in (".jsonl", ".json")


def read_records(
    path: AnyPath, take: Take[T], bad: BadLines, on_bytes: OnBytes
) -> Iterator[T]:
    """Yields the result of `take` for each record of a file, in order.

    `.jsonl` and `.json` have a record in each line (as C4's and SlimPajama's shards
    do) or, in `.json`, in each element of an array, which is held in memory; plain or
    with `.gz`, `.xz` or `.zst` after it; `.parquet` has one in each row.

    Args:
      path: the file.
      take: makes something of a record, or refuses it.
      bad: decides what happens to what cannot be read: a line that is no JSON object,
        not UTF-8 or too long, a record that `take` refuses, an empty file, and
        everything after the point where one is damaged or cut short.
      on_bytes: called after every read.

    Raises:
      ModuleNotFoundError: `.zst` and `.parquet` need packages that are not installed.
      ValueError: `bad` refuses a record; the file cannot be read, or is of another
        kind, or Parquet without the columns.
      TakeError: `take` raises it; the message has the place too.
    """
    if not holds_records(path):
        raise ValueError(
            f"{path} has no records: expected one of {', '.join(RECORD_SUFFIXES)} (all "
            "but .parquet plain, .gz, .xz or .zst)"
        )
    read = _rows if path.suffix == ".parquet" else _objects
    return _accepted(read(path, take, on_bytes), bad)


def _accepted(records: Iterator[T | Exception], bad: BadLines) -> Iterator[T]:
    for record in records:
        if isinstance(record, Exception):
            bad.meet(record)
        else:
            yield record


def _full_text(path: AnyPath, on_bytes: OnBytes) -> Iterator[str | Exception]:
    """Yields the text, or what is wrong with it."""
    try:
        yield read_file(path, on_bytes).decode("utf-8-sig")  # without a byte order mark
    except UnicodeDecodeError as error:
        yield ValueError(f"{path} is not UTF-8 text ({error}): convert it")
    except DamagedError as error:
        yield error


def _objects(
    path: AnyPath, take: Take[T], on_bytes: OnBytes
) -> Iterator[T | Exception]:
    """Yields what each line gives or its error; at damage, one error for the rest."""
    if content_suffix(path) == ".json" and _begins_array(path):
        yield from _items(path, take, on_bytes)
        return
    number = 0
    try:
        for number, line in enumerate(read_lines(path, on_bytes, LONGEST), start=1):
            where = f"{path}, line {number}"
            yield _at(where, too_long() if line is None else _of_line(line, take))
    except DamagedError as error:
        yield _after("line", number, error)


def _begins_array(path: AnyPath) -> bool:
    start = read_start(path, 64).removeprefix(codecs.BOM_UTF8)
    return start.lstrip().startswith(b"[")


def _of_line(line: bytes, take: Take[T]) -> T | Exception:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return ValueError(f"not valid JSON ({error}): mend the line")
    return _taken(record, take)


def _items(path: AnyPath, take: Take[T], on_bytes: OnBytes) -> Iterator[T | Exception]:
    """Yields what each element of a JSON array gives, or its error."""
    try:
        records = json.loads(read_file(path, on_bytes).decode("utf-8-sig"))
    except DamagedError as error:
        yield error
    except (ValueError, RecursionError) as error:
        yield ValueError(
            f"{path} begins as a JSON array and is none ({error}): mend it"
        )
    else:
        if not records:
            yield empty(path)
        for number, record in enumerate(records, start=1):
            yield _at(f"{path}, element {number}", _taken(record, take))


def _rows(path: AnyPath, take: Take[T], on_bytes: OnBytes) -> Iterator[T | Exception]:
    """Yields what each row gives or its error; at damage, one error for the rest."""
    parquet = _pyarrow_parquet(path)
    number = 0
    try:
        for row in _scalars(parquet, path, take, on_bytes):
            number += 1
            yield _at(f"{path}, row {number}", _of_row(row, take))
    except DamagedError as error:
        yield _after("row", number, error)
    else:
        if not number:
            yield empty(path)


def _scalars(
    parquet: Any, path: AnyPath, take: Take[Any], on_bytes: OnBytes
) -> Iterator[dict[str, Any]]:
    """Yields rows as Arrow's scalars by column, of the columns that are needed."""
    with (
        read_errors(path),
        path.open("rb") as raw,
        parquet.ParquetFile(raw, page_checksum_verification=True) as file,
    ):
        try:
            names, lacking = take.columns(file.schema_arrow.names), None
        except ValueError as error:
            names, lacking = [], error
        share = path.stat().st_size / max(file.metadata.num_rows, 1)
        for batch in file.iter_batches(_ROWS, columns=names) if names else ():
            on_bytes(round(share * len(batch)))
            for row in zip(*batch.columns, strict=True):
                yield dict(zip(batch.schema.names, row, strict=True))
    if lacking is not None:
        raise ValueError(f"{path}: {lacking}") from lacking


def _of_row(row: dict[str, Any], take: Take[T]) -> T | Exception:
    try:
        record = {name: _unpadded(value.as_py()) for name, value in row.items()}
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 text ({error}): mend the row")
    return _taken(record, take)


def _unpadded(value: Any) -> Any:
    """Without nulls in objects: all objects of a column have the fields of all."""
    if isinstance(value, dict):
        return {name: _unpadded(x) for name, x in value.items() if x is not None}
    if isinstance(value, list):
        return [_unpadded(x) for x in value]
    return value


def _taken(record: Any, take: Take[T]) -> T | Exception:
    try:
        return take(record)
    except ValueError as error:
        return error


def _at(where: str, taken: T | Exception) -> T | Exception:
    """The result of `take`, or its error with the place."""
    if not isinstance(taken, Exception):
        return taken
    kind = TakeError if isinstance(taken, TakeError) else ValueError
    return kind(f"{where}: {taken}")


def _after(unit: str, number: int, error: DamagedError) -> DamagedError:
    """The same error, with where the damage begins."""
    return DamagedError(f"after {unit} {number}: {error}") if number else error


def _pyarrow_parquet(path: AnyPath) -> Any:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path} needs pyarrow: pip install 'lowrank-optax[data]'"
        ) from error
    return pyarrow.parquet
