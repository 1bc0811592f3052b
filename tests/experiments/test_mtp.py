"""The experiment on multi-token prediction, small: what is compared with what, how drafts and answers are judged, and
that a finished part is not done again.

B batch, S sequence, D model, V vocabulary, N modules.
"""

import functools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments.mtp import CONFIG, FIGURES, Config, make_acceptance, make_mistakes, training_flops, variants
from moe_jax.config import AttentionConfig, ConfigError, ModelConfig, MTPConfig
from moe_jax.model.definition import Definition

ROOT = Path(__file__).parents[2]
SMALL = """
    --mesh.data 1 --num-seeds 2 --depths 2 --parallel-depths 1 --validation-batches 2 --problems.test-problems 20
    --train.steps 4 --train.batch-size 4 --problem-rows 2 --train.sequence-length 64
    --train.optimizer.name adamw --train.optimizer.warmup-steps 1 --checkpoint.every 3
    --model.moe.num-experts 0 --model.num-layers 1 --model.hidden-size 16 --model.intermediate-size 16
"""
TINY = ModelConfig(
    vocab_size=11,
    hidden_size=8,
    num_layers=1,
    intermediate_size=8,
    attention=AttentionConfig(kind="gqa", num_heads=2, num_kv_heads=1, head_dim=4),
    mtp=MTPConfig(depth=2),
    initializer_range=1.0,
)


def test_all_but_the_controls_have_equal_tokens_and_these_equal_flops():
    found = {variant.name: variant for variant in variants(CONFIG)}
    assert list(found) == ["none", "causal_1", "causal_2", "parallel_1", "none_flops_1", "none_flops_2"]
    steps = CONFIG.train.steps
    assert {variant.steps for name, variant in found.items() if "flops" not in name} == {steps}
    flops = {name: training_flops(CONFIG, variant) for name, variant in found.items()}
    for depth in (1, 2):
        assert flops[f"none_flops_{depth}"] == pytest.approx(flops[f"causal_{depth}"], rel=1 / steps)
        assert found[f"none_flops_{depth}"].steps > 1.2 * depth * steps / 2
    assert 0.9 * flops["causal_1"] < flops["parallel_1"] < flops["causal_1"]
    kinds = {name: (variant.mtp.depth, variant.mtp.kind) for name, variant in found.items()}
    assert kinds["causal_2"] == (2, "causal") and kinds["parallel_1"] == (1, "parallel") and kinds["none"][0] == 0
    late = found["causal_2"].mtp.late_after_tokens / (steps * 16 * 128)
    assert late == pytest.approx(10 / 14.8, abs=1e-4) and found["causal_2"].mtp.late_loss_coef == 0.1


def one_batch():
    tokens_BS = np.random.default_rng(0).integers(1, 11, (2, 9)).astype(np.int32)
    segments_BS = np.array([[1] * 9, [1] * 5 + [2] * 4], np.int32)
    positions_BS = np.array([[*range(9)], [*range(5), *range(4)]], np.int32)
    return {"tokens_BS": tokens_BS, "segment_ids_BS": segments_BS, "positions_BS": positions_BS}


def probabilities(definition, params, rest, batch):
    """Of the main head [B, S, V] and of the modules [N, B, S, V], without token 0, in float64."""
    model, (tokens_BS, segments_BS, positions_BS) = definition.merge(params, rest), batch.values()
    hidden_BSD = model(tokens_BS, segment_ids_BS=segments_BS, positions_BS=positions_BS).hidden_BSD
    ahead = model.predict_ahead(hidden_BSD, tokens_BS, segments_BS, positions_BS).hidden_NBSD
    logits = [np.array(model.logits(hidden), np.float64) for hidden in (hidden_BSD, *ahead)]
    for array in logits:
        array[..., 0] = -np.inf
    main, *ahead = (np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True) for x in logits)
    return main, ahead


def test_a_draft_is_judged_by_the_main_head_where_that_has_read_the_text_before_it():
    definition, batch = Definition.of(TINY), one_batch()
    params, rest = definition.init(jax.random.key(0))
    main, ahead = probabilities(definition, params, rest, batch)
    expected = np.zeros((5, 2))
    for row, end in ((0, 9), (1, 5), (1, 9)):
        for i in range(
            5 if end == 9 and row == 1 else 0, end - 3
        ):  # token i + 3, the farther target, is in the document
            sampling = greedy = 1.0
            for k in (1, 2):
                p, q = main[row, i + k], ahead[k - 1][row, i]
                overlap, same = np.minimum(p, q).sum(), float(p.argmax() == q.argmax())
                sampling, greedy = sampling * overlap, greedy * same
                expected[:, k - 1] += [1, overlap, same, sampling, greedy]
    found = np.asarray(make_acceptance(definition, (0,))(params, rest, batch))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert np.all(found[0] == 6 + 2 + 1) and 0 < found[1, 0] < 9 and found[3, 1] < min(found[1])


def test_mistakes_are_the_tokens_that_were_not_the_most_probable():
    definition, batch = Definition.of(replace(TINY, mtp=MTPConfig())), one_batch()
    params, rest = definition.init(jax.random.key(0))
    model = definition.merge(params, rest)
    tokens_BS, segments_BS, positions_BS = batch.values()
    hidden_BSD = model(tokens_BS, segment_ids_BS=segments_BS, positions_BS=positions_BS).hidden_BSD
    best_BS = 1 + np.argmax(np.asarray(model.logits(hidden_BSD))[..., 1:], axis=-1)
    tokens_BS[0, 4] = best_BS[0, 3]  # a right one: what comes after it changes, it does not
    wrong_BS = np.asarray(make_mistakes(definition, (0,))(params, rest, batch))
    np.testing.assert_array_equal(wrong_BS[0, 1:5], best_BS[0, :4] != tokens_BS[0, 1:5])
    np.testing.assert_array_equal(wrong_BS[1, 1:], best_BS[1, :-1] != tokens_BS[1, 1:])
    assert not wrong_BS[0, 4] and wrong_BS.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_seeds": 0}, "num_seeds = 0"),
        ({"depths": (0, 1)}, "depths"),
        ({"parallel_depths": (1, 1)}, "each once"),
        ({"depths": (), "parallel_depths": ()}, "name at least one"),
        ({"problem_rows": 16}, "problem_rows = 16"),
        ({"train": replace(CONFIG.train, sequence_length=4096)}, "max_position"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        Config(**change)


# Whole runs ----------------------------------------------------------------------------------------------------------


def finish(run_dir, corpus, cache):
    command = [sys.executable, "-m", "experiments.mtp", "--run-dir", str(run_dir), "--data.path", str(corpus)]
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    done = subprocess.run(
        [*command, *SMALL.split()], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mtp")
    corpus = folder / "text.txt"
    corpus.write_text("\n\n".join(f"{i}: the quick brown fox jumps over {i % 7} lazy dogs. " * 20 for i in range(40)))
    again = functools.partial(finish, folder / "run", corpus, folder / "cache")
    return SimpleNamespace(run=folder / "run", printed=again().stdout, again=again)


def read_rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_tables_have_figures_differences_and_acceptance(whole):
    summary = json.loads((whole.run / "summary.json").read_text())
    entries, table = summary["variants"], (whole.run / "table.md").read_text()
    assert list(entries) == ["none", "causal_2", "parallel_1", "none_flops_1", "none_flops_2"]
    assert table in whole.printed and "DeepSeek-V3 table 4" in whole.printed
    for entry in entries.values():
        assert f"| {entry['title']} " in table
        for figure in FIGURES:
            interval = entry["figures"][figure]
            assert interval["seeds"] == 2 and interval["mean"] == pytest.approx(np.mean(entry["per_seed"][figure]))
    causal = entries["causal_2"]
    for equal, other in (("equal tokens", "none"), ("equal FLOPs", "none_flops_2")):
        difference = np.subtract(causal["per_seed"]["bits_per_byte"], entries[other]["per_seed"]["bits_per_byte"])
        assert causal["against"][equal]["bits_per_byte"]["mean"] == pytest.approx(np.mean(difference))
    for name, depth in (("causal_2", 2), ("parallel_1", 1)):
        for rates in entries[name]["acceptance"].values():
            means = [rate["mean"] for rate in rates["by_draft"]]
            assert len(means) == depth and all(0 <= mean <= 1 for mean in means)
            assert 1 <= rates["tokens_per_pass"]["mean"] <= 1 + sum(means) + 1e-6
    for plot in ("bits_per_byte", "accuracy", "acceptance"):
        assert (whole.run / "plots" / f"{plot}.png").stat().st_size > 1000


@pytest.mark.slow
def test_variants_of_a_seed_start_alike_and_learn_their_own_way(whole):
    first, last = {}, {}
    for row in read_rows(whole.run):
        if "loss_main" in row:
            first.setdefault(row["phase"], row)
            last[row["phase"]] = row
    of_seed = [row for phase, row in first.items() if phase.endswith("seed1")]
    assert len(of_seed) == 5 and np.ptp([row["loss_main"] for row in of_seed]) < 1e-5  # same trunk, same batch
    for name, depth in (("none", 0), ("causal_2", 2), ("parallel_1", 1)):
        row = first[f"{name}-seed1"]
        ahead = [row[key] for key in row if key.startswith("loss_mtp")]
        assert len(ahead) == depth
        assert row["loss"] == pytest.approx(row["loss_main"] + 0.3 * np.mean(ahead or [0]), rel=1e-5)
    late = last["causal_2-seed1"]
    ahead = (late["loss_mtp_1"] + late["loss_mtp_2"]) / 2
    assert late["loss"] == pytest.approx(late["loss_main"] + 0.1 * ahead, rel=1e-5)
    assert late["loss_main"] != last["none-seed1"]["loss_main"]


@pytest.mark.slow
def test_a_finished_part_is_read_and_an_unfinished_one_goes_on(whole):
    before, summary = read_rows(whole.run), json.loads((whole.run / "summary.json").read_text())
    (whole.run / "evaluations/causal_2-seed1.json").unlink()
    done = whole.again()
    assert "validate causal_2-seed1" in done.stderr and "validate parallel" not in done.stderr
    assert json.loads((whole.run / "summary.json").read_text())["variants"] == summary["variants"]
    rows, expected = (
        sorted((dict(row, elapsed=0) for row in found), key=lambda row: (row["phase"], row["step"]))
        for found in (read_rows(whole.run), before)
    )
    assert rows == expected
