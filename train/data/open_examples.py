"""Opens files of examples: their tokens to train and to evaluate on, in windows."""

import itertools
from functools import partial
from typing import NamedTuple

import grain
import numpy as np
from tqdm import tqdm

from train.data.batches import WindowDataset
from train.data.chat import Chat, TakeRendered, WindowTokens
from train.data.chat_template_files import open_chat_template
from train.data.chat_tokens import ChatEncoder
from train.data.data_config import DataConfig
from train.data.example_windows import ExampleTokens, example_window, pack
from train.data.examples import TakeExample
from train.data.files import find_files
from train.data.fingerprint import Fingerprint, of_files, of_tokenizer
from train.data.sources import held_out_period, open_given_tokenizer
from train.data.text_formats import (
    RECORD_SUFFIXES,
    BadLines,
    holds_records,
    read_records,
)
from train.data.tokenizer import Tokenizer
from train.host.console import say, warn
from train.host.paths import to_path

_TEXTS = 256
"""Examples to encode at a time."""


class OpenedExamples(NamedTuple):
    """Opened files of examples.

    Attributes:
      train: windows of examples, in no particular order.
      held_out: the same.
      tokenizer: the one that was named.
      chat: writes and encodes conversations as the examples were.
      fingerprint: as in `Data`, with "chat_template" too.
    """

    train: WindowDataset
    held_out: WindowDataset
    tokenizer: Tokenizer
    chat: Chat
    fingerprint: Fingerprint


def open_examples(
    config: DataConfig, seq_len: int, seed: int, vocab_size: int | None
) -> OpenedExamples:
    """Reads all examples, and packs them into windows.

    Which are held out does not depend on seed or seq_len. Examples of the same length
    are packed in an order that the seed decides.

    Raises:
      FileNotFoundError: a file does not exist, or the tokenizer has no chat template.
      ModuleNotFoundError: a file needs a package that is not installed.
      ValueError: a bad file or record, or too few examples.
    """
    if config.tokenizer is None:
        raise ValueError(
            "windows=examples needs the tokenizer of the model: set --tokenizer, or "
            "begin with a run that has one, by --init-from"
        )
    tokenizer = open_given_tokenizer(config.tokenizer, vocab_size)
    encoder = ChatEncoder(tokenizer)
    template = open_chat_template(
        config.chat_template, to_path(config.tokenizer), encoder.begin, encoder.end
    )
    if unknown := encoder.unknown(template.source):
        warn(
            f"chat template {template.name} has {', '.join(unknown)}, which the "
            f"tokenizer {config.tokenizer} does not know: they are several tokens each"
        )
    chat = Chat(template, encoder)
    examples, source = _read(config.source, config, chat, seq_len)
    if config.eval_source is None:
        if len(examples) < 2:
            raise ValueError(
                f"source {config.source!r} has {len(examples)} examples, so none can "
                "be held out: add examples, or give an eval_source"
            )
        period = held_out_period(len(examples), config)
        held_out, eval_source = examples[period - 1 :: period], None
        del examples[period - 1 :: period]
    else:
        held_out, eval_source = _read(config.eval_source, config, chat, seq_len)
    fingerprint = {
        "source": source,
        "eval_source": eval_source,
        "tokenizer": of_tokenizer(tokenizer),
        "chat_template": template.fingerprint,
    }
    train = _windows(f"source {config.source!r}", examples, seq_len, seed)
    evaluation = _windows("the held-out part", held_out, seq_len, 0)
    return OpenedExamples(train, evaluation, tokenizer, chat, fingerprint)


def _read(
    source: str, config: DataConfig, chat: Chat, length: int
) -> tuple[list[ExampleTokens | None], Fingerprint]:
    """The tokens of a source's examples; tells what was skipped and cut off."""
    if source == "sotu" or source.startswith("tfds:"):
        raise ValueError(
            f"source {source!r} has no examples: name files of records "
            f"({', '.join(RECORD_SUFFIXES)})"
        )
    paths = find_files(source)
    if others := [path for path in paths if not holds_records(path)]:
        raise ValueError(
            f"{others[0]} has no examples: windows=examples needs files of records "
            f"({', '.join(RECORD_SUFFIXES)})"
        )
    bad = BadLines(config.bad_lines)
    example = TakeExample(config.example_field, config.example_form)
    take = TakeRendered(example, chat, config.train_on)
    encode = WindowTokens(chat.encoder, config.train_on, length)
    size = sum(path.stat().st_size for path in paths)
    bar = {"unit": "B", "unit_scale": True, "disable": None, "delay": 1}
    with tqdm(desc="reading examples", total=size, leave=False, **bar) as read:
        texts = (x for p in paths for x in read_records(p, take, bad, read.update))
        parts = iter(lambda: [*itertools.islice(texts, _TEXTS)], [])
        found = [tokens for part in parts for tokens in encode(part)]
    if bad.count:
        warn(f"source {source!r}: {bad}")
    if encode.truncated or encode.left_out:
        warn(
            f"source {source!r}: of {len(found)} examples {encode.truncated} lost what "
            f"is beyond the {length} tokens of a window, and {encode.left_out} are "
            "left out, as none of what is learned is within it"
        )
    return found, {"examples": len(found), **of_files(paths)}


def _windows(
    what: str, examples: list[ExampleTokens | None], length: int, seed: int
) -> WindowDataset:
    kept = [example for example in examples if example is not None]
    if not kept:
        raise ValueError(
            f"{what} has no example with an answer in its first {length} tokens: add "
            "examples, or raise --seq-len"
        )
    order = np.random.default_rng(seed).permutation(len(kept))
    kept = [kept[i] for i in order]
    bins = pack([len(example.tokens) for example in kept], length)
    tokens = sum(len(example.tokens) for example in kept)
    targets = sum(int(example.targets.sum()) for example in kept)
    say(
        f"{what}: {len(kept)} examples in {len(bins)} windows, "
        f"{tokens / (len(bins) * length):.0%} full; {targets} of {tokens} tokens are "
        "learned"
    )
    windows = grain.MapDataset.source(bins)
    return windows.map(partial(_window, kept, length))


def _window(
    examples: list[ExampleTokens], length: int, numbers: list[int]
) -> dict[str, np.ndarray]:
    return example_window([examples[number] for number in numbers], length)
