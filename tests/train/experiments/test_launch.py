"""Commands side by side."""

import sys
import time
from pathlib import Path

import pytest

from train.experiments import launch
from train.experiments.launch import Command, run_all, slots


def command(folder: Path, name: str, code: str) -> Command:
    return Command(name, [sys.executable, "-c", code], folder / f"{name}.txt")


def test_each_has_a_place_and_a_log(tmp_path: Path) -> None:
    code = "import os, time; print(os.environ['PLACE']); time.sleep(0.2)"
    commands = [command(tmp_path, str(i), code) for i in range(4)]
    places = [{"PLACE": "a"}, {"PLACE": "b"}]
    ended = list(run_all(commands, places))
    assert sorted(e.name for e in ended) == ["0", "1", "2", "3"]
    assert {e.status for e in ended} == {0}
    logs = [(tmp_path / f"{i}.txt").read_text().strip() for i in range(4)]
    assert set(logs) == {"a", "b"}


def test_one_that_fails_ends_no_other(tmp_path: Path) -> None:
    commands = [
        command(tmp_path, "bad", "raise SystemExit('error: no')"),
        command(tmp_path, "good", "print(1)"),
    ]
    ended = {e.name: e.status for e in run_all(commands, [{}])}
    assert ended == {"bad": 1, "good": 0}
    assert (tmp_path / "bad.txt").read_text() == "error: no\n"


def test_those_that_run_are_told_to_end_and_waited_for(tmp_path: Path) -> None:
    says_when = (
        "import pathlib, signal, sys, time\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "def end(*_):\n"
        "    (folder / 'ended').touch(); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "(folder / 'begun').touch()\n"
        "time.sleep(60)\n"
    )
    commands = [
        command(tmp_path, "quick", "print(1)"),
        command(tmp_path, "slow", says_when),
        command(tmp_path, "never", f"open({str(tmp_path / 'never')!r}, 'w')"),
    ]
    running = run_all(commands, [{}])
    assert next(running).name == "quick"
    while not (tmp_path / "begun").exists():
        time.sleep(0.05)
    start = time.monotonic()
    running.close()
    assert (tmp_path / "ended").exists()
    assert not (tmp_path / "never").exists()
    assert time.monotonic() - start < 30


def test_places_share_a_gpus_memory_or_a_cpus_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a machine with GPUs answers, which there is none of here."""
    monkeypatch.setattr(launch, "_ASK", "print('gpu', 2)")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [p["CUDA_VISIBLE_DEVICES"] for p in slots(1)] == ["0", "1"]
    places = slots(2)
    assert [p["CUDA_VISIBLE_DEVICES"] for p in places] == ["0", "1", "0", "1"]
    assert {p["XLA_PYTHON_CLIENT_MEM_FRACTION"] for p in places} == {"0.450"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [p["CUDA_VISIBLE_DEVICES"] for p in slots(1)] == ["3", "5"]
    monkeypatch.setattr(launch, "_ASK", "print('cpu', 1)")
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    monkeypatch.delenv("NPROC", raising=False)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    assert slots(1) == [{}]
    assert slots(4) == [{"NPROC": "1", "OPENBLAS_NUM_THREADS": "1"}] * 4
    assert [p["NPROC"] for p in slots(2)] == ["3", "3"]
    monkeypatch.setattr(launch, "_ASK", "raise RuntimeError('none found')")
    with pytest.raises(OSError, match="JAX finds no device: RuntimeError: none found"):
        slots(1)


def test_a_command_is_out_of_reach_of_the_terminals_ctrl_c(tmp_path: Path) -> None:
    code = "import os; print(os.getsid(0) == os.getpid())"
    list(run_all([command(tmp_path, "own", code)], [{}]))
    assert (tmp_path / "own.txt").read_text() == "True\n"
