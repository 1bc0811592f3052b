"""20 steps of training on any mesh give what one device gives: losses, router counts, balancing biases.

B batch, S sequence.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from moe_jax.config import AttentionConfig, MeshConfig, ModelConfig, MoEConfig, MTPConfig, OptimizerConfig
from moe_jax.model.definition import Definition
from moe_jax.ops import attention
from moe_jax.sharding import make_mesh, put_batch
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import init_state, make_update
from moe_jax.training.supervised import make_loss, make_totals

pytestmark = pytest.mark.slow

B, S, V, STEPS = 8, 24, 17, 20
MOE = ModelConfig(
    vocab_size=V,
    hidden_size=8,
    num_layers=1,
    first_k_dense=0,
    attention=AttentionConfig(num_heads=2, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4),
    moe=MoEConfig(
        num_experts=4,
        num_experts_per_token=2,
        num_groups=2,
        num_groups_per_token=1,
        expert_size=6,
        sequence_balance_coef=0.1,
        global_balance_coef=0.05,
        z_loss_coef=0.01,
        bias_update_rate=0.01,
    ),
    mtp=MTPConfig(depth=1),
    initializer_range=0.3,
)
DENSE = dataclasses.replace(
    MOE,
    attention=AttentionConfig(kind="gqa", num_heads=4, num_kv_heads=2, head_dim=4),
    moe=MoEConfig(),
    mtp=MTPConfig(),
)


def batches():
    """Rows of a document that crosses the shards' borders, a short one, and padding."""
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        first, end = rng.integers(3, 20, B), rng.integers(20, S + 1, B)
        column_S = np.arange(S)
        segments = np.where(column_S < first[:, None], 1, np.where(column_S < end[:, None], 2, 0)).astype(np.int32)
        positions = np.where(segments == 2, column_S - first[:, None], column_S).astype(np.int32)
        tokens = rng.integers(1, V, (B, S)).astype(np.int32)
        yield {"tokens_BS": tokens, "segment_ids_BS": segments, "positions_BS": positions}


def train(cfg, mesh_cfg):
    mesh, definition = make_mesh(mesh_cfg), Definition.of(cfg)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=3e-3, warmup_steps=1), 100, definition)
    update = make_update(make_loss(definition, (0,)), make_totals(definition), optimizer, balance=cfg.moe)
    history = []
    with jax.set_mesh(mesh):
        state = init_state(definition, optimizer, jax.random.key(0), mesh)
        for batch in batches():
            state, metrics = update(state, put_batch(batch, mesh))
            history.append(jax.device_get(metrics))
    return history, jax.device_get(state.rest)


@pytest.fixture(scope="module")
def alone():
    """What one device gives."""
    return functools.cache(lambda cfg: train(cfg, MeshConfig(data=1)))


@pytest.mark.parametrize(
    ("cfg", "mesh_cfg", "implementation"),
    [
        (MOE, MeshConfig(data=2, fsdp=2, expert=2), "dense"),
        (MOE, MeshConfig(data=1, fsdp=2, expert=2, context=2), "chunked"),
        (DENSE, MeshConfig(data=2, fsdp=2, tensor=2), "dense"),
        (DENSE, MeshConfig(data=1, fsdp=2, context=2, tensor=2), "dense"),
    ],
    ids=[
        "sparse; data, fsdp, expert",
        "sparse; fsdp, expert, context; in blocks",
        "dense; data, fsdp, tensor",
        "dense; fsdp, context, tensor",
    ],
)
def test_twenty_steps_are_those_of_one_device(alone, cfg, mesh_cfg, implementation, monkeypatch):
    expected, expected_biases = alone(cfg)
    if implementation == "chunked":
        monkeypatch.setattr(attention, "_MOST_SCORES", 0)
        monkeypatch.setattr(attention, "_BLOCK", 5)
    actual, biases = train(cfg, mesh_cfg)
    assert len(actual) == STEPS
    for step, (metrics, wanted) in enumerate(zip(actual, expected, strict=True)):
        assert metrics.keys() == wanted.keys()
        for name, value in wanted.items():
            np.testing.assert_allclose(metrics[name], value, rtol=2e-4, atol=2e-6, err_msg=f"{name}, step {step}")
        for room in ("moe", "mtp"):
            load = f"{room}/expert_load"
            np.testing.assert_array_equal(metrics.get(load), wanted.get(load), err_msg=f"{load}, step {step}")
    for name, bias in expected_biases.items():
        np.testing.assert_array_equal(biases[name], bias, err_msg=name)
        assert np.any(bias)
    assert actual[-1]["loss_main"] < actual[0]["loss_main"]
