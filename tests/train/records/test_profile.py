"""A step by its kernels: sums, overlaps, kinds, tables, and the planes of a trace."""

from types import SimpleNamespace

import pytest

from train.records.profile import (
    Event,
    kind_of,
    lines_of,
    own_times,
    summed,
    tables,
)

MS = 1e6


def plane(name, **lines):
    """A plane of a trace; an event is (name, start, end, stats)."""

    def event(name, start, end, **stats):
        return SimpleNamespace(
            name=name, start_ns=start, end_ns=end, stats=[*stats.items()]
        )

    return SimpleNamespace(
        name=name,
        lines=[
            SimpleNamespace(
                name=line.replace("_", " "),
                events=[event(*x[:3], **(x[3] if len(x) > 3 else {})) for x in events],
            )
            for line, events in lines.items()
        ],
    )


def test_kernels_are_summed_by_name_over_streams_and_steps():
    streams = [
        [Event("gemm", 0, 4 * MS), Event("gemm", 10 * MS, 14 * MS)],
        [Event("copy", 2 * MS, 6 * MS)],  # beside the first product for 2 ms
    ]
    found = summed(streams, steps=2, wall_ms=8)
    assert [tuple(x) for x in found.kernels] == [("gemm", 4, 1), ("copy", 2, 0.5)]
    assert found.busy_ms == 5
    assert [x.name for x in found.kinds] == ["matrix products", "copies"]


def test_a_loop_has_its_own_time_and_not_its_bodys():
    line = [
        Event("while", 0, 10),
        Event("dot", 1, 4),
        Event("add", 5, 9),
        Event("b", 10, 12),
    ]
    assert sorted(own_times(line)) == [("add", 4), ("b", 2), ("dot", 3), ("while", 3)]


def test_of_a_gpu_its_streams_count():
    gpu = plane(
        "/device:GPU:0",
        **{"Stream_#13": [("gemm", 0, 4)], "XLA_Ops": [("dot.1", 0, 4)]},
    )
    other = plane("/device:GPU:1", **{"Stream_#13": [("gemm", 0, 9)]})
    host = plane("/host:CPU", python=[("wait", 0, 9)])
    data = SimpleNamespace(planes=[host, other, gpu])
    assert lines_of(data) == [[Event("gemm", 0, 4)]]


def test_of_a_tpu_its_operations_by_their_own_names():
    event = ("%fusion.3 = bf16[8]{0} fusion(bf16[8]{0} %p)", 1, 5)
    tpu = plane("/device:TPU:0", XLA_Ops=[event], Steps=[("0", 0, 9)])
    assert lines_of(SimpleNamespace(planes=[tpu])) == [[Event("fusion.3", 1, 5)]]


def test_of_a_cpu_the_operations_of_its_first_device():
    first, second = ({"hlo_op": "dot", "device_ordinal": i} for i in (0, 1))
    events = [("dot", 0, 4, first), ("dot", 0, 9, second), ("end: dot", 4, 5)]
    data = SimpleNamespace(planes=[plane("/host:CPU", pool=events)])
    assert lines_of(data) == [[Event("dot", 0, 4)]]
    assert lines_of(SimpleNamespace(planes=[])) == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop>", "matrix products"),
        ("gemm_fusion_dot_general_12", "matrix products"),
        ("dot_general.4", "matrix products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma", "attention"),
        ("ncclDevKernel_AllGather_RING_LL", "collectives"),
        ("all-reduce.3", "collectives"),
        ("loop_add_fusion_3", "elementwise and reductions"),
        ("input_reduce_fusion_1", "elementwise and reductions"),
        ("wrapped_transpose", "elementwise and reductions"),
        ("multiply_add_fusion.7", "elementwise and reductions"),
        ("MemcpyD2D", "copies"),
        ("Memset", "copies"),
        ("copy.12", "copies"),
        ("ynn_fusion.2", "other"),
        ("while.3", "other"),
    ],
)
def test_the_kind_of_a_kernel(name, kind):
    assert kind_of(name) == kind


def test_a_table_of_the_longest_kernels_and_the_rest_in_one_row():
    events = [
        Event(f"k{i}|" + 90 * "x", 10 * i * MS, (10 * i + i) * MS) for i in range(1, 6)
    ]
    first, _, *lines = tables("galore", summed([events], 1, 40), most=2).splitlines()
    assert first == (
        "galore: under the profiler a step takes 40.00 ms, "
        "and the device is busy for 15.00 ms of them"
    )
    assert lines[2].startswith("| k5/xxx")
    assert len(lines[2]) < 110
    assert lines[2].endswith("x | 5.00 | 33.33 | 1.00 |")
    assert lines[4] == "| 3 other kernels | 6.00 | 40.00 | 3.00 |"
    assert lines[-1] == "| other | 15.00 | 100.00 | 5.00 |"


def test_a_trace_without_kernels_says_so():
    assert "names no kernel" in tables("adamw", summed([], 1, 2))
