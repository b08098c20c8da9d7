"""A run's weights, tokenizer and chat template as a Hugging Face folder."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

from models import save_pretrained
from train.data.chat import Chat
from train.data.chat_tokens import ChatEncoder
from train.data.tokenizer import Tokenizer
from train.run.restore import LoadedRun

DType = Literal["float32", "bfloat16", "float16"]

# Of the two kinds of tokenizer files, what transformers opens them as.
CLASSES = {".json": "PreTrainedTokenizerFast", ".model": "LlamaTokenizer"}


def export(run: LoadedRun, folder: Path, dtype: DType | None = None) -> None:
    """Writes a folder that transformers, vLLM and `--init-from hf:FOLDER` load.

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
    (begin, end, pad), files = run.special_tokens, None
    if run.tokenizer is not None:
        begin = next(iter(run.tokenizer.encode("")), None) if begin is None else begin
        end = run.tokenizer.eos_id if end is None else end
        files = _tokenizer_files(run.tokenizer, run.chat, longest)
    save_pretrained(
        folder,
        model,
        run.weights,
        dtype=dtype,
        bos_token_id=begin,
        eos_token_id=end,
        pad_token_id=pad,
        files=files,
    )


def _tokenizer_files(
    tokenizer: Tokenizer, chat: Chat | None, longest: int
) -> dict[str, bytes]:
    tokens = ChatEncoder(tokenizer)
    settings = {
        "tokenizer_class": CLASSES[tokenizer.suffix],
        "bos_token": tokens.begin or None,
        "eos_token": tokens.end,
        "model_max_length": longest,
        "clean_up_tokenization_spaces": False,
    }
    if chat is not None:
        settings["chat_template"] = chat.template.source
    return {
        f"tokenizer{tokenizer.suffix}": tokenizer.content,
        "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode(),
    }
