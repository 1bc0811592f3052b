"""Counts against published figures, and against the formulas on a model small enough to count by hand."""

import dataclasses

import pytest

from moe_jax import presets
from moe_jax.analysis.flops import kv_cache_bytes_per_token, parameter_counts, training_flops_per_token
from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig

BILLION = 10**9

# name: total, active with both embeddings (both in billions), GFLOP per training token of a causal sequence of 4096
PUBLISHED = {
    "deepseek_v2_lite": (15.706, 2.661, 16.4),
    "deepseek_v2": (235.741, 21.376, 155.3),
    "deepseek_v3": (671.026, 37.552, 250.5),
    "deepseek_r1": (671.026, 37.552, 250.5),
    "moonlight_16b_a3b": (15.960, 2.915, 17.2),
    "kimi_k2": (1026.408, 32.862, 205.5),  # the released configuration's; the report rounds to 1.04T
    "deepseek_moe_16b": (16.376, 2.829, 17.1),
    "mixtral_8x7b": (46.703, 12.880, 79.7),
    "mixtral_8x22b": (140.630, 39.161, 242.2),
    "qwen3_30b_a3b": (30.532, 3.353, 23.1),
    "olmoe_1b_7b": (6.919, 1.282, 7.9),
    "qwen2_5_0_5b": (0.494, 0.494, 3.5),
    "qwen2_5_1_5b": (1.544, 1.544, 10.3),
    "qwen2_5_7b": (7.616, 7.616, 44.9),
    "qwen2_5_14b": (14.770, 14.770, 90.0),
    "qwen2_5_32b": (32.764, 32.764, 200.0),
    "qwen2_5_72b": (72.706, 72.706, 444.9),
    "llama_3_8b": (8.030, 8.030, 48.2),
    "llama_3_70b": (70.554, 70.554, 433.1),
    "llama_3_1_8b": (8.030, 8.030, 48.2),
    "llama_3_1_70b": (70.554, 70.554, 433.1),
    "llama_3_1_405b": (405.853, 405.853, 2473.2),
    "deepseek_llm_7b": (6.910, 6.910, 42.0),
    "deepseek_llm_67b": (67.425, 67.425, 418.6),
    "r1_distill_qwen_1_5b": (1.777, 1.777, 10.3),
    "r1_distill_qwen_7b": (7.616, 7.616, 44.9),
    "r1_distill_qwen_14b": (14.770, 14.770, 90.0),
    "r1_distill_qwen_32b": (32.764, 32.764, 200.0),
    "r1_distill_llama_8b": (8.030, 8.030, 48.2),
    "r1_distill_llama_70b": (70.554, 70.554, 433.1),
}


def test_every_released_model_has_a_golden_value():
    ours = {name for name in presets.PRESETS if name.startswith("tiny_")} | {"v3_34m"}  # never released
    assert set(PUBLISHED) == set(presets.PRESETS) - ours


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_match_the_tables(name):
    total, active, gigaflops = PUBLISHED[name]
    cfg = presets.get(name)
    counts = parameter_counts(cfg)
    assert counts.total / BILLION == pytest.approx(total, abs=6e-4)
    assert counts.active / BILLION == pytest.approx(active, abs=6e-4)
    assert training_flops_per_token(cfg, 4096) / BILLION == pytest.approx(gigaflops, abs=0.06)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("deepseek_v2_lite", 2.242),
        ("deepseek_v2", 20.327),
        ("deepseek_v3", 35.699),
        ("moonlight_16b_a3b", 2.244),
        ("kimi_k2", 30.513),
        ("qwen2_5_0_5b", 0.358),
    ],
)
def test_active_non_embedding(name, billions):
    assert parameter_counts(presets.get(name)).active_non_embedding / BILLION == pytest.approx(billions, abs=6e-4)


def test_mtp_module_of_v3_adds_up_to_the_released_files():
    cfg = presets.deepseek_v3()
    counts = parameter_counts(cfg)
    assert counts.mtp == 11_610_068_224
    embeddings_in_module = 2 * cfg.vocab_size * cfg.hidden_size  # the files repeat the shared embedding and head
    assert (counts.total + counts.mtp + embeddings_in_module) / BILLION == pytest.approx(684.5, abs=0.05)
    assert parameter_counts(presets.kimi_k2()).mtp == 0


@pytest.mark.parametrize(
    ("name", "gigaflops"),
    [("deepseek_v2", 185.5), ("deepseek_v3", 281.2), ("llama_3_1_405b", 2524.0), ("qwen2_5_72b", 461.0)],
)
def test_training_flops_of_full_attention(name, gigaflops):
    flops = training_flops_per_token(presets.get(name), 4096, causal=False)
    assert flops / BILLION == pytest.approx(gigaflops, abs=0.06)


def test_mtp_flops_are_one_block_its_projection_and_a_head():
    cfg = presets.tiny_moe()
    one = training_flops_per_token(cfg, 128, include_mtp=True)
    none = training_flops_per_token(cfg, 128)
    longer = training_flops_per_token(dataclasses.replace(cfg, num_layers=cfg.num_layers + 1), 128)
    block = longer - none
    assert one - none == block + 6 * (2 * cfg.hidden_size**2 + cfg.vocab_size * cfg.hidden_size)
    parallel = dataclasses.replace(cfg, mtp=dataclasses.replace(cfg.mtp, kind="parallel"))
    assert training_flops_per_token(parallel, 128, include_mtp=True) == one - 6 * 2 * cfg.hidden_size**2
    without_modules = dataclasses.replace(cfg, mtp=dataclasses.replace(cfg.mtp, depth=0))
    assert training_flops_per_token(without_modules, 128, include_mtp=True) == none


@pytest.mark.parametrize(
    ("name", "kilobytes"),
    [
        ("deepseek_v2_lite", 31.104),
        ("moonlight_16b_a3b", 31.104),
        ("deepseek_v2", 69.120),
        ("deepseek_v3", 70.272),
        ("kimi_k2", 70.272),
        ("qwen2_5_72b", 327.680),
        ("llama_3_1_405b", 516.096),
        ("llama_3_1_8b", 131.072),
        ("mixtral_8x7b", 131.072),
        ("olmoe_1b_7b", 131.072),
        ("llama_3_1_70b", 327.680),
        ("qwen3_30b_a3b", 98.304),
        ("deepseek_moe_16b", 229.376),
        ("deepseek_llm_7b", 491.520),
        ("deepseek_llm_67b", 389.120),
    ],
)
def test_cache_bytes_match_the_tables(name, kilobytes):
    assert kv_cache_bytes_per_token(presets.get(name)) == round(1000 * kilobytes)
    assert kv_cache_bytes_per_token(presets.get(name), bytes_per_element=4) == round(2000 * kilobytes)


def test_a_model_counted_by_hand():
    cfg = ModelConfig(
        vocab_size=10,
        hidden_size=4,
        num_layers=2,
        intermediate_size=6,
        first_k_dense=1,
        attention=AttentionConfig(kind="gqa", num_heads=4, num_kv_heads=2, head_dim=2, qkv_bias=True, qk_norm="full"),
        moe=MoEConfig(num_experts=4, num_experts_per_token=2, num_shared_experts=1, expert_size=3),
        tie_word_embeddings=True,
    )
    projections = 4 * 8 + 4 * 4 + 4 * 4 + 8 * 4  # queries, keys, values, output
    attention = projections + (8 + 4 + 4) + (8 + 4) + 2 * 4  # biases, norms of queries and keys, the block's norms
    expert, router, bias = 3 * 4 * 3, 4 * 4, 4
    ends = 10 * 4 + 4  # one embedding, the final norm
    dense = attention + 3 * 4 * 6
    counts = parameter_counts(cfg)
    assert counts.total == ends + dense + attention + 5 * expert + router + bias
    assert counts.active == ends + dense + attention + 3 * expert + router + bias
    assert counts.active_non_embedding == counts.active - 10 * 4

    scores = 2 * 4 * (2 + 2) * 8 // 2  # 2 FLOPs x heads x (query + value width) x 8 keys, half of them masked
    forward = 2 * (2 * projections + 3 * 4 * 6 + 3 * expert + router + 10 * 4) + 2 * scores
    assert training_flops_per_token(cfg, 8) == 3 * forward
    assert training_flops_per_token(cfg, 8, causal=False) == 3 * (forward + 2 * scores)
