"""The texts in a file: one in plain text, one a line of JSON, one a row of Parquet."""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from train.data.files import (
    DamagedError,
    OnBytes,
    content_suffix,
    empty,
    read_errors,
    read_file,
    read_lines,
)
from train.host.paths import AnyPath

TEXT_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")

OnBadLines = Literal["error", "skip"]

_LISTED = 5
_ROWS = 1000


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
        """Counts an error; raises it as ValueError if that is the choice."""
        if self._choice == "error":
            raise ValueError(f"{error}, or set bad_lines to skip") from error
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

    `.txt` is one text, `.jsonl` and `.json` have one in a field of each line (as C4's
    and SlimPajama's shards do), each plain or with `.gz`, `.xz` or `.zst` after it;
    `.parquet` has one in each row of a column.

    Args:
      path: the file.
      field: the field of an object, or the column, that holds the text.
      bad: decides what happens to what cannot be read: a line that is no JSON object or
        not UTF-8, a field that is missing or no string, an empty file, and everything
        after the point where one is damaged or cut short. (Overwritten gzip may show
        only at its end.)
      on_bytes: called after every read.

    Raises:
      ModuleNotFoundError: `.zst` and `.parquet` need packages that are not installed.
      ValueError: `bad` refuses a text; the file cannot be read, or is of another kind,
        or Parquet without the column.
    """
    suffix = content_suffix(path)
    if suffix == ".txt":
        records: Iterable[Any] = _full_text(path, on_bytes)
    elif suffix in (".jsonl", ".json"):
        records = _objects(path, field, on_bytes)
    elif path.suffix == ".parquet":
        records = _rows(path, field, on_bytes)
    else:
        raise ValueError(
            f"{path} is not a text file: expected one of {', '.join(TEXT_SUFFIXES)} "
            "(all but .parquet plain, .gz, .xz or .zst)"
        )
    for record in records:
        if isinstance(record, str):
            yield record
        else:
            bad.meet(record)


def _full_text(path: AnyPath, on_bytes: OnBytes) -> Iterator[str | Exception]:
    """Yields the text, or what is wrong with it."""
    try:
        yield read_file(path, on_bytes).decode("utf-8-sig")  # without a byte order mark
    except UnicodeDecodeError as error:
        yield ValueError(f"{path} is not UTF-8 text ({error}): convert it")
    except DamagedError as error:
        yield error


def _objects(path: AnyPath, field: str, on_bytes: OnBytes) -> Iterator[str | Exception]:
    """Yields the text of each line or its error; at damage, one error for the rest."""
    number = 0
    try:
        for number, line in enumerate(read_lines(path, on_bytes), start=1):
            yield _json_text(line, f"{path}, line {number}", field)
    except DamagedError as error:
        yield _after("line", number, error)


def _json_text(line: bytes, where: str, field: str) -> str | Exception:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return ValueError(f"{where}: not valid JSON ({error}): mend the line")
    if not isinstance(record, dict):
        return _lacks(where, field, f"the line has {type(record).__name__}")
    text = record.get(field)
    if not isinstance(text, str):
        return _lacks(where, field, f"the line has {sorted(record)}")
    try:
        text.encode()
    except UnicodeEncodeError:
        return ValueError(
            f"{where}: half a surrogate pair: mend the line's \\u escapes"
        )
    return text


def _rows(path: AnyPath, field: str, on_bytes: OnBytes) -> Iterator[str | Exception]:
    """Yields the text of each row or its error; at damage, one error for the rest."""
    parquet = _pyarrow_parquet(path)
    number = 0
    try:
        for value in _column(parquet, path, field, on_bytes):
            number += 1
            yield _row_text(value, f"{path}, row {number}", field)
    except DamagedError as error:
        yield _after("row", number, error)
    else:
        if not number:
            yield empty(path)


def _column(
    parquet: Any, path: AnyPath, field: str, on_bytes: OnBytes
) -> Iterator[Any]:
    """Arrow's scalars of the column."""
    with (
        read_errors(path),
        path.open("rb") as raw,
        parquet.ParquetFile(raw, page_checksum_verification=True) as file,
    ):
        there = file.schema_arrow.names
        if field in there:
            share = path.stat().st_size / max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(_ROWS, columns=[field]):
                on_bytes(round(share * len(batch)))
                yield from batch.column(0)
    if field not in there:
        raise _lacks(path, field, f"the columns are {there}")


def _row_text(value: Any, where: str, field: str) -> str | Exception:
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        return ValueError(f"{where}: not UTF-8 text ({error}): mend the row")
    if not isinstance(text, str):
        return _lacks(where, field, f"the row has {type(text).__name__}")
    return text


def _lacks(where: object, field: str, has: str) -> ValueError:
    return ValueError(f"{where}: no text in field {field!r}; {has}: set text_field")


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
