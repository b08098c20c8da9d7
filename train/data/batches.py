"""Batches of windows, of which each process makes its own rows."""

import sys
from collections.abc import Sequence
from typing import cast

import grain
import numpy as np

from train.data.packed_windows import Windows
from train.data.padded_windows import Window

Pieces = grain.MapDataset[np.ndarray]
"""Token arrays with random access: documents, or windows of token files."""

WindowDataset = grain.MapDataset[Window]
"""Windows with random access, each with the same names and shapes."""

Batches = grain.IterDataset[dict[str, np.ndarray]]


def prefetched(pieces: grain.MapDataset) -> grain.IterDataset:
    """Reads in order, once; a few ahead hide the tokenizing and cost little to redo."""
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)
    return pieces.to_iter_dataset(options)


def packed_batches(
    documents: Pieces, seq_len: int, batch_size: int, share: slice
) -> Batches:
    """Endless batches of the joined documents, in which windows begin anywhere.

    A window's start depends on all documents before it, so every process packs the
    whole batch and takes its share of the rows.
    """
    packed = Windows(prefetched(documents.repeat()), seq_len)
    return packed.batch(batch_size).map(lambda tokens: {"tokens": tokens[share]})


def endless_batches(rows: WindowDataset, batch_size: int, share: slice) -> Batches:
    """Endless batches of complete windows, of which only the share is read."""
    return _batches(rows.repeat(), sys.maxsize // batch_size, batch_size, share)


def finite_batches(rows: WindowDataset, batch_size: int, share: slice) -> Batches:
    """Batches of each window once; the last is filled up with zeros."""
    return _batches(rows, -(-len(rows) // batch_size), batch_size, share)


def _batches(rows: WindowDataset, count: int, batch_size: int, share: slice) -> Batches:
    there = cast(Sequence[Window], rows)
    size = len(range(batch_size)[share])

    def batch(step: int) -> dict[str, np.ndarray]:
        numbers = range(step * batch_size, (step + 1) * batch_size)[share]
        own = [there[number] for number in numbers if number < len(rows)]
        if len(own) < size:
            nothing = {name: np.zeros_like(x) for name, x in there[0].items()}
            own += [nothing] * (size - len(own))
        return {name: np.stack([row[name] for row in own]) for name in own[0]}

    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    return grain.MapDataset.range(count).map(batch).to_iter_dataset(options)


def packed_evaluation(
    pieces: Pieces, seq_len: int, batch_size: int, share: slice
) -> Batches:
    """Every process packs all that is held out, so that all have as many batches."""

    def weigh(window: np.ndarray) -> dict[str, np.ndarray]:
        padding = (0, seq_len - len(window))
        weights = np.ones(len(window), np.float32)
        return {"tokens": np.pad(window, padding), "weights": np.pad(weights, padding)}

    def fill(examples: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return grain.experimental.batch_and_pad(examples, batch_size=batch_size)

    windowed = Windows(prefetched(pieces), seq_len).map(weigh)
    return windowed.batch(batch_size, batch_fn=fill).map(
        lambda batch: {name: values[share] for name, values in batch.items()}
    )
