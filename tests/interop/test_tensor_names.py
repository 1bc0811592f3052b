"""DeepSeek-V3's prediction module as its release has it: layer 61 of `model.safetensors.index.json`."""

from moe_jax.interop.tensor_names import EXPERTS, entries
from moe_jax.model.definition import Definition
from moe_jax.presets import deepseek_v3

D, V, LATENT, HEADS, EXPERT, ROUTED = 7168, 129_280, 512, 128, 2048, 256
OWN = {  # README_WEIGHTS.md; the block is one of the model's
    "enorm.weight": (D,),
    "hnorm.weight": (D,),
    "eh_proj.weight": (D, 2 * D),
    "shared_head.norm.weight": (D,),
    "embed_tokens.weight": (V, D),
    "shared_head.head.weight": (V, D),
    "input_layernorm.weight": (D,),
    "post_attention_layernorm.weight": (D,),
    "self_attn.q_a_proj.weight": (1536, D),
    "self_attn.q_a_layernorm.weight": (1536,),
    "self_attn.q_b_proj.weight": (HEADS * 192, 1536),
    "self_attn.kv_a_proj_with_mqa.weight": (LATENT + 64, D),
    "self_attn.kv_a_layernorm.weight": (LATENT,),
    "self_attn.kv_b_proj.weight": (HEADS * 256, LATENT),
    "self_attn.o_proj.weight": (D, HEADS * 128),
    "mlp.gate.weight": (ROUTED, D),
    "mlp.gate.e_score_correction_bias": (ROUTED,),
}
FEED_FORWARD = {"gate_proj": (EXPERT, D), "up_proj": (EXPERT, D), "down_proj": (D, EXPERT)}


def test_layer_61_of_deepseek_v3_feeds_the_module_and_repeats_embedding_and_head():
    wanted = dict(OWN)
    for kind, shape in FEED_FORWARD.items():
        wanted[f"mlp.shared_experts.{kind}.weight"] = shape
        wanted |= {f"mlp.experts.{e}.{kind}.weight": shape for e in range(ROUTED)}
    definition = Definition.of(deepseek_v3())
    found, arrays = {}, {}
    for entry in entries(definition.cfg, EXPERTS):
        name = entry.tensor.removeprefix("model.layers.61.")
        if name != entry.tensor:
            found[name] = entry.tensor_shape(definition.variables[entry.array].shape)
            arrays[name] = entry
    assert found == wanted
    copies = {name: entry.array for name, entry in arrays.items() if entry.is_copy}
    assert copies == {"embed_tokens.weight": "embed_VD", "shared_head.head.weight": "head_DV"}
    assert {entry.array for entry in arrays.values() if not entry.is_copy} == {
        name for name in definition.variables if name.startswith("mtp.")
    }
