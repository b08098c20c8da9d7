"""The bench of training steps: its rows, its table, its switches, its errors."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import train.bench
from models import SIZES, LlamaConfig
from train.bench import BenchConfig, bench, check, run_of, table
from train.config.config import Config
from train.engine.flops import flops_per_token
from train.engine.memory import GIB
from train.engine.mesh import make_mesh
from train.engine.timing import median_seconds, seconds


@pytest.fixture(autouse=True)
def one_device_and_a_small_model(monkeypatch):
    mesh = make_mesh(Config(), jax.devices()[:1])
    monkeypatch.setattr(train.bench, "make_mesh", lambda config: mesh)
    model = LlamaConfig(64, 16, 24, num_heads=2, num_layers=2)
    monkeypatch.setitem(SIZES, "micro", model)


def config_of(*optimizers: str, **fields) -> BenchConfig:
    small = {"size": "micro", "batch_size": 8, "seq_len": 12, "rank": 4, "steps": 1}
    return BenchConfig(**{**small, "optimizers": optimizers, **fields})


def cells(line: str) -> list[str]:
    assert line.startswith("| ")
    assert line.endswith(" |")
    return line.strip("| ").split(" | ")


def test_a_row_for_each_optimizer_and_a_table(monkeypatch, capsys):
    compile_step, peaks = train.bench.compile_step, iter([0, 7, 7, 7, GIB, GIB])

    def step(config, name, layerwise):
        if name == "fira":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 3 GiB\nand more")
        return compile_step(config, name, layerwise)

    monkeypatch.setattr(train.bench, "compile_step", step)
    monkeypatch.setattr(train.bench, "device_peak", lambda: next(peaks))
    rows = bench(
        config_of("fira", "galore_adam8bit", layerwise=("on",), refresh_every=7)
    )
    assert [row["optimizer"] for row in rows] == ["adamw", "fira", "galore_adam8bit"]
    assert {row["layerwise"] for row in rows} == {"on"}
    adamw, fira, galore = rows
    assert fira["error"] == "RESOURCE_EXHAUSTED: 3 GiB"
    memory = {"weights", "state", "gradients", "temporaries", "peak"}
    times = {"compile_s", "step_ms", "mean_ms", "ratio", "mean_ratio", "tokens_per_s"}
    # The device's peak was 7 bytes from its row on, so the next row has none.
    assert galore["device_peak"] * GIB == 7
    assert adamw.keys() == {"optimizer", "layerwise", *times, *memory}
    assert galore.keys() == {*adamw, "refresh_ms", "device_peak"}
    assert adamw["ratio"] == adamw["mean_ratio"] == 1
    assert galore["ratio"] == galore["step_ms"] / adamw["step_ms"]
    assert galore["refresh_ms"] > 0
    assert galore["tokens_per_s"] == pytest.approx(8 * 12 / galore["step_ms"] * 1e3)
    mean = (6 * galore["step_ms"] + galore["refresh_ms"]) / 7
    assert galore["mean_ms"] == pytest.approx(mean, rel=1e-9)
    assert galore["mean_ratio"] == galore["mean_ms"] / adamw["step_ms"]
    assert galore["weights"] == adamw["weights"] > 0
    assert galore["state"] < adamw["state"]
    assert adamw["state"] * GIB >= 2 * adamw["weights"] * GIB
    for row in (adamw, galore):
        assert row["peak"] >= row["weights"] + row["state"] + row["temporaries"]
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    # The lowest peak comes first; a step that was not compiled has none.
    assert [row["optimizer"] for row in printed] == ["fira", "galore_adam8bit", "adamw"]

    head, rule, *lines = table(rows).splitlines()
    assert cells(head)[:5] == [
        *("optimizer", "layer by layer", "step, ms", "of AdamW's", "refresh, ms")
    ]
    assert set(rule) == set("|-")
    assert len({line.count("|") for line in (head, rule, *lines)}) == 1
    assert [cells(line)[0] for line in lines] == ["adamw", "fira", "galore_adam8bit"]
    assert cells(lines[0])[3:5] == ["1.00", "-"]
    assert set(cells(lines[1])[2:]) == {"-"}


def test_memory_alone_is_compiled_and_not_run(monkeypatch):
    def fail(*args):
        raise AssertionError("a step ran")

    monkeypatch.setattr(train.bench, "median_seconds", fail)
    rows = bench(config_of(layerwise=("off", "on"), compile_only=True))
    assert [(row["optimizer"], row["layerwise"]) for row in rows] == [
        *(("adamw", "off"), ("adamw", "on"))
    ]
    assert not {"step_ms", "refresh_ms", "ratio"} & {key for row in rows for key in row}
    for name in ("weights", "state"):
        assert rows[0][name] == rows[1][name]
    assert rows[1]["gradients"] < rows[0]["gradients"]
    assert all(row["peak"] > row["weights"] + row["state"] for row in rows)
    assert "step, ms" not in table(rows)
    assert table(rows).count("\n") == 3


@pytest.mark.slow
def test_the_update_alone_has_no_model():
    rows = bench(config_of("msgd", update_alone=True, steps=3))
    assert [row["optimizer"] for row in rows] == ["adamw", "msgd"]
    times = {"compile_s", "step_ms", "mean_ms", "ratio", "mean_ratio"}
    assert rows[0].keys() == {"optimizer", "layerwise", "temporaries", *times}
    assert {row["layerwise"] for row in rows} == {"-"}
    assert rows[1].keys() == {*rows[0], "refresh_ms"}
    assert all(row["step_ms"] > 0 for row in rows)
    assert cells(table(rows).splitlines()[0]) == [
        *("optimizer", "layer by layer", "step, ms", "of AdamW's", "refresh, ms"),
        *("of AdamW's with refreshes", "compile, s", "all of the step alone"),
    ]


def test_results_that_the_next_step_overwrites_are_not_waited_for():
    results = [jnp.zeros(1)]

    def run():
        results[-1].delete()  # as a donated array is
        results.append(jnp.ones(1))
        return results[-1]

    assert seconds(run, steps=4) > 0
    assert median_seconds(run, steps=2) > 0
    assert len(results) == 1 + 4 + 7
    assert not results[-1].is_deleted()


def test_an_update_by_its_kernels(tmp_path, capsys):
    (row,) = bench(config_of(update_alone=True, steps=2, profile=(tmp_path,)))
    printed = capsys.readouterr().out
    assert "\nadamw: under the profiler a step takes " in printed
    assert "| kernel | ms a step | % | launches a step |" in printed
    assert "| elementwise and reductions | " in printed
    assert row["busy_ms"] > 0
    assert sum(row["kinds_ms"].values()) >= row["busy_ms"] * (1 - 1e-6)
    assert [*(tmp_path / "adamw").rglob("*.xplane.pb")]
    assert "device busy, ms" in table([row])


def test_the_share_of_the_peak_rate(monkeypatch):
    monkeypatch.setattr(train.bench, "peak_flops", lambda kind: 1e12)
    (row,) = bench(config_of())
    config = SIZES["micro"]
    flops = row["tokens_per_s"] * flops_per_token(config, 12)
    assert row["peak_rate"] == pytest.approx(100 * flops / 1e12)
    assert "% of the peak rate" in table([row])


def test_a_row_with_an_error_ends_in_status_1(monkeypatch, tmp_path, capsys):
    row = {"optimizer": "fira", "layerwise": "off", "error": "RESOURCE_EXHAUSTED"}
    monkeypatch.setattr(train.bench, "bench", lambda config: [row])
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr("sys.argv", ["bench", "--optimizers=fira", f"--out={out}"])
    with pytest.raises(SystemExit) as ended:
        train.bench.main()
    assert ended.value.code == 1
    assert json.loads(out.read_text())["error"] == "RESOURCE_EXHAUSTED"
    printed = capsys.readouterr()
    assert "| fira | off |" in printed.out
    assert "fira: RESOURCE_EXHAUSTED" in printed.err


def test_an_optimizer_that_does_not_exist_is_an_error_at_once():
    with pytest.raises(ValueError, match="NAME"):
        config_of("galore", "sgd")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank=0 must be above 0"),
        ({"steps": 0}, "steps=0 must be above 0"),
        ({"layerwise": ()}, "layerwise: name off, on, or both"),
        ({"basis_dtype": "bfloat16"}, "needs a basis by name"),
        ({"profile": (), "compile_only": True}, "runs no step: leave out profile"),
        ({"profile": (Path("a"), Path("b"))}, "name one folder, or none"),
        ({"update_alone": True, "compile_only": True}, "has no model: leave out com"),
        ({"update_alone": True, "weight_dtype": "int8"}, "has no model: leave out we"),
    ],
)
def test_what_would_mean_nothing_is_an_error_at_once(fields, message):
    with pytest.raises(ValueError, match=message):
        config_of("galore", **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 17}, "rank 17 is above the smaller side, 16, of layers/"),
        ({"precision": "foo"}, "precision='foo' is none that a cpu has"),
        ({"seq_len": 1}, "seq_len=1"),
    ],
)
def test_what_cannot_be_built_is_an_error_before_it_is_compiled(fields, message):
    with pytest.raises(ValueError, match=message):
        check(config_of("galore", **fields))


def test_adamw_by_name_is_the_row_that_is_there_anyway():
    assert config_of("adamw", "galore", "galore").names == ("adamw", "galore")


def test_a_bench_that_is_stopped_says_so(monkeypatch, capsys):
    def stop(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.bench, "bench", stop)
    monkeypatch.setattr("sys.argv", ["bench", "--optimizers", "adamw"])
    with pytest.raises(SystemExit) as stopped:
        train.bench.main()
    assert stopped.value.code == 130
    assert "stopped: the rows above are all" in capsys.readouterr().err


def test_the_command_line_appends_its_rows(monkeypatch, tmp_path, capsys):
    row = {"optimizer": "adamw", "layerwise": "off", "step_ms": 1.23456}
    monkeypatch.setattr(train.bench, "bench", lambda config: [row])
    out = tmp_path / "new" / "rows.jsonl"
    argv = ["bench", "--optimizers", "galore", "--layerwise", "off", "on"]
    monkeypatch.setattr("sys.argv", [*argv, "--out", str(out)])
    for count in (1, 2):
        train.bench.main()
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        assert len(lines) == count
    assert lines[-1]["step_ms"] == 1.235
    assert lines[-1]["layerwise"] == "off"  # the row's, not the setting's
    assert lines[-1]["optimizers"] == ["galore"]
    assert "| adamw | off | 1.23 |" in capsys.readouterr().out


def test_refreshes_come_at_the_intervals_of_the_methods() -> None:
    config = config_of("galore", "spectral_adam")
    every = {
        name: run_of(config, name, "off").optimizer.refresh_every
        for name in config.names
    }
    assert every == {"adamw": None, "galore": 200, "spectral_adam": 10}
