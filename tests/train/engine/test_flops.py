"""Operations of a token, and the peak rates of devices."""

from functools import partial

import jax
import pytest

from models import SIZES, LlamaConfig, init_params
from train.engine.flops import flops_per_token, multiplied_weights, peak_flops


@pytest.mark.parametrize(
    "model", [SIZES["60m"], LlamaConfig(64, 16, 24, 4, num_layers=3, num_kv_heads=2)]
)
def test_all_kernels_are_multiplied_and_nothing_else(model):
    params = jax.eval_shape(partial(init_params, model), jax.random.key(0))
    leaves = jax.tree.leaves_with_path(params)
    sizes = [x.size for path, x in leaves if "kernel" in jax.tree_util.keystr(path)]
    assert multiplied_weights(model) == sum(sizes)


def test_a_measured_step_of_llama_1b():
    # 16 x 1,024 tokens in 273.6 ms on an H200 are 48.1 % of its 989 TFLOP/s.
    flops = flops_per_token(SIZES["1b"], 1024) * 16 * 1024 / 0.2736
    assert flops / peak_flops("NVIDIA H200") == pytest.approx(0.481, abs=5e-4)


@pytest.mark.parametrize(
    ("kind", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU v6e", 918),
    ],
)
def test_known_devices(kind, rate):
    assert peak_flops(kind) == rate * 1e12


@pytest.mark.parametrize(
    "kind", ["cpu", "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H200 NVL", "TPU v4i"]
)
def test_other_devices_have_no_rate(kind):
    assert peak_flops(kind) is None
