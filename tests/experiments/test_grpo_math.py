"""The main job, small: what it leaves behind, and that stopping it at any moment changes nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = """
    --mesh.data 1 --data.min-terms 2 --data.max-terms 3 --data.test-problems 16 --prompt-length 8
    --pretrain.steps 6 --pretrain.batch-size 8 --pretrain.sequence-length 48
    --rl.steps 4 --rl.num-prompts 4 --rl.group-size 4 --rl.sampling.max-new-tokens 12 --rl.loss.beta 0.01
    --rl.num-iterations 2 --rl.num-minibatches 2 --rl.min-active-groups 0 --rl.reward.random
    --evaluation.batch-size 16 --evaluation.samples 4 --checkpoint.every 2
    --model.hidden-size 32 --model.moe.num-experts 4 --model.moe.expert-size 16
"""
TIMES = ("elapsed", "time/", "step_time", "tokens_per_second")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Compiled programs are kept between the runs of this file."""
    cache = str(tmp_path_factory.mktemp("cache"))
    return os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}


def command(run_dir, *more):
    return [sys.executable, "-m", "experiments.grpo_math", "--run-dir", str(run_dir), *SMALL.split(), *more]


def finish(run_dir, environment, *more):
    done = subprocess.run(
        command(run_dir, *more), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def whole(tmp_path_factory, environment):
    """An uninterrupted run."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    done = finish(run_dir, environment)
    return run_dir, done.stdout


def read_metrics(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]


def read_rollouts(run_dir):
    return {path.relative_to(run_dir): path.read_text() for path in sorted(run_dir.glob("rollouts/*/*.jsonl"))}


@pytest.mark.slow
def test_the_run_folder_has_everything(whole):
    run_dir, printed = whole
    summary = json.loads((run_dir / "summary.json").read_text())
    for name in ("before", "after", "control", "random_reward"):
        figure = summary[f"pass_at_1_{name}"]
        assert figure["problems"] == 16 and 0 <= figure["low"] <= figure["mean"] <= figure["high"] <= 1
    assert summary["seconds"] > 0 and summary["parameters_total"] > summary["parameters_active"] > 0
    assert 0 < summary["sampling_logp_difference_max"] < 1e-4
    phases = {row["phase"] for row in read_metrics(run_dir)}
    assert {"base", "grpo", "control", "random_reward", "evaluate_before", "evaluate_grpo"} <= phases
    assert list((run_dir / "tensorboard").rglob("events*"))
    for plot in ("reward", "accuracy", "response_length", "entropy", "kl", "expert_load"):
        assert (run_dir / "plots" / f"{plot}.png").stat().st_size > 1000
    assert summary["cons_at_4_after"]["problems"] == 16
    rows = [json.loads(line) for line in (run_dir / "rollouts/grpo/000003.jsonl").read_text().splitlines()]
    assert len(rows) == 16
    assert {"prompt", "completion", "accuracy", "format", "reward", "advantage", "step"} <= rows[0].keys()
    assert abs(sum(row["advantage"] for row in rows[:4])) < 1e-5
    assert "pass@1" in printed and str(run_dir) in printed


@pytest.mark.slow
def test_grpo_logs_a_kl_that_grows_from_zero(whole):
    kl = [row["kl"] for row in read_metrics(whole[0]) if row["phase"] == "grpo"]
    assert kl[0] < kl[-1] and kl[-1] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "signum"), [("base", signal.SIGKILL), ("grpo", signal.SIGTERM), ("grpo", signal.SIGKILL)]
)
def test_a_run_that_was_stopped_resumes_to_the_same_numbers(tmp_path, whole, environment, phase, signum):
    process = subprocess.Popen(command(tmp_path), cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and f'"phase": "{phase}", "step": 3' in metrics.read_text():
            break
        time.sleep(0.01)
    process.send_signal(signum)
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode == (143 if signum == signal.SIGTERM else -signal.SIGKILL), stderr[-2000:]
    finish(tmp_path, environment)
    assert read_metrics(tmp_path) == read_metrics(whole[0])
    assert read_rollouts(tmp_path) == read_rollouts(whole[0])


@pytest.mark.slow
def test_a_signal_during_start_up_or_compilation_stops_cleanly(tmp_path):
    """Without the cache of compiled programs, the first step compiles for long: no safe point is near."""
    process = subprocess.Popen(command(tmp_path), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (tmp_path / "config.json").exists():
        time.sleep(0.01)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 143, stderr[-2000:]
    assert "The same command resumes." in stderr and time.monotonic() - started < 30


def test_mistakes_are_one_clear_line(tmp_path):
    def mistake(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "experiments.grpo_math", "--run-dir", str(tmp_path / "run"), *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 2 and "Traceback" not in done.stderr
        return " ".join((done.stderr + done.stdout).replace("│", " ").split())

    assert "--rl.group-size" in mistake("--rl.group-sise", "4")
    assert "RLConfig.group_size = 1" in mistake("--rl.group-size", "1")
    assert "ModelConfig.vocab_size = 100" in mistake("--model.vocab-size", "100")
    assert "train.jsonl" in mistake("--data.source", "gsm8k", "--data.path", str(tmp_path))
    assert "did you mean 'tiny_moe'" in mistake("--preset", "tiny_mo")
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "config.json").write_text('{"experiment": "pretrain", "config": {}, "versions": {}}')
    assert "belongs to the experiment 'pretrain'" in mistake()
