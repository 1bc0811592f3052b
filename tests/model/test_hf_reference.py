"""Routers and rotary embeddings against Hugging Face transformers 5.23.0; whole models: `interop/test_parity.py`.

`hf_reference.npz` holds what transformers computed (see `interop/make_reference.py`), so that no PyTorch is needed.

T tokens, E experts.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import presets
from moe_jax.config import MoEConfig, RoPEConfig
from moe_jax.model.layers import rope_frequencies, rotation, yarn_mscale
from moe_jax.model.router import route

TOLERANCE = 2e-5
"""Of the largest value; float32 noise is ten times smaller."""


ROUTERS = {
    "deepseek_v3": MoEConfig(
        num_experts=32,
        num_experts_per_token=6,
        num_groups=8,
        num_groups_per_token=3,
        routed_scaling_factor=2.5,
    ),
    "deepseek_v3_not_normalized": MoEConfig(
        num_experts=32, num_experts_per_token=6, num_groups=8, num_groups_per_token=3, normalize_weights=False
    ),
    "deepseek_v2": MoEConfig(
        num_experts=32,
        num_experts_per_token=6,
        score="softmax",
        num_groups=8,
        num_groups_per_token=3,
        group_score="max",
        normalize_weights=False,
        routed_scaling_factor=16.0,
        selection_bias=False,
    ),
    "deepseek_v2_lite": MoEConfig(
        num_experts=32, num_experts_per_token=6, score="softmax", normalize_weights=False, selection_bias=False
    ),
    "mixtral": MoEConfig(num_experts=32, num_experts_per_token=6, score="softmax", selection_bias=False),
    "qwen3_moe": MoEConfig(num_experts=32, num_experts_per_token=6, score="softmax", selection_bias=False),
    "olmoe": MoEConfig(
        num_experts=32, num_experts_per_token=6, score="softmax", normalize_weights=False, selection_bias=False
    ),
}


@functools.cache
def reference(name: str) -> dict[str, np.ndarray]:
    """The stored arrays whose name starts with `name/`; float16 becomes float32."""
    with np.load(pathlib.Path(__file__).with_name("hf_reference.npz")) as file:
        arrays = {key.removeprefix(f"{name}/"): file[key] for key in file.files if key.startswith(f"{name}/")}
    return {key: array.astype(np.float32) if array.dtype == np.float16 else array for key, array in arrays.items()}


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * np.abs(theirs).max())


@pytest.mark.parametrize("name", ROUTERS)
def test_router(name):
    """The mixing weight of every expert for every token, 0 where it is not chosen."""
    stored, cfg = reference(f"router/{name}"), ROUTERS[name]
    logits_TE = jnp.einsum("TD,DE->TE", stored["x_TD"], stored["gate_DE"])
    scores_TE = jax.nn.sigmoid(logits_TE) if cfg.score == "sigmoid" else jax.nn.softmax(logits_TE, axis=-1)
    routed = route(scores_TE, stored["bias_E"] if cfg.selection_bias else None, cfg)
    mixing_TE = np.zeros(scores_TE.shape, np.float32)
    np.put_along_axis(mixing_TE, np.asarray(routed.experts_TK), np.asarray(routed.weights_TK), axis=1)
    assert_close(mixing_TE, stored["mixing_TE"])


@pytest.mark.parametrize(
    ("name", "rope"),
    [
        ("deepseek_v3", presets.deepseek_v3().attention.rope),
        ("deepseek_v2", presets.deepseek_v2().attention.rope),
        ("kimi_k2", presets.kimi_k2().attention.rope),
        ("llama_3_1", presets.llama_3_1_8b().attention.rope),
        ("yarn_defaults", RoPEConfig(theta=1e6, scaling="yarn", factor=4.0, original_max_position=32_768)),
    ],
)
def test_rope_of_released_models(name, rope):
    """Frequencies, the length of the rotation, and YaRN's factor of the softmax."""
    stored = reference(f"rope/{name}")
    np.testing.assert_allclose(rope_frequencies(rope, 64), stored["frequencies"], rtol=3e-6)
    rot = rotation(jnp.array([[1234]]), rope, 64)
    softmax_scale = yarn_mscale(rope.factor, rope.mscale_all_dim) ** 2 if rope.scaling == "yarn" else 1.0
    scales = [np.hypot(rot.cos_BSR, rot.sin_BSR)[0, 0, 0], softmax_scale]
    np.testing.assert_allclose(scales, stored["scales"], rtol=1e-6)
