"""Training and evaluation batches of token windows, from text or from token files."""

from dataclasses import dataclass
from functools import partial

from train.data.batches import (
    Batches,
    Pieces,
    endless_batches,
    finite_batches,
    packed_batches,
    packed_evaluation,
    prefetched,
)
from train.data.chat import Chat
from train.data.data_config import DataConfig
from train.data.fingerprint import Fingerprint
from train.data.open_examples import open_examples
from train.data.padded_windows import document_window
from train.data.sources import (
    check_held_out_is_apart,
    holds_tokens,
    open_text,
    open_token_documents,
    open_token_windows,
)
from train.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Data:
    """The data of a run, as `open_data` opens it."""

    train: Batches
    """Endless {"tokens": int32 (B / process_count, T)}, and of documents as windows
    {"weights": float32} too; of examples also {"segment_ids", "positions": int32} (see
    `example_window`). Its iterators' get_state is a small dict for JSON, the
    same on all processes; set_state resumes from it at exactly the next batch, with any
    number of processes."""

    evaluation: Batches
    """Finite and re-iterable {"tokens": int32, "weights": float32}, the same shape; of
    examples also the others. Every held-out token that is not cut off occurs once, with
    weight 1, or 0 if it is a token of examples that is not learned. Padding is 0 with
    weight 0."""

    tokenizer: Tokenizer | None
    """None for token files opened without one."""

    vocab_size: int
    """The tokenizer's vocabulary. For token files without one: the size asked for, or
    else the largest id plus one."""

    fingerprint: Fingerprint
    """The data, in brief and for JSON: "source", "eval_source" and "tokenizer", and of
    examples "chat_template" (see `train.data.fingerprint.changed`)."""

    chat: Chat | None = None
    """The template and encoder of examples; None for text."""


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
    """Opens a source, holds part of it out, and makes batches of its tokens.

    Documents are visited in an order shuffled anew each epoch, each ended by the
    tokenizer's end token, joined into one stream and split into windows. Token files
    are split into windows first (the last tokens of a file, fewer than a window, are
    left out of training) and the windows shuffled, and so is a text that is a single
    document, whose last tokens are held out. With `windows="documents"` each
    document is a window (see `document_window`). With `windows="examples"` windows are
    packed once, by the seed, and shuffled anew each epoch (see `open_examples`). The
    seed does not change what is held out.

    The number of processes does not change the batches: process p has the rows from
    p B / process_count on. Of token files, and of documents, it reads those alone. Of
    packed text each process tokenizes the whole batch, as a window begins where the one
    before ends: for many hosts, tokenize once, by python -m train.prepare. Of examples
    each process tokenizes all at the start.

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
    check_held_out_is_apart(config)
    rows = batch_size // process_count
    share = slice(process_index * rows, (process_index + 1) * rows)
    if config.windows == "examples":
        return _open_examples(config, seq_len, batch_size, seed, vocab_size, share)
    tokens, documents = holds_tokens(config.source), config.windows == "documents"
    if not tokens:
        opened = open_text(config, seq_len, vocab_size)
    elif documents:
        opened = open_token_documents(config, seq_len, vocab_size)
    else:
        opened = open_token_windows(config, seq_len, vocab_size)
    check = _check_documents if documents else _check_tokens
    check(f"source {config.source!r}", opened.train, batch_size, seq_len)
    check("the held-out part", opened.held_out, 1, 2)

    shuffled, held_out = opened.train.seed(seed).shuffle(), opened.held_out
    if documents:
        window = partial(document_window, length=seq_len, end=opened.end)
        train = endless_batches(shuffled.map(window), batch_size, share)
        evaluation = finite_batches(held_out.map(window), batch_size, share)
    else:
        evaluation = packed_evaluation(held_out, seq_len, batch_size, share)
        if opened.in_windows:
            windows = shuffled.map(lambda x: {"tokens": x})
            train = endless_batches(windows, batch_size, share)
        else:
            train = packed_batches(shuffled, seq_len, batch_size, share)
    return Data(
        train, evaluation, opened.tokenizer, opened.vocab_size, opened.fingerprint
    )


def _open_examples(
    config: DataConfig,
    seq_len: int,
    batch_size: int,
    seed: int,
    vocab_size: int | None,
    share: slice,
) -> Data:
    opened = open_examples(config, seq_len, seed, vocab_size)
    if len(opened.train) < batch_size:
        raise ValueError(
            f"source {config.source!r} fills {len(opened.train)} windows of {seq_len} "
            f"tokens, but a batch has {batch_size}: add examples, or lower --seq-len "
            "or --batch-size"
        )
    return Data(
        endless_batches(opened.train.seed(seed).shuffle(), batch_size, share),
        finite_batches(opened.held_out, batch_size, share),
        opened.tokenizer,
        opened.tokenizer.vocab_size,
        opened.fingerprint,
        opened.chat,
    )


def _check_arguments(
    config: DataConfig, seq_len: int, batch_size: int, index: int, count: int
) -> None:
    if seq_len < 2:
        raise ValueError(f"seq_len {seq_len}: a window needs at least 2 tokens")
    if batch_size < 1 or batch_size % count:
        raise ValueError(
            f"batch_size {batch_size} must be a positive multiple of the "
            f"{count} processes"
        )
    if not 0 <= index < count:
        raise ValueError(f"process_index {index} is not below {count}")
    if config.eval_source is None and not 0 < config.eval_fraction <= 0.5:
        raise ValueError(
            f"eval_fraction {config.eval_fraction} must be above 0 and at most 0.5, "
            "or give an eval_source"
        )


def _check_tokens(what: str, pieces: Pieces, rows: int, seq_len: int) -> None:
    found, needed = 0, rows * seq_len
    for piece in prefetched(pieces):
        found += len(piece)
        if found >= needed:
            return
    raise ValueError(
        f"{what} has {found} tokens in {len(pieces)} documents or windows, but at "
        f"least {needed} are needed: add text, or lower --seq-len or --batch-size"
    )


def _check_documents(what: str, documents: Pieces, rows: int, _: int) -> None:
    targets = any(len(tokens) > 1 for tokens in prefetched(documents))
    if len(documents) < rows or not targets:
        raise ValueError(
            f"{what} has {len(documents)} documents, but at least {rows} are needed, "
            "and text in one: add text, or lower batch_size"
        )
