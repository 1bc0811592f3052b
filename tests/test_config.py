"""What a configuration refuses, and what it says when it does."""

import dataclasses
import json
import re

import pytest

from moe_jax import presets
from moe_jax.config import (
    AttentionConfig,
    CheckpointConfig,
    ConfigError,
    CriticConfig,
    EvaluationConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    OptimizerConfig,
    PolicyLossConfig,
    ProblemConfig,
    RewardConfig,
    RLConfig,
    RoPEConfig,
    SamplingConfig,
    TrainConfig,
    from_dict,
    to_dict,
)

ALL = [
    RoPEConfig,
    AttentionConfig,
    MoEConfig,
    MTPConfig,
    ModelConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
    CheckpointConfig,
    SamplingConfig,
    ProblemConfig,
    RewardConfig,
    PolicyLossConfig,
    CriticConfig,
    RLConfig,
    EvaluationConfig,
]

ILLEGAL = [
    (RoPEConfig, {"theta": 0.0}, "theta"),
    (RoPEConfig, {"scaling": "yarn"}, "factor"),
    (RoPEConfig, {"scaling": "llama3", "factor": 0.5}, "factor"),
    (AttentionConfig, {"num_heads": 0}, "num_heads"),
    (AttentionConfig, {"kind": "gqa", "num_heads": 4, "num_kv_heads": 3}, "num_kv_heads"),
    (AttentionConfig, {"kind": "gqa", "head_dim": 7}, "head_dim"),
    (AttentionConfig, {"kind": "mla", "qk_rope_head_dim": 7}, "qk_rope_head_dim"),
    (AttentionConfig, {"kind": "mla", "kv_lora_rank": 0}, "kv_lora_rank"),
    (AttentionConfig, {"kind": "mla", "q_lora_rank": -1}, "q_lora_rank"),
    (MoEConfig, {"num_experts": -1}, "num_experts"),
    (MoEConfig, {"num_experts": 4, "num_experts_per_token": 5}, "num_experts_per_token"),
    (MoEConfig, {"num_experts": 4, "num_experts_per_token": 0}, "num_experts_per_token"),
    (MoEConfig, {"num_experts": 6, "num_groups": 4}, "num_groups"),
    (MoEConfig, {"num_experts": 8, "num_groups": 2, "num_groups_per_token": 3}, "num_groups_per_token"),
    (MoEConfig, {"num_experts": 8, "num_groups": 4, "num_experts_per_token": 3}, "num_experts_per_token"),
    (MoEConfig, {"num_experts": 4, "num_experts_per_token": 1, "num_groups": 4}, "group_score"),
    (MoEConfig, {"sequence_balance_coef": -0.1}, "sequence_balance_coef"),
    (MoEConfig, {"z_loss_coef": -1.0}, "z_loss_coef"),
    (MoEConfig, {"global_balance_coef": -1.0}, "global_balance_coef"),
    (MoEConfig, {"capacity_factor": -1.0}, "capacity_factor"),
    (MoEConfig, {"num_experts": 4, "device_balance_coef": 0.1}, "device_balance_coef"),
    (MoEConfig, {"num_experts": 4, "communication_balance_coef": 0.1}, "communication_balance_coef"),
    (MoEConfig, {"num_experts": 4, "selection_bias": False, "bias_zero_mean": True}, "bias_zero_mean"),
    (MoEConfig, {"num_experts": 4, "routing": "hash"}, "selection_bias"),
    (MoEConfig, {"num_experts": 4, "routing": "uniform", "selection_bias": False}, "sequence_balance_coef"),
    (
        MoEConfig,
        {"num_experts": 4, "routing": "hash", "selection_bias": False, "sequence_balance_coef": 0.0, "num_groups": 2},
        "num_groups",
    ),
    (MTPConfig, {"depth": -1}, "depth"),
    (MTPConfig, {"kind": "chain"}, "kind"),
    (MTPConfig, {"late_after_tokens": -1}, "late_after_tokens"),
    (MTPConfig, {"kind": "parallel", "hidden_first": True}, "hidden_first"),
    (ModelConfig, {"vocab_size": 0}, "vocab_size"),
    (ModelConfig, {"intermediate_size": 0}, "intermediate_size"),
    (ModelConfig, {"first_k_dense": -1}, "first_k_dense"),
    (MeshConfig, {"fsdp": 0}, "fsdp"),
    (OptimizerConfig, {"learning_rate": 0.0}, "learning_rate"),
    (OptimizerConfig, {"beta2": 1.5}, "beta2"),
    (TrainConfig, {"steps": 0}, "steps"),
    (TrainConfig, {"sequence_length": 1}, "sequence_length"),
    (TrainConfig, {"batch_size": 6, "accumulation_steps": 4}, "accumulation_steps"),
    (CheckpointConfig, {"keep": 0}, "keep"),
    (SamplingConfig, {"top_p": 0.0}, "top_p"),
    (SamplingConfig, {"temperature": -1.0}, "temperature"),
    (SamplingConfig, {"cache_parts": 2, "slots": 4}, "cache_parts"),
    (SamplingConfig, {"cache_parts": 2, "compactions": 1}, "cache_parts"),
    (SamplingConfig, {"cache_parts": 2, "speculative_tokens": 1}, "cache_parts"),
    (SamplingConfig, {"cache_parts": 9, "max_new_tokens": 8}, "cache_parts"),
    (ProblemConfig, {"min_terms": 1}, "min_terms"),
    (ProblemConfig, {"min_terms": 5, "max_terms": 4}, "max_terms"),
    (ProblemConfig, {"source": "gsm8k"}, "path"),
    (ProblemConfig, {"source": "reasoning_gym"}, "task"),
    (RewardConfig, {"format_weight": -1.0}, "format_weight"),
    (PolicyLossConfig, {"epsilon": 0.0}, "epsilon"),
    (PolicyLossConfig, {"baseline": "critic"}, "scale_rewards"),
    (PolicyLossConfig, {"kl_in": "reward"}, "kl_in"),
    (PolicyLossConfig, {"kl_in": "reward", "beta": 0.1, "kl_estimator": "k3_weighted"}, "kl_estimator"),
    (
        PolicyLossConfig,
        {"surrogate": "reinforce", "importance_sampling_level": "sequence"},
        "importance_sampling_level",
    ),
    (CriticConfig, {"lam": 1.5}, "lam"),
    (RLConfig, {"overlong_buffer": 65}, "overlong_buffer"),
    (RLConfig, {"group_size": 1}, "group_size"),
    (RLConfig, {"pack_completions": True, "share_prompts": False}, "pack_completions"),
    (RLConfig, {"num_prompts": 3, "group_size": 3, "num_minibatches": 2}, "num_minibatches"),
    (RLConfig, {"sampling": SamplingConfig(temperature=0.5)}, "sampling"),
    (EvaluationConfig, {"samples": 0}, "samples"),
]


@pytest.mark.parametrize("cls", ALL)
def test_defaults_are_legal(cls):
    cls()


@pytest.mark.parametrize(("cls", "values", "field"), ILLEGAL)
def test_illegal_values_are_refused_by_field_value_and_remedy(cls, values, field):
    with pytest.raises(ConfigError) as refusal:
        cls(**values)
    where, remedy = str(refusal.value).split(": ", 1)
    value = values.get(field, getattr(cls, field, None))
    assert where == f"{cls.__name__}.{field} = {value!r}"
    assert remedy


def test_illegal_sparse_sizes_are_ignored_without_experts():
    assert MoEConfig(num_experts=0, num_experts_per_token=9).num_experts == 0


def test_only_one_mesh_axis_takes_what_is_left():
    with pytest.raises(ConfigError, match="only one axis may be -1"):
        MeshConfig(data=-1, fsdp=-1)
    assert MeshConfig(data=2, expert=-1).expert == -1


@pytest.mark.parametrize(
    ("cls", "values", "near"),
    [
        (RoPEConfig, {"layout": "interleave"}, "interleaved"),
        (RoPEConfig, {"scaling": "lama3", "factor": 8.0}, "llama3"),
        (AttentionConfig, {"kind": "MLA"}, "mla"),
        (MoEConfig, {"score": "softmx"}, "softmax"),
        (MoEConfig, {"group_score": "top2sum"}, "top2_sum"),
        (ModelConfig, {"dtype": "bfloat"}, "bfloat16"),
        (OptimizerConfig, {"name": "adam"}, "adamw"),
        (PolicyLossConfig, {"aggregation": "token_mean"}, "token-mean"),
    ],
)
def test_a_misspelt_choice_is_answered_with_the_nearest(cls, values, near):
    with pytest.raises(ConfigError, match=f"did you mean '{near}'"):
        cls(**values)


def test_layers_are_dense_or_sparse():
    moe = MoEConfig(num_experts=4)
    mixed = ModelConfig(num_layers=5, first_k_dense=2, moe=moe)
    assert (mixed.num_dense_layers, mixed.num_moe_layers) == (2, 3)
    dense = ModelConfig(num_layers=5, first_k_dense=2)
    assert (dense.num_dense_layers, dense.num_moe_layers) == (5, 0)
    all_sparse = ModelConfig(num_layers=5, first_k_dense=0, intermediate_size=0, moe=moe)
    assert (all_sparse.num_dense_layers, all_sparse.num_moe_layers) == (0, 5)


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (
            lambda: ModelConfig(num_layers=2, first_k_dense=2, moe=MoEConfig(num_experts=4)),
            "ModelConfig.first_k_dense = 2",
        ),
        (lambda: AttentionConfig(kind="mla", qk_norm="head"), "AttentionConfig.qk_norm = 'head'"),
        (lambda: AttentionConfig(kind="mla", qkv_bias=True), "AttentionConfig.qkv_bias = True"),
        (lambda: RoPEConfig(factor=40.0), "RoPEConfig.factor = 40.0"),
        (lambda: RoPEConfig(scaling="yarn", factor=4.0, beta_slow=0.0), "RoPEConfig.beta_slow = 0.0"),
        (lambda: RoPEConfig(scaling="llama3", factor=8.0, low_freq_factor=4.0), "RoPEConfig.high_freq_factor = 4.0"),
        (lambda: MoEConfig(num_experts=4, routed_scaling_factor=0.0), "MoEConfig.routed_scaling_factor = 0.0"),
        (lambda: OptimizerConfig(beta2=1.0), "OptimizerConfig.beta2 = 1.0"),
        (lambda: RLConfig(reference_refresh_steps=5), "RLConfig.reference_refresh_steps = 5"),
        (lambda: ProblemConfig(path="somewhere"), "ProblemConfig.path = 'somewhere'"),
        (lambda: ProblemConfig(task="chain_sum"), "ProblemConfig.task = 'chain_sum'"),
    ],
)
def test_combinations_without_effect_or_meaning_are_refused(build, names):
    with pytest.raises(ConfigError, match=re.escape(names)):
        build()


def test_configurations_are_values():
    cfg = ModelConfig()
    assert cfg == ModelConfig() and hash(cfg) == hash(ModelConfig())
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.vocab_size = 1  # type: ignore[misc]


@pytest.mark.parametrize("cls", ALL)
def test_defaults_survive_json(cls):
    assert from_dict(cls, json.loads(json.dumps(to_dict(cls())))) == cls()


@pytest.mark.parametrize("name", ["tiny_moe", "deepseek_v3", "mixtral_8x7b", "llama_3_1_8b"])
def test_presets_survive_json(name):
    cfg = presets.get(name)
    assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(cfg)))) == cfg


def test_from_dict_fills_in_defaults():
    assert from_dict(ModelConfig, {"moe": {"num_experts": 4}}) == ModelConfig(moe=MoEConfig(num_experts=4))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hiden_size": 4}, "ModelConfig has no field 'hiden_size': did you mean 'hidden_size'"),
        ({"moe": {"num_expert": 4}}, "MoEConfig has no field 'num_expert': did you mean 'num_experts'"),
    ],
)
def test_from_dict_answers_an_unknown_field_with_the_nearest(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(ModelConfig, values)


def test_from_dict_checks_values():
    with pytest.raises(ConfigError, match=r"ModelConfig\.hidden_size = -4"):
        from_dict(ModelConfig, {"hidden_size": -4})
