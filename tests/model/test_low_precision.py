"""Models whose products are quantised: what is rounded and what is not, the formula, gradients, and the same on meshes.

T tokens, D inputs, F outputs.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from moe_jax.config import (
    AttentionConfig,
    ConfigError,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    TrainConfig,
    at_precision,
)
from moe_jax.model.definition import Definition
from moe_jax.model.layers import Initializer, linear
from moe_jax.sharding import make_mesh, put_batch
from moe_jax.training.supervised import make_loss, make_totals

MLA = AttentionConfig(
    num_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8
)
CONFIG = ModelConfig(
    vocab_size=40,
    hidden_size=32,
    num_layers=2,
    intermediate_size=32,
    attention=MLA,
    moe=MoEConfig(num_experts=4, num_experts_per_token=2, num_shared_experts=1, expert_size=16),
    mtp=MTPConfig(depth=1),
    initializer_range=0.2,
    quantization_block=8,
)
PRECISIONS = ("fp8", "int8", "int4")


def make_batch():
    tokens_BS = np.random.default_rng(0).integers(1, 40, (8, 16)).astype(np.int32)
    positions_BS = np.broadcast_to(np.arange(16, dtype=np.int32), tokens_BS.shape)
    return {"tokens_BS": tokens_BS, "segment_ids_BS": np.ones_like(tokens_BS), "positions_BS": positions_BS}


@functools.cache
def loss_and_gradient(precision, mesh_cfg=MeshConfig(data=1)):  # noqa: B008 (frozen)
    plain = Definition.of(CONFIG)
    definition, mesh = plain.at(precision), make_mesh(mesh_cfg)
    with jax.set_mesh(mesh):
        params, rest = plain.init(jax.random.key(0), mesh)
        batch = put_batch(make_batch(), mesh)

        @jax.jit
        def both(params):
            totals = make_totals(definition)(params, rest, batch, 1)
            return jax.value_and_grad(lambda p: make_loss(definition)(p, rest, batch, totals).loss)(params)

        loss, gradient = jax.device_get(both(params))
    return float(loss), gradient


def distance(a, b):
    """Of two dictionaries of arrays, relative to the second's length."""
    return np.sqrt(sum(np.sum((a[k] - b[k]) ** 2) for k in b) / sum(np.sum(b[k] ** 2) for k in b))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_loss_moves_a_little_and_every_weight_gets_its_gradient(precision):
    exact, exact_gradient = loss_and_gradient("model")
    loss, gradient = loss_and_gradient(precision)
    bound = {"fp8": 0.01, "int8": 0.005, "int4": 0.05}[precision]
    assert 0 < abs(loss - exact) < bound * exact
    assert 0.001 < distance(gradient, exact_gradient) < 0.6
    for name, g in gradient.items():
        assert np.all(np.isfinite(g)) and np.any(g), name


@pytest.mark.parametrize("precision", ["fp8", "int4"])
@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=2, fsdp=2, tensor=2),
        MeshConfig(data=2, expert=4),
        MeshConfig(data=1, fsdp=2, expert=2, context=2),
    ],
    ids=["fsdp-tensor", "expert", "context"],
)
def test_eight_devices_compute_what_one_computes(precision, mesh):
    """Blocks lie within shards here. In the weights' gradients blocks are of tokens, whose order the mesh decides."""
    loss, gradient = loss_and_gradient(precision)
    sharded, sharded_gradient = loss_and_gradient(precision, mesh)
    _, exact = loss_and_gradient("model")
    assert sharded == pytest.approx(loss, rel=2e-4)
    # Rounding itself moves the gradient; the mesh moves it by less.
    assert distance(sharded_gradient, gradient) < 0.35 * distance(gradient, exact)


def test_matrices_of_blocks_are_quantised_and_nothing_else():
    variables = Definition.of(dataclasses.replace(CONFIG, quantization="fp8")).variables
    quantised = {name for name, v in variables.items() if v.get_metadata().get("quantization") is not None}
    assert {name.split(".")[-1] for name in quantised} == {
        *("query_a_DQ", "query_b", "key_value_a_DC", "key_value_b_CHN", "output_HVD"),
        *("gate_up_D2F", "down_FD", "gate_up_ED2F", "down_EFD", "projection_N2DD"),
    }
    kept = {name.split(".")[-1] for name in variables} - {name.split(".")[-1] for name in quantised}
    assert kept == {"embed_VD", "head_DV", "weight", "gate_DE", "bias"}


def rounded_like_the_report(x, axis, width):
    """E4M3 with a scale for each run of `width` numbers along the axis, in float64, by ml_dtypes."""
    x = np.moveaxis(np.asarray(x, np.float64), axis, -1)
    blocks = x.reshape(*x.shape[:-1], -1, width)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / 448
    values = (blocks / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale
    return np.moveaxis(values.reshape(x.shape), -1, axis)


def test_a_linear_map_is_the_product_of_rounded_operands_in_all_three_directions():
    """Weights with blocks of 8 x 8 against a formula; x in 1 x 8 along inputs, dy along outputs, both along tokens."""
    cfg = dataclasses.replace(CONFIG, quantization="fp8")
    w = Initializer(cfg, nnx.Rngs(0)).weight((16, 2, 12), ("embed", None, "mlp"), "ioo")
    rng = np.random.default_rng(1)
    x_BSD, dy_BSF = (rng.normal(size=(2, 4, *shape)).astype(np.float32) for shape in ((16,), (2, 12)))
    y, pull = jax.vjp(linear, jnp.asarray(x_BSD), w)
    dx, dw = pull(jnp.asarray(dy_BSF))

    x_TD, dy_TF, w_DF = x_BSD.reshape(8, 16), dy_BSF.reshape(8, 24), np.asarray(w[...], np.float64).reshape(16, 24)
    tiles = np.abs(w_DF).reshape(2, 8, 3, 8).max(axis=(1, 3)) / 448
    scale_DF = np.repeat(np.repeat(tiles, 8, axis=0), 8, axis=1)
    w_DF = (w_DF / scale_DF).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale_DF
    x_quantised = rounded_like_the_report(x_TD, 1, 8)
    np.testing.assert_allclose(y.reshape(8, 24), x_quantised @ w_DF, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dx.reshape(8, 16), rounded_like_the_report(dy_TF, 1, 8) @ w_DF.T, rtol=1e-4, atol=1e-4)
    # What the forward pass kept in 8 bits is rounded again, along the tokens.
    again = rounded_like_the_report(x_quantised, 0, 8).T @ rounded_like_the_report(dy_TF, 0, 8)
    error = np.abs(dw[...].reshape(16, 24) - again) / np.abs(again).max()
    assert np.median(error) < 1e-5 and error.max() < 0.02  # float32 scales may round a tie elsewhere


def test_four_bits_round_weights_alone_and_pass_gradients_straight_through():
    cfg = dataclasses.replace(CONFIG, quantization="int4")
    w = Initializer(cfg, nnx.Rngs(0)).weight((16, 12), ("embed", "mlp"), "io")
    x_BSD = np.random.default_rng(1).normal(size=(1, 3, 16)).astype(np.float32)
    w_DF = np.asarray(w[...], np.float64).reshape(2, 8, 12)
    scale = np.abs(w_DF).max(axis=1, keepdims=True) / 7
    w_DF = (np.round(w_DF / scale) * scale).reshape(16, 12)
    y, pull = jax.vjp(linear, jnp.asarray(x_BSD), w)
    dx, dw = pull(jnp.ones_like(y))
    np.testing.assert_allclose(y[0], x_BSD[0] @ w_DF, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dx[0], np.ones((3, 12)) @ w_DF.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dw[...], x_BSD[0].T @ np.ones((3, 12)), rtol=1e-4, atol=1e-5)


def test_precisions_name_arithmetic():
    bf16 = dataclasses.replace(CONFIG, dtype="bfloat16")
    assert at_precision(bf16, "model") == bf16
    assert at_precision(bf16, "fp32") == CONFIG
    assert at_precision(CONFIG, "bf16") == bf16
    assert at_precision(bf16, "fp8") == dataclasses.replace(bf16, quantization="fp8")
    assert at_precision(dataclasses.replace(CONFIG, quantization="int4"), "fp32") == CONFIG
    definition = Definition.of(CONFIG)
    assert definition.at("model") is definition and definition.at("fp32") is definition
    quantised = definition.at("int8")
    assert quantised.cfg.quantization == "int8" and quantised.param_names == definition.param_names


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: TrainConfig(precision="fp16"), "TrainConfig.precision = 'fp16'.*did you mean"),
        (lambda: ModelConfig(quantization="fp4"), "ModelConfig.quantization = 'fp4'.*did you mean"),
        (lambda: ModelConfig(quantization_block=-1), "quantization_block = -1"),
        (lambda: ModelConfig(quantization="int4", quantization_block=0), "quantization_block = 0.*greater than 0"),
    ],
)
def test_illegal_values_are_named(build, words):
    with pytest.raises(ConfigError, match=words):
        build()
