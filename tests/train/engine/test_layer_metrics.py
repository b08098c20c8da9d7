"""Runs that measure their subspaces, and the spectra of what they changed."""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
import train.main
import train.spectrum
from tests.helpers.pictures import is_picture
from train.config.config import Config, OptimizerConfig
from train.config.named import named
from train.engine.layer_metrics import check_measured, layer_metrics
from train.engine.mesh import make_mesh
from train.main import main
from train.records.metrics import read_metrics
from train.run.restore import load_run

KINDS = ("down", "gate", "k", "o", "q", "up", "v")
TIMES = {"ms_per_step", "tokens_per_s"}


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """One of the eight virtual devices: they share two cores, and all would refresh."""
    mesh = make_mesh(Config(), jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.main, "make_mesh", lambda config: mesh)
        yield


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("text")
    text = " ".join(f"{a}{b}" for a in "abcdefghij" for b in "klmnopqrst")
    lines = [json.dumps({"text": text[i:]}) + "\n" for i in range(40)]
    (folder / "text.jsonl").write_text("".join(lines))
    return [
        *("--source", str(folder / "text.jsonl"), "--cache-dir", str(folder / "cache")),
        *("--vocab-size", "300", "--batch-size", "4", "--seq-len", "8", "--steps", "6"),
        *("--log-every", "1", "--eval-every", "0", "--checkpoint-every", "3"),
        *("--optimizer", "grass_jump", "--basis", "sara", "--rank", "4"),
        *("--refresh-every", "2", "--sample-tokens", "0"),
    ]


MEASURE = ("--measure", "all", "--anchor", "1")


@pytest.fixture(scope="module")
def measured(flags, tmp_path_factory) -> Path:
    """The folder of a run with refreshes at steps 1, 3 and 5."""
    folder = tmp_path_factory.mktemp("measured") / "run"
    main([*flags, *MEASURE, "--out", str(folder)])
    return folder


@pytest.mark.slow
def test_a_run_writes_what_it_measures(measured):
    records = read_metrics(measured)
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    of_rank_4 = [f"derivative/{{}}/{i}" for i in (1, 2, 3, 4)]
    of_layers = [f"layer_energy/{{}}/{i}" for i in (1, 2, 3, 4)]
    groups = ["overlap/{}", "anchor/{}", "energy/{}", *of_rank_4]
    names = {name for name in records[0] if "/" in name}
    found = [*groups, *of_layers]
    assert names == {group.format(kind) for group in found for kind in KINDS}
    for kind in KINDS:
        overlap, anchor, energy, derivative, *smaller = (
            [r[group.format(kind)] for r in records] for group in groups
        )
        assert overlap[:2] == anchor[:2] == derivative[:2] == [None, None]
        # What a refresh found stays until the next.
        for found in (overlap, anchor, derivative):
            assert found[2] == found[3] != found[4] == found[5]
        assert all(0 < x < 1 for x in overlap[2:] + anchor[4:] + energy)
        assert anchor[2] == pytest.approx(1, abs=1e-6)
        assert overlap[4] == pytest.approx(anchor[4], abs=1e-6)  # the same two bases
        assert len({*energy}) == 6
        for values in zip(derivative[2:], *(x[2:] for x in smaller), strict=True):
            assert [*values] == sorted(values, reverse=True)
            assert values[-1] > 0
        for record in records:
            layers = [record[name.format(kind)] for name in of_layers]
            assert len({*layers}) == 4
            assert np.mean(layers) == pytest.approx(record[f"energy/{kind}"], rel=1e-5)
    assert is_picture(measured / "subspace.png")
    assert is_picture(measured / "layers.png")
    (events,) = (measured / "tensorboard").iterdir()
    for name in names:
        assert f"optimizer/{name}".encode() in events.read_bytes()


@pytest.mark.slow
@pytest.mark.nightly
def test_it_changes_no_bit_of_a_run(measured, flags, tmp_path):
    main([*flags, "--out", str(tmp_path)])
    plain = [[r["loss"], r["grad_norm"]] for r in read_metrics(tmp_path)]
    assert plain == [[r["loss"], r["grad_norm"]] for r in read_metrics(measured)]
    assert not (tmp_path / "subspace.png").exists()
    ours, theirs = (load_run(folder).weights for folder in (measured, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.slow
def test_a_run_that_goes_on_measures_the_same(measured, flags, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(measured, folder)
    shutil.rmtree(folder / "checkpoints" / "6")
    main(["--out", str(folder), "--resume"])
    whole, resumed = (
        [{k: v for k, v in r.items() if k not in TIMES} for r in read_metrics(path)]
        for path in (measured, folder)
    )
    assert resumed == whole
    with pytest.raises(SystemExit, match="measure: all there, none here"):
        main([*flags, "--measure", "none", "--out", str(folder), "--resume"])


def test_metrics_are_means_over_the_layers_that_have_a_value():
    def tree(q, up):
        return {
            "layers": {
                "attention": {"q": {"kernel": jnp.array(q)}},
                "mlp": {"up": {"kernel": jnp.array(up)}},
                "mlp_norm": {"scale": jnp.array(False)},
            }
        }

    state = lro.measuring.MeasureState(
        energy=tree([0.25, 0.75], [0.5, 0.5]),
        overlap=tree([-1.0, -1.0], [-1.0, 0.5]),
        spectrum=tree([[1.0, 0.5], [3.0, 0.25]], [[2.0, 1.0], [-1.0, -1.0]]),
    )
    found = {k: float(x) for k, x in layer_metrics({"any": (state,)}).items()}
    assert np.isnan(found.pop("overlap/q"))
    assert found == {
        **{"energy/q": 0.5, "energy/up": 0.5, "overlap/up": 0.5},
        **{"layer_energy/q/1": 0.25, "layer_energy/q/2": 0.75},
        **{"layer_energy/up/1": 0.5, "layer_energy/up/2": 0.5},
        **{"derivative/q/1": 3.0, "derivative/q/2": 0.5},
        **{"derivative/up/1": 2.0, "derivative/up/2": 1.0},
    }
    assert layer_metrics({}) == {}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--optimizer", "adamw"), "adamw has no subspace to be measured: leave out"),
        (("--optimizer", "apollo"), r"kernel: measure_subspace\(\) .* not orthonormal"),
        (
            ("--optimizer", "galore", "--layerwise", "on", "--microbatches", "2"),
            r"measure_subspace\(\).*sum full gradients; take microbatches=1",
        ),
    ],
)
def test_what_cannot_be_measured_is_said_before_a_run(flags, tmp_path, argv, message):
    data = flags[: flags.index("--optimizer")]
    with pytest.raises(SystemExit, match=message):
        main([*data, *argv, "--measure", "all", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_an_anchor_is_a_refresh():
    with pytest.raises(ValueError, match="anchor=-1 must not be negative"):
        OptimizerConfig(anchor=-1)


def test_a_comparison_measures_what_has_a_subspace():
    given = OptimizerConfig(measure="overlap", anchor=2)
    chosen = [named(name, given) for name in ("adamw", "galore+sara")]
    check_measured(given, chosen)
    assert [(c.measure, c.anchor) for c in chosen] == [("none", None), ("overlap", 2)]


@pytest.mark.slow
def test_the_spectrum_of_a_run(measured, tmp_path, capsys):
    picture = tmp_path / "spectrum.png"
    train.spectrum.main([f"{measured}@3", str(measured), "--out", str(picture)])
    shown = capsys.readouterr().out
    assert f"{measured}@6 minus {measured}@3:" in shown
    ranks = re.findall(r"^\| (\w+) \| \d+x\d+ \| ([\d.]+) \| \d+% \|$", shown, re.M)
    assert {kind for kind, _ in ranks} == {*KINDS}
    # Three steps of full rank, for the residual is given back.
    assert all(4 < float(rank) < 64 for _, rank in ranks)
    assert is_picture(picture)
    with pytest.raises(SystemExit, match="@6 is named twice"):
        train.spectrum.main([str(measured), f"{measured}@6"])
    with pytest.raises(SystemExit, match="no checkpoint of step 5; it has"):
        train.spectrum.main([str(measured), f"{measured}@5"])
