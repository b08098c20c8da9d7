"""Token files: raw little-endian integers or .npy, memory mapped where possible."""

from collections.abc import Sequence
from pathlib import Path

import grain
import numpy as np

from train.files import content_suffix, find_files, read_file

_RAW = {".u16": "<u2", ".bin": "<u2", ".u32": "<u4"}
TOKEN_SUFFIXES = (*_RAW, ".npy")


def open_tokens(
    source: str, *, vocab_size: int | None = None
) -> tuple[list[np.ndarray], int]:
    """The token arrays of a source's files, and the largest token id plus one.

    `.u16` and `.bin` hold little-endian uint16, `.u32` uint32, `.npy` a vector of
    either; raw files may be compressed (`.xz`, `.gz`) and are then held in memory,
    the others are memory mapped. Every id is checked once, here.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a file is empty, damaged, of an unknown kind, cut within a token, or
        holds an id outside the stated vocabulary.
    """
    arrays, size = [], 0
    for path in find_files(source):
        tokens = _read_tokens(path)
        largest = int(tokens.max())
        if vocab_size is not None and largest >= vocab_size:
            raise ValueError(
                f"{path} holds token id {largest}, outside the vocabulary of "
                f"{vocab_size}: state the vocab_size or tokenizer the file was made for"
            )
        arrays.append(tokens)
        size = max(size, largest + 1)
    return arrays, size


def _read_tokens(path: Path) -> np.ndarray:
    suffix = content_suffix(path)
    if path.suffix == ".npy":
        return _read_npy(path)
    if suffix not in _RAW:
        raise ValueError(
            f"{path} is not a token file: expected one of {', '.join(TOKEN_SUFFIXES)} "
            "(raw ones also .xz or .gz)"
        )
    dtype = np.dtype(_RAW[suffix])
    compressed = suffix != path.suffix
    content = read_file(path) if compressed else b""
    size = len(content) if compressed else path.stat().st_size
    if size == 0:
        raise ValueError(f"{path} is empty: remove it from the source or refill it")
    if size % dtype.itemsize:
        raise ValueError(
            f"{path} holds {size} bytes, not a multiple of {dtype.itemsize} as "
            f"{suffix} needs: it is cut short or of another width"
        )
    return np.frombuffer(content, dtype) if compressed else np.memmap(path, dtype, "r")


def _read_npy(path: Path) -> np.ndarray:
    try:
        tokens = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"{path} cannot be read as .npy ({error}): write it again with numpy.save"
        ) from error
    if (
        tokens.ndim != 1
        or tokens.dtype not in (np.uint16, np.uint32)
        or not len(tokens)
    ):
        raise ValueError(
            f"{path} holds {tokens.dtype} of shape {tokens.shape}: expected a "
            "non-empty vector of uint16 or uint32"
        )
    return tokens


def split_tokens(
    arrays: Sequence[np.ndarray], held_out: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Cut the last `held_out` tokens off the files' end: (training, held-out) views."""
    training: list[np.ndarray] = []
    held: list[np.ndarray] = []
    for array in reversed(arrays):
        cut = len(array) - min(held_out, len(array))
        held_out -= len(array) - cut
        training.insert(0, array[:cut])
        held.insert(0, array[cut:])
    return training, held


def windows(arrays: Sequence[np.ndarray], length: int) -> grain.MapDataset[np.ndarray]:
    """Non-overlapping windows of each array; a last piece shorter than one is left."""

    def of_one(array: np.ndarray) -> grain.MapDataset[np.ndarray]:
        starts = grain.MapDataset.range(0, len(array) // length * length, length)
        return starts.map(lambda start: array[start : start + length])

    return grain.MapDataset.concatenate([of_one(a) for a in arrays if len(a) >= length])
