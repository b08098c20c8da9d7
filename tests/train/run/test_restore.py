"""A run's checkpoint in use: in a notebook, as a new run's start, for text, longer."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
import train.sample
from models import SIZES, LlamaConfig, forward
from tests.helpers.checkpoints import store
from tests.helpers.marks import NIGHTLY
from train.config.command_line import parse
from train.config.config import Config, from_json, model_config, to_json
from train.config.resolve import resolve
from train.data.fingerprint import of_tokenizer
from train.data.tokenizer import (
    BytePairTokenizer,
    Tokenizer,
    open_tokenizer,
    train_tokenizer,
)
from train.engine.mesh import make_mesh
from train.engine.optimizer import make_optimizer, make_schedule
from train.engine.step import TrainState, Work
from train.host.atomic import check_writable
from train.run.checkpoint import Checkpoints
from train.run.first_state import initial
from train.run.folder import check_folder, own_folder
from train.run.restore import load_run, load_weights
from train.run.start import (
    check_rates,
    check_start,
    pinned,
    tokenizer_file,
    weights_for,
)
from train.run.stored import run_and_step, store_tokenizer, stored_tokenizer

TEXTS = ["a quick brown fox jumps over the lazy dog " * 4, "and an owl sleeps " * 9]


@pytest.fixture(scope="module", autouse=True)
def a_small_model():
    model = LlamaConfig(300, 16, 24, num_heads=2, num_layers=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "micro", model)
        yield


def config_of(folder: Path, *argv: str) -> Config:
    flags = ("--optimizer", "adamw", "--out", str(folder), *argv)  # quick to compile
    config = parse(Config, "", flags, "python -m train")
    model = dataclasses.replace(config.model, size="micro")
    return resolve(dataclasses.replace(config, model=model))


class Saved(NamedTuple):
    """A run, and its newest checkpoint."""

    config: Config
    state: TrainState


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(Config(), jax.devices()[:1])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = str(tmp_path_factory.mktemp("cache"))
    return train_tokenizer(TEXTS, vocab_size=280, cache_dir=folder)


def first_state(config: Config, mesh, seed: int = 0, given=None) -> TrainState:
    work = Work(
        model_config(config.model),
        make_optimizer(config.optimizer, config.steps, jax.random.key(0)),
        jax.random.key(0),
        weight_dtype=config.model.weight_dtype,
    )
    return initial(work, mesh, given)[0](jax.random.key(seed))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, mesh, tokenizer) -> Callable[[str], Saved]:
    """From a dtype to a run's folder as the trainer leaves it, made once."""

    @cache
    def save(dtype: str) -> Saved:
        folder = tmp_path_factory.mktemp("runs") / "run@0.1"
        config = config_of(folder, "--weight-dtype", dtype)
        store(config)
        store_tokenizer(folder, tokenizer)
        batches = iter(grain.MapDataset.range(10).to_iter_dataset())
        state = first_state(config, mesh)
        other = state._replace(params=jax.tree.map(jnp.zeros_like, state.params))
        with Checkpoints(folder, keep=9) as checkpoints:
            checkpoints.save(10, other, batches)
            checkpoints.save(20, state, batches)
        return Saved(config, state)

    return save


def empty_run(config: Config, *steps: int) -> None:
    """The folder of a run whose checkpoints nobody reads."""
    store(config)
    for step in steps:
        (config.out / "checkpoints" / str(step)).mkdir(parents=True)


def bits(tree) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize(
    "dtype", ["float32", pytest.param("bfloat16", marks=NIGHTLY), "int8"]
)
def test_a_run_is_loaded_as_it_was_saved(saved, tokenizer, dtype):
    config, state = saved(dtype)
    before = sorted(path for path in config.out.rglob("*"))
    run = load_run(config.out)
    assert sorted(path for path in config.out.rglob("*")) == before
    assert (run.config, run.step) == (config, 20)
    assert run.model == model_config(config.model)
    # In int8 the numbers are what the model of the training saw.
    expected = lro.weights.dense(state.params, run.model.compute_dtype)
    assert bits(run.weights) == bits(expected)
    assert jax.tree.structure(run.weights) == jax.tree.structure(expected)
    assert run.tokenizer is not None
    ids = run.tokenizer.encode("a quick owl")
    assert ids == tokenizer.encode("a quick owl")
    logits = forward(run.model, run.weights, jnp.asarray([ids]))
    assert logits.shape == (1, len(ids), 300)
    assert bool(jnp.isfinite(logits).all())
    earlier = load_run(f"{config.out}@10")
    assert earlier.step == load_run(config.out, 10).step == 10
    assert bits(earlier.weights) != bits(run.weights)


def test_a_run_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no run: it has no config.json"):
        load_run(tmp_path)
    config = config_of(tmp_path)
    empty_run(config)
    with pytest.raises(FileNotFoundError, match="has no checkpoint; train it with"):
        load_run(tmp_path)
    empty_run(config, 10)
    with pytest.raises(FileNotFoundError, match=r"of step 7; it has \[10\]"):
        load_run(tmp_path, 7)
    (tmp_path / "config.json").write_text('{"stepps": 3}')
    with pytest.raises(ValueError, match=r"config.json cannot be read: .*stepps"):
        load_run(tmp_path)


def test_a_name_may_have_a_step_and_a_folder_s_own_at(tmp_path):
    (tmp_path / "galore@1").mkdir()
    assert run_and_step("runs/a@30") == (Path("runs/a"), 30)
    assert run_and_step("runs/a") == (Path("runs/a"), None)
    assert run_and_step("runs/adamw@0.002") == (Path("runs/adamw@0.002"), None)
    for name, step in ((f"{tmp_path}/galore@1", None), (f"{tmp_path}/galore@1@20", 20)):
        assert run_and_step(name) == (tmp_path / "galore@1", step)


def test_a_stored_config_comes_back(tmp_path):
    rank = ("--optimizer", "galore", "--rank", "attention=4,mlp=0.5")
    for config in (config_of(tmp_path), config_of(tmp_path, *rank, "--steps", "7")):
        assert from_json(to_json(config)) == config


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("float32", "float32"),
        ("bfloat16", "int8"),
        ("int8", "int8"),
        ("int8", "float32"),
    ],
)
def test_a_new_run_begins_with_the_weights_of_another(tmp_path, mesh, saved, old, new):
    source, state = saved(old)
    argv = ("--init-from", str(source.out), "--weight-dtype", new)
    config = pinned(config_of(tmp_path / "b", *argv))
    assert config.init_from == f"{source.out}@20"
    begun = first_state(config, mesh, given=partial(weights_for, config))
    if old == new:
        assert bits(begun.params) == bits(state.params)
    expected = lro.weights.store(
        state.params if new == "int8" else lro.weights.dense(state.params), new
    )
    assert bits(begun.params) == bits(expected)
    assert int(begun.step) == 0


def test_the_step_is_pinned_at_the_start_and_stays_when_resumed(tmp_path):
    source = config_of(tmp_path / "a")
    empty_run(source, 10)
    given = ("--init-from", str(source.out))
    new = pinned(config_of(tmp_path / "b", *given))
    store(new)
    empty_run(source, 30)  # it went on
    resumed = pinned(config_of(tmp_path / "b", *given, "--resume"))
    assert resumed.init_from == new.init_from == f"{source.out}@10"
    check_folder(resumed)
    other = pinned(
        config_of(tmp_path / "b", "--resume", *given[:1], f"{source.out}@30")
    )
    with pytest.raises(ValueError, match=r"--init-from: .*@10 there, .*@30 here"):
        check_folder(other)
    with pytest.raises(FileNotFoundError, match=r"of step 7; it has \[10, 30\]"):
        pinned(config_of(tmp_path / "c", *given[:1], f"{source.out}@7"))


def test_another_shape_or_tokenizer_is_an_error(tmp_path, tokenizer, capsys):
    source = config_of(tmp_path / "a")
    empty_run(source, 10)
    store_tokenizer(source.out, tokenizer)
    given = ("--init-from", f"{source.out}@10")
    config = config_of(tmp_path / "b", *given)
    check_start(config, tokenizer)
    assert capsys.readouterr().out == ""
    check_start(config, None)
    assert "whether a token means the same in both is not known" in (
        capsys.readouterr().out
    )
    larger = config_of(tmp_path / "b", *given, "--vocab-size", "310")
    with pytest.raises(
        ValueError, match=r"vocab_size 300, .* 310; .* --vocab-size 300"
    ):
        check_start(larger, tokenizer)
    folder = str(tmp_path / "cache")
    another = train_tokenizer(TEXTS[:1], vocab_size=270, cache_dir=folder)
    with pytest.raises(ValueError, match=r"another tokenizer .* leave out --tokenizer"):
        check_start(config, another)


def test_the_tokenizer_of_a_run_stays_with_it(tmp_path, tokenizer):
    config = config_of(tmp_path / "a", "--tokenizer", "mine.json")
    assert tokenizer_file(config) == "mine.json"
    config.out.mkdir()
    store_tokenizer(config.out, None)
    assert stored_tokenizer(config.out) is None
    store_tokenizer(config.out, tokenizer)
    kept = stored_tokenizer(config.out)
    assert kept == config.out / "tokenizer.json"
    assert kept.read_bytes() == tokenizer.content
    assert isinstance(tokenizer, BytePairTokenizer)
    # Resumed, the run goes on with its own, also if the file it was given is gone.
    resumed = dataclasses.replace(config, resume=True)
    assert tokenizer_file(resumed) == str(kept)
    # A run from its weights has it too, unless it names one.
    given = ("--init-from", f"{config.out}@10")
    assert tokenizer_file(config_of(tmp_path / "b", *given)) == str(kept)
    other = config_of(tmp_path / "b", *given, "--tokenizer", "other.json")
    assert tokenizer_file(other) == "other.json"
    assert tokenizer_file(config_of(tmp_path / "b")) is None


def exchanged(folder: Path, source: Path, tmp_path: Path) -> None:
    """A run's folder whose tokenizer is another one's, of as many tokens."""
    shutil.copytree(source, folder)
    own = open_tokenizer(folder / "tokenizer.json")
    data = {"source": {}, "eval_source": None, "tokenizer": of_tokenizer(own)}
    (folder / "data.json").write_text(json.dumps(data))
    load_run(folder)
    cache = str(tmp_path / "cache")
    words = ["lazy lakes keep owls awake while " * 5]
    other = train_tokenizer(words, vocab_size=280, cache_dir=cache)
    (folder / "tokenizer.json").write_bytes(other.content)


def test_an_exchanged_tokenizer_is_refused_wherever_it_is_read(tmp_path, saved):
    folder = tmp_path / "run"
    exchanged(folder, saved("float32").config.out, tmp_path)
    message = r"tokenizer.json is not the tokenizer that the run was trained with"
    with pytest.raises(ValueError, match=message):
        load_run(folder)
    with pytest.raises(SystemExit, match=message):
        train.sample.main([str(folder), "--prompt", "an owl"])
    new = config_of(tmp_path / "new", "--init-from", str(folder))
    with pytest.raises(ValueError, match=message):
        check_start(new, open_tokenizer(folder / "tokenizer.json"))
    (folder / "data.json").unlink()
    assert load_run(folder).tokenizer is not None  # nothing to compare it with


@pytest.mark.parametrize("text", ["[]", "null", "3", '{"source": {}}', "", "[" * 10**5])
def test_a_fingerprint_of_another_shape_is_an_error(text, tmp_path, saved):
    folder = tmp_path / "run"
    shutil.copytree(saved("float32").config.out, folder)
    (folder / "data.json").write_text(text)
    with pytest.raises(SystemExit, match=r"data.json .*: put it back, or start a new"):
        train.sample.main([str(folder), "--prompt", "an owl"])
    config = dataclasses.replace(load_config(folder), out=folder, resume=True)
    with (
        pytest.raises(ValueError, match=r"data.json .*: put it back, or start a new"),
        own_folder(config, {"source": {}, "eval_source": None, "tokenizer": None}),
    ):
        pass


def load_config(folder: Path) -> Config:
    return from_json((folder / "config.json").read_text())


CONSTANT = ("--warmup", "0", "--final", "1")


def test_a_run_of_a_constant_rate_can_be_made_longer(tmp_path):
    store(config_of(tmp_path, *CONSTANT, "--steps", "40"))
    longer = config_of(tmp_path, *CONSTANT, "--steps", "60", "--resume")
    check_folder(longer)
    with pytest.raises(ValueError, match=r"made longer, not shorter; begin a new one"):
        check_folder(config_of(tmp_path, *CONSTANT, "--steps", "30", "--resume"))
    forgotten = config_of(tmp_path, "--steps", "60", "--resume")
    with pytest.raises(ValueError, match=r"--warmup: 0 there") as raised:
        check_folder(forgotten)
    assert "--steps:" not in str(raised.value)
    # Because no step can tell: the rates are the same bits.
    rates = [
        [
            make_optimizer(c.optimizer, steps, jax.random.key(0)).schedule(i)
            for i in (0, 39)
        ]
        for c, steps in ((longer, 40), (longer, 60))
    ]
    assert bits(rates[0]) == bits(rates[1])


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        ((), "a cosine ends at the last step; .* --schedule wsd or"),
        (("--warmup", "0"), "a cosine ends at the last step; .* --schedule wsd or"),
        (("--final", "1"), "a cosine ends at the last step; .* --schedule wsd or"),
        ((*CONSTANT, "--optimizer", "golore"), "golore changes its subspace"),
    ],
)
def test_another_run_cannot_and_the_error_says_why_and_what_to_do(tmp_path, argv, why):
    store(config_of(tmp_path, *argv, "--steps", "40"))
    longer = config_of(tmp_path, *argv, "--steps", "60", "--resume")
    with pytest.raises(ValueError, match=why) as raised:
        check_folder(longer)
    assert "steps: 40 there, 60 here" in str(raised.value)
    assert f"--init-from {tmp_path} --out ANOTHER" in str(raised.value)


WSD = ("--schedule", "wsd", "--warmup", "2", "--decay", "4", "--steps", "12")


@pytest.mark.parametrize(
    ("argv", "skipped", "message"),
    [
        ((), 0, None),
        (("--steps", "20"), 0, "step 10 was .* step 12; .* --resume-from 8"),
        (("--steps", "20", "--resume-from", "8"), 0, None),
        (("--steps", "20", "--resume-from", "12"), 0, "step 12; .* --resume-from 8"),
        # The decay would have begun before.
        (("--decay", "9"), 0, "step 4 was .* --resume-from 2"),
        (("--decay", "11", "--warmup", "1"), 0, "step 1 was .* --init-from .* --out"),
        # A step that was skipped moved no schedule.
        ((), 3, None),
    ],
)
def test_the_steps_that_are_done_had_the_rates_of_the_schedule(
    tmp_path, argv, skipped, message
):
    begun = config_of(tmp_path, *WSD)
    empty_run(begun, 2, 8, 12)
    rate = make_schedule(begun.optimizer, 12)
    records = [
        {
            "step": step,
            "learning_rate": float(rate(step - 1 - (skipped if step > 5 else 0))),
            "skipped": skipped if step > 5 else 0,
        }
        for step in (1, 2, 4, 6, 8, 10, 12)
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "metrics.jsonl").write_text(lines)
    longer = config_of(tmp_path, *WSD, *argv, "--resume")
    if message is None:
        check_rates(longer)
    else:
        with pytest.raises(ValueError, match=message):
            check_rates(longer)


def test_text_is_printed_from_a_run(tmp_path, saved, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(saved("float32").config.out, folder)

    def text(*argv: str) -> str:
        train.sample.main([str(folder), "--prompt", "an owl", "--tokens", "6", *argv])
        return capsys.readouterr().out

    first = text()
    assert first.startswith("an owl")
    assert first == text("--seed", "0") != text("--seed", "1")
    assert text("--temperature", "0") == text("--temperature", "0", "--seed", "1")
    for argv, message in (
        (("--prompt", ""), "prompt='' has no token to begin with"),
        ((), "has no tokenizer: it was trained on tokens"),
    ):
        if not argv:
            (folder / "tokenizer.json").unlink()
        with pytest.raises(SystemExit, match=message):
            text(*argv)


@pytest.mark.parametrize("argv", ["--tokens 0", "--temperature nan", "--seed -1"])
def test_a_bad_flag_of_a_sample_is_a_clear_error(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.sample.main(["runs/a", *argv.split()])
    assert stopped.value.code == 2
    assert argv.split()[0][2:] + "=" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to_is_an_error(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    for folder in (file, file / "a" / "b"):
        with pytest.raises(NotADirectoryError, match=f"out: {file} is a file"):
            check_writable(folder)
    check_writable(tmp_path / "a" / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def full(dir: Path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryDirectory", full)
    message = rf"out: {tmp_path} cannot be written to \(No space left on device\)"
    with pytest.raises(PermissionError, match=message):
        check_writable(tmp_path / "a" / "b")


def test_weights_are_loaded_as_they_are_kept_into_the_host_s_memory(saved):
    config, state = saved("int8")
    loaded = load_weights(config.out, 20)
    assert {type(x) for x in jax.tree.leaves(loaded)} == {np.ndarray}
    assert bits(loaded) == bits(state.params)
    assert jax.tree.structure(loaded) == jax.tree.structure(state.params)
