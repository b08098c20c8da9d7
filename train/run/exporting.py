"""A run's weights, tokenizer and chat template as a Hugging Face folder."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from models import save_pretrained
from train.data.chat_tokens import ChatEncoder
from train.data.tokenizer import Tokenizer
from train.run.restore import LoadedRun
from train.run.stored import read_object

DType = Literal["float32", "bfloat16", "float16"]

# Of the two kinds of tokenizer files, what transformers opens them as.
CLASSES = {".json": "PreTrainedTokenizerFast", ".model": "LlamaTokenizer"}


def export(run: LoadedRun, folder: Path, dtype: DType | None = None) -> None:
    """Writes a folder that transformers and `--init-from hf:FOLDER` load.

    It has config.json, generation_config.json, the weights in safetensors files and,
    if the run has a tokenizer, its file and tokenizer_config.json with the chat
    template.

    Args:
      run: a loaded run.
      folder: a new one, or an empty one.
      dtype: of the weights; None for that of the run, where int8 becomes the dtype that
        it computed in.

    Raises:
      FileExistsError: the folder exists and is not empty.
      ValueError: no published model type computes what the run's model does.
    """
    longest = max(run.config.seq_len, run.model.max_positions or 0)
    model = dataclasses.replace(run.model, max_positions=longest)
    tokenizer = run.tokenizer
    files = None if tokenizer is None else _tokenizer_files(run, tokenizer, longest)
    save_pretrained(
        *(folder, model, run.weights),
        dtype=dtype,
        files=files,
        **_special_tokens(run),
    )


def _special_tokens(run: LoadedRun) -> dict[str, Any]:
    """The ids that published weights stated; for those they did not, the tokenizer's.

    Answers end where the chat template ends them too.
    """
    ids = read_object(run.folder / "generation_config.json")
    if run.tokenizer is None:
        return ids
    begin = next(iter(run.tokenizer.encode("")), None)
    ends = ids.pop("eos_token_id", run.tokenizer.eos_id)
    ends = ends if isinstance(ends, list) else [ends]
    end = run.chat and run.chat.end
    if end is not None and end not in ends:
        ends = [*ends, end]
    ends = ends if len(ends) > 1 else ends[0]
    return {"bos_token_id": begin, "eos_token_id": ends} | ids


def _tokenizer_files(
    run: LoadedRun, tokenizer: Tokenizer, longest: int
) -> dict[str, bytes]:
    """The tokenizer, its settings, and the template that the run was trained with."""
    tokens = ChatEncoder(tokenizer)
    settings = {
        "tokenizer_class": CLASSES[tokenizer.suffix],
        "bos_token": tokens.begin or None,
        "eos_token": tokens.end,
        "model_max_length": longest,
        "clean_up_tokenization_spaces": False,
        # transformers 4 returns token types by default, which `generate` refuses.
        "model_input_names": ["input_ids", "attention_mask"],
        **read_object(run.folder / "tokenizer_config.json"),
    }
    template = run.folder / "chat_template.jinja"
    if template.is_file():
        settings["chat_template"] = template.read_bytes().decode()
    return {
        f"tokenizer{tokenizer.suffix}": tokenizer.content,
        "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode(),
    }
