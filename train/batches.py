"""Batches of windows, of which each process makes its own rows."""

import sys
from collections.abc import Sequence
from typing import cast

import grain
import numpy as np

from train.packing import Windows

Pieces = grain.MapDataset[np.ndarray]
"""Token arrays with random access: documents, or windows of token files."""

Batches = grain.IterDataset[dict[str, np.ndarray]]


def prefetched(pieces: grain.MapDataset) -> grain.IterDataset:
    """In order, once. Few ahead: they hide the tokenizing and cost little to redo."""
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)
    return pieces.to_iter_dataset(options)


def packed_batches(
    documents: Pieces, seq_len: int, batch_size: int, share: slice
) -> Batches:
    """Endless batches of the documents joined, in which windows begin anywhere.

    Where one begins depends on all documents before it, so every process packs the
    whole batch and keeps its share of the rows.
    """
    packed = Windows(prefetched(documents.repeat()), seq_len)
    return packed.batch(batch_size).map(lambda tokens: {"tokens": tokens[share]})


def window_batches(windows: Pieces, batch_size: int, share: slice) -> Batches:
    """Endless batches of windows as they are, of which only the share is read."""
    endless = cast(Sequence[np.ndarray], windows.repeat())

    def rows(step: int) -> dict[str, np.ndarray]:
        batch = range(step * batch_size, (step + 1) * batch_size)
        return {"tokens": np.stack([endless[index] for index in batch[share]])}

    steps = grain.MapDataset.range(sys.maxsize // batch_size)
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    return steps.map(rows).to_iter_dataset(options)


def evaluation_batches(
    pieces: Pieces, seq_len: int, batch_size: int, share: slice
) -> Batches:
    """Every process packs all that is held out, so all have as many batches."""

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
