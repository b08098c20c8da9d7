"""The command line: help, errors, defaults by optimizer, names in a comparison."""

import dataclasses
import json
from pathlib import Path
from typing import get_args

import jax
import pytest

from models import SIZES
from train.compare import Comparison, expand, named, table, title
from train.config import (
    Basis,
    Config,
    OptimizerConfig,
    OptimizerName,
    Size,
    model_config,
    parse,
    resolve,
    to_json,
)
from train.main import DESCRIPTION, main
from train.methods import BASES, METHODS


def config_of(*argv: str) -> Config:
    return parse(Config, DESCRIPTION, argv, "python -m train")


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for example in (
        "python -m train --optimizer galore --basis sara --rank 32 --refresh-every 50",
        "--resume",
        "python -m train.compare --help",
    ):
        assert example in shown
    said = " ".join(shown.replace("│", " ").split())
    assert "(default: None; apollo_mini: always 1)" in said
    assert "(default: 50; ldadam: always 1, dct_adamw: always 1, online_" in said
    assert "--layerwise {auto,on,off}" in said
    assert "each layer is clipped by its own norm, and skipped by itself" in said
    assert "--weight-dtype {float32,bfloat16,int8}" in said
    assert "every update is rounded at random" in said
    for group in ("model options", "optimizer options", "data options"):
        assert group in shown
    # Every field is explained: a class docstring without one leaves a bare default.
    for config in (Config, *(f.default_factory for f in dataclasses.fields(Config))):
        if dataclasses.is_dataclass(config) and config.__module__ == "train.config":
            for field in dataclasses.fields(config):
                nested = dataclasses.is_dataclass(field.default_factory)
                assert nested or f" {field.name}: " in (config.__doc__ or "")


def test_short_flags_reach_their_groups():
    config = config_of(
        *("--optimizer", "grass_jump", "--basis", "sara", "--rank", "32"),
        *("--refresh-every", "50", "--steps", "300", "--size", "60m", "--resume"),
        *("--log-every", "5", "--source", "a.txt"),
    )
    assert config.optimizer == OptimizerConfig(
        "grass_jump", "sara", rank=32, refresh_every=50
    )
    assert (config.steps, config.model.size, config.resume) == (300, "60m", True)
    assert (config.report.log_every, config.data.source) == (5, "a.txt")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--optimizer adamw --basis sara", "adamw has no subspace"),
        ("--batch-size 6 --microbatches 4", "batch_size=6 is not a multiple"),
        ("--layerwise yes", "invalid choice"),
        ("--weight-dtype float16", "invalid choice"),
        ("--steps 0", "steps=0 must be above 0"),
        ("--rank 0", "rank=0 must be above 0"),
        ("--warmup 1.5", "warmup=1.5"),
        ("--seq-len 1", "seq_len=1"),
        ("--log-every 0", "log_every=0"),
        ("--scale 0", "scale=0.0 must be above 0"),
        ("--angle 0", "angle=0.0 must be above 0"),
        ("--walk-rank 0", "walk_rank=0 must be above 0"),
        ("--optimizer sgd", "invalid choice"),
        ("--optimizer galore --basis pca", "invalid choice"),
        ("--stepps 3", "--stepps"),
    ],
)
def test_a_bad_flag_is_a_clear_error(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        config_of(*argv.split())
    assert stopped.value.code == 2
    shown = capsys.readouterr().err.replace("│", " ")
    assert message in " ".join(shown.split())


def test_the_choices_are_the_tables_names():
    assert get_args(OptimizerName) == (*METHODS,)
    assert get_args(Basis) == ("default", *BASES)
    assert get_args(Size) == (*SIZES,)


# scale, b1 and b2; None where the method has none.
OWN_DEFAULTS = {
    "adamw": (None, 0.9, 0.999),
    "galore": (0.25, 0.9, 0.999),
    "galore_adam_mini": (0.25, 0.9, 0.95),
    "galore_adafactor": (0.25, 0.9, None),
    "fira_adafactor": (0.25, None, None),
    "grass_jump": (1.0, 0.9, 0.999),
    "ldadam": (1.0, 0.908, 0.99),
    "apollo_mini": (128.0, 0.9, 0.999),
    "frugal": (None, 0.9, 0.999),
    "msgd": (1.0, 0.9, None),
}


@pytest.mark.parametrize("name", METHODS)
def test_defaults_go_by_optimizer(name):
    config = resolve(config_of("--optimizer", name))
    assert config.optimizer.learning_rate == METHODS[name].rate
    own = (config.optimizer.scale, config.optimizer.b1, config.optimizer.b2)
    assert own == OWN_DEFAULTS.get(name, own)  # what a run stores beside itself
    assert config.optimizer.rank == 32  # a quarter of tiny's 128
    assert config.model.compute_dtype == "float32"  # the tests run on a CPU
    assert config.out == Path(f"runs/tiny-{name}")
    given = resolve(
        config_of("--optimizer", name, "--learning-rate", "7", "--rank", "5")
    )
    assert (given.optimizer.learning_rate, given.optimizer.rank) == (7, 5)


def test_model_config_has_the_size_s_vocabulary_or_the_given_one():
    tiny = model_config(resolve(config_of()).model)
    assert (tiny.vocab_size, tiny.hidden_size) == (4096, 128)
    given = model_config(resolve(config_of("--vocab-size", "300")).model)
    assert given == dataclasses.replace(tiny, vocab_size=300)


def test_layer_by_layer_and_the_weights_dtype_are_what_was_asked_for():
    config = resolve(config_of())
    assert (config.layerwise, config.model.weight_dtype) == ("off", "float32")
    argv = ("--layerwise", "on", "--weight-dtype", "int8", "--clip-norm", "None")
    config = resolve(config_of(*argv))
    assert (config.layerwise, config.model.weight_dtype) == ("on", "int8")
    assert config.optimizer.clip_norm is None
    stored = json.loads(to_json(config))
    assert (stored["layerwise"], stored["model"]["weight_dtype"]) == ("on", "int8")
    assert stored["optimizer"]["clip_norm"] is None
    # Microbatches may be asked for where the default is taken, which goes with them.
    assert resolve(config_of("--microbatches", "2")).layerwise == "off"


@pytest.mark.parametrize(
    ("backend", "flags", "expected"),
    [
        ("gpu", ("--size", "7b"), "on"),
        ("cpu", ("--size", "7b"), "off"),
        ("gpu", ("--size", "1b"), "off"),
        ("gpu", ("--size", "7b", "--microbatches", "2"), "off"),
        ("gpu", ("--size", "7b", "--layerwise", "off"), "off"),
    ],
)
def test_layer_by_layer_where_it_is_faster(backend, flags, expected, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert resolve(config_of(*flags)).layerwise == expected


def test_json_holds_every_field():
    config = resolve(config_of("--optimizer", "fira"))
    stored = json.loads(to_json(config))
    assert stored["out"] == "runs/tiny-fira"
    assert stored["optimizer"] == dataclasses.asdict(config.optimizer)
    assert stored["optimizer"]["learning_rate"] == 3e-3
    assert stored["data"] == dataclasses.asdict(config.data)


def test_a_comparison_s_runs_differ_in_optimizer_and_folder_only():
    work = config_of("--rank", "8", "--seed", "3")
    comparison = Comparison(work, ("adamw", "galore+sara@5e-3", "grass_jump"))
    configs = expand(comparison, Path("x"))
    titles = ["adamw@0.002", "galore+sara@0.005", "grass_jump@0.002"]
    assert [title(c.optimizer) for c in configs] == titles
    assert [c.out for c in configs] == [Path("x") / name for name in titles]
    same = {dataclasses.replace(c, optimizer=work.optimizer, out=None) for c in configs}
    assert len(same) == 1
    assert same.pop().report.checkpoint_every == 0
    assert [c.optimizer.rank for c in configs] == [8, 8, 8]


@pytest.mark.parametrize("name", ["sgd", "galore+svdd", "adamw+svd", "fira@fast"])
def test_a_misspelt_optimizer_is_an_error(name):
    with pytest.raises(ValueError, match=r"NAME|adamw has no subspace|fast"):
        named(name, OptimizerConfig())


def test_the_same_optimizer_twice_is_an_error():
    comparison = Comparison(Config(), ("adamw", "adamw@2e-3"))
    with pytest.raises(ValueError, match="already compared"):
        expand(comparison, Path("x"))


def test_the_table_is_sorted_by_evaluation_loss():
    good = {"eval_loss": 3.771, "ppl": 43.42, "ms_per_step": 107.5}
    better = {"eval_loss": 3.5, "ppl": 33.12, "ms_per_step": 99.96}
    failed = {"optimizer": "galore@1", "error": "step 40: ..."}
    results = [{"optimizer": "a@1", **good}, failed, {"optimizer": "b@2", **better}]
    assert table(results).splitlines() == [
        "| optimizer @ peak lr | eval loss | ppl | ms / step |",
        "|---|---|---|---|",
        "| b @ 2 | 3.500 | 33.1 | 100.0 |",
        "| a @ 1 | 3.771 | 43.4 | 107.5 |",
        "| galore @ 1 | not finite | - | - |",
    ]
