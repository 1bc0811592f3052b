"""Reports of ladders: synthetic runs drawn from known laws, and runs that determine nothing."""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.image import imread

from moe_jax.analysis.ladder import Ladder, plan
from moe_jax.analysis.scaling_report import Finished, analyse, report
from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig

BASE = ModelConfig(
    vocab_size=265,
    attention=AttentionConfig(kind="gqa", num_heads=4, num_kv_heads=4, head_dim=8),
    moe=MoEConfig(num_experts=0),
    max_position=128,
)
LADDER = Ladder(
    budgets=(1e11, 4e11, 2e12, 1e13),
    sizes=("1x16", "1x24", "1x32", "2x32", "2x48", "2x64", "3x64", "3x80", "3x96", "4x96"),
    sizes_per_budget=5,
    tokens_per_parameter=90.0,
)
LEVERAGE = 2.0  # sparse models of this world need half the compute, whatever their size
FEW = 60  # resamples


def world(ladder=LADDER, seeds=range(3), noise=0.004):
    """Runs whose loss is a sum of powers of FLOPs per token and of tokens: the best loss is a power of compute."""
    random = np.random.default_rng(0)
    found = []
    for run in plan(ladder, BASE, seeds):
        factor = LEVERAGE**0.5 if run.is_sparse else 1.0
        loss = 12 / (run.flops_per_token / 6 * factor) ** 0.25 + 40 / (run.tokens * factor) ** 0.27
        loss *= math.exp(noise * random.standard_normal())
        found.append((run, {"bits_per_byte": loss, "loss": loss * 0.7, "seconds": 3.0}))
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder, runs = tmp_path_factory.mktemp("report"), world()
    runs[0] = (runs[0][0], {"diverged": "loss_main is nan at step 3", "seconds": 1.0})
    text = report(
        folder, runs, reference="dense", missing=["sparse 9x9 1e+99 FLOPs seed 0"], data="a test", bootstraps=FEW
    )
    return folder, text, json.loads((folder / "summary.json").read_text())


def test_the_leverage_of_the_world_lies_in_its_interval(written):
    found = written[2]["against_reference"]["sparse"]
    assert len(found["leverage"]["flops"]) >= 3
    for value, low, high in found["leverage"]["leverage"]:
        assert 0.95 * low < LEVERAGE < 1.05 * high and value == pytest.approx(LEVERAGE, rel=0.15)
    for interval in found["bits_per_byte_same_size"].values():
        assert interval["low"] <= interval["mean"] <= interval["high"] < 0 and interval["seeds"] in (2, 3)
    for value, low, high in found["bits_per_byte_best_size"].values():
        assert low < value < high < 0


def test_the_best_tokens_grow_as_the_law_says(written):
    exponent = 0.25 / (0.25 + 0.27)
    for family in written[2]["families"].values():
        _, low, high = family["best_tokens"]["exponent"]
        assert low - 0.03 < exponent < high + 0.03 and high - low < 0.3  # parabolas are off by a little
        held_out = family["held_out_loss"]
        assert abs(held_out["relative_error"][0]) < 0.05


def test_diverged_and_missing_runs_are_counted_and_named(written):
    folder, text, summary = written
    assert "1 runs diverged" in text and "dense 1x16 1e+11 FLOPs seed 0: loss_main is nan at step 3" in text
    assert "1 planned runs are not finished" in text and "sparse 9x9" in text
    assert list(summary["diverged"].values()) == ["loss_main is nan at step 3"] and len(summary["missing"]) == 1
    with open(folder / "runs.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 2 * 5 * 3
    assert rows[0]["diverged"].startswith("loss_main") and rows[0]["bits_per_byte"] == ""
    assert float(rows[1]["bits_per_byte"]) > 0 and int(rows[-1]["parameters_total"]) > 0


def test_the_report_shows_its_pictures_and_an_interval_beside_every_figure(written):
    folder, text, summary = written
    whole = (folder / "report.md").read_text()
    names = ("loss_over_compute", "isoflop", "loss_over_parameters", "efficiency_leverage")
    for name in names:
        assert f"(plots/{name}.png)" in whole
        pixels = imread(folder / "plots" / f"{name}.png")
        assert pixels.shape[0] > 300 and (pixels[..., :3] < 0.9).any(axis=-1).mean() > 0.01  # something is drawn
    assert len(list((folder / "plots").glob("*.png"))) == len(names)
    for family in summary["families"].values():
        for minimum in family["minima"]:
            for name in ("params", "tokens", "loss"):
                value, low, high = minimum[name]
                assert low < value < high
    assert "sparse is better than dense" in text


def test_a_sweep_counts_its_best_alone():
    ladder = replace(LADDER, budgets=(1e11,), learning_rate_factors=(0.5, 1.0, 2.0))
    runs = []
    for run, result in world(ladder):
        worse = {0.5: 0.2, 1.0: 0.0, 2.0: 0.1}[run.learning_rate_factor]
        runs.append(Finished(run, {**result, "bits_per_byte": result["bits_per_byte"] + worse}))
    analysis = analyse(runs, "dense", bootstraps=FEW)
    assert {run.run.learning_rate_factor for family in analysis.families for run in family.runs} == {1.0}
    assert len(analysis.swept) == 2 * 30


def test_a_factor_that_lost_seeds_is_no_candidate():
    runs = [Finished(*pair) for pair in world(replace(LADDER, budgets=(1e11,), learning_rate_factors=(1.0, 2.0)))]
    for i, run in enumerate(runs):
        if run.run.learning_rate_factor == 2.0:
            result = {"diverged": "nan"} if run.run.seed == 0 else {"bits_per_byte": run.loss - 0.1}
            runs[i] = Finished(run.run, result)
    analysis = analyse(runs, "dense", bootstraps=FEW)
    assert {run.run.learning_rate_factor for family in analysis.families for run in family.runs} == {1.0}


@pytest.mark.parametrize(
    ("change", "seeds", "said"),
    [
        ({"sizes_per_budget": 1}, range(3), "IsoFLOP minima"),
        ({"sizes_per_budget": 2}, range(3), "IsoFLOP minima"),
        ({"budgets": (1e11,)}, range(3), "prediction of the largest budget's loss"),
        ({"families": ("dense",)}, range(3), "one family, and nothing to compare it with"),
        ({"families": ("sparse",)}, range(3), "one family, and nothing to compare it with"),
        ({}, range(1), "With one seed nothing can be said"),
    ],
)
def test_what_the_runs_do_not_determine_is_said(tmp_path, change, seeds, said):
    text = report(tmp_path, world(replace(LADDER, **change), seeds), reference="dense", data="a test", bootstraps=FEW)
    assert said in text and "nan" not in text.lower()


def test_runs_that_all_diverged_are_a_report_too(tmp_path):
    runs = [(run, {"diverged": "loss_main is inf at step 1"}) for run, _ in world(replace(LADDER, budgets=(1e11,)))]
    text = report(tmp_path, runs, reference="dense", data="a test", bootstraps=FEW)
    assert "30 runs diverged" in text and "all of its runs diverged" in text
    assert not list((tmp_path / "plots").glob("*.png"))
    assert "No run is finished" in report(tmp_path, [], reference="dense", data="a test", bootstraps=FEW)


def test_three_sparsities_fit_the_law_of_sparsity_or_say_why_not():
    families = ("dense", "sparse", "sparse:activation_ratio=1/4")
    analysis = analyse([Finished(*pair) for pair in world(replace(LADDER, families=families))], "dense", bootstraps=FEW)
    assert analysis.sparsity is not None or "sparsity" in analysis.reasons
    assert [comparison.name for comparison in analysis.comparisons] == list(families[1:])
    two = analyse([Finished(*pair) for pair in world()], "dense", bootstraps=FEW)
    assert two.sparsity is None and "needs 3" in two.reasons["sparsity"]
