"""The folder of a run as stored: config, tokenizer and its templates, steps."""

import json
from typing import Any

import jax
import orbax.checkpoint as ocp

from models.hugging_face import SpecialTokens
from train.config.config import Config, from_json
from train.data.chat_template import ChatTemplate
from train.data.tokenizer import Tokenizer
from train.host.atomic import write_bytes, write_text
from train.host.paths import AnyPath, for_orbax, to_path


def run_and_step(name: str) -> tuple[AnyPath, int | None]:
    """Splits RUN_FOLDER or RUN_FOLDER@STEP into folder and step."""
    folder, _, step = name.rpartition("@")
    if step.isdigit() and folder and not to_path(name).exists():
        return to_path(folder), int(step)
    return to_path(name), None


def checked_step(folder: AnyPath, step: int | None) -> int:
    """The step, if it has a checkpoint; the newest one for None.

    Raises:
      FileNotFoundError: the folder holds no run, or no such checkpoint.
      ValueError: its config.json is not a run's, but a model's of other code, say.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no run: it has no config.json")
    read_config(folder)
    there = saved_steps(folder)
    if not there:
        raise FileNotFoundError(
            f"{folder} has no checkpoint; train it with --checkpoint-every above 0"
        )
    if step is not None and step not in there:
        raise FileNotFoundError(
            f"{folder} has no checkpoint of step {step}; it has {there}"
        )
    return there[-1] if step is None else step


def saved_steps(folder: AnyPath) -> list[int]:
    """The steps of a run's complete checkpoints, in order."""
    return sorted(ocp.utils.checkpoint_steps(for_orbax(folder) / "checkpoints"))


def read_config(folder: AnyPath) -> Config:
    """A run's resolved config."""
    path = folder / "config.json"
    try:
        return from_json(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{path} cannot be read: {error}; give the folder of a run, which "
            "python -m train made by --out (weights of other programs are not "
            "converted), or put its own config.json back"
        ) from error


def stored_tokenizer(folder: AnyPath) -> AnyPath | None:
    """The file of a run's tokenizer, if it has one."""
    found = (folder / f"tokenizer{suffix}" for suffix in (".json", ".model"))
    return next((path for path in found if path.is_file()), None)


def store_tokenizer(folder: AnyPath, tokenizer: Tokenizer | None) -> None:
    """Stores a tokenizer in a run's folder, unless it has one; process 0 does."""
    if tokenizer is None or jax.process_index() or stored_tokenizer(folder):
        return
    write_bytes(folder / f"tokenizer{tokenizer.suffix}", tokenizer.content)


def store_chat_template(folder: AnyPath, template: ChatTemplate | None) -> None:
    """Stores a template where a tokenizer's own is looked for; process 0 does.

    The template goes into chat_template.jinja, its tokens into tokenizer_config.json.
    """
    path = folder / "chat_template.jinja"
    if template is None or jax.process_index() or path.is_file():
        return
    settings = read_object(folder / "tokenizer_config.json") | template.tokens
    write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
    write_text(path, template.source)


def store_settings(
    folder: AnyPath, begun_from: AnyPath | None, tokenizer: Tokenizer | None
) -> None:
    """Stores what published weights state of tokens; process 0 does.

    They are the ids of special tokens, in generation_config.json, and if the run has
    the same tokenizer tokenizer_config.json with the chat template. A run that begins
    with another's weights takes that run's.
    """
    if begun_from is None or jax.process_index():
        return
    ids = _special_tokens(begun_from)
    copies = {"generation_config.json": json.dumps(ids, indent=2).encode() + b"\n"}
    theirs = stored_tokenizer(begun_from)
    if tokenizer and theirs and theirs.read_bytes() == tokenizer.content:
        for name in ("tokenizer_config.json", "chat_template.jinja"):
            if (begun_from / name).is_file():
                copies[name] = (begun_from / name).read_bytes()
    for name, content in copies.items():
        if not (folder / name).exists():
            write_bytes(folder / name, content)


def read_object(path: AnyPath) -> dict[str, Any]:
    """The object in a JSON file; an empty one if there is no such file."""
    found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _special_tokens(folder: AnyPath) -> dict[str, Any]:
    """The ids in generation_config.json, or else in config.json, of a model."""
    there = [read_object(folder / "config.json")]
    there += [read_object(folder / "generation_config.json")]
    names = [f"{x}_token_id" for x in SpecialTokens._fields]
    return {name: x[name] for x in there for name in names if x.get(name) is not None}
