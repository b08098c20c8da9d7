"""A model's config.json, of Hugging Face transformers, as a `LlamaConfig`."""

import warnings
from pathlib import Path
from typing import Any, cast

from models.config import AttentionBias, LlamaConfig
from models.hugging_face.files import existing_folder, read_json
from models.rope import LinearScaling, Llama3Scaling, RopeScaling

# What transformers takes for a field that is not there, where model types differ.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096},
}
# Fields that would change what the model computes, and the only value read here.
ONLY: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_dropout": 0,
    "partial_rotary_factor": 1,
    "quantization_config": None,
    "rope_interleaved": False,
    "use_mrope": False,
}
# Fields that change nothing in the model: of tokens, storage, generation and training.
IGNORED = {
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "is_llama_config",
    "label2id",
    "max_sequence_length",
    "model_max_length",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "return_dict",
    "tokenizer_class",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
}
REQUIRED: Any = object()


def pretrained_config(folder: str | Path) -> LlamaConfig:
    """The `LlamaConfig` of a published model, from its config.json.

    Reads the model types llama, mistral and qwen2, as transformers 4 and 5 write them.
    `compute_dtype`, `remat` and `attention` have `LlamaConfig`'s defaults: change them
    with `dataclasses.replace`. A field that is unknown here, and neither null nor
    false, is named in a warning.

    Args:
      folder: the model's folder, or its config.json.

    Raises:
      FileNotFoundError: there is no such folder or file.
      ValueError: it is not JSON, has another model type, lacks a field, or a field has
        a value that this model cannot compute with; the message names it.

    Example:
      >>> import json, pathlib, tempfile
      >>> fields = {"model_type": "llama", "vocab_size": 32, "hidden_size": 8}
      >>> fields |= {"intermediate_size": 12, "num_hidden_layers": 2}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder) / "config.json"
      ...     _ = path.write_text(json.dumps({**fields, "num_attention_heads": 2}))
      ...     pretrained_config(folder).mlp_size
      12
    """
    path = Path(folder)
    if not path.is_file():
        path = existing_folder(path) / "config.json"
    fields = _Fields(path, read_json(path))
    kind = fields.values.get("model_type")
    if kind not in DEFAULTS:
        raise ValueError(
            f"{path}: model_type={kind!r} is not read; give a model of the types "
            f"{', '.join(DEFAULTS)}"
        )
    for name, only in ONLY.items():
        if (value := fields.take(name, Any, only)) not in (only, None):
            raise fields.refused(name, value, f"only {only!r} is")
    fields.values = {**DEFAULTS[kind], **fields.values}
    layers = fields.take("num_hidden_layers", int)
    theta, scaling = _rope(fields)
    values = {
        "vocab_size": fields.take("vocab_size", int),
        "hidden_size": fields.take("hidden_size", int),
        "mlp_size": fields.take("intermediate_size", int),
        "num_heads": fields.take("num_attention_heads", int),
        "num_layers": layers,
        "num_kv_heads": fields.take("num_key_value_heads", int, None),
        "rope_theta": theta,
        "norm_eps": fields.take("rms_norm_eps", float, 1e-6),
        "head_dim": fields.take("head_dim", int, None),
        "tie_embeddings": fields.take("tie_word_embeddings", bool, False),
        "attention_bias": _attention_bias(fields, kind),
        "mlp_bias": kind == "llama" and fields.take("mlp_bias", bool, False),
        "sliding_window": _sliding_window(fields, kind, layers),
        "rope_scaling": scaling,
        "max_positions": fields.take("max_position_embeddings", int, None),
    }
    # Only new weights are drawn by it.
    if std := fields.take("initializer_range", float, None):
        values["init_std"] = std
    # None for what follows from the rest, as in a config that is written by hand.
    if values["num_kv_heads"] == values["num_heads"]:
        values["num_kv_heads"] = None
    if values["head_dim"] == values["hidden_size"] / values["num_heads"]:
        values["head_dim"] = None
    fields.warn_of_the_rest()
    try:
        return LlamaConfig(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class _Fields:
    """The fields of a config.json, of which those that were taken are known."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path, self.values = path, values
        self._left = {k: v for k, v in values.items() if k not in IGNORED}

    def take(self, name: str, kind: Any, default: Any = REQUIRED) -> Any:
        """A field's value; ValueError for one that is not there, or of another type."""
        self._left.pop(name, None)
        value = self.values.get(name)
        value = default if value is None else value
        if value is REQUIRED:
            raise ValueError(
                f"{self.path} has no {name}; give the config.json that belongs to the "
                "weights"
            )
        if value is None and default is None:
            return None
        if kind is Any:
            return value
        accepted: Any = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or isinstance(value, bool) != (kind is bool):
            raise self.refused(name, value, f"{kind.__name__} is")
        return float(cast(float, value)) if kind is float else value

    def refused(self, name: str, value: Any, what: str) -> ValueError:
        return ValueError(
            f"{self.path}: {name}={value!r:.200} is not supported, {what}; use another "
            "model, or correct the field if it is wrong"
        )

    def unknown(self, name: str, value: Any) -> None:
        self._left[name] = value

    def warn_of_the_rest(self) -> None:
        rest = {k: v for k, v in self._left.items() if v is not None and v is not False}
        if rest:
            named = ", ".join(f"{k}={v!r:.40}" for k, v in sorted(rest.items()))
            warnings.warn(
                f"{self.path}: ignored fields that are unknown here: {named}; if one "
                "of them changes what the model computes, its outputs are not the "
                "published model's",
                stacklevel=3,
            )


def _attention_bias(fields: _Fields, kind: str) -> AttentionBias:
    if kind == "qwen2":
        return "qkv"
    bias = kind == "llama" and fields.take("attention_bias", bool, False)
    return "qkvo" if bias else "none"


def _sliding_window(fields: _Fields, kind: str, layers: int) -> int | None:
    """The window of all layers; ValueError where layers differ."""
    if kind == "llama":
        return None
    window, first = fields.take("sliding_window", int, None), 0
    if kind == "qwen2":
        first = fields.take("max_window_layers", int, 28)
        if not fields.take("use_sliding_window", bool, False):
            window = None
    kinds = fields.take("layer_types", list, None)
    if kinds is None:
        slides = [window is not None and i >= first for i in range(layers)]
    else:
        slides = [kind == "sliding_attention" for kind in kinds]
    if any(slides) != all(slides):
        raise ValueError(
            f"{fields.path}: layers {slides.index(True)} to {layers - 1} have a "
            "sliding window and others have none, which is not supported; use a model "
            "whose layers are alike"
        )
    return window if any(slides) else None


def _rope(fields: _Fields) -> tuple[float, RopeScaling | None]:
    """theta and the scaling, in the spelling of transformers 5, then in that of 4."""
    theta = fields.take("rope_theta", float, None)
    new, old = (
        fields.take(name, dict, None) or {}
        for name in ("rope_parameters", "rope_scaling")
    )
    name = "rope_parameters" if new else "rope_scaling"
    values = dict(new or old)
    own = values.pop("rope_theta", theta)
    differ = new and old and _alike(new) != _alike(old)
    if differ or (theta is not None and own != theta):
        raise ValueError(
            f"{fields.path}: rope_parameters={new} contradicts rope_theta={theta} or "
            f"rope_scaling={old}; remove the wrong one"
        )
    theta = 1e4 if own is None else float(own)
    older = values.pop("type", "default")
    kind = values.pop("rope_type", older)
    if values.pop("partial_rotary_factor", 1) not in (1, None):
        raise fields.refused(name, new or old, "only a partial_rotary_factor of 1 is")
    try:
        scaling = _scaling(kind, values, fields.values.get("max_position_embeddings"))
    except KeyError as error:
        raise ValueError(
            f"{fields.path}: {name} has no {error.args[0]}, which {kind} needs; add it"
        ) from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{fields.path}: {name}: {error}") from error
    for field, value in values.items():
        fields.unknown(f"{name}.{field}", value)
    return theta, scaling


def _alike(values: dict[str, Any]) -> dict[str, Any]:
    """A scaling without what both spellings need not state."""
    named = {"rope_type": values.get("type", "default"), **values}
    return {k: v for k, v in named.items() if k not in ("type", "rope_theta")}


def _scaling(
    kind: str, values: dict[str, Any], positions: int | None
) -> RopeScaling | None:
    """The scaling of a kind; takes its numbers out of the values."""
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(float(values.pop("factor")))
    if kind == "llama3":
        values.setdefault("original_max_position_embeddings", positions)
        return Llama3Scaling(
            float(values.pop("factor")),
            low=float(values.pop("low_freq_factor")),
            high=float(values.pop("high_freq_factor")),
            original_positions=int(values.pop("original_max_position_embeddings")),
        )
    raise ValueError(
        f"rope_type={kind!r} is not supported, only default, linear and llama3 are; "
        "use another model, or remove the field to compute without scaling"
    )
