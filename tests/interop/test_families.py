"""config.json, read field by field: what is read, what is refused, what is written."""

import dataclasses
import json
import math
import re
import sys
import types

import pytest

from moe_jax import presets
from moe_jax.config import ConfigError
from moe_jax.interop.families import canonical, flattened, read_model_config, write_config
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
V2 = {
    name: value for name, value in V3.items() if name not in ("num_nextn_predict_layers", "quantization_config")
} | dict(
    aux_loss_alpha=0.001,
    first_k_dense_replace=1,
    hidden_size=5120,
    intermediate_size=12288,
    model_type="deepseek_v2",
    moe_intermediate_size=1536,
    n_routed_experts=160,
    n_shared_experts=2,
    norm_topk_prob=False,
    num_experts_per_tok=6,
    num_hidden_layers=60,
    pretraining_tp=1,
    rope_scaling=V3["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.707},
    routed_scaling_factor=16.0,
    scoring_func="softmax",
    seq_aux=True,
    topk_group=3,
    topk_method="group_limited_greedy",
    vocab_size=102400,
)
LITE_SIZES = dict(
    hidden_size=2048,
    moe_intermediate_size=1408,
    n_group=1,
    n_routed_experts=64,
    n_shared_experts=2,
    num_attention_heads=16,
    num_experts_per_tok=6,
    num_hidden_layers=27,
    num_key_value_heads=16,
    q_lora_rank=None,
    topk_group=1,
)
V2_LITE = V2 | LITE_SIZES | dict(intermediate_size=10944, routed_scaling_factor=1.0, topk_method="greedy")
MOONLIGHT = (
    V3
    | LITE_SIZES
    | dict(
        first_k_dense_replace=1,
        intermediate_size=11264,
        max_position_embeddings=8192,
        num_nextn_predict_layers=0,
        quantization_config=None,
        rms_norm_eps=1e-5,
        rope_scaling=None,
        rope_theta=50000.0,
        routed_scaling_factor=2.446,
        vocab_size=163840,
    )
)
KIMI_K2 = MOONLIGHT | dict(
    aux_loss_alpha=0.001,
    hidden_size=7168,
    intermediate_size=18432,
    max_position_embeddings=131072,
    model_type="kimi_k2",
    moe_intermediate_size=2048,
    n_routed_experts=384,
    n_shared_experts=1,
    num_attention_heads=64,
    num_experts_per_tok=8,
    num_hidden_layers=61,
    num_key_value_heads=64,
    q_lora_rank=1536,
    quantization_config=V3["quantization_config"],
    rms_norm_eps=1e-6,
    rope_scaling=V3["rope_scaling"] | {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0},
    routed_scaling_factor=2.827,
    seq_aux=True,
)
MOE_16B = dict(
    architectures=["DeepseekForCausalLM"],
    attention_bias=False,
    attention_dropout=0.0,
    auto_map={"AutoConfig": "configuration_deepseek.DeepseekConfig"},
    bos_token_id=100000,
    eos_token_id=100001,
    first_k_dense_replace=1,
    hidden_act="silu",
    hidden_size=2048,
    initializer_range=0.02,
    intermediate_size=10944,
    max_position_embeddings=4096,
    model_type="deepseek",
    moe_intermediate_size=1408,
    moe_layer_freq=1,
    n_routed_experts=64,
    n_shared_experts=2,
    norm_topk_prob=False,
    num_attention_heads=16,
    num_experts_per_tok=6,
    num_hidden_layers=28,
    num_key_value_heads=16,
    pretraining_tp=1,
    rms_norm_eps=1e-6,
    rope_scaling=None,
    rope_theta=10000,
    scoring_func="softmax",
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    transformers_version="4.36.0",
    use_cache=True,
    vocab_size=102400,
)
R1_DISTILL = QWEN | dict(
    bos_token_id=151643,
    eos_token_id=151643,
    hidden_size=1536,
    intermediate_size=8960,
    max_position_embeddings=131072,
    max_window_layers=21,
    num_attention_heads=12,
    num_hidden_layers=28,
    rope_theta=10000,
    sliding_window=4096,
    tie_word_embeddings=False,
    use_mrope=False,
)
QWEN3_MOE = QWEN | dict(
    attention_bias=False,
    decoder_sparse_step=1,
    head_dim=128,
    hidden_size=2048,
    intermediate_size=6144,
    max_position_embeddings=40960,
    max_window_layers=48,
    mlp_only_layers=[],
    model_type="qwen3_moe",
    moe_intermediate_size=768,
    norm_topk_prob=True,
    num_attention_heads=32,
    num_experts=128,
    num_experts_per_tok=8,
    num_hidden_layers=48,
    num_key_value_heads=4,
    output_router_logits=False,
    rope_scaling=None,
    router_aux_loss_coef=0.001,
    sliding_window=None,
    tie_word_embeddings=False,
)
DENSE = dict(
    attention_dropout=0.0,
    hidden_act="silu",
    hidden_size=4096,
    initializer_range=0.02,
    num_attention_heads=32,
    num_hidden_layers=32,
    num_key_value_heads=8,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    use_cache=True,
)
MIXTRAL = DENSE | dict(
    intermediate_size=14336,
    max_position_embeddings=32768,
    model_type="mixtral",
    num_experts_per_tok=2,
    num_local_experts=8,
    output_router_logits=False,
    rope_theta=1000000.0,
    router_aux_loss_coef=0.02,
    sliding_window=None,
    vocab_size=32000,
)
OLMOE = DENSE | dict(
    attention_bias=False,
    clip_qkv=None,
    eos_token_id=50279,
    hidden_size=2048,
    intermediate_size=1024,
    max_position_embeddings=4096,
    model_type="olmoe",
    norm_topk_prob=False,
    num_attention_heads=16,
    num_experts=64,
    num_experts_per_tok=8,
    num_hidden_layers=16,
    num_key_value_heads=16,
    output_router_logits=False,
    pad_token_id=1,
    rope_scaling=None,
    rope_theta=10000.0,
    router_aux_loss_coef=0.01,
    vocab_size=50304,
)
LLAMA = DENSE | dict(
    attention_bias=False,
    eos_token_id=[128001, 128008, 128009],
    intermediate_size=14336,
    max_position_embeddings=131072,
    mlp_bias=False,
    model_type="llama",
    pretraining_tp=1,
    rope_scaling={
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    rope_theta=500000.0,
    vocab_size=128256,
)
DEEPSEEK_LLM = DENSE | dict(
    intermediate_size=11008,
    max_position_embeddings=4096,
    model_type="llama",
    num_hidden_layers=30,
    num_key_value_heads=32,
    pretraining_tp=1,
    rms_norm_eps=1e-6,
    rope_scaling=None,
    rope_theta=10000.0,
    vocab_size=102400,
)
RELEASED = {
    "deepseek_v3": V3,
    "deepseek_v2": V2,
    "deepseek_v2_lite": V2_LITE,
    "moonlight_16b_a3b": MOONLIGHT,
    "kimi_k2": KIMI_K2,
    "deepseek_moe_16b": MOE_16B,
    "deepseek_llm_7b": DEEPSEEK_LLM,
    "r1_distill_qwen_1_5b": R1_DISTILL,
    "r1_distill_llama_8b": LLAMA,
    "qwen2_5_0_5b": QWEN,
    "qwen3_30b_a3b": QWEN3_MOE,
    "mixtral_8x7b": MIXTRAL,
    "olmoe_1b_7b": OLMOE,
}
MODELS = [
    *("tiny_moe", "deepseek_v2_lite", "deepseek_v2", "deepseek_v3", "moonlight_16b_a3b", "kimi_k2", "deepseek_moe_16b"),
    *("mixtral_8x7b", "qwen3_30b_a3b", "olmoe_1b_7b", "qwen2_5_0_5b", "llama_3_1_8b", "deepseek_llm_7b"),
]


def read(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return read_model_config(folder / "config.json")[0]


@pytest.mark.parametrize("name", RELEASED)
def test_released_configs_are_the_presets(name, tmp_path):
    cfg = read(tmp_path, RELEASED[name])
    assert canonical(cfg) == canonical(presets.get(name))
    assert cfg.dtype == "bfloat16"
    assert cfg.initializer_range == 0.02


@pytest.mark.parametrize("name", MODELS)
def test_presets_are_written_and_read(name, tmp_path):
    cfg = getattr(presets, name)()
    config, family = write_config(cfg)
    assert canonical(read(tmp_path, config)) == canonical(cfg)
    assert config["model_type"] == family.model_type


def test_kimi_k2_is_written_as_deepseek_v3(tmp_path):
    """transformers has no class of that name."""
    config, _ = write_config(read(tmp_path, KIMI_K2), "kimi_k2")
    assert config["model_type"] == "deepseek_v3"


def test_both_forms_of_rotary_fields(tmp_path):
    old = {"rope_theta": 5e5, "rope_scaling": V3["rope_scaling"]}
    new = {"rope_parameters": {**V3["rope_scaling"], "rope_theta": 5e5, "rope_type": "yarn"}}
    new["rope_parameters"].pop("type")
    plain = {name: value for name, value in V3.items() if not name.startswith("rope")}
    first = read(tmp_path, plain | old).attention.rope
    assert first == read(tmp_path, plain | new).attention.rope
    assert (first.theta, first.factor, first.scaling) == (5e5, 40.0, "yarn")


def test_fields_left_out_have_the_defaults_of_transformers(tmp_path):
    """Which differ by family; where they are not a function of other fields, the field must be there."""
    without = {name: value for name, value in MIXTRAL.items() if name != "rope_theta"}
    assert read(tmp_path, without).attention.rope.theta == 1e6
    without = {name: value for name, value in DEEPSEEK_LLM.items() if name not in ("rope_theta", "num_key_value_heads")}
    cfg = read(tmp_path, without)
    assert (cfg.attention.rope.theta, cfg.attention.num_kv_heads) == (1e4, 32)
    for config in (MIXTRAL, QWEN, QWEN3_MOE):
        without = {name: value for name, value in config.items() if name != "num_key_value_heads"}
        with pytest.raises(ConfigError, match="num_key_value_heads is missing"):
            read(tmp_path, without)
    assert read(tmp_path, QWEN | {"num_key_value_heads": None}).attention.num_kv_heads == 14


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
        (V3, {"n_group": "8"}, "n_group = '8': must be a whole number"),
        (V3, {"hidden_size": None}, "hidden_size = null"),
        (V3, {"torch_dtype": "int8"}, "torch_dtype = 'int8'"),
        (V3, {"quantization_config": {"quant_method": "awq"}}, "quantization_config.quant_method = 'awq'"),
        (V3, yarn(mscale=1.0), "mscale = 1.0, mscale_all_dim = 0.0"),
        (V3, yarn(mscale_all_dim=1.0), "mscale_all_dim = 1.0"),
        (QWEN, yarn(mscale=1.0, mscale_all_dim=1.0), "neither mscale nor mscale_all_dim"),
        (QWEN, yarn(truncate=False), "rope_scaling.truncate = False"),
        (QWEN, yarn(attention_factor=1.5), "rope_scaling.attention_factor = 1.5"),
        (QWEN, yarn(factor=None), "rope_scaling.factor = None: must be a number"),
        (QWEN, yarn(partial_rotary_factor=0.5), "rope_scaling.partial_rotary_factor = 0.5"),
        (QWEN, {"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling.rope_type = 'longrope'"),
        (QWEN, {"use_sliding_window": True}, "use_sliding_window = True"),
        (QWEN, {"layer_types": ["sliding_attention"] * 24}, "layer_types"),
        (QWEN, {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        (QWEN, {"model_type": "gpt2"}, "model_type = 'gpt2' is not one of"),
        (QWEN, {"num_key_value_heads": 3}, "num_key_value_heads = 3: must divide"),
        (QWEN, {"rope_theta": None}, "rope_theta = None: must be a number"),
        (QWEN, {"rope_theta": -1.0}, "rope_theta = -1.0: must be a number, 0 or greater"),
        (QWEN, {"rope_scaling": "yarn"}, "rope_scaling = 'yarn': must be a JSON object or null"),
        (QWEN, yarn(factor=0.5), "rope_scaling.factor = 0.5: must exceed 1"),
        (QWEN, {"rope_parameters": {"rope_theta": 1.0}, **yarn()}, "remove the one that is wrong"),
        (QWEN, {"model_type": ["qwen2"]}, "model_type = ['qwen2'] is not one of"),
        (V3, {"quantization_config": ["fp8"]}, "quantization_config = ['fp8']: must be a JSON object"),
        (V3, {"first_k_dense_replace": 61}, "first_k_dense_replace = 61: must be less than num_hidden_layers = 61"),
    ],
)
def test_what_is_not_understood_is_an_error(config, change, message, tmp_path):
    """The file, the field and the value are named."""
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        read(tmp_path, config | change)
    assert str(tmp_path / "config.json") in str(error.value)


WRONG = [None, True, "x", "8", -1, -0.5, 0, 1.5, math.inf, math.nan, [], [8], {}, {"a": 1}]


@pytest.mark.parametrize("config", [V3, V2_LITE, MIXTRAL, OLMOE, LLAMA, QWEN | yarn()], ids=lambda c: c["model_type"])
def test_no_value_breaks_reading(config, tmp_path):
    """Whatever stands in a field: it is read, or refused by its name; and so is a field that is not there."""

    def check(changed, name, value):
        try:
            cfg = read(tmp_path, changed)
        except ConfigError as error:
            assert str(tmp_path / "config.json") in str(error) and name in str(error), (name, value, str(error))
        else:
            read_as = [v for v in flattened(cfg).values() if isinstance(v, (int, float))]
            assert all(v >= 0 and math.isfinite(v) for v in read_as), (name, value)

    for name in config:
        check({key: value for key, value in config.items() if key != name}, name, "absent")
        for value in WRONG:
            check(config | {name: value}, name, value)
    for name in config.get("rope_scaling") or ():
        inner = config["rope_scaling"]
        check(config | {"rope_scaling": {key: v for key, v in inner.items() if key != name}}, name, "absent")
        for value in WRONG:
            check(config | {"rope_scaling": inner | {name: value}}, name, value)


@pytest.mark.parametrize("field", ["hidden_size", "num_attention_heads", "rms_norm_eps", "vocab_size", "rope_theta"])
@pytest.mark.parametrize("value", [None, "8", -8, 0, [8], {}])
def test_sizes_that_are_no_sizes(field, value, tmp_path):
    for config in RELEASED.values():
        with pytest.raises(ConfigError, match=f"{field} = .*must be"):
            read(tmp_path, config | {field: value})


@pytest.mark.parametrize(("text", "message"), [("[1]", "must hold a JSON object, not list"), ("{", "not valid JSON")])
def test_files_that_are_no_configs(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"config.json.*{message}.*download it again"):
        read_model_config(tmp_path / "config.json")


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


def hub(monkeypatch, names, downloaded):
    files = [types.SimpleNamespace(rfilename=name) for name in names]
    api = types.SimpleNamespace(model_info=lambda name, timeout: types.SimpleNamespace(siblings=files))

    def download(name, allow_patterns, etag_timeout):
        downloaded.extend(allow_patterns)
        raise OSError("stop here")

    module = types.SimpleNamespace(HfApi=lambda: api, snapshot_download=download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


def test_a_repository_of_pickles_is_not_downloaded(monkeypatch):
    downloaded = []
    hub(monkeypatch, ["config.json", "pytorch_model-00001-of-00002.bin", "onnx/model.safetensors"], downloaded)
    with pytest.raises(
        ConfigError, match=r"old/model has PyTorch pickles.*from_pretrained\('old/model'\)\.save_pretrained"
    ):
        load_pretrained("old/model")
    hub(monkeypatch, ["README.md"], downloaded)
    with pytest.raises(ConfigError, match="old/model has no safetensors files"):
        load_pretrained("old/model")
    assert not downloaded


def test_of_a_repository_only_what_is_read_is_downloaded(monkeypatch):
    kept = ["model-00001-of-00001.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json"]
    kept += ["tiktoken.model", "tokenizer.model", "merges.txt", "chat_template.jinja", "generation_config.json"]
    left = ["consolidated.safetensors", "original/params.json", "original/consolidated.00.pth", "README.md"]
    left += ["tokenization_kimi.py", "model.gguf", "pytorch_model.bin", "LICENSE.txt"]
    downloaded = []
    hub(monkeypatch, kept + left, downloaded)
    with pytest.raises(ConfigError, match="stop here"):
        load_pretrained("new/model")
    assert sorted(downloaded) == sorted(kept)


def test_a_repository_without_the_hub_says_how_to_give_a_path(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"hf download Qwen/Qwen2.5-0.5B --local-dir DIR.*give DIR"):
        load_pretrained("Qwen/Qwen2.5-0.5B")
