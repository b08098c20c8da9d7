"""Runs that are tracked: what wandb and trackio get, and that they get it once."""

import dataclasses
import importlib
import importlib.util
import json
import math
import sqlite3
import sys
import uuid
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from tests.helpers.wandb_files import wandb_records
from train.config.config import Config, ReportConfig
from train.host import agreement
from train.host.agreement import LostProcessError
from train.host.errors import StoppedError
from train.host.paths import to_path
from train.host.processes import PARTING_S
from train.records.metrics import MetricsWriter
from train.records.trackers import check_installed
from train.run.tracked import tracked

SECRET = "a-key-of-the-environment"


class Service:
    """Stands in for wandb and for trackio: notes what it is given, and may fail."""

    AlertLevel = SimpleNamespace(WARN="warn", ERROR="error")

    def __init__(self) -> None:
        self.begun, self.logged, self.ended = [], [], []
        self.failing = set()
        self.offline, self.starting_step = True, 0
        self.disabled, self.settings = False, SimpleNamespace(mode=None)
        self.of_the_process = {}

    def setup(self, settings):
        self.of_the_process = settings
        return self

    def Settings(self, **settings):
        return settings

    def init(self, **options):
        self._may_fail("init")
        self.begun.append(options)
        return self

    def log(self, metrics, step):
        self._may_fail("log")
        self.logged.append((step, metrics))

    def mark_preempting(self):
        self.ended.append("preempting")

    def alert(self, title, level):
        self.ended.append((title, level))

    def finish(self, exit_code=None):
        self._may_fail("finish")
        self.ended.append(exit_code)

    def _may_fail(self, what):
        if what in self.failing:
            raise RuntimeError(f"{what}:\n no network")

    @property
    def steps(self):
        return [step for step, _ in self.logged]

    @property
    def _next_step(self):  # as trackio counts
        return max(self.steps, default=-1) + 1


@pytest.fixture
def services(monkeypatch):
    monkeypatch.setenv("API_KEY", SECRET)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    pair = SimpleNamespace(wandb=Service(), trackio=Service())
    for name, service in vars(pair).items():
        monkeypatch.setitem(sys.modules, name, service)
    return pair


def config_of(folder, *names, project="lowrank_optax", **options):
    report = ReportConfig(track=names, track_project=project)
    return Config(out=folder, report=report, **options)


def write(config, start, *steps, error=None, **metrics):
    """Writes a record for each step of a run after `start`; an error may end it."""
    with (
        tracked(config) as trackers,
        MetricsWriter(config.out, start, trackers) as writer,
    ):
        for step in steps:
            writer.write({"step": step, "loss": float(step), **metrics})
        if error is not None:
            raise error


def test_both_get_the_run_s_options_and_its_metrics_in_groups(services, tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    config = config_of(folder, "wandb", "trackio", "wandb", seed=7)
    metrics = {"eval_loss": 2.5, "learning_rate": 0.1, "tokens_per_s": float("nan")}
    write(config, 0, 1, **metrics)
    expected = {"train/loss": 1.0, "eval/loss": 2.5, "optimizer/learning_rate": 0.1}
    for service in vars(services).values():
        assert service.logged == [(1, expected)]  # once, and a NaN left out
        (options,) = service.begun
        assert options["project"] == "lowrank_optax"
        assert options["resume"] == "allow"
        assert options["config"]["seed"] == 7
        assert options["config"]["model"]["size"] == "tiny"
        assert "processes" not in options["config"]
        assert SECRET not in json.dumps(options)
    ids = [json.loads((folder / f"{x}.json").read_text())["id"] for x in vars(services)]
    wandb, trackio = services.wandb.begun[0], services.trackio.begun[0]
    assert (wandb["name"], wandb["id"], wandb["dir"]) == ("a", ids[0], str(folder))
    assert wandb["settings"]["console"] == "off"
    assert trackio["name"] == f"a-{ids[1]}"
    assert (services.wandb.ended, services.trackio.ended) == ([0], [None])


def test_a_resumed_run_repeats_no_step_and_sends_what_was_missed(services, tmp_path):
    config = config_of(tmp_path, "wandb")
    write(config, 0, 1, 4, 8)
    resumed = dataclasses.replace(config, resume=True)
    write(resumed, 4, 6, 8, 12)  # killed after step 8, with a checkpoint of step 4
    assert services.wandb.steps == [1, 4, 8, 12]
    first, second = services.wandb.begun
    assert first["id"] == second["id"]
    write(dataclasses.replace(resumed, report=ReportConfig()), 12, 16)
    both = config_of(tmp_path, "wandb", "trackio", resume=True)
    write(both, 16, 20)
    assert services.wandb.steps == [1, 4, 8, 12, 16, 20]
    assert services.trackio.steps == [1, 4, 6, 8, 12, 16, 20]


def test_what_a_kill_lost_on_its_way_is_sent_again(services, tmp_path):
    config = config_of(tmp_path, "wandb", "trackio")
    write(config, 0, 1, 4, 8, 12)
    for service in vars(services).values():
        del service.logged[2:]
    services.wandb.offline, services.wandb.starting_step = False, 4 + 1
    write(dataclasses.replace(config, resume=True), 8, 12, 16)
    assert services.wandb.steps == services.trackio.steps == [1, 4, 8, 12, 16]


def test_another_history_or_project_is_another_tracked_run(services, tmp_path):
    config = config_of(tmp_path, "wandb", resume=True)
    write(config, 0, 1, 4, 8)
    write(dataclasses.replace(config, resume_from=8), 8, 12)
    assert services.wandb.steps == [1, 4, 8, 12]
    write(dataclasses.replace(config, resume_from=4), 4, 8)
    assert services.wandb.steps[4:] == [1, 4, 8]
    write(config_of(tmp_path, "wandb", project="other", resume=True), 8, 12)
    assert services.wandb.steps[7:] == [1, 4, 8, 12]
    ids = [options["id"] for options in services.wandb.begun]
    assert ids[0] == ids[1]
    assert len({*ids}) == 3


@pytest.mark.parametrize(
    ("error", "wandb", "trackio"),
    [
        (StoppedError(3, True, 15), ["preempting", 75], [("stopped", "warn"), None]),
        (StoppedError(3, False, 15), [1], [("stopped", "warn"), None]),
        (FloatingPointError(), [1], [("ended by FloatingPointError", "error"), None]),
    ],
)
def test_the_services_know_how_a_run_ended(error, wandb, trackio, services, tmp_path):
    config = config_of(tmp_path, "wandb", "trackio")
    with pytest.raises(type(error)):
        write(config, 0, 1, error=error)
    assert (services.wandb.ended, services.trackio.ended) == (wandb, trackio)


def test_a_service_that_fails_ends_no_run_and_misses_nothing(
    services, tmp_path, capsys
):
    config = config_of(tmp_path, "wandb", "trackio")
    wandb = services.wandb
    with tracked(config) as trackers, MetricsWriter(tmp_path, 0, trackers) as writer:
        wandb.failing = {"log", "finish"}
        for step in (1, 2, 3):
            writer.write({"step": step, "loss": 1.0})
        wandb.failing = {"finish"}
        writer.write({"step": 4, "loss": 1.0})
    assert wandb.steps == services.trackio.steps == [1, 2, 3, 4]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2
    assert "wandb cannot be written (RuntimeError: log: no network)" in warnings[0]
    assert "wandb did not end the tracked run" in warnings[1]


def test_a_service_that_does_not_start_ends_a_new_run_alone(services, tmp_path, capsys):
    services.trackio.failing = {"init"}
    config = config_of(tmp_path, "wandb", "trackio")
    with pytest.raises(
        OSError, match=r"--track trackio: trackio did not start .* --resume --track,"
    ):
        write(config, 0)
    assert services.wandb.ended == [1]
    (tmp_path / "wandb.json").write_text('{"project": "lowrank_optax"')
    write(dataclasses.replace(config, resume=True), 0, 1)
    told = capsys.readouterr().err
    assert "did not start" in told
    assert "wandb.json does not name a tracked run" in told
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1


def test_what_a_service_has_is_believed_before_the_run_s_file(services, tmp_path):
    config = config_of(tmp_path, "trackio", resume=True)
    write(config, 0, 1, 4, 8)
    sent = json.loads((tmp_path / "trackio.json").read_text())
    (tmp_path / "trackio.json").write_text(json.dumps(sent | {"step": 1}))
    write(config, 8, 12)
    assert services.trackio.steps == [1, 4, 8, 12]


def test_in_a_bucket_the_discarded_records_are_not_sent(services):
    folder = to_path(f"memory://{uuid.uuid4()}/run")
    config = config_of(folder, "wandb", resume=True)
    write(config, 0, 1, 4, 8)
    write(dataclasses.replace(config, resume_from=4), 4)
    assert services.wandb.steps == [1, 4, 8, 1, 4]  # the second one is a new run
    write(dataclasses.replace(config, resume_from=4), 4, 6)
    assert services.wandb.steps[5:] == [6]


def test_the_end_is_shorter_than_the_others_wait_and_a_login_ends(services, tmp_path):
    write(config_of(tmp_path, "wandb"), 0, 1)
    (options,) = services.wandb.begun
    assert 0 < options["settings"]["finish_timeout"] < PARTING_S / 2
    assert 0 < services.wandb.of_the_process["login_timeout"] < math.inf
    services.wandb.disabled = True  # as wandb does if nobody answers
    with pytest.raises(OSError, match="nobody logged in within 60 s; call `wandb log"):
        write(config_of(tmp_path / "b", "wandb"), 0, 1)
    services.wandb.settings.mode = "disabled"  # as the user said
    write(config_of(tmp_path, "wandb", resume=True), 1, 2)


def test_if_process_0_cannot_track_all_processes_end(services, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        agreement.multihost_utils, "process_allgather", lambda row: np.stack([row] * 2)
    )
    services.wandb.failing = {"init"}
    with pytest.raises(OSError, match="--track wandb: wandb did not start"):
        write(config_of(tmp_path, "wandb"), 0)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    failed = np.asarray([[2], [0]])
    monkeypatch.setattr(
        agreement.multihost_utils, "process_allgather", lambda _: failed
    )
    with pytest.raises(LostProcessError, match="process 0 had to end"):
        write(config_of(tmp_path, "wandb"), 0)


def test_one_of_several_processes_tracks(services, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    write(config_of(tmp_path, "wandb"), 0, 1)
    assert services.wandb.begun == []


def test_a_missing_package_is_an_error_that_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()  # as a run of wandb leaves it
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    importlib.invalidate_caches()
    check_installed(())
    with pytest.raises(ImportError, match=r"pip install 'lowrank-optax\[wandb\]'"):
        check_installed(("wandb",))


def needs(name):
    spec = importlib.util.find_spec(name)
    missing = spec is None or spec.origin is None
    return pytest.mark.skipif(missing, reason=f"the extra {name} is not installed")


@needs("wandb")
def test_wandb_s_files_have_the_run_offline(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    monkeypatch.setenv("API_KEY", SECRET)
    config = config_of(tmp_path, "wandb", seed=7)
    with pytest.raises(StoppedError):
        write(config, 0, 5, 10, error=StoppedError(10, True, 15))
    write(dataclasses.replace(config, resume=True), 5, 10, 15)
    wandb.teardown()
    seen, ids, statuses = [], set(), []
    for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        assert SECRET.encode() not in path.read_bytes()
        for record in wandb_records(path):
            kind = record.WhichOneof("record_type")
            assert kind != "environment"  # the command, the user, the machine
            if kind == "history":
                items = {"/".join(x.nested_key): x for x in record.history.item}
                loss = json.loads(items["train/loss"].value_json)
                seen.append((record.history.step.num, loss))
            elif kind == "run":
                ids.add(record.run.run_id)
                options = {x.key: x.value_json for x in record.run.config.update}
                assert options["seed"] == "7"
            elif kind == "exit":
                statuses.append(record.exit.exit_code)
    assert seen == [(5, 5.0), (10, 10.0), (15, 15.0)]
    assert ids == {json.loads((tmp_path / "wandb.json").read_text())["id"]}
    assert statuses == [75, 0]


@needs("trackio")
def test_trackio_s_database_has_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "database"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in [x for x in sys.modules if x.split(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)  # it reads the folder's name once
    config = config_of(tmp_path, "trackio", seed=7)
    write(config, 0, 5, 10)
    write(dataclasses.replace(config, resume=True), 5, 10, 15)
    (path,) = (tmp_path / "database").glob("*.db")
    with sqlite3.connect(path) as database:
        rows = database.execute("SELECT run_id, step, metrics FROM metrics").fetchall()
        (options,) = database.execute("SELECT config FROM configs").fetchone()
    assert [(step, json.loads(x)) for _, step, x in rows] == [
        (step, {"train/loss": step}) for step in (5.0, 10.0, 15.0)
    ]
    assert len({run for run, _, _ in rows}) == 1
    assert json.loads(options)["seed"] == 7
