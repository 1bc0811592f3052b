"""Writes what Hugging Face transformers computes with small random models.

Command: `pip install torch==2.13.0 transformers==5.23.0 && python tests/interop/make_reference.py`

`checkpoints/NAME` is a checkpoint that transformers saved (its weights are multiples of 1/64), with `reference.npz`:
token ids, which positions are not padding, the logits, and the hidden states of multi-token prediction modules, whose
weights stand in the checkpoint under the names of DeepSeek-V3's release. `fused.safetensors` has the same weights with
all experts of a layer in one tensor. `../model/hf_reference.npz` has routers alone, at more experts, and the rotary
frequencies of released models.

transformers has no class for DeepSeekMoE-16B: its reference is transformers' Llama with the sparse layer written here.

B batch, S sequence, D model, E experts, K experts per token, T tokens.
"""

import copy
import functools
import json
import pathlib
from collections.abc import Callable

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter, yarn_apply_mscale
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

CHECKPOINTS = pathlib.Path(__file__).with_name("checkpoints")
BATCH, LENGTH, PADDING = 2, 32, 7  # the second row has PADDING columns of padding on its left

SIZES = dict(
    vocab_size=24,
    hidden_size=16,
    intermediate_size=12,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=64,
    rms_norm_eps=1e-3,  # large, so that the wrong eps anywhere shows
    tie_word_embeddings=False,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
MLA = dict(kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=8, v_head_dim=6, first_k_dense_replace=1)
EXPERTS = dict(moe_intermediate_size=6, num_experts_per_tok=3)
DEEPSEEK = dict(MLA, **EXPERTS, n_routed_experts=8)
GROUPS = dict(n_group=4, topk_group=2)
ROPE = dict(rope_type="default", rope_theta=100.0)
LONG = dict(rope_theta=10.0, factor=4.0, original_max_position_embeddings=16)
YARN = dict(LONG, rope_type="yarn", beta_fast=1.0, beta_slow=0.5)  # keeps 2 of 4 pairs, mixes 1, slows 1

MODELS = {
    "deepseek_v3": (
        "DeepseekV3",
        dict(
            DEEPSEEK,
            **GROUPS,
            q_lora_rank=10,
            n_shared_experts=1,
            routed_scaling_factor=2.5,
            norm_topk_prob=True,
            rope_parameters=dict(YARN, mscale=1.0, mscale_all_dim=1.0),
            num_nextn_predict_layers=2,
        ),
    ),
    "deepseek_v3_no_groups": (
        "DeepseekV3",
        dict(
            DEEPSEEK,
            n_group=1,
            topk_group=1,
            q_lora_rank=None,
            n_shared_experts=2,
            num_nextn_predict_layers=0,
            routed_scaling_factor=2.446,
            norm_topk_prob=True,
            rope_parameters=ROPE,
        ),
    ),
    "deepseek_v2": (
        "DeepseekV2",
        dict(
            DEEPSEEK,
            **GROUPS,
            q_lora_rank=10,
            n_shared_experts=2,
            routed_scaling_factor=4.0,
            topk_method="group_limited_greedy",
            rope_parameters=dict(YARN, mscale=1.5, mscale_all_dim=0.707),
        ),
    ),
    "deepseek_v2_lite": (
        "DeepseekV2",
        dict(
            DEEPSEEK,
            q_lora_rank=None,
            n_shared_experts=2,
            topk_method="greedy",
            rope_parameters=dict(YARN, mscale=0.707, mscale_all_dim=0.707),
        ),
    ),
    "mixtral": (
        "Mixtral",
        dict(intermediate_size=6, num_local_experts=8, num_experts_per_tok=2, num_key_value_heads=2, head_dim=8),
    ),
    "qwen2": ("Qwen2", dict(num_key_value_heads=2, tie_word_embeddings=True, rope_parameters=YARN)),
    "qwen3": (
        "Qwen3",
        dict(num_key_value_heads=2, head_dim=8, attention_bias=False, rope_parameters=YARN),
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        dict(EXPERTS, num_experts=8, norm_topk_prob=True, num_key_value_heads=1, head_dim=8, mlp_only_layers=[]),
    ),
    "olmoe": (
        "Olmoe",
        dict(intermediate_size=6, num_experts_per_tok=3, num_experts=8, norm_topk_prob=False, num_key_value_heads=2),
    ),
    "llama": ("Llama", dict()),  # as DeepSeek LLM
    "llama3": (
        "Llama",
        dict(
            num_key_value_heads=2,
            head_dim=8,
            rope_parameters=dict(LONG, rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0),
        ),
    ),
    "deepseek_moe": (
        "Llama",
        dict(
            EXPERTS,
            n_routed_experts=8,
            n_shared_experts=2,
            first_k_dense_replace=1,
            moe_layer_freq=1,
            norm_topk_prob=False,
            scoring_func="softmax",
        ),
    ),
}

ROUTERS = {
    "deepseek_v3": (DeepseekV3TopkRouter, "DeepseekV3", dict(norm_topk_prob=True, routed_scaling_factor=2.5)),
    "deepseek_v3_not_normalized": (
        DeepseekV3TopkRouter,
        "DeepseekV3",
        dict(norm_topk_prob=False, routed_scaling_factor=1.0),
    ),
    "deepseek_v2": (
        DeepseekV2TopkRouter,
        "DeepseekV2",
        dict(topk_method="group_limited_greedy", routed_scaling_factor=16.0),
    ),
    "deepseek_v2_lite": (DeepseekV2TopkRouter, "DeepseekV2", dict(topk_method="greedy")),
    "mixtral": (MixtralTopKRouter, "Mixtral", dict()),
    "qwen3_moe": (Qwen3MoeTopKRouter, "Qwen3Moe", dict(norm_topk_prob=True)),
    "olmoe": (OlmoeTopKRouter, "Olmoe", dict(norm_topk_prob=False)),
}

LONG_CONTEXTS = {
    "deepseek_v3": dict(
        rope_type="yarn",
        rope_theta=10_000.0,
        factor=40.0,
        original_max_position_embeddings=4096,
        beta_fast=32.0,
        beta_slow=1.0,
        mscale=1.0,
        mscale_all_dim=1.0,
    ),
    "llama_3_1": dict(
        rope_type="llama3",
        rope_theta=500_000.0,
        factor=8.0,
        original_max_position_embeddings=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    ),
}
LONG_CONTEXTS["deepseek_v2"] = dict(LONG_CONTEXTS["deepseek_v3"], mscale=0.707, mscale_all_dim=0.707)
LONG_CONTEXTS["kimi_k2"] = dict(LONG_CONTEXTS["deepseek_v3"], rope_theta=50_000.0, factor=32.0, beta_fast=1.0)
LONG_CONTEXTS["yarn_defaults"] = dict(  # as in Qwen2.5's instructions for long inputs
    rope_type="yarn", rope_theta=1_000_000.0, factor=4.0, original_max_position_embeddings=32_768
)


def build(family: str, overrides: dict) -> tuple[torch.nn.Module, transformers.PreTrainedConfig]:
    config = getattr(transformers, f"{family}Config")(**{**SIZES, "rope_parameters": dict(ROPE), **overrides})
    model_class = getattr(transformers, f"{family}ForCausalLM")
    model = model_class._from_config(config, attn_implementation="eager", experts_implementation="eager")
    return model.eval(), config


def randomize(module: torch.nn.Module, seed: int) -> None:
    """Sets every weight and buffer of the state to random multiples of 1/64; norms lie around 1."""
    rng = np.random.default_rng(seed)
    for name, tensor in module.state_dict().items():
        std = 0.5 if "norm" in name or "bias" in name or "embed" in name else tensor.shape[-1] ** -0.5
        std *= 3 if name.endswith("gate.weight") or "router" in name else 1
        value = np.round(64 * std * rng.standard_normal(tuple(tensor.shape))) / 64
        if name.endswith("norm.weight"):
            value = 1 + np.clip(value, -0.75, 0.75)
        tensor.copy_(torch.tensor(value, dtype=tensor.dtype))


class DeepseekTopkRouter(torch.nn.Module):
    """DeepSeekMoE-16B's gate: softmax over all experts, the best K as they are (its `modeling_deepseek.MoEGate`)."""

    def __init__(self, config: transformers.PreTrainedConfig):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(config.n_routed_experts, config.hidden_size))
        self.top_k = config.num_experts_per_tok

    def forward(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits_TE = x_TD @ self.weight.T
        weights_TK, experts_TK = logits_TE.softmax(dim=-1).topk(self.top_k)
        return logits_TE, weights_TK, experts_TK


class DeepseekMoE(torch.nn.Module):
    """Σ weight · expert(x) + shared(x), where the shared experts are one wider feed-forward (arXiv:2401.06066)."""

    def __init__(self, config: transformers.PreTrainedConfig):
        super().__init__()

        def feed_forward(width: int) -> LlamaMLP:
            narrow = copy.copy(config)
            narrow.intermediate_size = width
            return LlamaMLP(narrow)

        self.gate = DeepseekTopkRouter(config)
        experts = [feed_forward(config.moe_intermediate_size) for _ in range(config.n_routed_experts)]
        self.experts = torch.nn.ModuleList(experts)
        self.shared_experts = feed_forward(config.n_shared_experts * config.moe_intermediate_size)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        x_TD = x_BSD.flatten(0, 1)
        _, weights_TK, experts_TK = self.gate(x_TD)
        mixing_TE = torch.zeros(len(x_TD), len(self.experts)).scatter(1, experts_TK, weights_TK)
        y_TD = self.shared_experts(x_TD)
        for e, expert in enumerate(self.experts):
            y_TD = y_TD + mixing_TE[:, e, None] * expert(x_TD)
        return y_TD.view(x_BSD.shape)


MTP_NAMES = {"mtp_block.": "", "post_norm.": "shared_head.norm."}  # transformers' to the release's


def mtp_tensors(mtp: MtpModel, main: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The modules' weights under the names of the release, with its copies of embedding and head."""
    tensors = {}
    for k in range(mtp.num_mtp_layers):
        prefix = f"model.layers.{main.config.num_hidden_layers + k}."
        for name, tensor in mtp.layers[k].state_dict().items():
            for theirs, released in MTP_NAMES.items():
                name = name.replace(theirs, released)
            if name.startswith("mlp.experts."):
                matrices = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[name.split(".")[-1]]
                for e, fused in enumerate(tensor):
                    for kind, matrix in zip(matrices, fused.chunk(len(matrices)), strict=True):
                        tensors[f"{prefix}mlp.experts.{e}.{kind}.weight"] = matrix.contiguous()
            else:
                tensors[prefix + name] = tensor
        tensors[prefix + "embed_tokens.weight"] = main.model.embed_tokens.weight.clone()
        tensors[prefix + "shared_head.head.weight"] = main.lm_head.weight.clone()
    return tensors


def mtp_hidden(mtp: MtpModel, hidden_BSD: torch.Tensor, tokens_BS: torch.Tensor) -> list[np.ndarray]:
    """The hidden states of each module on a whole sequence; module k (from 1) has k positions fewer."""
    cache = MtpCache(config=mtp.config)
    positions_BS = torch.arange(tokens_BS.shape[1])[None]
    outputs = []
    for k in range(mtp.num_mtp_layers):
        ahead = slice(k + 1, None)
        hidden_BSD = mtp.forward_layer(
            k, hidden_BSD[:, :-1], positions_BS[:, ahead], cache, input_ids=tokens_BS[:, ahead]
        )
        outputs.append(hidden_BSD.numpy())
    return outputs


def chosen_experts(module: torch.nn.Module, run: Callable[[], object]) -> list[torch.Tensor]:
    """Experts that the routers below `module` choose while `run` runs."""
    chosen = []
    routers = [child for name, child in module.named_modules() if type(child).__name__.lower().endswith("topkrouter")]
    hooks = [
        router.register_forward_hook(lambda _, __, output: chosen.append(output[2].sort(dim=-1).values))
        for router in routers
    ]
    run()
    for hook in hooks:
        hook.remove()
    return chosen


def clear_choices(module: torch.nn.Module, run: Callable[[], object], inputs: torch.Tensor) -> bool:
    """Whether inputs changed by 1e-4 have the same experts: then no other order of sums can change them either."""
    before, original = chosen_experts(module, run), inputs.clone()
    inputs += 1e-4 * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(0))
    after = chosen_experts(module, run)
    inputs.copy_(original)
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def exact_float16(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    for name, value in weights.items():
        assert np.array_equal(value.astype(np.float16).astype(np.float32), value), name
    return {name: value.astype(np.float16) for name, value in weights.items()}


def write_checkpoint(name: str, family: str, overrides: dict, seed: int) -> dict | None:
    """Writes one model's folder; None if a router is undecided at this seed."""
    model, config = build(family, overrides)
    if name == "deepseek_moe":
        for layer in model.model.layers[config.first_k_dense_replace :]:
            layer.mlp = DeepseekMoE(config)
    randomize(model, seed)
    tokens_BS = torch.tensor(np.random.default_rng(seed).integers(0, config.vocab_size, (BATCH, LENGTH)))
    valid_BS = torch.ones_like(tokens_BS)
    valid_BS[1, :PADDING] = 0
    positions_BS = (valid_BS.cumsum(1) - 1).clamp(0)

    def run() -> transformers.modeling_outputs.ModelOutput:
        return model(tokens_BS, attention_mask=valid_BS, position_ids=positions_BS, output_hidden_states=True)

    if not clear_choices(model, run, model.model.embed_tokens.weight):
        return None
    output = run()
    entries = {"tokens_BS": tokens_BS.numpy().astype(np.int8), "valid_BS": valid_BS.numpy().astype(bool)}
    entries["logits_BSV"] = output.logits.numpy()
    folder = CHECKPOINTS / name
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if overrides.get("num_nextn_predict_layers"):
        mtp = MtpModel(model, config.num_nextn_predict_layers).eval()
        mtp.set_attn_implementation("eager")
        mtp.config._experts_implementation = "eager"
        randomize(mtp.layers, seed + 1)
        hidden_1SD = output.hidden_states[-1][:1].clone()

        def run_mtp() -> list[np.ndarray]:
            return mtp_hidden(mtp, hidden_1SD, tokens_BS[:1])

        if not clear_choices(mtp, run_mtp, hidden_1SD):
            return None
        entries |= {f"mtp_hidden_{k}": hidden for k, hidden in enumerate(run_mtp())}
        tensors = load_file(folder / "model.safetensors") | mtp_tensors(mtp, model)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if any(".experts.gate_up_proj" in key for key in model.state_dict()):
        save_file(model.state_dict(), folder / "fused.safetensors", metadata={"format": "pt"})
    if name == "deepseek_moe":
        written = json.loads((folder / "config.json").read_text())
        written |= {"model_type": "deepseek", "architectures": ["DeepseekForCausalLM"]}
        written.pop("mlp_bias")
        (folder / "config.json").write_text(json.dumps(written, indent=2))
    np.savez_compressed(folder / "reference.npz", **entries)
    return entries


def router_entries(router_class: type, family: str, overrides: dict, seed: int) -> dict[str, np.ndarray] | None:
    """One router at 32 experts, in 8 groups where it knows groups: inputs, gate, bias and mixing weights [T, E]."""
    T, D, E, K = 48, 8, 32, 6
    names = {"Mixtral": "num_local_experts", "Qwen3Moe": "num_experts", "Olmoe": "num_experts"}
    sizes = {names.get(family, "n_routed_experts"): E, "num_experts_per_tok": K, "hidden_size": D}
    groups = dict(n_group=8, topk_group=3) if family.startswith("Deepseek") else {}
    config = getattr(transformers, f"{family}Config")(
        **{**SIZES, **sizes, **groups, **overrides}, rope_parameters=dict(ROPE)
    )
    router = router_class(config)
    randomize(torch.nn.ModuleDict({"router": router}), seed)
    x_TD = torch.tensor(np.round(64 * np.random.default_rng(seed).standard_normal((T, D))) / 64, dtype=torch.float32)
    if not clear_choices(router, lambda: router(x_TD), x_TD):
        return None
    _, weights_TK, experts_TK = router(x_TD)
    entries = exact_float16(
        {"x_TD": x_TD.numpy(), "gate_DE": router.weight.numpy().T}
        | ({"bias_E": router.e_score_correction_bias.numpy()} if hasattr(router, "e_score_correction_bias") else {})
    )
    return entries | {"mixing_TE": torch.zeros(T, E).scatter(1, experts_TK, weights_TK).numpy()}


def rope_entries(parameters: dict) -> dict[str, np.ndarray]:
    """Frequencies of a head with 64 rotated elements, the factor of cosine and sine, and that of the softmax."""
    overrides = dict(head_dim=64, rope_parameters=dict(parameters), max_position_embeddings=163_840)
    config = transformers.LlamaConfig(**{**SIZES, **overrides})
    frequencies, rotation_scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config)
    scales = np.array([rotation_scale, yarn_apply_mscale(config.rope_parameters, 1.0)])
    return {"frequencies": frequencies.numpy(), "scales": scales}


def first(make: Callable[[int], dict[str, np.ndarray] | None]) -> dict[str, np.ndarray]:
    """The entries at the first seed at which every router is decided."""
    return next(entries for entries in map(make, range(0, 1000, 2)) if entries is not None)


def main() -> None:
    arrays = {}

    def add(prefix: str, entries: dict[str, np.ndarray]) -> None:
        arrays.update({f"{prefix}/{key}": value for key, value in entries.items()})

    with torch.no_grad():
        for name, model in MODELS.items():
            first(functools.partial(write_checkpoint, name, *model))
        for name, router in ROUTERS.items():
            add(f"router/{name}", first(functools.partial(router_entries, *router)))
    for name, parameters in LONG_CONTEXTS.items():
        add(f"rope/{name}", rope_entries(parameters))
    path = CHECKPOINTS.parent.parent / "model" / "hf_reference.npz"
    np.savez_compressed(path, **arrays)


if __name__ == "__main__":
    main()
