"""Metrics on their way to a file: one record late, and cut off where a run resumes."""

import jax.numpy as jnp
import pytest

from tests.helpers.run_files import strict_lines
from train.records.metrics import Meter, MetricsWriter, read_metrics


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
    record = meter.flush()
    assert record is not None
    assert (record["step"], record["loss"]) == (14, 13.0)
    assert record["tokens_per_s"] == pytest.approx(1e5 / record["ms_per_step"])
    assert meter.flush() is None
