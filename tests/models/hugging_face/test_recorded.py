"""Models that transformers wrote, and what it computed with them."""

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from models import (
    LlamaConfig,
    Params,
    forward,
    generate,
    load_pretrained,
    pretrained_config,
    save_pretrained,
)

GOLDEN = Path(__file__).parents[2] / "golden" / "hf"
NAMES = ["llama2", "llama3_gqa_tied_head_dim", "mistral_bf16_sharded"]


@dataclass(frozen=True)
class Rounded:
    """RoPE's frequencies in bfloat16.

    The recorded logits of the bfloat16 model are of a model that had been cast to it
    as a whole, with this buffer, and then to float32.
    """

    def __call__(self, frequency: jax.Array) -> jax.Array:
        return frequency.astype(jnp.bfloat16).astype(jnp.float32)


class Model(NamedTuple):
    config: LlamaConfig
    params: Params
    expected: dict[str, Any]


@cache
def model(name: str) -> Model:
    config = replace(pretrained_config(GOLDEN / name), compute_dtype="float32")
    if name == "mistral_bf16_sharded":
        config = replace(config, rope_scaling=Rounded())
    expected = dict(np.load(GOLDEN / name / "expected.npz"))
    return Model(config, load_pretrained(GOLDEN / name), expected)


def tensors(folder: Path) -> dict[str, np.ndarray]:
    files = folder.glob("*.safetensors")
    return {name: x for path in files for name, x in load_file(path).items()}


def same_bits(found: Any, expected: Any) -> None:
    def check(x: Any, y: Any) -> None:
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()

    jax.tree.map(check, found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_loss_are_those_of_transformers(name):
    config, params, expected = model(name)
    tokens = expected["tokens"]
    logits = jax.jit(forward, static_argnums=0)(config, params, tokens)
    # Float32 rounding through a few hundred sums; the logits reach 7 to 10.
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-4)
    logp = jax.nn.log_softmax(logits[:, :-1])
    loss = -jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1).mean()
    np.testing.assert_allclose(loss, expected["loss"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_decoding_adds_the_tokens_that_transformers_adds(name):
    config, params, expected = model(name)
    # They were recorded with token 0 as padding, which transformers leaves out.
    prompt = expected["prompt"]
    prompt = jnp.asarray(prompt[prompt != 0][None])
    found = generate(
        config, params, prompt, steps=16, key=jax.random.key(0), temperature=0
    )
    np.testing.assert_array_equal(found[:, prompt.shape[1] :], expected["greedy"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("most", [10**9, 20_000])
def test_a_folder_that_is_loaded_and_saved_has_the_same_tensors(name, most, tmp_path):
    config = pretrained_config(GOLDEN / name)
    params = load_pretrained(GOLDEN / name, dtype=None)
    save_pretrained(
        tmp_path / "new",
        config,
        params,
        bos_token_id=1,
        eos_token_id=2,
        max_shard_size=most,
    )
    assert len([*(tmp_path / "new").glob("*.safetensors")]) > 1 or most > 20_000
    same_bits(tensors(tmp_path / "new"), tensors(GOLDEN / name))
    same_bits(load_pretrained(tmp_path / "new", dtype=None), params)
    assert pretrained_config(tmp_path / "new") == config
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_shards_are_indexed_as_transformers_does(tmp_path):
    name = "mistral_bf16_sharded"
    params = load_pretrained(GOLDEN / name, dtype=None)
    config = pretrained_config(GOLDEN / name)
    save_pretrained(tmp_path / "new", config, params, max_shard_size=20_000)
    own, theirs = (
        json.loads((folder / "model.safetensors.index.json").read_text())
        for folder in (tmp_path / "new", GOLDEN / name)
    )
    assert own["metadata"] == theirs["metadata"]
    assert own["weight_map"].keys() == theirs["weight_map"].keys()
    for path in (tmp_path / "new").glob("*.safetensors"):
        held = load_file(path)
        assert sum(x.nbytes for x in held.values()) <= 20_000
        assert {own["weight_map"][key] for key in held} == {path.name}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_rounded_to_the_dtype_that_is_asked_for(dtype, tmp_path):
    exact = load_pretrained(GOLDEN / "llama2")
    expected = jax.tree.map(lambda x: x.astype(dtype), exact)
    same_bits(load_pretrained(GOLDEN / "llama2", dtype=dtype), expected)
    config = pretrained_config(GOLDEN / "llama2")
    save_pretrained(tmp_path / "new", config, exact, dtype=dtype)
    same_bits(load_pretrained(tmp_path / "new", dtype=None), expected)
    fields = json.loads((tmp_path / "new" / "config.json").read_text())
    assert fields["torch_dtype"] == dtype


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_mesh_gets_the_same_bits_in_shards(name, tmp_path):
    expected = load_pretrained(GOLDEN / name, dtype="bfloat16")
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "fsdp"))
    asked = []

    def place(path: str, shape: tuple[int, ...]) -> NamedSharding:
        # Layers stay whole, and the axis after them is split; half the devices hold
        # the same.
        asked.append(path)
        spec = P(None, "fsdp") if path.startswith("layers") else P("fsdp")
        return NamedSharding(mesh, spec)

    loaded = load_pretrained(GOLDEN / name, dtype="bfloat16", sharding=place)
    same_bits(loaded, expected)
    assert "layers/mlp/up/kernel" in asked
    up = loaded["layers"]["mlp"]["up"]["kernel"]
    layers, D, F = up.shape
    assert up.sharding.shard_shape(up.shape) == (layers, D // 2, F)
    again = jax.tree.map(lambda x: x.sharding, loaded)
    for sharding in (again, NamedSharding(mesh, P())):
        same_bits(
            load_pretrained(GOLDEN / name, dtype="bfloat16", sharding=sharding),
            expected,
        )
    # Sharded weights are gathered to be written.
    save_pretrained(tmp_path / "new", pretrained_config(GOLDEN / name), loaded)
    same_bits(load_pretrained(tmp_path / "new", dtype=None), expected)
