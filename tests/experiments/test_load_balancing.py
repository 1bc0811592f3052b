"""The balancing experiment, small: what it reports, what the methods do, and that a finished part is not done again."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.load_balancing import CONFIG, FIGURES, Config, variants
from moe_jax.config import ConfigError

ROOT = Path(__file__).parents[2]
STEPS = 6
SMALL = f"""
    --mesh.data 1 --num-seeds 2 --auxiliary-coefs 0.01 --bias-update-rates 0.02 --validation-batches 3
    --train.steps {STEPS} --train.batch-size 4 --train.sequence-length 64 --train.optimizer.warmup-steps 1
    --checkpoint.every 3 --model.first-k-dense 0 --model.num-layers 1 --model.hidden-size 32
    --model.moe.num-experts 8 --model.moe.num-experts-per-token 2 --model.moe.expert-size 16
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


def finish(run_dir, corpus, environment, *more):
    arguments = ["--run-dir", str(run_dir), "--data.path", str(corpus), *SMALL.split(), *more]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.load_balancing", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus, environment):
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    return run_dir, finish(run_dir, corpus, environment, "--methods", "auxiliary", "bias").stdout


def read_rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_table_has_every_method_with_finite_intervals(whole):
    run_dir, printed = whole
    summary = json.loads((run_dir / "summary.json").read_text())
    assert list(summary["methods"]) == ["auxiliary_0.01", "bias_0.02"] and summary["seeds"] == [0, 1]
    table = (run_dir / "table.md").read_text()
    assert table in printed and "arXiv:2408.15664" in printed
    for entry in summary["methods"].values():
        assert f"| {entry['title']} " in table
        for figure in FIGURES:
            interval = entry["figures"][figure]
            assert np.isfinite([interval["low"], interval["high"]]).all() and interval["seeds"] == 2
            assert interval["mean"] == pytest.approx(np.mean(entry["per_seed"][figure]))
    difference = summary["methods"]["bias_0.02"]["against"]["auxiliary_0.01"]["bits_per_byte"]
    bias, auxiliary = (entry["per_seed"]["bits_per_byte"] for entry in reversed(summary["methods"].values()))
    assert difference["mean"] == pytest.approx(np.mean(np.subtract(bias, auxiliary)))
    for plot in ("max_violation", "expert_load", "loss_and_max_violation"):
        assert (run_dir / "plots" / f"{plot}.png").stat().st_size > 1000


@pytest.mark.slow
def test_each_method_balances_its_own_way_and_from_the_same_start(whole):
    run_dir, _ = whole
    methods = json.loads((run_dir / "summary.json").read_text())["methods"]
    assert methods["bias_0.02"]["figures"]["largest_bias"]["mean"] == pytest.approx(0.02 * STEPS, rel=0.7)
    assert methods["auxiliary_0.01"]["figures"]["largest_bias"]["mean"] == 0
    rows = read_rows(run_dir)
    auxiliary, bias = (
        [row for row in rows if row["phase"] == f"{name}-seed1"] for name in ("auxiliary_0.01", "bias_0.02")
    )
    assert len(auxiliary) == len(bias) == STEPS
    assert auxiliary[0]["loss_balance_expert/moe_blocks"] > 0.99
    assert not any("loss_balance_expert/moe_blocks" in row for row in bias)
    assert auxiliary[0]["loss_main"] == bias[0]["loss_main"]  # same weights, same batch


@pytest.mark.slow
def test_a_finished_part_is_read_and_an_unfinished_one_goes_on(whole, corpus, environment):
    run_dir, _ = whole
    before = read_rows(run_dir)
    summary = (run_dir / "summary.json").read_text()
    (run_dir / "evaluations/bias_0.02-seed1.json").unlink()
    done = finish(run_dir, corpus, environment, "--methods", "auxiliary", "bias")
    assert "validate bias_0.02-seed1" in done.stderr and "validate auxiliary" not in done.stderr
    after = json.loads((run_dir / "summary.json").read_text())
    assert after["methods"] == json.loads(summary)["methods"]
    assert [dict(row, elapsed=0) for row in read_rows(run_dir)] == [dict(row, elapsed=0) for row in before]


def test_variants_differ_in_their_balancing_alone():
    cfg = replace(CONFIG, methods=("none", "auxiliary", "bias", "uniform", "hash"))
    found = {variant.name: variant.moe for variant in variants(cfg)}
    assert list(found) == ["none", "auxiliary_0.001", "auxiliary_0.01", "bias_0.001", "bias_0.01", "uniform", "hash"]
    none = found["none"]
    assert none == replace(cfg.model.moe, selection_bias=False, sequence_balance_coef=0.0)
    assert found["auxiliary_0.01"] == replace(none, expert_balance_coef=0.01)
    assert found["bias_0.001"] == replace(none, selection_bias=True, bias_update_rate=0.001)
    assert found["uniform"] == replace(none, routing="uniform")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_seeds": 0}, "num_seeds = 0"),
        ({"methods": ("bias", "bias")}, "each once"),
        ({"auxiliary_coefs": (0.0,)}, "greater than 0"),
        ({"model": replace(CONFIG.model, moe=replace(CONFIG.model.moe, num_experts=0))}, "no load to balance"),
        ({"train": replace(CONFIG.train, sequence_length=4096)}, "max_position"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        Config(**change)
