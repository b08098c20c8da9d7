"""Whose folder it is, and resuming: bit for bit, also after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from train.checkpoint import Checkpoints
from train.config import Config, model_config, parse, resolve, resolved
from train.folder import check_folder, own_folder
from train.main import open_text
from train.metrics import read_metrics
from train.optimizer import make_optimizer
from train.step import Work, init_state, init_weights

ROOT = Path(__file__).parent.parent


def config_of(folder: Path, *argv: str) -> Config:
    return resolve(parse(Config, "", ["--out", str(folder), *argv], "python -m train"))


def store(config: Config) -> None:
    """As a run does that begins in its folder."""
    with own_folder(config, {}):
        pass


def test_a_folder_belongs_to_one_run(tmp_path):
    config = config_of(tmp_path / "run")
    check_folder(config)
    store(config)
    with pytest.raises(FileExistsError, match=r"holds a run already; .* --resume"):
        check_folder(config)
    check_folder(config_of(tmp_path / "run", "--resume"))


def test_resuming_what_is_not_there_is_an_error(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no run to resume; leave out --resume"
    ):
        check_folder(config_of(tmp_path / "run", "--resume"))


def test_another_configuration_is_an_error_that_names_the_fields(tmp_path):
    store(config_of(tmp_path))
    changed = ("--steps", "400", "--optimizer", "galore", "--rank", "16")
    with pytest.raises(ValueError, match="another configuration") as raised:
        check_folder(config_of(tmp_path, "--resume", *changed))
    lines = str(raised.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == [
        "optimizer.learning_rate",
        "optimizer.name",
        "optimizer.rank",
        "optimizer.scale",
        "steps",
    ]
    assert "steps: 300 there, 400 here" in lines[-1]


def test_output_settings_may_change(tmp_path):
    store(config_of(tmp_path))
    flags = "--resume --log-every 3 --eval-every 7 --checkpoint-every 5 --keep 9"
    check_folder(config_of(tmp_path, *flags.split(), "--prompt", "Once"))


@pytest.mark.parametrize(("there", "here"), [("on", "off"), ("off", "on")])
def test_a_run_may_go_on_layer_by_layer_if_nothing_is_clipped(tmp_path, there, here):
    unclipped = ("--clip-norm", "None", "--layerwise")
    store(config_of(tmp_path / "unclipped", *unclipped, there))
    check_folder(config_of(tmp_path / "unclipped", "--resume", *unclipped, here))
    store(config_of(tmp_path / "clipped", "--layerwise", there))
    changed = config_of(tmp_path / "clipped", "--resume", "--layerwise", here)
    with pytest.raises(ValueError, match="another configuration") as raised:
        check_folder(changed)
    assert str(raised.value).splitlines()[1:] == [
        f"  layerwise: {there} there, {here} here "
        "(a layer is clipped by its own norm, or all by one; and of microbatches the "
        "first chooses the bases, or all do)"
    ]
    parts = (*unclipped[:2], "--microbatches", "2", "--layerwise")
    store(config_of(tmp_path / "parts", *parts, there))
    with pytest.raises(ValueError, match="another configuration"):
        check_folder(config_of(tmp_path / "parts", "--resume", *parts, here))
    # Nor while the clipping itself is changed.
    changed = config_of(tmp_path / "clipped", "--resume", *unclipped, here)
    with pytest.raises(ValueError, match=r"clip_norm: 1\.0 there, None here"):
        check_folder(changed)


def test_a_field_that_one_version_lacks_is_a_difference(tmp_path):
    store(config_of(tmp_path))
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["optimizer"]["b2"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"optimizer.b2: absent there, 0.999 here"):
        check_folder(config_of(tmp_path, "--resume"))


def restore(config: Config, step: int, like=None) -> tuple[Any, np.ndarray]:
    """A checkpoint's state, on one device by default, and the batch that follows it."""
    batches = iter(open_text(config).train)
    if like is None:
        like = state_shapes(config, SingleDeviceSharding(jax.devices()[0]))
    with Checkpoints(resolved(config, "out"), keep=9) as checkpoints:
        restored = checkpoints.restore(step, like, batches)
        return restored.state, next(batches)["tokens"]


def make_init(config: Config):
    optimizer = make_optimizer(config.optimizer, config.steps, jax.random.key(0))
    model, dtype = model_config(config.model), config.model.weight_dtype
    work = Work(model, optimizer, jax.random.key(0), weight_dtype=dtype)
    return lambda key: init_state(work, init_weights(work, key))


def state_shapes(config: Config, sharding: jax.sharding.Sharding):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(make_init(config), jax.random.key(0)),
    )


def leaf_bytes(state) -> dict[str, bytes]:
    """Every leaf's bits, by path."""

    def bits(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x).tobytes()

    return {
        jax.tree_util.keystr(path): bits(x)
        for path, x in jax.tree_util.tree_leaves_with_path(state)
    }


def write_documents(folder: Path) -> Path:
    """Documents of made-up words, enough for the steps of a test."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("aeioubcdfg"), 5)) for _ in range(200)]
    path = folder / "text.jsonl"
    texts = [" ".join(rng.choice(words, 120)) for _ in range(60)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def start_training(*argv: str) -> subprocess.Popen:
    # One CPU device and a quick compilation: this is about what is computed, not how
    # fast, and the eight devices of the test session would only make it slower.
    quick = {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    env = {**os.environ, "JAX_PLATFORMS": "cpu", **quick}
    return subprocess.Popen(
        [sys.executable, "-m", "train", *argv],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    flags = [
        *("--optimizer", "grass_jump", "--rank", "8", "--refresh-every", "7"),
        *("--layerwise", "on"),
        *("--steps", "60", "--batch-size", "4", "--seq-len", "16"),
        *("--log-every", "4", "--eval-every", "20", "--checkpoint-every", "10"),
        *("--vocab-size", "300", "--weight-decay", "0.1", "--sample-tokens", "0"),
        *("--source", str(write_documents(tmp_path))),
        *("--cache-dir", str(tmp_path / "cache")),
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start_training(*flags, "--out", str(whole)))

    process = start_training(*flags, "--out", str(killed))
    while not (killed / "checkpoints" / "20").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    at_kill = [r["step"] for r in read_metrics(killed)]
    assert 20 <= at_kill[-1] < 60
    assert not (killed / "summary.json").exists()

    finish(start_training(*flags, "--out", str(killed), "--resume"))
    config = config_of(whole, *flags)
    state, next_batch = restore(config, 60)
    killed_state, killed_next_batch = restore(config_of(killed, *flags), 60)
    whole_bits, killed_bits = leaf_bytes(state), leaf_bytes(killed_state)
    assert [k for k in whole_bits if whole_bits[k] != killed_bits[k]] == []
    for part in ("params", "mu", "nu", "basis", "rng_key"):
        assert any(part in path for path in whole_bits)
    np.testing.assert_array_equal(next_batch, killed_next_batch)

    timing = {"ms_per_step", "tokens_per_s"}
    first, second = (
        [{k: v for k, v in r.items() if k not in timing} for r in read_metrics(folder)]
        for folder in (whole, killed)
    )
    assert first == second
    assert [r["step"] for r in first if "eval_loss" in r] == [20, 40, 60]
    assert first[-1]["refreshes"] == 9


def test_a_checkpoint_moves_to_other_devices_and_only_the_latest_stay(tmp_path):
    source = str(write_documents(tmp_path))
    flags = ("--rank", "4", "--vocab-size", "300", "--seq-len", "16")
    config = config_of(tmp_path, *flags, "--source", source)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    batches = iter(open_text(config).train)
    init = jax.jit(make_init(config), out_shardings=everywhere)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.steps == []
        for step in (1, 2, 3):
            state = init(jax.random.key(step))
            next(batches)
            checkpoints.save(step, state, batches)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.steps == [2, 3]
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("[0-9]*"))
    assert kept == ["2", "3"]

    expected = next(batches)["tokens"]
    for like in (None, state_shapes(config, everywhere)):
        restored, batch = restore(config, 3, like)
        assert leaf_bytes(restored) == leaf_bytes(state)
        np.testing.assert_array_equal(batch, expected)
        assert type(restored) is type(state)
    assert restored.step.sharding == everywhere
