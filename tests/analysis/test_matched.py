"""Matched configurations: what they cost is what was asked, and what cannot be matched is refused."""

import dataclasses

import pytest

from moe_jax.analysis.flops import parameter_counts, training_flops_per_token
from moe_jax.analysis.matched import Shape, dense_family, match
from moe_jax.config import AttentionConfig, ConfigError, ModelConfig, MoEConfig, MTPConfig

S = 256
BASE = ModelConfig(
    vocab_size=512,
    hidden_size=256,
    num_layers=6,
    intermediate_size=704,
    first_k_dense=0,
    attention=AttentionConfig(kind="gqa", num_heads=8, num_kv_heads=8, head_dim=32),
    moe=MoEConfig(num_experts=0),
)
COSTS = {
    "flops": lambda cfg: training_flops_per_token(cfg, S, include_mtp=True),
    "active": lambda cfg: parameter_counts(cfg).active_non_embedding,
    "total": lambda cfg: parameter_counts(cfg).total,
}


@pytest.mark.parametrize("by", COSTS)
@pytest.mark.parametrize(
    "shape",
    [
        Shape(activation_ratio=1 / 4, granularity=2),
        Shape(activation_ratio=1 / 8, granularity=8, num_shared_experts=1, first_k_dense=1),
        Shape(activation_ratio=1 / 8, granularity=4, attention="mla"),
        Shape(attention="mla"),
        Shape(attention="gqa"),
    ],
    ids=str,
)
def test_match_costs_what_the_base_costs(by, shape):
    matched = match(BASE, shape, by, sequence_length=S, multiple=1, tolerance=0.03)

    measured = {name: cost(matched.config) / cost(BASE) - 1 for name, cost in COSTS.items()}
    assert matched.relative_error == pytest.approx(measured)
    # One more or one less column of every expert is further away.
    name = "expert_size" if shape.activation_ratio else "intermediate_size"
    for step in (-1, 1):
        if shape.activation_ratio:
            moe = dataclasses.replace(matched.config.moe, expert_size=matched.config.moe.expert_size + step)
            other = dataclasses.replace(matched.config, moe=moe)
        else:
            other = dataclasses.replace(matched.config, **{name: matched.config.intermediate_size + step})
        assert abs(COSTS[by](other) / COSTS[by](BASE) - 1) >= abs(measured[by])
    assert matched.config.hidden_size == BASE.hidden_size and matched.config.num_layers == BASE.num_layers


def test_sparse_shape_has_the_experts_asked_for():
    shape = Shape(activation_ratio=1 / 8, granularity=4, num_shared_experts=1, first_k_dense=1)
    matched = match(BASE, shape, sequence_length=S, multiple=8)
    m = matched.config.moe
    assert (m.num_experts_per_token, m.num_shared_experts, m.num_experts) == (3, 1, 31)
    assert matched.activation_ratio == 4 / 32
    assert matched.granularity == pytest.approx(4, rel=0.05) and m.expert_size % 8 == 0
    assert matched.config.num_dense_layers == 1 and matched.config.intermediate_size == BASE.intermediate_size
    assert matched.relative_error["total"] > 2, "at equal FLOPs a sparse model has many times the parameters"


def test_equal_total_parameters_leave_narrow_experts_and_few_flops():
    matched = match(BASE, Shape(activation_ratio=1 / 4, granularity=4), "total", sequence_length=S, multiple=1)
    assert abs(matched.relative_error["total"]) < 0.02
    assert matched.relative_error["flops"] < -0.3 and matched.granularity > 12


def test_attention_is_matched_through_the_feed_forward():
    mla = match(BASE, Shape(attention="mla"), sequence_length=S).config
    assert mla.attention.kind == "mla" and mla.attention.kv_lora_rank == 128 and mla.attention.qk_rope_head_dim == 16
    gqa = match(mla, Shape(attention="gqa"), sequence_length=S).config
    assert (gqa.attention.num_heads, gqa.attention.num_kv_heads, gqa.attention.head_dim) == (8, 2, 32)
    mha = match(gqa, Shape(attention="mha"), sequence_length=S).config
    assert mha.attention == dataclasses.replace(gqa.attention, num_kv_heads=8)
    assert gqa.intermediate_size > BASE.intermediate_size, "what shared keys spare goes to the feed-forward"


def test_a_sparse_base_keeps_its_experts_under_another_attention():
    sparse = match(BASE, Shape(activation_ratio=1 / 4, granularity=4), sequence_length=S).config
    matched = match(sparse, Shape(attention="mla"), sequence_length=S, multiple=1)
    assert matched.config.moe.num_experts == sparse.moe.num_experts
    assert matched.activation_ratio == 1 / 4 and abs(matched.relative_error["flops"]) < 0.01


def test_mtp_modules_count_in_flops():
    base = dataclasses.replace(BASE, mtp=MTPConfig(depth=1))
    matched = match(base, Shape(activation_ratio=1 / 8, granularity=4), sequence_length=S, multiple=1)
    assert abs(matched.relative_error["flops"]) < 0.01


def test_granularity_is_of_the_base_width():
    widths = [
        match(BASE, Shape(activation_ratio=1 / 8, granularity=g), sequence_length=S, multiple=1).config.moe.expert_size
        for g in (1, 2, 4, 8)
    ]
    assert widths == sorted(widths, reverse=True) and widths[0] == pytest.approx(8 * widths[3], rel=0.1)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        (Shape(activation_ratio=1 / 64, granularity=64), {"multiple": 64}, r"expert_size = .*lower granularity"),
        (Shape(activation_ratio=1 / 4, granularity=8), {"multiple": 64, "tolerance": 0.001}, r"tolerance = 0.001: "),
        (Shape(activation_ratio=0.9, granularity=2), {}, r"activation_ratio = 0.9: .*not sparse; lower it"),
        (Shape(), {"by": "flop"}, r"by = 'flop': must be one of flops"),
        (Shape(), {"multiple": 0}, r"multiple = 0: must be at least 1"),
    ],
    ids=["too_narrow", "too_coarse", "not_sparse", "by", "multiple"],
)
def test_impossible_matches_are_refused(shape, options, message):
    with pytest.raises(ConfigError, match=message):
        match(BASE, shape, sequence_length=S, **options)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation_ratio": 1.0}, r"activation_ratio = 1.0: must be"),
        ({"granularity": 4}, r"granularity = 4: needs activation_ratio"),
        ({"activation_ratio": 0.5, "granularity": 1, "num_shared_experts": 1}, r"granularity = 1: must exceed"),
        ({"attention": "mqa"}, r"attention = 'mqa': must be one of"),
    ],
)
def test_impossible_shapes_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        Shape(**fields)


@pytest.mark.parametrize(
    "attention", [BASE.attention, AttentionConfig(kind="mla", num_heads=2, v_head_dim=32)], ids=["gqa", "mla"]
)
def test_dense_family_keeps_its_proportions(attention):
    base = dataclasses.replace(BASE, attention=attention)
    family = dense_family(base, [2, 4, 8], aspect_ratio=48)
    assert [cfg.hidden_size for cfg in family] == [96, 192, 384]
    assert all(cfg.hidden_size == cfg.attention.num_heads * 32 for cfg in family)
    assert all(abs(cfg.intermediate_size / cfg.hidden_size - 8 / 3) < 0.05 for cfg in family)
    assert not any(cfg.num_moe_layers for cfg in family)
    sizes = [parameter_counts(cfg).active_non_embedding for cfg in family]
    # Depth and width double: eight times the parameters.
    assert sizes[2] / sizes[1] == pytest.approx(8, rel=0.1 if attention.kind == "gqa" else 0.4)


def test_dense_family_keeps_heads_per_key_head():
    base = dataclasses.replace(BASE, attention=dataclasses.replace(BASE.attention, num_kv_heads=2))
    heads = [(c.attention.num_heads, c.attention.num_kv_heads) for c in dense_family(base, [3, 4, 8])]
    assert heads == [(3, 3), (4, 1), (8, 2)]


def test_dense_family_refuses_what_is_no_family():
    with pytest.raises(ConfigError, match=r"num_layers = \[4, 2\]: must be positive and ascending"):
        dense_family(BASE, [4, 2])
    with pytest.raises(ConfigError, match=r"aspect_ratio = 0: must be greater"):
        dense_family(BASE, [2], aspect_ratio=0)
