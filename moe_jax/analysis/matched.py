"""Models of different shape that cost the same: sparse against dense, MLA against GQA, at equal FLOPs or parameters.

Width and depth stay; the feed-forward's width takes up what the other changes add or spare. Counts are those of
`flops.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from moe_jax.analysis.flops import parameter_counts, training_flops_per_token
from moe_jax.config import AttentionConfig, ConfigError, ModelConfig, MoEConfig

Quantity = Literal["flops", "active", "total"]


@dataclass(frozen=True)
class Shape:
    """The shape that a model should take. Fields that are 0 or "keep" leave the base model's as it is."""

    activation_ratio: float = 0.0
    """Experts that a token uses over all experts, shared ones counted in both (arXiv:2507.17702); 0 keeps the base's
    feed-forward, dense or sparse, and changes its width alone."""
    granularity: int = 0
    """Experts that a token uses, shared ones included: at equal FLOPs each is about 1/G as wide as the dense
    feed-forward (arXiv:2402.07871)."""
    num_shared_experts: int = 0
    first_k_dense: int = 0
    """Leading dense layers of a sparse model, as wide as the base's."""
    attention: Literal["keep", "mla", "gqa", "mha"] = "keep"
    """MLA takes DeepSeek-V2's proportions to a head's width: latent 4, rotary part 1/2. GQA shares keys and values
    among 4 heads, or 2 where their number is not divisible by 4; MHA among none."""

    def __post_init__(self) -> None:
        if self.attention not in ("keep", "mla", "gqa", "mha"):
            raise ConfigError(f"Shape.attention = {self.attention!r}: must be one of keep, mla, gqa, mha")
        if not 0 <= self.activation_ratio < 1:
            raise ConfigError(
                f"Shape.activation_ratio = {self.activation_ratio}: must be at least 0 and less than 1; for a dense"
                " model leave it at 0 with a dense base"
            )
        if not self.activation_ratio:
            for name in ("granularity", "num_shared_experts", "first_k_dense"):
                if getattr(self, name):
                    raise ConfigError(f"Shape.{name} = {getattr(self, name)}: needs activation_ratio > 0")
        elif self.num_shared_experts < 0 or self.granularity <= self.num_shared_experts:
            raise ConfigError(
                f"Shape.granularity = {self.granularity}: must exceed num_shared_experts ="
                f" {self.num_shared_experts} (which must not be negative), so that a token uses a routed expert"
            )


@dataclass(frozen=True)
class Matched:
    """A configuration, and how closely it matches its base."""

    config: ModelConfig
    by: Quantity
    relative_error: dict[str, float]
    """"flops", "active" and "total": this over the base's, minus 1; that of `by` is the one to be small."""
    activation_ratio: float
    """What whole numbers of experts came to; 1 for a dense model."""
    granularity: float
    """The base's feed-forward width over an expert's (over the feed-forward's, for a dense model)."""


def match(
    base: ModelConfig,
    shape: Shape,
    by: Quantity = "flops",
    *,
    sequence_length: int,
    multiple: int = 8,
    tolerance: float = 0.05,
) -> Matched:
    """Gives `base` another shape at equal cost.

    Args:
        base: what to match; its other settings (vocabulary, router, balancing, MTP) are kept. Its
            `routed_scaling_factor` is too: `router.estimated_scaling_factor` gives one for the new number of experts.
        shape: of the result.
        by: "flops": training FLOPs per token, with MTP modules; "active": parameters that a token uses, without
            embeddings; "total": all parameters, with embeddings.
        sequence_length: tokens, for the FLOPs of attention.
        multiple: feed-forward widths are a multiple of this; 64 or 128 suits tensor cores and TPUs.
        tolerance: largest relative error that is accepted.

    Raises:
        ConfigError: no width gives the match.
    """
    if by not in ("flops", "active", "total"):
        raise ConfigError(f"match: by = {by!r}: must be one of flops, active, total")
    if multiple < 1:
        raise ConfigError(f"match: multiple = {multiple}: must be at least 1")
    goal, shaped = _costs(base, sequence_length), _shaped(base, shape)
    sparse = shaped.moe.num_experts > 0
    name = "expert_size" if sparse else "intermediate_size"
    width = _solve(lambda width: _costs(_with_width(shaped, width), sequence_length)[by], goal[by], multiple)
    if width < multiple:
        remedy = "lower granularity, raise activation_ratio" if sparse else "choose a leaner attention"
        raise ConfigError(
            f"match: {name} = {width}: less than multiple = {multiple} would match {by} = {goal[by]:,} of the base;"
            f" {remedy}, lower multiple, or start from a larger base"
        )
    config = _with_width(shaped, width)
    costs = _costs(config, sequence_length)
    errors = {key: costs[key] / goal[key] - 1 for key in costs}
    if abs(errors[by]) > tolerance:
        raise ConfigError(
            f"match: tolerance = {tolerance}: {name} = {width} is the nearest multiple of {multiple} and differs by"
            f" {errors[by]:+.1%} in {by}; lower multiple or granularity, or raise tolerance"
        )
    m = config.moe
    active, experts = m.num_experts_per_token + m.num_shared_experts, m.num_experts + m.num_shared_experts
    return Matched(config, by, errors, active / experts if sparse else 1.0, base.intermediate_size / width)


def dense_family(
    base: ModelConfig,
    num_layers: Sequence[int],
    *,
    aspect_ratio: float = 32.0,
    feed_forward_ratio: float = 8 / 3,
    multiple: int = 8,
) -> list[ModelConfig]:
    """Dense models of one shape in several sizes: hidden = aspect_ratio · layers, in whole heads of the base's width.

    Args:
        base: vocabulary, kind of attention, width of a head and everything else that sizes share. GQA keeps its heads
            per key head where their number allows; MLA keeps its latent, which is a matter of a head's width.
        num_layers: of each model, ascending.
        aspect_ratio: hidden size per layer: about 32 is usual for models that train on a laptop, 128 at 7B.
        feed_forward_ratio: feed-forward width per hidden size; 8/3 gives SwiGLU the parameters of a plain 4.
        multiple: feed-forward widths are a multiple of this.

    Raises:
        ConfigError: no ascending list of positive depths, a ratio that is not positive.
    """
    if not num_layers or min(num_layers) < 1 or list(num_layers) != sorted(set(num_layers)):
        raise ConfigError(f"dense_family: num_layers = {list(num_layers)}: must be positive and ascending")
    for name, value in (("aspect_ratio", aspect_ratio), ("feed_forward_ratio", feed_forward_ratio)):
        if value <= 0:
            raise ConfigError(f"dense_family: {name} = {value}: must be greater than 0")
    a = base.attention
    head = _head_width(a)
    family = []
    for layers in num_layers:
        heads = max(1, round(aspect_ratio * layers / head))
        kv_heads = heads
        if a.kind == "gqa" and heads % (a.num_heads // a.num_kv_heads) == 0:
            kv_heads = heads // (a.num_heads // a.num_kv_heads)
        width = max(1, round(feed_forward_ratio * heads * head / multiple)) * multiple
        family.append(
            dataclasses.replace(
                base,
                num_layers=layers,
                hidden_size=heads * head,
                intermediate_size=width,
                first_k_dense=0,
                attention=dataclasses.replace(a, num_heads=heads, num_kv_heads=kv_heads),
                moe=dataclasses.replace(base.moe, num_experts=0),
            )
        )
    return family


def _costs(cfg: ModelConfig, sequence_length: int) -> dict[str, int]:
    counts = parameter_counts(cfg)
    flops = training_flops_per_token(cfg, sequence_length, include_mtp=True)
    return {"flops": flops, "active": counts.active_non_embedding, "total": counts.total}


def _solve(cost: Callable[[int], int], goal: int, multiple: int) -> int:
    """The multiple whose cost is nearest to the goal; costs are affine in the width, so two of them tell all."""
    at_one, slope = cost(multiple), (cost(2 * multiple) - cost(multiple))
    return (1 + round((goal - at_one) / slope)) * multiple


def _with_width(cfg: ModelConfig, width: int) -> ModelConfig:
    if cfg.moe.num_experts:
        return dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, expert_size=width))
    return dataclasses.replace(cfg, intermediate_size=width)


def _shaped(base: ModelConfig, shape: Shape) -> ModelConfig:
    """The base with the shape's attention and numbers of experts, its widths not matched yet."""
    attention = _attention(base.attention, shape.attention)
    if not shape.activation_ratio:
        return dataclasses.replace(base, attention=attention)
    routed = round(shape.granularity / shape.activation_ratio) - shape.num_shared_experts
    groups = base.moe.num_groups
    experts = max(1, round(routed / groups)) * groups
    chosen = shape.granularity - shape.num_shared_experts
    if experts <= chosen:
        raise ConfigError(
            f"Shape.activation_ratio = {shape.activation_ratio}: a token would use {chosen} of {experts} routed"
            " experts, which is not sparse; lower it, or raise granularity"
        )
    moe: MoEConfig = dataclasses.replace(
        base.moe,
        num_experts=experts,
        num_experts_per_token=chosen,
        num_shared_experts=shape.num_shared_experts,
    )
    return dataclasses.replace(base, attention=attention, moe=moe, first_k_dense=shape.first_k_dense)


def _attention(a: AttentionConfig, kind: str) -> AttentionConfig:
    head, heads = _head_width(a), a.num_heads
    if kind == "mla" and a.kind != "mla":
        rotary = 2 * max(1, round(head / 4))  # half a head, and even
        return dataclasses.replace(
            a,
            kind="mla",
            q_lora_rank=0,
            kv_lora_rank=4 * head,
            qk_nope_head_dim=head,
            qk_rope_head_dim=rotary,
            v_head_dim=head,
            qk_norm="none",
            qkv_bias=False,
        )
    if kind == "gqa":
        if heads % 2:
            raise ConfigError(
                f"Shape.attention = 'gqa': {heads} heads cannot share keys and values in pairs; choose a base with an"
                " even number of heads, or 'mha'"
            )
        return dataclasses.replace(a, kind="gqa", head_dim=head, num_kv_heads=heads // (2 if heads % 4 else 4))
    if kind == "mha":
        return dataclasses.replace(a, kind="gqa", head_dim=head, num_kv_heads=heads)
    return a


def _head_width(a: AttentionConfig) -> int:
    return a.head_dim if a.kind == "gqa" else a.v_head_dim
