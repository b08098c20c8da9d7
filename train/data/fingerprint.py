"""A summary of what a run reads, which shows before a resume whether that changed."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any

from upath import UPath

from train.data.files import read_range
from train.data.tokenizer import Tokenizer
from train.host.paths import AnyPath

Fingerprint = dict[str, Any]
"""Values that JSON gives back as they were."""

_SOURCES = ("source", "eval_source", "tokenizer")
_OF_EXAMPLES = "chat_template"
_PUT_BACK = "put it back, or start a new run in another --out"
_BLOCK = 2**16
_LISTED = 100
_REPORTED = 5


def of_files(paths: Sequence[AnyPath]) -> Fingerprint:
    """Fingerprint of files in order: name, size, and first, middle and last 64 KiB.

    A name starts at the folder that all files share, wherever that is. No more than
    that is read, so it is quick for any size.

    Raises:
      OSError: a file cannot be read.
    """
    names = [_name(path) for path in paths]
    folder = os.path.commonpath([name.parent for name in names])
    inside = [name.relative_to(folder).as_posix() for name in names]
    with ThreadPoolExecutor(16) as pool:
        parts = list(pool.map(_of_file, paths, inside))
    total = sum(part["bytes"] for part in parts)
    return {"files": len(parts), "bytes": total, **of_parts(parts)}


def of_parts(parts: Sequence[Mapping[str, Any]]) -> Fingerprint:
    """A digest of all parts, and the parts themselves if there are at most 100."""
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return {"sha256": digest} | ({"parts": parts} if len(parts) <= _LISTED else {})


def _name(path: AnyPath) -> PurePosixPath:
    """A path without the kind of store: data may move from a disk into a bucket."""
    if isinstance(path, UPath):
        return PurePosixPath("/", path.path.lstrip("/"))
    return PurePosixPath(path.as_posix())


def _of_file(path: AnyPath, name: str) -> Fingerprint:
    digest = hashlib.sha256()
    size = path.stat().st_size
    starts = {0, max(size - _BLOCK, 0) // 2, max(size - _BLOCK, 0)}
    for start in sorted(starts):
        digest.update(read_range(path, start, min(start + _BLOCK, size)))
    return {"name": name, "bytes": size, "sha256": digest.hexdigest()}


def of_tokenizer(tokenizer: Tokenizer) -> Fingerprint:
    """Fingerprint of the file that a tokenizer was read from."""
    return {
        "kind": tokenizer.suffix,
        "vocab_size": tokenizer.vocab_size,
        "sha256": hashlib.sha256(tokenizer.content).hexdigest(),
    }


def read_fingerprint(path: AnyPath) -> Fingerprint:
    """The `Data.fingerprint` that a run has stored.

    Raises:
      ValueError: the file cannot be read, or holds something else.
    """
    try:
        stored = json.loads(path.read_text())
    except (OSError, RecursionError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): {_PUT_BACK}") from error
    if not _is_fingerprint(stored):
        raise ValueError(f"{path} is not what a run knows its data by: {_PUT_BACK}")
    return stored


def _is_fingerprint(stored: Any) -> bool:
    if not isinstance(stored, dict) or stored.keys() - {_OF_EXAMPLES} != {*_SOURCES}:
        return False
    sources = [*stored.values()]
    if stored["source"] is None or not all(isinstance(x, dict | None) for x in sources):
        return False
    parts = [x.get("parts", []) for x in sources if x is not None]
    return all(
        isinstance(listed, list)
        and all(isinstance(part, dict) and "name" in part for part in listed)
        for listed in parts
    )


def changed(stored: Fingerprint, now: Fingerprint) -> list[str]:
    """A sentence for each difference between two `Data.fingerprint`; none if alike.

    Args:
      stored: that of the run when it stopped ("there").
      now: that of the data it would go on with ("here").
    """
    return [
        f"{what}: {difference}"
        for what in sorted(stored.keys() | now.keys())
        for difference in _of_source(stored.get(what), now.get(what))
    ]


def _of_source(was: Fingerprint | None, now: Fingerprint | None) -> list[str]:
    if was is None or now is None:
        counts = ("none" if x is None else "one" for x in (was, now))
        return [] if was is now else ["{} there, {} here".format(*counts)]
    listed = "parts" in was and "parts" in now
    keys = [key for key in was | now if not (listed and key == "sha256")]
    found = [x for key in keys for x in _values(key, was.get(key), now.get(key))]
    if not listed or was["parts"] == now["parts"]:
        return found
    parts = list(_of_parts(was["parts"], now["parts"]))
    more = [f"{len(parts) - _REPORTED} more differences"]
    return found + parts[:_REPORTED] + (more if len(parts) > _REPORTED else [])


def _of_parts(was: list[Fingerprint], now: list[Fingerprint]) -> Iterator[str]:
    there = {part["name"]: part for part in was}
    here = {part["name"]: part for part in now}
    yield from (f"{name} is only there" for name in there if name not in here)
    yield from (f"{name} is only here" for name in here if name not in there)
    for name in (name for name in there if name in here):
        for key in there[name]:
            for difference in _values(key, there[name][key], here[name].get(key)):
                yield f"{name}: {difference}"
    if there == here:
        yield "the files come in another order"


def _values(key: str, was: Any, now: Any) -> list[str]:
    """ "sha256 12ab34 there, 56cd78 here", unless they are alike."""
    if was == now or key == "parts":
        return []
    was, now = (
        "none" if value is None else value[:12] if key == "sha256" else value
        for value in (was, now)
    )
    return [f"{key} {was} there, {now} here"]
