"""The model against Hugging Face transformers 5.23.0, an implementation that nobody here wrote.

`hf_reference.npz` holds what transformers computed (see `make_hf_reference.py`), so that no PyTorch is needed here.

B batch, S sequence, T tokens, E experts, V vocabulary.
"""

import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import presets
from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig, MTPConfig, RoPEConfig
from moe_jax.model.definition import Definition
from moe_jax.model.layers import rope_frequencies, rotation, yarn_mscale
from moe_jax.model.router import route
from moe_jax.model.transformer import make_cache

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles in half the time

TOLERANCE = 2e-5
"""Of the largest value; float32 noise is ten times smaller."""


def mla(rope: RoPEConfig, q_lora_rank: int = 0) -> AttentionConfig:
    return AttentionConfig(
        kind="mla",
        num_heads=4,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=8,
        qk_nope_head_dim=4,
        qk_rope_head_dim=8,
        v_head_dim=6,
        rope=rope,
    )


def gqa(head_dim: int, num_kv_heads: int, rope: RoPEConfig | None = None, **kwargs) -> AttentionConfig:
    rope = rope or RoPEConfig(theta=100.0)
    return AttentionConfig(kind="gqa", num_heads=4, num_kv_heads=num_kv_heads, head_dim=head_dim, rope=rope, **kwargs)


def softmax_experts(num_experts_per_token: int, **kwargs) -> MoEConfig:
    return MoEConfig(
        num_experts=8,
        num_experts_per_token=num_experts_per_token,
        expert_size=6,
        score="softmax",
        selection_bias=False,
        **kwargs,
    )


model = functools.partial(
    ModelConfig, vocab_size=24, hidden_size=16, intermediate_size=12, num_layers=3, max_position=64, rms_norm_eps=1e-3
)
DENSE = MoEConfig(num_experts=0)
ROPE = RoPEConfig(theta=100.0, layout="interleaved")
YARN = functools.partial(
    RoPEConfig,
    theta=10.0,
    layout="interleaved",
    scaling="yarn",
    factor=4.0,
    original_max_position=16,
    beta_fast=1.0,
    beta_slow=0.5,
)
LLAMA3 = RoPEConfig(
    theta=10.0, scaling="llama3", factor=4.0, original_max_position=16, low_freq_factor=1.0, high_freq_factor=4.0
)
V3_EXPERTS = MoEConfig(
    num_experts=8,
    num_experts_per_token=3,
    num_shared_experts=1,
    expert_size=6,
    num_groups=4,
    num_groups_per_token=2,
    routed_scaling_factor=2.5,
)

MODELS = {
    "deepseek_v3": model(
        attention=mla(YARN(mscale=1.0, mscale_all_dim=1.0), q_lora_rank=10), moe=V3_EXPERTS, mtp=MTPConfig(depth=2)
    ),
    "deepseek_v3_no_groups": model(
        attention=mla(ROPE),
        moe=MoEConfig(
            num_experts=8, num_experts_per_token=3, num_shared_experts=2, expert_size=6, routed_scaling_factor=2.446
        ),
    ),
    "deepseek_v2": model(
        attention=mla(YARN(mscale=1.5, mscale_all_dim=0.707), q_lora_rank=10),
        moe=softmax_experts(
            3,
            num_shared_experts=2,
            num_groups=4,
            num_groups_per_token=2,
            group_score="max",
            normalize_weights=False,
            routed_scaling_factor=4.0,
        ),
    ),
    "deepseek_v2_lite": model(
        attention=mla(ROPE), moe=softmax_experts(3, num_shared_experts=2, normalize_weights=False)
    ),
    "mixtral": model(attention=gqa(8, 2), moe=softmax_experts(2), first_k_dense=0),
    "qwen2": model(attention=gqa(4, 2, qkv_bias=True), moe=DENSE, tie_word_embeddings=True),
    "qwen3": model(attention=gqa(8, 2, YARN(layout="half"), qk_norm="head"), moe=DENSE),
    "qwen3_moe": model(attention=gqa(8, 1, qk_norm="head"), moe=softmax_experts(3), first_k_dense=0),
    "olmoe": model(
        attention=gqa(4, 2, qk_norm="full"), moe=softmax_experts(3, normalize_weights=False), first_k_dense=0
    ),
    "llama3": model(attention=gqa(8, 2, LLAMA3), moe=DENSE),
}

ROUTERS = {
    "deepseek_v3": MoEConfig(
        num_experts=32,
        num_experts_per_token=6,
        num_groups=8,
        num_groups_per_token=3,
        routed_scaling_factor=2.5,
    ),
    "deepseek_v3_not_normalized": MoEConfig(
        num_experts=32, num_experts_per_token=6, num_groups=8, num_groups_per_token=3, normalize_weights=False
    ),
    "deepseek_v2": MoEConfig(
        num_experts=32,
        num_experts_per_token=6,
        score="softmax",
        num_groups=8,
        num_groups_per_token=3,
        group_score="max",
        normalize_weights=False,
        routed_scaling_factor=16.0,
        selection_bias=False,
    ),
    "deepseek_v2_lite": MoEConfig(
        num_experts=32, num_experts_per_token=6, score="softmax", normalize_weights=False, selection_bias=False
    ),
    "mixtral": MoEConfig(num_experts=32, num_experts_per_token=6, score="softmax", selection_bias=False),
    "qwen3_moe": MoEConfig(num_experts=32, num_experts_per_token=6, score="softmax", selection_bias=False),
    "olmoe": MoEConfig(
        num_experts=32, num_experts_per_token=6, score="softmax", normalize_weights=False, selection_bias=False
    ),
}


@functools.cache
def reference(name: str) -> dict[str, np.ndarray]:
    """The stored arrays whose name starts with `name/`; float16 becomes float32."""
    with np.load(pathlib.Path(__file__).with_name("hf_reference.npz")) as file:
        arrays = {key.removeprefix(f"{name}/"): file[key] for key in file.files if key.startswith(f"{name}/")}
    return {key: array.astype(np.float32) if array.dtype == np.float16 else array for key, array in arrays.items()}


def load(name: str):
    """The model of this name with the reference's weights: every one of them used, none missing."""
    definition = Definition.of(MODELS[name])
    weights = {
        key.removeprefix("weights/"): jnp.asarray(value)
        for key, value in reference(name).items()
        if key.startswith("weights/")
    }
    assert {key: value.shape for key, value in weights.items()} == {
        key: variable.shape for key, variable in definition.variables.items()
    }
    return definition.merge(weights, {})


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * np.abs(theirs).max())


SLOW = {"deepseek_v2_lite", "mixtral", "qwen3_moe"}  # made of parts that the other models and the routers cover


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in MODELS])
def test_logits(name):
    stored, valid_BS = reference(name), reference(name)["valid_BS"]
    transformer = load(name)

    @jit
    def logits(tokens_BS, segment_ids_BS):
        return transformer.logits(transformer(tokens_BS, segment_ids_BS=segment_ids_BS).hidden_BSD)

    ours_BSV = logits(stored["tokens_BS"].astype(np.int32), valid_BS.astype(np.int32))
    assert_close(np.asarray(ours_BSV)[valid_BS], stored["logits_BSV"][valid_BS])


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3"])
def test_cached_decoding(name):
    """Prefill, then a token at a time, gives the logits of the whole sequence; one row is padded."""
    stored, valid_BS = reference(name), reference(name)["valid_BS"]
    transformer = load(name)
    B, S = valid_BS.shape

    @functools.partial(jit, static_argnames="prefill")
    def step(tokens_BS, segment_ids_BS, cache, prefill):
        output = transformer(tokens_BS, segment_ids_BS=segment_ids_BS, cache=cache, prefill=prefill)
        return transformer.logits(output.hidden_BSD), output.cache

    cache, parts = make_cache(MODELS[name], B, S + 3), []
    bounds = [0, *range(20, S + 1)]
    for start, stop in itertools.pairwise(bounds):
        tokens_BS = stored["tokens_BS"][:, start:stop].astype(np.int32)
        logits_BSV, cache = step(tokens_BS, valid_BS[:, start:stop].astype(np.int32), cache, prefill=start == 0)
        parts.append(logits_BSV)
    assert_close(np.concatenate(parts, axis=1)[valid_BS], stored["logits_BSV"][valid_BS])


def test_multi_token_prediction():
    """Both modules' hidden states, chained; transformers feeds the trunk's output after the final norm."""
    stored = reference("deepseek_v3")
    transformer = load("deepseek_v3")
    tokens_1S = stored["tokens_BS"][:1].astype(np.int32)
    positions_1S = np.arange(tokens_1S.shape[1])[None]

    @jit
    def predict_ahead(tokens_1S):
        hidden_1SD = transformer(tokens_1S).hidden_BSD
        return transformer.predict_ahead(hidden_1SD, tokens_1S, jnp.ones_like(tokens_1S), positions_1S).hidden_NBSD

    hidden_N1SD = np.asarray(predict_ahead(tokens_1S))
    assert len(hidden_N1SD) == 2
    for k, hidden_1SD in enumerate(hidden_N1SD):
        assert_close(hidden_1SD[:, : -(k + 1)], stored[f"mtp_hidden_{k}"])


@pytest.mark.parametrize("name", ROUTERS)
def test_router(name):
    """The mixing weight of every expert for every token, 0 where it is not chosen."""
    stored, cfg = reference(f"router/{name}"), ROUTERS[name]
    logits_TE = jnp.einsum("TD,DE->TE", stored["x_TD"], stored["gate_DE"])
    scores_TE = jax.nn.sigmoid(logits_TE) if cfg.score == "sigmoid" else jax.nn.softmax(logits_TE, axis=-1)
    routed = route(scores_TE, stored["bias_E"] if cfg.selection_bias else None, cfg)
    mixing_TE = np.zeros(scores_TE.shape, np.float32)
    np.put_along_axis(mixing_TE, np.asarray(routed.experts_TK), np.asarray(routed.weights_TK), axis=1)
    assert_close(mixing_TE, stored["mixing_TE"])


@pytest.mark.parametrize(
    ("name", "rope"),
    [
        ("deepseek_v3", presets.deepseek_v3().attention.rope),
        ("deepseek_v2", presets.deepseek_v2().attention.rope),
        ("kimi_k2", presets.kimi_k2().attention.rope),
        ("llama_3_1", presets.llama_3_1_8b().attention.rope),
        ("yarn_defaults", RoPEConfig(theta=1e6, scaling="yarn", factor=4.0, original_max_position=32_768)),
    ],
)
def test_rope_of_released_models(name, rope):
    """Frequencies, the length of the rotation, and YaRN's factor of the softmax."""
    stored = reference(f"rope/{name}")
    np.testing.assert_allclose(rope_frequencies(rope, 64), stored["frequencies"], rtol=3e-6)
    rot = rotation(jnp.array([[1234]]), rope, 64)
    softmax_scale = yarn_mscale(rope.factor, rope.mscale_all_dim) ** 2 if rope.scaling == "yarn" else 1.0
    scales = [np.hypot(rot.cos_BSR, rot.sin_BSR)[0, 0, 0], softmax_scale]
    np.testing.assert_allclose(scales, stored["scales"], rtol=1e-6)
