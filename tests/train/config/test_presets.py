"""The published settings, by name."""

import json
from pathlib import Path

import numpy as np
import pytest

from models import SIZES
from train.config.command_line import parse
from train.config.config import Config, OptimizerConfig, to_json
from train.config.methods import METHODS
from train.config.presets import PRESETS, with_flags
from train.engine.schedule import make_schedule
from train.run.folder import check_same_run


def parsed(*argv: str) -> Config:
    return parse(Config, "", list(argv), "train")


FINE_TUNING = ("galore-fine-tuning", "galore-instructions", "apollo-instructions")


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in FINE_TUNING])
def test_each_is_a_run(name: str) -> None:
    config = parsed("--preset", name)
    assert config.preset == name
    assert config.model.size == name.rpartition("-")[2]
    ours = name.startswith("spectral-adam")
    assert config.batch_size == (128 if ours else 512)
    assert METHODS[config.optimizer.name].low_rank is not name.startswith("adamw")
    # All warm up over a whole number of steps, and no rank exceeds a matrix' side.
    warmup = config.optimizer.warmup * config.steps
    assert warmup == pytest.approx(round(warmup), abs=1e-6)
    if config.optimizer.rank is not None:
        assert isinstance(config.optimizer.rank, int)
        assert config.optimizer.rank < SIZES[config.model.size].hidden_size


def test_they_are_what_the_papers_have() -> None:
    galore = parsed("--preset", "galore-7b").optimizer
    assert (galore.rank, galore.refresh_every) == (1024, 500)
    assert (galore.learning_rate, galore.clip_norm) == (5e-3, 1.0)
    sara = parsed("--preset", "galore-sara-130m")
    assert sara.seq_len == 512
    assert (sara.optimizer.basis, sara.optimizer.rank) == ("sara", 256)
    assert sara.steps * 512 * 512 == pytest.approx(2.2e9, rel=1e-4)  # Table 1's tokens
    assert parsed("--preset", "apollo-130m").optimizer.rank == 192
    assert parsed("--preset", "fira-1b").optimizer.scale == 0.0625
    assert parsed("--preset", "adamw-60m").optimizer.learning_rate == 2.5e-3


@pytest.mark.parametrize("name", FINE_TUNING)
def test_those_of_fine_tuning_leave_size_and_steps_to_the_run(name: str) -> None:
    config = parsed("--preset", name, "--init-from", "hf:folder", "--steps", "6900")
    assert (config.model, config.steps) == (Config().model, 6900)
    assert not {"size", "steps"} & PRESETS[name].keys()
    assert config.optimizer.final == 0


def test_the_rate_of_galore_fine_tuning_falls_in_a_straight_line() -> None:
    for steps in (300, 6900):  # the trainer's default; MRPC's 30 epochs
        config = parsed("--preset", "galore-fine-tuning", "--steps", str(steps))
        schedule = make_schedule(config.optimizer, config.steps)
        rates = np.array([schedule(i) for i in np.linspace(0, steps - 1, 7).round()])
        line = 3e-5 * np.linspace(1, 0, 7)
        # The last of `steps` rates is 0, and the first the peak: a thousandth apart.
        np.testing.assert_allclose(rates, line, atol=0.004 * 3e-5)


def test_other_flags_override_it_wherever_they_stand() -> None:
    for argv in (
        ("--preset", "galore-60m", "--rank", "64", "--steps", "9"),
        ("--rank", "64", "--steps", "9", "--preset=galore-60m"),
    ):
        config = parsed(*argv)
        assert (config.optimizer.rank, config.steps) == (64, 9)
        assert config.optimizer.scale == 0.25


def test_one_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--preset", "galore-61m")
    assert "galore-60m" in capsys.readouterr().err


def test_a_run_goes_on_by_the_flags_that_a_preset_stands_for() -> None:
    named = parsed("--preset", "galore-60m")
    spelled = with_flags(Config(), PRESETS["galore-60m"])
    stored, given = (json.loads(to_json(c)) for c in (named, spelled))
    check_same_run(stored, given, Path("config.json"))


def test_flags_that_no_run_has_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no run has the options \['rang'\]"):
        with_flags(Config(), {"rang": 3, "rank": 4})
    assert with_flags(Config(), {"rank": 4}).optimizer == OptimizerConfig(rank=4)
