"""Every knob: frozen dataclasses, checked when built.

A dataclass here is a part of an experiment's configuration. `__post_init__` refuses values and combinations that are
illegal and names the field, the value and what would be legal, so that a mistake costs a second and not an hour.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints


class ConfigError(ValueError):
    """A configuration that cannot be built: the message names the field, its value and the remedy."""


def _require(ok: bool, config: object, name: str, remedy: str) -> None:
    if not ok:
        raise ConfigError(f"{type(config).__name__}.{name} = {getattr(config, name)!r}: {remedy}")


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        _require(getattr(config, name) > 0, config, name, "must be greater than 0")


def _require_not_negative(config: object, *names: str) -> None:
    for name in names:
        _require(getattr(config, name) >= 0, config, name, "must be 0 or greater")


def _require_fraction(config: object, *names: str) -> None:
    for name in names:
        _require(0 <= getattr(config, name) <= 1, config, name, "must lie between 0 and 1")


def _require_literals(config: object) -> None:
    """Checks every field annotated with a Literal, and suggests the nearest legal value."""
    for name, hint in get_type_hints(type(config)).items():
        if get_origin(hint) is not Literal:
            continue
        value, legal = getattr(config, name), [str(choice) for choice in get_args(hint)]
        if value not in get_args(hint):
            near = difflib.get_close_matches(str(value), legal, n=1, cutoff=0)
            raise ConfigError(
                f"{type(config).__name__}.{name} = {value!r}: must be one of {', '.join(legal)}"
                f" (did you mean {near[0]!r}?)"
            )


@dataclass(frozen=True)
class RoPEConfig:
    """Rotary position embedding and its extensions to longer contexts."""

    theta: float = 10_000.0
    """Base of the rotation frequencies."""
    layout: Literal["half", "interleaved"] = "half"
    """Which elements form a pair: (i, i + d/2) as in Llama and Qwen, or (2i, 2i + 1) as in DeepSeek."""
    scaling: Literal["none", "yarn", "llama3"] = "none"
    factor: float = 1.0
    """By how much the context is extended."""
    original_max_position: int = 4096
    """Context length before the extension."""
    beta_fast: float = 32.0
    """YaRN: pairs that turn more often than this over the original context keep their frequency."""
    beta_slow: float = 1.0
    """YaRN: pairs that turn less often than this are slowed by `factor`."""
    mscale: float = 1.0
    """YaRN: scales cos and sin by m(mscale) / m(mscale_all_dim)."""
    mscale_all_dim: float = 0.0
    """YaRN: scales the softmax by m(mscale_all_dim)²; 0 leaves it."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        _require_literals(self)
        _require_positive(self, "theta", "factor", "original_max_position")
        if self.scaling == "none":
            _require(self.factor == 1, self, "factor", "has no effect with scaling = 'none'; choose 'yarn' or 'llama3'")
        else:
            _require(self.factor > 1, self, "factor", f"must exceed 1 with scaling = {self.scaling!r}")
        if self.scaling == "yarn":
            _require_positive(self, "beta_slow")
            _require(
                self.beta_fast >= self.beta_slow, self, "beta_fast", f"must not be below beta_slow = {self.beta_slow}"
            )
        if self.scaling == "llama3":
            _require(
                self.high_freq_factor > self.low_freq_factor,
                self,
                "high_freq_factor",
                f"must exceed low_freq_factor = {self.low_freq_factor}",
            )


@dataclass(frozen=True)
class AttentionConfig:
    """Multi-head latent attention (MLA, DeepSeek-V2 §2.1) or grouped-query attention (GQA)."""

    kind: Literal["mla", "gqa"] = "mla"
    num_heads: int = 4
    num_kv_heads: int = 4
    """GQA: key and value heads; equal to `num_heads` for plain multi-head attention."""
    head_dim: int = 32
    """GQA: width of one head."""
    qkv_bias: bool = False
    """GQA: biases on the query, key and value projections (Qwen2.5)."""
    qk_norm: Literal["none", "head", "full"] = "none"
    """GQA: RMSNorm on queries and keys, over each head (Qwen3) or over the whole projected vector (OLMoE)."""
    q_lora_rank: int = 0
    """MLA: rank of the query compression; 0 projects queries directly."""
    kv_lora_rank: int = 64
    """MLA: width of the latent that is cached."""
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    latent_norm_eps: float = 1e-6
    """MLA: eps of the norms on the latents, which DeepSeek's code leaves at 1e-6 whatever `rms_norm_eps` is."""
    rope: RoPEConfig = RoPEConfig()

    def __post_init__(self) -> None:
        _require_literals(self)
        _require_positive(self, "num_heads")
        if self.kind == "gqa":
            _require_positive(self, "num_kv_heads", "head_dim")
            _require(
                self.num_heads % self.num_kv_heads == 0,
                self,
                "num_kv_heads",
                f"must divide num_heads = {self.num_heads}",
            )
            _require(self.head_dim % 2 == 0, self, "head_dim", "must be even, rotary embedding works on pairs")
        else:
            _require_positive(self, "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
            _require_not_negative(self, "q_lora_rank")
            _require(self.qk_norm == "none", self, "qk_norm", "is for kind = 'gqa'; MLA has norms on its latents")
            _require(not self.qkv_bias, self, "qkv_bias", "is for kind = 'gqa'")
            _require(
                self.qk_rope_head_dim % 2 == 0,
                self,
                "qk_rope_head_dim",
                "must be even, rotary embedding works on pairs",
            )


@dataclass(frozen=True)
class MoEConfig:
    """Sparse feed-forward layers: routed experts chosen per token, shared experts used by all (DeepSeekMoE)."""

    num_experts: int = 0
    """Routed experts; 0 makes every layer dense."""
    num_experts_per_token: int = 2
    num_shared_experts: int = 0
    expert_size: int = 128
    """Width of one expert (`moe_intermediate_size`); the shared experts are one SwiGLU of width shared × this."""
    score: Literal["sigmoid", "softmax"] = "sigmoid"
    """Affinity of a token to an expert: sigmoid (V3) or softmax over all experts (V2, Mixtral, Qwen, OLMoE)."""
    routing: Literal["learned", "hash", "uniform"] = "learned"
    """What chooses a token's experts: its affinities; or, as controls, a hash of its id, or its position in turn, so
    that the load is even. The learned gate weighs the chosen experts in any case."""
    num_groups: int = 1
    """Experts are divided into this many groups (`n_group`) ..."""
    num_groups_per_token: int = 1
    """... of which a token may use this many (`topk_group`)."""
    group_score: Literal["top2_sum", "max"] = "top2_sum"
    """A group's score: the sum of its two best biased scores (V3) or its best one (V2)."""
    normalize_weights: bool = True
    """Divide the chosen experts' scores by their sum (`norm_topk_prob`)."""
    routed_scaling_factor: float = 1.0
    """Multiplies the mixing weights; DeepSeek-V3 2.5, V2 16."""
    bias_update_rate: float = 1e-3
    """γ of the loss-free balancing bias (V3 eq. 16, arXiv:2408.15664); 0 freezes it."""
    selection_bias: bool = True
    """Whether the router has a balancing bias at all."""
    bias_zero_mean: bool = False
    """Subtract the mean over experts from each change of the bias (Moonlight)."""
    sequence_balance_coef: float = 1e-4
    """α of the sequence-wise balance loss (V3 eq. 17); 0 turns it off, as it does the losses below."""
    expert_balance_coef: float = 0.0
    """α₁ of the expert-level balance loss (V2 eq. 23), over the tokens of a micro-batch on all devices."""
    device_balance_coef: float = 0.0
    """α₂ of the device-level balance loss (V2 eq. 26); a group of experts stands for a device."""
    communication_balance_coef: float = 0.0
    """α₃ of the communication balance loss (V2 eq. 29); a group of experts stands for a device."""
    global_balance_coef: float = 0.0
    """Weight of the balance loss whose loads are those of the whole step's batch (arXiv:2501.11873)."""
    z_loss_coef: float = 0.0
    """Weight of the router z-loss, the mean of logsumexp(logits)² over tokens (ST-MoE, arXiv:2202.08906)."""
    capacity_factor: float = 0.0
    """Drop the assignments of lowest affinity that exceed this many times the mean load of a group of experts (of an
    expert, where there is one group), in training only (V2 §2.2.4); 0 drops none."""
    dispatch: Literal["auto", "all_gather", "all_to_all"] = "auto"
    """How tokens reach their experts on a mesh with an `expert` axis (see `model/dispatch.py`); without one, nothing
    travels. "auto" takes the way on which less does."""
    dispatch_buffer: float = 2.0
    """Rows that a shard's buffers hold, relative to an even load; more than that take further rounds."""

    def __post_init__(self) -> None:
        _require_literals(self)
        losses = ("sequence", "expert", "device", "communication", "global")
        losses = tuple(f"{loss}_balance_coef" for loss in losses)
        _require_not_negative(self, "num_experts", "num_shared_experts", "bias_update_rate", "capacity_factor")
        _require_not_negative(self, *losses, "z_loss_coef")
        if not self.num_experts:
            return
        _require_positive(self, "num_experts_per_token", "expert_size", "num_groups", "num_groups_per_token")
        _require(
            self.num_experts_per_token <= self.num_experts,
            self,
            "num_experts_per_token",
            f"must not exceed num_experts = {self.num_experts}",
        )
        _require(
            self.num_experts % self.num_groups == 0, self, "num_groups", f"must divide num_experts = {self.num_experts}"
        )
        _require(
            self.num_groups_per_token <= self.num_groups,
            self,
            "num_groups_per_token",
            f"must not exceed num_groups = {self.num_groups}",
        )
        reachable = self.num_experts // self.num_groups * self.num_groups_per_token
        _require(
            self.num_experts_per_token <= reachable,
            self,
            "num_experts_per_token",
            f"must not exceed the {reachable} experts of {self.num_groups_per_token} groups",
        )
        _require_positive(self, "routed_scaling_factor", "dispatch_buffer")
        for name in ("device_balance_coef", "communication_balance_coef"):
            _require(self.num_groups > 1 or getattr(self, name) == 0, self, name, "needs num_groups > 1: the devices")
        _require(self.selection_bias or not self.bias_zero_mean, self, "bias_zero_mean", "needs selection_bias = True")
        if self.routing != "learned":
            remedy = f"has no effect with routing = {self.routing!r}; set it to "
            _require(not self.selection_bias, self, "selection_bias", remedy + "False")
            _require(self.num_groups == 1, self, "num_groups", remedy + "1")
            for name in losses:
                _require(getattr(self, name) == 0, self, name, remedy + "0")
        if self.num_groups > 1 and self.group_score == "top2_sum":
            _require(
                self.num_experts // self.num_groups >= 2,
                self,
                "group_score",
                f"needs 2 experts a group or more, there are {self.num_experts} in {self.num_groups} groups; use 'max'",
            )


@dataclass(frozen=True)
class MTPConfig:
    """Multi-token prediction (DeepSeek-V3 §2.2)."""

    depth: int = 0
    """Number of modules D; each predicts one token further ahead. 0 builds none."""
    kind: Literal["causal", "parallel"] = "causal"
    """A chain of modules that read the tokens up to the one before their target (V3), or heads that are independent of
    each other and read the trunk's output alone (arXiv:2404.19737)."""
    loss_coef: float = 0.3
    """λ: weight of the mean of the modules' losses ..."""
    late_loss_coef: float = 0.1
    """... and what it is from `late_after_tokens` on."""
    late_after_tokens: int = 0
    """Tokens of training, padding included, after which λ is `late_loss_coef`; 0: never. V3: 10T of its 14.8T."""
    hidden_first: bool = False
    """Order of the concatenation: [hidden; embedding] as the paper writes it, or [embedding; hidden] as released."""

    def __post_init__(self) -> None:
        _require_literals(self)
        _require_not_negative(self, "depth", "loss_coef", "late_loss_coef", "late_after_tokens")
        _require(
            self.kind == "causal" or not self.hidden_first,
            self,
            "hidden_first",
            "is for kind = 'causal': parallel heads concatenate nothing",
        )


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Architecture is data: a released model is a value of this class (`presets.py`)."""

    vocab_size: int = 264
    hidden_size: int = 64
    num_layers: int = 3
    intermediate_size: int = 256
    """Width of the dense SwiGLU layers."""
    first_k_dense: int = 1
    """Leading dense layers (`first_k_dense_replace`); the others are sparse if `moe.num_experts` > 0."""
    attention: AttentionConfig = AttentionConfig()
    moe: MoEConfig = MoEConfig()
    mtp: MTPConfig = MTPConfig()
    max_position: int = 4096
    """Longest context, in tokens; a longer prompt is refused."""
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    """Standard deviation of the initial weights, normal."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the products; norms, router, softmax and losses stay in float32, and so do stored weights."""
    remat: Literal["none", "block", "dots"] = "none"
    """What the backward pass computes anew, besides the scores of attention: nothing, all of a block, or all but the
    products with plain weights."""
    quantization: Literal["none", "fp8", "int8", "int4"] = "none"
    """Operands of the products with blocks' matrices, rounded as they are used. "fp8" (E4M3) and "int8": all three of a
    linear map, forward and backward (DeepSeek-V3 §3.3). "int4": weights alone, with straight-through gradients.
    Embedding, head, router, norms and the inside of attention stay in `dtype`. `train.precision` sets it for training
    alone."""
    quantization_block: int = 128
    """Numbers along a contracted axis that share a scale; 0: all of them, except with "int4"."""

    def __post_init__(self) -> None:
        _require_literals(self)
        _require_not_negative(self, "quantization_block")
        _require(
            self.quantization != "int4" or self.quantization_block > 0,
            self,
            "quantization_block",
            "must be greater than 0 with quantization = 'int4': four bits need a scale of their own every so often",
        )
        _require_positive(
            self, "vocab_size", "hidden_size", "num_layers", "max_position", "rms_norm_eps", "initializer_range"
        )
        _require_not_negative(self, "first_k_dense")
        if self.moe.num_experts:
            _require(
                self.first_k_dense < self.num_layers,
                self,
                "first_k_dense",
                f"must be less than num_layers = {self.num_layers}, or no layer is sparse; for a dense model set"
                " moe.num_experts to 0",
            )
        if self.num_dense_layers:
            _require_positive(self, "intermediate_size")

    @property
    def num_dense_layers(self) -> int:
        return self.first_k_dense if self.moe.num_experts else self.num_layers

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers


def at_precision(model: ModelConfig, precision: str) -> ModelConfig:
    """The model with the arithmetic that a `TrainConfig.precision` names."""
    if precision == "model":
        return model
    if precision in ("fp32", "bf16"):
        dtype = "float32" if precision == "fp32" else "bfloat16"
        return dataclasses.replace(model, dtype=dtype, quantization="none")
    return dataclasses.replace(model, quantization=precision)


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one axis may be -1 and takes the devices that the others leave."""

    data: int = -1
    """Replicas of the model, each with its share of the batch."""
    fsdp: int = 1
    """Shards of the batch and of the weights."""
    expert: int = 1
    """Shards of the batch and of the experts."""
    context: int = 1
    """Shards of sequences, for long ones: a sequence's length must be a multiple of twice this, or rows are divided."""
    tensor: int = 1
    """Shards of heads and of feed-forward width."""

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            _require(size > 0 or size == -1, self, name, "must be a number of devices, or -1 for those left")
        if sum(size == -1 for size in sizes.values()) > 1:
            raise ConfigError(f"MeshConfig: {sizes}: only one axis may be -1")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon under a schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """Muon (momentum of 0.95, orthogonalised by Newton-Schulz) for matrices, with AdamW for the rest."""
    learning_rate: float = 3e-4
    """Peak."""
    schedule: Literal["constant", "cosine", "wsd"] = "cosine"
    """After the warmup: constant; cosine to the end; or constant with a linear decay at the end (WSD)."""
    warmup_steps: int = 10
    final_fraction: float = 0.1
    """The last learning rate, as a fraction of the peak."""
    decay_fraction: float = 0.2
    """WSD: share of the steps that decay."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    """On matrices only: embedding, head, router gates, norms and biases are not decayed."""
    max_grad_norm: float = 1.0
    """Global gradient norm is clipped to this; 0 does not clip."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """What both moments are stored in between steps; the arithmetic is float32. bfloat16 halves the optimizer's memory
    (DeepSeek-V3 §3.3.3)."""

    def __post_init__(self) -> None:
        _require_literals(self)
        _require(
            self.moment_dtype == "float32" or self.beta2 <= 0.99,
            self,
            "beta2",
            "with moment_dtype = 'bfloat16' must be at most 0.99, or changes are rounded away",
        )
        _require_positive(self, "learning_rate", "eps")
        _require_not_negative(self, "warmup_steps", "weight_decay", "max_grad_norm")
        _require_fraction(self, "final_fraction", "decay_fraction", "beta1", "beta2")
        _require(self.beta1 < 1, self, "beta1", "must be less than 1")
        _require(self.beta2 < 1, self, "beta2", "must be less than 1")


@dataclass(frozen=True)
class TrainConfig:
    """Supervised training: how many steps of which batch."""

    steps: int = 400
    batch_size: int = 32
    """Rows a step."""
    sequence_length: int = 128
    """Tokens a row; documents are packed into rows and do not attend to each other."""
    accumulation_steps: int = 1
    """Micro-batches that a step's batch is divided into."""
    precision: Literal["model", "fp32", "bf16", "fp8", "int8", "int4"] = "model"
    """Arithmetic of the training step: the model's own; all in float32 or bfloat16; or, of blocks' matrices, in 8 bits
    or with weights rounded to 4 (`ModelConfig.quantization`), the rest in the model's dtype. Stored weights are float32
    in any case. Validation and sampling are in the model's own, unless an experiment says otherwise."""
    optimizer: OptimizerConfig = OptimizerConfig()

    def __post_init__(self) -> None:
        _require_literals(self)
        _require_positive(self, "steps", "batch_size", "accumulation_steps")
        _require(self.sequence_length > 1, self, "sequence_length", "must be at least 2, one token predicts the next")
        _require(
            self.batch_size % self.accumulation_steps == 0,
            self,
            "accumulation_steps",
            f"must divide batch_size = {self.batch_size}",
        )


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 100
    """Steps between checkpoints; the last step of a phase is always saved."""
    keep: int = 2
    """Newest checkpoints kept per phase."""

    def __post_init__(self) -> None:
        _require_positive(self, "every", "keep")


@dataclass(frozen=True)
class SamplingConfig:
    """How a completion is drawn."""

    max_new_tokens: int = 64
    temperature: float = 1.0
    """0 takes the most probable token."""
    top_k: int = 0
    """Only the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Only the smallest set of tokens that holds this much probability."""
    min_p: float = 0.0
    """Only tokens at least this times as probable as the most probable one."""
    speculative_tokens: int = 0
    """Tokens that the multi-token prediction modules draft and the model checks in one pass; 0 decodes one by one. The
    draws' distribution is the same."""
    slots: int = 0
    """Rows that are decoded at a time; those that wait take the places of finished ones (continuous batching). 0: all
    rows at once. The samples do not depend on it."""
    compactions: int = 0
    """How often the rows decoded at a time are halved, once half of them have finished and none waits. The samples do
    not depend on it; each size is compiled by itself."""
    cache_parts: int = 1
    """In how many parts the new tokens' cache is added as it is needed: attention reads what there is. The samples do
    not depend on it; each length is compiled by itself."""

    def __post_init__(self) -> None:
        _require_positive(self, "max_new_tokens", "cache_parts")
        _require_not_negative(self, "temperature", "top_k", "speculative_tokens", "slots", "compactions")
        for name in ("slots", "compactions"):
            drafts = self.speculative_tokens and getattr(self, name)
            _require(not drafts, self, name, "has no effect with speculative_tokens; set it to 0")
        for name in ("slots", "compactions", "speculative_tokens"):
            grows = self.cache_parts > 1 and getattr(self, name)
            _require(not grows, self, "cache_parts", f"does not go with {name}: set it to 1, or {name} to 0")
        _require(self.cache_parts <= self.max_new_tokens, self, "cache_parts", "must not exceed max_new_tokens")
        _require_fraction(self, "top_p", "min_p")
        _require(self.top_p > 0, self, "top_p", "must be greater than 0")


@dataclass(frozen=True)
class TextConfig:
    """A text corpus."""

    path: str = ""
    """A .txt or .jsonl file (field "text"), or a folder of them; empty: the Python standard library's own sources."""


@dataclass(frozen=True)
class SandboxConfig:
    """What a program that a model wrote may use (`data/sandbox.py`)."""

    seconds: int = 2
    """Of the processor, for all calls together; three times as much by the clock."""
    memory_mb: int = 256
    workers: int = 0
    """Programs run at a time; 0: as many as there are processors."""

    def __post_init__(self) -> None:
        _require_positive(self, "seconds")
        _require(self.memory_mb >= 64, self, "memory_mb", "must be at least 64, Python itself needs some")
        _require_not_negative(self, "workers")

    @property
    def wall_seconds(self) -> float:
        return 3.0 * self.seconds


@dataclass(frozen=True)
class ProblemConfig:
    """Problems with answers that a rule can check, and the text that a base model learns from."""

    source: Literal["arithmetic", "words", "gsm8k", "math", "countdown", "reasoning_gym", "code"] = "arithmetic"
    path: str = ""
    """gsm8k, math, code: the folder with train.jsonl and test.jsonl; code without one is generated."""
    task: str = ""
    """reasoning_gym: the task's name."""
    curriculum_threshold: float = 0.0
    """reasoning_gym: mean accuracy of `curriculum_window` steps at which the task's next level of difficulty begins;
    0: the task as it is, without levels."""
    curriculum_window: int = 5
    min_terms: int = 6
    max_terms: int = 8
    """arithmetic, words: terms of a sum; countdown: numbers."""
    operations: Literal["+", "+-"] = "+"
    """arithmetic, words: which signs appear between the terms."""
    max_term: int = 9
    """arithmetic, words, countdown: largest number; the smallest is 1."""
    sandbox: SandboxConfig = SandboxConfig()
    """code: what an answer may use when it is tried."""
    worked_fraction: float = 0.4
    """Share of the base model's documents that show the working; the others guess."""
    step_error_rate: float = 0.02
    """Chance that a step of a worked document is wrong; the error is carried on."""
    guess_std: float = 2.4
    """A guess is the truth plus normal noise of this standard deviation times the root of the number of terms."""
    bare_fraction: float = 1 / 6
    """Share of the guesses that leave the <think> tags out."""
    test_problems: int = 2048
    """Held-out problems, in nothing that is trained on; of files always all of test.jsonl."""

    def __post_init__(self) -> None:
        _require_literals(self)
        _require_positive(self, "max_term", "test_problems")
        _require(self.min_terms >= 2, self, "min_terms", "must be at least 2")
        _require(self.max_terms >= self.min_terms, self, "max_terms", f"must be at least min_terms = {self.min_terms}")
        _require_fraction(self, "worked_fraction", "step_error_rate", "bare_fraction")
        _require_not_negative(self, "guess_std")
        _require_fraction(self, "curriculum_threshold")
        _require_positive(self, "curriculum_window")
        if self.source in ("arithmetic", "words"):
            available = sum(number // 2 for number in arithmetic_problems_by_length(self).values())
            _require(
                self.test_problems <= available,
                self,
                "test_problems",
                f"must not exceed {available}, half of the problems with {self.min_terms} to {self.max_terms} terms"
                f" up to {self.max_term}",
            )
        if self.source in ("gsm8k", "math"):
            _require(bool(self.path), self, "path", "name the folder that holds train.jsonl and test.jsonl")
        elif self.source != "code":
            _require(not self.path, self, "path", f"is for files (--data.source gsm8k); {self.source} is generated")
        if self.source == "reasoning_gym":
            _require(bool(self.task), self, "task", "name a task of reasoning-gym, e.g. chain_sum")
        else:
            _require(not self.task, self, "task", f"is for --data.source reasoning_gym, not for {self.source}")
            _require(
                not self.curriculum_threshold,
                self,
                "curriculum_threshold",
                "is for --data.source reasoning_gym, whose tasks have levels; use 0",
            )


def arithmetic_problems_by_length(config: ProblemConfig) -> dict[int, int]:
    """How many different problems there are, by number of terms."""
    choices = config.max_term * len(config.operations)
    told = 2 if config.source == "words" and config.operations == "+-" else 1  # stories have no amounts below zero
    lengths = range(config.min_terms, config.max_terms + 1)
    return {length: config.max_term * choices ** (length - 1) // told for length in lengths}


@dataclass(frozen=True)
class RewardConfig:
    """The reward is accuracy · (format if `accuracy_needs_format`) plus the parts below, each times its weight.

    A part of weight 0 is not computed, format aside. A part that says nothing of a completion (None) is left out of its
    sum.
    """

    format_weight: float = 0.1
    accuracy_needs_format: bool = True
    partial_credit: bool = False
    """Pay for answers that are partly right where the source can tell (reasoning_gym, code): `credit` in the place of
    accuracy. A policy learns to collect it."""
    language_weight: float = 0.0
    """Share of the thinking's words that are in `language` (DeepSeek-R1)."""
    language: Literal["latin", "zh", "ja", "ko", "ru", "ar", "el", "he", "hi", "th"] = "latin"
    """By script alone: English and French are both "latin"."""
    length_weight: float = 0.0
    """Share of the room that the completion takes; negative favours short ones. The soft punishment of overlong ones is
    `RLConfig.overlong_buffer`."""
    repetition_weight: float = 0.0
    """Minus the share of word n-grams that repeat an earlier one ..."""
    repetition_ngram: int = 3
    """... of so many words."""
    random: bool = False
    """Control: rewards drawn by a coin, blind to the completion."""

    def __post_init__(self) -> None:
        _require_literals(self)
        _require_not_negative(self, "format_weight", "language_weight", "repetition_weight")
        _require_positive(self, "repetition_ngram")


@dataclass(frozen=True)
class PolicyLossConfig:
    """A policy objective, from options that combine (see `losses/policy.py`; `rl/objectives.py` has the named ones)."""

    baseline: Literal["group", "leave_one_out", "batch", "none", "critic"] = "group"
    """What a sample's reward is compared with: its group's mean (GRPO), the mean of the others in its group (RLOO), the
    batch's mean or nothing (REINFORCE), or a critic's value of each token's state (PPO, see `CriticConfig`)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Standard deviation that advantages are divided by: the group's, the batch's, or none (Dr. GRPO). With a critic,
    "batch" whitens the tokens' advantages."""
    surrogate: Literal["clip", "cispo", "reinforce"] = "clip"
    """Clipped ratio times advantage (PPO, GRPO); log-probability weighted by the clipped ratio, a constant, so that no
    token loses its gradient (CISPO); or by the advantage alone (REINFORCE, for one update per batch of samples)."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Whose ratio: each token's, or the geometric mean over the sequence (GSPO)."""
    epsilon: float = 0.2
    """The ratio is clipped to 1 - epsilon (1 or more: not from below) ..."""
    epsilon_high: float = 0.2
    """... and 1 + epsilon_high."""
    beta: float = 0.0
    """Weight of the KL divergence to the reference policy; 0 keeps no reference in memory."""
    kl_estimator: Literal["k1", "k2", "k3", "k3_weighted"] = "k3"
    """How the divergence is estimated from the sampled tokens; `losses.policy.kl_estimate` has the formulas. In the
    loss, k1 pushes nowhere on average, k2 and k3_weighted (DeepSeek-V3.2) have the divergence's gradient."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where the divergence goes: a term of the loss (GRPO), or a penalty on rewards (PPO, RLOO)."""
    aggregation: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"] = (
        "token-mean"
    )
    """Mean over all tokens (DAPO); or over sequences, of their tokens' mean (GRPO), sum, or sum divided by the most
    tokens that a completion may have (Dr. GRPO)."""
    off_policy_mask_threshold: float = 0.0
    """Leave a sequence of negative advantage out when the policy has moved away from it by more than this many nats a
    token (DeepSeek-V3.2); 0 leaves none out."""
    sampler_correction: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = "none"
    """Weights for the difference between the sampler's and the trainer's probabilities: truncated importance sampling,
    or leaving out what exceeds the bound. Costs a forward pass."""
    sampler_correction_max: float = 3.0
    """The bound on these weights."""

    def __post_init__(self) -> None:
        _require_literals(self)
        _require_positive(self, "epsilon", "epsilon_high", "sampler_correction_max")
        _require_not_negative(self, "beta", "off_policy_mask_threshold")
        if self.baseline == "critic":
            _require(
                self.scale_rewards != "group",
                self,
                "scale_rewards",
                "a critic has no groups: use 'batch' (whitened advantages) or 'none'",
            )
        if self.surrogate == "reinforce":
            _require(
                self.importance_sampling_level == "token",
                self,
                "importance_sampling_level",
                "has no effect with surrogate = 'reinforce', which has no ratio; use 'token'",
            )
        if self.kl_in == "reward":
            _require(self.beta > 0, self, "kl_in", "has no effect with beta = 0; use 'loss'")
            _require(
                self.kl_estimator != "k3_weighted",
                self,
                "kl_estimator",
                "is for kl_in = 'loss'; among rewards the ratio is 1, use 'k3'",
            )


@dataclass(frozen=True)
class CriticConfig:
    """PPO's value function and generalised advantage estimation; counts with `PolicyLossConfig.baseline = "critic"`."""

    kind: Literal["separate", "shared"] = "separate"
    """A model of its own, which starts as a copy of the policy; or a second head on the policy's trunk."""
    gamma: float = 1.0
    """Discount of rewards per token."""
    lam: float = 1.0
    """λ of the advantage estimation: 1 takes whole returns, less leans on the critic. DeepSeek-R1's appendix finds 0.95
    far worse for long answers."""
    cliprange_value: float = 0.5
    """Values move at most this far from the old ones before their loss loses its gradient; 0 does not clip."""
    value_loss_coef: float = 0.5
    """shared: weight of the value loss beside the policy's (`vf_coef`)."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5, schedule="constant")
    """separate: how the value model is trained."""

    def __post_init__(self) -> None:
        _require_literals(self)
        _require_fraction(self, "gamma", "lam")
        _require_not_negative(self, "cliprange_value")
        _require_positive(self, "value_loss_coef")


@dataclass(frozen=True)
class RLConfig:
    """Reinforcement learning from verifiable rewards."""

    steps: int = 40
    num_prompts: int = 32
    """Prompts a step."""
    group_size: int = 8
    """Samples per prompt (`num_generations`)."""
    num_iterations: int = 1
    """Passes over a step's samples."""
    num_minibatches: int = 1
    """Optimizer updates per pass."""
    accumulation_steps: int = 1
    """Micro-batches that a minibatch is divided into."""
    share_prompts: bool = True
    """Train the samples of a group in one row behind their prompt, P + G·N tokens instead of G·(P + N), each of which
    sees the prompt and itself. Losses, gradients and metrics are the same but for rounding; minibatches are then of
    whole groups where these divide into them. On a mesh with an axis `context`, which divides sequences, every sample
    still has a row of its own."""
    pack_completions: bool = False
    """Put short completions of a row one after another, so that it has about as many columns as tokens, not as many
    completions times the longest; where a group needs all its columns, nothing is packed. Losses, gradients and metrics
    are the same but for rounding. At most four programs are compiled instead of one, each when it is first needed."""
    one_step_off: bool = False
    """Asynchrony: a step's samples are drawn by the policy that the step before began with, so that scoring and other
    work of the host run while the device draws the next ones. The objective's ratio is to the policy that drew, whose
    weights are kept beside the policy's; the metric `sampling/staleness` counts the updates between the two."""
    mask_truncated_completions: bool = False
    """Leave completions that did not stop by themselves out of the loss."""
    min_active_groups: float = 0.05
    """Skip the update when a smaller share of groups than this has rewards that differ; for baselines from groups."""
    filter_groups: str = ""
    """Dynamic sampling (DAPO): a part of the reward ("accuracy", or "reward" itself) in which the samples of a group
    have to differ; groups in which they do not are replaced by those of fresh problems. Empty: off."""
    max_num_gen_batches: int = 10
    """Dynamic sampling: batches of `num_prompts` problems that a step may sample at most."""
    overlong_buffer: int = 0
    """Soft overlong punishment (DAPO eq. 13): over the last so many of `max_new_tokens` tokens the reward falls, in the
    end by `overlong_penalty`; 0: off."""
    overlong_penalty: float = 1.0
    reference_refresh_steps: int = 0
    """Replace the reference policy by the current one every so many steps; 0 never."""
    loss: PolicyLossConfig = PolicyLossConfig()
    critic: CriticConfig = CriticConfig()
    reward: RewardConfig = RewardConfig()
    sampling: SamplingConfig = SamplingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()

    def __post_init__(self) -> None:
        _require_positive(self, "steps", "num_prompts", "num_iterations", "num_minibatches", "accumulation_steps")
        _require_positive(self, "group_size", "max_num_gen_batches")
        if self.loss.baseline in ("group", "leave_one_out") or self.loss.scale_rewards == "group" or self.filter_groups:
            _require(self.group_size >= 2, self, "group_size", "must be at least 2, an advantage compares samples")
        if self.pack_completions:
            _require(self.share_prompts, self, "pack_completions", "packs rows that share a prompt: set share_prompts")
        _require_not_negative(self, "reference_refresh_steps", "overlong_buffer", "overlong_penalty")
        _require(
            self.overlong_buffer <= self.sampling.max_new_tokens,
            self,
            "overlong_buffer",
            f"must not exceed sampling.max_new_tokens = {self.sampling.max_new_tokens}",
        )
        if self.one_step_off:
            _require(
                not self.filter_groups, self, "one_step_off", "does not go with filter_groups: turn one of them off"
            )
            _require(
                self.loss.surrogate != "reinforce" or self.loss.sampler_correction != "none",
                self,
                "one_step_off",
                "with loss.surrogate = 'reinforce', which has no ratio, needs loss.sampler_correction",
            )
        if self.reference_refresh_steps:
            _require(
                self.loss.beta > 0, self, "reference_refresh_steps", "has no effect with loss.beta = 0: no reference"
            )
        _require_fraction(self, "min_active_groups")
        divisor = self.num_minibatches * self.accumulation_steps
        _require(
            self.num_prompts * self.group_size % divisor == 0,
            self,
            "num_minibatches",
            f"times accumulation_steps = {self.accumulation_steps} must divide num_prompts x group_size ="
            f" {self.num_prompts * self.group_size}",
        )
        _require(
            self.sampling.temperature == 1.0
            and not self.sampling.top_k
            and self.sampling.top_p == 1.0
            and not self.sampling.min_p,
            self,
            "sampling",
            "samples for policy gradients come from the policy itself: temperature 1, no top_k, top_p or min_p",
        )


@dataclass(frozen=True)
class EvaluationConfig:
    samples: int = 8
    """Completions per problem at temperature 1: pass@1 is their mean accuracy, cons@k their majority's."""
    batch_size: int = 256
    """Problems sampled at a time."""
    language: Literal["", "latin", "zh", "ja", "ko", "ru", "ar", "el", "he", "hi", "th"] = ""
    """Measure how much of the thinking is in this language, by script (as `RewardConfig.language`); empty: do not."""

    def __post_init__(self) -> None:
        _require_literals(self)
        _require_positive(self, "samples", "batch_size")


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain nested dictionaries, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(cls: type, values: dict[str, Any]) -> Any:
    """Builds a configuration from what `to_dict` gave.

    Raises:
        ConfigError: an unknown field (the nearest known one is named) or an illegal value.
    """
    hints = get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        if name not in hints:
            near = difflib.get_close_matches(name, list(hints), n=1, cutoff=0)
            raise ConfigError(f"{cls.__name__} has no field {name!r}: did you mean {near[0]!r}?")
        arguments[name] = from_dict(hints[name], value) if dataclasses.is_dataclass(hints[name]) else value
    return cls(**arguments)
