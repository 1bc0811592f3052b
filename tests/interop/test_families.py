"""config.json, read field by field: what is read, what is refused, what is written."""

import dataclasses
import json
import re
import sys

import pytest

from moe_jax import presets
from moe_jax.config import ConfigError
from moe_jax.interop.families import canonical, read_model_config, write_config
from moe_jax.interop.pretrained import load_pretrained

V3 = dict(
    architectures=["DeepseekV3ForCausalLM"],
    attention_bias=False,
    attention_dropout=0.0,
    auto_map={"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    bos_token_id=0,
    eos_token_id=1,
    ep_size=1,
    first_k_dense_replace=3,
    hidden_act="silu",
    hidden_size=7168,
    initializer_range=0.02,
    intermediate_size=18432,
    kv_lora_rank=512,
    max_position_embeddings=163840,
    model_type="deepseek_v3",
    moe_intermediate_size=2048,
    moe_layer_freq=1,
    n_group=8,
    n_routed_experts=256,
    n_shared_experts=1,
    norm_topk_prob=True,
    num_attention_heads=128,
    num_experts_per_tok=8,
    num_hidden_layers=61,
    num_key_value_heads=128,
    num_nextn_predict_layers=1,
    q_lora_rank=1536,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    quantization_config={
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    rms_norm_eps=1e-6,
    rope_scaling={
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    rope_theta=10000,
    routed_scaling_factor=2.5,
    scoring_func="sigmoid",
    tie_word_embeddings=False,
    topk_group=4,
    topk_method="noaux_tc",
    torch_dtype="bfloat16",
    transformers_version="4.33.1",
    use_cache=True,
    v_head_dim=128,
    vocab_size=129280,
)
QWEN = dict(
    architectures=["Qwen2ForCausalLM"],
    attention_dropout=0.0,
    hidden_act="silu",
    hidden_size=896,
    initializer_range=0.02,
    intermediate_size=4864,
    max_position_embeddings=32768,
    max_window_layers=24,
    model_type="qwen2",
    num_attention_heads=14,
    num_hidden_layers=24,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
    rope_theta=1000000.0,
    sliding_window=32768,
    tie_word_embeddings=True,
    torch_dtype="bfloat16",
    use_cache=True,
    use_sliding_window=False,
    vocab_size=151936,
)
MODELS = [
    *("tiny_moe", "deepseek_v2_lite", "deepseek_v2", "deepseek_v3", "moonlight_16b_a3b", "kimi_k2", "deepseek_moe_16b"),
    *("mixtral_8x7b", "qwen3_30b_a3b", "olmoe_1b_7b", "qwen2_5_0_5b", "llama_3_1_8b", "deepseek_llm_7b"),
]


def read(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return read_model_config(folder / "config.json")[0]


@pytest.mark.parametrize(("config", "preset"), [(V3, presets.deepseek_v3), (QWEN, presets.qwen2_5_0_5b)])
def test_released_configs_are_the_presets(config, preset, tmp_path):
    cfg = read(tmp_path, config)
    assert canonical(cfg) == canonical(preset())
    assert cfg.dtype == "bfloat16"
    assert cfg.initializer_range == 0.02


@pytest.mark.parametrize("name", MODELS)
def test_presets_are_written_and_read(name, tmp_path):
    cfg = getattr(presets, name)()
    config, family = write_config(cfg)
    assert canonical(read(tmp_path, config)) == canonical(cfg)
    assert config["model_type"] == family.model_type


def test_both_forms_of_rotary_fields(tmp_path):
    old = {"rope_theta": 5e5, "rope_scaling": V3["rope_scaling"]}
    new = {"rope_parameters": {**V3["rope_scaling"], "rope_theta": 5e5, "rope_type": "yarn"}}
    new["rope_parameters"].pop("type")
    plain = {name: value for name, value in V3.items() if not name.startswith("rope")}
    first = read(tmp_path, plain | old).attention.rope
    assert first == read(tmp_path, plain | new).attention.rope
    assert (first.theta, first.factor, first.scaling) == (5e5, 40.0, "yarn")


def test_greedy_selection_has_no_groups(tmp_path):
    config, _ = write_config(presets.deepseek_v2())
    assert config["topk_method"] == "group_limited_greedy"
    assert read(tmp_path, config).moe.num_groups == 8
    assert read(tmp_path, config | {"topk_method": "greedy"}).moe.num_groups == 1


def yarn(**fields):
    return {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, **fields}}


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (V3, {"scoring_func": "softmax"}, "scoring_func = 'softmax': only 'sigmoid'"),
        (V3, {"topk_method": "greedy"}, "topk_method = 'greedy'"),
        (V3, {"moe_layer_freq": 2}, "moe_layer_freq = 2"),
        (V3, {"attention_bias": True}, "attention_bias = True"),
        (V3, {"index_topk": 2048}, "index_topk = 2048 is not understood"),
        (V3, {"num_key_value_heads": 8}, "num_key_value_heads = 8: only 128"),
        (V3, {"n_group": "8"}, "MoEConfig.num_groups = '8': must be of type int"),
        (V3, {"hidden_size": None}, "hidden_size = null"),
        (V3, {"torch_dtype": "int8"}, "torch_dtype = 'int8'"),
        (V3, {"quantization_config": {"quant_method": "awq"}}, "quantization_config.quant_method = 'awq'"),
        (V3, yarn(mscale=1.0), "mscale = 1.0, mscale_all_dim = 0.0"),
        (V3, yarn(mscale_all_dim=1.0), "mscale_all_dim = 1.0"),
        (QWEN, yarn(mscale=1.0, mscale_all_dim=1.0), "neither mscale nor mscale_all_dim"),
        (QWEN, yarn(truncate=False), "rope_scaling.truncate = False"),
        (QWEN, yarn(attention_factor=1.5), "rope_scaling.attention_factor = 1.5"),
        (QWEN, yarn(factor=None), "rope_scaling.factor must be a number"),
        (QWEN, yarn(partial_rotary_factor=0.5), "rope_scaling.partial_rotary_factor = 0.5"),
        (QWEN, {"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling.rope_type = 'longrope'"),
        (QWEN, {"use_sliding_window": True}, "use_sliding_window = True"),
        (QWEN, {"layer_types": ["sliding_attention"] * 24}, "layer_types"),
        (QWEN, {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        (QWEN, {"model_type": "gpt2"}, "model_type = 'gpt2' is not one of"),
        (QWEN, {"num_key_value_heads": 3}, "num_kv_heads = 3"),
    ],
)
def test_what_is_not_understood_is_an_error(config, change, message, tmp_path):
    """The file, the field and the value are named."""
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        read(tmp_path, config | change)
    assert str(tmp_path / "config.json") in str(error.value)


@pytest.mark.parametrize(
    ("preset", "change", "message"),
    [
        ("olmoe_1b_7b", {"clip_qkv": 8.0}, "clip_qkv = 8.0"),
        ("mixtral_8x7b", {"sliding_window": 4096}, "sliding_window = 4096"),
        ("llama_3_1_8b", {"mlp_bias": True}, "mlp_bias = True"),
        ("qwen3_30b_a3b", {"mlp_only_layers": [0]}, "mlp_only_layers = [0]"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob = True"),
    ],
)
def test_families_refuse_what_they_cannot_compute(preset, change, message, tmp_path):
    config, _ = write_config(getattr(presets, preset)())
    with pytest.raises(ConfigError, match=re.escape(message)):
        read(tmp_path, config | change)


def test_harmless_values_are_accepted(tmp_path):
    attention_factor = 0.1 * 1.3862943611198906 + 1.0  # what YaRN finds for a factor of 4
    given = read(tmp_path, QWEN | yarn(attention_factor=attention_factor, truncate=True))
    assert given == read(tmp_path, QWEN | yarn())


def test_a_model_of_no_family_says_what_differs():
    cfg = presets.qwen2_5_0_5b()
    cfg = dataclasses.replace(cfg, attention=dataclasses.replace(cfg.attention, qk_norm="head"))
    with pytest.raises(ConfigError, match=r"the nearest is qwen\w+, without attention\.q"):
        write_config(cfg)


@pytest.mark.parametrize("name", ["no/such/folder", "qwen2"])
def test_what_is_neither_folder_nor_repository(name):
    with pytest.raises(ConfigError, match="give a folder with config"):
        load_pretrained(name)


def test_a_repository_without_the_hub_says_how_to_give_a_path(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"hf download Qwen/Qwen2.5-0.5B --local-dir DIR.*give DIR"):
        load_pretrained("Qwen/Qwen2.5-0.5B")
