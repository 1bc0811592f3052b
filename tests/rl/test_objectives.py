"""Policy training under objectives other than GRPO's: PPO's critics, dynamic sampling, KL in rewards, corrections."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from moe_jax.config import (
    AttentionConfig,
    ConfigError,
    CriticConfig,
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
from moe_jax.rl.dynamic_sampling import filled_rollout
from moe_jax.rl.grpo import Rollout
from moe_jax.rl.objectives import OBJECTIVES, with_objective
from moe_jax.rl.train import PolicyTrainer
from moe_jax.sampling.sampler import Samples
from moe_jax.sharding import make_mesh

TOKENIZER = ByteTokenizer()
MODEL = ModelConfig(
    vocab_size=TOKENIZER.vocab_size,
    hidden_size=32,
    num_layers=2,
    intermediate_size=32,
    attention=AttentionConfig(num_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8),
    moe=MoEConfig(num_experts=4, num_experts_per_token=2, expert_size=16),
    initializer_range=0.2,
)
DEFINITION = Definition.of(MODEL)
RATE = OptimizerConfig(learning_rate=3e-3, schedule="constant", warmup_steps=0)
RL = RLConfig(steps=20, num_prompts=4, group_size=8, sampling=SamplingConfig(max_new_tokens=6), optimizer=RATE)
PPO = with_objective(replace(RL, critic=CriticConfig(optimizer=RATE)), "ppo")


class Evens:
    """Rewards the share of even bytes."""

    def problems(self, step, count):
        return [Problem(prompt="7" * (1 + i % 3), answer="", key=str(i)) for i in range(count)]

    def score(self, completions):
        shares = [float(np.mean([ord(c) % 2 == 0 for c in one.text] or [0])) for one in completions]
        return [{"reward": share, "accuracy": float(share > 0.6)} for share in shares]


def run_steps(cfg, steps, devices=1):
    policy, mesh = PolicyTrainer(DEFINITION, cfg, TOKENIZER, prompt_length=6), make_mesh(MeshConfig(data=devices))
    with jax.set_mesh(mesh):
        state = policy.start(*DEFINITION.init(jax.random.key(0), mesh), mesh)
        seen = []
        for step in range(steps):
            state, metrics, rows = policy.step(Evens(), state, "rl", step, 0, mesh)
            seen.append(SimpleNamespace(metrics=metrics, rows=rows))
    return state, seen


@pytest.fixture(scope="module")
def separate():
    return run_steps(PPO, 12)


def assert_learned(seen):
    rewards = [step.metrics["reward"] for step in seen]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.05
    losses = [step.metrics["critic/value_loss"] for step in seen]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    for step in seen:
        assert 0 < step.metrics["sampling/sampling_logp_difference/max"] < 1e-4
    assert seen[0].metrics["critic/explained_variance"] == 0  # a new head says 0 everywhere


def test_ppo_with_a_separate_critic_learns(separate):
    state, seen = separate
    assert_learned(seen)
    assert "head_DV" not in state.critic.params and "value_head_D" not in state.params
    assert {"critic/grad_norm", "critic/clip_ratio"} <= seen[0].metrics.keys()
    first = DEFINITION.init(jax.random.key(0))[0]["embed_VD"]
    policy, critic = (np.abs(x.params["embed_VD"] - first).max() for x in (state, state.critic))
    assert policy > 1e-4 and critic > 1e-4


def test_ppo_on_a_shared_trunk_learns():
    cfg = replace(PPO, critic=CriticConfig(kind="shared"))
    state, seen = run_steps(cfg, 12)
    assert_learned(seen)
    assert state.critic == () and np.abs(state.params["value_head_D"]).max() > 1e-4


def test_eight_devices_give_ppos_metrics_of_one(separate):
    _, many = run_steps(PPO, 2, devices=8)
    for a, b in zip(separate[1], many, strict=False):
        assert [row["completion"] for row in a.rows] == [row["completion"] for row in b.rows]
        for name in ("loss", "grad_norm", "critic/value_loss", "critic/grad_norm", "critic/values"):
            np.testing.assert_allclose(a.metrics[name], b.metrics[name], rtol=2e-3, atol=2e-6)


def test_a_kl_in_the_rewards_lowers_them_and_not_the_loss():
    """The policy leaves its reference; from then on the advantages are of rewards less beta times the divergence."""
    cfg = replace(with_objective(RL, "rloo"), loss=replace(OBJECTIVES["rloo"](RL).loss, beta=5.0))
    _, seen = run_steps(cfg, 3)
    assert abs(seen[0].metrics["kl"]) < 1e-6 and abs(seen[2].metrics["kl"]) > 1e-4
    rows = seen[2].rows
    rewards_PG, advantages_PG = (np.array([row[key] for row in rows]).reshape(4, 8) for key in ("reward", "advantage"))
    plain_PG = (rewards_PG - rewards_PG.mean(axis=1, keepdims=True)) * 8 / 7
    assert np.abs(advantages_PG - plain_PG).max() > 1e-3
    np.testing.assert_allclose(advantages_PG.sum(axis=1), 0, atol=1e-4)


def test_where_sampler_and_trainer_agree_the_correction_changes_nothing():
    corrected = replace(RL, loss=PolicyLossConfig(sampler_correction="sequence_truncate"))
    (_, (one,)), (_, (other,)) = run_steps(RL, 1), run_steps(corrected, 1)
    np.testing.assert_allclose(other.metrics["sampling/correction/mean"], 1, atol=1e-4)
    np.testing.assert_allclose(one.metrics["grad_norm"], other.metrics["grad_norm"], rtol=1e-3)


def test_overlong_completions_lose_reward_and_dynamic_sampling_fills_the_batch():
    cfg = with_objective(RL, "dapo")
    cfg = replace(cfg, filter_groups="reward", overlong_buffer=3, overlong_penalty=0.5)
    _, (step,) = run_steps(cfg, 1)
    assert step.metrics["num_gen_batches"] == 1 and step.metrics["groups_missing"] == 0
    longest = [row for row in step.rows if row["tokens"] == 6]
    assert longest and all(row["overlong"] == -0.5 for row in longest)


def make_batch(number, cfg, differing):
    """A batch of whose groups the first `differing` have samples that differ; tokens say where a row is from."""
    P, G = cfg.num_prompts, cfg.group_size
    B = P * G
    parts = [{"reward": float(b % G == 0 and b // G < differing), "accuracy": 0.0} for b in range(B)]
    tokens_BN = np.broadcast_to(number * 100 + np.arange(B)[:, None] // G, (B, 2)).astype(np.int32)
    mask_BN = np.ones((B, 2), bool)
    samples = Samples(tokens_BN, np.zeros((B, 2), np.float32), mask_BN, np.ones(B, bool))
    problems = [Problem(prompt=f"{number}/{p}", answer="", key=f"{number}/{p}") for p in range(P)]
    metrics = {"reward": float(differing), "num_tokens": 10.0, "time/generate": 1.0, "completions/max_length": number}
    return Rollout(problems, ["x"] * B, mask_BN, mask_BN, samples, parts, np.zeros(B, np.float32), metrics)


def filled(differing, **changes):
    cfg = RLConfig(steps=5, num_prompts=3, group_size=2, filter_groups="reward", **changes)
    asked = []

    def sample_batch(number):
        asked.append(number)
        return make_batch(number, cfg, differing[len(asked) - 1])

    return filled_rollout(sample_batch, cfg, step=2), asked


def test_dynamic_sampling_samples_again_until_the_batch_is_full():
    rollout, asked = filled([1, 0, 3], max_num_gen_batches=4)
    assert asked == [2, 11, 12]  # beyond the run's steps, each number once
    assert [problem.key for problem in rollout.problems] == ["2/0", "12/0", "12/1"]
    np.testing.assert_array_equal(rollout.samples.tokens_BN[:, 0], [200, 200, 1200, 1200, 1201, 1201])
    assert rollout.counted_B is not None and rollout.counted_B.all()
    np.testing.assert_allclose(np.abs(rollout.advantages_B), 0.7071, rtol=1e-3)
    metrics = rollout.metrics
    assert (metrics["num_gen_batches"], metrics["groups_filtered"], metrics["groups_missing"]) == (3, 5, 0)
    assert (metrics["num_tokens"], metrics["time/generate"], metrics["completions/max_length"]) == (30, 3, 12)


def test_dynamic_sampling_stops_at_its_bound_and_the_loss_leaves_the_filling_out():
    rollout, asked = filled([1, 0], max_num_gen_batches=2)
    assert len(asked) == 2 and rollout.metrics["groups_missing"] == 2
    mask_BN = rollout.batch(mask_truncated=False)["mask_BN"]
    np.testing.assert_array_equal(mask_BN[:, 0], [True, True, False, False, False, False])


def test_objectives_have_the_options_that_papers_made():
    assert with_objective(RL, "grpo").loss.beta == 0.04
    dapo = with_objective(RL, "dapo")
    assert (dapo.loss.epsilon, dapo.loss.epsilon_high, dapo.loss.beta) == (0.2, 0.28, 0)
    assert dapo.filter_groups == "accuracy" and dapo.overlong_buffer == 1
    assert with_objective(RL, "dr_grpo").loss.aggregation == "seq-mean-token-sum-norm"
    assert with_objective(RL, "gspo").loss.importance_sampling_level == "sequence"
    assert PPO.loss.baseline == "critic" and PPO.critic.lam == 1 and PPO.loss.kl_in == "loss"
    with_kl = with_objective(replace(RL, loss=PolicyLossConfig(beta=0.01)), "ppo").loss
    assert (with_kl.beta, with_kl.kl_in, with_kl.kl_estimator) == (0.01, "reward", "k1")
    with pytest.raises(ConfigError, match="objective = 'ppp'"):
        with_objective(RL, "ppp")
