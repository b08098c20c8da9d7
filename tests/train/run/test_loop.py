"""Whole runs in one process: what they leave behind, comparisons, NaN losses."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train.compare
import train.engine.step
import train.main
import train.records.plots
import train.run.report
from tests.helpers.marks import NIGHTLY
from tests.helpers.pictures import is_picture
from tests.helpers.run_files import strict_lines
from train.config.config import Config
from train.engine.mesh import make_mesh
from train.host.errors import STOPPED
from train.main import main
from train.records.metrics import read_metrics
from train.run.checkpoint import stored_checksums
from train.run.loop import evaluate


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """One of the eight virtual devices: they share two cores, and all would refresh."""
    mesh = make_mesh(Config(), jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        for module in (train.main, train.compare):
            patch.setattr(module, "make_mesh", lambda config: mesh)
        yield


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("aeioubcdfg"), 5)) for _ in range(50)]
    texts = [" ".join(rng.choice(words, 120)) for _ in range(40)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "text.jsonl").write_text("".join(lines))
    return [
        *("--source", str(folder / "text.jsonl"), "--cache-dir", str(folder / "cache")),
        *("--vocab-size", "300", "--batch-size", "8", "--seq-len", "16"),
        *("--steps", "12", "--log-every", "4", "--eval-every", "6", "--warmup", "0.25"),
    ]


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory) -> Path:
    """The folder of a short run with AdamW."""
    folder = tmp_path_factory.mktemp("run")
    argv = ("--optimizer", "adamw", "--checkpoint-every", "6", "--sample-tokens", "5")
    main([*flags, *argv, "--out", str(folder), "--prompt", "bade"])
    return folder


def test_a_run_leaves_its_files(finished):
    assert {path.name for path in finished.iterdir()} == {
        *("config.json", "metrics.jsonl", "tensorboard", "checkpoints"),
        *("data.json", "tokenizer.json", "lock"),
        *("loss.png", "memory.txt", "sample.txt", "summary.json"),
    }
    assert is_picture(finished / "loss.png")
    assert (finished / "sample.txt").read_text().startswith("bade")
    assert "layers/mlp/up/kernel" in (finished / "memory.txt").read_text()
    (events,) = (finished / "tensorboard").iterdir()
    for tag in (b"train/loss", b"eval/loss", b"time/tokens_per_s"):
        assert tag in events.read_bytes()


def test_metrics_are_a_line_for_each_logged_step(finished):
    lines = strict_lines(finished / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 4, 6, 8, 12]
    assert [line["step"] for line in lines if "eval_loss" in line] == [6, 12]
    for line in lines:
        assert {*line} >= {
            *("loss", "grad_norm", "learning_rate", "refreshes"),
            *("skipped", "skipped_in_a_row", "ms_per_step", "tokens_per_s"),
        }
    assert lines[0]["ms_per_step"] is lines[0]["tokens_per_s"] is None
    for line in lines[1:]:
        seconds = line["ms_per_step"] / 1e3
        assert line["tokens_per_s"] == pytest.approx(8 * 16 / seconds)
    # Uniform guesses among 300 tokens cost log 300 = 5.7 nats.
    assert lines[0]["loss"] == pytest.approx(np.log(300), abs=0.3)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.2
    assert lines[0]["learning_rate"] == pytest.approx(2e-3 / 3)
    assert lines[-1]["learning_rate"] == pytest.approx(2e-4)
    assert {line["skipped"] for line in lines} == {0}


def test_summary_agrees_with_the_metrics(finished):
    summary = json.loads((finished / "summary.json").read_text())
    last = read_metrics(finished)[-1]
    assert summary["optimizer"] == "adamw"
    assert (summary["train_loss"], summary["eval_loss"]) == (
        last["loss"],
        last["eval_loss"],
    )
    assert summary["ppl"] == pytest.approx(np.exp(last["eval_loss"]))
    # AdamW's two moments, and three counts, its own, the schedule's and the guard's, of
    # each of four layers and of the rest; optax's AdamW has one.
    assert summary["state_bytes"] - summary["adamw_bytes"] == 4 * (3 * 5 - 1)
    assert summary["wall_s"] > summary["train_s"] + summary["compile_s"]
    times = [r["ms_per_step"] for r in read_metrics(finished)]
    expected = (3 * times[1] + 2 * times[2] + 2 * times[3] + 4 * times[4]) / 11
    assert summary["ms_per_step"] == pytest.approx(expected)
    assert summary["train_s"] == pytest.approx(12 * expected / 1e3)


def test_the_folder_is_the_run_s_own(finished, flags, capsys):
    again = [*flags, "--optimizer", "adamw", "--out", str(finished)]
    for argv, message in (
        (again, "holds a run already"),
        ([*again, "--resume", "--steps", "13"], "steps: 12 there, 13 here"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(argv)


def test_resuming_a_finished_run_only_reports_again(finished, flags):
    before = (finished / "metrics.jsonl").read_text()
    sample = (finished / "sample.txt").read_text()
    (finished / "sample.txt").unlink()
    argv = ("--optimizer", "adamw", "--sample-tokens", "5", "--prompt", "bade")
    main([*flags, *argv, "--out", str(finished), "--resume"])
    assert (finished / "metrics.jsonl").read_text() == before
    assert (finished / "sample.txt").read_text() == sample


def test_resuming_before_the_first_checkpoint_starts_over(finished, flags, tmp_path):
    for name in ("config.json", "data.json"):
        (tmp_path / name).write_text((finished / name).read_text())
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n{"step": 4, "lo')
    argv = ("--optimizer", "adamw", "--sample-tokens", "0", "--checkpoint-every", "0")
    main([*flags, *argv, "--out", str(tmp_path), "--resume"])
    losses = [[r["loss"] for r in read_metrics(f)] for f in (finished, tmp_path)]
    assert losses[0] == losses[1]


def test_a_stop_between_two_records_changes_no_record(
    finished, flags, tmp_path, monkeypatch, capsys
):
    """The loss of step 5, before the stop, is in the mean of step 6's record."""
    argv = [*flags, "--optimizer", "adamw", "--sample-tokens", "0", "--out"]
    argv += [str(tmp_path / "run"), "--checkpoint-every"]
    with monkeypatch.context() as patch:
        patch.setattr(train.run.loop.Stop, "reached", lambda _, step: step == 5)
        with pytest.raises(SystemExit) as stopped:
            main([*argv, "6"])
    assert stopped.value.code == STOPPED == 75
    assert "stopped after 5 steps; a checkpoint has them" in capsys.readouterr().err
    assert [r["step"] for r in read_metrics(tmp_path / "run")] == [1, 4]
    main([*argv, "6", "--resume"])
    times = {"ms_per_step", "tokens_per_s"}
    whole, resumed = (
        [{k: v for k, v in r.items() if k not in times} for r in read_metrics(folder)]
        for folder in (finished, tmp_path / "run")
    )
    assert resumed == whole


def test_a_stop_without_checkpoints_says_that_the_steps_are_lost(
    flags, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(train.run.loop.Stop, "reached", lambda _, step: step == 2)
    argv = ("--optimizer", "adamw", "--checkpoint-every", "0", "--out", str(tmp_path))
    with pytest.raises(SystemExit) as stopped:
        main([*flags, *argv])
    assert stopped.value.code == 143
    assert "stopped after 2 steps; they are lost" in capsys.readouterr().err


@pytest.mark.slow
def test_a_comparison_gives_each_optimizer_the_same_work(finished, flags, tmp_path):
    argv = ("--optimizers", "adamw", "grass_jump+sara@5e-3", "--rank", "4")
    train.compare.main([*flags, *argv, "--out", str(tmp_path)])
    adamw, grass = strict_lines(tmp_path / "results.jsonl")
    assert (adamw["optimizer"], grass["optimizer"]) == (
        "adamw@0.002",
        "grass_jump+sara@0.005",
    )
    fields = {"optimizer", "steps", "eval_loss", "ppl", "wall_s", "ms_per_step"}
    assert {*adamw} == {*grass} == fields | {"peak_gib", "state_bytes", "curve"}
    assert grass["state_bytes"] < adamw["state_bytes"]
    # The same run as the trainer's own, but for the checkpoints.
    alone = read_metrics(finished)
    assert adamw["curve"] == [[r["step"], round(r["loss"], 4)] for r in alone]
    assert adamw["eval_loss"] == round(alone[-1]["eval_loss"], 4)
    # The same weights and batch at the start, other steps after it.
    assert adamw["curve"][0] == grass["curve"][0]
    assert adamw["curve"][1] != grass["curve"][1]
    assert is_picture(tmp_path / "losses.png")
    assert (tmp_path / "table.md").read_text() == train.compare.table(
        [adamw, grass]
    ) + "\n"


def test_a_loss_that_stays_nan_stops_the_run(flags, tmp_path, monkeypatch):
    loss_sums = train.engine.step.loss_sums

    def poisoned(work, params, batch):
        loss, weight = loss_sums(work, params, batch)
        return loss * jnp.log(-params["norm"]["scale"][0]), weight

    monkeypatch.setattr(train.engine.step, "loss_sums", poisoned)
    argv = ("--optimizer", "adamw", "--max-skipped", "3", "--log-every", "2")
    with pytest.raises(SystemExit, match=r"error: step 4: 4 steps in a row"):
        main([*flags, *argv, "--out", str(tmp_path)])
    lines = strict_lines(tmp_path / "metrics.jsonl")
    assert [line["loss"] for line in lines] == [None] * 3
    assert [line["skipped"] for line in lines] == [1, 2, 4]
    assert [line["skipped_in_a_row"] for line in lines] == [1, 2, 4]


def test_a_run_that_is_given_up_is_a_line_of_the_comparison(
    flags, tmp_path, monkeypatch
):
    def give_up(*args):
        raise FloatingPointError("20 steps in a row")

    monkeypatch.setattr(train.compare, "train", give_up)
    argv = ("--optimizers", "adamw", "grass_jump", "--out", str(tmp_path))
    train.compare.main([*flags, *argv])
    results = strict_lines(tmp_path / "results.jsonl")
    assert [r["optimizer"] for r in results] == ["adamw@0.002", "grass_jump@0.002"]
    assert [r["error"] for r in results] == ["20 steps in a row"] * 2
    assert (
        "| adamw @ 0.002 | not finite | - | - |" in (tmp_path / "table.md").read_text()
    )


def test_a_comparison_that_is_stopped_keeps_what_is_done(
    finished, flags, tmp_path, monkeypatch, capsys
):
    done = {"optimizer": "adamw@0.002", "eval_loss": 4.0, "ppl": 55.0}

    def run(config, data, mesh):
        if config.optimizer.name == "galore":
            raise KeyboardInterrupt
        (config.out / "metrics.jsonl").write_text('{"step": 1, "loss": 4.0}\n')
        return {**done, "ms_per_step": 1.0}

    monkeypatch.setattr(train.compare, "run", run)
    argv = ("--optimizers", "adamw", "galore", "fira", "--out", str(tmp_path))
    with pytest.raises(SystemExit) as stopped:
        train.compare.main([*flags, *argv])
    assert stopped.value.code == 130
    assert "stopped: 1 of 3 optimizers are done, and in " in capsys.readouterr().err
    assert (
        "| adamw @ 0.002 | 4.000 | 55.0 | 1.0 |" in (tmp_path / "table.md").read_text()
    )
    assert len(strict_lines(tmp_path / "results.jsonl")) == 1
    assert is_picture(tmp_path / "losses.png")


def test_a_prompt_without_tokens_is_an_error_before_the_training(flags, tmp_path):
    argv = ("--out", str(tmp_path / "run"), "--prompt", "")
    with pytest.raises(SystemExit, match="prompt='' has no token to begin with"):
        main([*flags, *argv])
    assert not (tmp_path / "run").exists()


def test_a_sample_that_fails_leaves_all_the_rest(
    finished, flags, tmp_path, monkeypatch, capsys
):
    def fail(*args, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GiB")

    monkeypatch.setattr(train.run.report, "continued", fail)
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for name in ("summary.json", "memory.txt", "loss.png", "sample.txt"):
        (folder / name).unlink()
    again = [*flags, "--optimizer", "adamw", "--resume", "--out", str(folder)]
    main(again)
    shown = capsys.readouterr().out
    assert "no text sample: JaxRuntimeError: RESOURCE_EXHAUSTED: 9 GiB" in shown
    assert "adamw: 12 steps, held-out loss" in shown
    assert not (folder / "sample.txt").exists()
    assert is_picture(folder / "loss.png")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 12
    assert (folder / "memory.txt").stat().st_size > 0
    main([*again, "--sample-tokens", "0"])
    assert "none was asked for (--sample-tokens 0)" in capsys.readouterr().out


GRASS_JUMP = ("--optimizer", "grass_jump", "--rank", "4", "--refresh-every", "3")


@pytest.mark.parametrize(
    ("schedule", "optimizer", "resumed"),
    [
        pytest.param(("--warmup", "0", "--final", "1"), GRASS_JUMP, (), marks=NIGHTLY),
        pytest.param(
            ("--schedule", "constant", "--warmup", "1"),
            GRASS_JUMP,
            (),
            marks=NIGHTLY,
        ),
        (
            ("--schedule", "wsd", "--warmup", "1", "--decay", "2", "--keep", "1"),
            ("--optimizer", "adamw"),
            ("--resume-from", "2"),
        ),
    ],
    ids=["no decay", "constant", "wsd"],
)
def test_a_longer_run_takes_the_steps_it_would_have_taken(
    schedule, optimizer, resumed, flags, tmp_path, capsys
):
    argv = (*flags, *schedule, *optimizer)
    argv += ("--sample-tokens", "0", "--eval-every", "4", "--checkpoint-every", "4")
    whole, grown = (tmp_path / name for name in ("whole", "grown"))
    main([*argv, "--out", str(whole), "--steps", "8"])
    main([*argv, "--out", str(grown), "--steps", "4"])
    longer = ["--out", str(grown), "--steps", "8", "--resume"]
    if resumed:
        with pytest.raises(SystemExit, match=r"step 4 .* --resume-from 2"):
            main(longer)
    main([*longer, *resumed])  # config.json has all other flags
    losses = [
        [(r["step"], r["loss"], r.get("eval_loss")) for r in read_metrics(folder)]
        for folder in (whole, grown)
    ]
    # Of wsd, the checkpoint before its decay ends a record.
    assert losses[0][-1 if resumed else 0 :] == losses[1][-1 if resumed else 0 :]
    ends = [stored_checksums(x / "checkpoints" / "8") for x in (whole, grown)]
    assert ends[0] == ends[1]  # every bit of weights and optimizer


def test_a_run_begins_where_another_ended(finished, flags, tmp_path, capsys):
    argv = ("--init-from", str(finished), "--steps", "2", "--checkpoint-every", "0")
    argv += ("--learning-rate", "1e-9", "--optimizer", "adamw", "--sample-tokens", "0")
    main([*flags, *argv, "--out", str(tmp_path)])
    first, last = read_metrics(tmp_path)
    before = read_metrics(finished)[-1]
    # Nothing is learnt at this rate, so the held-out loss is that of the other's end.
    assert last["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-6)
    assert first["learning_rate"] < 2e-9
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["init_from"] == f"{finished}@12"
    kept = [(folder / "tokenizer.json").read_bytes() for folder in (finished, tmp_path)]
    assert kept[0] == kept[1]
    shown = capsys.readouterr().out
    assert "adamw@1e-09: compiling the training step of LLaMA-tiny, 8 x 16" in shown
    assert "adamw@1e-09: step 2/2, loss " in shown


def test_an_evaluation_has_one_program_at_a_time():
    """Of several that exchange sums a CPU's devices may each wait for another."""
    waited_for = []

    class Sum(float):
        def block_until_ready(self):
            waited_for.append(self)
            return self

    class Fake:
        def put(self, batch):
            return batch

        def loss_sums(self, params, batch):
            # A loss and a weight of every batch before this one.
            assert len(waited_for) == 2 * batch
            return Sum(batch), Sum(1)

    assert evaluate(Fake(), None, range(4)) == {"eval_loss": 1.5, "eval_batches": 4}
