"""R1 whole, small: every stage is there, starts from the right model and text, and is done once, stopped or not."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.r1 import CONFIG, PUBLISHED, READABLE, TITLES, Config, FineTuning, paper, stages
from moe_jax.config import ConfigError, RewardConfig
from moe_jax.presets import deepseek_v3
from moe_jax.rl.rewards import readable

ROOT = Path(__file__).parents[2]
RL = "--{0}.steps 2 --{0}.num-prompts 8 --{0}.group-size 4 --{0}.min-active-groups 0 --{0}.sampling.max-new-tokens 24 "
TUNING = "--{0}.documents 4 --{0}.max-batches 40 --{0}.train.steps 3 --{0}.train.batch-size 4 "
SMALL = f"""
    --mesh.data 1 --data.min-terms 2 --data.max-terms 3 --data.max-term 3 --data.worked-fraction 0.9 --prompt-length 8
    --data.step-error-rate 0 --data.test-problems 8 --checkpoint.every 1 --evaluation.samples 2
    --pretrain.steps 40 --pretrain.batch-size 8 --pretrain.sequence-length 48 --pretrain.optimizer.warmup-steps 2
    --model.hidden-size 32 --model.moe.num-experts 4 --model.moe.expert-size 16
    --student-model.hidden-size 32 --student-model.num-layers 1 --student-model.intermediate-size 32
    {"".join(RL.format(stage) for stage in ("zero", "language-rl", "final-rl"))}
    {"".join(TUNING.format(stage) for stage in ("cold-start", "rejection", "distillation"))}
"""
TIMES = ("elapsed", "time/", "step_time", "tokens_per_second")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    compiled = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
    return os.environ | compiled | {"XLA_FLAGS": flags}


def command(run_dir):
    return [sys.executable, "-m", "experiments.r1", "--run-dir", str(run_dir), *SMALL.split()]


def finish(run_dir, environment):
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 1800}
    done = subprocess.run(command(run_dir), **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def whole(tmp_path_factory, environment):
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    return run_dir, finish(run_dir, environment).stdout


def read_metrics(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]


def read_rollouts(run_dir):
    return {path.relative_to(run_dir): path.read_text() for path in sorted(run_dir.glob("rollouts/*/*.jsonl"))}


@pytest.mark.slow
def test_every_stage_is_in_the_table(whole):
    run_dir, printed = whole
    summary = json.loads((run_dir / "summary.json").read_text())
    assert list(summary["stages"]) == list(TITLES)
    table = (run_dir / "table.md").read_text()
    assert table in printed
    for name, entry in summary["stages"].items():
        accuracy = entry["pass_at_1"]
        assert accuracy["problems"] == 8 and 0 <= accuracy["low"] <= accuracy["mean"] <= accuracy["high"] <= 1
        assert {"cons_at_2", "mean_length", "format", "worked", "language", "readable"} <= entry.keys()
        (line,) = (line for line in table.splitlines() if f"| {entry['title']} " in line)
        assert (str(PUBLISHED[name]) in line) if name in PUBLISHED else line.endswith(" |")
    assert "r1 - zero_longer" in summary["differences"]
    for plot in ("stages", "reinforcement"):
        assert (run_dir / "plots" / f"{plot}.png").stat().st_size > 1000


@pytest.mark.slow
def test_only_what_is_right_and_readable_is_learned(whole):
    run_dir, _ = whole
    for stage in ("cold_start", "rejection", "lessons"):
        files = sorted(run_dir.glob(f"rollouts/{stage}-seed0/*.jsonl"))
        rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        for row in rows:
            right = row["finished"] and row["accuracy"] == 1
            assert row["kept"] == float(right and readable(row["completion"], "latin"))
        assert len({(row["prompt"], row["completion"]) for row in rows if row["kept"]}) >= 4
        assert {row["phase"] for row in read_metrics(run_dir)} >= {f"{stage}-seed0"}


@pytest.mark.slow
def test_language_is_rewarded_after_zero_only(whole):
    phases = {row["phase"]: row for row in read_metrics(whole[0]) if row["step"] == 1}
    rewarded = {name for name, row in phases.items() if "rewards/language/mean" in row}
    assert rewarded == {f"{name}-seed0" for name in ("dev2", "r1", "student_rl")}
    assert {"zero-seed0", "zero_2-seed0", "zero_3-seed0"} <= phases.keys()
    for name in ("zero", "dev2", "r1"):  # the policy is still the reference, at the first step
        assert abs(phases[f"{name}-seed0"]["kl"]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "signum"),
    [("cold_start-seed0", signal.SIGKILL), ("dev1-seed0", signal.SIGTERM), ("dev2-seed0", signal.SIGKILL)],
)
def test_a_run_that_was_stopped_ends_in_the_same_numbers(tmp_path, whole, environment, phase, signum):
    process = subprocess.Popen(command(tmp_path), cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 1800
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and f'"phase": "{phase}", "step": 1' in metrics.read_text():
            break
        time.sleep(0.01)
    process.send_signal(signum)
    process.communicate(timeout=300)
    assert process.returncode != 0
    assert not (tmp_path / "evaluations" / "r1-seed0.json").exists()
    resumed = finish(tmp_path, environment)
    assert "\nbase-seed0 1/" not in resumed.stderr and "\nzero-seed0 1/" not in resumed.stderr
    assert read_metrics(tmp_path) == read_metrics(whole[0])
    assert read_rollouts(tmp_path) == read_rollouts(whole[0])


@pytest.mark.slow
def test_a_finished_run_does_nothing_but_report(whole, environment):
    run_dir, _ = whole
    before, summary = read_metrics(run_dir), json.loads((run_dir / "summary.json").read_text())
    again = finish(run_dir, environment)
    assert read_metrics(run_dir) == before and "seed0" not in again.stderr
    found = json.loads((run_dir / "summary.json").read_text())
    assert found["stages"] == summary["stages"]


def test_the_papers_settings():
    """Figures of arXiv:2501.12948v2, supplement B.4; a step is a rollout of 16 updates."""
    cfg = paper(replace(CONFIG, init="deepseek-ai/DeepSeek-V3-Base", model=deepseek_v3()))
    zero = cfg.zero
    assert zero.num_prompts * zero.group_size == 8192 and zero.num_minibatches == 16 and zero.group_size == 16
    assert zero.steps * zero.num_minibatches == 10_400 and zero.reference_refresh_steps * zero.num_minibatches == 400
    assert zero.optimizer.learning_rate == 3e-6 and zero.loss.beta == 1e-3 and zero.sampling.max_new_tokens == 32_768
    assert zero.reward == RewardConfig() and cfg.language_rl.reward == cfg.final_rl.reward == READABLE
    assert cfg.language_rl.loss.epsilon == cfg.language_rl.loss.epsilon_high == 10
    assert cfg.final_rl.steps * cfg.final_rl.num_minibatches == pytest.approx(1700, abs=8)
    cold = cfg.cold_start.train
    assert cold.batch_size == 128 and cold.optimizer.learning_rate == 5e-5
    assert cold.optimizer.learning_rate * cold.optimizer.final_fraction == pytest.approx(5e-6)
    assert cfg.rejection.documents == 600_000 and cfg.distillation.train.batch_size == 64
    assert cfg.distillation.train.optimizer.learning_rate == 1e-4 and "1.5B" in cfg.student


def test_the_papers_settings_make_room_in_a_smaller_model():
    cfg = paper(replace(CONFIG, init="some/model", model=replace(CONFIG.model, max_position=2048)))
    assert cfg.prompt_length + cfg.zero.sampling.max_new_tokens == cfg.rejection.train.sequence_length == 2048


def test_without_a_student_nothing_is_distilled():
    assert stages(replace(CONFIG, init="some/model")) == ["base", "zero", "dev1", "dev2", "dev3", "r1", "zero_longer"]
    assert stages(replace(CONFIG, controls=False))[-2:] == ["student", "distilled"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_seeds": 0}, "num_seeds = 0"),
        ({"switch_rate": 1.5}, "switch_rate = 1.5"),
        ({"data": replace(CONFIG.data, source="countdown", test_problems=8)}, "must be 'arithmetic'"),
        ({"prompt": "Solve this"}, "must contain {problem}"),
        ({"evaluation": replace(CONFIG.evaluation, language="")}, "name the language"),
        ({"evaluation": replace(CONFIG.evaluation, language="zh")}, "language_rl.reward.language = 'latin'"),
        ({"prompt_length": 1000}, "max_position = 1024: rows, or prompt_length = 1000"),
    ],
)
def test_what_cannot_be_run_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        Config(**change)


def test_samples_to_learn_from_are_at_least_one():
    with pytest.raises(ConfigError, match=r"FineTuning.documents = 0"):
        FineTuning(0, 1, CONFIG.pretrain)
