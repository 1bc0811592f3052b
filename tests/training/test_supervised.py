"""The training loss: router losses, multi-token prediction; bits per byte against the formula, over unequal batches."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import AttentionConfig, MeshConfig, ModelConfig, MoEConfig, MTPConfig, OptimizerConfig
from moe_jax.data import DataError
from moe_jax.losses.language_model import cross_entropy, next_token_targets
from moe_jax.model.definition import Definition
from moe_jax.presets import deepseek_v3
from moe_jax.sharding import make_mesh, put_batch
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import init_state, make_update
from moe_jax.training.supervised import BitsPerByte, make_loss, make_totals

V = 11
CONFIG = ModelConfig(
    vocab_size=V,
    hidden_size=8,
    num_layers=1,
    intermediate_size=8,
    attention=AttentionConfig(kind="gqa", num_heads=2, num_kv_heads=1, head_dim=4),
    initializer_range=0.5,
)


def batch(seed, lengths):
    tokens_BS = np.random.default_rng(seed).integers(1, V, (len(lengths), 9)).astype(np.int32)
    segments_BS = (np.arange(9) < np.array(lengths)[:, None]).astype(np.int32)
    positions_BS = np.broadcast_to(np.arange(9, dtype=np.int32), tokens_BS.shape)
    return {"tokens_BS": tokens_BS, "segment_ids_BS": segments_BS, "positions_BS": positions_BS}


def test_it_is_the_nats_of_all_targets_over_the_bits_of_all_their_bytes():
    definition = Definition.of(CONFIG)
    params, rest = definition.init(jax.random.key(0))
    bytes_V = np.arange(V, dtype=np.int32) % 4  # some tokens are special and stand for no byte
    batches = [batch(0, [9, 4]), batch(1, [2, 0])]
    found = BitsPerByte(definition, bytes_V, banned_ids=(0,))(params, rest, batches)

    nats = tokens = num_bytes = 0.0
    model = definition.merge(params, rest)
    for one in batches:
        output = model(one["tokens_BS"], segment_ids_BS=one["segment_ids_BS"], positions_BS=one["positions_BS"])
        logits = np.array(model.logits(output.hidden_BSD), np.float64)
        logits[..., 0] = -np.inf
        for row, column in zip(*np.nonzero(one["segment_ids_BS"][:, 1:]), strict=True):
            target = one["tokens_BS"][row, column + 1]
            nats += np.log(np.sum(np.exp(logits[row, column]))) - logits[row, column, target]
            tokens, num_bytes = tokens + 1, num_bytes + bytes_V[target]
    np.testing.assert_allclose(found["loss"], nats / tokens, rtol=1e-5)
    np.testing.assert_allclose(found["bits_per_byte"], nats / np.log(2) / num_bytes, rtol=1e-5)


def test_text_without_a_byte_is_an_error():
    definition = Definition.of(CONFIG)
    params, rest = definition.init(jax.random.key(0))
    with pytest.raises(DataError, match="no byte"):
        BitsPerByte(definition, np.zeros(V, np.int32))(params, rest, [batch(0, [9])])


# Router losses -------------------------------------------------------------------------------------------------------

GROUPS = {"num_experts": 8, "num_experts_per_token": 2, "num_groups": 4, "num_groups_per_token": 2, "expert_size": 6}
LOSSES = {
    "sequence_balance_coef": "loss_balance",
    "expert_balance_coef": "loss_balance_expert",
    "device_balance_coef": "loss_balance_device",
    "communication_balance_coef": "loss_balance_communication",
    "global_balance_coef": "loss_balance_global",
    "z_loss_coef": "loss_z",
}
ALL_OFF = MoEConfig(**GROUPS, **dict.fromkeys(LOSSES, 0.0))
SPARSE = dataclasses.replace(CONFIG, first_k_dense=0, moe=ALL_OFF)


def with_losses(**coefs):
    return dataclasses.replace(SPARSE, moe=dataclasses.replace(ALL_OFF, **coefs))


@functools.cache
def loss_and_gradient(cfg):
    definition, one = Definition.of(cfg), batch(0, [9, 4, 7, 0])
    params, rest = definition.init(jax.random.key(0))
    params = {name: array + ("gate_DE" in name) for name, array in params.items()}

    @jax.jit
    def both(params):
        totals = make_totals(definition)(params, rest, one, 1)

        def total(params):
            output = make_loss(definition)(params, rest, one, totals)
            return output.loss, output.metrics

        return jax.value_and_grad(total, has_aux=True)(params)

    (loss, metrics), gradient = jax.device_get(both(params))
    return float(loss), {name: float(value.mean()) for name, value in metrics.items()}, gradient


@pytest.mark.parametrize("coef", LOSSES)
def test_a_router_loss_is_added_and_moves_the_gate_but_no_expert(coef):
    """Of the layer's own weights only the gate: not its experts, nor what comes after."""
    without, _, plain = loss_and_gradient(SPARSE)
    loss, metrics, gradient = loss_and_gradient(with_losses(**{coef: 0.5}))
    assert metrics.keys() == {"loss_main", f"{LOSSES[coef]}/moe_blocks"}
    assert metrics[f"{LOSSES[coef]}/moe_blocks"] > 0.5
    assert loss == pytest.approx(without + 0.5 * metrics[f"{LOSSES[coef]}/moe_blocks"], rel=1e-5)
    for name, g in gradient.items():
        change = np.abs(g - plain[name]).max()
        if "gate_DE" in name:
            assert change > 1e-4
        elif "experts" in name or name in ("head_DV", "norm.weight"):
            assert change == 0, name


def test_coefficients_of_0_leave_every_router_loss_out():
    assert loss_and_gradient(SPARSE)[1].keys() == {"loss_main"}


def test_losses_add_up():
    coefs = {coef: 0.1 * (i + 1) for i, coef in enumerate(LOSSES)}
    loss, metrics, _ = loss_and_gradient(with_losses(**coefs))
    routers = sum(value * metrics[f"{LOSSES[coef]}/moe_blocks"] for coef, value in coefs.items())
    assert loss == pytest.approx(metrics["loss_main"] + routers, rel=1e-5)


def test_totals_count_ahead_only_for_the_global_batch_loss_of_several_micro_batches():
    one = batch(0, [9, 4, 7, 0])
    for cfg, accumulation_steps, ahead in (
        (with_losses(global_balance_coef=0.1), 2, True),
        (with_losses(global_balance_coef=0.1), 1, False),
        (with_losses(expert_balance_coef=0.1), 2, False),
    ):
        definition = Definition.of(cfg)
        params, rest = definition.init(jax.random.key(0))
        totals = jax.jit(make_totals(definition), static_argnums=3)(params, rest, one, accumulation_steps)
        assert totals.tokens == 20 and totals.sequences == 3 and totals.targets[0] == 17
        assert totals.counts.keys() == ({"moe_blocks"} if ahead else set())
        if ahead:
            assert np.sum(totals.counts["moe_blocks"]) == 2 * 20


# Multi-token prediction ----------------------------------------------------------------------------------------------


def with_mtp(**options):
    return dataclasses.replace(CONFIG, mtp=MTPConfig(**options))


@pytest.mark.parametrize("kind", ["causal", "parallel"])
def test_lambda_falls_after_its_tokens(kind):
    """Rows of 9 tokens, 4 of them: 36 tokens a step, so that 72 are seen before the third step."""
    cfg = with_mtp(depth=2, kind=kind, loss_coef=0.3, late_loss_coef=0.1, late_after_tokens=72)
    definition, one = Definition.of(cfg), batch(0, [9, 4, 7, 0])
    params, rest = definition.init(jax.random.key(0))

    @jax.jit
    def loss(step):
        whole = one | {"step_B": np.full(4, 1) * step}
        return make_loss(definition)(params, rest, whole, make_totals(definition)(params, rest, whole, 1))

    for step, coef in ((0, 0.3), (1, 0.3), (2, 0.1), (10**6, 0.1)):
        output = loss(step)
        main, *ahead = (float(output.metrics[name].mean()) for name in ("loss_main", "loss_mtp_1", "loss_mtp_2"))
        assert min(ahead) > 0.5
        assert float(output.loss) == pytest.approx(main + coef * np.mean(ahead), rel=1e-5)


def test_lambda_falls_after_more_tokens_than_an_int32_holds():
    """DeepSeek-V3's 10 T: 2,543,132 steps of 960 rows of 4,096."""
    definition = Definition.of(with_mtp(**vars(deepseek_v3().mtp)))

    @jax.jit
    def coefficient(step):
        rows = {"step_B": jnp.full(960, step), "tokens_BS": jnp.zeros((960, 4096), jnp.int32)}
        return make_totals(definition)({}, {}, rows | {"segment_ids_BS": rows["tokens_BS"]}, 1).mtp_loss_coef

    assert [float(coefficient(step)) for step in (0, 2_540_000, 2_545_000)] == pytest.approx([0.3, 0.3, 0.1])


def test_updates_count_the_tokens_that_lower_lambda():
    """The step is the state's, for every micro-batch: two updates of 36 tokens, then the late coefficient."""
    cfg = with_mtp(depth=1, late_loss_coef=0.0, late_after_tokens=72)
    definition, mesh = Definition.of(cfg), make_mesh(MeshConfig(data=1))
    one = put_batch(batch(0, [9, 4, 7, 2]), mesh)
    optimizer = make_optimizer(OptimizerConfig(), 10, definition)
    update = make_update(make_loss(definition), make_totals(definition), optimizer, accumulation_steps=2)
    state = init_state(definition, optimizer, jax.random.key(0), mesh)
    for coef in (0.3, 0.3, 0.0, 0.0):
        state, metrics = update(state, one)
        wanted = metrics["loss_main"] + coef * metrics["loss_mtp_1"]
        np.testing.assert_allclose(metrics["loss"], wanted, rtol=1e-5)


def test_without_modules_the_program_is_that_of_the_next_token_loss_alone():
    definition, one = Definition.of(with_mtp(depth=0, loss_coef=7.0, late_after_tokens=1)), batch(0, [9, 4, 7, 0])
    params, rest = definition.init(jax.random.key(0))

    def plain(params, rest, batch):
        tokens_BS, segments_BS = batch["tokens_BS"], batch["segment_ids_BS"]
        count = jnp.maximum(jnp.sum(next_token_targets(tokens_BS, segments_BS)[1]), 1)
        model = definition.merge(params, rest)
        hidden_BSD = model(tokens_BS, segment_ids_BS=segments_BS, positions_BS=batch["positions_BS"]).hidden_BSD
        return cross_entropy(hidden_BSD, model.head(), *next_token_targets(tokens_BS, segments_BS)).sum / count

    def ours(params, rest, batch):
        totals = make_totals(definition)(params, rest, batch, 1)
        return make_loss(definition)(params, rest, batch, totals).loss

    def lowered(loss):
        return jax.jit(jax.value_and_grad(loss)).lower(params, rest, one)

    def program(loss):
        text = re.sub(r", metadata=\{[^}]*\}", "", lowered(loss).compile().as_text())
        return text[re.search(r"^(%|ENTRY)", text, re.MULTILINE).start() :]  # behind the tables of source lines

    assert program(ours) == program(plain)
    assert "while" in lowered(ours).as_text()  # a program indeed: the scan over layers, before XLA may unroll it
