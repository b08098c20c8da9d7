"""Processes that a launcher starts: they find each other, die together, and go on."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.repository import ROOT
from tests.helpers.workshop import FLAGS, Workshop, devices_flag, last_step, workshop
from train.host.processes import ProcessConfig, join_processes
from train.records.metrics import read_metrics

STEPS, SAVE_EVERY, KILLED_AFTER = 8, 4, 5
SHORT = ("--steps", str(STEPS), "--eval-every", "0", "--log-every", "1")
SHORT += ("--refresh-every", "1")  # one program

# The wheel puts it beside Python, which may be in no activated environment.
SEARCH = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
MPIRUN = shutil.which("mpirun", path=SEARCH)
needs_mpirun = pytest.mark.skipif(MPIRUN is None, reason="no mpirun of Open MPI here")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    with workshop(tmp_path_factory.mktemp("processes")) as work:
        yield work


@pytest.fixture(scope="module")
def expected(work):
    """Of one process with four devices."""
    out = work.folder / "one"
    return losses(work.finished_in(out, *SHORT, devices=4))


def losses(out: Path) -> dict[int, list[float]]:
    records = read_metrics(out)
    return {r["step"]: [r["loss"], r.get("eval_loss", 0.0)] for r in records}


def mpirun(work: Workshop, out: Path, *flags: str) -> subprocess.Popen:
    """Two processes with two devices each; process i has left its id in `out`.i."""
    trainer = [sys.executable, "-m", "train", *FLAGS, *work.data, *SHORT, *flags]
    trainer += ["--out", str(out), "--distributed"]
    script = 'echo $$ > "$0.$OMPI_COMM_WORLD_RANK"; exec "$@"'
    command = [MPIRUN, "--oversubscribe", "-n", "2", "sh", "-c", script, str(out)]
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    env = {**os.environ, **root, "XLA_FLAGS": devices_flag(2)}
    env["PYTHONPATH"] = str(ROOT)
    log = out.with_suffix(".log").open("ab")
    return subprocess.Popen(
        [*command, *trainer], env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
    )


@pytest.mark.slow
@pytest.mark.nightly
@needs_mpirun
def test_a_job_of_mpirun_that_lost_a_process_goes_on_elsewhere(work, expected):
    out = work.fresh("job")
    job = mpirun(work, out, "--fsdp", "4")  # weights in parts on both processes
    while job.poll() is None and last_step(out) < KILLED_AFTER:
        time.sleep(0.01)
    os.kill(int(out.with_suffix(".1").read_text()), signal.SIGKILL)
    log = out.with_suffix(".log").read_text
    assert job.wait(60) not in (0, None), log()
    assert log().count("2 processes, 4 devices") == 1
    assert SAVE_EVERY < last_step(out) < STEPS, log()
    assert_alike(losses(out), expected)
    for devices in 1, 4:  # one process goes on with what two have done
        copy = work.folder / f"on{devices}"
        shutil.copytree(out, copy)
        again = (*SHORT, "--resume-or-start", "--fsdp", "1")
        work.finished_in(copy, *again, devices=devices)
        assert losses(copy).keys() == expected.keys()
        assert_alike(losses(copy), expected)


def assert_alike(found: dict, expected: dict) -> None:
    """To the rounding of sums in another order."""
    for step, values in found.items():
        np.testing.assert_allclose(values, expected[step], atol=2e-5, err_msg=str(step))


def test_processes_that_nobody_started_are_a_sentence(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="each the same --coordinator HOST:PORT") as e:
        join_processes(ProcessConfig(distributed=True))
    assert "mpi4py" not in str(e.value)
    monkeypatch.setenv("PRTE_LAUNCHED", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install mpi4py$"):
        join_processes(ProcessConfig(distributed=True))


@pytest.mark.parametrize("coordinator", ["host", "host:", ":1", "host:port"])
def test_a_coordinator_is_a_host_and_a_port(coordinator):
    with pytest.raises(ValueError, match="must be HOST:PORT"):
        ProcessConfig(distributed=True, coordinator=coordinator)


@pytest.mark.parametrize(
    ("count", "own", "message"),
    [(0, None, "above 0"), (2, 2, "below process_count=2"), (2, -1, "not negative")],
)
def test_a_process_is_one_of_them(count, own, message):
    with pytest.raises(ValueError, match=message):
        ProcessConfig(distributed=True, process_count=count, process_id=own)
