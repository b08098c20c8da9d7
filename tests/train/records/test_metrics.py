"""Metrics on their way to a file: one record late, and cut off where a run resumes."""

import math

import jax.numpy as jnp
import pytest

from tests.helpers.run_files import strict_lines
from train.records import metrics as module
from train.records.metrics import Meter, MetricsWriter, mean_ms, read_metrics


def test_a_writer_cuts_off_what_the_resumed_run_will_write_again(tmp_path):
    with MetricsWriter(tmp_path, 0) as writer:
        for step in (1, 2, 3):
            writer.write({"step": step, "loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "los')  # killed while it wrote
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3]
    with MetricsWriter(tmp_path, 2) as writer:
        writer.write({"step": 3, "loss": float("inf")})
    assert strict_lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 2.0},
        {"step": 3, "loss": None},
    ]


def test_the_meter_is_one_record_late_and_averages_the_loss():
    meter = Meter(step=10, tokens_per_step=100)
    for step in (11, 12, 13, 14):
        metrics = {"loss": jnp.float32(step), "skipped": jnp.int32(0)}
        meter.add(metrics)
        if step == 11:
            assert meter.log(step, metrics) is None
    record = meter.log(14, metrics)
    assert record is not None
    assert (record["step"], record["loss"]) == (11, 11.0)
    assert math.isnan(record["ms_per_step"])  # its only step loaded the program
    record = meter.flush()
    assert record is not None
    assert (record["step"], record["loss"]) == (14, 13.0)
    assert record["tokens_per_s"] == pytest.approx(1e5 / record["ms_per_step"])
    assert meter.flush() is None


def test_times_leave_out_the_first_step_of_each_kind(monkeypatch):
    """A step takes 1 s, a refresh 3 s, and 20 s more the first time of either."""
    clock = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    begin, every, last = 100, 5, 125  # a run that was resumed
    meter, seen, records = Meter(begin, tokens_per_step=7), set(), []
    for step in range(begin + 1, last + 1):
        refresh = step in (107, 108, 123)
        metrics = {"loss": jnp.float32(4.0)}
        clock[0] += (3.0 if refresh else 1.0) + (0.0 if refresh in seen else 20.0)
        seen.add(refresh)
        meter.add(metrics, refresh)
        if step % every == 0:
            records.append(meter.log(step, metrics))
            meter._pending[1].result()
    records = [*records[1:], meter.flush()]
    times = [record["ms_per_step"] for record in records]
    # After step 101; after step 107, of 108 to 110; then of five steps.
    assert times == pytest.approx([1000, 5000 / 3, 1000, 1000, 7000 / 5])
    unknown = {"step": 3, "ms_per_step": None}
    assert mean_ms([unknown]) is None
    assert mean_ms([unknown, {"step": 5, "ms_per_step": 8.0}]) == 8.0
    of_one, of_three = (
        {"step": s, "ms_per_step": ms} for s, ms in ((1, 7.0), (4, 3.0))
    )
    assert mean_ms([of_one, of_three]) == 4.0
