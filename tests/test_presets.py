"""Presets: what tells the models apart, and that the model built from each has the parameters it should."""

import jax
import pytest
from flax import nnx

from moe_jax import presets
from moe_jax.analysis.flops import parameter_counts
from moe_jax.config import ConfigError, ModelConfig
from moe_jax.model.router import estimated_scaling_factor
from moe_jax.model.transformer import Transformer


@pytest.mark.parametrize("name", presets.PRESETS)
def test_get_gives_what_the_function_gives(name):
    assert isinstance(presets.get(name), ModelConfig)
    assert presets.get(name) == getattr(presets, name)()


@pytest.mark.parametrize(
    ("wrong", "near"), [("deepseek_v4", "deepseek_v3"), ("mixtral8x7b", "mixtral_8x7b"), ("qwen2.5_7b", "qwen2_5_7b")]
)
def test_an_unknown_name_is_answered_with_the_nearest(wrong, near):
    with pytest.raises(ConfigError, match=f"no preset is named '{wrong}': did you mean '{near}'"):
        presets.get(wrong)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_the_model_has_the_parameters_that_the_formulas_count(name):
    cfg = presets.get(name)
    model = jax.eval_shape(lambda: Transformer(cfg, nnx.Rngs(0)))
    state = nnx.state(model, nnx.Not(nnx.RngState))
    counts = parameter_counts(cfg)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == counts.total + counts.mtp
    trained = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    num_routers = cfg.num_moe_layers + (cfg.mtp.depth if cfg.moe.num_experts else 0)
    biases = num_routers * cfg.moe.num_experts if cfg.moe.selection_bias else 0
    assert trained == counts.total + counts.mtp - biases


ROUTERS = {
    # name: score, groups, groups per token, normalised, scale, bias
    "deepseek_v2_lite": ("softmax", 1, 1, False, 1.0, False),
    "deepseek_v2": ("softmax", 8, 3, False, 16.0, False),
    "deepseek_v3": ("sigmoid", 8, 4, True, 2.5, True),
    "moonlight_16b_a3b": ("sigmoid", 1, 1, True, 2.446, True),
    "kimi_k2": ("sigmoid", 1, 1, True, 2.827, True),
    "deepseek_moe_16b": ("softmax", 1, 1, False, 1.0, False),
    "mixtral_8x7b": ("softmax", 1, 1, True, 1.0, False),
    "mixtral_8x22b": ("softmax", 1, 1, True, 1.0, False),
    "qwen3_30b_a3b": ("softmax", 1, 1, True, 1.0, False),
    "olmoe_1b_7b": ("softmax", 1, 1, False, 1.0, False),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_routers(name):
    m = presets.get(name).moe
    assert ROUTERS[name] == (
        m.score,
        m.num_groups,
        m.num_groups_per_token,
        m.normalize_weights,
        m.routed_scaling_factor,
        m.selection_bias,
    )
    assert (m.bias_update_rate > 0) == m.selection_bias


def test_groups_are_scored_as_published():
    assert presets.deepseek_v2().moe.group_score == "max"
    assert presets.deepseek_v3().moe.group_score == "top2_sum"


def test_sequence_balance_loss_is_on_only_where_the_recipe_has_it():
    on = {name for name in ROUTERS if presets.get(name).moe.sequence_balance_coef}
    assert on == set(ROUTERS) - {"mixtral_8x7b", "mixtral_8x22b", "qwen3_30b_a3b", "olmoe_1b_7b"}


def test_other_balance_losses_and_the_zero_mean_bias():
    v2, olmoe = presets.deepseek_v2().moe, presets.olmoe_1b_7b()
    assert (v2.device_balance_coef, v2.communication_balance_coef) == (0.05, 0.02)
    assert olmoe.moe.expert_balance_coef * olmoe.num_moe_layers == pytest.approx(0.01)
    assert olmoe.moe.z_loss_coef * olmoe.num_moe_layers == pytest.approx(0.001)
    assert {name for name in ROUTERS if presets.get(name).moe.bias_zero_mean} == {"moonlight_16b_a3b"}


@pytest.mark.parametrize("name", ["tiny_moe", "moonlight_16b_a3b", "kimi_k2"])
def test_scaling_factors_are_those_of_moonlights_rule(name):
    moe = presets.get(name).moe
    assert estimated_scaling_factor(moe) == pytest.approx(moe.routed_scaling_factor, rel=5e-3)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_rotary_layout_follows_the_attention(name):
    attention = presets.get(name).attention
    assert attention.rope.layout == ("interleaved" if attention.kind == "mla" else "half")


def test_context_extensions():
    v2, v3, k2 = (presets.get(name).attention.rope for name in ("deepseek_v2", "deepseek_v3", "kimi_k2"))
    assert (v2.scaling, v2.factor, v2.mscale, v2.mscale_all_dim) == ("yarn", 40.0, 0.707, 0.707)
    assert (v3.scaling, v3.factor, v3.mscale, v3.mscale_all_dim) == ("yarn", 40.0, 1.0, 1.0)
    assert (k2.theta, k2.factor, k2.beta_fast, k2.beta_slow) == (50_000.0, 32.0, 1.0, 1.0)
    assert presets.llama_3_1_8b().attention.rope.scaling == "llama3"
    assert presets.llama_3_8b().attention.rope.scaling == "none"
    for name in presets.PRESETS:
        cfg = presets.get(name)
        if cfg.attention.rope.scaling == "yarn":
            assert cfg.max_position == cfg.attention.rope.factor * cfg.attention.rope.original_max_position


def test_only_the_small_qwens_tie_their_head():
    tied = {name for name in presets.PRESETS if presets.get(name).tie_word_embeddings}
    assert tied == {"qwen2_5_0_5b", "qwen2_5_1_5b"}


def test_only_v3_and_the_tiny_model_predict_further_tokens():
    assert {name for name in presets.PRESETS if presets.get(name).mtp.depth} == {
        "deepseek_v3",
        "deepseek_r1",
        "tiny_moe",
    }
