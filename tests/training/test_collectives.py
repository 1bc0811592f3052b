"""What a training step communicates, read from the compiled program: nothing is gathered that should stay divided.

Numbers alone would not show it: a program that gathers all weights or activations gives the same losses.
"""

import dataclasses
import math
from collections import Counter

import jax
import numpy as np
import pytest

from moe_jax.analysis.hlo import collectives
from moe_jax.config import MeshConfig, MTPConfig, OptimizerConfig
from moe_jax.model.definition import Definition
from moe_jax.presets import tiny_moe
from moe_jax.sharding import make_mesh, put_batch
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import init_state, make_update
from moe_jax.training.supervised import make_loss, make_totals

pytestmark = pytest.mark.slow

CONFIG = dataclasses.replace(tiny_moe(), num_layers=4, mtp=MTPConfig(depth=0))
DEFINITION = Definition.of(CONFIG)
SHAPE = (8, 64)
PARAMETERS = sum(4 * math.prod(DEFINITION.variables[name].shape) for name in DEFINITION.param_names)
LARGEST = 4 * CONFIG.moe.num_experts * 2 * CONFIG.hidden_size * CONFIG.moe.expert_size
"""Bytes of one layer's largest weight, the experts' gate and up."""
ACTIVATIONS = 4 * SHAPE[0] * SHAPE[1] * CONFIG.hidden_size
"""Bytes of the whole batch's hidden states."""


def step_collectives(**sizes):
    mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}))
    optimizer = make_optimizer(OptimizerConfig(), 100, DEFINITION)
    update = make_update(make_loss(DEFINITION), make_totals(DEFINITION), optimizer, balance=CONFIG.moe)
    ones = np.ones(SHAPE, np.int32)
    with jax.set_mesh(mesh):
        state = init_state(DEFINITION, optimizer, jax.random.key(0), mesh)
        batch = put_batch({"tokens_BS": ones, "segment_ids_BS": ones, "positions_BS": ones}, mesh)
        hlo = update.lower(state, batch).compile().as_text()
    return [found for found in collectives(hlo, dict(mesh.shape)) if found.axes]


def total(found, kind):
    return sum(c.num_bytes * c.count for c in found if c.kind == kind)


def test_data_parallelism_adds_each_gradient_once_and_does_nothing_else():
    found = step_collectives(data=8)
    assert {c.kind for c in found} == {"all-reduce"}
    assert PARAMETERS <= total(found, "all-reduce") <= 1.001 * PARAMETERS


def test_fsdp_gathers_layer_by_layer_for_each_pass():
    found = step_collectives(fsdp=8)
    assert max(c.num_bytes for c in found) <= LARGEST
    assert 0.9 * PARAMETERS <= total(found, "all-gather") <= 2 * PARAMETERS  # forward and backward
    # Experts' gradients are scattered to their shards; the all-to-all are two moves of one activation.
    assert total(found, "reduce-scatter") >= 0.5 * PARAMETERS
    assert total(found, "all-to-all") < ACTIVATIONS


def test_expert_parallelism_moves_tokens_and_not_experts():
    found = step_collectives(data=2, fsdp=2, expert=2)
    over_expert = [c for c in found if c.axes == ("expert",)]
    names = Counter(c.kind for c in over_expert)
    assert names["all-gather"] and names["reduce-scatter"]  # dispatch and combination
    tokens = ACTIVATIONS // 4  # those of the two shards that exchange theirs
    assert max(c.num_bytes for c in over_expert) <= 2 * tokens
    assert not [c for c in over_expert if "experts/shard_map" not in c.op_name and c.num_bytes > ACTIVATIONS // 8]
    gathered_over_data = [c for c in found if c.kind == "all-gather" and "data" in c.axes]
    assert sum(c.num_bytes * c.count for c in gathered_over_data) <= ACTIVATIONS
    assert max(c.num_bytes for c in found) <= LARGEST


def test_context_parallelism_gathers_latents_and_nothing_of_all_pairs():
    found = [c for c in step_collectives(fsdp=2, expert=2, context=2) if "context" in c.axes]
    entries = 4 * SHAPE[0] // 4 * SHAPE[1] * (CONFIG.attention.kv_lora_rank + CONFIG.attention.qk_rope_head_dim)
    in_attention = [
        c for c in found if c.kind == "all-gather" and "attention" in c.op_name and c.num_bytes > entries // 8
    ]
    # A shard's rows, in each layer's forward and backward pass (the dense layer's is one); gradients are scattered.
    assert total(in_attention, "all-gather") == (2 * CONFIG.num_layers - 1) * entries
    assert total(found, "reduce-scatter") == CONFIG.num_layers * entries
    # Besides: the embedding's rows, gradients of weights, and hidden states on their way back to the order of tokens.
    others = [c for c in found if c.kind != "all-reduce" and c not in in_attention and c.kind != "reduce-scatter"]
    assert sum(c.num_bytes * c.count for c in others) <= ACTIVATIONS
    assert max(c.num_bytes for c in others) <= ACTIVATIONS // 4
    held = PARAMETERS / 2  # of the most that a device holds of any weight: fsdp or expert divides nearly all
    assert total(found, "all-reduce") <= held


def test_tensor_parallelism_gathers_no_weights():
    found = [c for c in step_collectives(fsdp=2, expert=2, tensor=2) if "tensor" in c.axes]
    assert max(c.num_bytes for c in found) <= ACTIVATIONS
    head = 4 * CONFIG.hidden_size * CONFIG.vocab_size  # 265 tokens do not divide: the logits' product gathers it
    assert total(found, "all-gather") <= head + 2 * ACTIVATIONS
