"""Windows of one document each: longer ones are truncated, shorter ones padded."""

from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from train.data.token_files import Span, TokenFile

Window = dict[str, np.ndarray]
"""One window of a batch."""

_BLOCK = 2**22


def document_window(tokens: np.ndarray, length: int, end: int) -> Window:
    """A document as a window.

    The result is that of t5's tokenizer with truncation and padding, as in the
    pre-training scripts of GaLore (torchrun_main.py, followed by Fira, APOLLO, SARA,
    SubTrack++): a longer document gives its first `length - 1` tokens and the end
    token, another one all its tokens, the last of which is the end token, and padding.
    They label padding -100; here its weight is 0. Neither is a target. Deviation: a
    loss is the mean over all targets of a batch, not first over those of each device.

    Args:
      tokens: of the document, with its end token.
      length: of the window, T.
      end: the id of the end token.

    Returns:
      {"tokens": int32 (T,), "weights": float32 (T,)}, 0 where there is padding.

    Example:
      document_window(np.array([7, 8, 9, 1]), 3, end=1)["tokens"]  # [7, 8, 1]
      document_window(np.array([7, 1]), 3, end=1)["weights"]  # [1, 1, 0]
    """
    row = {"tokens": np.zeros(length, np.int32), "weights": np.zeros(length, "f4")}
    taken = tokens[:length]
    row["tokens"][: len(taken)] = taken
    row["weights"][: len(taken)] = 1
    if len(tokens) > length:
        row["tokens"][-1] = end
    return row


class TokenDocuments(Sequence[np.ndarray]):
    """The documents in token files, each up to its end token.

    All files are searched once for the ends, which take 4 bytes of memory a document (8
    in a file of 2**32 tokens or more). Tokens after a file's last end token are a
    document too.

    Raises:
      ValueError: a file has no end token.
    """

    def __init__(self, spans: Sequence[Span], end: int, longest: int):
        """Reads no more than the first `longest` tokens of a document."""
        size = sum(len(span.file) for span in spans)
        bar = {"unit": "token", "unit_scale": True, "disable": None, "delay": 1}
        with tqdm(desc="finding documents", total=size, leave=False, **bar) as found:
            self._ends = [_ends(span.file, end, found) for span in spans]
        self._files = [span.file for span in spans]
        self._firsts = np.cumsum([0, *map(len, self._ends)])
        self._longest = longest

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._firsts, index, "right")) - 1
        ends, own = self._ends[number], index - int(self._firsts[number])
        start, stop = int(ends[own - 1]) if own else 0, int(ends[own])
        return self._files[number][start : min(stop, start + self._longest)]


def _ends(file: TokenFile, end: int, bar: tqdm) -> np.ndarray:
    """The position after each document's last token."""
    found = []
    for start in range(0, len(file), _BLOCK):
        block = file[start : start + _BLOCK]
        found.append(np.flatnonzero(block == end) + (start + 1))
        bar.update(len(block))
    ends = np.concatenate(found)
    if not len(ends):
        raise ValueError(
            f"{file.path} has no token {end}, with which documents of its tokenizer "
            "end: name the tokenizer it was made with, or set windows to packed"
        )
    if ends[-1] < len(file):
        ends = np.append(ends, len(file))
    return ends.astype(np.uint32 if len(file) < 2**32 else np.int64)
