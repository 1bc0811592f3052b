"""Router → dispatch → experts → combine, plus shared experts (DeepSeekMoE, arXiv:2401.06066; DeepSeek-V3 eq. 12).

B batch, S sequence, T tokens (B·S), D model, F feed-forward, E experts, K experts per token, R rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moe_jax.config import ModelConfig
from moe_jax.model.dispatch import dispatch, within_capacity
from moe_jax.model.layers import Initializer, SwiGLU, gated
from moe_jax.model.router import Router, RouterStats, router_stats
from moe_jax.ops.grouped_matmul import grouped_matmul


def run_experts(
    rows_RD: Array, weights_R: Array, group_sizes_E: Array, gate_up_ED2F: Array, down_EFD: Array
) -> Array:
    """Each row's SwiGLU times its mixing weight, [R, D]; rows are sorted by expert.

    The weight multiplies the narrower inside of the feed-forward, not its output: then the gradient needs no output to
    be kept, and adding up a token's experts is a plain sum.
    """
    E, D, _, F = gate_up_ED2F.shape
    gate_up_RF = grouped_matmul(rows_RD, gate_up_ED2F.reshape(E, D, 2 * F), group_sizes_E)
    return grouped_matmul(gated(gate_up_RF.reshape(-1, 2, F)) * weights_R[:, None].astype(rows_RD.dtype), down_EFD, group_sizes_E)


class Experts(nnx.Module):
    """E SwiGLU feed-forwards, stacked; gate and up are one product."""

    def __init__(self, cfg: ModelConfig, init: Initializer):
        E, D, F = cfg.moe.num_experts, cfg.hidden_size, cfg.moe.expert_size
        self.cfg = cfg.moe
        self.axes = ("expert", "embed", None, "mlp"), ("expert", "mlp", "embed")
        self.gate_up_ED2F = init.weight((E, D, 2, F), self.axes[0], "bioo")
        self.down_EFD = init.weight((E, F, D), self.axes[1], "bio")

    def __call__(self, x_BSD: Array, experts_BSK: Array, weights_BSK: Array) -> Array:
        """Σ_k weight · expert(x), [B, S, D]; expert number E is none."""
        arrays = [array[...].astype(x_BSD.dtype) for array in (self.gate_up_ED2F, self.down_EFD)]
        y_BSD = dispatch(x_BSD, experts_BSK, weights_BSK, arrays, self.axes, run_experts, self.cfg)
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
        self, x_BSD: Array, valid_BS: Array, keys_BS: Array, layer: Array | int, drop: bool
    ) -> tuple[Array, RouterStats]:
        """The layer's output and its statistics. Padding (not valid) is not counted, and no expert works on it.

        `keys_BS` and `layer` are for routers that are not learned; `drop` applies the capacity, if there is one.
        """
        B, S, D = x_BSD.shape
        with jax.named_scope("router"):
            routed = self.router(x_BSD.reshape(B * S, D), keys_BS.reshape(B * S), layer)
            valid_T1 = valid_BS.reshape(B * S, 1)
            experts_TK = jnp.where(valid_T1, routed.experts_TK, self.cfg.num_experts)
            dropped_T = jnp.zeros(B * S)
            if drop and self.cfg.capacity_factor:
                affinity_TK = jnp.take_along_axis(routed.scores_TE, routed.experts_TK, axis=1)
                kept_TK = within_capacity(experts_TK, affinity_TK, self.cfg)
                dropped_T = jnp.sum(kept_TK != experts_TK, axis=1, dtype=jnp.float32)
                experts_TK = kept_TK
        with jax.named_scope("experts"):
            y_BSD = self.experts(x_BSD, experts_TK.reshape(B, S, -1), routed.weights_TK.reshape(B, S, -1))
        if self.shared is not None:
            with jax.named_scope("shared_experts"):
                y_BSD += self.shared(x_BSD)
        return y_BSD, router_stats(routed, valid_BS, dropped_T, self.cfg)
