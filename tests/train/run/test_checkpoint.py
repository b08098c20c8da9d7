"""Whose folder it is, and resuming: bit for bit, also after a kill."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from models import SIZES, LlamaConfig
from tests.helpers.checkpoints import config_of, store
from train.config.config import Config, model_config, resolved
from train.engine.optimizer import make_optimizer
from train.engine.step import Work, init_state, init_weights
from train.run.checkpoint import CheckpointError, Checkpoints
from train.run.folder import check_folder, resumed_if_there
from train.run.keep_healthy import KeepHealthy
from train.run.start import open_text


@pytest.fixture(scope="module", autouse=True)
def a_small_model():
    model = LlamaConfig(300, 16, 24, num_heads=2, num_layers=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "tiny", model)
        yield


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


def test_the_same_command_starts_a_run_and_goes_on_with_it(tmp_path, capsys):
    config = config_of(tmp_path / "run", "--resume-or-start")
    first = resumed_if_there(config)
    assert not first.resume
    check_folder(first)
    store(first)
    again = resumed_if_there(config)
    assert again.resume
    check_folder(again)
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" holds ")[1] for line in said] == [
        "no run yet",
        "a run: going on with it",
    ]
    strict = config_of(tmp_path / "run")
    assert resumed_if_there(strict) == strict


def test_another_configuration_is_an_error_that_names_the_fields(tmp_path):
    store(config_of(tmp_path))
    changed = ("--steps", "400", "--optimizer", "galore", "--rank", "16")
    with pytest.raises(ValueError, match="other flags") as raised:
        check_folder(config_of(tmp_path, "--resume", *changed))
    lines = str(raised.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == [
        "--learning-rate",
        "--optimizer",
        "--rank",
        "--refresh-every",
        "--scale",
        "--steps",
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
    with pytest.raises(ValueError, match="other flags") as raised:
        check_folder(changed)
    assert str(raised.value).splitlines()[1:] == [
        f"  --layerwise: {there} there, {here} here "
        "(a layer is clipped by its own norm, or all by one; and of microbatches the "
        "first chooses the bases, or all do)"
    ]
    parts = (*unclipped[:2], "--microbatches", "2", "--layerwise")
    store(config_of(tmp_path / "parts", *parts, there))
    with pytest.raises(ValueError, match="other flags"):
        check_folder(config_of(tmp_path / "parts", "--resume", *parts, here))
    # Nor while the clipping itself is changed.
    changed = config_of(tmp_path / "clipped", "--resume", *unclipped, here)
    with pytest.raises(ValueError, match=r"--clip-norm: 1\.0 there, None here"):
        check_folder(changed)


def test_a_field_that_one_version_lacks_is_a_difference(tmp_path):
    store(config_of(tmp_path))
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["optimizer"]["b2"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"--b2: absent there, 0.999 here"):
        check_folder(config_of(tmp_path, "--resume"))


def test_a_run_that_is_older_than_an_option_did_without_it(tmp_path):
    store(config_of(tmp_path))
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["optimizer"]["stagger"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    check_folder(config_of(tmp_path, "--resume"))
    with pytest.raises(ValueError, match="--stagger: False there, True here"):
        check_folder(config_of(tmp_path, "--resume", "--stagger"))


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


@pytest.mark.slow
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


def saved_run(folder: Path, steps: list[int]) -> tuple[Config, list[Any]]:
    """A run with these checkpoints, and the states in them."""
    source = str(write_documents(folder))
    flags = ("--rank", "4", "--vocab-size", "300", "--seq-len", "16")
    config = config_of(folder, *flags, "--source", source)
    init, states = jax.jit(make_init(config)), []
    batches = iter(open_text(config).train)
    with Checkpoints(folder, keep=9) as checkpoints:
        for step in steps:
            states.append(init(jax.random.key(step)))
            checkpoints.save(step, states[-1], batches, losses=[step / 4])
    return config, states


def restore_newest(config: Config, step: int | None = None) -> Any:
    like = state_shapes(config, SingleDeviceSharding(jax.devices()[0]))
    batches = iter(open_text(config).train)
    with Checkpoints(resolved(config, "out"), keep=9) as checkpoints:
        return checkpoints.restore_newest(like, batches, step), checkpoints.steps


def test_the_newest_that_is_whole_is_taken_and_later_ones_set_aside(tmp_path, capsys):
    config, states = saved_run(tmp_path, [1, 2, 3])
    shutil.rmtree(tmp_path / "checkpoints" / "3" / "state" / "d")
    (tmp_path / "checkpoints" / "2" / "position" / "metadata").write_text("{}")
    restored, steps = restore_newest(config)
    assert leaf_bytes(restored.state) == leaf_bytes(states[0])
    assert restored.losses == [0.25]
    assert steps == [1]
    kept = sorted(path.name for path in (tmp_path / "aside").iterdir())
    assert kept == ["2", "3"]
    told = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1] for line in told[:2]] == [
        " the checkpoint of step 3 cannot be used",
        " the checkpoint of step 2 cannot be used",
    ]
    shutil.rmtree(tmp_path / "checkpoints" / "1" / "state")
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        restore_newest(config)


def test_an_older_one_by_its_step(tmp_path):
    config, states = saved_run(tmp_path, [1, 2])
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7 .* \[1, 2\]"):
        restore_newest(config, 7)
    restored, steps = restore_newest(config, 1)
    assert leaf_bytes(restored.state) == leaf_bytes(states[0])
    assert steps == [1]
    assert (tmp_path / "aside" / "2" / "state").is_dir()
    assert config_of(tmp_path, "--resume-from", "1").resume


def test_what_has_the_name_of_an_unfinished_one_makes_way(tmp_path):
    config, _ = saved_run(tmp_path, [1])
    (tmp_path / "kept").mkdir()
    for step, target in (2, "../kept"), (3, "nowhere"):
        name = tmp_path / "checkpoints" / f"{step}.orbax-checkpoint-tmp"
        name.symlink_to(target)
    (tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp").write_text("a file")
    init = jax.jit(make_init(config))
    batches = iter(open_text(config).train)
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for step in 2, 3, 4:
            checkpoints.save(step, init(jax.random.key(step)), batches)
    assert checkpoints.unsaved is None
    there = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert there == ["1", "2", "3", "4"]
    assert (tmp_path / "kept").is_dir()


def record(step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "loss": 1.0, "skipped_in_a_row": 0, **values}


@pytest.mark.parametrize(
    ("records", "kept"),
    [
        ([record(1, eval_loss=3.0), record(2), record(3)], 1),
        ([record(1, eval_loss=3.0), record(2, eval_loss=None), record(3)], 1),
        ([record(1, eval_loss=3.0), record(2, eval_loss=9.0)], 2),
        ([record(1), record(2, skipped_in_a_row=1), record(3, loss=None)], 1),
        ([record(1, loss=float("nan"))], None),
        ([], None),
    ],
)
def test_the_newest_from_when_the_run_was_well(records, kept):
    assert KeepHealthy(records).newest([1, 2, 3]) == kept


def test_a_run_that_diverges_keeps_one_from_before(tmp_path):
    config, states = saved_run(tmp_path, [])
    init = jax.jit(make_init(config))
    batches = iter(open_text(config).train)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in range(1, 7):
            well = record(step, eval_loss=3.0) if step == 2 else None
            bad = record(step, skipped_in_a_row=step)
            state = init(jax.random.key(step))
            checkpoints.save(step, state, batches, well or bad)
        assert checkpoints.healthy == 2
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.steps == [2, 5, 6]
    assert states == []
