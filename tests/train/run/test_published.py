"""Published weights as the start of a run, and a run as published weights."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

import lowrank_optax as lro
import train.export
import train.main
from models import (
    LlamaConfig,
    init_params,
    load_pretrained,
    pretrained_config,
    save_pretrained,
)
from models.rope import Llama3Scaling
from train.config.command_line import parse
from train.config.config import (
    Config,
    ModelConfig,
    from_json,
    model_config,
    to_json,
)
from train.config.resolve import resolve
from train.data.tokenizer import train_tokenizer
from train.engine.mesh import make_mesh
from train.run.first_state import initial
from train.run.loop import work_of
from train.run.restore import load_run
from train.run.start import (
    check_start,
    pinned,
    tokenizer_file,
    weights_for,
    with_shape_of_run,
)
from train.run.stored import store_settings

TEXT = "a quick brown fox jumps over the lazy dog "
MODEL = LlamaConfig(
    *(300, 16, 24),
    num_heads=2,
    num_layers=2,
    num_kv_heads=1,
    head_dim=12,
    rope_theta=5e5,
    rope_scaling=Llama3Scaling(8.0, low=1.0, high=4.0, original_positions=16),
    max_positions=64,
)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A folder as one downloads it, with its tokenizer."""
    folder = tmp_path_factory.mktemp("hub") / "Small-0.5"
    tokenizer = train_tokenizer(
        [TEXT], vocab_size=300, cache_dir=str(folder.parent / "cache")
    )
    files = {"tokenizer.json": tokenizer.content}
    params = init_params(MODEL, jax.random.key(0))
    ends = [tokenizer.eos_id, 7]  # as of models that answer
    settings = {"pad_token": "<pad>", "chat_template": "{{ messages }}"}
    files["tokenizer_config.json"] = json.dumps(settings).encode()
    save_pretrained(
        *(folder, MODEL, params), eos_token_id=ends, pad_token_id=5, files=files
    )
    return folder


def config_of(*argv: str) -> Config:
    words = ("--optimizer", "adamw", *argv)  # quick to compile
    return pinned(resolve(parse(Config, "", words, "python -m train")))


def bits(tree) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def test_the_shape_is_the_folders_and_is_stored(published):
    config = config_of("--init-from", f"hf:{published}")
    shape = model_config(config.model)
    own = {"compute_dtype": "float32"}
    assert shape == dataclasses.replace(MODEL, **own)
    assert config.model.name == "Small-0.5"
    assert config.out.name == "Small-0.5-adamw"
    assert model_config(from_json(to_json(config)).model) == shape
    assert tokenizer_file(config) == str(published / "tokenizer.json")
    # New weights of the same shape, by the file alone.
    new = config_of("--model", str(published / "config.json"), "--vocab-size", "512")
    wanted = dataclasses.replace(MODEL, vocab_size=512, **own)
    assert model_config(new.model) == wanted
    assert new.model.name == "Small-0.5"
    # Of a preset all but the size is taken.
    preset = config_of("--preset", "galore-60m", "--init-from", f"hf:{published}")
    assert preset.model.name == "Small-0.5"
    with pytest.raises(ValueError, match="leave out --size"):
        config_of("--size", "60m", "--init-from", f"hf:{published}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("devices", [1, 2])
def test_a_run_begins_with_the_weights(published, dtype, devices):
    argv = ("--init-from", f"hf:{published}", "--weight-dtype", dtype)
    config = config_of(*argv, "--fsdp", str(devices))
    mesh = make_mesh(config, jax.devices()[:devices])
    work = work_of(config, jax.random.key(0))
    with jax.set_mesh(mesh):
        make, like = initial(work, mesh, partial(weights_for, config))
        params = make(jax.random.key(1)).params
    wanted = lro.weights.store(load_pretrained(published), dtype)
    if dtype == "int8":  # of codes that are ties some are rounded the other way
        assert jax.tree.structure(params) == jax.tree.structure(wanted)
        for x, y in zip(*map(jax.tree.leaves, (params, wanted)), strict=True):
            atol = 1 if x.dtype == "int8" else 0
            assert x.dtype == y.dtype
            np.testing.assert_allclose(np.float32(x), np.float32(y), 1e-6, atol)
    else:
        assert bits(params) == bits(wanted)
    same = jax.tree.map(lambda x, y: x.sharding == y.sharding, params, like.params)
    assert all(jax.tree.leaves(same))


def test_a_run_goes_on_and_is_exported(published, tmp_path, capsys, monkeypatch):
    """Trained, resumed and written; the folder is a start for the next run."""
    (tmp_path / "text.txt").write_text(TEXT * 400)
    mesh = make_mesh(Config(), jax.devices()[:1])
    monkeypatch.setattr(train.main, "make_mesh", lambda config: mesh)
    run, exported = tmp_path / "run", tmp_path / "exported"
    flags = ["--init-from", f"hf:{published}", "--out", str(run), "--steps", "4"]
    flags += ["--source", str(tmp_path / "text.txt"), "--optimizer", "adamw"]
    flags += ["--seq-len", "32", "--batch-size", "4", "--schedule", "constant"]
    flags += ["--checkpoint-every", "4", "--prompt", "fox", "--sample-tokens", "4"]
    train.main.main(flags)
    train.main.main(["--resume", "--out", str(run), "--steps", "6"])
    loaded = load_run(run)
    assert loaded.step == 6
    assert bits(loaded.weights) != bits(load_pretrained(published))

    train.export.main([str(run), "--to", str(exported)])
    assert "wrote step 6" in capsys.readouterr().out
    assert bits(load_pretrained(exported)) == bits(loaded.weights)
    assert pretrained_config(exported) == pretrained_config(published)
    tokenizer = json.loads((exported / "tokenizer_config.json").read_text())
    assert tokenizer["eos_token"] == "<|endoftext|>"
    assert tokenizer["pad_token"] == "<pad>"
    assert tokenizer["chat_template"] == "{{ messages }}"
    assert json.loads((exported / "config.json").read_text())["pad_token_id"] is None
    written = (exported / "tokenizer.json").read_bytes()
    assert written == (published / "tokenizer.json").read_bytes()
    fields = json.loads((exported / "generation_config.json").read_text())
    assert loaded.tokenizer is not None
    assert fields["eos_token_id"] == [loaded.tokenizer.eos_id, 7]
    assert fields["pad_token_id"] == 5
    # A run that begins with this one's weights has its shape.
    words = ("--init-from", str(run), "--optimizer", "adamw")
    begun = with_shape_of_run(parse(Config, "", words, "python -m train"))
    assert model_config(resolve(begun).model) == loaded.model
    # And what is stated of its tokens.
    (tmp_path / "next").mkdir()
    store_settings(tmp_path / "next", run, loaded.tokenizer)
    for name in ("generation_config.json", "tokenizer_config.json"):
        first, second = ((x / name).read_text() for x in (run, tmp_path / "next"))
        assert json.loads(first) == json.loads(second) != {}
    again = config_of("--init-from", f"hf:{exported}")
    check_start(again, loaded.tokenizer)
    assert model_config(again.model) == loaded.model
    with pytest.raises(SystemExit, match="exists and is not empty"):
        train.export.main([str(run), "--to", str(exported)])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--model", "nowhere"), "nowhere is not a folder"),
        (("--init-from", "hf:nowhere"), "nowhere is not a folder"),
    ],
)
def test_a_shape_that_is_not_there_is_refused(argv, message):
    with pytest.raises(FileNotFoundError, match=message):
        config_of(*argv)
    with pytest.raises(ValueError, match="both give a shape; leave out one"):
        ModelConfig("60m", shape_from="x")


def test_weights_that_do_not_fit_are_refused(published, tmp_path):
    argv = ("--init-from", f"hf:{published}")
    with pytest.raises(ValueError, match="has vocab_size=300, and this run 512"):
        check_start(config_of(*argv, "--vocab-size", "512"), None)
    other = json.loads((published / "config.json").read_text()) | {"rms_norm_eps": 1e-4}
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"norm_eps=1e-06, and this run 0.0001"):
        check_start(config_of(*argv, "--model", str(tmp_path)), None)
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer.json nor"):
        tokenizer_file(config_of("--init-from", f"hf:{tmp_path}"))
    with pytest.raises(FileNotFoundError, match=r"has neither model.safetensors"):
        check_start(config_of("--init-from", f"hf:{tmp_path}"), None)
