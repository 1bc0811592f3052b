"""Bits per byte against the formula, over batches of unequal content."""

import jax
import numpy as np
import pytest

from moe_jax.config import AttentionConfig, ModelConfig
from moe_jax.data import DataError
from moe_jax.model.definition import Definition
from moe_jax.training.supervised import BitsPerByte

V = 11
CONFIG = ModelConfig(
    vocab_size=V,
    hidden_size=8,
    num_layers=1,
    intermediate_size=8,
    attention=AttentionConfig(kind="gqa", num_heads=2, num_kv_heads=1, head_dim=4),
    initializer_range=0.5,
)


def batch(seed, lengths):
    tokens_BS = np.random.default_rng(seed).integers(1, V, (len(lengths), 9)).astype(np.int32)
    segments_BS = (np.arange(9) < np.array(lengths)[:, None]).astype(np.int32)
    positions_BS = np.broadcast_to(np.arange(9, dtype=np.int32), tokens_BS.shape)
    return {"tokens_BS": tokens_BS, "segment_ids_BS": segments_BS, "positions_BS": positions_BS}


def test_it_is_the_nats_of_all_targets_over_the_bits_of_all_their_bytes():
    definition = Definition.of(CONFIG)
    params, rest = definition.init(jax.random.key(0))
    bytes_V = np.arange(V, dtype=np.int32) % 4  # some tokens are special and stand for no byte
    batches = [batch(0, [9, 4]), batch(1, [2, 0])]
    found = BitsPerByte(definition, bytes_V, banned_ids=(0,))(params, rest, batches)

    nats = tokens = num_bytes = 0.0
    model = definition.merge(params, rest)
    for one in batches:
        output = model(one["tokens_BS"], segment_ids_BS=one["segment_ids_BS"], positions_BS=one["positions_BS"])
        logits = np.array(model.logits(output.hidden_BSD), np.float64)
        logits[..., 0] = -np.inf
        for row, column in zip(*np.nonzero(one["segment_ids_BS"][:, 1:]), strict=True):
            target = one["tokens_BS"][row, column + 1]
            nats += np.log(np.sum(np.exp(logits[row, column]))) - logits[row, column, target]
            tokens, num_bytes = tokens + 1, num_bytes + bytes_V[target]
    np.testing.assert_allclose(found["loss"], nats / tokens, rtol=1e-5)
    np.testing.assert_allclose(found["bits_per_byte"], nats / np.log(2) / num_bytes, rtol=1e-5)


def test_text_without_a_byte_is_an_error():
    definition = Definition.of(CONFIG)
    params, rest = definition.init(jax.random.key(0))
    with pytest.raises(DataError, match="no byte"):
        BitsPerByte(definition, np.zeros(V, np.int32))(params, rest, [batch(0, [9])])
