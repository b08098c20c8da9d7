"""Finds chat templates: the trainer's by name, files, and the tokenizer's own."""

import json
from pathlib import Path
from typing import Any

from train.data.chat_template import ChatTemplate
from train.host.paths import AnyPath, to_path

_FOLDER = Path(__file__).parent / "chat_templates"
CHAT_TEMPLATES = tuple(sorted(path.stem for path in _FOLDER.glob("*.jinja")))
"""The names of the templates that come with the trainer."""


def open_chat_template(
    name: str | None, tokenizer: AnyPath, begin: str, end: str
) -> ChatTemplate:
    """A chat template by its name, of a file, or the tokenizer's own.

    Args:
      name: one of `CHAT_TEMPLATES`, or a `.jinja` file. None: the tokenizer's own, in
        `chat_template.jinja` or `tokenizer_config.json` in the folder of its file.
      tokenizer: the tokenizer's file. The special tokens are those of the
        `tokenizer_config.json` beside it.
      begin, end: `bos_token` and `eos_token` if it does not have them.

    Raises:
      FileNotFoundError: there is no such file, or the tokenizer has no template.
      ValueError: an unknown name, or a file that cannot be read.
    """
    settings = _settings(tokenizer.parent / "tokenizer_config.json")
    tokens = (
        _token(settings.get("bos_token", begin)) or "",
        _token(settings.get("eos_token", end)) or "",
        _further(settings),
    )
    if name in CHAT_TEMPLATES:
        return ChatTemplate(name, _read(_FOLDER / f"{name}.jinja"), *tokens)
    if name is not None:
        if not name.endswith(".jinja"):
            raise ValueError(
                f"chat_template {name!r} is unknown: give a .jinja file, or one of "
                f"{', '.join(CHAT_TEMPLATES)}"
            )
        path = to_path(name)
        if not path.is_file():
            raise FileNotFoundError(f"chat_template {path} does not exist")
        return ChatTemplate(str(path), _read(path), *tokens)
    path = tokenizer.parent / "chat_template.jinja"
    if path.is_file():
        return ChatTemplate(str(path), _read(path), *tokens)
    own = settings.get("chat_template")
    if isinstance(own, list):  # of several, by name
        own = next((x["template"] for x in own if x.get("name") == "default"), None)
    if not isinstance(own, str):
        raise FileNotFoundError(
            f"tokenizer {tokenizer} has no chat template beside it, in "
            "chat_template.jinja or tokenizer_config.json: set --chat-template to a "
            f".jinja file, or to one of {', '.join(CHAT_TEMPLATES)}"
        )
    return ChatTemplate(f"of {tokenizer.parent}", own, *tokens)


def _settings(path: AnyPath) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        settings = json.loads(_read(path))
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): mend it") from error
    return settings if isinstance(settings, dict) else {}


_FURTHER = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def _further(settings: dict[str, Any]) -> dict[str, str | list[str]]:
    """The special tokens besides bos_token and eos_token."""
    found = {name: _token(settings.get(name)) for name in _FURTHER}
    further: dict[str, str | list[str]] = {k: x for k, x in found.items() if x}
    if isinstance(several := settings.get("additional_special_tokens"), list):
        tokens = [token for token in map(_token, several) if token]
        further["additional_special_tokens"] = tokens
    return further


def _token(token: Any) -> str | None:
    """A token of tokenizer_config.json: a string, or an object with its content."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _read(path: AnyPath) -> str:
    """The text as it is: line ends are part of a template."""
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): convert it") from error
