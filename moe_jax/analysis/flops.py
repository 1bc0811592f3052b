"""Parameters, training FLOPs and cache size of a model, computed from its configuration alone.

One product of a token's vector with a matrix of P parameters costs 2P FLOPs. Lookups, norms, softmaxes and activations
are not counted, as is usual for model FLOPs utilisation (arXiv:2204.02311, appendix B).
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_jax.config import AttentionConfig, ModelConfig


@dataclass(frozen=True)
class ParameterCounts:
    """How many parameters a model has; sources differ in what they call active, so each count has its own name."""

    total: int
    """All of the main model: without MTP modules, which are dropped or used to speculate at inference."""
    active: int
    """Those of `total` that one token uses, both embeddings included."""
    active_non_embedding: int
    """`active` without the input embedding and the head."""
    mtp: int
    """Those that only the MTP modules have: they share the embedding and the head."""


def parameter_counts(cfg: ModelConfig) -> ParameterCounts:
    """Counts the parameters, norms, biases and the routers' balancing biases included."""
    d = cfg.hidden_size
    attention_and_norms = _attention_weights(cfg) + _attention_vectors(cfg.attention) + 2 * d
    dense_layer = attention_and_norms + 3 * d * cfg.intermediate_size
    moe_layer = attention_and_norms + _moe_weights(cfg, cfg.moe.num_experts) + _balancing_bias(cfg)
    active_moe_layer = attention_and_norms + _moe_weights(cfg, cfg.moe.num_experts_per_token) + _balancing_bias(cfg)

    embeddings = cfg.vocab_size * d * (1 if cfg.tie_word_embeddings else 2)
    dense = cfg.num_dense_layers * dense_layer + d  # and the final norm
    non_embedding = dense + cfg.num_moe_layers * moe_layer
    active_non_embedding = dense + cfg.num_moe_layers * active_moe_layer
    # A module is a block like the model's last, the projection from [embedding; hidden], and three norms; a parallel
    # head is the block and the last norm.
    mtp_module = (moe_layer if cfg.moe.num_experts else dense_layer) + d
    if cfg.mtp.kind == "causal":
        mtp_module += 2 * d * d + 2 * d
    return ParameterCounts(
        total=non_embedding + embeddings,
        active=active_non_embedding + embeddings,
        active_non_embedding=active_non_embedding,
        mtp=cfg.mtp.depth * mtp_module,
    )


def training_flops_per_token(
    cfg: ModelConfig, sequence_length: int, *, causal: bool = True, include_mtp: bool = False
) -> int:
    """FLOPs of one training token: three times those of the forward pass; what remat computes anew is not counted.

    Args:
        cfg: the model.
        sequence_length: tokens S that attend to each other.
        causal: count only the half of the attention scores that a causal mask keeps (S/2 keys a token on average);
            false counts all S, as some publications do.
        include_mtp: add the MTP modules, each a block, its projection (which parallel heads lack) and another pass
            through the head.
    """
    a = cfg.attention
    qk_and_v = a.qk_nope_head_dim + a.qk_rope_head_dim + a.v_head_dim if a.kind == "mla" else 2 * a.head_dim
    # Scores and weighted values: 2 FLOPs per element of a query and of a value, head and key.
    attention_scores = 2 * a.num_heads * qk_and_v * sequence_length // (2 if causal else 1)
    attention = 2 * _attention_weights(cfg) + attention_scores
    dense_layer = attention + 2 * 3 * cfg.hidden_size * cfg.intermediate_size
    moe_layer = attention + 2 * _moe_weights(cfg, cfg.moe.num_experts_per_token)
    head = 2 * cfg.vocab_size * cfg.hidden_size

    forward = cfg.num_dense_layers * dense_layer + cfg.num_moe_layers * moe_layer + head
    if include_mtp:
        block = moe_layer if cfg.moe.num_experts else dense_layer
        projection = 2 * 2 * cfg.hidden_size**2 if cfg.mtp.kind == "causal" else 0
        forward += cfg.mtp.depth * (block + projection + head)
    return 3 * forward


def quantizable_flops_per_token(cfg: ModelConfig) -> int:
    """Those of one forward pass through blocks' matrices, MTP modules included (`ModelConfig.quantization`)."""
    blocks = (cfg.num_layers + (cfg.mtp.depth if cfg.moe.num_experts else 0)) * _attention_weights(cfg)
    blocks += cfg.num_dense_layers * 3 * cfg.hidden_size * cfg.intermediate_size
    if cfg.moe.num_experts:
        router = cfg.hidden_size * cfg.moe.num_experts
        sparse = _moe_weights(cfg, cfg.moe.num_experts_per_token) - router
        blocks += (cfg.num_moe_layers + cfg.mtp.depth) * sparse
    else:
        blocks += cfg.mtp.depth * (_attention_weights(cfg) + 3 * cfg.hidden_size * cfg.intermediate_size)
    projection = cfg.mtp.depth * 2 * cfg.hidden_size**2 if cfg.mtp.kind == "causal" else 0
    return 2 * (blocks + projection)


def kv_cache_bytes_per_token(cfg: ModelConfig, bytes_per_element: int = 2) -> int:
    """Bytes that one token occupies in the cache: MLA keeps a latent and one rotary key, GQA keys and values."""
    a = cfg.attention
    elements = a.kv_lora_rank + a.qk_rope_head_dim if a.kind == "mla" else 2 * a.num_kv_heads * a.head_dim
    return elements * cfg.num_layers * bytes_per_element


def _attention_weights(cfg: ModelConfig) -> int:
    """Parameters of one layer's attention matrices."""
    a, d = cfg.attention, cfg.hidden_size
    if a.kind == "gqa":
        return d * a.head_dim * (2 * a.num_heads + 2 * a.num_kv_heads)
    query_width = a.num_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim)
    queries = a.q_lora_rank * (d + query_width) if a.q_lora_rank else d * query_width
    latent = d * (a.kv_lora_rank + a.qk_rope_head_dim)
    keys_and_values = a.kv_lora_rank * a.num_heads * (a.qk_nope_head_dim + a.v_head_dim)
    return queries + latent + keys_and_values + a.num_heads * a.v_head_dim * d


def _attention_vectors(a: AttentionConfig) -> int:
    """Parameters of one layer's attention that are not matrices: norms of latents or heads, and biases."""
    if a.kind == "mla":
        return a.q_lora_rank + a.kv_lora_rank
    biases = a.head_dim * (a.num_heads + 2 * a.num_kv_heads) if a.qkv_bias else 0
    norms = {"none": 0, "head": 2 * a.head_dim, "full": a.head_dim * (a.num_heads + a.num_kv_heads)}
    return biases + norms[a.qk_norm]


def _moe_weights(cfg: ModelConfig, num_routed: int) -> int:
    """Parameters of one sparse feed-forward's matrices: the router, the shared experts, `num_routed` routed ones."""
    m, d = cfg.moe, cfg.hidden_size
    return d * m.num_experts + 3 * d * m.expert_size * (num_routed + m.num_shared_experts)


def _balancing_bias(cfg: ModelConfig) -> int:
    return cfg.moe.num_experts if cfg.moe.selection_bias else 0
