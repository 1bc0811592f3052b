"""config.json of Hugging Face ↔ `ModelConfig`: a table per family.

Every field of a config.json is read, checked or known not to change what the model computes; any other is an error. The
values are those that transformers 5.23 computes with, and so are the defaults of fields that a file leaves out.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from moe_jax.config import AttentionConfig, ConfigError, ModelConfig, MoEConfig, MTPConfig, RoPEConfig
from moe_jax.interop.low_bits import inputs_format
from moe_jax.interop.tensor_names import EXPERTS, FUSED_EXPERTS, MIXTRAL_EXPERTS, Rows

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """How one `model_type` writes an architecture down.

    A path is a field of `ModelConfig`, such as "moe.num_experts". A value may be a function of the config.json.
    """

    model_type: str
    architecture: str
    fields: Mapping[str, str]
    """Path → field of config.json; "a|b" are two names of one field, of which the first is written."""
    implies: Mapping[str, Any]
    """Path → what the family fixes without saying so."""
    only: Mapping[str, Any]
    """Field → the one value that is understood; also written."""
    choices: Mapping[str, Mapping[Any, Mapping[str, Any]]] = field(default_factory=dict)
    """Field → value → what this value implies; the first value is the default."""
    null: Mapping[str, Any] = field(default_factory=dict)
    """Field → what null means."""
    absent: Mapping[str, Any] = field(default_factory=dict)
    """Field → what its absence means."""
    harmless: tuple[str, ...] = ()
    """Fields that change nothing in this family, besides `HARMLESS`."""
    layouts: tuple[Rows, ...] = (EXPERTS, FUSED_EXPERTS)
    """Ways in which experts may be stored; the first is written."""


HARMLESS = (
    # Names, origins, and how transformers runs or trains a model
    *("architectures", "model_type", "auto_map", "transformers_version", "_name_or_path", "torch_dtype", "dtype"),
    *("_attn_implementation_autoset", "use_cache", "attention_dropout", "initializer_range", "pretraining_tp"),
    *("return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward", "is_encoder_decoder"),
    *("id2label", "label2id", "problem_type", "unsloth_version", "unsloth_fixed"),
    # Tokens, which tokenizer and generation config decide
    *("bos_token_id", "eos_token_id", "pad_token_id"),
    # Losses in training
    *("output_router_logits", "router_aux_loss_coef", "aux_loss_alpha", "seq_aux", "router_jitter_noise"),
    # How experts were divided among devices
    "ep_size",
)


def _product_of(*names: str) -> Callable[[Json], int]:
    return lambda config: math.prod(config[name] for name in names)


def _full_attention(config: Json) -> list[str]:
    return ["full_attention"] * config["num_hidden_layers"]


_BASE = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "intermediate_size": "intermediate_size",
    "max_position": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
    "initializer_range": "initializer_range",
    "attention.num_heads": "num_attention_heads",
}
_GQA = {**_BASE, "attention.num_kv_heads": "num_key_value_heads", "attention.head_dim": "head_dim"}
_MLA = {
    **_BASE,
    "attention.q_lora_rank": "q_lora_rank",
    "attention.kv_lora_rank": "kv_lora_rank",
    "attention.qk_nope_head_dim": "qk_nope_head_dim",
    "attention.qk_rope_head_dim": "qk_rope_head_dim",
    "attention.v_head_dim": "v_head_dim",
}
_DEEPSEEK_EXPERTS = {
    "first_k_dense": "first_k_dense_replace",
    "moe.num_experts": "n_routed_experts",
    "moe.num_experts_per_token": "num_experts_per_tok",
    "moe.num_shared_experts": "n_shared_experts",
    "moe.expert_size": "moe_intermediate_size",
}
_DEEPSEEK_GROUPS = {
    "moe.num_groups": "n_group",
    "moe.num_groups_per_token": "topk_group",
    "moe.routed_scaling_factor": "routed_scaling_factor",
}
_IS_GQA = {"attention.kind": "gqa", "attention.rope.layout": "half"}
_IS_MLA = {"attention.kind": "mla", "attention.latent_norm_eps": 1e-6}
_IS_DENSE = {**_IS_GQA, "moe.num_experts": 0}
_IS_SOFTMAX = {
    "moe.score": "softmax",
    "moe.selection_bias": False,
    "moe.bias_update_rate": 0.0,
    "moe.sequence_balance_coef": 0.0,
}
_ALL_SPARSE = {**_IS_GQA, **_IS_SOFTMAX, "first_k_dense": 0, "moe.num_shared_experts": 0}
_NO_BIAS = {"hidden_act": "silu", "attention_bias": False}
_FULL_ATTENTION = {"use_sliding_window": False, "layer_types": _full_attention}
_MLA_ONLY = {
    **_NO_BIAS,
    "num_key_value_heads": lambda config: config["num_attention_heads"],
    "head_dim": lambda config: config["qk_rope_head_dim"],
    "qk_head_dim": lambda config: config["qk_nope_head_dim"] + config["qk_rope_head_dim"],
    "moe_layer_freq": 1,
}
_HEAD_DIM = {"head_dim": lambda config: config["hidden_size"] // config["num_attention_heads"]}
_KV_HEADS = {"num_key_value_heads": lambda config: config["num_attention_heads"]}
_ABSENT = {"tie_word_embeddings": False, "initializer_range": 0.02, "rope_theta": 10_000.0}

FAMILIES = (
    Family(  # DeepSeek-V3, R1, Moonlight, Kimi-K2
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        fields={
            **_MLA,
            **_DEEPSEEK_EXPERTS,
            **_DEEPSEEK_GROUPS,
            "moe.normalize_weights": "norm_topk_prob",
            "mtp.depth": "num_nextn_predict_layers",
        },
        implies={**_IS_MLA, "moe.score": "sigmoid", "moe.selection_bias": True, "moe.group_score": "top2_sum"},
        only={**_MLA_ONLY, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
        choices={
            "rope_interleave": {
                True: {"attention.rope.layout": "interleaved"},
                False: {"attention.rope.layout": "half"},
            }
        },
        null={"q_lora_rank": 0, "n_group": 1, "topk_group": 1, "n_shared_experts": 0},
        absent={**_ABSENT, "num_nextn_predict_layers": 0},
    ),
    Family(  # DeepSeek-V2, V2-Lite
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        fields={**_MLA, **_DEEPSEEK_EXPERTS, **_DEEPSEEK_GROUPS},
        implies={
            **_IS_MLA,
            **_IS_SOFTMAX,
            "attention.rope.layout": "interleaved",
            "moe.group_score": "max",
            "moe.normalize_weights": False,
        },
        # With norm_topk_prob = true DeepSeek's code normalises and transformers does not.
        only={**_MLA_ONLY, "mlp_bias": False, "scoring_func": "softmax", "norm_topk_prob": False},
        choices={
            "topk_method": {
                "greedy": {"moe.num_groups": 1, "moe.num_groups_per_token": 1},
                "group_limited_greedy": {},
            }
        },
        null={"q_lora_rank": 0, "n_group": 1, "topk_group": 1, "n_shared_experts": 0},
        absent=_ABSENT,
    ),
    Family(
        "mixtral",
        "MixtralForCausalLM",
        fields={
            **{path: name for path, name in _GQA.items() if path != "intermediate_size"},
            "moe.num_experts": "num_local_experts",
            "moe.num_experts_per_token": "num_experts_per_tok",
            "moe.expert_size": "intermediate_size",
        },
        implies={**_ALL_SPARSE, "intermediate_size": 0, "moe.normalize_weights": True},
        only={"hidden_act": "silu", "sliding_window": None},
        null={**_HEAD_DIM, **_KV_HEADS},
        absent={**_ABSENT, **_HEAD_DIM, "rope_theta": 1_000_000.0},
        layouts=(MIXTRAL_EXPERTS, FUSED_EXPERTS),
    ),
    Family(  # Qwen2.5, R1-Distill-Qwen
        "qwen2",
        "Qwen2ForCausalLM",
        fields=_GQA,
        implies={**_IS_DENSE, "attention.qkv_bias": True},
        only={"hidden_act": "silu", **_FULL_ATTENTION},
        null={**_HEAD_DIM, **_KV_HEADS},
        absent={**_ABSENT, **_HEAD_DIM},
        harmless=("sliding_window", "max_window_layers", "use_mrope"),
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        fields=_GQA,
        implies={**_IS_DENSE, "attention.qk_norm": "head"},
        only={**_NO_BIAS, **_FULL_ATTENTION},
        null=_KV_HEADS,
        absent=_ABSENT,
        harmless=("sliding_window", "max_window_layers"),
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        fields={
            **_GQA,
            "moe.num_experts": "num_experts|num_local_experts",
            "moe.num_experts_per_token": "num_experts_per_tok",
            "moe.expert_size": "moe_intermediate_size",
            "moe.normalize_weights": "norm_topk_prob",
        },
        implies={**_ALL_SPARSE, "attention.qk_norm": "head"},
        only={**_NO_BIAS, "use_sliding_window": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
        null=_HEAD_DIM,
        absent={**_ABSENT, **_HEAD_DIM},
        harmless=("sliding_window", "max_window_layers"),
    ),
    Family(
        "olmoe",
        "OlmoeForCausalLM",
        fields={
            **{path: name for path, name in _GQA.items() if path != "intermediate_size"},
            "moe.num_experts": "num_experts",
            "moe.num_experts_per_token": "num_experts_per_tok",
            "moe.expert_size": "intermediate_size",
            "moe.normalize_weights": "norm_topk_prob",
        },
        implies={**_ALL_SPARSE, "intermediate_size": 0, "attention.qk_norm": "full"},
        only={**_NO_BIAS, "clip_qkv": None},
        null={**_HEAD_DIM, **_KV_HEADS},
        absent={**_ABSENT, **_HEAD_DIM, **_KV_HEADS},
    ),
    Family(  # Llama 3.x, DeepSeek LLM, R1-Distill-Llama
        "llama",
        "LlamaForCausalLM",
        fields=_GQA,
        implies=_IS_DENSE,
        only={**_NO_BIAS, "mlp_bias": False},
        null={**_HEAD_DIM, **_KV_HEADS},
        absent={**_ABSENT, **_HEAD_DIM, **_KV_HEADS},
    ),
    Family(  # DeepSeekMoE-16B; transformers has no class for it, its repository has one
        "deepseek",
        "DeepseekForCausalLM",
        fields={**_GQA, **_DEEPSEEK_EXPERTS, "moe.normalize_weights": "norm_topk_prob"},
        implies={**_IS_GQA, **_IS_SOFTMAX},
        only={**_NO_BIAS, "moe_layer_freq": 1, "scoring_func": "softmax"},
        null={**_HEAD_DIM, **_KV_HEADS, "n_shared_experts": 0},
        absent={**_ABSENT, **_HEAD_DIM, **_KV_HEADS},
        layouts=(EXPERTS,),
    ),
)

_BY_TYPE = {family.model_type: family for family in FAMILIES}
_BY_TYPE["kimi_k2"] = _BY_TYPE["deepseek_v3"]  # its own code alone knows this name, the architecture is the same
_POSITIVE = {"vocab_size", "hidden_size", "num_layers", "max_position", "rms_norm_eps", "attention.num_heads"}
"""Paths; those that others are computed from are known to be right before they are."""
_ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_parameters")
_DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float32", None: "float32"}


# ------------------------------------------------------------------------------------------------------------- reading


def read_model_config(path: Path) -> tuple[ModelConfig, Family]:
    """The architecture that a config.json describes, and the family that it belongs to.

    Raises:
        ConfigError: no such family; a field that is missing, not known or has a value that is not understood. The
            message names file, field and value.
    """
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: give the folder of a Hugging Face checkpoint")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON ({error}): download it again") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} must hold a JSON object, not {type(config).__name__}: download it again")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _BY_TYPE:
        raise ConfigError(f"{path}: model_type = {model_type!r} is not one of {', '.join(_BY_TYPE)}")
    family = _BY_TYPE[model_type]
    try:
        return _model_config(config, family), family
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _model_config(config: Json, family: Family) -> ModelConfig:
    flat = dict(family.implies)
    for path, names in family.fields.items():
        flat[path] = _value(config, names.split("|"), family, _hint(path))
        if flat[path] == 0 and (path in _POSITIVE or (path == "moe.num_experts" and "first_k_dense" in family.implies)):
            raise ConfigError(f"{names} = 0: must be greater than 0")
    for name, options in family.choices.items():
        flat |= _chosen(name, config.get(name, next(iter(options))), options)
    for name, expected in family.only.items():
        if name in config and config[name] != (expected := _resolved(expected, config)):
            raise ConfigError(f"{name} = {config[name]!r}: only {expected!r} is understood for {family.model_type}")
    known = {name for names in family.fields.values() for name in names.split("|")}
    known |= {*family.only, *family.choices, *family.harmless, *HARMLESS, *_ROPE_FIELDS, "quantization_config"}
    for name, value in config.items():
        if name not in known:
            raise ConfigError(
                f"{name} = {value!r} is not understood for {family.model_type}: if it does not change what the model"
                " computes, remove it from the file"
            )
    inputs_format(_object("quantization_config", config.get("quantization_config")))
    flat["dtype"] = _chosen("torch_dtype", config.get("dtype") or config.get("torch_dtype"), _DTYPES)
    is_mla = flat["attention.kind"] == "mla"
    flat |= {f"attention.rope.{name}": value for name, value in _rope(config, is_mla, family).items()}
    try:
        return _built(flat)
    except ConfigError as error:
        raise ConfigError(_in_their_words(str(error), family)) from error


def _resolved(value: Any, config: Json) -> Any:
    return value(config) if callable(value) else value


def _value(config: Json, names: list[str], family: Family, hint: type) -> Any:
    name = next((name for name in names if name in config), names[0])
    if name not in config:
        if name not in family.absent:
            raise ConfigError(f"{name} is missing: download the file again, or add it")
        return _resolved(family.absent[name], config)
    if config[name] is None:
        if name not in family.null:
            raise ConfigError(f"{name} = null is not understood for {family.model_type}: it must be a value")
        return _resolved(family.null[name], config)
    return _typed(name, config[name], hint)


def _typed(name: str, value: Any, hint: type) -> Any:
    """The value as an int, float or bool; no number in these files is negative."""
    if hint is bool and not isinstance(value, bool):
        raise ConfigError(f"{name} = {value!r}: must be true or false")
    if hint is bool:
        return value
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
    if not is_number or hint(value) != value:
        raise ConfigError(f"{name} = {value!r}: must be a {'whole ' * (hint is int)}number, 0 or greater")
    return hint(value)


def _object(name: str, value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{name} = {value!r}: must be a JSON object or null")
    return dict(value or {})


def _chosen(name: str, value: Any, options: Mapping[Any, Any]) -> Any:
    if value not in list(options):
        raise ConfigError(f"{name} = {value!r}: must be one of {', '.join(map(str, options))}")
    return options[value]


def _rope(config: Json, is_mla: bool, family: Family) -> dict[str, Any]:
    """Fields of `RoPEConfig`, from transformers 4's rope_theta and rope_scaling or 5's rope_parameters."""
    old, new = (_object(name, config.get(name)) for name in ("rope_scaling", "rope_parameters"))
    if old and new and old != new:
        raise ConfigError(f"rope_scaling = {old!r}, but rope_parameters = {new!r}: remove the one that is wrong")
    parameters = old or new
    theta = _typed("rope_theta", config.get("rope_theta", family.absent["rope_theta"]), float)
    theta = _typed("rope_parameters.rope_theta", parameters.pop("rope_theta", theta), float)
    old_type = parameters.pop("type", "default")
    kind = parameters.pop("rope_type", old_type)

    def take(name: str, hint: type = float, default: Any = None) -> Any:
        value = parameters.pop(name, None)
        return _typed(f"rope_scaling.{name}", default if value is None else value, hint)

    rope: dict[str, Any] = {"theta": theta}
    only: dict[str, Any] = {"partial_rotary_factor": 1.0}
    if kind in ("yarn", "llama3"):
        original = take("original_max_position_embeddings", int, config["max_position_embeddings"])
        rope |= {"scaling": kind, "factor": take("factor"), "original_max_position": original}
    if kind == "yarn":
        rope |= {"beta_fast": take("beta_fast", default=32), "beta_slow": take("beta_slow", default=1)}
        mscale, mscale_all_dim = take("mscale", default=0), take("mscale_all_dim", default=0)
        if is_mla and mscale and mscale_all_dim:
            rope |= {"mscale": mscale, "mscale_all_dim": mscale_all_dim}
        elif mscale or mscale_all_dim:
            # transformers scales the softmax for MLA only, and ignores one without the other; others differ.
            needs = "both mscale and mscale_all_dim" if is_mla else "neither mscale nor mscale_all_dim"
            raise ConfigError(
                f"rope_scaling.mscale = {mscale}, mscale_all_dim = {mscale_all_dim}: {needs} must be set, in other"
                " cases implementations differ"
            )
        only |= {"truncate": True}
        if not mscale and rope["factor"] > 1:
            only |= {"attention_factor": 0.1 * math.log(rope["factor"]) + 1.0}
    elif kind == "llama3":
        rope |= {name: take(name) for name in ("low_freq_factor", "high_freq_factor")}
        if not rope["low_freq_factor"]:
            raise ConfigError("rope_scaling.low_freq_factor = 0: must be greater than 0")
    elif kind != "default":
        raise ConfigError(f"rope_scaling.rope_type = {kind!r}: must be one of default, yarn, llama3")
    for name, value in parameters.items():
        if value is not None and value != only.get(name):
            raise ConfigError(f"rope_scaling.{name} = {value!r} is not understood with rope_type = {kind!r}")
    return rope


_PARTS = {"attention.rope.": RoPEConfig, "attention.": AttentionConfig, "moe.": MoEConfig, "mtp.": MTPConfig}


def _part(path: str) -> tuple[type, str]:
    """The class and the field that a path leads to."""
    prefix = next((prefix for prefix in _PARTS if path.startswith(prefix)), "")
    return _PARTS.get(prefix, ModelConfig), path.removeprefix(prefix)


def _hint(path: str) -> type:
    part, name = _part(path)
    return _hints(part)[name]


_hints = functools.cache(get_type_hints)


def _built(flat: Mapping[str, Any]) -> ModelConfig:
    """The `ModelConfig` with these values, by path."""
    values = dict(flat)
    for prefix, part in _PARTS.items():
        own = {path: values.pop(path) for path in [*values] if path.startswith(prefix)}
        values[prefix[:-1]] = part(**{path.removeprefix(prefix): value for path, value in own.items()})
    return ModelConfig(**values)


def _in_their_words(message: str, family: Family) -> str:
    """A message of ModelConfig's with the fields of config.json instead of ours."""
    names = {path: name.split("|")[0] for path, name in family.fields.items()}
    names |= {f"attention.rope.{ours}": theirs for ours, theirs in _ROPE_NAMES.items()}
    for path, name in names.items():
        part, ours = _part(path)
        if message.startswith(f"{part.__name__}.{ours} = "):
            message = f"{name}{message.removeprefix(f'{part.__name__}.{ours}')}"
        message = message.replace(f" {ours} = ", f" {name} = ")
    return message


_ROPE_NAMES = {"theta": "rope_theta", "original_max_position": "rope_scaling.original_max_position_embeddings"} | {
    name: f"rope_scaling.{name}" for name in ("factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor")
}


# ------------------------------------------------------------------------------------------------------------- writing


def write_config(cfg: ModelConfig, model_type: str | None = None) -> tuple[dict[str, Any], Family]:
    """The config.json (without token ids and dtype) that describes this architecture, and its family.

    It is that of `model_type` if that is given and can say it, or else of the first family in which reading the file
    gives a model that computes the same. The older form of the rotary embedding's fields is written, which
    transformers 4 and 5 both read.

    Raises:
        ConfigError: no family computes what this config says; the message says what the nearest one would change.
    """
    best: list[str] | None = None
    for family in sorted(FAMILIES, key=lambda family: family.model_type != model_type):
        config = _written(cfg, family)
        try:
            read = flattened(canonical(_model_config(config, family)))
        except (ConfigError, ArithmeticError):
            continue
        wanted = flattened(canonical(cfg))
        differences = [
            f"{path} = {wanted[path]!r} (there {read[path]!r})" for path in wanted if wanted[path] != read[path]
        ]
        if not differences:
            return config, family
        if best is None or len(differences) < len(best):
            best = [family.model_type, *differences]
    nearest = f"; the nearest is {best[0]}, without {', '.join(best[1:])}" if best else ""
    raise ConfigError(f"no family of Hugging Face's computes what this model does{nearest}")


def _written(cfg: ModelConfig, family: Family) -> dict[str, Any]:
    flat = flattened(cfg)
    if not cfg.moe.num_experts:
        flat["first_k_dense"] = cfg.num_layers
    config: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    for path, names in family.fields.items():
        name, value = names.split("|")[0], flat[path]
        config[name] = None if name == "q_lora_rank" and value == 0 else value
    for name, options in family.choices.items():
        fits = (value for value, implied in options.items() if all(flat[path] == implied[path] for path in implied))
        config[name] = next(fits, next(iter(options)))
    config |= {name: _resolved(value, config) for name, value in family.only.items()}
    rope = cfg.attention.rope
    config["rope_theta"], config["rope_scaling"] = rope.theta, None
    if rope.scaling != "none":
        scaling = {"type": rope.scaling, "rope_type": rope.scaling, "factor": rope.factor}
        scaling["original_max_position_embeddings"] = rope.original_max_position
        if rope.scaling == "llama3":
            scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
        else:
            scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
            if rope.mscale_all_dim:
                scaling |= {"mscale": rope.mscale, "mscale_all_dim": rope.mscale_all_dim}
        config["rope_scaling"] = scaling
    return config


def flattened(part: Any, prefix: str = "") -> dict[str, Any]:
    """Path → value of a nested config."""
    flat: dict[str, Any] = {}
    for name in (each.name for each in dataclasses.fields(part)):
        value = getattr(part, name)
        nested = dataclasses.is_dataclass(value)
        flat |= flattened(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat


def canonical(cfg: ModelConfig) -> ModelConfig:
    """The config with everything at its default that does not change the model's outputs.

    Equal results mean that two configs compute the same from the same weights: training's coefficients, dtype and the
    fields of parts that are not there do not count.
    """
    flat, default = flattened(cfg), flattened(ModelConfig())
    a, moe, rope = cfg.attention, cfg.moe, cfg.attention.rope
    kept = {"vocab_size", "hidden_size", "num_layers", "max_position", "rms_norm_eps", "tie_word_embeddings"}
    kept |= {"attention.kind", "attention.num_heads", "attention.rope.theta", "attention.rope.layout"}
    kept |= {"attention.rope.scaling", "moe.num_experts", "mtp.depth"}
    if a.kind == "mla":
        kept |= {f"attention.{name}" for name in ("q_lora_rank", "kv_lora_rank", "v_head_dim", "latent_norm_eps")}
        kept |= {"attention.qk_nope_head_dim", "attention.qk_rope_head_dim"}
    else:
        kept |= {f"attention.{name}" for name in ("num_kv_heads", "head_dim", "qkv_bias", "qk_norm")}
    if rope.scaling != "none":
        kept |= {"attention.rope.factor", "attention.rope.original_max_position"}
        yarn, llama3 = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"), ("low_freq_factor", "high_freq_factor")
        kept |= {f"attention.rope.{name}" for name in (yarn if rope.scaling == "yarn" else llama3)}
    if cfg.num_dense_layers:
        kept |= {"intermediate_size"}
    if moe.num_experts:
        names = ("num_experts_per_token", "num_shared_experts", "expert_size", "score", "routing", "selection_bias")
        kept |= {"first_k_dense", *(f"moe.{name}" for name in (*names, "normalize_weights", "routed_scaling_factor"))}
        if moe.num_groups > 1:
            kept |= {"moe.num_groups", "moe.num_groups_per_token", "moe.group_score"}
    if cfg.mtp.depth:
        kept |= {"mtp.kind", "mtp.hidden_first"}
    values = {path: flat[path] if path in kept else default[path] for path in default}
    values["moe.sequence_balance_coef"] = 0.0  # with fixed routing it must be
    if not moe.num_experts:
        values["first_k_dense"] = cfg.num_layers
    if not cfg.num_dense_layers:
        values["intermediate_size"] = 0
    return _built(values)
