"""Router → dispatch → experts → combine, plus shared experts (DeepSeekMoE, arXiv:2401.06066; DeepSeek-V3 eq. 12).

B batch, S sequence, T tokens (B·S), D model, F feed-forward, E experts, K experts per token, R rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moe_jax.config import ModelConfig
from moe_jax.model.dispatch import dispatch
from moe_jax.model.layers import Initializer, SwiGLU
from moe_jax.model.router import Router, RouterStats, router_stats
from moe_jax.ops.grouped_matmul import grouped_matmul


class Experts(nnx.Module):
    """E SwiGLU feed-forwards, stacked; gate and up are one product, [gate | up] along F."""

    def __init__(self, cfg: ModelConfig, init: Initializer):
        E, D, F = cfg.moe.num_experts, cfg.hidden_size, cfg.moe.expert_size
        self.gate_up_EDF = init.weight((E, D, 2 * F), ("expert", "embed", "mlp"), "bio")
        self.down_EFD = init.weight((E, F, D), ("expert", "mlp", "embed"), "bio")

    def __call__(self, rows_RD: Array, group_sizes_E: Array) -> Array:
        """The experts' work on rows sorted by expert."""
        gate_up = grouped_matmul(rows_RD, self.gate_up_EDF[...].astype(rows_RD.dtype), group_sizes_E)
        gate, up = jnp.split(gate_up, 2, axis=-1)
        return grouped_matmul(jax.nn.silu(gate) * up, self.down_EFD[...].astype(rows_RD.dtype), group_sizes_E)


class MoE(nnx.Module):
    """A sparse feed-forward layer."""

    def __init__(self, cfg: ModelConfig, init: Initializer):
        self.cfg = cfg.moe
        self.router = Router(cfg, init)
        self.experts = Experts(cfg, init)
        shared = cfg.moe.num_shared_experts
        self.shared = SwiGLU(cfg.hidden_size, shared * cfg.moe.expert_size, init) if shared else None

    def __call__(self, x_BSD: Array, valid_BS: Array) -> tuple[Array, RouterStats]:
        """The layer's output and its statistics; tokens that are not valid (padding) are not counted."""
        B, S, D = x_BSD.shape
        x_TD = x_BSD.reshape(B * S, D)
        with jax.named_scope("router"):
            routed = self.router(x_TD)
        with jax.named_scope("experts"):
            y_TKD = dispatch(x_TD, routed.experts_TK, self.cfg.num_experts, self.experts)
            y_TD = jnp.einsum("TKD,TK->TD", y_TKD, routed.weights_TK).astype(x_BSD.dtype)  # in the weights' float32
        y_BSD = y_TD.reshape(B, S, D)
        if self.shared is not None:
            with jax.named_scope("shared_experts"):
                y_BSD += self.shared(x_BSD)
        return y_BSD, router_stats(routed, valid_BS)
