"""Weights, gradients and state cut over a mesh: the same curve, and what is where."""

import dataclasses
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from models import SIZES, LlamaConfig
from tests.helpers.marks import slow_but
from train.config.config import (
    Config,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    to_json,
)
from train.config.resolve import resolve
from train.engine.memory import step_memory, tree_bytes
from train.engine.mesh import make_mesh, to_devices
from train.engine.optimizer import check_meant
from train.engine.weight_sharding import WeightSpecs, specs_of_weight
from train.run.checkpoint import Checkpoints
from train.run.first_state import initial
from train.run.folder import check_folder
from train.run.loop import kinds_of_steps, lower_step, work_of

D, F, V, ROWS, T, STEPS = 32, 64, 96, 16, 12, 5
MODEL = LlamaConfig(V, D, F, num_heads=4, num_layers=3)
# By name: the optimizer, how a step is taken, and the mesh, (fsdp, tensor) of 8.
CASES: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "adamw": ("adamw", {"microbatches": 2}, (4, 2)),
    "layerwise": ("grass_jump", {"layerwise": "on"}, (2, 2)),
    "8 bits": (
        "galore_adam8bit+sara",
        {"layerwise": "on", "microbatches": 2, "weight_dtype": "int8"},
        (4, 2),
    ),
    "ldadam": ("ldadam", {}, (8, 1)),
}


@pytest.fixture(scope="module", autouse=True)
def a_small_model():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "micro", MODEL)
        yield


class Runner(NamedTuple):
    """A run on a mesh: its first state, its states' types, and its compiled steps."""

    mesh: Any
    work: Any
    state: Any
    like: Any
    steps: dict[bool, Any]

    def go_on(self, state: Any, start: int, stop: int) -> tuple[Any, list[float]]:
        losses = []
        for step in range(start, stop):
            batch = to_devices(self.mesh, batch_of(step))
            refresh = min(int(state.until_refresh), 1) == 0 and True in self.steps
            state, metrics = self.steps[refresh](state, batch)
            losses.append(float(metrics["loss"]))
        return state, losses


def config_of(case: str, fsdp: int = 1, tensor: int = 1) -> Config:
    name, how, _ = CASES[case]
    how = dict(how)
    dtype = how.pop("weight_dtype", "float32")
    method, _, basis = name.partition("+")
    low_rank = method != "adamw"
    return resolve(
        Config(
            steps=STEPS,
            batch_size=ROWS,
            seq_len=T,
            model=ModelConfig(size="micro", weight_dtype=dtype),
            optimizer=OptimizerConfig(
                name=method,
                basis=basis or "default",
                rank=8 if low_rank else None,
                refresh_every=3,
                learning_rate=1e-2,
                warmup=0,
                # The same choices on every mesh, as of a run that goes on.
                square="megatron" if low_rank else "auto",
            ),
            mesh=MeshConfig(fsdp, tensor),
            **how,
        )
    )


def runner_of(case: str, fsdp: int, tensor: int, devices: int = 8) -> Runner:
    config = config_of(case, fsdp, tensor)
    mesh = make_mesh(config, jax.devices()[:devices])
    work = work_of(config, jax.random.key(1))
    make, like = initial(work, mesh)
    with jax.set_mesh(mesh):
        state = make(jax.random.key(0))
    steps = {
        kind: lower_step(config, mesh, work, like, kind).compile()
        for kind in kinds_of_steps(work.optimizer)
    }
    return Runner(mesh, work, state, like, steps)


@cache
def spread(case: str) -> Runner:
    return runner_of(case, *CASES[case][2])


@cache
def alone(case: str) -> Runner:
    return runner_of(case, 1, 1, devices=1)


def copied(runner: Runner) -> Any:
    """Its first state, to be consumed."""
    return jax.tree.map(lambda x: x.copy(), runner.state)


def batch_of(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    tokens = rng.geometric(0.2, (ROWS, T)).clip(max=V - 1)
    return {"tokens": tokens.astype(np.int32)}


@cache
def curve(case: str) -> list[float]:
    """Of one device."""
    runner = alone(case)
    return runner.go_on(copied(runner), 0, STEPS)[1]


def check_curve(losses: list[float], expected: list[float]) -> None:
    assert len(set(expected)) == len(expected) > 0
    # Sums in another order, magnified by Adam's division; weights of int8 may round
    # to another neighbour.
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


@pytest.mark.parametrize("case", slow_but(["adamw"], CASES, slow=["layerwise"]))
def test_a_mesh_takes_the_steps_of_one_device(case: str) -> None:
    runner = spread(case)
    assert runner.mesh.size == 8
    check_curve(runner.go_on(copied(runner), 0, STEPS)[1], curve(case))


def device_bytes(tree: Any) -> int:
    """In the memory of the first device."""
    shards = [x.addressable_shards[0].data for x in jax.tree.leaves(tree)]
    return sum(x.size * x.dtype.itemsize for x in shards)


@pytest.mark.parametrize("case", slow_but(["adamw"], CASES, slow=["layerwise"]))
def test_weights_and_state_are_cut_from_the_first_and_stay_so(case: str) -> None:
    runner = spread(case)
    after, _ = runner.go_on(copied(runner), 0, 1)
    parts = np.prod(CASES[case][2])
    whole = alone(case).state
    for state in (runner.state, after):
        for tree, of_one in (
            (state.params, whole.params),
            (state.opt_state, whole.opt_state),
        ):
            # Norms, counts and a few scales are whole.
            assert device_bytes(tree) < 1.25 * device_bytes(of_one) / parts + 4096
            assert device_bytes(tree) == tree_bytes(tree)
        kernel = state.params["layers"]["mlp"]["up"]["kernel"]
        kernel = kernel if case != "8 bits" else kernel.codes
        assert kernel.addressable_shards[0].data.shape == (3, D, F // parts)
    memory = step_memory(
        runner.work, runner.like, runner.steps[False or min(runner.steps)]
    )
    assert memory.weights == device_bytes(after.params)
    assert memory.state == device_bytes(after.opt_state)


MOVES = (
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\("
)


@pytest.mark.slow
def test_an_ordinary_step_gathers_one_layer_at_a_time() -> None:
    """Whole weights of one layer, bases, and no gradient or moment."""
    text = spread("layerwise").steps[False].as_text()
    moved = {
        (move, shape)
        for shapes, move in re.findall(MOVES, text)
        for shape in re.findall(r"\w+\[([\d,]+)\]", shapes)
    }
    gathered = {shape for move, shape in moved if move == "all-gather"}
    half, share = D // 2, ROWS // 4
    assert gathered == {
        *(f"{D},{half}", f"{half},{D}", f"{D},{F // 2}", f"{F // 2},{D}"),
        f"{D},{V // 2}",  # the head
        f"{D},8",  # a basis
        f"{ROWS // 2},{T}",  # tokens
        f"{ROWS // 2},{T},{half}",  # their embeddings' parts
    }, gathered
    assert ("all-reduce", f"{share},{T},{D}") in moved  # along tensor
    stacked = [shape for _, shape in moved if shape.startswith("3,")]
    assert not stacked


@pytest.mark.parametrize(
    "case", slow_but(["adamw"], ["adamw", "layerwise"], slow=["layerwise"])
)
@pytest.mark.parametrize("there", [True, False], ids=["to one", "from one"])
def test_a_checkpoint_goes_on_with_another_mesh(
    there: bool, case: str, tmp_path: Path
) -> None:
    first, then = spread(case), alone(case)
    if not there:
        first, then = then, first
    state, losses = first.go_on(copied(first), 0, 2)
    data = iter(grain.MapDataset.range(9).to_iter_dataset())
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(2, state, data)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        begun = checkpoints.restore(2, then.like, data).state
    for x, like in zip(jax.tree.leaves(begun), jax.tree.leaves(then.like), strict=True):
        assert x.sharding.is_equivalent_to(like.sharding, x.ndim)
    _, others = then.go_on(begun, 2, STEPS)
    check_curve(losses + others, curve(case))


# --- where weights are ---


def sizes(fsdp: int, tensor: int) -> dict[str, int]:
    return {"data": 1, "fsdp": fsdp, "tensor": tensor}


BOTH = ("tensor", "fsdp")
MEGATRON = (("/o/", "output"), ("", "input"))


@pytest.mark.parametrize(
    ("path", "shape", "mesh", "square", "cut", "used"),
    [
        # Both along the side that Megatron cuts, which is not projected.
        ("mlp/up/kernel", (9, 8, 16), (4, 2), "input", (None, None, BOTH), "OUT"),
        ("mlp/down/kernel", (9, 16, 8), (4, 2), "input", (None, BOTH, None), "IN"),
        ("attention/q/kernel", (9, 8, 8), (4, 2), MEGATRON, (None, None, BOTH), "OUT"),
        ("attention/o/kernel", (9, 8, 8), (4, 2), MEGATRON, (None, BOTH, None), "IN"),
        # A run that projects another side keeps it whole along fsdp.
        ("attention/o/kernel", (8, 8), (4, 2), "input", BOTH, "IN"),
        ("attention/q/kernel", (8, 8), (8, 1), "output", ("fsdp", None), ""),
        ("attention/q/kernel", (8, 8), (8, 1), "input", (None, "fsdp"), ""),
        ("attention/k/kernel", (16, 8), (4, 2), "input", ("fsdp", "tensor"), "OUT"),
        # 1b's MLP, of 43 x 127 units, is cut along hidden and not along tensor.
        ("mlp/up/kernel", (2048, 5461), (4, 2), "input", (BOTH, None), ""),
        ("mlp/down/kernel", (5461, 2048), (8, 1), "input", (None, "fsdp"), ""),
        ("mlp/up/kernel", (7, 11), (4, 2), "input", (None, None), ""),
        ("head/kernel", (8, 4), (2, 2), "input", (None, BOTH), "OUT"),
        ("attention_norm/scale", (9, 8), (4, 2), "input", None, None),
    ],
)
def test_where_a_weight_is_cut(path, shape, mesh, square, cut, used) -> None:
    found = specs_of_weight(f"layers/{path}", shape, sizes(*mesh), square)
    if cut is None:
        assert found is None
        return
    ndim = len(shape)
    axes: dict[str, list[Any]] = {"OUT": [None, "tensor"], "IN": ["tensor", None]}
    expected = [None] * (ndim - 2) + axes.get(used, [None, None])
    assert found == WeightSpecs(P(*cut), P(*expected))


def test_an_embedding_is_cut_along_its_rows_contents() -> None:
    cut = P(None, ("fsdp", "tensor"))
    assert specs_of_weight(
        "embed/embedding", (8, 8), sizes(4, 2), "input"
    ) == WeightSpecs(cut, cut)
    found = specs_of_weight("embed/embedding", (8, 7), sizes(4, 2), "input")
    assert found == WeightSpecs(P(("fsdp", "tensor"), None), P(None, None))


def test_what_cannot_be_cut_is_told() -> None:
    work = work_of(config_of("adamw"), jax.random.key(0))
    weights = {
        "layers": {"mlp": {"up": {"kernel": np.zeros((2, 6, 7))}}},
        "head": {"kernel": np.zeros((8, 8))},
    }
    mesh = make_mesh(config_of("adamw", 4, 2))
    assert work.shards.remarks(mesh, weights) == [
        "cut into fewer parts than 8: layers/mlp/up/kernel (2)",
        "not parallel along tensor: layers/mlp/up/kernel",
    ]


# --- meshes ---


def test_a_batch_is_cut_over_data_and_fsdp_and_the_same_along_tensor() -> None:
    mesh = make_mesh(config_of("adamw", 2, 2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    tokens = np.arange(8)[:, None]
    put = to_devices(mesh, {"tokens": tokens})["tokens"]
    found = {s.device: s.data.ravel().tolist() for s in put.addressable_shards}
    order = [found[device] for device in mesh.devices.flat]
    assert order == [[0, 1]] * 2 + [[2, 3]] * 2 + [[4, 5]] * 2 + [[6, 7]] * 2


@pytest.mark.parametrize(
    ("mesh", "fields", "message"),
    [
        ((3, 1), {}, "fsdp=3 x tensor=1 does not divide the 8 devices"),
        ((1, 8), {}, "tensor=8 does not divide the 4 attention heads of LLaMA-micro"),
        ((2, 2), {"batch_size": 6}, "not a multiple of 8 devices / 2 of tensor x 1"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(mesh, fields, message) -> None:
    config = Config(model=ModelConfig(size="micro"), mesh=MeshConfig(*mesh), **fields)
    with pytest.raises(ValueError, match=message):
        make_mesh(config)


def test_devices_along_tensor_are_of_one_process(monkeypatch) -> None:
    devices = [SimpleNamespace(id=i, process_index=i % 4) for i in range(8)]
    monkeypatch.setattr(
        jax, "make_mesh", lambda shape, *_, **__: mesh_of(devices, shape)
    )
    monkeypatch.setattr(
        "train.engine.mesh.Mesh", lambda grid, *_: SimpleNamespace(devices=grid)
    )
    config = Config(model=ModelConfig(size="micro"), mesh=MeshConfig(1, 2))
    with pytest.raises(ValueError, match="tensor=2: so many devices are not of one"):
        make_mesh(config, devices)
    for i, device in enumerate(devices):
        device.process_index = i // 2
    # A mesh for the hardware's sake does not do, the devices' own order does.
    shuffled = devices[::2] + devices[1::2]
    monkeypatch.setattr(
        jax, "make_mesh", lambda shape, *_, **__: mesh_of(shuffled, shape)
    )
    assert make_mesh(config, devices).devices.ravel().tolist() == devices


def mesh_of(devices: list[Any], shape: tuple[int, ...]) -> Any:
    return SimpleNamespace(devices=np.reshape(np.array(devices, object), shape))


# --- what a run keeps ---


def test_a_run_keeps_what_it_chose_for_its_first_mesh(tmp_path: Path) -> None:
    first = resolve(Config(out=tmp_path, mesh=MeshConfig(2, 4)))
    assert first.optimizer.square == "megatron"
    alone = resolve(Config(out=tmp_path))
    assert alone.optimizer.square == "method"
    (tmp_path / "config.json").write_text(to_json(first))
    for mesh in (MeshConfig(), MeshConfig(8, 1)):
        later = resolve(Config(out=tmp_path, mesh=mesh, resume=True))
        assert later.optimizer == first.optimizer
        check_folder(later)
    other = Config(
        out=tmp_path, optimizer=OptimizerConfig(square="method"), resume=True
    )
    with pytest.raises(ValueError, match="square: megatron there, method here"):
        check_folder(resolve(other))


def test_a_method_without_a_subspace_has_no_side() -> None:
    given = OptimizerConfig(name="adamw", square="megatron")
    with pytest.raises(ValueError, match="adamw has no square: leave out --square"):
        check_meant(given, [given])
    config = Config(optimizer=OptimizerConfig(name="adamw"), mesh=MeshConfig(1, 2))
    assert resolve(config).optimizer.square == "method"
    assert dataclasses.replace(config, mesh=MeshConfig()) == Config(
        optimizer=OptimizerConfig(name="adamw")
    )
