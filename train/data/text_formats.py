"""The texts in a file: one in plain text, one a line of JSON, one a row of Parquet."""

import codecs
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
    read_start,
)
from train.data.text_fields import LONGEST, text_at, too_long
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

    `.txt` is one text, `.jsonl` and `.json` have one in a field of each line (as C4's
    and SlimPajama's shards do) or, in `.json`, of each element of an array, which is
    held in memory; all plain or with `.gz`, `.xz` or `.zst` after it; `.parquet` has
    one in each row of a column.

    Args:
      path: the file.
      field: the field of an object, or the column, that holds the text (`text_at`).
      bad: decides what happens to what cannot be read: a line that is no JSON object or
        not UTF-8, a field that is missing, no text or too long, an empty file, and
        everything after the point where one is damaged or cut short. (Overwritten gzip
        may show only at its end.)
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
    if content_suffix(path) == ".json" and _begins_array(path):
        yield from _items(path, field, on_bytes)
        return
    number = 0
    try:
        for number, line in enumerate(read_lines(path, on_bytes, LONGEST), start=1):
            where = f"{path}, line {number}"
            yield _at(where, too_long() if line is None else _json_text(line, field))
    except DamagedError as error:
        yield _after("line", number, error)


def _begins_array(path: AnyPath) -> bool:
    start = read_start(path, 64).removeprefix(codecs.BOM_UTF8)
    return start.lstrip().startswith(b"[")


def _json_text(line: bytes, field: str) -> str | Exception:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return ValueError(f"not valid JSON ({error}): mend the line")
    return _text(record, field)


def _items(path: AnyPath, field: str, on_bytes: OnBytes) -> Iterator[str | Exception]:
    """Yields the text of each element of a JSON array, or its error."""
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
            yield _at(f"{path}, element {number}", _text(record, field))


def _rows(path: AnyPath, field: str, on_bytes: OnBytes) -> Iterator[str | Exception]:
    """Yields the text of each row or its error; at damage, one error for the rest."""
    parquet = _pyarrow_parquet(path)
    number = 0
    try:
        for name, value in _column(parquet, path, field, on_bytes):
            number += 1
            yield _at(f"{path}, row {number}", _row_text(name, value, field))
    except DamagedError as error:
        yield _after("row", number, error)
    else:
        if not number:
            yield empty(path)


def _column(
    parquet: Any, path: AnyPath, field: str, on_bytes: OnBytes
) -> Iterator[tuple[str, Any]]:
    """Arrow's scalars of the column that has the field, with its name."""
    with (
        read_errors(path),
        path.open("rb") as raw,
        parquet.ParquetFile(raw, page_checksum_verification=True) as file,
    ):
        there = file.schema_arrow.names
        name = field if field in there else field.partition(".")[0]
        if name in there:
            share = path.stat().st_size / max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(_ROWS, columns=[name]):
                on_bytes(round(share * len(batch)))
                yield from ((name, value) for value in batch.column(0))
    if name not in there:
        raise ValueError(
            f"{path}: no text in field {field!r}; the columns are {there}: set "
            "text_field"
        )


def _row_text(name: str, value: Any, field: str) -> str | Exception:
    try:
        record = {name: value.as_py()}
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 text ({error}): mend the row")
    return _text(record, field)


def _text(record: Any, field: str) -> str | Exception:
    try:
        return text_at(record, field)
    except ValueError as error:
        return error


def _at(where: str, text: str | Exception) -> str | Exception:
    """The text, or the error with the place."""
    return text if isinstance(text, str) else ValueError(f"{where}: {text}")


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
