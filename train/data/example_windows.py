"""Examples packed into windows, kept apart from each other.

grain's `FirstFitPackIterDataset` packs a stream: a window may have examples of two
epochs, and every process packs all. Here all lengths are known: windows are packed
once, have random access, and each process makes its own.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from train.data.padded_windows import Window


class ExampleTokens(NamedTuple):
    """An example, no longer than a window.

    Attributes:
      tokens: int32 (n,).
      targets: bool (n,), which of them are to be predicted; never the first.
    """

    tokens: np.ndarray
    targets: np.ndarray


def pack(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Packs lengths into bins of a size: best fit, the longest first.

    Each goes into the bin that it leaves the least space in, the newest of several, or
    into a new one. So few bins are needed: at most 11/9 of the fewest possible, plus
    one (https://doi.org/10.1137/0203025).

    Returns:
      The numbers of the lengths in each bin. Lengths that are alike go in their order.

    Raises:
      ValueError: a length is larger than the size.

    Example:
      >>> pack([3, 5, 2, 4], size=7)
      [[1, 2], [3, 0]]
    """
    if max(lengths, default=0) > size:
        raise ValueError(f"a length of {max(lengths)} does not fit into {size}")
    bins: list[list[int]] = []
    with_space: dict[int, list[int]] = defaultdict(list)
    spaces = 0  # bit s: there is a bin with space s
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[number]
        if fits := spaces >> length:
            left = (fits & -fits).bit_length() - 1
            bin_ = with_space[left + length].pop()
            if not with_space[left + length]:
                spaces ^= 1 << (left + length)
        else:
            left, bin_ = size - length, len(bins)
            bins.append([])
        bins[bin_].append(number)
        with_space[left].append(bin_)
        spaces |= 1 << left
    return bins


def example_window(examples: Sequence[ExampleTokens], length: int) -> Window:
    """Examples side by side in a window.

    Args:
      examples: with at most `length` tokens together.
      length: of the window, T.

    Returns:
      Arrays of (T,): "tokens" int32; "weights" float32, 1 for what is to be predicted;
      "segment_ids" int32, 1 for the first example, 2 for the second ..., and 0 for
      padding; "positions" int32, from 0 on in each example, and 0 in the padding.

    Example:
      >>> import numpy as np
      >>> one = ExampleTokens(np.array([7, 8]), np.array([False, True]))
      >>> window = example_window([one, one], 5)
      >>> window["segment_ids"].tolist(), window["positions"].tolist()
      ([1, 1, 2, 2, 0], [0, 1, 0, 1, 0])
    """
    window = {
        "tokens": np.zeros(length, np.int32),
        "weights": np.zeros(length, np.float32),
        "segment_ids": np.zeros(length, np.int32),
        "positions": np.zeros(length, np.int32),
    }
    start = 0
    for number, (tokens, targets) in enumerate(examples, start=1):
        own = slice(start, start + len(tokens))
        window["tokens"][own] = tokens
        window["weights"][own] = targets
        window["segment_ids"][own] = number
        window["positions"][own] = np.arange(len(tokens))
        start = own.stop
    return window
