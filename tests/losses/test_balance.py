"""The sequence-wise balance loss and load figures against loops in float64.

Shapes: B batch, S sequence, E experts, K experts per token.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe_jax.losses.balance import load_entropy, max_violation, sequence_balance_loss
from moe_jax.model.router import RouterOutput, router_stats

B, S, E, K = 8, 6, 5, 2


def batch(seed=0):
    rng = np.random.default_rng(seed)
    scores_BSE = (1 / (1 + np.exp(-rng.normal(size=(B, S, E))))).astype(np.float32)
    lengths_B = rng.integers(1, S + 1, size=B)
    return scores_BSE, np.arange(S) < lengths_B[:, None]


def stats(scores_BSE, valid_BS):
    """The router's sums; all experts in use are expert 0, which the loss must not look at."""
    scores_TE = scores_BSE.reshape(-1, scores_BSE.shape[-1])
    used_TK = jnp.zeros((len(scores_TE), K), jnp.int32)
    return router_stats(RouterOutput(used_TK, jnp.ones(used_TK.shape), scores_TE), valid_BS)


@jax.jit
def gradient(scores_BSE, valid_BS):
    """(sum, count), and the sum's gradient with respect to the scores."""

    def loss(scores_BSE):
        sums = stats(scores_BSE, valid_BS)
        result = sequence_balance_loss(sums.unbiased_counts_BE, sums.affinity_BE, sums.tokens_B, K)
        return result.sum, result

    (_, result), grad_BSE = jax.value_and_grad(loss, has_aux=True)(scores_BSE)
    return result, grad_BSE


def reference(scores_BSE, valid_BS, chosen_scores_BSE=None):
    """V3 eq. 17-20 by loops; f from `chosen_scores_BSE`, so that it can be held constant while P moves."""
    chosen_scores_BSE = scores_BSE if chosen_scores_BSE is None else chosen_scores_BSE
    total = 0.0
    for row in range(scores_BSE.shape[0]):
        f_E, p_E, tokens = np.zeros(scores_BSE.shape[2]), np.zeros(scores_BSE.shape[2]), 0
        for position in range(scores_BSE.shape[1]):
            if not valid_BS[row, position]:
                continue
            tokens += 1
            for expert in sorted(range(f_E.size), key=lambda e, r=row, p=position: -chosen_scores_BSE[r, p, e])[:K]:
                f_E[expert] += 1
            scores_E = scores_BSE[row, position].astype(np.float64)
            p_E += scores_E / scores_E.sum()
        if tokens:
            total += np.sum(f_E * f_E.size / (K * tokens) * p_E / tokens)
    return total


def test_loss_matches_the_loop():
    scores_BSE, valid_BS = batch()
    loss, _ = gradient(scores_BSE, valid_BS)
    np.testing.assert_allclose(loss.sum, reference(scores_BSE, valid_BS), rtol=1e-6)
    assert loss.count == B


def test_gradient_matches_central_differences_with_f_held_constant():
    scores_BSE, valid_BS = batch()
    grad_BSE = gradient(scores_BSE, valid_BS)[1]
    scores64, step = scores_BSE.astype(np.float64), 1e-6
    for index in np.ndindex(2, S, E):
        up, down = scores64.copy(), scores64.copy()
        up[index] += step
        down[index] -= step
        slope = (reference(up, valid_BS, scores64) - reference(down, valid_BS, scores64)) / (2 * step)
        np.testing.assert_allclose(grad_BSE[index], slope, atol=1e-6)
    assert np.any(grad_BSE)


def test_descent_lowers_an_overused_experts_scores():
    scores_BSE = np.full((B, S, E), 0.5, np.float32)
    scores_BSE[:, :, :K] = 0.9
    grad_BSE = gradient(scores_BSE, np.ones((B, S), bool))[1]
    assert np.all(grad_BSE[..., :K] > 0) and np.all(grad_BSE[..., K:] < 0)


def test_perfect_balance_gives_1_and_collapse_more():
    # Each token prefers the two experts next to its own position, all of them equally often.
    preferred = np.stack([np.roll([1, 1, 0, 0, 0], shift) for shift in range(E)]).astype(np.float32)[None]
    valid = np.ones((1, E), bool)
    balanced, _ = gradient(0.1 + preferred, valid)
    np.testing.assert_allclose(balanced.sum, 1.0, rtol=1e-6)
    collapsed, _ = gradient(0.1 + preferred[:, [0] * E], valid)
    assert collapsed.sum > 1.5


def test_padding_and_empty_rows_change_nothing():
    scores_BSE, valid_BS = batch()
    wide_BSE = np.pad(scores_BSE, ((0, 2), (0, 3), (0, 0)), constant_values=0.7)
    wide_valid = np.pad(valid_BS, ((0, 2), (0, 3)))
    one, one_grad = gradient(scores_BSE, valid_BS)
    other, other_grad = gradient(wide_BSE, wide_valid)
    np.testing.assert_allclose(one, other, rtol=1e-6)
    other_grad = np.asarray(other_grad)
    np.testing.assert_allclose(other_grad[:B, :S], one_grad, atol=1e-7)
    assert np.count_nonzero(np.any(other_grad, axis=-1)) == valid_BS.sum()


def test_scores_that_underflow_give_no_nan():
    for underflow in (0.0, 1e-38, 1e-20):
        loss, grad_BSE = gradient(np.full((B, S, E), underflow, np.float32), np.ones((B, S), bool))
        assert np.isfinite(loss.sum) and np.all(np.isfinite(grad_BSE))


def test_micro_batches_add_up_to_the_batch():
    scores_BSE, valid_BS = batch()
    whole, _ = gradient(scores_BSE, valid_BS)
    parts = [gradient(scores_BSE[rows], valid_BS[rows])[0] for rows in (slice(0, 4), slice(4, B))]
    np.testing.assert_allclose(sum(float(part.sum) for part in parts), whole.sum, rtol=1e-6)
    assert sum(float(part.count) for part in parts) == whole.count


def test_eight_devices_give_the_numbers_of_one():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))

    @jax.jit
    def results(scores_BSE, valid_BS):
        loss, grad = gradient(scores_BSE, valid_BS)
        return loss, grad, stats(scores_BSE, valid_BS).unbiased_counts_BE

    arguments = batch()
    one, many = results(*arguments), results(*(jax.device_put(x, rows) for x in arguments))
    np.testing.assert_allclose(one[0], many[0], rtol=1e-6)
    assert one[0].count == B
    np.testing.assert_allclose(one[1], many[1], atol=1e-7)
    np.testing.assert_array_equal(one[2], many[2])


def test_layers_add_up():
    valid_BS = batch()[1]
    sums = [stats(batch(seed)[0], valid_BS) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *sums)
    both = sequence_balance_loss(stacked.unbiased_counts_BE, stacked.affinity_BE, stacked.tokens_B, K)
    apart = [gradient(batch(seed)[0], valid_BS)[0] for seed in (0, 1)]
    np.testing.assert_allclose(both.sum, sum(float(part.sum) for part in apart), rtol=1e-6)
    assert both.count == 2 * B


@pytest.mark.parametrize(
    ("counts", "violation", "entropy"),
    [([4, 4, 4, 4], 0.0, np.log(4)), ([16, 0, 0, 0], 3.0, 0.0), ([8, 8, 0, 0], 1.0, np.log(2)), ([0] * 4, 0.0, 0.0)],
)
def test_load_figures(counts, violation, entropy):
    counts_LE = np.array([counts, [1, 1, 1, 1]])
    np.testing.assert_allclose(max_violation(counts_LE), [violation, 0.0], atol=1e-6)
    np.testing.assert_allclose(load_entropy(counts_LE), [entropy, np.log(4)], atol=1e-6)
