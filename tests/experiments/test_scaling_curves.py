"""The ladder experiment: a part of the quick one, caught, resumed, divided and reported."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.scaling_curves import LADDERS, Config, main, parse, plan_table, workload
from moe_jax.analysis.ladder import plan
from moe_jax.config import ConfigError

ROOT = Path(__file__).parents[2]
SMALL = """
    --quick --workers 1 --num-seeds 2 --plan.budgets 1e8 3e8 --plan.sizes 1x8 1x16 1x24 --plan.sizes-per-budget 3
    --plan.sequence-length 32 --plan.batch-tokens.scale 64 --plan.batch-tokens.exponent 0 --validation-tokens 1024
    --chunk 4 --mesh.data 1
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


def command(folder, corpus, *more):
    arguments = ["--run-dir", str(folder), "--data.path", str(corpus), *SMALL.split(), *more]
    return [sys.executable, "-m", "experiments.scaling_curves", *arguments]


def finish(folder, corpus, environment, *more, code=0):
    done = subprocess.run(
        command(folder, corpus, *more), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == code, done.stderr[-3000:] + done.stdout[-1000:]
    return done


def results(folder):
    found = {}
    for file in sorted((folder / "results").glob("*.json")):
        result = json.loads(file.read_text())
        found[result["run"]] = result["bits_per_byte"]
    return found


@pytest.mark.slow
def test_parts_of_a_stopped_ladder_are_those_of_an_uninterrupted_one(tmp_path, corpus, environment):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    printed = finish(whole, corpus, environment).stdout
    assert len(results(whole)) == 24 and "Against dense" in printed
    for name in ("report.md", "runs.csv", "summary.json", "plots/loss_over_compute.png"):
        assert (whole / name).stat().st_size > 500
    assert not list((whole / "runs").glob("*/checkpoints"))  # they are deleted when a result is there

    # One shard by a program that is stopped on its way and started again, the other beside it by workers.
    process = subprocess.Popen(
        command(parts, corpus, "--shard", "0/2"), cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("3 of 12"):
            process.terminate()
            break
    process.communicate()
    assert process.returncode == 143
    before = results(parts)
    assert 1 <= len(before) < 12
    finish(parts, corpus, environment, "--shard", "0/2")
    assert len(results(parts)) == 12 and not (parts / "report.md").exists()
    unfinished = finish(parts, corpus, environment, "--fit").stdout
    assert "12 planned runs are not finished" in unfinished
    again = finish(parts, corpus, environment, "--workers", "2").stdout
    assert "bits per byte over" in again or "With one seed" in again
    assert len(list(parts.glob("worker-*.log"))) == 2
    # A worker has one thread, and a sum in another order: not the last bits.
    assert results(parts) == pytest.approx(results(whole), rel=2e-3)
    for name, value in before.items():
        assert results(parts)[name] == value

    # All is there: nothing is trained. More seeds: only theirs.
    assert " of " not in finish(whole, corpus, environment).stdout.partition("# Scaling")[0]
    more = finish(whole, corpus, environment, "--num-seeds", "3").stdout
    assert len(re.findall(r"^\d+ of 12: .* seed 2$", more, re.MULTILINE)) == 12


@pytest.mark.slow
def test_a_run_that_diverges_is_named_and_the_others_go_on(tmp_path, corpus, environment):
    more = ["--plan.learning-rate-sparse.scale", "1e6", "--plan.learning-rate-sparse.exponent", "0"]
    more += ["--plan.budgets", "1e8", "--num-seeds", "1"]
    printed = finish(tmp_path, corpus, environment, *more).stdout
    assert "3 runs diverged and are left out" in printed and "sparse 1x8 1e+08 FLOPs seed 0:" in printed


@pytest.mark.parametrize("name", LADDERS)
def test_every_ladder_can_be_planned_and_spans_two_decades(name):
    cfg = parse(["--ladder", name])
    runs = plan(cfg.plan, cfg.model, cfg.seeds)
    budgets, families = sorted({run.budget for run in runs}), {run.family for run in runs}
    assert families == {"dense", "sparse"} and {run.seed for run in runs} == set(cfg.seeds)
    if name != "quick":
        assert budgets[-1] / budgets[0] >= 100 * 0.999 and len(budgets) >= 4
    for budget in budgets:
        for family in families:
            assert len({run.size for run in runs if run.budget == budget and run.family == family}) >= 3


@pytest.mark.parametrize(
    ("name", "hours"), [("quick", 5 / 60), ("laptop", 1.0), ("h100_day", 24.0), ("v5e16_week", 168.0)]
)
def test_ladders_fit_the_time_they_are_named_for_and_their_devices(name, hours):
    cfg = parse(["--ladder", name])
    runs = plan(cfg.plan, cfg.model, cfg.seeds)
    table = plan_table(cfg, runs)
    found = re.search(r"; ([\d.]+) hours with 2 processes", table) or re.search(r"; ([\d.]+) hours, \$", table)
    assert found is not None and 0.4 * hours < float(found[1]) <= hours
    for run in runs:
        if work := workload(cfg, run):
            assert work[0].memory.total < work[1].device.hbm_bytes
    assert "DOES NOT FIT" not in table


def test_a_dry_run_shows_the_bill_and_trains_nothing(tmp_path, capsys):
    flags = ["--ladder", "v5e16_week", "--dry-run", "--run-dir", str(tmp_path), "--hardware.dollars-per-hour", "2"]
    assert main(flags) == 0
    printed = capsys.readouterr().out
    for name in ("params", "active", "no embed.", "tokens", "FLOPs", "hours", "dollars"):
        assert name in printed.splitlines()[0]
    hours, dollars = re.search(r"([\d.]+) hours, \$([\d,.]+), on 16 x v5e:4x4", printed).groups()  # pyright: ignore
    assert float(dollars.replace(",", "")) == pytest.approx(float(hours) * 16 * 2, rel=1e-3)
    assert not list(tmp_path.iterdir())
    assert main(["--ladder", "v5e16_week", "--dry-run", "--plan.sizes", "40x4096", "--plan.sizes-per-budget", "1"]) == 0
    assert "DOES NOT FIT: sparse 40x4096" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ladder", "desktop"], "there are laptop, quick"),
        (["--plan.budgets", "1e3"], "less than one step"),
        (["--shard", "2/2"], "--shard 2/2"),
        (["--shard", "0/2", "--fit"], "choose one"),
        (["--workers", "0"], "workers"),
        (["--ladder", "h100_day", "--workers", "2"], "for CPUs"),
        (["--hardware.chip", "h1000", "--workers", "1", "--dry-run"], "h1000"),
        (["--model.vocab-size", "100"], "vocab"),
    ],
)
def test_bad_input_names_the_field(tmp_path, capsys, flags, message):
    try:
        code: object = main(["--run-dir", str(tmp_path / "run"), *flags])
    except SystemExit as stop:  # of the command line's parser
        code = stop.code
    assert code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert message in error and "Traceback" not in error


def test_a_damaged_result_names_its_file(tmp_path, corpus, capsys):
    from moe_jax.data.text import TextCorpus
    from moe_jax.data.tokenizer import load_tokenizer

    from experiments.scaling_curves import run_key  # isort: skip

    flags = ["--run-dir", str(tmp_path), "--data.path", str(corpus), *SMALL.split()]
    cfg: Config = parse([flag if flag != "--quick" else "--ladder=quick" for flag in flags])
    run = plan(cfg.plan, cfg.model, cfg.seeds)[0]
    key = run_key(cfg, run, TextCorpus.load(str(corpus)), load_tokenizer("byte"))
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / f"{key}.json").write_text("{")
    assert main([*flags, "--fit"]) == 2
    assert f"{key}.json is damaged" in capsys.readouterr().err


def test_the_default_follows_its_ladder():
    assert parse([]).plan == LADDERS["laptop"].plan and parse(["--ladder=h100_day"]).hardware.chip == "h100"
    with pytest.raises(ConfigError, match="must be at least 1"):
        Config(num_seeds=0)
