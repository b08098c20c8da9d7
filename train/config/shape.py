"""The shape of the model: a named size, or that of a published model."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models import LlamaConfig, pretrained_config
from models.rope import LinearScaling, Llama3Scaling
from train.config.presets import PRESETS

if TYPE_CHECKING:
    from train.config.config import Config

PUBLISHED = "hf:"
"""Before a folder of published weights, in `init_from`."""

COMPUTED = ("compute_dtype", "remat", "attention")
"""Fields of a `LlamaConfig` that are a run's own choice."""


def published_folder(init_from: str | None) -> Path | None:
    """FOLDER of hf:FOLDER; None for a run's weights, or none."""
    if init_from is None or not init_from.startswith(PUBLISHED):
        return None
    return Path(init_from.removeprefix(PUBLISHED)).expanduser()


def name_of(path: str) -> str:
    """The name of a published model, from its folder or its config.json."""
    named = Path(path).expanduser().absolute()
    if named.name == "config.json":
        return named.parent.name
    return named.stem if named.suffix == ".json" else named.name


def with_shape_from(config: "Config") -> "Config":
    """Takes the shape from the weights that a run begins with, unless it has one."""
    folder = published_folder(config.init_from)
    if folder is None or config.model.shape_from is not None:
        return config
    size = config.model.size
    if size == PRESETS.get(config.preset or "", {}).get("size"):
        size = "tiny"  # no flag named it
    if size != "tiny":
        raise ValueError(
            f"init_from {config.init_from} and --size {size} both give a shape; leave "
            "out --size"
        )
    model = dataclasses.replace(config.model, size=size, shape_from=str(folder))
    return dataclasses.replace(config, model=model)


def read_shape(path: str) -> dict[str, Any]:
    """The shape in a config.json, or in a folder's, as a run stores it.

    Raises:
      FileNotFoundError, ValueError: as `models.pretrained_config`.
    """
    fields = dataclasses.asdict(pretrained_config(Path(path).expanduser()))
    return {name: x for name, x in fields.items() if name not in COMPUTED}


def shape_of(stored: dict[str, Any]) -> LlamaConfig:
    """The shape that `read_shape` returned.

    Raises:
      ValueError: it is no shape's of this version.
    """
    fields = dict(stored)
    try:
        if (scaling := fields.get("rope_scaling")) is not None:
            kind = LinearScaling if set(scaling) == {"factor"} else Llama3Scaling
            fields["rope_scaling"] = kind(**scaling)
        return LlamaConfig(**fields)
    except TypeError as error:
        raise ValueError(f"model has shape={stored!r:.60}, which no run has") from error
