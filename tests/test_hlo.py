"""Bytes and collectives of compiled programs: a hand-written text with known sums, and a compiled program
counted by hand.
"""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from medrlvr_jax.plan import hlo

MESH = {"data": 2, "fsdp": 4}

TEXT = """HloModule made_by_hand

%all-reduce-scatter.1 (p: f32[8,16]) -> f32[2,16] {
  %p = f32[8,16]{1,0} parameter(0)
  %all-reduce.9 = f32[8,16]{1,0} all-reduce(%p), channel_id=9, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %dynamic-slice.3 = f32[2,16]{1,0} dynamic-slice(%all-reduce.9, %c), dynamic_slice_sizes={2,16}
}

%inner (p0: f32[36,4,8], p1: s32[]) -> f32[4,8] {
  %p0 = f32[36,4,8]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %slice = f32[4,8]{1,0} dynamic-slice(%p0, %p1), dynamic_slice_sizes={1,4,8}
}

%one_layer (q0: f32[36,4,8], q1: s32[]) -> f32[4,8] {
  %q0 = f32[36,4,8]{2,1,0} parameter(0)
  %q1 = s32[] parameter(1)
  ROOT %within = f32[4,8]{1,0} fusion(%q0, %q1), kind=kLoop, calls=%inner
}

%body (s: (s32[], f32[36,4,8], bf16[4,16])) -> (s32[], f32[36,4,8], bf16[4,16]) {
  %s = (s32[], f32[36,4,8]{2,1,0}, bf16[4,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %stack = f32[36,4,8]{2,1,0} get-tuple-element(%s), index=1
  %x = bf16[4,16]{1,0:T(8,128)(2,1)} get-tuple-element(%s), index=2
  %layer = f32[4,8]{1,0} fusion(%stack, %i), kind=kLoop, calls=%one_layer
  %all-gather.1 = bf16[16,16]{1,0:T(8,128)(2,1)S(1)} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %swap = bf16[4,16]{1,0} collective-permute(%x), channel_id=2, source_target_pairs={{0,4},{4,0}}
  ROOT %t = (s32[], f32[36,4,8]{2,1,0}, bf16[4,16]{1,0}) tuple(%i, %stack, %swap)
}

%condition (s: (s32[], f32[36,4,8], bf16[4,16])) -> pred[] {
  %s = (s32[], f32[36,4,8]{2,1,0}, bf16[4,16]{1,0}) parameter(0)
  %n = s32[]{:T(128)} constant(36)
  %i = s32[] get-tuple-element(%s), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: f32[8,16], s: (s32[], f32[36,4,8], bf16[4,16])) -> f32[2,16] {
  %a = f32[8,16]{1,0} parameter(0)
  %s = (s32[], /*index=1*/f32[36,4,8]{2,1,0}, bf16[4,16]{1,0}) parameter(1)
  %loop = (s32[], f32[36,4,8]{2,1,0}, bf16[4,16]{1,0}) while(%s), condition=%condition, body=%body
  %sum = f32[8,16]{1,0} all-reduce(%a), channel_id=3, replica_groups=mesh['x'=2,'y'=4] {'x'}, to_apply=%add
  ROOT %out = f32[2,16]{1,0} fusion(%sum), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_collectives_by_kind_axis_and_trip_count():
    """Bytes are those that each device receives. A gather in a loop of 36 counts 36 times."""
    found = {(c.kind, c.axis, c.group): c.bytes for c in hlo.read_traffic(TEXT, MESH).collectives}
    shard, whole = 4 * 16 * 2, 8 * 16 * 4
    assert found == {
        ("all-gather", "fsdp", 4): 36 * 3 * shard,
        ("collective-permute", "data", 2): 36 * shard,
        ("all-reduce", "data", 2): 2 * whole / 2,
        ("reduce-scatter", "fsdp", 4): whole * 3 / 4,
    }


def test_attributes_of_several_lines_end_no_computation():
    """A Pallas kernel has such attributes. The instructions after it were once lost."""
    kernel = '  %kernel = f32[8]{0} custom-call(%s), frontend_attributes={kernel_metadata={\n"xprof_metadata":"{}"\n}}, metadata={op_name="x"}\n'
    body = "%body (s:" + TEXT.split("%body (s:")[1]
    head, rest = body.split("\n", 1)
    found = hlo.read_traffic(TEXT.replace(body, head + "\n" + kernel + rest), MESH)
    assert found.collectives == hlo.read_traffic(TEXT, MESH).collectives


def test_traffic_excludes_on_chip_memory():
    """The loop reads and writes a layer of its stack (128 B each), reads the gather's input (its result is in
    S(1)), and swaps.
    """
    layer, shard, whole = 4 * 8 * 4, 4 * 16 * 2, 8 * 16 * 4
    loop = (2 * layer + 4) + shard + 2 * shard  # + 4: the counter
    assert hlo.read_traffic(TEXT, MESH).bytes == 36 * loop + 2 * whole + (whole + whole / 4)


@pytest.mark.parametrize(
    ("text", "first", "number"),
    [
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}, x", [0, 4], 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", [0, 4], 4),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", [0, 4], 4),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=4], device_ids=([4,2]T(1,0)) {'a'}, x", [0, 1], 4),
        ("replica_groups={}, x", [0, 1, 2, 3, 4, 5, 6, 7], 1),
    ],
)
def test_device_groups_are_parsed_in_each_form(text, first, number):
    groups = hlo.device_groups(text, 8).tolist()
    assert groups[0] == first and len(groups) == number


def test_a_counter_that_moves_by_two():
    """XLA unrolls some loops once. The counter then reaches 36 in 18 iterations."""
    text = TEXT.replace("tuple(%i, %stack, %swap)", "tuple(%next, %stack, %swap)")
    text = text.replace(
        "  ROOT %t =", "  %two = s32[] constant(2)\n  %next = s32[] add(%i, %two)\n  ROOT %t ="
    )
    computations, _ = hlo.parse(text)
    assert hlo.trip_count(computations, "condition", "body") == 18
    assert hlo.trip_count(hlo.parse(TEXT)[0], "condition", "body") == 36
    assert hlo.trip_count(computations, "condition", "body", '"known_trip_count":{"n":"7"}') == 7


def test_an_unknown_form_of_groups_is_refused():
    with pytest.raises(ValueError, match="not known"):
        list(hlo.device_groups("replica_groups=@somewhere", 8))


def test_a_compiled_scan_counted_by_hand():
    """Five layers under `scan` have weights sharded over 4. Each iteration gathers one layer of 64 × 64
    float32.
    """
    mesh = Mesh([jax.devices()[:4]], ("data", "fsdp"))
    place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))

    def f(stack, x):
        def layer(x, w):
            return jnp.tanh(x @ jax.lax.with_sharding_constraint(w, place())), None

        return jax.lax.scan(layer, x, stack)[0]

    stack = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=place(None, "fsdp"))
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=place("fsdp"))
    moved = hlo.read_traffic(jax.jit(f).lower(stack, x).compile().as_text(), {"data": 1, "fsdp": 4})
    assert moved.collectives == [hlo.Collective("all-gather", "fsdp", 4, 5 * 64 * 64 * 4 * 3 / 4)]
    weights = 5 * 64 * 64 * 4
    # each layer is read as a shard, written whole and read whole; states are small
    assert weights < moved.bytes < 8 * weights


def test_a_converted_slice_is_read_in_the_dtype_of_memory():
    """One of 36 layers of 32 bytes is read and converted: 32 bytes read, 4 of the counter, 128 written."""
    text = """HloModule m
%tiles (t: s8[36,4,8]) -> s8[36,4,8] {
  ROOT %t = s8[36,4,8]{2,1,0} parameter(0)
}

%inner (p0: s8[36,4,8], p1: s32[]) -> f32[4,8] {
  %p0 = s8[36,4,8]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %tiled = s8[36,4,8]{2,1,0:T(8,128)(4,1)} fusion(%p0), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%tiles
  %wide = f32[36,4,8]{2,1,0} convert(%tiled)
  ROOT %slice = f32[4,8]{1,0} dynamic-slice(%wide, %p1), dynamic_slice_sizes={1,4,8}
}

ENTRY %main (a: s8[36,4,8], i: s32[]) -> f32[4,8] {
  %a = s8[36,4,8]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %layer = f32[4,8]{1,0} fusion(%a, %i), kind=kLoop, calls=%inner
}
"""
    assert hlo.read_traffic(text, {"data": 1}).bytes == 32 + 4 + 128
