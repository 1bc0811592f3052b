"""GRPO against PPO, small: what is compared, what is counted, and that a finished part is not done again."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments import grpo_math
from experiments.grpo_vs_ppo import CONFIG, CONFIGS, Config, from_checkpoint, tables, variants
from moe_jax.analysis.rl_cost import policy_step_cost
from moe_jax.config import ConfigError, PolicyLossConfig
from moe_jax.model.definition import Definition
from moe_jax.rl.objectives import with_objective
from moe_jax.rl.ppo import critic_definition

ROOT = Path(__file__).parents[2]
STEPS = 4
SMALL = f"""
    --mesh.data 1 --num-seeds 2 --lambdas 1.0 --methods grpo ppo ppo_shared --data.min-terms 2 --data.max-terms 3
    --data.test-problems 12 --prompt-length 8 --pretrain.steps 4 --pretrain.batch-size 8 --pretrain.sequence-length 48
    --rl.steps {STEPS} --rl.num-prompts 4 --rl.group-size 4 --rl.sampling.max-new-tokens 12 --rl.min-active-groups 0
    --rl.reward.random --evaluation.samples 2 --evaluation.batch-size 12 --checkpoint.every 2
    --model.hidden-size 32 --model.moe.num-experts 4 --model.moe.expert-size 16
"""


def test_variants_differ_in_their_baseline_and_in_where_the_kl_stands():
    grpo, ppo, *others = variants(CONFIG)
    assert (grpo.name, ppo.name) == ("grpo", "ppo_1") and grpo.rl == grpo_math.CONFIG.rl
    assert [variant.name for variant in others] == ["ppo_0.95", "ppo_shared"]
    assert ppo.rl.critic.lam == 1 and ppo.rl.critic.kind == "separate"
    assert ppo.rl.loss == replace(
        grpo.rl.loss, baseline="critic", scale_rewards="batch", kl_estimator="k1", kl_in="reward"
    )
    assert replace(ppo.rl, loss=grpo.rl.loss, critic=grpo.rl.critic) == grpo.rl


def test_ppo_has_a_variant_for_each_setting_and_the_shared_trunk_no_rate():
    cfg = replace(CONFIG, methods=("ppo", "ppo_shared"), lambdas=(1.0, 0.95), critic_learning_rates=(1e-3, 3e-3))
    found = {variant.name: variant.rl.critic for variant in variants(cfg)}
    assert list(found) == [
        *("ppo_1_0.001", "ppo_1_0.003", "ppo_0.95_0.001", "ppo_0.95_0.003"),
        "ppo_shared",
    ]
    assert found["ppo_0.95_0.003"].lam == 0.95 and found["ppo_0.95_0.003"].optimizer.learning_rate == 3e-3
    assert found["ppo_shared"] == replace(CONFIG.rl.critic, kind="shared")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_seeds": 0}, "num_seeds = 0"),
        ({"methods": ("ppo", "ppo")}, "each once"),
        ({"lambdas": ()}, "at least one"),
        ({"lambdas": (2.0,)}, "CriticConfig.lam = 2"),
        ({"rl": with_objective(CONFIG.rl, "ppo")}, "is PPO's"),
        ({"data": replace(CONFIG.data, source="reasoning_gym", task="chain_sum", curriculum_threshold=0.5)}, "same"),
        ({"prompt_length": 1000}, "max_position"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        Config(**change)


@pytest.mark.parametrize("source", CONFIGS)
def test_each_source_of_problems_keeps_its_room(source):
    cfg, grpo = CONFIGS[source], grpo_math.CONFIGS[source]
    assert cfg.prompt_length == grpo.prompt_length and cfg.rl.sampling == grpo.rl.sampling


def test_from_a_checkpoint_the_rates_are_those_of_a_large_model():
    cfg = from_checkpoint(replace(CONFIG, init="some/model", prompt_length=20))
    assert cfg.rl.optimizer.learning_rate == 1e-6 and cfg.critic_learning_rates == (1e-5,) and cfg.init == "some/model"


def test_the_estimate_counts_the_critic():
    """A separate critic: weights, two moments, a gradient; its forward pass for values, and its own training."""
    rl = replace(CONFIG.rl, loss=PolicyLossConfig())
    ppo = with_objective(rl, "ppo")
    grpo_cost, ppo_cost = (policy_step_cost(CONFIG.model, each, 20) for each in (rl, ppo))
    definition = critic_definition(CONFIG.model)
    critic = sum(int(np.prod(variable.shape)) for variable in definition.variables.values())
    policy = sum(int(np.prod(variable.shape)) for variable in Definition.of(CONFIG.model).variables.values())
    assert grpo_cost.state_bytes == 5 * 4 * policy
    assert ppo_cost.state_bytes - grpo_cost.state_bytes == 4 * 4 * critic
    assert ppo_cost.update_flops * 3 == grpo_cost.update_flops * 7
    shared = replace(ppo, critic=replace(ppo.critic, kind="shared"))
    shared_cost = policy_step_cost(CONFIG.model, shared, 20)
    assert shared_cost.state_bytes == grpo_cost.state_bytes
    assert shared_cost.update_flops * 3 == grpo_cost.update_flops * 4


def test_one_seed_has_no_interval_and_a_silent_device_no_peak():
    nan = float("nan")
    one = {"mean": 0.5, "low": nan, "high": nan, "seeds": 1}
    numbers = {"policy": 1000, "reference": 0, "critic": 0, "optimizer": 2000, "start": 1000}
    memory = {"numbers": numbers, "held": 16e6, "state_computed": 2e7, "peak_planned": 3e7, "peak_computed": 4e7}
    times = {"step_time": one, "time/generate": one, "time/update": one}
    entry = {"title": "GRPO", "figures": {"pass_at_1": one, "consensus": one, "reward": one, **times}}
    text = tables({"reference": "GRPO", "methods": {"grpo": {**entry, "memory": {**memory, "peak_device": None}}}})
    assert "| GRPO   | 0.500  | —             | 0.500  | 0.500                | —             |" in text
    assert "nan" not in text and "16.0" in text and "1,000" in text


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    return os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}


def finish(run_dir, environment):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.grpo_vs_ppo", "--run-dir", str(run_dir), *SMALL.split()],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def read_rows(run_dir):
    """The steps'; an evaluation that is done again is logged again, at the end."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if not row["phase"].startswith("evaluate_")]
    times = ("elapsed", "time/", "step_time", "tokens_per_second")
    return [{name: value for name, value in row.items() if not name.startswith(times)} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, environment):
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    return run_dir, finish(run_dir, environment).stdout


@pytest.mark.slow
def test_the_tables_have_every_method(whole):
    run_dir, printed = whole
    summary = json.loads((run_dir / "summary.json").read_text())
    methods = summary["methods"]
    assert list(methods) == ["base", "grpo", "ppo_1", "ppo_shared"] and summary["seeds"] == [0, 1]
    assert summary["samples"] == STEPS * 16
    table = (run_dir / "table.md").read_text()
    assert table in printed and "| PPO, λ = 1 " in table
    singles = {name: entry["per_seed"] for name, entry in methods.items()}
    difference = methods["ppo_1"]["against"]["pass_at_1"]
    assert difference["mean"] == pytest.approx(
        np.mean(np.subtract(singles["ppo_1"]["pass_at_1"], singles["grpo"]["pass_at_1"]))
    )
    grpo, ppo, shared = (methods[name]["memory"] for name in ("grpo", "ppo_1", "ppo_shared"))
    assert grpo["numbers"]["critic"] == shared["numbers"]["critic"] == 0 < ppo["numbers"]["critic"]
    assert shared["numbers"]["policy"] - grpo["numbers"]["policy"] == 32  # the value head
    # Two moments for each weight, and a few counters.
    assert 0 <= ppo["numbers"]["optimizer"] - 2 * (ppo["numbers"]["policy"] + ppo["numbers"]["critic"]) < 10
    for memory in (grpo, ppo, shared):
        assert memory["held"] < memory["peak_planned"] and memory["held"] < memory["state_computed"]
    assert ppo["planned"]["critic_update"] > 0 and grpo["planned"]["logprobs"] > 0
    for plot in ("learning", "critic"):
        assert (run_dir / "plots" / f"{plot}.png").stat().st_size > 1000


@pytest.mark.slow
def test_methods_start_from_the_same_base_on_the_same_problems(whole):
    run_dir, _ = whole
    rows = read_rows(run_dir)
    assert {row["phase"] for row in rows} == {
        f"{name}-seed{seed}" for name in ("base", "grpo", "ppo_1", "ppo_shared") for seed in (0, 1)
    }

    def first(name):
        lines = (run_dir / f"rollouts/{name}/000001.jsonl").read_text().splitlines()
        return [json.loads(line)["prompt"] for line in lines]

    assert first("grpo-seed1") == first("ppo_1-seed1") == first("ppo_shared-seed1") != first("grpo-seed0")
    kl = {row["phase"]: row["kl"] for row in rows if row["step"] == 1 and "kl" in row}
    assert len(kl) == 6 and max(map(abs, kl.values())) < 1e-5  # the policy still is the base
    explained = [row["critic/explained_variance"] for row in rows if row["phase"] == "ppo_1-seed0"]
    assert explained[0] == 0 and len(explained) == STEPS


@pytest.mark.slow
def test_a_finished_part_is_read_and_an_unfinished_one_goes_on(whole, environment):
    run_dir, _ = whole
    before, summary = read_rows(run_dir), json.loads((run_dir / "summary.json").read_text())
    (run_dir / "evaluations/ppo_1-seed1.json").unlink()
    kept = run_dir / "evaluations/grpo-seed1.json"
    time = kept.stat().st_mtime_ns
    done = finish(run_dir, environment)
    assert "evaluate ppo_1-seed1" in done.stderr and "evaluate grpo" not in done.stderr
    assert "\nppo_1-seed1 " not in done.stderr  # it was trained
    assert kept.stat().st_mtime_ns == time and read_rows(run_dir) == before
    again = json.loads((run_dir / "summary.json").read_text())
    assert again["methods"] == summary["methods"]
