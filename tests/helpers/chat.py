"""A small tokenizer that knows the special tokens of chat templates, and examples."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from train.data.chat_template import ChatTemplate
from train.data.chat_template_files import open_chat_template

SPECIALS = ("</s>", "<s>", "<|im_start|>", "<|im_end|>")


@cache
def chat_tokenizer() -> str:
    """A byte-level BPE with special tokens, as JSON."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[*SPECIALS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["user assistant hello world über"] * 9, trainer)
    return tokenizer.to_str()


def write_tokenizer(folder: Path) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(chat_tokenizer())
    return path


def named_template(name: str) -> ChatTemplate:
    """A template of the trainer, with <s> and </s>."""
    return open_chat_template(name, Path("no folder", "tokenizer.json"), "<s>", "</s>")


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def said(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Turns of user and assistant, one after the other."""
    roles = ("user", "assistant") * len(contents)
    turns = [
        {"role": role, "content": content}
        for role, content in zip(roles, contents, strict=False)
    ]
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + turns
