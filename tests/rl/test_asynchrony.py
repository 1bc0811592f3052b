"""One step off: samples come from the policy of the step before, and a run that was stopped resumes bit for bit."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from moe_jax.config import (
    AttentionConfig,
    CheckpointConfig,
    ConfigError,
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
from moe_jax.rl.train import PolicyTrainer
from moe_jax.rng import random_key
from moe_jax.sharding import make_mesh
from moe_jax.training.run import Run
from moe_jax.training.signals import StopGuard, Stopped

TOKENIZER = ByteTokenizer()
DEFINITION = Definition.of(
    ModelConfig(
        vocab_size=TOKENIZER.vocab_size,
        hidden_size=16,
        num_layers=1,
        intermediate_size=16,
        attention=AttentionConfig(kind="gqa", num_heads=2, num_kv_heads=1, head_dim=8),
        moe=MoEConfig(),
        initializer_range=0.2,
    )
)
RL = RLConfig(
    steps=5,
    num_prompts=2,
    group_size=4,
    one_step_off=True,
    num_minibatches=2,
    min_active_groups=0.0,
    sampling=SamplingConfig(max_new_tokens=4),
    optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_steps=0),
    loss=PolicyLossConfig(sampler_correction="token_truncate"),
)


class Curriculum:
    """Prompts that say how many steps it has been told of."""

    def __init__(self):
        self.told, self.asked = 0, []

    def problems(self, step, count):
        self.asked.append((step, self.told))
        return [Problem(f"{self.told}+{i}", "", str(i)) for i in range(count)]

    def score(self, completions):
        shares = [float(np.mean([ord(c) % 2 == 0 for c in one.text] or [0])) for one in completions]
        return [{"reward": share, "accuracy": share} for share in shares]

    def observe(self, step, accuracy):
        assert step == self.told
        self.told += 1


class StopAt(StopGuard):
    """A guard whose signal comes before a given check; there are two in a step."""

    def __init__(self, check):
        super().__init__()
        self.left = check

    def check(self):
        self.left -= 1
        if self.left < 0:
            raise Stopped(15)


@pytest.fixture(scope="module")
def policy():
    return PolicyTrainer(DEFINITION, RL, TOKENIZER, prompt_length=5)


def train(policy, folder, guard):
    mesh, environment = make_mesh(MeshConfig(data=1)), Curriculum()
    with jax.set_mesh(mesh), Run.open(folder, "test", {}) as run:
        params, rest = DEFINITION.init(jax.random.key(0), mesh)
        session = SimpleNamespace(run=run, guard=guard, mesh=mesh)
        checkpoint = CheckpointConfig(every=2)
        try:
            state = policy.train(session, "rl", environment, params, rest, seed=0, checkpoint=checkpoint)
        except Stopped:
            state = None
        rows = [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in run.metrics("rl")]
    return state, rows, environment


TIMES = ("elapsed", "time", "step_time", "tokens_per_second")


@pytest.fixture(scope="module")
def whole(policy, tmp_path_factory):
    return train(policy, tmp_path_factory.mktemp("runs") / "whole", StopAt(99))


def test_samples_come_from_the_policy_before(policy, whole):
    _, rows, environment = whole
    assert [row["sampling/staleness"] for row in rows] == [0, 2, 2, 2, 2]
    assert environment.asked == [(0, 0), (1, 0), (2, 1), (3, 2), (4, 3)]
    differences = [row["sampling/sampling_logp_difference/max"] for row in rows]
    assert differences[0] < 1e-4 < 1e-3 < min(differences[1:])
    assert all(0.5 < row["sampling/correction/mean"] < 2 for row in rows)


def test_the_second_step_samples_as_the_first_policy(policy):
    mesh, environment = make_mesh(MeshConfig(data=1)), Curriculum()
    with jax.set_mesh(mesh):
        params, rest = DEFINITION.init(jax.random.key(0), mesh)
        state = policy.start(params, rest, mesh)
        state, _, _ = policy.step(environment, state, "rl", 0, 0, mesh)
        _, _, rows = policy.step(environment, state, "rl", 1, 0, mesh)
        key = random_key(0, "rollout/rl", 1)
        expected = rollout(
            Curriculum(), policy.sample, params, rest, TOKENIZER, RL, prompt_length=5, step=1, seed=0, key=key
        )
    assert [row["completion"] for row in rows] == expected.completions


@pytest.mark.parametrize("stop", [3, 4, 6, 9])
def test_a_stopped_run_resumes_bit_for_bit(policy, whole, tmp_path, stop):
    state, rows, _ = whole
    assert train(policy, tmp_path / "cut", StopAt(stop))[0] is None
    resumed, again, _ = train(policy, tmp_path / "cut", StopAt(99))
    assert again == rows
    for name, value in state.params.items():
        np.testing.assert_array_equal(value, resumed.params[name])


def test_combinations_that_mean_nothing_are_refused():
    with pytest.raises(ConfigError, match="one_step_off"):
        replace(RL, filter_groups="accuracy")
    with pytest.raises(ConfigError, match="sampler_correction"):
        replace(RL, loss=PolicyLossConfig(surrogate="reinforce"))
