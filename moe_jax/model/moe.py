"""Router → dispatch → experts → combine, plus shared experts (DeepSeekMoE, arXiv:2401.06066; DeepSeek-V3 eq. 12).

B batch, S sequence, T tokens (B·S), D model, F feed-forward, E experts, K experts per token, R rows.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from moe_jax.config import ModelConfig
from moe_jax.model.dispatch import Slots, Work, dispatch, within_capacity
from moe_jax.model.layers import Initializer, Rounding, SwiGLU, gate_and_up, gated, gated_gradient
from moe_jax.model.router import Router, RouterStats, router_stats
from moe_jax.ops.grouped_matmul import Gathered, product, weight_gradient
from moe_jax.ops.packed_matmul import packed_grouped_matmul
from moe_jax.ops.quantization import Quantized, rounded
from moe_jax.ops.quantized_matmul import Recipe, low_precision_grouped_matmul


@jax.custom_vjp
def run_experts(
    x_TD: Array, weights_TK: Array, slots: Slots, group_sizes_E: Array, gate_up_ED2F: Array, down_EFD: Array
) -> Array:
    """Each token's weighted sum over its experts, [T, D] float32; slots are sorted by expert.

    The mixing weight multiplies the narrower inside of the feed-forward, not its output, so that a token's sum is a
    plain one. The gradient is written out: it keeps tokens and the insides of experts, nothing of K tokens' width.
    """
    return _run_experts_forward(x_TD, weights_TK, slots, group_sizes_E, gate_up_ED2F, down_EFD)[0]


def _run_experts_forward(
    x_TD: Array, weights_TK: Array, slots: Slots, group_sizes_E: Array, gate_up_ED2F: Array, down_EFD: Array
) -> tuple[Array, tuple]:
    weights_S = slots.assignments(weights_TK)
    gate_up_SF = product(Gathered(x_TD, slots.token_S), _matrices(gate_up_ED2F), group_sizes_E)
    gate_up_S2F = gate_up_SF.reshape(-1, 2, down_EFD.shape[1])
    inside_SF = gated(gate_up_S2F) * weights_S[:, None].astype(x_TD.dtype)
    gate_SF, up_SF, inside_SF = (checkpoint_name(a, "insides") for a in (*gate_and_up(gate_up_S2F), inside_SF))
    y_TD = slots.sums(product(inside_SF, down_EFD, group_sizes_E))
    return y_TD, (x_TD, weights_S, slots, group_sizes_E, gate_up_ED2F, down_EFD, gate_SF, up_SF, inside_SF)


def _run_experts_backward(residuals: tuple, dy_TD: Array) -> tuple:
    x_TD, weights_S, slots, group_sizes_E, gate_up_ED2F, down_EFD, gate_SF, up_SF, inside_SF = residuals
    dy_SD = Gathered(dy_TD.astype(x_TD.dtype), slots.token_S)
    dinside_SF = product(dy_SD, down_EFD, group_sizes_E, transpose_w=True)
    ddown_EFD = weight_gradient(inside_SF, dy_SD, group_sizes_E)
    # Where a weight is 0, so is the score that it is made of and with it the score's gradient, whatever is said here.
    dweights_S = jnp.einsum("SF,SF->S", dinside_SF, inside_SF, preferred_element_type=jnp.float32)
    used_S = weights_S.astype(x_TD.dtype).astype(weights_S.dtype)
    dweights_S /= jnp.where(used_S == 0, 1, used_S)

    dgated_SF = dinside_SF * weights_S[:, None].astype(x_TD.dtype)
    dgate_up_SF = gated_gradient((gate_SF, up_SF), dgated_SF).reshape(len(inside_SF), -1)
    dgate_up_EDF = weight_gradient(Gathered(x_TD, slots.token_S), dgate_up_SF, group_sizes_E)
    dx_TD = slots.sums(product(dgate_up_SF, _matrices(gate_up_ED2F), group_sizes_E, transpose_w=True))
    dweights_TK = slots.per_assignment(dweights_S)
    return dx_TD.astype(x_TD.dtype), dweights_TK, None, None, dgate_up_EDF.reshape(gate_up_ED2F.shape), ddown_EFD


def _matrices(gate_up_ED2F: Array) -> Array:
    return gate_up_ED2F.reshape(*gate_up_ED2F.shape[:2], -1)


run_experts.defvjp(_run_experts_forward, _run_experts_backward)


def run_low_precision_experts(
    x_TD: Array,
    weights_TK: Array,
    slots: Slots,
    group_sizes_E: Array,
    gate_up_ED2F: Array,
    down_EFD: Array,
    recipe: Recipe,
) -> Array:
    """`run_experts` with products in 8 bits; each keeps its sorted rows in 8 bits for its gradient, as V3 does."""
    weights_S = slots.assignments(weights_TK)
    tokens_SD = slots.tokens(x_TD)
    gate_up_SF = low_precision_grouped_matmul(tokens_SD, _matrices(gate_up_ED2F), group_sizes_E, recipe)
    gate_up_SF = checkpoint_name(gate_up_SF, "insides")
    inside_SF = gated(gate_up_SF.reshape(-1, 2, down_EFD.shape[1])) * weights_S[:, None].astype(x_TD.dtype)
    return slots.sums(low_precision_grouped_matmul(inside_SF, down_EFD, group_sizes_E, recipe))


def run_rounded_experts(
    x_TD: Array,
    weights_TK: Array,
    slots: Slots,
    group_sizes_E: Array,
    gate_up_ED2F: Array,
    down_EFD: Array,
    rounding: Rounding,
) -> Array:
    """`run_experts` with weights rounded to 4 bits, straight through."""
    block = (rounding.block, 1)
    gate_up_EDF, down_EFD = (rounded(w, "int4", block) for w in (_matrices(gate_up_ED2F), down_EFD))
    return run_experts(x_TD, weights_TK, slots, group_sizes_E, gate_up_EDF.reshape(gate_up_ED2F.shape), down_EFD)


def run_packed_experts(
    x_TD: Array,
    weights_TK: Array,
    slots: Slots,
    group_sizes_E: Array,
    gate_up: Quantized,
    down: Quantized,
) -> Array:
    """`run_experts` of packed weights [E, 2F, D] and [E, D, F] (`ops.packed_matmul`), without gradients."""
    weights_S = slots.assignments(weights_TK)
    gate_up_SF = packed_grouped_matmul(slots.tokens(x_TD), gate_up, group_sizes_E)
    inside_SF = gated(gate_up_SF.reshape(len(weights_S), 2, -1)) * weights_S[:, None].astype(x_TD.dtype)
    return slots.sums(packed_grouped_matmul(inside_SF, down, group_sizes_E))


def _work(quantization: Recipe | Rounding | None) -> Work:
    if quantization is None:
        return run_experts
    if isinstance(quantization, Rounding):
        return partial(run_rounded_experts, rounding=quantization)
    return partial(run_low_precision_experts, recipe=quantization)


class Experts(nnx.Module):
    """E SwiGLU feed-forwards, stacked; gate and up are one product."""

    def __init__(self, cfg: ModelConfig, init: Initializer):
        E, D, F = cfg.moe.num_experts, cfg.hidden_size, cfg.moe.expert_size
        self.cfg, self.recomputed = cfg.moe, cfg.remat != "none"
        self.axes = ("expert", "embed", None, "mlp"), ("expert", "mlp", "embed")
        self.gate_up_ED2F = init.weight((E, D, 2, F), self.axes[0], "bioo")
        self.down_EFD = init.weight((E, F, D), self.axes[1], "bio")

    def __call__(self, x_BSD: Array, experts_BSK: Array, weights_BSK: Array) -> Array:
        """Σ_k weight · expert(x), [B, S, D]; expert number E is none."""
        gate_up, down = self.gate_up_ED2F[...], self.down_EFD[...]
        if isinstance(gate_up, Quantized):
            gate_up = jax.tree.map(lambda a: a.reshape(len(a), -1, a.shape[-1]), gate_up)  # [E, 2, F, D] → [E, 2F, D]
            axes, work = (("expert", None, None),) * 2, run_packed_experts
        else:
            gate_up, down = gate_up.astype(x_BSD.dtype), down.astype(x_BSD.dtype)
            axes, work = self.axes, _work(self.gate_up_ED2F.get_metadata("quantization"))
        y_BSD = dispatch(x_BSD, experts_BSK, weights_BSK, (gate_up, down), axes, work, self.cfg, self.recomputed)
        return y_BSD.astype(x_BSD.dtype)


class MoE(nnx.Module):
    """A sparse feed-forward layer."""

    def __init__(self, cfg: ModelConfig, init: Initializer):
        self.cfg = cfg.moe
        self.router = Router(cfg, init)
        self.experts = Experts(cfg, init)
        shared = cfg.moe.num_shared_experts
        self.shared = SwiGLU(cfg.hidden_size, shared * cfg.moe.expert_size, init) if shared else None

    def __call__(
        self,
        x_BSD: Array,
        valid_BS: Array,
        keys_BS: Array,
        layer: Array | int,
        drop: bool,
        counted_BS: Array | None = None,
    ) -> tuple[Array, RouterStats]:
        """The layer's output and its statistics. Padding (not valid) is not counted, and no expert works on it.

        `keys_BS` and `layer` are for routers that are not learned; `drop` applies the capacity, if there is one;
        `counted_BS` leaves further tokens out of the statistics.
        """
        with jax.named_scope("router"):
            routed = self.router(x_BSD, keys_BS, layer)
            experts_BSK = jnp.where(valid_BS[..., None], routed.experts_TK, self.cfg.num_experts)
            dropped_BS = jnp.zeros(valid_BS.shape)
            if drop and self.cfg.capacity_factor:
                affinity_BSK = jnp.take_along_axis(routed.scores_TE, routed.experts_TK, axis=-1)
                kept_BSK = within_capacity(experts_BSK, affinity_BSK, self.cfg)
                dropped_BS = jnp.sum(kept_BSK != experts_BSK, axis=-1, dtype=jnp.float32)
                experts_BSK = kept_BSK
        with jax.named_scope("experts"):
            y_BSD = self.experts(x_BSD, experts_BSK, routed.weights_TK)
        if self.shared is not None:
            with jax.named_scope("shared_experts"):
                y_BSD += self.shared(x_BSD)
        counted_BS = valid_BS if counted_BS is None else counted_BS & valid_BS
        with jax.named_scope("router"):
            return y_BSD, router_stats(routed, counted_BS, dropped_BS, self.cfg)
