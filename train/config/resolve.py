"""A run's config with every default filled in: by method, device, mesh and folder."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jax

from models import LlamaConfig
from train.config.config import (
    Config,
    OptimizerConfig,
    from_json,
    label,
    resolved,
    steps_of,
)
from train.config.methods import METHODS, NUMBERS
from train.config.shape import read_shape, with_shape_from
from train.config.sizes import large_layers

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

C = TypeVar("C", bound="DataclassInstance")

FEWEST_SUBSPACES = 6
"""With fewer in a run no rate was measured: 1,200 steps with a new one every 200."""


def resolve(config: Config, platform: str | None = None) -> Config:
    """The same work with every default filled in, as it is stored beside the run.

    What is "auto" goes by the platform, by default that of JAX's default backend: then
    call it after `jax.distributed.initialize`.
    """
    if config.resume_from is not None:
        config = dataclasses.replace(config, resume=True)
    config = with_shape_from(config)
    model, optimizer = config.model, config.optimizer
    if model.shape_from is not None and model.shape is None:
        model = dataclasses.replace(model, shape=read_shape(model.shape_from))
    size = model.base
    on_cpu = (platform or jax.default_backend()) == "cpu"
    if model.compute_dtype == "auto":
        dtype = "float32" if on_cpu else "bfloat16"
        model = dataclasses.replace(model, compute_dtype=dtype)
    if model.remat == "auto":
        model = dataclasses.replace(model, remat="none" if on_cpu else "dots")
    model = _filled(model, vocab_size=size.vocab_size)
    config = with_folder(config)
    begun = _begun(config)
    if config.layerwise == "auto":
        one = config.microbatches == 1 and config.mesh.fsdp == 1
        layerwise = "on" if one and not on_cpu and large_layers(size) else "off"
        if begun is not None and begun.layerwise != "auto":
            layerwise = begun.layerwise
        config = dataclasses.replace(config, layerwise=layerwise)
    method = METHODS[optimizer.name]
    optimizer = _filled(
        _scheduled(_on_mesh(config, optimizer, begun), config.steps),
        rank=quarter(size),
        refresh_every=_interval(optimizer, config.steps),
        learning_rate=method.rate,
        **{option: method.options.get(option) for option in NUMBERS},
    )
    return dataclasses.replace(config, model=model, optimizer=optimizer)


def quarter(model: LlamaConfig) -> int | float:
    """The default rank: a quarter of the hidden size, the smaller side of a matrix.

    Keys and values of grouped heads are smaller, so there it is 0.25.
    """
    grouped = model.kv_heads < model.num_heads or model.head_dim is not None
    return 0.25 if grouped else model.hidden_size // 4


def _interval(optimizer: OptimizerConfig, steps: int) -> int | None:
    """The method's own interval; a shorter one for a cosine of few steps."""
    method = METHODS[optimizer.name]
    if method.interval is None or "refresh_every" in method.own:
        return method.interval
    if optimizer.schedule != "cosine":  # it may be given more steps
        return method.interval
    return min(method.interval, max(1, steps // FEWEST_SUBSPACES))


def _scheduled(optimizer: OptimizerConfig, steps: int) -> OptimizerConfig:
    """Warm-up and decay in steps, which stay if the run is given more."""
    if optimizer.schedule == "cosine":
        return optimizer
    lengths = steps_of(optimizer, steps)
    own = {"decay": lengths.decay} if optimizer.schedule == "wsd" else {}
    return dataclasses.replace(optimizer, warmup=lengths.warmup, **own)


def with_folder(config: Config) -> Config:
    """With the folder that a run has if it names none."""
    model = with_shape_from(config).model.name.removeprefix("LLaMA-")
    return _filled(config, out=Path("runs") / f"{model}-{label(config.optimizer)}")


def _begun(config: Config) -> Config | None:
    """Reads the config with which a resumed run began."""
    if not config.resume:
        return None
    try:
        return from_json((resolved(config, "out") / "config.json").read_text())
    except (OSError, ValueError):
        return None  # `check_folder` says what is wrong there


def _on_mesh(
    config: Config, optimizer: OptimizerConfig, begun: Config | None
) -> OptimizerConfig:
    """Chooses the projected side of square matrices; a resumed run keeps its own."""
    if optimizer.square != "auto":
        return optimizer
    tensor = config.mesh.tensor > 1 and "square" in METHODS[optimizer.name].reads()
    square = "megatron" if tensor else "method"
    if begun is not None:
        square = begun.optimizer.square
    return dataclasses.replace(optimizer, square=square)


def _filled(config: C, **defaults: Any) -> C:
    """The config with a default for each named field that is None."""
    missing = {k: v for k, v in defaults.items() if getattr(config, k) is None}
    return dataclasses.replace(config, **missing)
