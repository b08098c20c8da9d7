"""Find and read the files that a data source names, with errors that name the path."""

import glob
import gzip
import importlib
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm
from upath import UPath

from train.host.paths import Place, place

Told = Callable[[int], object]
"""Is told how many more bytes of a file were read, as the file has them."""

_COMPRESSED = (".gz", ".xz", ".zst")
_BUFFER = 2**20
_DAMAGE = ("ZstdError", "ArrowInvalid")


class DamagedError(ValueError):
    """A file was read, but its content is empty, cut short, or not what it should be.

    What a disk or a store refuses is another ValueError: the content may be whole.
    """


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
    """The suffix before any `.gz`, `.xz` or `.zst`: ".u16" for "a.u16.xz"."""
    return path.with_suffix("").suffix if path.suffix in _COMPRESSED else path.suffix


def read_file(path: Place, told: Told | None = None) -> bytes:
    """The bytes of a file, decompressed if it ends in `.gz`, `.xz` or `.zst`.

    Without a `told`, a progress bar appears on a terminal when reading takes more than
    a second.

    Raises:
      DamagedError: the file is empty or damaged.
      ModuleNotFoundError: it is `.zst`, and the package for that is not installed.
      ValueError: it may not be read.
    """
    disable = None if told is None else True
    bar = {"desc": path.name, "unit": "B", "unit_scale": True, "disable": disable}
    with (
        unreadable(path),
        tqdm(total=path.stat().st_size, delay=1, leave=False, **bar) as counted,
        _opened(path, told or counted.update) as stream,
    ):
        content = stream.read()
    if not content:
        raise empty(path)
    return content


def read_lines(path: Place, told: Told) -> Iterator[bytes]:
    """The lines of a file one by one, decompressed, without their line feeds.

    Raises:
      DamagedError, ModuleNotFoundError, ValueError: as `read_file`; those of damage
        come after the lines before it.
    """
    number = 0
    with unreadable(path), _opened(path, told) as stream:
        for line in stream:
            yield line.removesuffix(b"\n")
            number += 1
    if not number:
        raise empty(path)


def empty(path: Place) -> DamagedError:
    return DamagedError(f"{path} is empty: remove it from the source or refill it")


@contextmanager
def unreadable(path: Place) -> Iterator[None]:
    """What goes wrong as a file is read, as the errors of `read_file`."""
    try:
        yield
    except ModuleNotFoundError:
        raise
    except Exception as error:  # of a store, or of data that is damaged
        kind = DamagedError if _is_damage(error) else ValueError
        raise kind(
            f"{path} cannot be read ({' '.join(str(error).split())}): it may be cut "
            "short or damaged; fetch it again or check its permissions"
        ) from error


def _is_damage(error: Exception) -> bool:
    """Whether it comes from what decodes the content, not from the system or a store.

    Arrow's errors, and Zstandard's, are known by name: they may not be installed.
    """
    of_codecs = EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError
    if isinstance(error, of_codecs) or type(error).__name__ in _DAMAGE:
        return True
    return type(error) is OSError and error.errno is None  # Arrow's, of a page


@contextmanager
def _opened(path: Place, told: Told) -> Iterator[Any]:
    """The decompressed content as a stream."""
    decompress = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix)
    if path.suffix == ".zst":
        decompress = _zstd(path).open
    with path.open("rb") as raw, io.BufferedReader(_Counted(raw, told), _BUFFER) as own:
        yield decompress(own) if decompress else own


def _zstd(path: Place) -> Any:
    """Python's own, of 3.14, which says where a file was cut short; not all do."""
    name = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path} needs {name}: pip install 'lowrank-optax[data]'"
        ) from error


class _Counted(io.RawIOBase):
    """Reads from a file, and tells how much."""

    def __init__(self, file: Any, told: Told):
        self._file, self._told = file, told

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._file.read(len(buffer))
        buffer[: len(content)] = content
        self._told(len(content))
        return len(content)


def read_range(path: Place, start: int, end: int) -> bytes:
    """Bytes `start` up to `end` of a file as it is; fewer where it ends before."""
    if isinstance(path, UPath):
        fs: Any = path.fs
        return fs.cat_file(path.path, start=start, end=end)
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        return file.read(end - start)
