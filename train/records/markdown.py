"""Rows of results: JSON lines in a file, Markdown on the screen."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.host.atomic import check_writable

Row = dict[str, Any]


def rounded(row: Mapping[str, Any]) -> Row:
    """Rounds numbers to three digits, those within a mapping too."""

    def rounded_value(value: Any) -> Any:
        if isinstance(value, Mapping):
            return rounded(value)
        return round(value, 3) if isinstance(value, float) else value

    return {k: rounded_value(v) for k, v in row.items()}


def markdown(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """A table of the columns (keys and titles) that any row has."""
    shown = {k: title for k, title in columns.items() if any(k in row for row in rows)}

    def cell(row: Row, key: str) -> str:
        value = row.get(key, "-")
        return f"{value:.2f}" if isinstance(value, float) else str(value)

    lines = [shown.values(), *([cell(row, key) for key in shown] for row in rows)]
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join((head, "|" + "---|" * len(shown), *body))


def check_out(path: Path) -> None:
    """OSError unless rows can be appended to the file; makes it, and its folder."""
    check_writable(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.open("a").close()


def append(path: Path, rows: Sequence[Row], settings: Row) -> None:
    """Appends a JSON line for each row, with the settings that they share."""
    with path.open("a") as file:
        for row in rows:
            line = settings | rounded(row)
            file.write(json.dumps(line, default=str) + "\n")
