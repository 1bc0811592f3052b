"""Next-token targets, cross-entropy and the MTP loss against loops in float64.

Shapes: B batch, S sequence, D model, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe_jax.losses import SumCount
from moe_jax.losses.language_model import cross_entropy, mtp_loss, next_token_targets

B, S, D, V, PAD = 8, 9, 4, 7, 0


def batch(seed=0):
    rng = np.random.default_rng(seed)
    segments_BS = np.zeros((B, S), np.int32)
    for row in range(B):
        lengths = rng.integers(1, 5, size=3)
        ids = np.repeat([1, 2, 3], lengths)[:S]
        segments_BS[row, : len(ids)] = ids
    tokens_BS = np.where(segments_BS > 0, rng.integers(1, V, size=(B, S)), PAD).astype(np.int32)
    mask_BS = rng.integers(0, 2, size=(B, S))
    hidden_BSD, head_DV = rng.normal(size=(B, S, D)).astype(np.float32), rng.normal(size=(D, V)).astype(np.float32)
    return tokens_BS, segments_BS, mask_BS, hidden_BSD, head_DV


def documents(tokens_BS, segments_BS):
    """(row, positions) of each document."""
    for row in range(tokens_BS.shape[0]):
        for segment in sorted(set(segments_BS[row]) - {0}):
            yield row, np.flatnonzero(segments_BS[row] == segment)


def reference_nll(tokens_BS, segments_BS, mask_BS, hidden_BSD, head_DV, offset):
    """Document by document: position i predicts token i + offset of its own document."""
    total, count = 0.0, 0
    for row, positions in documents(tokens_BS, segments_BS):
        for place in range(len(positions) - offset):
            target = positions[place + offset]
            if not mask_BS[row, target]:
                continue
            logits = hidden_BSD[row, positions[place]].astype(np.float64) @ head_DV.astype(np.float64)
            logits[PAD] = -np.inf
            total += np.log(np.sum(np.exp(logits))) - logits[tokens_BS[row, target]]
            count += 1
    return total, count


def loss_of(tokens_BS, segments_BS, mask_BS, hidden_BSD, head_DV, offset=1, **options):
    targets_BS, weights_BS = next_token_targets(tokens_BS, segments_BS, mask_BS, offset)
    return cross_entropy(hidden_BSD, head_DV, targets_BS, weights_BS, banned_ids=(PAD,), **options)


@functools.cache
def gradient(**options):
    """Batch → (sum, count), and the sum's gradients with respect to hidden states and head."""

    def loss(*data):
        result = loss_of(*data, **options)
        return result.sum, result

    return jax.jit(jax.value_and_grad(loss, (3, 4), has_aux=True))


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_targets_stay_within_their_document(offset):
    tokens_BS, segments_BS, mask_BS, *_ = batch()
    targets_BS, weights_BS = next_token_targets(tokens_BS, segments_BS, mask_BS, offset)
    expected_BS = np.zeros((B, S))
    for row, positions in documents(tokens_BS, segments_BS):
        for source, target in zip(positions, positions[offset:], strict=False):
            expected_BS[row, source] = mask_BS[row, target]
            assert targets_BS[row, source] == tokens_BS[row, target]
    np.testing.assert_array_equal(weights_BS, expected_BS)
    assert expected_BS.sum() > 0


def test_without_a_mask_every_token_of_a_document_but_its_first_is_a_target():
    tokens_BS, segments_BS, *_ = batch()
    _, weights_BS = next_token_targets(tokens_BS, segments_BS)
    assert weights_BS.sum() == sum(len(positions) - 1 for _, positions in documents(tokens_BS, segments_BS))


def test_an_offset_past_the_end_has_no_targets_and_one_below_1_is_refused():
    tokens_BS, segments_BS, *_ = batch()
    targets_BS, weights_BS = next_token_targets(tokens_BS, segments_BS, offset=S + 2)
    assert targets_BS.shape == (B, S) and not np.any(weights_BS)
    with pytest.raises(ValueError, match="offset = 0"):
        next_token_targets(tokens_BS, segments_BS, offset=0)


@pytest.mark.parametrize("offset", [1, 2])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_cross_entropy_matches_the_loop(offset, chunk_size):
    data = batch()
    (_, loss), _ = gradient(offset=offset, chunk_size=chunk_size)(*data)
    total, count = reference_nll(*data, offset)
    np.testing.assert_allclose(loss.sum, total, rtol=1e-6)
    assert loss.count == count


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_gradient_matches_central_differences(chunk_size):
    *rest, hidden_BSD, head_DV = batch()
    _, (grad_hidden, grad_head) = gradient(offset=1, chunk_size=chunk_size)(*rest, hidden_BSD, head_DV)
    head64, step = head_DV.astype(np.float64), 1e-5
    for index in np.ndindex(*head_DV.shape):
        up, down = head64.copy(), head64.copy()
        up[index] += step
        down[index] -= step
        slope = (reference_nll(*rest, hidden_BSD, up, 1)[0] - reference_nll(*rest, hidden_BSD, down, 1)[0]) / (2 * step)
        np.testing.assert_allclose(grad_head[index], slope, atol=1e-4)
    _, weights_BS = next_token_targets(*rest)
    np.testing.assert_array_equal(np.any(np.asarray(grad_hidden), axis=-1), np.asarray(weights_BS) > 0)
    assert np.all(np.isfinite(grad_hidden))


def test_padding_changes_nothing():
    tokens_BS, segments_BS, mask_BS, hidden_BSD, head_DV = batch()
    wide = [np.pad(x, ((0, 1), (0, 4))) for x in (tokens_BS, segments_BS, mask_BS)]
    wide_hidden = np.pad(hidden_BSD, ((0, 1), (0, 4), (0, 0)), constant_values=3.0)
    loss = gradient(offset=1, chunk_size=None)
    (_, one), _ = loss(*batch())
    (_, other), _ = loss(*wide, wide_hidden, head_DV)
    np.testing.assert_allclose(one.sum, other.sum, rtol=1e-6)
    assert one.count == other.count


def test_micro_batches_add_up_to_the_batch():
    *data, head_DV = batch()
    loss = gradient(offset=1, chunk_size=None)
    (_, whole), _ = loss(*data, head_DV)
    parts = [loss(*(x[rows] for x in data), head_DV)[0][1] for rows in (slice(0, 4), slice(4, B))]
    np.testing.assert_allclose(sum(float(part.sum) for part in parts), whole.sum, rtol=1e-6)
    assert sum(float(part.count) for part in parts) == whole.count


def test_eight_devices_give_the_numbers_of_one():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    data = batch()
    spread = [jax.device_put(x, s) for x, s in zip(data, (rows, rows, rows, rows, everywhere), strict=True)]
    loss = gradient(chunk_size=4, shards=(8, 1))
    for one, many in zip(jax.tree.leaves(loss(*data)), jax.tree.leaves(loss(*spread)), strict=True):
        np.testing.assert_allclose(one, many, rtol=1e-6, atol=1e-5)


def test_mtp_loss_is_lambda_times_the_mean_of_the_modules_means():
    depths = [SumCount(jnp.array(6.0), jnp.array(3.0)), SumCount(jnp.array(8.0), jnp.array(2.0))]
    np.testing.assert_allclose(mtp_loss(depths, 0.3), 0.3 * (2.0 + 4.0) / 2, rtol=1e-6)
    empty = SumCount(jnp.array(0.0), jnp.array(0.0))
    assert mtp_loss([empty], 0.3) == 0
    with pytest.raises(ValueError, match="at least one module"):
        mtp_loss([], 0.3)


def test_mtp_loss_reaches_head_and_hidden_states():
    *rest, hidden_BSD, head_DV = batch()

    @jax.jit
    def loss(hidden_BSD, head_DV):
        return mtp_loss([loss_of(*rest, hidden_BSD, head_DV, offset=depth + 1) for depth in (1, 2)], 0.3)

    grads = jax.grad(loss, (0, 1))(hidden_BSD, head_DV)
    assert all(float(jnp.abs(grad).max()) > 0 and np.all(np.isfinite(grad)) for grad in grads)
