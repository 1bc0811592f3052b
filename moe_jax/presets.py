"""Named models: each function returns a `ModelConfig`, a value that may be changed with `dataclasses.replace`.

A preset says what a model *is*: its sizes, its router, its rotary embedding, as its report and its released
configuration state them. How it is computed (`dtype`, `remat`) is left at the default, for the experiment to choose. A
value marked "unverified" was not found in a primary source.

Balance losses are those that a model's report or training configuration states. What Mixtral and Qwen3 were balanced
with is not stated in full, so theirs are off: the `router_aux_loss_coef` of their releases belongs to a loss of the
library that pools all layers before it multiplies, and is K times the ones here (see `losses/balance.py`).
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable

from moe_jax.config import AttentionConfig, ConfigError, ModelConfig, MoEConfig, MTPConfig, RoPEConfig

# ---------------------------------------------------------------------------------------------------- small models


def tiny_moe() -> ModelConfig:
    """A DeepSeek-V3 in miniature, for two CPU cores: MLA, shared and routed experts, balancing bias, one MTP module.

    Its vocabulary is that of the byte-level tokenizer: 256 bytes and the special tokens.
    """
    return ModelConfig(
        vocab_size=265,
        hidden_size=64,
        num_layers=3,
        intermediate_size=192,
        first_k_dense=1,
        attention=AttentionConfig(
            kind="mla",
            num_heads=4,
            kv_lora_rank=32,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=16,
            rope=RoPEConfig(layout="interleaved"),
        ),
        moe=MoEConfig(
            num_experts=8,
            num_experts_per_token=2,
            num_shared_experts=1,
            expert_size=64,
            routed_scaling_factor=1.41,  # router.estimated_scaling_factor for the best 2 of 8
        ),
        mtp=MTPConfig(depth=1),
        max_position=1024,
        initializer_range=0.06,
    )


def tiny_dense() -> ModelConfig:
    """`tiny_moe` with a dense feed-forward in every layer and no MTP module."""
    return dataclasses.replace(tiny_moe(), moe=MoEConfig(num_experts=0), mtp=MTPConfig(depth=0))


# -------------------------------------------------------------------------------------------------- MLA with experts


def v3_34m() -> ModelConfig:
    """A DeepSeek-V3 of 34 M parameters, 5.5 M of them active: what `benchmark moe` trains. 64 experts, 6 per token."""
    return ModelConfig(
        vocab_size=512,
        hidden_size=256,
        num_layers=6,
        intermediate_size=768,
        first_k_dense=1,
        attention=AttentionConfig(
            kind="mla",
            num_heads=8,
            q_lora_rank=96,
            kv_lora_rank=64,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
            rope=RoPEConfig(layout="interleaved"),
        ),
        moe=MoEConfig(
            num_experts=64,
            num_experts_per_token=6,
            num_shared_experts=1,
            expert_size=128,
            num_groups=8,
            num_groups_per_token=4,
            routed_scaling_factor=2.5,
        ),
    )


def deepseek_v2_lite() -> ModelConfig:
    """DeepSeek-V2-Lite: 15.7B parameters, 2.4B active (arXiv:2405.04434, appendix B)."""
    return ModelConfig(
        vocab_size=102_400,
        hidden_size=2048,
        num_layers=27,
        intermediate_size=10_944,
        first_k_dense=1,
        attention=AttentionConfig(
            kind="mla",
            num_heads=16,
            q_lora_rank=0,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            rope=_yarn(mscale=0.707),
        ),
        moe=MoEConfig(
            num_experts=64,
            num_experts_per_token=6,
            num_shared_experts=2,
            expert_size=1408,
            score="softmax",
            normalize_weights=False,
            routed_scaling_factor=1.0,
            selection_bias=False,
            bias_update_rate=0.0,
            sequence_balance_coef=0.001,  # the expert-level balance factor α1
        ),
        max_position=163_840,
        rms_norm_eps=1e-6,
        initializer_range=0.006,  # unverified for Lite: V2's
    )


def deepseek_v2() -> ModelConfig:
    """DeepSeek-V2: 236B parameters, 21B active (arXiv:2405.04434).

    `mscale` is 0.707 as in the report and the released V2 and V2-Chat; Coder-V2-Instruct has 1.0. In training V2 also
    dropped tokens beyond a capacity of 1.0 per device, but for about a tenth of the sequences: `moe.capacity_factor`
    drops in all of them, and is left off.
    """
    return ModelConfig(
        vocab_size=102_400,
        hidden_size=5120,
        num_layers=60,
        intermediate_size=12_288,
        first_k_dense=1,
        attention=AttentionConfig(
            kind="mla",
            num_heads=128,
            q_lora_rank=1536,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            rope=_yarn(mscale=0.707),
        ),
        moe=MoEConfig(
            num_experts=160,
            num_experts_per_token=6,
            num_shared_experts=2,
            expert_size=1536,
            score="softmax",
            num_groups=8,
            num_groups_per_token=3,
            group_score="max",
            normalize_weights=False,
            routed_scaling_factor=16.0,
            selection_bias=False,
            bias_update_rate=0.0,
            sequence_balance_coef=0.003,  # the expert-level balance factor α1
            device_balance_coef=0.05,
            communication_balance_coef=0.02,
        ),
        max_position=163_840,
        rms_norm_eps=1e-6,
        initializer_range=0.006,
    )


def deepseek_v3() -> ModelConfig:
    """DeepSeek-V3: 671B parameters, 37B active, and an MTP module of 11.6B (arXiv:2412.19437)."""
    return ModelConfig(
        vocab_size=129_280,
        hidden_size=7168,
        num_layers=61,
        intermediate_size=18_432,
        first_k_dense=3,
        attention=AttentionConfig(
            kind="mla",
            num_heads=128,
            q_lora_rank=1536,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            rope=_yarn(mscale=1.0),
        ),
        moe=MoEConfig(
            num_experts=256,
            num_experts_per_token=8,
            num_shared_experts=1,
            expert_size=2048,
            score="sigmoid",
            num_groups=8,
            num_groups_per_token=4,
            group_score="top2_sum",
            normalize_weights=True,
            routed_scaling_factor=2.5,
            selection_bias=True,
            bias_update_rate=0.001,  # 0 for the last 500B of the 14.8T tokens
            sequence_balance_coef=1e-4,
        ),
        mtp=MTPConfig(depth=1, loss_coef=0.3, late_loss_coef=0.1, late_after_tokens=10_000_000_000_000),
        max_position=163_840,
        rms_norm_eps=1e-6,
        # What the model was trained from (report §4.2); the released configuration's 0.02 is a library's default.
        initializer_range=0.006,
    )


def deepseek_r1() -> ModelConfig:
    """DeepSeek-R1 (arXiv:2501.12948): trained from DeepSeek-V3-Base, of the same architecture."""
    return deepseek_v3()


def moonlight_16b_a3b() -> ModelConfig:
    """Moonlight-16B-A3B: 16.0B parameters, 2.9B active (arXiv:2502.16982)."""
    return ModelConfig(
        vocab_size=163_840,
        hidden_size=2048,
        num_layers=27,
        intermediate_size=11_264,
        first_k_dense=1,
        attention=AttentionConfig(
            kind="mla",
            num_heads=16,
            q_lora_rank=0,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            rope=RoPEConfig(theta=50_000.0, layout="interleaved"),
        ),
        moe=MoEConfig(
            num_experts=64,
            num_experts_per_token=6,
            num_shared_experts=2,
            expert_size=1408,
            score="sigmoid",
            normalize_weights=True,
            routed_scaling_factor=2.446,  # router.estimated_scaling_factor finds it
            selection_bias=True,
            bias_update_rate=0.001,  # unverified: V3's
            bias_zero_mean=True,
            sequence_balance_coef=1e-4,  # unverified: V3's
        ),
        max_position=8192,
        rms_norm_eps=1e-5,
    )


def kimi_k2() -> ModelConfig:
    """Kimi K2: 1.03T parameters, 32.9B active (arXiv:2507.20534).

    The report rounds to 1.04T; the released configuration multiplies out to 1.026T. `rms_norm_eps` is the base model's:
    K2-Thinking has 1e-5.
    """
    return ModelConfig(
        vocab_size=163_840,
        hidden_size=7168,
        num_layers=61,
        intermediate_size=18_432,
        first_k_dense=1,
        attention=AttentionConfig(
            kind="mla",
            num_heads=64,
            q_lora_rank=1536,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            rope=dataclasses.replace(_yarn(mscale=1.0), theta=50_000.0, factor=32.0, beta_fast=1.0),
        ),
        moe=MoEConfig(
            num_experts=384,
            num_experts_per_token=8,
            num_shared_experts=1,
            expert_size=2048,
            score="sigmoid",
            normalize_weights=True,
            routed_scaling_factor=2.827,
            selection_bias=True,
            bias_update_rate=0.001,  # unverified: V3's
            sequence_balance_coef=1e-4,  # unverified: V3's
        ),
        max_position=131_072,
        rms_norm_eps=1e-6,
    )


# -------------------------------------------------------------------------------------------------- GQA with experts


def deepseek_moe_16b() -> ModelConfig:
    """DeepSeekMoE-16B: 16.4B parameters, 2.8B active (arXiv:2401.06066)."""
    return ModelConfig(
        vocab_size=102_400,
        hidden_size=2048,
        num_layers=28,
        intermediate_size=10_944,
        first_k_dense=1,
        attention=AttentionConfig(kind="gqa", num_heads=16, num_kv_heads=16, head_dim=128),
        moe=MoEConfig(
            num_experts=64,
            num_experts_per_token=6,
            num_shared_experts=2,
            expert_size=1408,
            score="softmax",
            normalize_weights=False,
            selection_bias=False,
            bias_update_rate=0.0,
            sequence_balance_coef=0.001,
        ),
        max_position=4096,
        rms_norm_eps=1e-6,
        initializer_range=0.006,
    )


def mixtral_8x7b() -> ModelConfig:
    """Mixtral-8x7B: 46.7B parameters, 12.9B active (arXiv:2401.04088)."""
    return ModelConfig(
        vocab_size=32_000,
        hidden_size=4096,
        num_layers=32,
        intermediate_size=0,
        first_k_dense=0,
        attention=AttentionConfig(
            kind="gqa", num_heads=32, num_kv_heads=8, head_dim=128, rope=RoPEConfig(theta=1_000_000.0)
        ),
        moe=_softmax_experts(8, 2, 14_336, normalize_weights=True),
        max_position=32_768,  # unverified
        rms_norm_eps=1e-5,
    )


def mixtral_8x22b() -> ModelConfig:
    """Mixtral-8x22B: 140.6B parameters, 39.2B active."""
    return ModelConfig(
        vocab_size=32_768,
        hidden_size=6144,
        num_layers=56,
        intermediate_size=0,
        first_k_dense=0,
        attention=AttentionConfig(
            kind="gqa", num_heads=48, num_kv_heads=8, head_dim=128, rope=RoPEConfig(theta=1_000_000.0)
        ),
        moe=_softmax_experts(8, 2, 16_384, normalize_weights=True),
        max_position=65_536,  # unverified
        rms_norm_eps=1e-5,
    )


def qwen3_30b_a3b() -> ModelConfig:
    """Qwen3-30B-A3B: 30.5B parameters, 3.4B active (arXiv:2505.09388). The release of July 2025 has theta 1e7."""
    return ModelConfig(
        vocab_size=151_936,
        hidden_size=2048,
        num_layers=48,
        intermediate_size=0,
        first_k_dense=0,
        attention=AttentionConfig(
            kind="gqa", num_heads=32, num_kv_heads=4, head_dim=128, qk_norm="head", rope=RoPEConfig(theta=1_000_000.0)
        ),
        moe=_softmax_experts(128, 8, 768, normalize_weights=True),
        max_position=40_960,  # unverified
        rms_norm_eps=1e-6,
    )


def olmoe_1b_7b() -> ModelConfig:
    """OLMoE-1B-7B-0924: 6.9B parameters, 1.3B active (arXiv:2409.02060)."""
    return ModelConfig(
        vocab_size=50_304,
        hidden_size=2048,
        num_layers=16,
        intermediate_size=0,
        first_k_dense=0,
        attention=AttentionConfig(kind="gqa", num_heads=16, num_kv_heads=16, head_dim=128, qk_norm="full"),
        # moe_loss_weight 0.01 and moe_zloss_weight 0.001; MegaBlocks and OLMo take means over the 16 layers, we sums.
        moe=dataclasses.replace(
            _softmax_experts(64, 8, 1024, normalize_weights=False),
            expert_balance_coef=0.01 / 16,
            z_loss_coef=0.001 / 16,
        ),
        max_position=4096,
        rms_norm_eps=1e-5,
    )


# ------------------------------------------------------------------------------------------------------------- dense


def qwen2_5_0_5b() -> ModelConfig:
    """Qwen2.5-0.5B base (arXiv:2412.15115)."""
    cfg = _qwen2_5(896, 24, 4864, heads=14, kv_heads=2, vocab_size=151_936)
    return dataclasses.replace(cfg, tie_word_embeddings=True, max_position=32_768)  # max_position unverified


def qwen2_5_1_5b() -> ModelConfig:
    """Qwen2.5-1.5B base (arXiv:2412.15115)."""
    cfg = _qwen2_5(1536, 28, 8960, heads=12, kv_heads=2, vocab_size=151_936)
    return dataclasses.replace(cfg, tie_word_embeddings=True)


def qwen2_5_7b() -> ModelConfig:
    """Qwen2.5-7B base (arXiv:2412.15115)."""
    return _qwen2_5(3584, 28, 18_944, heads=28, kv_heads=4)


def qwen2_5_14b() -> ModelConfig:
    """Qwen2.5-14B base (arXiv:2412.15115); the Instruct model has `rms_norm_eps` 1e-6."""
    return _qwen2_5(5120, 48, 13_824, heads=40, kv_heads=8, rms_norm_eps=1e-5)


def qwen2_5_32b() -> ModelConfig:
    """Qwen2.5-32B base (arXiv:2412.15115); the Instruct model has `rms_norm_eps` 1e-6."""
    return _qwen2_5(5120, 64, 27_648, heads=40, kv_heads=8, rms_norm_eps=1e-5)


def qwen2_5_72b() -> ModelConfig:
    """Qwen2.5-72B base (arXiv:2412.15115)."""
    return _qwen2_5(8192, 80, 29_568, heads=64, kv_heads=8, rms_norm_eps=1e-5)  # rms_norm_eps unverified


def llama_3_8b() -> ModelConfig:
    """Llama-3-8B (arXiv:2407.21783), before the extension to long contexts."""
    return _without_scaling(llama_3_1_8b())


def llama_3_70b() -> ModelConfig:
    """Llama-3-70B (arXiv:2407.21783), before the extension to long contexts."""
    return _without_scaling(llama_3_1_70b())


def llama_3_1_8b() -> ModelConfig:
    """Llama-3.1-8B (arXiv:2407.21783)."""
    return _llama_3_1(4096, 32, 14_336, heads=32)


def llama_3_1_70b() -> ModelConfig:
    """Llama-3.1-70B (arXiv:2407.21783)."""
    return _llama_3_1(8192, 80, 28_672, heads=64)


def llama_3_1_405b() -> ModelConfig:
    """Llama-3.1-405B (arXiv:2407.21783)."""
    return _llama_3_1(16_384, 126, 53_248, heads=128)


def deepseek_llm_7b() -> ModelConfig:
    """DeepSeek LLM 7B (arXiv:2401.02954): plain multi-head attention."""
    return _deepseek_llm(4096, 30, 11_008, heads=32, kv_heads=32)


def deepseek_llm_67b() -> ModelConfig:
    """DeepSeek LLM 67B (arXiv:2401.02954)."""
    return _deepseek_llm(8192, 95, 22_016, heads=64, kv_heads=8)


# ------------------------------------------------------------------------------------------- distilled from DeepSeek-R1


def r1_distill_qwen_1_5b() -> ModelConfig:
    """DeepSeek-R1-Distill-Qwen-1.5B, from Qwen2.5-Math-1.5B: theta 1e4, and the head is a weight of its own."""
    return _qwen2_5(1536, 28, 8960, heads=12, kv_heads=2, vocab_size=151_936, theta=10_000.0)


def r1_distill_qwen_7b() -> ModelConfig:
    """DeepSeek-R1-Distill-Qwen-7B, from Qwen2.5-Math-7B: theta 1e4."""
    return _qwen2_5(3584, 28, 18_944, heads=28, kv_heads=4, theta=10_000.0)


def r1_distill_qwen_14b() -> ModelConfig:
    """DeepSeek-R1-Distill-Qwen-14B, from the base model Qwen2.5-14B, of the same architecture."""
    return qwen2_5_14b()


def r1_distill_qwen_32b() -> ModelConfig:
    """DeepSeek-R1-Distill-Qwen-32B, from the base model Qwen2.5-32B, of the same architecture."""
    return qwen2_5_32b()


def r1_distill_llama_8b() -> ModelConfig:
    """DeepSeek-R1-Distill-Llama-8B, from the base model Llama-3.1-8B, of the same architecture."""
    return llama_3_1_8b()


def r1_distill_llama_70b() -> ModelConfig:
    """DeepSeek-R1-Distill-Llama-70B, from Llama-3.3-70B-Instruct, of the architecture of Llama-3.1-70B."""
    return llama_3_1_70b()


# ------------------------------------------------------------------------------------------------ what families share


def _yarn(mscale: float) -> RoPEConfig:
    """YaRN as in DeepSeek-V2 and V3: 40 times 4096 tokens, `mscale` the same for the rotation and the softmax."""
    return RoPEConfig(
        theta=10_000.0,
        layout="interleaved",
        scaling="yarn",
        factor=40.0,
        original_max_position=4096,
        beta_fast=32.0,
        beta_slow=1.0,
        mscale=mscale,
        mscale_all_dim=mscale,
    )


def _softmax_experts(
    num_experts: int, num_experts_per_token: int, expert_size: int, *, normalize_weights: bool
) -> MoEConfig:
    """Experts of Mixtral, Qwen3 and OLMoE: none shared, no balancing bias, no balance loss."""
    return MoEConfig(
        num_experts=num_experts,
        num_experts_per_token=num_experts_per_token,
        num_shared_experts=0,
        expert_size=expert_size,
        score="softmax",
        normalize_weights=normalize_weights,
        selection_bias=False,
        bias_update_rate=0.0,
        sequence_balance_coef=0.0,
    )


def _dense(
    hidden_size: int,
    num_layers: int,
    intermediate_size: int,
    *,
    vocab_size: int,
    attention: AttentionConfig,
    max_position: int,
    rms_norm_eps: float,
    initializer_range: float = 0.02,
) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        intermediate_size=intermediate_size,
        first_k_dense=num_layers,
        attention=attention,
        moe=MoEConfig(num_experts=0),
        max_position=max_position,
        rms_norm_eps=rms_norm_eps,
        initializer_range=initializer_range,
    )


def _qwen2_5(
    hidden_size: int,
    num_layers: int,
    intermediate_size: int,
    *,
    heads: int,
    kv_heads: int,
    vocab_size: int = 152_064,
    theta: float = 1_000_000.0,
    rms_norm_eps: float = 1e-6,
) -> ModelConfig:
    attention = AttentionConfig(
        kind="gqa",
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden_size // heads,
        qkv_bias=True,
        rope=RoPEConfig(theta=theta),
    )
    return _dense(
        hidden_size,
        num_layers,
        intermediate_size,
        vocab_size=vocab_size,
        attention=attention,
        max_position=131_072,
        rms_norm_eps=rms_norm_eps,
    )


def _llama_3_1(hidden_size: int, num_layers: int, intermediate_size: int, *, heads: int) -> ModelConfig:
    rope = RoPEConfig(
        theta=500_000.0,
        scaling="llama3",
        factor=8.0,
        original_max_position=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    return _dense(
        hidden_size,
        num_layers,
        intermediate_size,
        vocab_size=128_256,
        attention=AttentionConfig(
            kind="gqa", num_heads=heads, num_kv_heads=8, head_dim=hidden_size // heads, rope=rope
        ),
        max_position=131_072,
        rms_norm_eps=1e-5,
    )


def _without_scaling(cfg: ModelConfig) -> ModelConfig:
    """A Llama-3.1 as it was before its context was extended from 8192 tokens."""
    attention = dataclasses.replace(cfg.attention, rope=RoPEConfig(theta=cfg.attention.rope.theta))
    return dataclasses.replace(cfg, attention=attention, max_position=8192)


def _deepseek_llm(
    hidden_size: int, num_layers: int, intermediate_size: int, *, heads: int, kv_heads: int
) -> ModelConfig:
    return _dense(
        hidden_size,
        num_layers,
        intermediate_size,
        vocab_size=102_400,
        attention=AttentionConfig(kind="gqa", num_heads=heads, num_kv_heads=kv_heads, head_dim=hidden_size // heads),
        max_position=4096,
        rms_norm_eps=1e-6,
        initializer_range=0.006,
    )


# ------------------------------------------------------------------------------------------------------------ by name


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    preset.__name__: preset
    for preset in (
        tiny_moe,
        tiny_dense,
        v3_34m,
        deepseek_v2_lite,
        deepseek_v2,
        deepseek_v3,
        deepseek_r1,
        moonlight_16b_a3b,
        kimi_k2,
        deepseek_moe_16b,
        mixtral_8x7b,
        mixtral_8x22b,
        qwen3_30b_a3b,
        olmoe_1b_7b,
        qwen2_5_0_5b,
        qwen2_5_1_5b,
        qwen2_5_7b,
        qwen2_5_14b,
        qwen2_5_32b,
        qwen2_5_72b,
        llama_3_8b,
        llama_3_70b,
        llama_3_1_8b,
        llama_3_1_70b,
        llama_3_1_405b,
        deepseek_llm_7b,
        deepseek_llm_67b,
        r1_distill_qwen_1_5b,
        r1_distill_qwen_7b,
        r1_distill_qwen_14b,
        r1_distill_qwen_32b,
        r1_distill_llama_8b,
        r1_distill_llama_70b,
    )
}
"""Every preset by its function's name."""


def get(name: str) -> ModelConfig:
    """The preset of this name.

    Raises:
        ConfigError: no preset has this name; the nearest one is named.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, list(PRESETS), n=1, cutoff=0)
        raise ConfigError(f"no preset is named {name!r}: did you mean {near[0]!r}?")
    return PRESETS[name]()
