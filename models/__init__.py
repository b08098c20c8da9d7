"""LLaMA language models in Flax NNX, from 60M to 70B parameters."""

from models.config import SIZES, LlamaConfig
from models.generate import generate
from models.hugging_face import (
    check_pretrained,
    load_pretrained,
    pretrained_config,
    save_pretrained,
)
from models.llama import Llama
from models.params import Params, bind, count_params, forward, init_params

__all__ = [
    "SIZES",
    "Llama",
    "LlamaConfig",
    "Params",
    "bind",
    "check_pretrained",
    "count_params",
    "forward",
    "generate",
    "init_params",
    "load_pretrained",
    "pretrained_config",
    "save_pretrained",
]
