"""Ladders: what a budget is spent on, what families share, and what cannot be planned."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from moe_jax.analysis.flops import training_flops_per_token
from moe_jax.analysis.ladder import Ladder, dense_model, parse_family, plan, shard_of
from moe_jax.analysis.scaling_law import PowerLaw
from moe_jax.config import AttentionConfig, ConfigError, ModelConfig, MoEConfig

BASE = ModelConfig(
    vocab_size=265,
    attention=AttentionConfig(kind="gqa", num_heads=4, num_kv_heads=2, head_dim=8),
    moe=MoEConfig(num_experts=0, bias_update_rate=0.01),
    max_position=128,
)
LADDER = Ladder(
    budgets=(1e9, 1e12),
    sizes=("1x16", "1x32", "2x48", "2x64"),
    sizes_per_budget=3,
    tokens_per_parameter=60.0,
    batch_tokens=PowerLaw(512 / 1e12**0.3, 0.3),
    learning_rate_dense=PowerLaw(1e-2, 0.0),
    learning_rate_sparse=PowerLaw(2e-2, 0.0),
)


@pytest.mark.parametrize("by", ["flops", "active", "total"])
def test_families_match_and_runs_cost_their_budget(by):
    ladder = replace(LADDER, match_by=by, families=("dense", "sparse", "mla", "sparse:granularity=2"))
    runs = plan(ladder, BASE, [0, 1])
    assert len(runs) == 2 * 4 * 3 * 2
    assert Counter(run.family for run in runs) == dict.fromkeys(ladder.families, 12)
    for run in runs:
        assert abs(run.match_error[by]) <= ladder.tolerance
        half_a_step = run.flops_per_token * run.train.batch_size * ladder.sequence_length / 2
        assert abs(run.flops - run.budget) <= half_a_step * 1.001
        assert run.flops_per_token == training_flops_per_token(run.model, ladder.sequence_length, include_mtp=True)
        assert run.train.optimizer.learning_rate == (0.02 if run.is_sparse else 0.01)
    sparse = next(run for run in runs if run.family == "sparse")
    m = sparse.model.moe
    assert sparse.activation_ratio == pytest.approx(1 / 8, rel=0.1)
    assert m.num_experts_per_token + m.num_shared_experts == 4  # granularity 4: as many parts as a dense layer has
    assert sparse.model.moe.routed_scaling_factor != 1 and sparse.model.moe.bias_update_rate == 0.01


def test_every_family_and_seed_trains_the_same_sizes_and_larger_budgets_larger_ones():
    runs = plan(LADDER, BASE, range(3))
    sizes = {(run.budget, run.family, run.seed): [] for run in runs}
    for run in runs:
        sizes[run.budget, run.family, run.seed].append(run.size)
    tried = {budget: {tuple(found) for (b, _, _), found in sizes.items() if b == budget} for budget in LADDER.budgets}
    assert tried == {1e9: {("1x16", "1x32", "2x48")}, 1e12: {("1x32", "2x48", "2x64")}}
    assert len({run.name for run in runs}) == len(runs)


def test_sweeps_multiply_the_rules():
    runs = plan(replace(LADDER, learning_rate_factors=(0.5, 1.0), batch_factors=(1.0, 2.0)), BASE, [0])
    here = [run for run in runs if run.family == "dense" and run.size == "1x32" and run.budget == 1e12]
    found = {(run.learning_rate_factor, run.batch_factor): run for run in here}
    assert len(found) == 4
    assert found[0.5, 1.0].train.optimizer.learning_rate == found[1.0, 1.0].train.optimizer.learning_rate / 2
    assert found[1.0, 2.0].train.batch_size == 2 * found[1.0, 1.0].train.batch_size
    assert "lr×0.5" in found[0.5, 1.0].name and "batch" not in found[0.5, 1.0].name


def test_the_key_changes_with_all_that_decides_a_result():
    run = plan(LADDER, BASE, [0])[0]
    data = {"corpus": "a"}
    others = [
        replace(run, seed=1),
        replace(run, model=replace(run.model, hidden_size=24)),
        replace(run, train=replace(run.train, steps=run.train.steps + 1)),
    ]
    assert run.key(data) == plan(replace(LADDER, families=("sparse", "dense")), BASE, [0, 5])[6].key(data)
    assert len({each.key(data) for each in [run, *others]} | {run.key({"corpus": "b"})}) == 5


def test_shards_are_a_partition_of_about_equal_cost_and_keep_seeds_together():
    runs = plan(LADDER, BASE, range(3))
    costs = [run.flops for run in runs]
    owner = shard_of(runs, costs, 3)
    load = [sum(cost for cost, shard in zip(costs, owner, strict=True) if shard == part) for part in range(3)]
    assert sorted(set(owner)) == [0, 1, 2] and max(load) < 1.35 * np.mean(load)
    together: dict[tuple, set[int]] = {}
    for run, shard in zip(runs, owner, strict=True):
        together.setdefault((run.family, run.size, run.budget), set()).add(shard)
    assert all(len(shards) == 1 for shards in together.values())


def test_grouped_heads_stay_grouped_where_they_can():
    assert dense_model(BASE, "2x64", LADDER).attention.num_heads == 8
    assert dense_model(BASE, "2x64", LADDER).attention.num_kv_heads == 4
    assert dense_model(BASE, "1x24", LADDER).attention.num_kv_heads == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budgets": (1e5,)}, "1e[+]05 FLOPs are less than one step"),
        ({"budgets": ()}, "budgets"),
        ({"budgets": (2e9, 1e9)}, "ascending"),
        ({"sizes": ("1x16", "x32")}, "'x32'"),
        ({"sizes": ("1x20", "1x16", "1x32")}, "20 is no multiple"),
        ({"sizes_per_budget": 9}, "between 1 and the 4 sizes"),
        ({"families": ()}, "at least one"),
        ({"families": ("dense", "moe")}, "'moe': there are dense, sparse"),
        ({"families": ("sparse:experts=3",)}, "no field 'experts'"),
        ({"families": ("sparse:granularity=x",)}, "is no number"),
        ({"learning_rate_factors": (1.0, 0.0)}, "positive"),
        ({"warmup_fraction": 1.0}, "warmup_fraction"),
        ({"tokens_per_parameter": 0.0}, "greater than 0"),
    ],
)
def test_what_cannot_be_planned_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        plan(replace(LADDER, **change), BASE, [0])


def test_a_family_may_change_fields_of_its_shape():
    shape = parse_family("sparse:activation_ratio=1/16,granularity=8,attention=mla")
    assert (shape.activation_ratio, shape.granularity, shape.attention) == (1 / 16, 8, "mla")
