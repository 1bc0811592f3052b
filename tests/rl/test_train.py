"""A phase tells its environment of accuracies: each step's, and on resuming those of the steps before."""

from types import SimpleNamespace

import pytest

from moe_jax.config import CheckpointConfig, RLConfig
from moe_jax.rl import train
from moe_jax.rl.train import PolicyTrainer


class Trainer(PolicyTrainer):
    """One whose steps cost nothing; step s has accuracy s / 10."""

    def __init__(self):
        self.cfg = RLConfig()

    def start(self, params, rest, mesh):
        return SimpleNamespace(train=None)

    def step(self, environment, state, phase, step, seed, mesh, between=lambda: None):
        return state, {"rewards/accuracy/mean": step / 10}, []


@pytest.mark.parametrize("first", [0, 3])
def test_an_environment_is_told_of_all_steps_in_order(monkeypatch, first):
    logged = [{"step": number, "rewards/accuracy/mean": (number - 1) / 10} for number in range(1, first + 1)]
    run = SimpleNamespace(metrics=lambda phase: logged, write_rows=lambda name, rows: None)
    told = []
    environment = SimpleNamespace(observe=lambda step, accuracy: told.append((step, accuracy)))

    def run_phase(run, guard, phase, steps, state, body, **_):
        for step in range(first, 6):
            state, _ = body(state, step)
        return state

    monkeypatch.setattr(train, "run_phase", run_phase)
    session = SimpleNamespace(run=run, guard=SimpleNamespace(check=None), mesh=None)
    Trainer().train(session, "grpo", environment, {}, {}, seed=0, checkpoint=CheckpointConfig())  # pyright: ignore
    assert told == [(step, step / 10) for step in range(6)]
