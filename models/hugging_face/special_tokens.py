"""The ids of tokens with a meaning of their own, as published models state them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from models.hugging_face.files import read_json

GENERATION = "generation_config.json"


class SpecialTokens(NamedTuple):
    """The ids that begin a text, end it, and fill a batch; None for none."""

    bos: int | None
    eos: int | Sequence[int] | None
    pad: int | None

    def fields(self) -> dict[str, Any]:
        eos = [*self.eos] if isinstance(self.eos, Sequence) else self.eos
        return {
            "bos_token_id": self.bos,
            "eos_token_id": eos,
            "pad_token_id": self.pad,
        }


def special_tokens(folder: str | Path) -> SpecialTokens:
    """The ids in a folder's generation_config.json, or else in its config.json.

    Raises:
      FileNotFoundError, ValueError: it has neither file, or one that is not JSON.
    """
    paths = [Path(folder) / GENERATION, Path(folder) / "config.json"]
    there = [read_json(path) for path in paths if path.is_file() or path is paths[-1]]

    def found(name: str) -> Any:
        return next((x[name] for x in there if x.get(name) is not None), None)

    return SpecialTokens(*(found(f"{x}_token_id") for x in SpecialTokens._fields))
