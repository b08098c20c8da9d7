"""The flags of a run that goes on: config.json has those that are not given."""

import dataclasses
import json
from pathlib import Path

import pytest

from tests.helpers.checkpoints import config_of, store
from train.config.config import Config, to_json
from train.config.resolve import resolve
from train.main import main
from train.run.flags import parse_run
from train.run.folder import check_folder

BEGUN = (
    *("--optimizer", "galore", "--rank", "8", "--steps", "40", "--vocab-size", "300"),
    *("--seq-len", "64", "--warmup", "0.2", "--log-every", "3", "--clip-norm", "None"),
)


def resumed(folder: Path, *argv: str) -> Config:
    config = parse_run("", ["--out", str(folder), *argv], "python -m train")
    return resolve(dataclasses.replace(config, resume=True))


@pytest.mark.parametrize("flag", ["--resume", "--resume-or-start", "--resume_from=3"])
def test_a_run_goes_on_with_its_own_flags(flag, tmp_path):
    begun = config_of(tmp_path, *BEGUN)
    store(begun)
    again = resumed(tmp_path, flag)
    check_folder(again)
    assert again.resume_from == (3 if "from" in flag else None)
    begun, again = (
        dataclasses.replace(c, resume=False, resume_or_start=False, resume_from=None)
        for c in (begun, again)
    )
    assert again == begun


def test_what_is_given_must_agree_or_be_free(tmp_path):
    store(config_of(tmp_path, *BEGUN))
    check_folder(resumed(tmp_path, "--resume", *BEGUN))  # the same command
    free = resumed(tmp_path, "--resume", "--log-every", "7", "--fsdp", "2")
    assert (free.report.log_every, free.mesh.fsdp, free.optimizer.rank) == (7, 2, 8)
    check_folder(free)
    other = resumed(tmp_path, "--resume", "--vocab-size", "400", "--b1", "0.8")
    with pytest.raises(ValueError, match="other flags; leave these out") as raised:
        check_folder(other)
    assert str(raised.value).splitlines()[1:] == [
        "  --vocab-size: 300 there, 400 here",
        "  --b1: 0.9 there, 0.8 here",
    ]


def test_a_folder_that_has_moved_and_the_default_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store(config_of(Path("runs/tiny-fira"), "--optimizer", "fira", "--rank", "5"))
    by_default = parse_run("", ["--optimizer", "fira", "--resume"], "train")
    assert by_default.optimizer.rank == 5
    Path("runs").rename("old")
    moved = parse_run("", ["--out", "old/tiny-fira", "--resume"], "train")
    assert (moved.out, moved.optimizer.rank) == (Path("old/tiny-fira"), 5)
    assert parse_run("", ["--out", "none", "--resume"], "train").optimizer.rank is None


def test_flags_beside_a_preset_stay_when_the_run_goes_on(tmp_path):
    preset = ("--preset", "galore-60m")
    store(config_of(tmp_path, *preset, "--rank", "64"))
    for again in ((), preset):
        config = resumed(tmp_path, "--resume", *again)
        assert config.optimizer.rank == 64
        check_folder(config)
    other = resumed(tmp_path, "--resume", "--preset", "galore-130m")
    with pytest.raises(ValueError, match="--size: 60m there, 130m here"):
        check_folder(other)


def test_processes_are_of_the_command_not_of_the_run(tmp_path):
    config = config_of(tmp_path)
    stored = json.loads(to_json(config))
    stored["processes"] |= {"distributed": True, "process_count": 2, "process_id": 0}
    stored["processes"]["coordinator"] = "localhost:1"
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert resumed(tmp_path, "--resume").processes == config.processes


NOT_CONFIGS = {
    "[]": r"it is \[\], not the object",
    "null": "it is None, not the object",
    "3": "it is 3, not the object",
    "{}": "it lacks model, which all runs have",
    "[" * 100_000: "nested too deeply",
    '{"architectures": ["LlamaForCausalLM"], "vocab_size": 9}': (
        "no run has architectures, vocab_size; give the folder of a run"
    ),
}


@pytest.mark.parametrize("text", NOT_CONFIGS, ids=range(len(NOT_CONFIGS)))
@pytest.mark.parametrize("command", ["resume", "init", "sample", "spectrum", "compare"])
def test_json_of_another_shape_is_an_error_in_all_commands(text, command, tmp_path):
    import train.compare
    import train.sample
    import train.spectrum

    (tmp_path / "config.json").write_text(text)
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    run, new = str(tmp_path), str(tmp_path / "new")
    commands = {
        "resume": (main, ["--out", run, "--resume"]),
        "init": (main, ["--out", new, "--init-from", run]),
        "sample": (train.sample.main, [run]),
        "spectrum": (train.spectrum.main, [run, run]),
        "compare": (train.compare.main, ["--out", new, "--init-from", run]),
    }
    run_command, argv = commands[command]
    with pytest.raises(SystemExit, match=NOT_CONFIGS[text]):
        run_command(argv)


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("model", None, None),
        ("optimizer", None, []),
        ("optimizer", "name", "adam"),
        ("optimizer", "name", []),
        ("optimizer", "rank", {}),
        ("model", "size", ["tiny"]),
        ("report", "log_every", "3"),
        ("data", "source", 3),
        (None, "steps", None),
        (None, "out", 3),
        (None, "resume", "yes"),
    ],
)
def test_a_field_of_another_kind_is_an_error(part, field, value, tmp_path):
    stored = json.loads(to_json(config_of(tmp_path)))
    if field is None:
        stored[part] = value
    else:
        (stored if part is None else stored[part])[field] = value
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"config.json cannot be read: ") as raised:
        parse_run("", ["--out", str(tmp_path), "--resume"], "train")
    assert str(field or part) in str(raised.value)
