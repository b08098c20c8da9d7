"""`python -m train.compile`: a step for TPUs that are not here."""

import dataclasses
import importlib.util
import json

import jax
import pytest
from jax.experimental import topologies

import train.compile
from models import SIZES, LlamaConfig
from train.compile import CompileConfig, CompiledWork, main, table
from train.config.config import MeshConfig, ModelConfig
from train.engine.memory import GIB, tree_bytes
from train.tpu.topology import chips_of, memory_of, refusal

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is for Linux on x86-64 only",
)


@pytest.fixture(autouse=True)
def a_small_model(monkeypatch):
    model = LlamaConfig(512, 256, 384, num_heads=2, num_layers=2)
    monkeypatch.setitem(SIZES, "micro", model)


def config_of(*optimizers: str, **fields) -> CompileConfig:
    work = CompiledWork(
        batch_size=8,
        seq_len=64,
        model=ModelConfig(size="micro", vocab_size=512),
        mesh=MeshConfig(fsdp=4),
    )
    return CompileConfig(**{"work": work, "optimizers": optimizers, **fields})


def run(monkeypatch, config: CompileConfig) -> None:
    monkeypatch.setattr(train.compile, "parse", lambda *args: config)
    main([])


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert "python -m train.compile --topology v5e:16x16 --size 7b" in said
    for flag in ("--optimizers", "--fsdp", "--tensor", "--remat", "--rank", "--out"):
        assert flag in said
    for flag in ("--source", "--resume", "--log-every", "--steps", "--coordinator"):
        assert flag not in said


@pytest.mark.slow
@needs_libtpu
def test_an_ordinary_step_and_a_refresh(monkeypatch, tmp_path, capsys):
    out = tmp_path / "new" / "rows.jsonl"
    run(monkeypatch, config_of("grass_jump", rows=out))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["step"] for row in rows] == ["ordinary", "refresh"]
    for row in rows:
        assert row["topology"] == "v5e:2x2"
        assert row["optimizer"] == "grass_jump"
        # What is "auto" is what it is on a TPU, though this is a CPU.
        assert row["config"]["model"]["compute_dtype"] == "bfloat16"
        assert row["config"]["model"]["remat"] == "dots"
        assert row["fits"] == "yes"
        assert row["room"] == pytest.approx(
            15.75 - row["peak"] - row["code"], abs=0.002
        )
        # All of the layers' weights are gathered in bfloat16, forwards and backwards.
        assert row["all-gather"]["count"] >= 2 * 2 * 7
        assert row["sent"] > 0
        assert row["compile_s"] > 0
    ordinary, refresh = rows
    assert refresh["code"] > ordinary["code"]
    shown = capsys.readouterr().out
    assert "4 TPU v5 lite (v5e:2x2) of 15.75 GiB each" in shown
    assert "| grass_jump | ordinary |" in shown
    assert "| grass_jump | refresh |" in shown


def test_weights_and_state_are_a_chip_s_part():
    mesh = jax.sharding.Mesh(jax.devices()[:4], ("x",))
    cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    tree = {
        "cut": jax.ShapeDtypeStruct((3, 8), "float32", sharding=cut),
        "whole": jax.ShapeDtypeStruct((5,), "bfloat16", sharding=whole),
    }
    assert tree_bytes(tree) == 3 * 2 * 4 + 5 * 2


@pytest.mark.slow
@needs_libtpu
def test_a_step_that_does_not_fit_says_by_how_much(monkeypatch, capsys):
    chip = chips_of("v5e:2x2")[0]
    assert memory_of(chip) == 15.75 * GIB
    chips = chips_of("v5p:2x2x1")
    assert memory_of(chips[0]) == 95.74 * GIB

    def refuse(*args):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required "
            "for HLO temporaries (23.19G) exceeds available HBM (15.75G)."
        )

    monkeypatch.setattr(train.compile, "lower_step", refuse)
    run(monkeypatch, config_of("adamw"))
    row = json.loads(capsys.readouterr().out.splitlines()[1])
    assert (row["fits"], row["peak"], row["room"]) == ("no", 23.19, -7.44)


@pytest.mark.slow
@needs_libtpu
def test_another_error_of_the_compiler_is_told_and_the_rest_goes_on(
    monkeypatch, capsys
):
    def fail(*args):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug\nand its trace")

    monkeypatch.setattr(train.compile, "lower_step", fail)
    run(monkeypatch, config_of("adamw", "galore"))
    lines = capsys.readouterr().out.splitlines()[1:4]
    rows = [json.loads(line) for line in lines]
    assert [row["error"] for row in rows] == ["INTERNAL: a bug"] * 3
    assert refusal(RuntimeError("INTERNAL: a bug")) is None


def test_a_table_has_a_column_for_what_is_sent():
    rows = [
        {"optimizer": "adamw", "all-gather": {"count": 3, "sent": 1.5}, "sent": 1.5},
        {"optimizer": "galore", "fits": "no", "room": -7.44},
    ]
    head, _, *lines = table(rows).splitlines()
    assert head == "| optimizer | fits | room | all-gather | sent |"
    assert lines == [
        "| adamw | - | - | 3: 1.50 | 1.50 |",
        "| galore | no | -7.44 | - | - |",
    ]


@needs_libtpu
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"topology": "v9:2x2"}, "topology='v9:2x2' is none that the TPU compiler"),
        ({"topology": "v5e:3x5"}, "give one such as v5e:2x2"),
        ({"topology": "v5p:2x2x4"}, "batch_size=8 is not a multiple of 16 devices"),
    ],
)
def test_what_cannot_be_compiled_is_an_error_at_once(monkeypatch, config, message):
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, config_of("adamw", **config))


def test_without_the_compiler_there_is_one_sentence(monkeypatch):
    def absent(**kwargs):
        raise RuntimeError("JAX TPU support not installed; cannot generate topology.")

    monkeypatch.setattr(topologies, "get_topology_desc", absent)
    with pytest.raises(SystemExit, match=r"libtpu, is not installed: pip install"):
        run(monkeypatch, config_of("adamw"))


@pytest.mark.parametrize(
    ("optimizers", "message"),
    [((), "optimizers: name at least one"), (("sgd",), "'sgd' is not NAME")],
)
def test_optimizers_that_do_not_exist_are_an_error(optimizers, message):
    with pytest.raises(ValueError, match=message):
        config_of(*optimizers)


def test_an_option_that_no_optimizer_has_is_an_error():
    work = config_of("adamw").work
    optimizer = dataclasses.replace(work.optimizer, rank=4)
    with pytest.raises(ValueError, match="adamw has no rank: leave out --rank"):
        config_of("adamw", work=dataclasses.replace(work, optimizer=optimizer))


def test_a_call_that_is_stopped_says_so(monkeypatch, capsys):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.compile, "chips_of", lambda topology: jax.devices()[:4])
    monkeypatch.setattr(train.compile, "memory_of", lambda chip: GIB)
    monkeypatch.setattr(train.compile, "compile_step", stop)
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, config_of("adamw"))
    assert stopped.value.code == 130
    assert "stopped: the rows above are all" in capsys.readouterr().err
