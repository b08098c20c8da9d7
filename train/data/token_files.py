"""Token files: raw little-endian integers or .npy, read window by window."""

import functools
import io
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np
from tqdm import tqdm
from upath import UPath

from train.data.files import content_suffix, find_files, read_file, read_range
from train.host.paths import AnyPath

_RAW = {".u16": "<u2", ".bin": "<u2", ".u32": "<u4"}
TOKEN_SUFFIXES = (*_RAW, ".npy")
_BLOCK = 2**18
_CHECKED_BLOCKS = 1024
_NPY_HEADER = 2**12
"""Bytes with room for the header of a vector."""


class TokenFile:
    """A vector of token ids in a file; a slice reads it and checks its ids.

    Every read goes to the file system or the bucket: a memory map of a file that is
    truncated meanwhile would end the process. The content of a compressed file is held
    in memory.

    Raises:
      ValueError: from a slice, if the file has become shorter or cannot be read, or
        holds an id outside the vocabulary.
    """

    def __init__(
        self,
        path: AnyPath,
        dtype: np.dtype,
        length: int,
        *,
        offset: int = 0,
        content: bytes | None = None,
        vocab_size: int | None = None,
    ):
        self.path = path
        self._dtype = dtype
        self._length = length
        self._offset = offset
        self._content = content
        self._vocab_size = vocab_size

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, span: slice) -> np.ndarray:
        start, stop, _ = span.indices(self._length)
        width = self._dtype.itemsize
        first, count = self._offset + start * width, max(stop - start, 0) * width
        if self._content is None:
            content = self._read(first, count)
        else:
            content = self._content[first : first + count]
        tokens = np.frombuffer(content, self._dtype)
        self._check(tokens)
        return tokens.astype(np.int32)

    def _read(self, first: int, count: int) -> bytes:
        end = first + count
        try:
            content = self._bytes(first, end)
            size = end if len(content) == count else self.path.stat().st_size
        except Exception as error:  # of as many classes as there are stores
            raise ValueError(
                f"{self.path} cannot be read ({error}): check the disk and its "
                "permissions"
            ) from error
        if len(content) < count:
            raise ValueError(
                f"{self.path} has {size} bytes, but had at least {end} when it was "
                "opened: put the complete file back and resume"
            )
        return content

    def _bytes(self, position: int, end: int) -> bytes:
        """Fewer, if the file ends before."""
        if isinstance(self.path, UPath):
            return read_range(self.path, position, end)
        parts, file = [], _opened(self)
        while position < end:
            part = os.pread(file.fileno(), end - position, position)
            if not part:
                break
            parts.append(part)
            position += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _check(self, tokens: np.ndarray) -> None:
        largest = int(tokens.max(initial=0))
        if self._vocab_size is not None and largest >= self._vocab_size:
            raise ValueError(
                f"{self.path} holds token id {largest}, outside the vocabulary of "
                f"{self._vocab_size}: state the vocab_size or tokenizer the file was "
                "made for"
            )
        if largest >= 2**31:
            raise ValueError(
                f"{self.path} holds token id {largest}, but ids are below 2**31: it is "
                "damaged, or not a file of tokens"
            )


@functools.lru_cache(maxsize=128)
def _opened(file: TokenFile) -> io.FileIO:
    """Stays open for the next window; few enough for the limit on open files."""
    return io.FileIO(str(file.path))


class Span(NamedTuple):
    """The tokens from `start` up to `stop` of a file."""

    file: TokenFile
    start: int
    stop: int


def open_tokens(
    source: str, *, vocab_size: int | None = None
) -> tuple[list[Span], int]:
    """The tokens of a source's files, and the size of their vocabulary.

    `.u16` and `.bin` hold little-endian uint16, `.u32` uint32, `.npy` a vector of
    either; raw files may be compressed (`.gz`, `.xz`, `.zst`) and are then held in
    memory. Ids are checked here, a sample of them if the files hold more than 2**28
    tokens, and again as they are read. Without a `vocab_size` all are checked, for the
    largest one.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a file is empty, damaged, of an unknown kind, cut within a token, or
        holds an id outside the stated vocabulary.
    """
    files = [_open(path, vocab_size) for path in find_files(source)]
    spans = [Span(file, 0, len(file)) for file in files]
    blocks = list(_blocks_to_check(files, complete=vocab_size is None))
    bar = tqdm(blocks, "checking tokens", disable=None, delay=1, leave=False)
    largest = max(int(file[start : start + _BLOCK].max()) for file, start in bar)
    return spans, largest + 1 if vocab_size is None else vocab_size


def _blocks_to_check(
    files: Sequence[TokenFile], complete: bool
) -> Iterator[tuple[TokenFile, int]]:
    """Blocks of each file and where they start: all, or evenly spread ones."""
    total = sum(-(-len(file) // _BLOCK) for file in files)
    every = 1 if complete else -(-total // _CHECKED_BLOCKS)
    for file in files:
        starts = range(0, len(file), _BLOCK * every)
        yield from ((file, start) for start in starts)


def _open(path: AnyPath, vocab_size: int | None) -> TokenFile:
    suffix = content_suffix(path)
    if path.suffix == ".npy":
        return _open_npy(path, vocab_size)
    if suffix not in _RAW:
        raise ValueError(
            f"{path} is not a token file: expected one of {', '.join(TOKEN_SUFFIXES)} "
            "(raw ones also .gz, .xz or .zst)"
        )
    dtype = np.dtype(_RAW[suffix])
    content = read_file(path) if suffix != path.suffix else None
    size = path.stat().st_size if content is None else len(content)
    if size == 0:
        raise ValueError(f"{path} is empty: remove it from the source or refill it")
    if size % dtype.itemsize:
        raise ValueError(
            f"{path} holds {size} bytes, not a multiple of {dtype.itemsize} as "
            f"{suffix} needs: it is cut short or of another width"
        )
    length = size // dtype.itemsize
    return TokenFile(path, dtype, length, content=content, vocab_size=vocab_size)


def _open_npy(path: AnyPath, vocab_size: int | None) -> TokenFile:
    try:
        shape, dtype, offset = _npy_header(path)
        lacking = offset + math.prod(shape) * dtype.itemsize - path.stat().st_size
        if lacking > 0:
            raise ValueError(f"it is {lacking} bytes too short")
    except Exception as error:  # of a store, or of what is no such file
        raise ValueError(
            f"{path} cannot be read as .npy ({error}): write it again with numpy.save, "
            "or check its permissions"
        ) from error
    if len(shape) != 1 or dtype not in (np.uint16, np.uint32) or not shape[0]:
        raise ValueError(
            f"{path} holds {dtype} of shape {shape}: expected a non-empty vector of "
            "uint16 or uint32"
        )
    return TokenFile(path, dtype, shape[0], offset=offset, vocab_size=vocab_size)


def _npy_header(path: AnyPath) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, dtype, and where the numbers begin."""
    file = io.BytesIO(read_range(path, 0, min(_NPY_HEADER, path.stat().st_size)))
    if np.lib.format.read_magic(file) == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    return shape, dtype, file.tell()


def count_tokens(spans: Iterable[Span]) -> int:
    return sum(span.stop - span.start for span in spans)


def split_tokens(spans: Sequence[Span], held_out: int) -> tuple[list[Span], list[Span]]:
    """Splits the files' last `held_out` tokens off: (training, held-out) parts."""
    training: list[Span] = []
    held: list[Span] = []
    for span in reversed(spans):
        border = max(span.stop - held_out, span.start)
        held_out -= span.stop - border
        training.insert(0, span._replace(stop=border))
        held.insert(0, span._replace(start=border))
    return training, held


def windows(
    spans: Sequence[Span], length: int, *, partial: bool = False
) -> grain.MapDataset[np.ndarray]:
    """Non-overlapping windows of each span, as int32.

    A last piece shorter than a window is left out, unless `partial`.
    """

    def of_one(span: Span) -> grain.MapDataset[np.ndarray]:
        file, start, stop = span
        end = stop if partial else stop - (stop - start) % length
        starts = grain.MapDataset.range(start, end, length)
        return starts.map(lambda first: file[first : min(first + length, end)])

    shortest = 1 if partial else length
    return grain.MapDataset.concatenate(
        [of_one(span) for span in spans if span.stop - span.start >= shortest]
    )
