"""Runs that measure their subspaces, and the spectra of what they changed."""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
from train.run.spectra import effective_rank, singular_values, spectra

KINDS = ("down", "gate", "k", "o", "q", "up", "v")
TIMES = {"ms_per_step", "tokens_per_s"}
few = settings(derandomize=True, deadline=None, max_examples=30)


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


def test_a_run_writes_what_it_measures(measured):
    records = read_metrics(measured)
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    of_rank_4 = [f"derivative/{{}}/{i}" for i in (1, 2, 3, 4)]
    groups = ["overlap/{}", "anchor/{}", "energy/{}", *of_rank_4]
    names = {name for name in records[0] if "/" in name}
    assert names == {group.format(kind) for group in groups for kind in KINDS}
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
    assert is_picture(measured / "subspace.png")
    (events,) = (measured / "tensorboard").iterdir()
    for name in names:
        assert name.encode() in events.read_bytes()


def test_it_changes_no_bit_of_a_run(measured, flags, tmp_path):
    main([*flags, "--out", str(tmp_path)])
    plain = [[r["loss"], r["grad_norm"]] for r in read_metrics(tmp_path)]
    assert plain == [[r["loss"], r["grad_norm"]] for r in read_metrics(measured)]
    assert not (tmp_path / "subspace.png").exists()
    ours, theirs = (load_run(folder).weights for folder in (measured, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_run_that_goes_on_measures_the_same(measured, flags, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(measured, folder)
    shutil.rmtree(folder / "checkpoints" / "6")
    main([*flags, *MEASURE, "--out", str(folder), "--resume"])
    whole, resumed = (
        [{k: v for k, v in r.items() if k not in TIMES} for r in read_metrics(path)]
        for path in (measured, folder)
    )
    assert resumed == whole
    with pytest.raises(SystemExit, match="measure: all there, none here"):
        main([*flags, "--out", str(folder), "--resume"])


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


# --- spectra ---


def test_singular_values_and_ranks_against_numpy():
    rng = np.random.default_rng(0)
    for shape in ((6, 9), (9, 6), (5, 5)):
        d = rng.normal(size=shape).astype(np.float32)
        expected = np.linalg.svd(d.astype(np.float64), compute_uv=False)
        # Roots of eigenvalues, which are of float64's size beside the largest.
        np.testing.assert_allclose(singular_values(d), expected, rtol=1e-12)
        p = expected / expected.sum()
        entropy = sum(-x * np.log(x) for x in p)
        assert effective_rank(expected) == pytest.approx(np.exp(entropy), rel=1e-12)


@few
@given(st.integers(1, 8), st.floats(1e-30, 1e30))
def test_equal_singular_values_are_as_many_as_they_are(count, size):
    values = np.array([size] * count + [0.0] * 3)
    assert effective_rank(values) == pytest.approx(count, rel=1e-12)


@few
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=8))
def test_an_effective_rank_lies_between_one_and_all(values):
    there = sum(x > 0 for x in values)
    assert min(there, 1) - 1e-9 <= effective_rank(np.array(values)) <= there + 1e-9


def model(seed, shape=(3, 6, 8)):
    rng = np.random.default_rng(seed)
    layers = {
        "attention": {"q": {"kernel": rng.normal(size=(3, 6, 6))}},
        "mlp": {"up": {"kernel": rng.normal(size=shape)}},
        "mlp_norm": {"scale": rng.normal(size=(3, 6))},
    }
    return {"layers": layers, "head": {"kernel": rng.normal(size=(6, 20))}}


def test_spectra_of_a_change_of_known_rank():
    before, after = model(0), model(0)
    u, v = np.linalg.qr(np.random.default_rng(1).normal(size=(8, 8)))[0][:2]
    after["layers"]["mlp"]["up"]["kernel"][0] += np.outer(u[:6], v)
    found = spectra(before, after)
    assert [*found] == ["q", "up"]
    assert found["up"].shape == (6, 8)
    # One direction in float32, in the first of three layers, and nothing else.
    np.testing.assert_allclose(found["up"].ranks, [1, 0, 0], atol=1e-5)
    np.testing.assert_allclose(found["up"].values[0], [1, 0, 0, 0, 0, 0], atol=1e-6)
    assert not np.any(found["q"].values)
    with pytest.raises(ValueError, match="models of different shapes"):
        spectra(before, model(0, (3, 8, 6)))


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
