"""Optimizer, schedules, and the update: the same numbers on 1 device and on 8, with and without accumulation.

B batch, S sequence, L layers, E experts.
"""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from moe_jax.config import AttentionConfig, ConfigError, MeshConfig, ModelConfig, MoEConfig, MTPConfig, OptimizerConfig
from moe_jax.model.definition import Definition
from moe_jax.sharding import make_mesh, put_batch
from moe_jax.training.optimizer import learning_rate_schedule, make_optimizer
from moe_jax.training.state import init_state, make_update
from moe_jax.training.supervised import make_loss, make_totals

B, S, V, STEPS, RATE = 16, 12, 17, 3, 0.01
CONFIG = ModelConfig(
    vocab_size=V,
    hidden_size=8,
    num_layers=2,
    intermediate_size=12,
    attention=AttentionConfig(num_heads=2, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4),
    moe=MoEConfig(
        num_experts=4,
        num_experts_per_token=2,
        num_shared_experts=1,
        expert_size=6,
        sequence_balance_coef=0.1,
        global_balance_coef=0.05,
        z_loss_coef=0.01,
        bias_update_rate=RATE,
        bias_zero_mean=True,
    ),
    mtp=MTPConfig(depth=1),
    initializer_range=0.3,
)
TRAINED = dataclasses.replace(CONFIG, num_layers=1, first_k_dense=0)  # one block quickly compiled, and an MTP module
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, schedule="constant", warmup_steps=1, weight_decay=0.1)


def batches():
    """Packed rows of unequal documents, with padding and with tokens that are not predicted."""
    rng, result = np.random.default_rng(0), []
    for _ in range(STEPS):
        segments, positions = np.zeros((2, B, S), np.int32)
        for row in range(B):
            first, end = rng.integers(2, 7), rng.integers(8, S + 1)
            segments[row, :first], segments[row, first:end] = 1, 2
            positions[row, :first], positions[row, first:end] = np.arange(first), np.arange(end - first)
        result.append(
            {
                "tokens_BS": rng.integers(0, V, (B, S)).astype(np.int32),
                "segment_ids_BS": segments,
                "positions_BS": positions,
                "loss_mask_BS": (rng.random((B, S)) < 0.8).astype(np.float32),
            }
        )
    return result


def train(mesh_cfg, accumulation_steps=1, cfg=TRAINED, steps=STEPS):
    """Metrics of each step, and the last state, as numpy."""
    mesh, definition = make_mesh(mesh_cfg), Definition.of(cfg)
    optimizer = make_optimizer(OPTIMIZER, 100, definition)
    update = make_update(
        make_loss(definition, banned_ids=(0,)),
        make_totals(definition),
        optimizer,
        accumulation_steps=accumulation_steps,
        balance=cfg.moe,
    )
    history = []
    with jax.set_mesh(mesh):
        state = init_state(definition, optimizer, jax.random.key(0), mesh)
        for batch in batches()[:steps]:
            state, metrics = update(state, put_batch(batch, mesh))
            history.append(jax.device_get(metrics))
    return history, jax.device_get(state)


@pytest.fixture(scope="module")
def one_device():
    return train(MeshConfig(data=1))


@pytest.mark.parametrize(
    ("mesh_cfg", "accumulation_steps"),
    [(MeshConfig(data=8), 1), (MeshConfig(data=1, fsdp=2, expert=2, tensor=2), 4)],
    ids=["data 8", "fsdp 2, expert 2, tensor 2, 4 micro-batches"],
)
def test_same_numbers_on_any_mesh_and_with_accumulation(one_device, mesh_cfg, accumulation_steps):
    expected, expected_state = one_device
    actual, state = train(mesh_cfg, accumulation_steps)
    for step, (metrics, wanted) in enumerate(zip(actual, expected, strict=True)):
        assert metrics.keys() == wanted.keys()
        for name, value in wanted.items():
            np.testing.assert_allclose(metrics[name], value, rtol=2e-5, atol=1e-6, err_msg=f"{name}, step {step}")
        np.testing.assert_array_equal(metrics["moe/expert_load"], wanted["moe/expert_load"])
    for name, bias in expected_state.rest.items():
        np.testing.assert_array_equal(state.rest[name], bias, err_msg=name)
    for name, weight in expected_state.params.items():
        np.testing.assert_allclose(state.params[name], weight, rtol=1e-3, atol=1e-4, err_msg=name)
    assert state.step == STEPS


def test_parallel_heads_span_the_devices():
    cfg = dataclasses.replace(TRAINED, moe=MoEConfig(), mtp=MTPConfig(depth=2, kind="parallel"))
    meshes = MeshConfig(data=1), MeshConfig(data=2, fsdp=2, tensor=2)
    one, many = (train(mesh, cfg=cfg, steps=1) for mesh in meshes)
    (wanted,), (metrics,) = one[0], many[0]
    assert wanted["loss_mtp_1"] > 1 and wanted["loss_mtp_2"] > 1
    for name, value in wanted.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
    for name, weight in one[1].params.items():
        np.testing.assert_allclose(many[1].params[name], weight, rtol=1e-3, atol=1e-4, err_msg=name)


def test_every_part_of_the_loss_is_there(one_device):
    history, _state = one_device
    for batch, metrics in zip(batches(), history, strict=True):
        segments = batch["segment_ids_BS"]
        tokens = np.sum(segments > 0)
        tokens_ahead = np.sum((segments[:, 1:] > 0) & (segments[:, 1:] == segments[:, :-1]))
        assert metrics["loss_main"] > 1 and metrics["loss_mtp_1"] > 1
        total = metrics["loss_main"] + 0.3 * metrics["loss_mtp_1"]
        # A module's share of the tokens: its last position in each document predicts nothing.
        for stack, share in (("moe_blocks", 1.0), ("mtp.blocks", tokens_ahead / tokens)):
            sequence, whole, z = (metrics[f"loss_{kind}/{stack}"] for kind in ("balance", "balance_global", "z"))
            assert sequence >= 0.9 and whole >= 0.9 and z > 0.5
            total += 0.1 * sequence + share * (0.05 * whole + 0.01 * z)
        np.testing.assert_allclose(metrics["loss"], total, rtol=1e-5)
        assert not [name for name in metrics if name.startswith(("loss_balance_expert", "loss_balance_device"))]
        assert metrics["grad_norm"] > 0.1 and metrics["moe/max_violation"] > 0
        for room in ("moe", "mtp"):
            assert metrics[f"{room}/expert_load"].shape == (1, 4)
            np.testing.assert_allclose(np.mean(metrics[f"{room}/expert_load"], axis=1), 1, rtol=1e-6)


ROUTER_METRICS = ("max_violation", "load_entropy", "dead_experts", "score_entropy", "confidence", "bias_norm")


def test_router_metrics_are_of_the_whole_batch_by_layer_and_on_average(one_device):
    history, state = one_device
    for metrics in history:
        for room in ("moe", "mtp"):
            for name in ROUTER_METRICS:
                assert metrics[f"{room}/{name}_by_layer"].shape == (1,)
                np.testing.assert_allclose(metrics[f"{room}/{name}"], np.mean(metrics[f"{room}/{name}_by_layer"]))
            load_LE = metrics[f"{room}/expert_load"]
            np.testing.assert_allclose(metrics[f"{room}/max_violation"], np.max(load_LE) - 1, rtol=1e-5)
            assert metrics[f"{room}/dead_experts"] == np.sum(load_LE == 0)
            assert 0 < metrics[f"{room}/score_entropy"] <= np.log(4) and 0.25 < metrics[f"{room}/confidence"] < 1
            assert f"{room}/dropped_fraction" not in metrics
    bias_LE = state.rest["moe_blocks.ffn.router.bias"]
    np.testing.assert_allclose(history[-1]["moe/bias_norm_by_layer"], np.linalg.norm(bias_LE, axis=1), rtol=1e-6)


GROUPED = dataclasses.replace(
    TRAINED,
    mtp=MTPConfig(),
    moe=MoEConfig(
        num_experts=8,
        num_experts_per_token=2,
        num_groups=4,
        num_groups_per_token=2,
        group_score="max",
        expert_size=6,
        score="softmax",
        selection_bias=False,
        sequence_balance_coef=0.0,
        expert_balance_coef=0.1,
        device_balance_coef=0.1,
        communication_balance_coef=0.1,
        capacity_factor=0.8,
    ),
)


def test_losses_and_capacities_of_groups_span_the_devices():
    one, many = (
        train(mesh, cfg=GROUPED, steps=1)[0][0] for mesh in (MeshConfig(data=1), MeshConfig(data=2, fsdp=2, expert=2))
    )
    losses = [f"loss_balance_{kind}/moe_blocks" for kind in ("expert", "device", "communication")]
    assert one.keys() == many.keys() and {*losses} == {name for name in one if "/moe_blocks" in name}
    for name, value in one.items():
        np.testing.assert_allclose(many[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
    assert 0 < one["moe/dropped_fraction"] < 0.5
    np.testing.assert_allclose(one["loss"], one["loss_main"] + 0.1 * sum(one[name] for name in losses), rtol=1e-5)


def test_biases_of_trunk_and_mtp_routers_move_against_their_load(one_device):
    history, state = one_device
    names = {"moe": "moe_blocks.ffn.router.bias", "mtp": "mtp.blocks.ffn.router.bias"}
    assert set(state.rest) == set(names.values())
    for room, name in names.items():
        signs = [np.sign(1 - metrics[f"{room}/expert_load"]) for metrics in history]
        moved = sum(RATE * (sign - np.mean(sign, axis=1, keepdims=True)) for sign in signs)
        np.testing.assert_allclose(state.rest[name], moved, atol=1e-6)
        np.testing.assert_allclose(np.mean(state.rest[name], axis=1), 0, atol=1e-7)
        assert np.any(history[0][f"{room}/expert_load"] > 1) and np.all(np.abs(moved).max(axis=1) > 0)


def test_training_changes_every_parameter(one_device):
    definition = Definition.of(TRAINED)
    start, _ = definition.init(jax.random.key(0), make_mesh(MeshConfig(data=1)))
    for name, weight in one_device[1].params.items():
        assert np.all(np.isfinite(weight)) and np.any(weight != np.asarray(start[name])), name


# Schedules -----------------------------------------------------------------------------------------------------------


def rates(steps, **options):
    cfg = OptimizerConfig(learning_rate=1.0, warmup_steps=4, final_fraction=0.1, **options)
    schedule = learning_rate_schedule(cfg, steps)
    return np.array([float(schedule(step)) for step in range(steps + 1)])


def test_warmup_is_linear_and_starts_above_0():
    for schedule in ("constant", "cosine", "wsd"):
        np.testing.assert_allclose(rates(20, schedule=schedule)[:5], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)


def test_constant():
    np.testing.assert_allclose(rates(20, schedule="constant")[4:], 1.0)


def test_cosine():
    progress = np.arange(17) / 16
    np.testing.assert_allclose(
        rates(20, schedule="cosine")[4:], 0.1 + 0.9 * (1 + np.cos(np.pi * progress)) / 2, rtol=1e-5
    )


def test_wsd():
    found = rates(20, schedule="wsd", decay_fraction=0.25)
    np.testing.assert_allclose(found[4:16], 1.0)
    np.testing.assert_allclose(found[15:21], 1 - 0.9 * np.arange(6) / 5, rtol=1e-5)


def test_warmup_longer_than_the_run():
    cfg = OptimizerConfig(learning_rate=1.0, warmup_steps=100)
    found = [float(learning_rate_schedule(cfg, 3)(step)) for step in range(3)]
    np.testing.assert_allclose(found, [0.25, 0.5, 0.75], rtol=1e-6)


# Optimizers ----------------------------------------------------------------------------------------------------------


def dense(layers):
    return Definition.of(dataclasses.replace(CONFIG, num_layers=layers, moe=MoEConfig(), mtp=MTPConfig()))


def arrays(definition, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {
        name: (scale * rng.normal(size=definition.variables[name].shape)).astype(np.float32)
        for name in definition.param_names
    }


def one_update(cfg, definition, gradient, params):
    optimizer = make_optimizer(cfg, 10, definition)

    @jax.jit
    def update(gradient, params):
        return optimizer.update(gradient, optimizer.init(params), params)

    return jax.device_get(update(gradient, params))


PLAIN = OptimizerConfig(learning_rate=0.1, warmup_steps=0, schedule="constant", max_grad_norm=0.0)


def test_weight_decay_is_on_matrices_only():
    definition = Definition.of(CONFIG)
    params = arrays(definition, 0)
    zeros = jax.tree.map(np.zeros_like, params)
    changes, _ = one_update(dataclasses.replace(PLAIN, weight_decay=0.5), definition, zeros, params)
    for name, change in changes.items():
        spared = any(part in name for part in ("norm", "embed_VD", "head_DV", "gate_DE"))
        np.testing.assert_allclose(change, 0 if spared else -0.1 * 0.5 * params[name], rtol=1e-5, err_msg=name)


def test_gradients_are_clipped_by_their_global_norm():
    definition = dense(1)
    params, gradient = arrays(definition, 0), arrays(definition, 1)
    norm = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in gradient.values()))
    assert norm > 3
    for limit, expected in ((0.5, 0.5), (1e6, norm), (0.0, norm)):
        _, state = one_update(dataclasses.replace(PLAIN, max_grad_norm=limit), definition, gradient, params)
        moments = optax.tree_utils.tree_get(state, "mu")
        assert float(optax.tree.norm(moments)) == pytest.approx((1 - PLAIN.beta1) * expected, rel=1e-4)


def test_adamw_first_step_is_the_sign():
    definition = dense(1)
    params, gradient = arrays(definition, 0), arrays(definition, 1)
    changes, _ = one_update(PLAIN, definition, gradient, params)
    for name, change in changes.items():
        np.testing.assert_allclose(change, -0.1 * np.sign(gradient[name]), rtol=1e-3, err_msg=name)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_in_bfloat16_take_half_the_memory_and_nearly_the_same_steps(name):
    definition = dense(1)
    params, states, histories = arrays(definition, 0), [], []
    for dtype in ("float32", "bfloat16"):
        cfg = dataclasses.replace(PLAIN, name=name, moment_dtype=dtype)
        optimizer = make_optimizer(cfg, 10, definition)
        step = jax.jit(optimizer.update)
        state, changes = optimizer.init(params), []
        for seed in range(1, 6):
            change, state = step(arrays(definition, seed), state, params)
            changes.append(change)
        states.append(sum(x.nbytes for x in jax.tree.leaves(state) if x.ndim))
        histories.append(changes)
    assert states[1] * 2 == states[0]
    for exact, rounded in zip(*histories, strict=True):
        for weight, change in exact.items():
            error = np.linalg.norm(rounded[weight] - change) / np.linalg.norm(change)
            assert error < (0.03 if name == "adamw" else 0.15), weight  # Newton-Schulz raises small singular values
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, histories), strict=True))


def test_moments_in_bfloat16_need_a_second_moment_that_moves():
    with pytest.raises(ConfigError, match=r"beta2 = 0\.999.*at most 0\.99"):
        dataclasses.replace(PLAIN, beta2=0.999, moment_dtype="bfloat16")


MUON = dataclasses.replace(PLAIN, name="muon", weight_decay=0.1)


def test_muon_treats_each_stacked_layer_as_a_matrix_of_its_own():
    two, one = dense(2), dense(1)
    params, gradient = arrays(two, 0), arrays(two, 1)
    together, _ = one_update(MUON, two, gradient, params)
    for layer in range(2):
        part = {
            name: {n: a[layer : layer + 1] if n.startswith("dense_blocks") else a for n, a in tree.items()}
            for name, tree in (("gradient", gradient), ("params", params))
        }
        alone, _ = one_update(MUON, one, part["gradient"], part["params"])
        for name, change in alone.items():
            if name.startswith("dense_blocks"):
                np.testing.assert_allclose(together[name][layer], change[0], rtol=1e-3, atol=1e-5, err_msg=name)


def test_muon_orthogonalises_matrices_of_heads_and_experts_with_rms_02():
    definition = Definition.of(CONFIG)
    params, gradient = arrays(definition, 0), arrays(definition, 1)
    changes, _ = one_update(dataclasses.replace(MUON, weight_decay=0.0), definition, gradient, params)
    shapes = {  # (layers, or layers and experts; inputs; outputs)
        "dense_blocks.ffn.down_FD": (1, 12, 8),
        "dense_blocks.attention.query_b": (1, 8, 2 * 8),
        "dense_blocks.attention.output_HVD": (1, 2 * 4, 8),
        "moe_blocks.ffn.experts.gate_up_ED2F": (4, 8, 12),
        "mtp.projection_N2DD": (1, 16, 8),
    }
    for name, shape in shapes.items():
        for matrix in changes[name].reshape(shape):
            singular = np.linalg.svd(matrix, compute_uv=False)
            assert singular.max() / singular.min() < 2.5, name  # Newton-Schulz leaves them between about 0.7 and 1.2
            assert np.sqrt(np.mean(matrix**2)) == pytest.approx(0.1 * 0.2, rel=0.3), name
    for name in ("embed_VD", "norm.weight", "moe_blocks.ffn.router.gate_DE"):  # Adam's first step: all of one size
        sizes = changes[name] / -np.sign(gradient[name])
        np.testing.assert_allclose(sizes, np.mean(sizes), rtol=1e-3)
        assert 0.05 < np.mean(sizes) < 0.2
