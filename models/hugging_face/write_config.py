"""A `LlamaConfig` as the config.json that Hugging Face transformers reads."""

from typing import Any

from models.config import LlamaConfig
from models.hugging_face.special_tokens import SpecialTokens
from models.rope import LinearScaling, RopeScaling

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}


def model_type(config: LlamaConfig) -> str:
    """The simplest of transformers' model types that computes what this model does.

    Raises:
      ValueError: none does.
    """
    if config.hidden_size % config.num_heads:
        raise ValueError(
            f"hidden_size={config.hidden_size} is not a multiple of num_heads="
            f"{config.num_heads}, which transformers refuses; export another model"
        )
    slides = config.sliding_window is not None
    if config.attention_bias == "qkv" and not config.mlp_bias:
        return "qwen2"
    if slides and config.attention_bias == "none" and not config.mlp_bias:
        return "mistral"
    if slides or config.attention_bias == "qkv":
        raise ValueError(
            f"no published architecture has attention_bias={config.attention_bias!r}, "
            f"mlp_bias={config.mlp_bias} and sliding_window={config.sliding_window} "
            "together; export a model without one of them"
        )
    return "llama"


def config_fields(
    config: LlamaConfig, dtype: str, tokens: SpecialTokens
) -> dict[str, Any]:
    """The fields of config.json, in the spelling that transformers 4 and 5 both read.

    Every token id is written, since transformers takes 1 and 2 for those that are not.

    Raises:
      ValueError: `model_type` finds none, or `max_positions` is None.
    """
    kind = model_type(config)
    if config.max_positions is None:
        raise ValueError(
            "max_positions is None, which config.json has to state; set it to the "
            "longest sequence that the weights were trained on: "
            "dataclasses.replace(config, max_positions=...)"
        )
    fields = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_scaling(config.rope_scaling),
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "attention_dropout": 0.0,
        "use_cache": True,
        "torch_dtype": dtype,
        # transformers never trains the embedding of a pad_token_id that is here.
        **tokens._replace(pad=None).fields(),
    }
    if kind == "llama":
        fields["attention_bias"] = config.attention_bias == "qkvo"
        fields["mlp_bias"] = config.mlp_bias
    else:
        fields["sliding_window"] = config.sliding_window
    if kind == "qwen2":
        fields["use_sliding_window"] = config.sliding_window is not None
        fields["max_window_layers"] = (
            config.num_layers if config.sliding_window is None else 0
        )
    return fields


def _rope_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low,
        "high_freq_factor": scaling.high,
        "original_max_position_embeddings": scaling.original_positions,
    }
