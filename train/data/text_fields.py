"""The text in a record, by the name of its field."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from train.data.examples import fits_a_form

LONGEST = 2**25
"""Bytes of a line, and characters of a text in a record: 32 MiB. Longer ones are
refused, as tokenizing a document takes many times its size in memory."""


@dataclass(frozen=True)
class TextField:
    """Takes the text of a record's field (`text_at`); of Parquet, its column alone."""

    name: str

    def columns(self, there: Sequence[str]) -> list[str]:
        """The column that has the field; ValueError if there is none."""
        column = self.name if self.name in there else self.name.partition(".")[0]
        if column not in there:
            raise ValueError(
                f"no text in field {self.name!r}; the columns are {[*there]}: "
                f"{_remedy(there)}"
            )
        return [column]

    def __call__(self, record: Any) -> str:
        return text_at(record, self.name)


def text_at(record: Any, field: str) -> str:
    """The text of a record's field: a string, bytes in UTF-8, or a list of these.

    "meta.text" is the field `text` within the field `meta`, if no field is named
    "meta.text". Of a list of records it is that of each. The texts of a list are joined
    by line feeds.

    Raises:
      ValueError: there is no such field, it holds something else, or too much.
    """
    if not isinstance(record, dict):
        raise ValueError(
            f"no text in field {field!r}; there is {_kind(record)}, and no fields: "
            f'write {{"{field}": "..."}}'
        )
    text = _joined(_found(record, field), field)
    if len(text) > LONGEST:
        raise too_long()
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("half a surrogate pair: mend the \\u escapes") from error
    return text


def too_long() -> ValueError:
    return ValueError(
        f"a document of more than {LONGEST >> 20} MiB, which is the limit: split it"
    )


def _found(value: Any, field: str) -> Any:
    if isinstance(value, list):
        return [_found(item, field) for item in value]
    if isinstance(value, dict):
        if field in value:
            return value[field]
        head, dot, rest = field.partition(".")
        if dot and head in value:
            return _found(value[head], rest)
    there = f"only {sorted(value)}" if isinstance(value, dict) else _kind(value)
    remedy = _remedy(value if isinstance(value, dict) else ())
    raise ValueError(f"no text in field {field!r}; there is {there}: {remedy}")


def _remedy(fields: Iterable[str]) -> str:
    """The advice for records that have these fields, and no text."""
    if fits_a_form(fields):
        return "set --windows examples to train on examples, or --text-field"
    return "set --text-field"


def _joined(value: Any, field: str) -> str:
    if isinstance(value, list) and value:
        return "\n".join(_joined(item, field) for item in value)
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"no text in field {field!r}; it is not UTF-8 ({error})"
            ) from error
    if not isinstance(value, str):
        inside = isinstance(value, dict) and value
        to = f" to one of them, as {field}.{min(value)}" if inside else ""
        raise ValueError(
            f"no text in field {field!r}; it holds {_kind(value)}: set --text-field{to}"
        )
    return value


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return f"fields {sorted(value)}"
    names = {list: "a list", str: "a string", type(None): "null"}
    return names.get(type(value), type(value).__name__)
