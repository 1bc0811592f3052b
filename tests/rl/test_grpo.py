"""One step of GRPO: sampler and trainer agree, groups are handled as said, and 8 devices do what one does."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from moe_jax.config import (
    AttentionConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    PolicyLossConfig,
    RLConfig,
    SamplingConfig,
)
from moe_jax.data.problems import Problem
from moe_jax.data.tokenizer import ByteTokenizer
from moe_jax.model.definition import Definition
from moe_jax.rl.grpo import rollout
from moe_jax.rl.train import PHASES, PolicyState, PolicyTrainer
from moe_jax.sharding import make_mesh
from moe_jax.training.state import start_state

TOKENIZER = ByteTokenizer()
MODEL = ModelConfig(
    vocab_size=TOKENIZER.vocab_size,
    hidden_size=32,
    num_layers=2,
    intermediate_size=32,
    attention=AttentionConfig(num_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8),
    moe=MoEConfig(num_experts=4, num_experts_per_token=2, num_shared_experts=1, expert_size=16),
    initializer_range=0.2,
)
DEFINITION = Definition.of(MODEL)
RL = RLConfig(
    steps=20,
    num_prompts=4,
    group_size=8,
    sampling=SamplingConfig(max_new_tokens=6),
    optimizer=OptimizerConfig(learning_rate=3e-3, schedule="constant", warmup_steps=0),
    loss=PolicyLossConfig(beta=0.02),
)


class Evens:
    """Rewards the share of even bytes; prompts of unequal length."""

    def __init__(self, constant=None):
        self.constant = constant

    def problems(self, step, count):
        return [Problem(prompt="7" * (1 + i % 3), answer="", key=str(i)) for i in range(count)]

    def score(self, completions):
        shares = [float(np.mean([ord(c) % 2 == 0 for c in one.text] or [0])) for one in completions]
        constant = self.constant
        return [{"reward": s if constant is None else constant, "accuracy": s, "format": 0.0} for s in shares]


def trainer(cfg=RL, definition=DEFINITION):
    return PolicyTrainer(definition, cfg, TOKENIZER, prompt_length=6)


def run_steps(policy, steps, environment, mesh_cfg):
    mesh = make_mesh(mesh_cfg)
    with jax.set_mesh(mesh):
        params, rest = policy.definition.init(jax.random.key(0), mesh)
        train = start_state(policy.definition, policy.optimizer, params, rest, mesh)
        reference = jax.tree.map(lambda x: x + 0.0, train.params) if policy.cfg.loss.beta else {}
        state, seen = PolicyState(*train, reference), []
        for step in range(steps):
            state, metrics, rows = policy.step(environment, state, "grpo", step, 0, mesh)
            seen.append(SimpleNamespace(metrics=metrics, rows=rows))
    return state, seen


@pytest.fixture(scope="module")
def policy():
    return trainer()


@pytest.fixture(scope="module")
def learned(policy):
    return run_steps(policy, 12, Evens(), MeshConfig(data=1))


def test_sampler_and_trainer_agree_on_every_token(learned):
    for step in learned[1]:
        assert 0 < step.metrics["sampling/sampling_logp_difference/max"] < 1e-4


def test_the_reward_rises_and_the_policy_leaves_its_reference(learned):
    rewards = [step.metrics["reward"] for step in learned[1]]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.05
    kl = [step.metrics["kl"] for step in learned[1]]
    assert abs(kl[0]) < 1e-6 and kl[-1] > 1e-4


def test_metrics_have_the_fields_names(learned):
    expected = """
        reward reward_std frac_reward_zero_std rewards/accuracy/mean kl entropy clip_ratio/low_mean clip_ratio/high_mean
        clip_ratio/region_mean completions/mean_length completions/clipped_ratio grad_norm moe/max_violation
        moe/expert_load num_tokens tokens_per_second time/generate time/score time/reference time/update
    """
    metrics = learned[1][0].metrics
    assert set(expected.split()) <= metrics.keys()
    shares = [metrics[f"time/share/{phase}"] for phase in PHASES]
    assert min(shares) > 0 and sum(shares) == pytest.approx(1)


def test_rows_can_be_read_back(learned):
    rows = learned[1][0].rows
    assert len(rows) == 32 and rows[0]["prompt"] == "7" and rows[0]["step"] == 1
    groups = np.array([row["advantage"] for row in rows]).reshape(4, 8)
    np.testing.assert_allclose(groups.sum(axis=1), 0, atol=1e-5)
    assert "<pad>" not in "".join(row["completion"] for row in rows)


def test_router_biases_stand_still_and_experts_are_trained(learned):
    state, _ = learned
    params, rest = DEFINITION.init(jax.random.key(0))
    for name in rest:
        np.testing.assert_array_equal(state.rest[name], rest[name])
    for name in ("moe_blocks.ffn.experts.down_EFD", "moe_blocks.ffn.router.gate_DE", "embed_VD"):
        assert np.abs(state.params[name] - params[name]).max() > 1e-4


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=8),
        MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
        MeshConfig(data=1, fsdp=2, expert=2, context=2),
    ],
)
def test_eight_devices_give_the_metrics_of_one(policy, learned, mesh):
    _, steps = run_steps(policy, 3, Evens(), mesh)
    for one, many in zip(learned[1], steps, strict=False):
        assert [row["completion"] for row in one.rows] == [row["completion"] for row in many.rows]
        for name in ("reward", "loss", "kl", "entropy", "grad_norm", "moe/max_violation"):
            np.testing.assert_allclose(one.metrics[name], many.metrics[name], rtol=2e-3, atol=2e-6)
        np.testing.assert_allclose(one.metrics["moe/expert_load"], many.metrics["moe/expert_load"], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_twenty_steps_on_a_mesh_are_those_of_one_device(sparse):
    """Sampling included. A difference in rounding may some day draw another token: then another seed will do."""
    cfg = replace(RL, optimizer=replace(RL.optimizer, learning_rate=1e-3))
    policy = trainer(cfg, DEFINITION if sparse else Definition.of(replace(MODEL, moe=MoEConfig())))
    one, many = (
        run_steps(policy, 20, Evens(), mesh)[1] for mesh in (MeshConfig(data=1), MeshConfig(data=2, fsdp=2, expert=2))
    )
    for step, (a, b) in enumerate(zip(one, many, strict=True)):
        assert [row["completion"] for row in a.rows] == [row["completion"] for row in b.rows], step
        for name in ("reward", "loss", "kl", "entropy", "grad_norm"):
            np.testing.assert_allclose(a.metrics[name], b.metrics[name], rtol=2e-3, atol=2e-6, err_msg=f"{name} {step}")
        if sparse:
            np.testing.assert_array_equal(a.metrics["moe/expert_load"], b.metrics["moe/expert_load"])


def test_groups_without_variance_are_counted_and_change_nothing(policy):
    state, (step,) = run_steps(policy, 1, Evens(constant=1.0), MeshConfig(data=1))
    assert step.metrics["frac_reward_zero_std"] == 1 and step.metrics["update_skipped"] == 1
    assert int(state.step) == 0
    for name, before in DEFINITION.init(jax.random.key(0))[0].items():
        np.testing.assert_array_equal(state.params[name], before)


def test_micro_batches_are_the_whole_minibatch():
    """Accumulation changes rounding only; beta = 0 keeps no reference."""
    cfg = replace(RL, loss=PolicyLossConfig(beta=0.0, aggregation="seq-mean-token-mean"))
    state, (whole,) = run_steps(trainer(cfg), 1, Evens(), MeshConfig(data=1))
    assert state.reference == {} and "kl" not in whole.metrics
    _, (parts,) = run_steps(trainer(replace(cfg, accumulation_steps=4)), 1, Evens(), MeshConfig(data=1))
    for name in ("loss", "grad_norm", "entropy", "sampling/sampling_logp_difference/max"):
        np.testing.assert_allclose(whole.metrics[name], parts.metrics[name], rtol=1e-4, atol=1e-6)


def test_truncated_completions_can_be_left_out(policy):
    params, rest = DEFINITION.init(jax.random.key(0))
    samples = rollout(
        Evens(),
        policy.sample,
        params,
        rest,
        TOKENIZER,
        RL,
        prompt_length=6,
        step=0,
        seed=0,
        key=jax.random.key(1),
    )
    finished_B = np.asarray(samples.samples.finished_B)
    assert not finished_B.all()
    kept, masked = samples.batch(mask_truncated=False), samples.batch(mask_truncated=True)
    assert kept["mask_BN"].any(axis=1).all()
    np.testing.assert_array_equal(masked["mask_BN"].any(axis=1), finished_B)


def test_the_reference_is_replaced_every_so_many_steps():
    cfg = replace(RL, num_minibatches=1, reference_refresh_steps=2)
    _, steps = run_steps(trainer(cfg), 4, Evens(), MeshConfig(data=1))
    kl = [step.metrics["kl"] for step in steps]
    assert abs(kl[0]) < 1e-6 and abs(kl[2]) < 1e-6  # the policy is its own reference
    assert kl[1] > 1e-6 and kl[3] > 1e-6
