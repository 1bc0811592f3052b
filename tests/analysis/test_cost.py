"""Prices and rooflines, the published bill of DeepSeek-V3, and what is read from a compiled program's text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe_jax import presets
from moe_jax.analysis.bills import bills, comparison
from moe_jax.analysis.cost import (
    CHIPS,
    Collective,
    Hardware,
    Step,
    bill,
    collective_seconds,
    parse_hardware,
    roofline,
    torus_dimensions,
)
from moe_jax.analysis.flops import training_flops_per_token
from moe_jax.analysis.hlo import collectives
from moe_jax.config import ConfigError

V5P = CHIPS["v5p"]


def test_hardware_from_a_topology_or_from_a_number_of_chips():
    pod = parse_hardware("v5p:8x16x16")
    assert (pod.chips, pod.devices, pod.torus) == (2048, 2048, (8, 16, 16))
    ironwood = parse_hardware("tpu7x:4x4x4")
    assert (ironwood.chips, ironwood.devices) == (64, 128)
    assert ironwood.device.flops == 2307e12 / 2
    assert parse_hardware(chip="h800", chips=2048).torus == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", "", 0), "either --topology"),
        (("v5p:2x2x1", "h800", 8), "either --topology"),
        (("v9:2x2", "", 0), "no chip is named 'v9'"),
        (("h800:2x2", "", 0), "must be a TPU"),
        (("v5p:2xx1", "", 0), "must be a TPU"),
        (("", "h800", 0), "--chips 0"),
    ],
)
def test_wrong_hardware_is_refused_with_the_remedy(arguments, message):
    with pytest.raises(ConfigError, match=message):
        parse_hardware(*arguments)


def test_each_mesh_axis_takes_whole_dimensions_from_the_last_on():
    assert torus_dimensions((8, 8, 8), {"fsdp": 64, "expert": 8}) == {"fsdp": (8, 8), "expert": (8,)}
    assert torus_dimensions((4, 8, 16), {"data": 1, "fsdp": 16, "expert": 8, "tensor": 4}) == {
        "data": (),
        "fsdp": (16,),
        "expert": (8,),
        "tensor": (4,),
    }
    assert torus_dimensions((8, 8, 8), {"fsdp": 128, "expert": 4})["expert"] == ()


def test_collectives_by_hand():
    pod, sizes = Hardware("v5p", V5P, 64, (4, 16)), {"fsdp": 16, "expert": 4}
    gather = Collective("all-gather", ("fsdp",), 16e9, 2)
    assert gather.sent_bytes(16) == 2 * 15e9
    assert collective_seconds(gather, pod, sizes) == pytest.approx(30e9 / (2 * 90e9))
    reduce = Collective("all-reduce", ("expert",), 4e9)
    assert collective_seconds(reduce, pod, sizes) == pytest.approx(6e9 / (2 * 90e9))
    both = Collective("reduce-scatter", ("fsdp", "expert"), 64e9)
    assert collective_seconds(both, pod, sizes) == pytest.approx(63e9 / (4 * 90e9))
    # A quarter of the time in which the ring gathers all that is exchanged (16 x as much).
    exchange = Collective("all-to-all", ("fsdp",), 1e9)
    whole = Collective("all-gather", ("fsdp",), 16e9)
    assert collective_seconds(exchange, pod, sizes) == pytest.approx(collective_seconds(whole, pod, sizes) / 4)
    assert collective_seconds(gather, pod, {"fsdp": 1, "expert": 64}) == 0


def test_a_chip_of_two_devices_adds_a_dimension():
    ironwood, gather = parse_hardware("tpu7x:4x4x4"), Collective("all-gather", ("fsdp",), 1e9)
    assert ironwood.grid == (4, 4, 4, 2)
    assert parse_hardware("v5p:4x4x4").grid == (4, 4, 4)
    # A device has half of its chip's links: two of each ring, and one to the other device.
    seconds = collective_seconds(gather, ironwood, {"fsdp": 128})
    assert seconds == pytest.approx(127 / 128 * 1e9 / ((3 * 2 + 1) * 45e9))
    seconds = collective_seconds(gather, ironwood, {"fsdp": 64, "tensor": 2})
    assert seconds == pytest.approx(63 / 64 * 1e9 / (3 * 2 * 45e9))


def test_a_group_beyond_its_node_goes_over_the_network():
    cluster, reduce = parse_hardware(chip="h800", chips=64), Collective("all-reduce", ("expert",), 1e9)
    inside = collective_seconds(reduce, cluster, {"fsdp": 8, "expert": 8})
    outside = collective_seconds(reduce, cluster, {"fsdp": 4, "expert": 16})
    assert inside == pytest.approx(2 * 7 / 8 * 1e9 / 160e9)
    assert outside == pytest.approx(2 * 15 / 16 * 1e9 / 50e9)


@pytest.mark.parametrize(
    ("step", "bound", "seconds"),
    [
        (Step(459e12, 1.0), "compute", 1.0),
        (Step(1.0, 2 * 2765e9), "hbm", 2.0),
        (Step(1.0, 1.0, (Collective("collective-permute", ("fsdp",), 3 * 180e9),)), "interconnect", 3.0),
    ],
)
def test_the_largest_time_is_the_step_s_and_is_named(step, bound, seconds):
    found = roofline(step, Hardware("v5p", V5P, 4, (4,)), {"fsdp": 4})
    assert (found.bound_by, found.step_seconds) == (bound, pytest.approx(seconds))


def test_deepseek_v3_s_bill():
    """arXiv:2412.19437 table 1, with the 385 TFLOP/s (causal) of arXiv:2505.09343 table 4."""
    speed = 2048 * 385e12 / training_flops_per_token(presets.deepseek_v3(), 4096)
    paid = bill(14.8e12, speed, 2048, CHIPS["h800"].dollars_per_hour)
    assert 2.66e6 <= paid.chip_hours <= 2.69e6
    assert paid.days == pytest.approx(paid.chip_hours / 2048 / 24)
    assert paid.dollars is not None
    assert paid.dollars + 2 * 124e3 == pytest.approx(5.576e6, rel=0.006)


# ---------------------------------------------------------------------------------------------------------------------
# compiled text
# ---------------------------------------------------------------------------------------------------------------------

TPU_TEXT = """HloModule jit_update, is_scheduled=true

%all-reduce-scatter.1 (input: bf16[64,8]) -> bf16[16,8] {
  %input = bf16[64,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-reduce.3 = bf16[64,8]{1,0} all-reduce(%input), replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
}

%condition (param: (s32[], bf16[4])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(26)
  ROOT %lt = pred[]{:T(512)} compare(%get-tuple-element, %constant.1), direction=LT
}

%body (param: (s32[], bf16[4])) -> (s32[], bf16[4]) {
  %all-gather.1 = bf16[1,64,8]{1,0:T(8,128)} all-gather(%x), replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={1}, \
metadata={op_name="jit(update)/while/body/dot_general"}
  %fusion = bf16[16,8]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %reduce-scatter.1 = f32[16,8]{1,0} reduce-scatter(%x), replica_groups=[4,2]<=[8], dimensions={0}, to_apply=%add
}

ENTRY %main (param: bf16[4]) -> f32[] {
  %while.1 = (s32[]{:T(128)}, bf16[4]{0}) while(%tuple), condition=%condition, body=%body, metadata={}
  %all-gather-start = (f32[8]{0}, f32[32]{0}) all-gather-start(%y), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %send = (s32[2,4]{1,0}, s32[2,4]{1,0}, u32[], u32[]) collective-permute-start(%z), \
source_target_pairs={{0,0},{1,0},{3,2}}
  %permuted = f32[4]{0} all-reduce(%y), replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}, to_apply=%add
  ROOT %all-reduce.9 = (f32[]{:T(128)}, f32[3]{0}) all-reduce(%a, %b), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}
"""


def test_collectives_of_a_tpu_program():
    found = collectives(TPU_TEXT, {"fsdp": 4, "expert": 2})
    assert sorted((item.kind, item.axes, item.num_bytes, item.count) for item in found) == sorted(
        [
            ("all-gather", ("fsdp",), 64 * 8 * 2, 26),
            ("reduce-scatter", ("fsdp",), 64 * 8 * 2, 26),
            ("reduce-scatter", ("expert",), 2 * 16 * 8 * 4, 26),
            ("all-gather", ("fsdp",), 32 * 4, 1),
            ("collective-permute", ("expert",), 32, 1),
            ("all-reduce", ("fsdp",), 16, 1),
            ("all-reduce", ("fsdp", "expert"), 16, 1),
        ]
    )
    assert next(item.op_name for item in found if item.count == 26 and item.op_name) == (
        "jit(update)/while/body/dot_general"
    )


def test_collectives_of_a_loop_compiled_here():
    mesh = jax.make_mesh((4, 2), ("fsdp", "expert"), (AxisType.Auto,) * 2)

    def program(x, w):
        def body(x, w):
            return jnp.tanh(x @ w), None

        x, _ = jax.lax.scan(body, x, w)
        return jnp.sum(x)

    x = jax.ShapeDtypeStruct((16, 64), np.float32, sharding=NamedSharding(mesh, PartitionSpec(("fsdp", "expert"))))
    w = jax.ShapeDtypeStruct((5, 64, 64), np.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "fsdp")))
    found = collectives(jax.jit(program).lower(x, w).compile().as_text(), dict(mesh.shape))
    gathered = [item for item in found if item.kind == "all-gather"]
    assert sum(item.num_bytes * item.count for item in gathered) == 5 * 64 * 64 * 4
    assert {item.axes for item in gathered} == {("fsdp",)}
    assert {item.axes for item in found if item.kind == "all-reduce"} <= {("fsdp", "expert"), ("fsdp",), ("expert",)}


def test_the_comparison_s_bills_are_near_what_was_published():
    found = {row["name"]: row for row in bills()}
    sparse, dense, rumoured = found.values()
    assert sparse["chip_hours"] == pytest.approx(sparse["published_chip_hours"], rel=0.01)
    assert sparse["published_dollars"] == pytest.approx(5.576e6) and sparse["dollars"] == pytest.approx(5.6e6, rel=0.01)
    assert dense["chip_hours"] == pytest.approx(dense["published_chip_hours"], rel=0.15)
    assert dense["training_flops"] == pytest.approx(3.8e25, rel=0.02)  # as published, from 6 N D
    assert dense["kilowatt_hours"] == pytest.approx(dense["chip_hours"] * 0.7)
    assert rumoured["published_chip_hours"] is None and "never confirmed" in rumoured["rumour"]
    table = comparison()
    assert "(RUMOUR)" in table and "Rumour: " in table and table.count("(RUMOUR)") == 1


def test_a_bill_adds_hours_and_knows_no_energy_without_watts():
    paid = bill(3600.0, 1.0, 8, 2.0, extra_chip_hours=4.0, watts=500.0)
    assert (paid.chip_hours, paid.dollars, paid.kilowatt_hours) == (12.0, 24.0, 6.0)
    assert bill(3600.0, 1.0, 8, None).kilowatt_hours is None
