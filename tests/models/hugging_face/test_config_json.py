"""config.json in both spellings, what is refused, and what is written."""

import json
import warnings
from dataclasses import replace

import pytest

from models import LlamaConfig, pretrained_config
from models.hugging_face.write_config import SpecialTokens, config_fields
from models.rope import LinearScaling, Llama3Scaling

LLAMA = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
CONFIG = LlamaConfig(40, 16, 24, num_heads=4, num_layers=2)
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4,
    "original_max_position_embeddings": 8192,
}
SCALED = Llama3Scaling(8.0, low=1.0, high=4.0, original_positions=8192)


def read(tmp_path, fields):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **fields}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return pretrained_config(tmp_path)


QWEN2 = {"model_type": "qwen2", "num_key_value_heads": 2}
OF_QWEN2 = {"attention_bias": "qkv", "num_kv_heads": 2}


@pytest.mark.parametrize(
    ("fields", "change"),
    [
        ({}, {}),
        ({"num_key_value_heads": None, "head_dim": None, "rope_scaling": None}, {}),
        ({"num_key_value_heads": 2, "head_dim": 8}, {"num_kv_heads": 2, "head_dim": 8}),
        ({"head_dim": 4, "num_key_value_heads": 4, "pretraining_tp": 2}, {}),
        (
            {"attention_bias": True, "mlp_bias": True},
            {"attention_bias": "qkvo", "mlp_bias": True},
        ),
        (
            {"tie_word_embeddings": True, "rms_norm_eps": 1e-5},
            {"tie_embeddings": True, "norm_eps": 1e-5},
        ),
        (
            {"max_position_embeddings": 64, "initializer_range": 0.1, "dtype": "float"},
            {"max_positions": 64, "init_std": 0.1},
        ),
        ({"rope_theta": 500000}, {"rope_theta": 5e5}),
        (
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
            {"rope_theta": 5e5},
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}},
            {"rope_scaling": LinearScaling(2.0)},
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            {"rope_theta": 5e5, "rope_scaling": SCALED},
        ),
        (
            {"rope_parameters": {"rope_theta": 9, "rope_type": "llama3", **LLAMA3}},
            {"rope_theta": 9.0, "rope_scaling": SCALED},
        ),
        # Mistral has 8 key/value heads and a window where nothing is said.
        (
            {"model_type": "mistral", "num_attention_heads": 8},
            {"num_heads": 8, "sliding_window": 4096},
        ),
        (
            {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None},
            {"num_kv_heads": 2},
        ),
        (QWEN2, OF_QWEN2),
        ({**QWEN2, "use_sliding_window": False, "sliding_window": 7}, OF_QWEN2),
        (
            {
                **QWEN2,
                "use_sliding_window": True,
                "sliding_window": 7,
                "max_window_layers": 0,
            },
            {**OF_QWEN2, "sliding_window": 7},
        ),
        ({**QWEN2, "layer_types": ["full_attention"] * 2}, OF_QWEN2),
        # What a later version adds, and leaves off.
        ({"some_new_field": None, "another": False, "use_cache": True}, {}),
    ],
)
def test_both_spellings_are_read_and_defaults_are_those_of_transformers(
    tmp_path, fields, change
):
    assert read(tmp_path, fields) == replace(CONFIG, **change)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gemma"}, "model_type='gemma' is not read; .*llama"),
        ({"vocab_size": "40"}, "vocab_size='40' is not supported, int is"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1 .*bool is"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' .*only 'silu' is"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1 .*only 0 is"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.*only None"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "'yarn'.*remove the field"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling has no factor"),
        ({"rope_scaling": {"type": "linear", "factor": "2x"}}, "could not convert"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor=0.5 must be 1"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 2.0}}, "contradicts"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"num_attention_heads": 3}, "hidden_size=16 must be a multiple"),
        (
            {**QWEN2, "use_sliding_window": True, "max_window_layers": 1},
            "layers 1 to 1 have a sliding window",
        ),
        ({"a_gate": 0.5}, "unknown here: a_gate=0.5"),
    ],
)
def test_what_would_compute_something_else_is_named(tmp_path, fields, message):
    with pytest.raises((ValueError, UserWarning), match=message) as error:
        read(tmp_path, fields)
    assert str(tmp_path / "config.json") in str(error.value)


def test_files_that_are_no_config_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="hf download NAME --local-dir"):
        pretrained_config(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        pretrained_config(tmp_path)
    path = tmp_path / "config.json"
    for text, message in (("{", "is not JSON"), ("[]", "no JSON object")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            pretrained_config(path)
    path.write_text(json.dumps({"model_type": "llama", "vocab_size": 3}))
    with pytest.raises(ValueError, match="has no num_hidden_layers"):
        pretrained_config(path)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({}, "llama"),
        ({"attention_bias": "qkvo", "mlp_bias": True}, "llama"),
        ({"mlp_bias": True, "tie_embeddings": True}, "llama"),
        ({"num_kv_heads": 2, "head_dim": 8, "sliding_window": 9}, "mistral"),
        ({"attention_bias": "qkv", "rope_scaling": LinearScaling(2.0)}, "qwen2"),
        ({"attention_bias": "qkv", "sliding_window": 9}, "qwen2"),
        ({"rope_scaling": SCALED, "rope_theta": 5e5, "norm_eps": 1e-5}, "llama"),
    ],
)
def test_what_is_written_is_read_again(tmp_path, change, kind):
    config = replace(CONFIG, max_positions=9000, init_std=0.03, **change)
    fields = config_fields(config, "bfloat16", SpecialTokens(None, (2, 3), None))
    assert fields["model_type"] == kind
    assert (fields["bos_token_id"], fields["eos_token_id"]) == (None, [2, 3])
    assert read(tmp_path, fields) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_positions": None}, "max_positions is None.*dataclasses.replace"),
        ({"attention_bias": "qkv", "mlp_bias": True}, "no published architecture"),
        ({"attention_bias": "qkvo", "sliding_window": 9}, "no published architecture"),
        ({"num_heads": 3, "head_dim": 4}, "not a multiple of num_heads=3"),
    ],
)
def test_what_no_published_model_computes_is_refused(change, message):
    config = replace(CONFIG, **{"max_positions": 32, **change})
    with pytest.raises(ValueError, match=message):
        config_fields(config, "float32", SpecialTokens(1, 2, None))
