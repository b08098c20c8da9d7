"""The ids of tokens with a meaning of their own, as published models state them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

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
