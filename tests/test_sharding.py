"""The mesh and the table from logical to mesh axes, on 8 simulated devices."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.config import AttentionConfig, ConfigError, MeshConfig, ModelConfig, MoEConfig, MTPConfig
from moe_jax.model.definition import Definition
from moe_jax.sharding import (
    RULES,
    balanced,
    constrain,
    in_order,
    make_mesh,
    partition_spec,
    put_batch,
    sum_of_shards,
    table_rows,
    token_axes,
    token_shards,
)

MESH = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))


def test_free_axis_takes_the_devices_that_are_left():
    assert dict(make_mesh(MeshConfig()).shape) == {"data": 8, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1}
    assert dict(make_mesh(MeshConfig(data=2, fsdp=-1, tensor=2)).shape)["fsdp"] == 2
    assert make_mesh(MeshConfig(data=1)).size == 1


def test_meshes_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"MeshConfig.data = -1.*take 3 devices each.*the 8 there are"):
        make_mesh(MeshConfig(fsdp=3))
    with pytest.raises(ConfigError, match="needs 16 devices, there are 8"):
        make_mesh(MeshConfig(data=16))


def test_a_mesh_that_leaves_a_process_out_is_refused():
    devices = [SimpleNamespace(process_index=n // 2) for n in range(4)]
    with pytest.raises(ConfigError, match="needs 2 of the 4 devices and leaves some of the 2 processes"):
        make_mesh(MeshConfig(data=2), devices)


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("embed", "mlp"), (4, 6), PartitionSpec("fsdp", "tensor")),
        (("embed", "mlp"), (3, 4, 6), PartitionSpec(None, "fsdp", "tensor")),
        (("embed", "mlp"), (5, 6), PartitionSpec(None, "tensor")),
        (("expert", "embed", "mlp"), (4, 4, 4), PartitionSpec("expert", "fsdp", "tensor")),
        (("embed", None), (4, 4), PartitionSpec("fsdp", None)),
        (("batch", "sequence", "activation"), (8, 5, 4), PartitionSpec(("data", "fsdp", "expert"), None, None)),
        (("batch", "sequence"), (6, 5), PartitionSpec(None, None)),
        ((), (7,), PartitionSpec(None)),
    ],
)
def test_partition_spec(axes, shape, expected):
    assert partition_spec(axes, shape, MESH) == expected


def test_axes_of_one_device_are_replicated():
    assert partition_spec(("embed", "mlp"), (4, 4), make_mesh(MeshConfig(data=8))) == PartitionSpec(None, None)


def test_every_weight_names_known_axes_for_its_own_dimensions():
    for kind in ("mla", "gqa"):
        options = {"q_lora_rank": 8} if kind == "mla" else {"qkv_bias": True, "qk_norm": "head"}
        attention = AttentionConfig(kind=kind, **options)
        cfg = ModelConfig(attention=attention, moe=MoEConfig(num_experts=4, num_shared_experts=1), mtp=MTPConfig(1))
        definition = Definition.of(cfg)
        for name in definition.param_names:
            variable = definition.variables[name]
            metadata = variable.get_metadata()
            axes = metadata["axes"]
            assert set(axes) <= {None, *RULES}, name
            stacked = name.startswith(("dense_blocks", "moe_blocks", "mtp.blocks", "mtp.embedding", "mtp.hidden"))
            stacked |= name.startswith("mtp.output")
            assert len(variable.shape) == len(axes) + stacked, name
            assert len(metadata["roles"]) in (0, len(axes)), name


def test_large_weights_are_created_in_shards():
    cfg = ModelConfig(num_layers=2, moe=MoEConfig(num_experts=4, expert_size=8))
    definition = Definition.of(cfg)
    shardings, rest = definition.shardings(MESH)
    experts = shardings["moe_blocks.ffn.experts.gate_up_ED2F"]
    assert experts.spec == PartitionSpec(None, "expert", "fsdp", None, "tensor")
    assert rest["moe_blocks.ffn.router.bias"].is_fully_replicated


def test_batches_are_divided_by_rows_where_that_goes_up():
    even, odd = np.arange(24).reshape(8, 3), np.arange(9).reshape(3, 3)
    batch = put_batch({"even": even, "odd": odd}, MESH)
    assert batch["even"].sharding.shard_shape((8, 3)) == (2, 3)
    assert batch["odd"].sharding.is_fully_replicated
    np.testing.assert_array_equal(batch["even"], even)
    np.testing.assert_array_equal(batch["odd"], odd)


CONTEXT = make_mesh(MeshConfig(data=1, fsdp=2, context=4))


@pytest.mark.parametrize(
    ("shape", "axes", "shards"),
    [
        ((2, 16), ("batch", "sequence"), (2, 4)),
        ((8, 1), ("rows", None), (8, 1)),  # decoding
        ((8, 12), ("rows", None), (8, 1)),
        ((2, 12), ("batch", None), (2, 1)),
        ((3, 16), ("batch", "sequence"), (1, 4)),
    ],
)
def test_context_divides_columns_or_else_rows(shape, axes, shards):
    assert token_axes(shape, CONTEXT) == axes and token_axes(shape, MESH) == ("batch", "sequence")
    with jax.set_mesh(CONTEXT):
        assert token_shards(shape) == shards
    x = np.arange(np.prod(shape)).reshape(shape)
    placed = put_batch({"x": x}, CONTEXT)["x"]
    np.testing.assert_array_equal(placed, x)
    assert placed.sharding.shard_shape(shape) == (shape[0] // shards[0], shape[1] // shards[1])


@pytest.mark.parametrize("devices", [2, 3, 4])
def test_balanced_columns_pair_early_with_late_chunks(devices):
    x = np.arange(4 * devices)[None]
    with jax.set_mesh(make_mesh(MeshConfig(data=1, context=devices))):
        there = jax.jit(balanced)(x)
        back = jax.jit(in_order)(there)
    first, last = (np.arange(2 * devices).reshape(-1, 2) + shift for shift in (0, 2 * devices))
    np.testing.assert_array_equal(there[0], np.stack([first, last[::-1]], axis=1).reshape(-1))
    np.testing.assert_array_equal(back, x)
    assert len(there.sharding.device_set) == devices


def test_constrain_is_nothing_without_a_mesh_and_a_constraint_with_one():
    x = jnp.zeros((8, 4))
    assert constrain(x, "batch", "activation") is x
    with jax.set_mesh(MESH):
        y = jax.jit(lambda x: constrain(x, "batch", "activation"))(x)
    assert y.sharding.shard_shape(y.shape) == (2, 4)


@pytest.mark.parametrize("vocabulary", [16, 17])
@pytest.mark.parametrize(
    "axes", [{"fsdp": 8}, {"fsdp": 2, "expert": 2, "tensor": 2}, {"data": 2, "fsdp": 2, "context": 2}]
)
def test_rows_of_a_table_that_no_device_holds_in_whole(vocabulary, axes):
    rng, mesh = np.random.default_rng(0), make_mesh(MeshConfig(**{"data": 1, **axes}))
    table_VD = rng.normal(size=(vocabulary, 16)).astype(np.float32)
    tokens_BS = rng.integers(0, vocabulary, (8, 8)).astype(np.int32)
    weight_BSD = rng.normal(size=(8, 8, 16)).astype(np.float32)
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, partition_spec(("vocab", "embed"), table_VD.shape, mesh))
        table, tokens = jax.device_put(table_VD, place), put_batch({"tokens_BS": tokens_BS}, mesh)["tokens_BS"]

        def loss(table):
            x_BSD = table_rows(table, tokens, jnp.float32)
            return jnp.sum(x_BSD * weight_BSD), x_BSD

        program = jax.jit(jax.grad(loss, has_aux=True)).lower(table).compile()
        gradient_VD, x_BSD = program(table)
    np.testing.assert_array_equal(x_BSD, table_VD[tokens_BS])
    expected_VD = np.zeros_like(table_VD)
    np.add.at(expected_VD, tokens_BS, weight_BSD)
    np.testing.assert_allclose(gradient_VD, expected_VD, rtol=1e-4, atol=1e-5)
    assert gradient_VD.sharding.is_equivalent_to(place, 2)
    assert f"f32[{vocabulary},16]" not in program.as_text()


@pytest.mark.parametrize("axes", [{"data": 8}, {"fsdp": 2, "expert": 2, "tensor": 2}, {"fsdp": 2, "context": 4}])
def test_sums_of_shards_are_scattered_at_once(axes):
    mesh = make_mesh(MeshConfig(**{"data": 1, **axes}))
    shards = 8 // mesh.shape["tensor"]
    x_RDV = np.random.default_rng(0).normal(size=(shards, 16, 24)).astype(np.float32)
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, PartitionSpec(RULES["rows"], None, None))
        program = jax.jit(lambda x_RDV: sum_of_shards(x_RDV, "embed", "vocab"))
        total_DV = program(jax.device_put(x_RDV, place))
        expected = NamedSharding(mesh, partition_spec(("embed", "vocab"), (16, 24), mesh))
        assert total_DV.sharding.is_equivalent_to(expected, 2)
        np.testing.assert_allclose(program(x_RDV[:1]), x_RDV[0])  # of a batch that is not divided
    np.testing.assert_allclose(total_DV, x_RDV.sum(axis=0), rtol=1e-5, atol=1e-6)
