"""Pre-training on text, small: dense and sparse learn, and a stopped run resumes to the same numbers."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = """
    --mesh.data 1 --train.steps 8 --train.batch-size 4 --train.sequence-length 64 --train.optimizer.name adamw
    --validation-every 4 --checkpoint.every 2 --model.hidden-size 32
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("corpus") / "text.txt"
    file.write_text("\n\n".join(f"{i}: the quick brown fox jumps over {i % 7} lazy dogs. " * 20 for i in range(40)))
    return file


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    return os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}


def pretrain(run_dir, corpus, environment, *more, stop_after=None):
    """Runs to the end, or kills the run at the metrics line of a step."""
    arguments = ["--run-dir", str(run_dir), "--data.path", str(corpus), *SMALL.split(), *more]
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.pretrain", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while stop_after is not None and process.poll() is None:
        metrics = run_dir / "metrics.jsonl"
        if metrics.exists() and f'"step": {stop_after}' in metrics.read_text():
            process.kill()
            break
        time.sleep(0.01)
    stdout, stderr = process.communicate(timeout=600)
    assert stop_after is not None or process.returncode == 0, stderr[-3000:]
    return stdout


def losses(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(row["phase"], row["step"], row["loss"]) for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["tiny_moe", "tiny_dense"])
def test_it_learns_and_reports_bits_per_byte(tmp_path, corpus, environment, preset):
    printed = pretrain(tmp_path, corpus, environment, "--preset", preset)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert f"{summary['validation_bits_per_byte']:.4f} bits per byte" in printed
    seen = [(step, loss) for phase, step, loss in losses(tmp_path) if phase == "pretrain"]
    assert [step for step, _ in seen] == list(range(1, 9)) and seen[-1][1] < seen[0][1]
    validated = [(step, loss) for phase, step, loss in losses(tmp_path) if phase == "validation"]
    assert [step for step, _ in validated] == [4, 8] and validated[1][1] < validated[0][1]
    assert (tmp_path / "plots" / "loss.png").exists()


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_losses(tmp_path, corpus, environment):
    pretrain(tmp_path / "whole", corpus, environment)
    pretrain(tmp_path / "cut", corpus, environment, stop_after=3)
    assert ("pretrain", 8) not in [row[:2] for row in losses(tmp_path / "cut")]
    pretrain(tmp_path / "cut", corpus, environment)
    assert sorted(losses(tmp_path / "cut")) == sorted(losses(tmp_path / "whole"))
