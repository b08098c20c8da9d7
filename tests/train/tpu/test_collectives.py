"""What a compiled program sends, counted from its text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from train.tpu.collectives import bytes_of, group_size, traffic_of
from train.tpu.topology import chips_of

# As a compiler for TPUs writes them, much shortened: one all-gather in three pieces
# within a loop of six turns, a reduce-scatter as a fusion, a permute in two halves, a
# conditional, and a loop that goes on until the data say so.
PROGRAM = """HloModule step, is_scheduled=true

%piece.1 (p: bf16[8,64]) -> bf16[32,64] {
  %p = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[32,64]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
}

%piece.2 (p: bf16[8,64]) -> bf16[32,64] {
  %p = bf16[8,64]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[32,64]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
}

%body (t: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %t = (s32[], bf16[8,64]{1,0}) parameter(0)
  %x = bf16[8,64]{1,0} get-tuple-element(%t), index=1
  %start = bf16[32,64]{1,0} fusion(%x), kind=kCustom, calls=%piece.1
  %end = bf16[32,64]{1,0} fusion(%x), kind=kCustom, calls=%piece.2
  ROOT %again = (s32[], bf16[8,64]{1,0}) tuple(%x, %x)
}

%until (t: (s32[], bf16[8,64])) -> pred[] {
  %six = s32[]{:T(128)} constant(6)
  %t = (s32[], bf16[8,64]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %six), direction=LT
}

%all-reduce-scatter.3 (p: f32[100,8]) -> f32[25,8] {
  %p = f32[100,8]{1,0} parameter(0)
  %all-reduce.3 = f32[100,8]{1,0} all-reduce(%p), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %cut = f32[25,8]{1,0} dynamic-slice(%all-reduce.3), dynamic_slice_sizes={25,8}
}

%small (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %all-reduce.4 = f32[4]{0} all-reduce(%p), channel_id=4, replica_groups=[1,8]<=[8], to_apply=%add
}

%large (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %all-reduce.5 = (f32[4]{0}, f32[12]{0}) all-reduce(%p, %p), channel_id=5, replica_groups=[2,4]<=[8], to_apply=%add
}

%search (t: (f32[4])) -> (f32[4]) {
  %t = (f32[4]{0}) parameter(0)
  %to-all = f32[4]{0} all-to-all(%t), channel_id=6, replica_groups={{0,1}}, dimensions={0}
  ROOT %again = (f32[4]{0}) tuple(%to-all)
}

%found (t: (f32[4])) -> pred[] {
  %t = (f32[4]{0}) parameter(0)
  ROOT %done = pred[] custom-call(%t), custom_call_target="x"
}

ENTRY %main (p: f32[100,8]) -> f32[25,8] {
  %p = f32[100,8]{1,0} parameter(0)
  %while.1 = (s32[], bf16[8,64]{1,0}) while(%p), condition=%until, body=%body
  %while.2 = (f32[4]{0}) while(%p), condition=%found, body=%search
  %either = f32[4]{0} conditional(%p, %p, %p), branch_computations={%small, %large}
  %begun = (f32[100,8]{1,0}, f32[100,8]{1,0}, u32[], u32[]) collective-permute-start(%p), channel_id=9, source_target_pairs={{0,1},{1,0}}
  %moved = f32[100,8]{1,0} collective-permute-done(%begun)
  ROOT %out = f32[25,8]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.3
}
"""  # noqa: E501


def test_pieces_are_one_and_loops_count_their_turns():
    traffic = traffic_of(PROGRAM)
    assert traffic.by_kind() == {
        # Of s bytes over n chips s (n - 1) / n, and of an all-reduce twice that.
        "all-gather": (6, 6 * 32 * 64 * 2 * 3 / 4),
        "reduce-scatter": (1, 100 * 8 * 4 * 3 / 4),
        "all-reduce": (1, 2 * 16 * 4 * 3 / 4),  # of the branches the larger
        "all-to-all": (1, 4 * 4 / 2),
        "collective-permute": (1, 100 * 8 * 4),
    }
    assert traffic.unknown_loops == {"while.2"}
    sent = [sent for _, sent in traffic.by_kind().values()]
    assert traffic.sent == sum(sent)


def test_pieces_in_several_loops_are_one():
    entry = "ROOT %out = f32"
    more = "%while.3 = (s32[], bf16[8,64]{1,0}) while(%p), condition=%until, body=%body"
    text = PROGRAM.replace(entry, f"{more}\n  {entry}")
    assert traffic_of(text).by_kind()["all-gather"] == (1, 32 * 64 * 2 * 3 / 4)


def test_one_channel_may_have_collectives_of_several_sizes():
    text = PROGRAM.replace("channel_id=9", "channel_id=3")
    assert traffic_of(text).by_kind() == traffic_of(PROGRAM).by_kind()
    text = text.replace("collective-permute-start(%p)", "all-reduce-start(%p)")
    text = text.replace("collective-permute-done", "all-reduce-done")
    text = text.replace("source_target_pairs={{0,1},{1,0}}", "replica_groups={{0,1}}")
    assert traffic_of(text).by_kind()["all-reduce"][0] == 2


def test_what_a_reduce_scatter_takes_is_counted():
    text = PROGRAM.replace("all-reduce(%p), channel_id=4", "reduce-scatter(%p), x=1")
    text = text.replace("{%small, %large}", "{%small, %small}")
    # 4 numbers for each of 8 chips: the operand has 32.
    sent = [x.sent for x in traffic_of(text).moved.values() if x.times == 1]
    assert 32 * 4 * 7 / 8 in sent


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,2},{1,3}}", 2),
        ("{{0,1,2,3}}", 4),
        ("[16,16]<=[16,16]T(1,0)", 16),
        ("mesh['a'=4,'b'=1,'c'=2] {'a','b'}", 4),
        ("mesh['a'=4,'b'=8] {'b':(2)4}", 4),
        ("mesh['a'=4,'b'=8] {'a','b':(1)2}", 8),
        ("mesh['a'=1,'b'=4,'c'=4], device_ids=([4,4]T(1,0)) {'b','c'}", 16),
    ],
)
def test_the_size_of_a_group(groups, size):
    text = f"all-gather(%x), channel_id=1, replica_groups={groups}, dimensions={{0}}"
    assert group_size(text) == size


def test_groups_that_cannot_be_read_are_an_error():
    with pytest.raises(ValueError, match="cannot be read: all-gather"):
        group_size("all-gather(%x), replica_groups=new{form}")


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[8,128]{1,0:T(8,128)S(1)}", 4096),
        ("(f32[8,128]{1,0}, bf16[], /*index=2*/pred[3]{0})", 4096 + 2 + 3),
        ("f8e4m3fn[5]", 5),
        ("s4[6]", 3),
        ("token[]", 0),
    ],
)
def test_the_bytes_of_a_shape(shape, size):
    assert bytes_of(shape) == size


@pytest.mark.slow
def test_a_tpu_program_sends_what_it_must():
    """Fully sharded layers in a scan: gathered twice, and each gradient summed once."""
    pytest.importorskip("libtpu", reason="libtpu is for Linux on x86-64 only")
    mesh = Mesh(np.array(chips_of("v5e:2x2")), ("x",))

    def loss(weights: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), 0), x, weights)[0])

    def like(shape: tuple[int, ...], *cut: str | None) -> jax.ShapeDtypeStruct:
        own = NamedSharding(mesh, P(*cut))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=own)

    weights, x = like((6, 256, 256), None, "x"), like((64, 256), "x")
    gradient = jax.jit(jax.grad(loss), out_shardings=weights.sharding)
    traffic = traffic_of(gradient.lower(weights, x).compile().as_text() or "")
    # Products are in bfloat16 there, and so the weights are moved; gradients are not.
    matrix, ring = 256 * 256, 3 / 4
    assert traffic.by_kind() == {
        "all-gather": (12, 12 * matrix * 2 * ring),
        "reduce-scatter": (6, 6 * matrix * 4 * ring),
    }
    assert not traffic.unknown_loops
