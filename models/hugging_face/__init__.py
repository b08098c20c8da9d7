"""Weights as Hugging Face transformers stores them: a folder of safetensors files."""

from models.hugging_face.load import check_pretrained, load_pretrained
from models.hugging_face.read_config import pretrained_config
from models.hugging_face.save import save_pretrained
from models.hugging_face.special_tokens import SpecialTokens

__all__ = [
    "SpecialTokens",
    "check_pretrained",
    "load_pretrained",
    "pretrained_config",
    "save_pretrained",
]
