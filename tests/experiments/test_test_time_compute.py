"""Accuracy against tokens: what is counted, what is refused, and that a batch that was drawn is not drawn again."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from experiments import grpo_math
from experiments.test_time_compute import CONFIGS, Config, config_for, plot, refuse_conflicts, tables
from moe_jax.analysis.test_time import Drawn, spent
from moe_jax.config import ConfigError, RLConfig

ROOT = Path(__file__).parents[2]
MODEL = """
    --mesh.data 1 --data.min-terms 2 --data.max-terms 3 --data.test-problems 12 --prompt-length 8
    --pretrain.steps 4 --pretrain.batch-size 8 --pretrain.sequence-length 48 --checkpoint.every 2
    --rl.steps 2 --rl.num-prompts 4 --rl.group-size 4 --rl.sampling.max-new-tokens 12
    --rl.min-active-groups 0 --rl.reward.random --model.hidden-size 32 --model.moe.num-experts 4
    --model.moe.expert-size 16
"""
DRAW = "--sampling.max-new-tokens 16 --budgets 4 8 --evaluation.samples 4 --evaluation.batch-size 8"


@pytest.mark.parametrize("source", CONFIGS)
def test_defaults_train_as_grpo_math_does_and_leave_more_room(source):
    cfg, grpo = CONFIGS[source], grpo_math.CONFIGS[source]
    assert replace(cfg.of_grpo_math(), controls=True, evaluation=grpo.evaluation) == grpo
    assert grpo.rl.sampling.max_new_tokens <= cfg.sampling.max_new_tokens
    assert len(cfg.budgets) == 5 and cfg.budgets[-1] < cfg.sampling.max_new_tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budgets": (32, 16)}, "must rise"),
        ({"budgets": (16, 64)}, "less than sampling.max_new_tokens = 64"),
        ({"budgets": (0,)}, "at least 1"),
        ({"prompt_length": 1000}, "max_position = 1024"),
    ],
)
def test_what_cannot_be_measured_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        Config(**change)


def test_what_a_run_decides_is_refused():
    decided = config_for(grpo_math.CONFIG)
    refuse_conflicts(replace(decided, run="runs/x", budgets=(8,)), decided)
    with pytest.raises(ConfigError, match="--rl: --run runs/x decides it"):
        refuse_conflicts(replace(decided, run="runs/x", rl=RLConfig(steps=3)), decided)


def test_the_tables_and_the_plot_show_what_samples_and_budgets_are_worth(tmp_path):
    right_PG = np.array([[1, 1, 0, 1], [0, 1, 1, 0]], bool)
    answers_PG = [["7" if right else str(i) for i, right in enumerate(row)] for row in right_PG]
    drawn = Drawn(answers_PG, right_PG, np.array([[100, 300, 100, 300], [200, 400, 200, 400]]))
    by_samples = {"base": [spent(drawn, k, 400) for k in (1, 2, 4)]}
    by_budget = {"base": {k: [spent(drawn, k, budget) for budget in (250, 400)] for k in (1, 4)}}
    text = tables(by_samples, by_budget)
    more, longer, votes = text.split("\n\n")
    assert "| base  | 1         | 250    | 0.625 " in more and "| base  | 4         | 1,000  | 1.000 " in more
    assert "| base  | 250    | 0.50    | 200         | 0.250 " in longer  # 100 and 250, 200 and 250
    assert "0.625  | 1.000  | 100 %" in votes and "0.710  | 0.867  | 54 %" in votes
    run: Any = SimpleNamespace(path=lambda *parts: tmp_path.joinpath(*parts))
    assert plot(run, by_samples, by_budget).stat().st_size > 1000


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    return os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}


def run(environment, name, *arguments, fails=False):
    command = [sys.executable, "-m", f"experiments.{name}", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == (2 if fails else 0), done.stderr[-3000:]
    return done


def samples(folder):
    return {file.relative_to(folder): file.read_text() for file in sorted(folder.glob("samples/*/*.json"))}


@pytest.mark.slow
def test_a_drawn_batch_is_kept_and_a_run_of_grpo_math_gives_the_same_samples(tmp_path, environment):
    whole = tmp_path / "whole"
    done = run(environment, "test_time_compute", "--run-dir", whole, *MODEL.split(), *DRAW.split())
    table = (whole / "table.md").read_text()
    assert table in done.stdout and "AIME 2024" in table and "| after GRPO " in table
    assert (whole / "plots/accuracy_and_tokens.png").stat().st_size > 1000
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["problems"] == 12 and set(summary["by_samples"]) == {"base", "policy"}
    assert [point["k"] for point in summary["by_samples"]["base"]] == [1, 2, 4]
    by_budget = summary["by_budget"]["policy"]["1"]
    assert [point["budget"] for point in by_budget] == [4, 8, 16]
    assert by_budget[0]["tokens"] <= 4 and by_budget[-1] == summary["by_samples"]["policy"][0]

    before = samples(whole)
    assert len(before) == 4  # two batches for each model, the second one not full
    (whole / "samples/base/000008.json").unlink()
    first = whole / "samples/base/000000.json"
    kept = first.stat().st_mtime_ns
    run(environment, "test_time_compute", "--run-dir", whole, *MODEL.split(), *DRAW.split())
    assert samples(whole) == before and first.stat().st_mtime_ns == kept
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["phase"] == "sample_base"] == [8, 12]
    again = json.loads((whole / "summary.json").read_text())
    assert again["by_samples"] == summary["by_samples"] and again["by_budget"] == summary["by_budget"]

    # The same models, from a run of grpo_math.
    grpo = tmp_path / "grpo"
    evaluation = ["--evaluation.samples", "2", "--evaluation.batch-size", "12", "--no-controls"]
    run(environment, "grpo_math", "--run-dir", grpo, *MODEL.split(), *evaluation)
    of_run, alone = tmp_path / "of_run", tmp_path / "alone"
    run(environment, "test_time_compute", "--run", grpo, "--run-dir", of_run, "--mesh.data", "1", *DRAW.split())
    assert samples(of_run) == before and not (of_run / "checkpoints").exists()
    refused = run(environment, "test_time_compute", "--run", grpo, "--run-dir", alone, "--rl.steps", "3", fails=True)
    assert "decides it; leave the flag out" in refused.stderr
    refused = run(environment, "test_time_compute", "--run", whole, fails=True)
    assert "is a run of test_time_compute, must be one of grpo_math" in refused.stderr

    # One model alone.
    assert not alone.exists()
    init = ["--init", grpo, "--run-dir", alone, "--mesh.data", "1", "--prompt", "{problem}", "--prompt-length", "16"]
    few = ["--data.test-problems", "4", "--evaluation.samples", "2", "--evaluation.batch-size", "4"]
    budget = ["--sampling.max-new-tokens", "8", "--budgets", "4", "--rl.sampling.max-new-tokens", "8"]
    run(environment, "test_time_compute", *init, *few, *budget)
    assert list(json.loads((alone / "summary.json").read_text())["by_samples"]) == ["model"]


def test_a_run_that_is_not_there_is_refused(tmp_path):
    refused = run(dict(os.environ), "test_time_compute", "--run", tmp_path / "absent", fails=True)
    assert "is not the folder of a run" in refused.stderr and "Traceback" not in refused.stderr
