"""Concatenates token arrays and splits the stream into windows.

grain has `ConcatThenSplitIterDataset`, but grain 0.2.18 compares a tuple in its state
with the list that JSON makes of it, so a restored checkpoint can lose a document. The
state here is two plain values.
"""

from typing import Any

import grain
import numpy as np

_EMPTY_IN_A_ROW = 100_000


class Windows(grain.IterDataset[np.ndarray]):
    """Windows of `length` int32 tokens from a stream of token arrays of any length.

    Joined, the windows are the joined arrays: nothing is lost, doubled or padded. If
    the parent ends, the last window holds the remaining 1 to `length` tokens.

    Raises:
      ValueError: from an iterator, if 100,000 arrays in a row are empty; or from its
        `set_state`, if the array in which the state was taken has become shorter.
    """

    def __init__(self, parent: grain.IterDataset[np.ndarray], length: int):
        super().__init__(parent)
        self._pieces = parent
        self._length = length

    def __iter__(self) -> "_WindowIterator":
        return _WindowIterator(iter(self._pieces), self._length)


class _WindowIterator(grain.DatasetIterator[np.ndarray]):
    """State: where the parent was before the piece in hand, and how much is used."""

    def __init__(self, pieces: grain.DatasetIterator[np.ndarray], length: int):
        super().__init__(pieces)
        self._pieces = pieces
        self._length = length
        self._clear()

    def _clear(self) -> None:
        self._before = self._pieces.get_state()
        self._piece = np.empty(0, np.int32)
        self._used = 0

    def _advance(self) -> None:
        """Takes the next piece that is not empty."""
        for _ in range(_EMPTY_IN_A_ROW):
            before = self._pieces.get_state()
            piece = next(self._pieces)
            if len(piece):
                self._before, self._piece, self._used = before, piece, 0
                return
        raise ValueError(
            f"{_EMPTY_IN_A_ROW} documents in a row hold no token: look into the source"
        )

    def __next__(self) -> np.ndarray:
        window = np.empty(self._length, np.int32)
        filled = 0
        while filled < self._length:
            if self._used == len(self._piece):
                try:
                    self._advance()
                except StopIteration:
                    if filled:
                        return window[:filled]
                    raise
            take = self._piece[self._used : self._used + self._length - filled]
            window[filled : filled + len(take)] = take
            filled += len(take)
            self._used += len(take)
        return window

    def get_state(self) -> dict[str, Any]:
        return {"before": self._before, "used": self._used}

    def set_state(self, state: dict[str, Any]) -> None:
        self._pieces.set_state(state["before"])
        self._clear()
        if state["used"]:
            self._piece = next(self._pieces)
            if state["used"] > len(self._piece):
                raise ValueError(
                    f"the run stopped {state['used']} tokens into a document that now "
                    f"has {len(self._piece)}: resume with the text it was trained on"
                )
            self._used = state["used"]
