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
      tokenizer: the tokenizer's file. `bos_token` and `eos_token` are those of its
        `tokenizer_config.json`, if that has them.
      begin, end: else these are.

    Raises:
      FileNotFoundError: there is no such file, or the tokenizer has no template.
      ValueError: an unknown name, or a file that cannot be read.
    """
    settings = _settings(tokenizer.parent / "tokenizer_config.json")
    tokens = (_token(settings, "bos_token", begin), _token(settings, "eos_token", end))
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


def _token(settings: dict[str, Any], name: str, default: str) -> str:
    """A token of tokenizer_config.json: a string, or an object with its content."""
    token = settings.get(name, default)
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _read(path: AnyPath) -> str:
    """The text as it is: line ends are part of a template."""
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): convert it") from error
