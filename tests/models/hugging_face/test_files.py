"""Folders of weights that are not whole, and folders that cannot be written."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models import (
    LlamaConfig,
    init_params,
    load_pretrained,
    pretrained_config,
    save_pretrained,
)

GOLDEN = Path(__file__).parents[2] / "golden" / "hf"
ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
TIED, SHARDED = "llama3_gqa_tied_head_dim", "mistral_bf16_sharded"
CONFIG = LlamaConfig(64, 16, 24, num_heads=2, num_layers=2, max_positions=32)


@pytest.fixture
def copy(tmp_path):
    def copied(name: str) -> Path:
        return Path(shutil.copytree(GOLDEN / name, tmp_path / "model"))

    return copied


def change(folder: Path, **tensors: np.ndarray | None) -> None:
    """Replaces, adds or, with None, removes tensors of a folder with one file."""
    held = load_file(folder / ONE)
    for name, x in tensors.items():
        held.pop(name, None)
        if x is not None:
            held[name] = x
    save_file(held, folder / ONE)


def refused(folder: Path, message: str, kind: type[Exception] = ValueError) -> None:
    with pytest.raises(kind, match=message) as error:
        load_pretrained(folder)
    assert "\n" not in str(error.value)


def test_missing_files_are_named_with_a_remedy(copy, tmp_path):
    refused(tmp_path / "none", "hf download", FileNotFoundError)
    folder = copy(SHARDED)
    shard = folder / "model-00003-of-00005.safetensors"
    shard.rename(tmp_path / "away")
    refused(folder, r"00003-of-00005\S* is missing, which .*index", FileNotFoundError)
    (folder / INDEX).unlink()
    refused(folder, f"neither {ONE} nor {INDEX}", FileNotFoundError)
    (folder / "pytorch_model.bin").write_bytes(b"")
    refused(folder, "pytorch_model.bin but no .*convert", FileNotFoundError)
    (folder / "config.json").unlink()
    refused(folder, "config.json is missing", FileNotFoundError)


@pytest.mark.parametrize("size", [0, 5, 300, -100])
def test_a_cut_file_is_named(copy, size):
    folder = copy("llama2")
    content = (folder / ONE).read_bytes()
    (folder / ONE).write_bytes(content[:size])
    refused(folder, f"{ONE} is damaged or no safetensors file")


def test_an_index_that_does_not_fit_its_files_is_named(copy):
    folder = copy(SHARDED)
    index = json.loads((folder / INDEX).read_text())

    def write(**changes: str | None) -> None:
        named = {**index["weight_map"], **changes}
        named = {name: file for name, file in named.items() if file}
        (folder / INDEX).write_text(json.dumps({"weight_map": named}))

    first = index["weight_map"]["model.embed_tokens.weight"]
    write(**{"lm_head.weight": first})
    refused(folder, f"{first} has no tensor lm_head.weight")
    norm = "model.layers.0.input_layernorm.weight"
    write(**{norm: None})
    refused(folder, rf"has the tensor {norm}, which \S+ does not list")
    write(**{"lm_head.weight": "../x"})
    refused(folder, "weight_map does not give each tensor's file")
    (folder / INDEX).write_text("no")
    refused(folder, "index.json is not JSON")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.norm.weight": None}, r"no tensor model.norm.weight of shape \(32,\)"),
        (
            {"model.extra": np.ones(3, "f4")},
            r"tensor model.extra of shape \(3,\) is no",
        ),
        ({"lm_head.bias": np.ones(96, "f4")}, "tensor lm_head.bias"),
        (
            {"model.layers.1.mlp.up_proj.weight": np.ones((32, 44), "f4")},
            r"mlp.up_proj.weight has shape \(32, 44\), but .* for \(44, 32\)",
        ),
        (
            {"model.norm.weight": np.ones(32, "i4")},
            "model.norm.weight is stored as I32",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(copy, tensors, message):
    folder = copy("llama2")
    change(folder, **tensors)
    refused(folder, message)


def test_buffers_of_old_versions_are_ignored(copy):
    folder = copy("llama2")
    buffer = {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, "f4")
        for i in range(2)
    }
    change(folder, **buffer)
    load_pretrained(folder)


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(copy):
    folder = copy(TIED)
    embedding = load_file(folder / ONE)["model.embed_tokens.weight"]
    change(folder, **{"lm_head.weight": embedding})
    assert "head" not in load_pretrained(folder)
    embedding[-1, -1] += 1
    change(folder, **{"lm_head.weight": embedding})
    refused(folder, "lm_head.weight differs from .*tie_word_embeddings")


def test_without_the_package_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    for call in (
        lambda: load_pretrained(GOLDEN / "llama2"),
        lambda: save_pretrained(tmp_path / "new", CONFIG, {}),
    ):
        with pytest.raises(ImportError, match=r"lowrank-optax\[train\]"):
            call()


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path, params, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(FileExistsError, match="full exists and is not empty"):
        save_pretrained(tmp_path / "full", CONFIG, params)
    (tmp_path / "empty").mkdir()
    save_pretrained(tmp_path / "empty", CONFIG, params)
    assert pretrained_config(tmp_path / "empty") == CONFIG

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_pretrained(tmp_path / "new" / "deep", CONFIG, params)
    assert not [*(tmp_path / "new").iterdir()]


def test_what_cannot_be_saved_is_named(tmp_path, params):
    def refused(message: str, config: LlamaConfig = CONFIG, **options: object) -> None:
        with pytest.raises(ValueError, match=message):
            save_pretrained(tmp_path / "new", config, params, **options)
        assert not [*tmp_path.iterdir()]

    refused("'layers/mlp/down/kernel'", replace(CONFIG, mlp_size=32))
    refused("max_positions is None", replace(CONFIG, max_positions=None))
    refused("would be stored as int32; give dtype=", dtype="int32")
    refused("'config.json' is written here", files={"config.json": b""})
    refused("'../x' is written here or is no", files={"../x": b""})


def test_further_files_and_token_ids_are_written(tmp_path, params):
    save_pretrained(
        tmp_path / "new",
        CONFIG,
        params,
        bos_token_id=1,
        eos_token_id=[2, 3],
        files={"tokenizer.json": b"{}"},
    )
    assert (tmp_path / "new" / "tokenizer.json").read_bytes() == b"{}"
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((tmp_path / "new" / name).read_text())
        ids = [fields[f"{kind}_token_id"] for kind in ("bos", "eos", "pad")]
        assert ids == [1, [2, 3], None]
