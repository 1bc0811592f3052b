"""A dense model as a sparse one that computes the same: sparse upcycling (Komatsuzaki et al., arXiv:2212.05055).

L layers, D model, F feed-forward, E experts.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from moe_jax.config import ConfigError, ModelConfig, MoEConfig
from moe_jax.model.definition import Arrays, Definition

_FFN, _EXPERTS = ".ffn.", ".ffn.experts."
_ARRAYS = {"gate_up_D2F": "gate_up_ED2F", "down_FD": "down_EFD"}


def upcycled_config(dense: ModelConfig, num_experts: int, experts_per_token: int = 2) -> ModelConfig:
    """The sparse model: every feed-forward becomes experts of its size, chosen by a softmax.

    Mixing weights add up to 1 and there is no shared expert, so that copies of one expert compute what it computes; of
    one expert a token (k = 1) the weight would always be 1 and the router never learn. Qwen3 and Llama become what
    `transformers` calls qwen3_moe and mixtral. Which balance loss training is to use is left to it.

    Raises:
        ConfigError: the model is sparse, or the numbers of experts are not legal.
    """
    if dense.moe.num_experts:
        raise ConfigError(f"moe.num_experts = {dense.moe.num_experts}: only a dense model can be upcycled")
    if not 2 <= experts_per_token <= num_experts:
        raise ConfigError(
            f"experts_per_token = {experts_per_token}: must be at least 2, or the router has nothing to learn, and at"
            f" most num_experts = {num_experts}"
        )
    moe = MoEConfig(
        num_experts=num_experts,
        num_experts_per_token=experts_per_token,
        expert_size=dense.intermediate_size,
        score="softmax",
        selection_bias=False,
        bias_update_rate=0.0,
        sequence_balance_coef=0.0,
    )
    return replace(dense, moe=moe, first_k_dense=0)


def upcycle(
    dense: Definition, params: Arrays, sparse: Definition, key: Array, mesh: Mesh | None = None
) -> tuple[Arrays, Arrays]:
    """(params, rest) of the model that `upcycled_config` describes: each expert is a copy of the layer's feed-forward,
    the router is new, all else is the dense model's, and so are its logits.

    Copies that see the same tokens would stay copies: they part as the router sends them different ones, and as long as
    they are equal, the router itself has no gradient.

    Args:
        dense, params: the dense model.
        sparse: of its upcycled config.
        key: draws the routers.
        mesh: where the new weights lie.
    """

    def make(params: Arrays, key: Array) -> tuple[Arrays, Arrays]:
        found = {}
        for name, array in params.items():
            name = name.replace("dense_blocks.", "moe_blocks.")
            if _FFN in name:
                stack, _, own = name.rpartition(_FFN)
                shape = (len(array), sparse.cfg.moe.num_experts, *array.shape[1:])
                name, array = f"{stack}{_EXPERTS}{_ARRAYS[own]}", jnp.broadcast_to(array[:, None], shape)
            found[name] = array
        routers = [name for name in sparse.param_names if name.endswith(".ffn.router.gate_DE")]
        for name, router_key in zip(routers, jax.random.split(key, len(routers)), strict=True):
            shape = sparse.variables[name].shape
            found[name] = sparse.cfg.initializer_range * jax.random.normal(router_key, shape, jnp.float32)
        return {name: found[name] for name in sparse.param_names}, {}

    return jax.jit(make, out_shardings=sparse.shardings(mesh) if mesh else None)(params, key)
