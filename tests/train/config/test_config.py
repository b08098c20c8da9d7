"""The command line: help, errors, defaults by optimizer, names in a comparison."""

import dataclasses
import json
from pathlib import Path
from typing import get_args

import jax
import pytest

from models import SIZES
from train.compare import Comparison, expand, table
from train.config.command_line import parse
from train.config.config import (
    Basis,
    Config,
    OptimizerConfig,
    OptimizerName,
    Size,
    from_json,
    model_config,
    title,
    to_json,
)
from train.config.methods import BASES, METHODS
from train.config.named import named
from train.config.resolve import resolve
from train.engine.optimizer import check_meant, check_optimizer
from train.main import DESCRIPTION, main


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
    assert "(default: None; always 1: apollo_mini)" in said
    assert "40: coap, subspace_adam; " in said
    assert "100: grass_walk, grass_jump; 10: spectral_adam; " in said
    assert "always 1: ldadam, dct_adamw; " in said
    assert "; once: online_subspace_descent, foam, gwt" in said
    assert "; 1: cosmos" in said
    assert "(default: None; 0.002: adamw, grass_walk, " in said
    assert "--layerwise {auto,on,off}" in said
    assert "each layer is clipped by its own norm, and skipped by itself" in said
    assert "--weight-dtype {float32,bfloat16,int8}" in said
    assert "every update is rounded at random" in said
    for group in ("model options", "optimizer options", "data options"):
        assert group in shown
    # Every field is explained: a class docstring without one leaves a bare default.
    for config in (Config, *(f.default_factory for f in dataclasses.fields(Config))):
        if dataclasses.is_dataclass(config) and config.__module__.startswith(
            "train.config"
        ):
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
        ("--rank 1.5", "rank=1.5 is a fraction"),
        ("--rank attention", "it is no REGULAR_EXPRESSION=RANK"),
        ("--warmup 1.5", "warmup=1.5"),
        ("--warmup -1", "warmup=-1 must be a whole number of steps, or a part"),
        ("--warmup 300", "warmup and decay take 300 of steps=300"),
        ("--schedule wsd --warmup 200 --decay 101", "take 301 of steps=300"),
        ("--schedule constant --final 0.5", "final means nothing with schedule=const"),
        ("--decay 0.2", "decay means nothing with schedule=cosine"),
        ("--schedule linear", "invalid choice"),
        ("--final -1", "final=-1.0 must lie in [0, 1]"),
        ("--final 2", "final=2.0 must lie in [0, 1]"),
        ("--switch 2", "switch=2.0 must lie in [0, 1]"),
        ("--b1 1.5", "b1=1.5 must lie in [0, 1)"),
        ("--b2 1", "b2=1.0 must lie in [0, 1)"),
        ("--learning-rate nan", "learning_rate=nan must be a finite number"),
        ("--clip-norm inf", "clip_norm=inf must be a finite number"),
        ("--weight-decay -1", "weight_decay=-1.0 must not be negative"),
        ("--weight-decay nan", "weight_decay=nan must be a finite number"),
        ("--eval-every -1", "eval_every=-1 must not be negative"),
        ("--checkpoint-every -1", "checkpoint_every=-1 must not be negative"),
        ("--sample-tokens -5", "sample_tokens=-5 must not be negative"),
        ("--seed -1", "seed=-1 must lie in [0, 2**32)"),
        ("--steps 9999999999", "steps=9999999999 must be below 2**31"),
        ("--data-dir texts", "data_dir=texts is for prepared TFDS data sets"),
        ("--coordinator localhost:1", "coordinator: means nothing without"),
        ("--process-id 0 --process-count 2", "process_count, process_id: means"),
        ("--distributed --process-id 2 --process-count 2", "must be below process_c"),
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


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--angle 0.5", "grass_jump has no angle: leave out --angle"),
        ("--walk-rank 3 --basis sara", r"grass_jump\+sara has no walk_rank"),
        ("--angle 0.5 --optimizer grass_walk --basis svd", "grass_walk.* no angle"),
        ("--switch 0.3 --optimizer galore", "galore has no switch"),
        ("--scale 0.5 --optimizer frugal", "frugal has no scale"),
        ("--b2 0.9 --optimizer msgd", "msgd has no b2"),
        ("--rank 8 --optimizer adamw", "adamw has no rank"),
        ("--precision highest --optimizer adamw", "adamw has no precision"),
        ("--rank 8 --optimizer apollo_mini", "apollo_mini decides rank by itself"),
        ("--refresh-every 7 --optimizer ldadam", "decides refresh_every by itself"),
        ("--stagger --optimizer adamw", "adamw has no stagger: leave out --stagger"),
        ("--stagger --optimizer ldadam", "ldadam decides stagger by itself"),
        ("--stagger --optimizer q_galore", "lazy_refresh.. does not work with stagger"),
        ("--stagger --measure overlap", "measure_subspace.. does not work with stagg"),
        (
            "--stagger --optimizer galore --layerwise on --microbatches 2",
            "which galore does not allow: stagger=True .* take microbatches=1",
        ),
        ("--basis-dtype bfloat16", "needs a basis by name"),
        ("--rank 200", "rank 200 is above the smaller side, 128, of layers/"),
        ("--rank attn=8", r"'attn' decides for no matrix .*layers/attention/k/k"),
        ("--precision foo", "precision='foo' is none that a cpu has here; it has def"),
        ("--walk-rank 99 --optimizer grass_walk", "walk_rank=99 is above the rank 32"),
        ("--distributed", "did not find each other .* --coordinator HOST:PORT"),
        ("--init-from nowhere", "nowhere holds no run"),
    ],
)
def test_what_would_mean_nothing_or_not_fit_ends_a_run_before_it(
    argv, message, tmp_path
):
    with pytest.raises(SystemExit, match=message):
        main([*argv.split(), "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "argv",
    [
        "--angle 0.5 --basis walk",
        "--walk-rank 3 --optimizer grass_walk",
        "--switch 0.3 --optimizer golore",
        "--basis-dtype bfloat16 --basis svd",
        "--rank attention=8,mlp=0.25 --optimizer galore",
    ],
)
def test_what_means_something_is_taken(argv):
    config = config_of(*argv.split())
    check_meant(config.optimizer, [config.optimizer])
    check_optimizer(resolve(config))


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


@pytest.mark.parametrize(("size", "rank"), [("13b", 1280), ("70b", 0.25)])
def test_the_default_rank_fits_keys_of_grouped_heads(size, rank):
    config = resolve(config_of("--size", size, "--optimizer", "galore"))
    assert config.optimizer.rank == rank
    check_optimizer(config)  # allocates nothing


@pytest.mark.parametrize(
    ("name", "long", "short"),
    [
        ("galore", 200, 50),
        ("coap", 40, 40),
        ("grass_jump", 100, 50),
        ("spectral_adam", 10, 10),
        ("ldadam", 1, 1),
        ("online_subspace_descent", 2**31 - 1, 2**31 - 1),
        ("adamw", None, None),
    ],
)
def test_intervals_go_by_optimizer_and_a_short_cosine_has_six(name, long, short):
    def interval(*argv: str) -> int | None:
        return resolve(config_of("--optimizer", name, *argv)).optimizer.refresh_every

    assert interval("--steps", "1200") == long
    assert interval() == short  # of 300 steps
    for schedule in ("constant", "wsd"):  # may be given more steps
        assert interval("--schedule", schedule) == long
    if "refresh_every" in METHODS[name].reads():
        assert interval("--refresh-every", "7") == 7


def test_steps_of_a_schedule_that_can_be_extended_are_whole_numbers():
    optimizer = resolve(config_of("--schedule", "wsd", "--decay", "0.2")).optimizer
    assert (optimizer.warmup, optimizer.decay) == (30, 60)
    optimizer = resolve(config_of("--schedule", "constant", "--warmup", "7")).optimizer
    assert (optimizer.warmup, optimizer.decay) == (7, 0.1)
    assert resolve(config_of()).optimizer.warmup == 0.1


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


@pytest.mark.parametrize("names", [(), ("trackio",), ("wandb", "trackio")])
def test_trackers_are_a_list_in_json_and_on_the_command_line(names):
    config = config_of("--track", *names, "--out", "a")
    assert config.report.track == names
    assert from_json(to_json(config)) == config
    unknown = json.loads(to_json(config))
    unknown["report"]["track"].append("tracker")
    with pytest.raises(ValueError, match="report has track="):
        from_json(json.dumps(unknown))


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


def comparison_of(*argv: str) -> Comparison:
    return parse(Comparison, "", argv, "python -m train.compare")


@pytest.mark.parametrize(
    "argv",
    [
        *("--optimizer adamw", "--basis sara", "--resume", "--checkpoint-every 5"),
        *("--keep 3", "--prompt The", "--sample-tokens 9"),
    ],
)
def test_a_comparison_has_no_flag_that_would_mean_nothing(argv, capsys):
    with pytest.raises(SystemExit):
        comparison_of(*argv.split())
    assert f"Unrecognized options: {argv.split()[0]}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        comparison_of("--help")
    assert f"{argv.split()[0]} " not in capsys.readouterr().out


def test_an_option_is_for_those_compared_that_have_it():
    argv = ("--scale", "0.5", "--b2", "0.9", "--basis-dtype", "bfloat16")
    names = ("adamw", "galore+svd", "frugal", "msgd")
    configs = expand(comparison_of("--optimizers", *names, *argv), Path("x"))
    options = [(c.optimizer.scale, c.optimizer.b2) for c in configs]
    assert options == [(None, 0.9), (0.5, 0.9), (None, 0.9), (0.5, None)]
    dtypes = [c.optimizer.basis_dtype for c in configs]
    assert dtypes == ["float32", "bfloat16", "float32", "float32"]
    for config in configs:
        check_optimizer(config)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--optimizers adamw --rank 8", "adamw has no rank"),
        ("--optimizers adamw galore --angle 0.5", "adamw, galore has no angle"),
        ("--optimizers galore --basis-dtype bfloat16", "needs a basis by name"),
        ("--optimizers", "optimizers: name at least one"),
        ("--optimizers adamw@fast", "the rate 'fast' is no number"),
        ("--optimizers adamw@nan", "learning_rate=nan must be a finite number"),
    ],
)
def test_an_option_that_none_has_is_an_error(argv, message, capsys):
    with pytest.raises(SystemExit):
        comparison_of(*argv.split())
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


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
