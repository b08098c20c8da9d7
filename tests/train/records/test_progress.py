"""What a run shows: lines off a terminal, on one a bar with the devices' own rate."""

import io
import re
import sys
import time

import jax.numpy as jnp
import pytest

from train.records.progress import Progress

RECORD = {
    "step": 20,
    "loss": 4.56789,
    "learning_rate": 1.25e-3,
    "tokens_per_s": 12345.6,
    "skipped": 0,
}


class Stream(io.StringIO):
    """A terminal, or none."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.fixture
def streams(monkeypatch):
    def make(out: bool, error: bool) -> tuple[Stream, Stream]:
        made = Stream(out), Stream(error)
        monkeypatch.setattr(sys, "stdout", made[0])
        monkeypatch.setattr(sys, "stderr", made[1])
        return made

    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "40")
    return make


@pytest.mark.parametrize(("out", "error"), [(False, False), (True, False)])
def test_off_a_terminal_each_record_is_a_line_and_there_is_no_bar(streams, out, error):
    out, error = streams(out, error)
    with Progress("adamw@0.1", 0, 300) as progress:
        progress.step({"loss": jnp.float32(1)})
        progress.record(RECORD)
        assert out.getvalue() == (  # at once, not at the end
            "adamw@0.1: step 20/300, loss 4.5679, learning rate 0.00125, "
            "12346 tokens/s\n"
        )
        progress.record({**RECORD, "eval_loss": 4.5, "skipped": 3})
    assert out.getvalue().endswith("tokens/s, held-out loss 4.5000, 3 skipped\n")
    assert error.getvalue() == ""


def test_on_a_terminal_a_bar_names_the_optimizer_and_the_losses(streams):
    out, error = streams(True, True)
    with Progress("adamw@0.1", 10, 13) as progress:
        for _ in range(3):
            progress.step({"loss": jnp.float32(1)})
        progress.record({**RECORD, "eval_loss": 4.5})
    assert out.getvalue() == ""
    last = error.getvalue().split("\r")[-1]
    assert last.startswith("adamw@0.1: 100%")
    assert "13/13" in last
    assert "held-out=4.500" in last
    assert "loss=4.568" in last


def test_an_output_that_is_a_file_has_lines_beside_the_bar(streams):
    out, error = streams(False, True)
    with Progress("x", 0, 2) as progress:
        progress.record(RECORD)
    assert out.getvalue().startswith("x: step 20/2, ")
    assert "0/2" in error.getvalue()


def test_other_processes_show_nothing(streams, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    for terminal in (False, True):
        out, error = streams(terminal, terminal)
        with Progress("x", 0, 2) as progress:
            progress.step({"loss": jnp.float32(1)})
            progress.record(RECORD)
        assert out.getvalue() == error.getvalue() == ""


class Slow:
    """A loss that is there after some seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def block_until_ready(self) -> None:
        time.sleep(self._seconds)


def test_the_rate_is_that_of_done_steps_since_the_first(streams):
    """The host hands out all steps at once; the first takes long, as it does."""
    _, error = streams(True, True)
    with Progress("x", 5, 10) as progress:
        for seconds in (1.0, 0.2, 0.2, 0.2, 0.2):
            progress.step({"loss": Slow(seconds)})
        assert "6/10" not in error.getvalue()
    rates = re.findall(r"(\d+)/10 \[[^,]*, +([\d.]+)step/s", error.getvalue())
    assert {step for step, _ in rates} >= {"7", "10"}  # tqdm may leave one out
    # Five steps a second, less what this machine adds; with the first it were 2.8.
    assert all(3.0 < float(rate) <= 5.0 for _, rate in rates)


def test_an_error_in_the_loop_does_not_wait_for_the_steps_handed_out(streams):
    streams(True, True)
    start = time.perf_counter()

    def loop() -> None:
        with Progress("x", 0, 9) as progress:
            for _ in range(9):
                progress.step({"loss": Slow(0.3)})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop()
    assert time.perf_counter() - start < 1.5
