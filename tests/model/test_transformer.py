"""The whole model: cached decoding against the uncached forward, packing, rematerialisation, compile size.

B batch, S sequence, N new tokens, V vocabulary.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig, MTPConfig, RoPEConfig
from moe_jax.model.definition import Definition
from moe_jax.model.router import fixed_experts
from moe_jax.model.transformer import Transformer, make_cache, unrolled_cache

V, S, N = 23, 5, 6
LENGTHS = (5, 2, 4)
B = len(LENGTHS)
YARN = RoPEConfig(
    theta=50.0, layout="interleaved", scaling="yarn", factor=8.0, original_max_position=4, mscale_all_dim=0.8
)
LLAMA3 = RoPEConfig(theta=50.0, scaling="llama3", factor=8.0, original_max_position=8)
MLA = AttentionConfig(
    num_heads=2, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5, q_lora_rank=7, rope=YARN
)
GQA = AttentionConfig(kind="gqa", num_heads=4, num_kv_heads=2, head_dim=6, qkv_bias=True, qk_norm="head")
MOE = MoEConfig(num_experts=6, num_experts_per_token=2, num_shared_experts=1, expert_size=7)
SIZES = {"vocab_size": V, "hidden_size": 12, "intermediate_size": 14}
CONFIGS = {
    "mla, moe, yarn": ModelConfig(**SIZES, num_layers=3, attention=MLA, moe=MOE),
    "mla, dense, tied": ModelConfig(
        **SIZES,
        num_layers=2,
        attention=dataclasses.replace(MLA, q_lora_rank=0, rope=RoPEConfig(theta=50.0)),
        tie_word_embeddings=True,
    ),
    "gqa, dense, tied": ModelConfig(**SIZES, num_layers=2, attention=GQA, tie_word_embeddings=True),
    "gqa, moe only, llama3": ModelConfig(
        **SIZES,
        num_layers=2,
        first_k_dense=0,
        attention=dataclasses.replace(GQA, qkv_bias=False, qk_norm="full", rope=LLAMA3),
        moe=dataclasses.replace(MOE, score="softmax", selection_bias=False),
    ),
}


@jax.jit
def forward(model, tokens_BS):
    return model.logits(model(tokens_BS).hidden_BSD)


@jax.jit
def prefill(model, tokens_BS, segment_ids_BS):
    cache = make_cache(model.cfg, B, S + N)
    output = model(tokens_BS, segment_ids_BS=segment_ids_BS, cache=cache, prefill=True)
    return model.logits(output.hidden_BSD), output.cache


@jax.jit
def decode(model, tokens_BS, cache):
    output = model(tokens_BS, cache=cache)
    return model.logits(output.hidden_BSD), output.cache


def rows(seed=0):
    """Each row's prompt and continuation, without padding."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, V, length + N).astype(np.int32) for length in LENGTHS]


def uncached(model):
    """Logits of each row's own positions; what follows a row is noise that a causal model does not see."""
    tokens = np.random.default_rng(9).integers(0, V, (B, S + N)).astype(np.int32)
    for row, sequence in zip(tokens, rows(), strict=True):
        row[: len(sequence)] = sequence
    logits = np.asarray(forward(model, tokens))
    return [row[: len(sequence)] for row, sequence in zip(logits, rows(), strict=True)]


def cached(model, side, chunk, unrolled=False):
    """The same logits from a prefill of padded prompts and then `chunk` tokens at a time, in the form for decoding on
    CPUs if it is `unrolled`."""
    tokens, mask = np.full((B, S), V - 1, np.int32), np.zeros((B, S), np.int32)
    for b, (sequence, length) in enumerate(zip(rows(), LENGTHS, strict=True)):
        at = slice(S - length, S) if side == "left" else slice(0, length)
        tokens[b, at], mask[b, at] = sequence[:length], 1
    logits, cache = prefill(model, tokens, mask)
    if unrolled:
        model, cache = model.unrolled(), unrolled_cache(cache)
    results = [[np.asarray(logits)[b, mask[b] > 0]] for b in range(B)]
    for n in range(0, N, chunk):
        following = np.stack(
            [row[length + n : length + n + chunk] for row, length in zip(rows(), LENGTHS, strict=True)]
        )
        logits, cache = decode(model, following, cache)
        for b in range(B):
            results[b].append(np.asarray(logits)[b])
    assert int(cache.length) == S + N
    return [np.concatenate(result) for result in results]


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_decoding_equals_the_uncached_forward(random_model, name):
    model = random_model(CONFIGS[name])
    expected = uncached(model)
    assert min(np.std(row) for row in expected) > 0.1
    chunks = (1, 3) if CONFIGS[name].moe.num_experts else (1,)
    for side in ("left", "right"):
        for chunk, unrolled in itertools.product(chunks, (False, True)):
            for actual, wanted in zip(cached(model, side, chunk, unrolled), expected, strict=True):
                np.testing.assert_allclose(actual, wanted, atol=5e-5, rtol=1e-4, err_msg=f"{side}, {chunk}, {unrolled}")


def test_bfloat16_decoding_stays_near_float32(random_model):
    cfg = CONFIGS["mla, dense, tied"]
    exact = uncached(random_model(cfg))
    model = random_model(dataclasses.replace(cfg, dtype="bfloat16"))
    assert make_cache(model.cfg, 1, 1).dense.first.dtype == jnp.bfloat16
    for rounded in (uncached(model), cached(model, "left", 1)):
        for actual, wanted in zip(rounded, exact, strict=True):
            assert actual.dtype == np.float32
            assert np.abs(actual - wanted).max() < 0.1 * np.std(wanted)


def test_packed_documents_are_those_alone(random_model):
    model = random_model(CONFIGS["mla, moe, yarn"])
    lengths, first = (4, 5), np.random.default_rng(1).integers(0, V, (B, S + N)).astype(np.int32)
    segments = np.array([[1] * 4 + [2] * 5 + [0] * 2] * B, np.int32)
    positions = np.array([[*range(4), *range(5), 0, 0]] * B, np.int32)

    @jax.jit
    def packed(model, tokens_BS):
        output = model(tokens_BS, segment_ids_BS=segments, positions_BS=positions)
        return model.logits(output.hidden_BSD), output.router

    logits, stats = packed(model, first)
    alone = np.zeros((B, S + N), np.int32)
    start = 0
    for length in lengths:
        alone[:, :length] = first[:, start : start + length]
        expected = np.asarray(forward(model, alone))[:, :length]
        np.testing.assert_allclose(np.asarray(logits)[:, start : start + length], expected, atol=5e-5, rtol=1e-4)
        start += length
    # Padding's tokens change neither the documents nor what the routers report.
    changed = np.where(segments == 0, 3, first)
    assert np.any(changed != first)
    logits_after, stats_after = packed(model, changed)
    np.testing.assert_array_equal(np.asarray(logits_after)[:, :start], np.asarray(logits)[:, :start])
    jax.tree.map(np.testing.assert_array_equal, stats_after, stats)
    np.testing.assert_array_equal(np.sum(stats.counts_BE, axis=-1), 2 * start)
    assert stats.counts_BE.shape == (2, B, 6)


CONTROL = dataclasses.replace(MOE, selection_bias=False, sequence_balance_coef=0.0)


def test_hash_routing_goes_by_token_and_layer_also_when_decoding(random_model):
    cfg = dataclasses.replace(
        CONFIGS["mla, moe, yarn"], moe=dataclasses.replace(CONTROL, routing="hash"), mtp=MTPConfig(depth=1)
    )
    model = random_model(cfg)
    tokens = np.random.default_rng(3).integers(0, V, (B, S + N)).astype(np.int32)

    @jax.jit
    def run(model, tokens_BS):
        output = model(tokens_BS)
        ones_BS = jnp.ones(tokens_BS.shape, jnp.int32)
        return output.router, model.predict_ahead(output.hidden_BSD, tokens_BS, ones_BS, jnp.cumsum(ones_BS, 1)).router

    @jax.jit
    def step(model, tokens_BS, cache):
        output = model(tokens_BS, cache=cache)
        return output.router, output.cache

    trunk, ahead = run(model, tokens)
    experts_LBSK = np.concatenate([trunk.experts_BSK, ahead.experts_BSK])
    for layer, experts_BSK in enumerate(experts_LBSK):
        wanted = np.asarray(fixed_experts(tokens.ravel(), layer, cfg.moe)).reshape(B, S + N, 2)
        counted = slice(0, S + N - (layer == 2))  # the module's last position has no token ahead
        np.testing.assert_array_equal(experts_BSK[:, counted], wanted[:, counted])
    assert not np.array_equal(experts_LBSK[0], experts_LBSK[1])
    _, cache = prefill(model, tokens[:, :S], np.ones((B, S), np.int32))
    decoded, _ = step(model, tokens[:, S : S + 1], cache)
    np.testing.assert_array_equal(decoded.experts_BSK[:, :, 0], experts_LBSK[:2, :, S])


def test_uniform_routing_goes_by_position_and_loads_full_rows_evenly(random_model):
    cfg = dataclasses.replace(CONFIGS["mla, moe, yarn"], moe=dataclasses.replace(CONTROL, routing="uniform"))
    stats = jax.jit(lambda model, tokens_BS: model(tokens_BS).router)(random_model(cfg), np.zeros((B, 9), np.int32))
    np.testing.assert_array_equal(stats.counts_BE, np.full((2, B, 6), 3))


def test_tokens_are_dropped_only_when_asked_to(random_model):
    """What a row means must not depend on the rest of the batch, but in the training loss."""
    cfg = dataclasses.replace(CONFIGS["mla, moe, yarn"], moe=dataclasses.replace(MOE, capacity_factor=0.5))
    tokens = np.random.default_rng(4).integers(0, V, (B, S)).astype(np.int32)

    @functools.partial(jax.jit, static_argnums=1)
    def run(model, drop_tokens):
        output = model(tokens, drop_tokens=drop_tokens)
        return output.hidden_BSD, output.router.dropped_B

    model = random_model(cfg)
    kept, none = run(model, False)
    some, dropped = run(model, True)
    assert np.sum(none) == 0 and np.all(np.sum(dropped, axis=1) > 0)
    assert not np.allclose(kept, some, atol=1e-3)


def test_remat_changes_neither_loss_nor_gradients(random_model):
    tokens = np.random.default_rng(2).integers(0, V, (B, S)).astype(np.int32)
    results = {}
    for remat in ("none", "block", "dots"):
        model = random_model(dataclasses.replace(CONFIGS["gqa, dense, tied"], remat=remat))
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(params, graph=graph, rest=rest):
            return jnp.sum(nnx.merge(graph, params, rest)(tokens).hidden_BSD[..., 0] ** 2)

        step = jax.jit(jax.value_and_grad(loss))
        # What is computed anew shows as more products in the backward pass.
        products = step.lower(params).as_text().count("dot_general")
        results[remat] = (*step(params), products)
    assert results["block"][2] > results["dots"][2] >= results["none"][2]
    for remat in ("block", "dots"):
        np.testing.assert_allclose(results[remat][0], results["none"][0], rtol=1e-5)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), results[remat][1], results["none"][1]
        )


def test_program_does_not_grow_with_depth():
    def size(layers):
        cfg = ModelConfig(**SIZES, num_layers=layers, attention=MLA, moe=MOE, first_k_dense=layers // 2, remat="block")
        definition = Definition.of(cfg)
        arrays = {name: jax.ShapeDtypeStruct(v.shape, v.dtype) for name, v in definition.variables.items()}
        params = {name: arrays.pop(name) for name in definition.param_names}

        def loss(params, rest, tokens_BS):
            return jnp.sum(definition.merge(params, rest)(tokens_BS).hidden_BSD)

        return len(jax.jit(jax.grad(loss)).lower(params, arrays, jax.ShapeDtypeStruct((2, 8), jnp.int32)).as_text())

    assert size(8) < 1.02 * size(2)


def test_tied_head_is_the_embedding(random_model):
    tied, untied = random_model(CONFIGS["gqa, dense, tied"]), random_model(CONFIGS["gqa, moe only, llama3"])
    np.testing.assert_array_equal(tied.head(), np.asarray(tied.embed_VD[...]).T)
    assert tied.head_DV is None and untied.head().shape == (12, V)


def test_dense_and_sparse_layers_are_where_the_config_says():
    cfg = dataclasses.replace(CONFIGS["mla, moe, yarn"], num_layers=5, first_k_dense=2)
    shapes = {name: v.shape for name, v in Definition.of(cfg).variables.items()}
    assert shapes["dense_blocks.ffn.gate_up_D2F"] == (2, 12, 2, 14)
    assert shapes["moe_blocks.ffn.experts.gate_up_ED2F"] == (3, 6, 12, 2, 7)
    assert shapes["moe_blocks.ffn.router.bias"] == (3, 6)
    dense = Definition.of(CONFIGS["mla, dense, tied"])
    assert not any(name.startswith(("moe_blocks", "mtp")) for name in dense.variables)


def test_weights_and_gradients_of_a_bfloat16_model_are_float32():
    cfg = dataclasses.replace(CONFIGS["mla, moe, yarn"], dtype="bfloat16")
    assert {v.dtype for v in Definition.of(cfg).variables.values()} == {jnp.dtype("float32")}


def test_embedding_gradient_counts_past_what_bfloat16_can():
    """4,096 occurrences of a token give 4,096 times the gradient of one, not bfloat16's 256."""
    cfg = ModelConfig(vocab_size=3, hidden_size=4, num_layers=1, intermediate_size=4, dtype="bfloat16")
    model = Transformer(cfg, nnx.Rngs(0))
    graph, state = nnx.split(model)

    def total(state):
        return jnp.sum(nnx.merge(graph, state).embed(jnp.ones((4, 1024), jnp.int32)).astype(jnp.float32))

    gradient = jax.grad(total)(state)["embed_VD"][...]
    np.testing.assert_array_equal(gradient, [[0] * 4, [4096] * 4, [0] * 4])
