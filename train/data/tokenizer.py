"""Tokenizers: a byte-level BPE trained once and cached, or a file of the user's."""

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from train.host.atomic import write_text
from train.host.paths import AnyPath, to_path

_END = "<|endoftext|>"
_END_NAMES = (_END, "</s>", "<|end_of_text|>", "<eos>", "[EOS]")
_END_NAMES += ("<｜end▁of▁sentence｜>", "<|im_end|>")
_SAMPLE_CHARACTERS = 2**25
_LONGEST_WORD = 1000
_PIECE = 2**22
_SEARCHED = 2**12
_LONE_SPACE = re.compile(r"(?<=\S) (?=\S)")
_TOO_LONG = re.compile(rf"\S{{{_LONGEST_WORD}}}|\s{{{_LONGEST_WORD}}}")


class Tokenizer(Protocol):
    """Text to token ids and back; ids are below `vocab_size`."""

    suffix: ClassVar[str]
    """Of its kind of file: ".json" or ".model"."""

    content: bytes
    """The file that it was read from, from which `open_tokenizer` makes it again."""

    @property
    def vocab_size(self) -> int:
        """Largest token id plus one."""
        ...

    @property
    def eos_id(self) -> int:
        """The id that ends a document."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text, begun as the tokenizer begins documents; no end token."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ids; begin and end tokens vanish."""
        ...


class BytePairTokenizer:
    """A tokenizer of the `tokenizers` package (`tokenizer.json`).

    Special tokens written out in a text are read as plain text.

    Raises:
      ValueError: the vocabulary has no end-of-document token of a known name.
    """

    suffix = ".json"

    def __init__(self, content: bytes):
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        ids = tokenizer.get_vocab(with_added_tokens=True)
        named = [ids[name] for name in _END_NAMES if name in ids]
        if not named:
            raise ValueError(f"it has no end token: add one of {', '.join(_END_NAMES)}")
        self._tokenizer = tokenizer
        self.content = content
        self.eos_id: int = named[0]
        self.vocab_size: int = max(ids.values()) + 1

    def encode(self, text: str) -> list[int]:
        ids = self._tokenizer.encode_batch_fast([text])[0].ids
        return ids[:-1] if ids and ids[-1] == self.eos_id else ids

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode([int(token) for token in tokens])


class SentencePieceTokenizer:
    """A SentencePiece `.model`; texts begin with its begin token if it has one.

    Raises:
      ValueError: the model cannot be read or has no end token.
    """

    suffix = ".model"

    def __init__(self, content: bytes):
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"not a SentencePiece model ({error})") from error
        if self._model.eos_id() < 0:
            raise ValueError("it has no end token: train it with an eos_id")
        self.content = content
        self.eos_id: int = self._model.eos_id()
        self.vocab_size: int = self._model.vocab_size()

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_bos=self._model.bos_id() >= 0)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._model.decode([int(token) for token in tokens])


def document_tokens(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The ids of a text and the end token, (n,) int32.

    A text of more than 4 Mi characters is encoded in pieces, which end before a space:
    tokenizing takes many times its size in memory.
    """
    begin, ids, start = tokenizer.encode(""), [], 0
    while start < len(text) or not start:
        stop = _piece_end(text, start)
        piece = np.asarray(tokenizer.encode(text[start:stop]), np.int32)
        ids.append(piece[len(begin) :] if start else piece)
        start = stop or 1
    return np.concatenate([*ids, np.asarray([tokenizer.eos_id], np.int32)])


def _piece_end(text: str, start: int) -> int:
    """Where a piece ends: before a lone space, which begins a token, if any."""
    stop = start + _PIECE
    if stop >= len(text):
        return len(text)
    spaces = [m.start() for m in _LONE_SPACE.finditer(text, stop - _SEARCHED, stop)]
    return spaces[-1] if spaces else stop


def open_tokenizer(path: str | AnyPath) -> Tokenizer:
    """The tokenizer in a SentencePiece `.model` or a `tokenizers` `.json` file.

    Raises:
      FileNotFoundError: no such file.
      ValueError: unknown suffix, unreadable file, or no end-of-document token.
    """
    path = to_path(path)
    if path.suffix not in (".model", ".json"):
        raise ValueError(f"tokenizer {path}: expected a file ending in .model or .json")
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer {path} does not exist: check the path")
    kinds = {".model": SentencePieceTokenizer, ".json": BytePairTokenizer}
    try:
        return kinds[path.suffix](path.read_bytes())
    except Exception as error:  # The class that `tokenizers` raises for a bad file.
        raise ValueError(
            f"tokenizer {path} cannot be used: {error}; replace the file, or delete it "
            "if it is in the cache folder"
        ) from error


def train_tokenizer(
    documents: Iterable[str], *, vocab_size: int, cache_dir: str | None = None
) -> Tokenizer:
    """Trains a byte-level BPE of at most `vocab_size` tokens; texts round-trip exactly.

    It is trained on the first documents that make up 32 Mi characters, words longer
    than 1,000 split (a merge takes the square of a word's length). The same documents
    give the same tokenizer; it is stored in `cache_dir` (by default `lowrank_optax` in
    the user's cache folder) under a hash of its training text.

    Raises:
      ValueError: `vocab_size` cannot hold the 256 bytes and the end token, or the cache
        folder cannot be written.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise ValueError(
            f"vocab_size {vocab_size} is too small: a byte-level tokenizer needs at "
            f"least {len(alphabet) + 1}"
        )
    sample = _sample(documents)
    path = _cache_path(sample, vocab_size, cache_dir)
    if not path.exists():
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[_END],
            initial_alphabet=sorted(alphabet),
            show_progress=sys.stderr.isatty(),
        )
        tokenizer.train_from_iterator(_short_words(sample), trainer, length=len(sample))
        _store(path, tokenizer.to_str())
    return open_tokenizer(path)


def _sample(documents: Iterable[str]) -> list[str]:
    sample, characters = [], 0
    for text in documents:
        sample.append(text[: _SAMPLE_CHARACTERS - characters])
        characters += len(text)
        if characters >= _SAMPLE_CHARACTERS:
            break
    return sample


def _short_words(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        start = 0
        for match in _TOO_LONG.finditer(text):
            yield text[start : match.end()]
            start = match.end()
        yield text[start:]


def _cache_path(sample: list[str], vocab_size: int, cache_dir: str | None) -> Path:
    method = f"byte-level BPE, words up to {_LONGEST_WORD}"
    settings = [method, tokenizers.__version__, _END, vocab_size]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for text in sample:
        content = text.encode()
        digest.update(len(content).to_bytes(8, "little") + content)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(cache_dir or Path(base, "lowrank_optax")).expanduser()
    return folder / f"bpe-{digest.hexdigest()[:32]}.json"


def _store(path: Path, content: str) -> None:
    """Several processes may write the same path at once; each write is complete."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, content)
    except OSError as error:
        raise ValueError(
            f"the tokenizer cannot be kept in {path.parent} ({error}): free space or "
            "name another cache_dir"
        ) from error
