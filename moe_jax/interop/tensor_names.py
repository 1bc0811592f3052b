"""Tensor names of Hugging Face checkpoints ↔ our arrays: one table for all families.

A row says where a tensor lies within an array. Axes are letters, in the order of each side's dimensions: capitals are
whole dimensions, `(HW)` is H and W merged (H outside), a digit is a fixed place, and a small letter counts up the
tensors: their place in our array and in the tensor's name. So

    Row("ffn.experts.gate_up_ED2F", "eD1F", "mlp.experts.{e}.up_proj.weight", "FD")

reads: expert e's matrix [F, D], transposed, is array[e, :, 1, :]. The layers' axis of our stacks, l, is implied.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Container, Iterator
from dataclasses import dataclass

from moe_jax.config import ModelConfig


@dataclass(frozen=True)
class Row:
    array: str
    """Name of ours, within a block."""
    ours: str
    """Axes of the array."""
    tensor: str
    """Name of theirs, within a layer."""
    theirs: str
    """Axes of the tensor."""


Rows = tuple[Row, ...]

TOP = (
    Row("embed_VD", "VD", "model.embed_tokens.weight", "VD"),
    Row("norm.weight", "D", "model.norm.weight", "D"),
)
HEAD = (Row("head_DV", "DV", "lm_head.weight", "VD"),)
NORMS = (
    Row("attention_norm.weight", "D", "input_layernorm.weight", "D"),
    Row("ffn_norm.weight", "D", "post_attention_layernorm.weight", "D"),
)
GQA = (
    Row("attention.query_DHW", "DHW", "self_attn.q_proj.weight", "(HW)D"),
    Row("attention.key_DKW", "DKW", "self_attn.k_proj.weight", "(KW)D"),
    Row("attention.value_DKW", "DKW", "self_attn.v_proj.weight", "(KW)D"),
    Row("attention.output_HWD", "HWD", "self_attn.o_proj.weight", "D(HW)"),
)
GQA_BIAS = (
    Row("attention.query_bias", "J", "self_attn.q_proj.bias", "J"),
    Row("attention.key_bias", "J", "self_attn.k_proj.bias", "J"),
    Row("attention.value_bias", "J", "self_attn.v_proj.bias", "J"),
)
GQA_NORM = (
    Row("attention.query_norm.weight", "W", "self_attn.q_norm.weight", "W"),
    Row("attention.key_norm.weight", "W", "self_attn.k_norm.weight", "W"),
)
MLA = (
    Row("attention.key_value_a_DC", "DC", "self_attn.kv_a_proj_with_mqa.weight", "CD"),
    Row("attention.key_value_norm.weight", "C", "self_attn.kv_a_layernorm.weight", "C"),
    Row("attention.key_value_b_CHN", "CHN", "self_attn.kv_b_proj.weight", "(HN)C"),
    Row("attention.output_HVD", "HVD", "self_attn.o_proj.weight", "D(HV)"),
)
MLA_QUERY = (Row("attention.query_b", "DHN", "self_attn.q_proj.weight", "(HN)D"),)
MLA_LOW_RANK_QUERY = (
    Row("attention.query_a_DQ", "DQ", "self_attn.q_a_proj.weight", "QD"),
    Row("attention.query_norm.weight", "Q", "self_attn.q_a_layernorm.weight", "Q"),
    Row("attention.query_b", "QHN", "self_attn.q_b_proj.weight", "(HN)Q"),
)
DENSE = (
    Row("ffn.gate_up_D2F", "D0F", "mlp.gate_proj.weight", "FD"),
    Row("ffn.gate_up_D2F", "D1F", "mlp.up_proj.weight", "FD"),
    Row("ffn.down_FD", "FD", "mlp.down_proj.weight", "DF"),
)
SHARED = (
    Row("ffn.shared.gate_up_D2F", "D0F", "mlp.shared_experts.gate_proj.weight", "FD"),
    Row("ffn.shared.gate_up_D2F", "D1F", "mlp.shared_experts.up_proj.weight", "FD"),
    Row("ffn.shared.down_FD", "FD", "mlp.shared_experts.down_proj.weight", "DF"),
)
ROUTER = (Row("ffn.router.gate_DE", "DE", "mlp.gate.weight", "ED"),)
ROUTER_BIAS = (Row("ffn.router.bias", "E", "mlp.gate.e_score_correction_bias", "E"),)
EXPERTS = (
    *ROUTER,
    Row("ffn.experts.gate_up_ED2F", "eD0F", "mlp.experts.{e}.gate_proj.weight", "FD"),
    Row("ffn.experts.gate_up_ED2F", "eD1F", "mlp.experts.{e}.up_proj.weight", "FD"),
    Row("ffn.experts.down_EFD", "eFD", "mlp.experts.{e}.down_proj.weight", "DF"),
)
"""One tensor per expert."""
FUSED_EXPERTS = (
    *ROUTER,
    Row("ffn.experts.gate_up_ED2F", "EDGF", "mlp.experts.gate_up_proj", "E(GF)D"),
    Row("ffn.experts.down_EFD", "EFD", "mlp.experts.down_proj", "EDF"),
)
"""All experts of a layer in one tensor, as modules of transformers 5 hold them."""
MIXTRAL_EXPERTS = (
    Row("ffn.router.gate_DE", "DE", "block_sparse_moe.gate.weight", "ED"),
    Row("ffn.experts.gate_up_ED2F", "eD0F", "block_sparse_moe.experts.{e}.w1.weight", "FD"),
    Row("ffn.experts.gate_up_ED2F", "eD1F", "block_sparse_moe.experts.{e}.w3.weight", "FD"),
    Row("ffn.experts.down_EFD", "eFD", "block_sparse_moe.experts.{e}.w2.weight", "DF"),
)
MTP = (
    Row("embedding_norms.weight", "D", "enorm.weight", "D"),
    Row("hidden_norms.weight", "D", "hnorm.weight", "D"),
    Row("output_norms.weight", "D", "shared_head.norm.weight", "D"),
    Row("projection_N2DD", "JD", "eh_proj.weight", "DJ"),
)
"""Of a multi-token prediction module, besides its block (DeepSeek-V3's README_WEIGHTS.md)."""
MTP_COPIES = (
    Row("embed_VD", "VD", "embed_tokens.weight", "VD"),
    Row("head_DV", "DV", "shared_head.head.weight", "VD"),
)
"""Tensors of a module's layer that repeat the model's own."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint and its place in an array of ours."""

    tensor: str
    theirs: str
    array: str
    ours: str
    place: tuple[int | None, ...]
    """Per dimension of the array: the number there, or None for all of it."""
    is_copy: bool = False
    """Another entry holds the same weights; this tensor may be missing."""

    def sizes(self, array_shape: tuple[int, ...]) -> dict[str, int]:
        return {axis: size for axis, size in zip(self.ours, array_shape, strict=True) if axis.isupper()}

    def tensor_shape(self, array_shape: tuple[int, ...]) -> tuple[int, ...]:
        sizes = self.sizes(array_shape)
        return tuple(math.prod(sizes[axis] for axis in merged) for merged in dimensions(self.theirs))

    @property
    def split_axes(self) -> str:
        """The tensor's axes after its merged dimensions were split."""
        return "".join(dimensions(self.theirs))

    @property
    def whole_axes(self) -> str:
        """The axes of the array that this tensor fills as a whole."""
        return "".join(filter(str.isupper, self.ours))


def dimensions(axes: str) -> list[str]:
    """The axes of each dimension: of "(HW)D" HW and D."""
    return [merged or single for merged, single in re.findall(r"\((\w+)\)|(\w)", axes)]


def block_rows(cfg: ModelConfig, sparse: Rows | None) -> Rows:
    """The rows of one block; `sparse` are those of the router and its experts, None for a dense block."""
    a = cfg.attention
    if a.kind == "mla":
        rows = NORMS + MLA + (MLA_LOW_RANK_QUERY if a.q_lora_rank else MLA_QUERY)
    else:
        rows = NORMS + GQA + GQA_BIAS * a.qkv_bias + GQA_NORM * (a.qk_norm != "none")
    if sparse is None:
        return rows + DENSE
    return rows + sparse + ROUTER_BIAS * cfg.moe.selection_bias + SHARED * bool(cfg.moe.num_shared_experts)


def entries(cfg: ModelConfig, sparse: Rows) -> Iterator[Entry]:
    """Every tensor of a checkpoint of this model, layer by layer; `sparse` is how it stores routers and experts."""
    yield from _expanded(TOP, cfg)
    dense, total = cfg.num_dense_layers, cfg.num_layers
    for layer in range(total + cfg.mtp.depth):
        stack, first = ("dense_blocks", 0) if layer < dense else ("moe_blocks", dense)
        if layer >= total:
            stack, first = "mtp.blocks", total
        is_sparse = bool(cfg.moe.num_experts) and layer >= dense
        yield from _expanded(block_rows(cfg, sparse if is_sparse else None), cfg, f"{stack}.", layer, layer - first)
        if layer >= total:
            yield from _expanded(MTP, cfg, "mtp.", layer, layer - total)
            for entry in _expanded(MTP_COPIES[: 1 if cfg.tie_word_embeddings else 2], cfg):
                yield dataclasses.replace(entry, tensor=f"model.layers.{layer}.{entry.tensor}", is_copy=True)
    if not cfg.tie_word_embeddings:
        yield from _expanded(HEAD, cfg)


def _expanded(
    rows: Rows, cfg: ModelConfig, prefix: str = "", layer: int = -1, place: int | None = None
) -> Iterator[Entry]:
    """The rows with their small letters counted up, under the names of a stack and a layer if these are given."""
    for row in rows:
        in_layer = place is not None
        ours, name = ("l" + row.ours, f"model.layers.{layer}.{row.tensor}") if in_layer else (row.ours, row.tensor)
        for expert in range(cfg.moe.num_experts) if "e" in row.ours else [0]:
            numbers = {"l": place, "e": expert}
            indices = tuple(int(axis) if axis.isdigit() else numbers.get(axis) for axis in ours)
            yield Entry(name.format(e=expert), row.theirs, prefix + row.array, ours, indices)


def chosen_layout(layouts: tuple[Rows, ...], cfg: ModelConfig, names: Container[str]) -> Rows:
    """The way of storing experts whose tensors are there; if none's are, the first."""

    def is_there(sparse: Rows) -> bool:
        return any(entry.tensor in names for entry in entries(cfg, sparse) if ".ffn.experts." in entry.array)

    return next(filter(is_there, layouts), layouts[0])
