"""The low-precision experiment, small: its tables, its arms' arithmetic, and that a finished part is not done again."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.low_precision import CONFIG, TITLES, Config, arithmetic, bits_summary, optimizer_of
from moe_jax.config import ConfigError

ROOT = Path(__file__).parents[2]
SMALL = """
    --mesh.data 1 --num-seeds 2 --validation-batches 2 --int4-steps 3 --bits int8 int4
    --train.steps 6 --train.batch-size 4 --train.sequence-length 64 --train.optimizer.warmup-steps 1
    --model.first-k-dense 0 --model.num-layers 1 --model.hidden-size 32 --model.mtp.depth 0
    --model.moe.num-experts 4 --model.moe.expert-size 16 --model.quantization-block 16
"""


def finish(run_dir, corpus, *more):
    arguments = ["--run-dir", str(run_dir), "--data.path", str(corpus), *SMALL.split(), *more]
    return subprocess.run(
        [sys.executable, "-m", "experiments.low_precision", *arguments],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
def test_a_run_reports_gaps_bits_and_recovery_and_does_nothing_twice(tmp_path):
    corpus = tmp_path / "text.txt"
    corpus.write_text("\n\n".join(f"{i}: the quick brown fox jumps over {i % 7} lazy dogs. " * 20 for i in range(40)))
    run_dir = tmp_path / "run"
    done = finish(run_dir, corpus, "--arms", "fp32", "fp8", "v3")
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert list(summary["arms"]) == ["fp32", "fp8", "v3"] and summary["seeds"] == [0, 1]
    table = (run_dir / "table.md").read_text()
    assert table in done.stdout and all(f"| {TITLES[arm]} " in table for arm in summary["arms"])
    for arm in ("fp8", "v3"):
        entry = summary["arms"][arm]
        ratio = np.divide(entry["per_seed"]["training_loss"], summary["arms"]["fp32"]["per_seed"]["training_loss"])
        assert entry["gap"]["training_loss"]["mean"] == pytest.approx(np.mean(ratio) - 1)
        assert 0 < abs(entry["gap"]["training_loss"]["mean"]) < 0.05
    entries = summary["bits"]["entries"]
    assert list(entries) == ["int8", "int4", "unaware float32", "unaware int4", "aware float32", "aware int4"]
    assert abs(entries["int8"]["change"]["mean"]) < abs(entries["int4"]["change"]["mean"])
    assert np.isfinite(summary["bits"]["recovered"]["mean"]) and "Training for 4 bits recovers" in table
    assert (run_dir / "plots" / "loss.png").stat().st_size > 1000

    rows = (run_dir / "metrics.jsonl").read_text()
    again = finish(run_dir, corpus, "--arms", "fp32", "fp8", "v3")
    assert again.returncode == 0 and table in again.stdout
    assert (run_dir / "metrics.jsonl").read_text() == rows


def test_arms_differ_in_arithmetic_alone():
    model, train = CONFIG.model, CONFIG.train
    found = {arm: (arithmetic(model, arm), optimizer_of(train, arm).moment_dtype) for arm in CONFIG.arms}
    assert {(m.dtype, m.quantization, moments) for m, moments in found.values()} == {
        ("float32", "none", "float32"),
        ("bfloat16", "none", "float32"),
        ("float32", "fp8", "float32"),
        ("float32", "int8", "float32"),
        ("float32", "none", "bfloat16"),
        ("bfloat16", "fp8", "bfloat16"),
    }
    assert all(replace(m, dtype="float32", quantization="none") == model for m, _ in found.values())


def test_what_is_recovered_is_the_share_of_the_loss_by_rounding():
    one = {"unaware float32": 2.0, "unaware int4": 3.0, "aware float32": 2.1, "aware int4": 2.25, "int4": 3.5}
    bits = [{name: {"bits_per_byte": value + seed} for name, value in one.items()} for seed in range(2)]
    found = bits_summary(np.array([2.5, 3.5]), bits)
    assert found["recovered"]["mean"] == pytest.approx(0.75)
    assert found["entries"]["int4"]["change"]["mean"] == pytest.approx(1.0)
    assert found["entries"]["aware int4"]["change"]["mean"] == pytest.approx(0.25)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"arms": ("fp8",)}, "arms.*fp32"),
        ({"arms": ("fp32", "fp32")}, "each once"),
        ({"bits": ("int4", "int4")}, "bits"),
        ({"num_seeds": 0}, "num_seeds = 0"),
        ({"int4_steps": -1}, "int4_steps = -1"),
        ({"int4_learning_rate": 0.0}, "int4_learning_rate"),
        ({"train": replace(CONFIG.train, precision="fp8")}, "choose --arms"),
        ({"train": replace(CONFIG.train, sequence_length=10**6)}, "sequence_length"),
    ],
)
def test_illegal_values_are_named(changes, words):
    with pytest.raises(ConfigError, match=words):
        Config(**changes)
