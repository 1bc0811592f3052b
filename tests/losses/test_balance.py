"""Balance losses and load figures against loops in float64.

Shapes: B batch, S sequence, E experts, K experts per token, D devices (groups of experts), L layers.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe_jax.config import MoEConfig
from moe_jax.losses.balance import (
    RouterLoad,
    communication_balance_loss,
    device_balance_loss,
    expert_balance_loss,
    global_balance_loss,
    load_entropy,
    load_metrics,
    max_violation,
    relative_load,
    router_load,
    router_z_loss,
    sequence_balance_loss,
)
from moe_jax.model.router import RouterOutput, route, router_stats

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
    routed = RouterOutput(used_TK, jnp.ones(used_TK.shape), scores_TE, scores_TE)
    cfg = MoEConfig(num_experts=scores_TE.shape[1], num_experts_per_token=K)
    return router_stats(routed, valid_BS, jnp.zeros(len(scores_TE)), cfg)


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


# Losses over the tokens of a micro-batch -----------------------------------------------------------------------------

GROUPED = MoEConfig(
    num_experts=6,
    num_experts_per_token=2,
    num_groups=3,
    num_groups_per_token=2,
    group_score="max",
    score="softmax",
    selection_bias=False,
    sequence_balance_coef=0.0,
)


def grouped_logits(seed):
    return np.random.default_rng(seed).normal(size=(B, S, 6)).astype(np.float32)


def grouped_stats(logits_BSE, valid_BS):
    logits_TE = logits_BSE.reshape(-1, 6)
    scores_TE = jax.nn.softmax(logits_TE, axis=-1)
    routed = RouterOutput(*route(scores_TE, None, GROUPED), scores_TE, logits_TE)
    return router_stats(routed, valid_BS, jnp.ones(len(logits_TE)), GROUPED)


def losses_of(stats, batch_counts_E=None):
    """Each loss of one layer's or of stacked layers' statistics."""
    axis = stats.tokens_B.ndim - 1
    sums = (stats.counts_BE, stats.affinity_BE, stats.tokens_B, stats.group_tokens_BN, stats.z_B)
    counts_E, affinity_E, tokens, group_tokens_D, z = (jnp.sum(x, axis=axis) for x in sums)
    return {
        "expert": expert_balance_loss(counts_E, affinity_E, tokens, 2),
        "device": device_balance_loss(counts_E, affinity_E, tokens, 2, 3),
        "communication": communication_balance_loss(group_tokens_D, affinity_E, tokens, 2),
        "global": global_balance_loss(counts_E if batch_counts_E is None else batch_counts_E, affinity_E, tokens),
        "z": router_z_loss(z, tokens),
    }


@jax.jit
def grouped_losses(logits_BSE, valid_BS):
    return losses_of(grouped_stats(logits_BSE, valid_BS))


def grouped_reference(logits_BSE, valid_BS):
    """V2 eq. 23-31, and the z-loss, by loops; (value, tokens)."""
    logits_TE = logits_BSE[valid_BS].astype(np.float64)
    scores_TE = np.exp(logits_TE) / np.exp(logits_TE).sum(axis=1, keepdims=True)
    tokens, f_E, sent_D, z = len(scores_TE), np.zeros(6), np.zeros(3), 0.0
    for scores, logits in zip(scores_TE, logits_TE, strict=True):
        kept = np.argsort(scores.reshape(3, 2).max(axis=1))[-2:]
        experts = sorted((e for e in range(6) if e // 2 in kept), key=lambda e, scores=scores: scores[e])[-2:]
        f_E[experts] += 6 / (2 * tokens)
        for device in {e // 2 for e in experts}:
            sent_D[device] += 3 / (2 * tokens)
        z += np.log(np.exp(logits).sum()) ** 2 / tokens
    p_E = scores_TE.mean(axis=0)
    p_D = p_E.reshape(3, 2).sum(axis=1)
    expert = f_E @ p_E
    values = {"expert": expert, "device": f_E.reshape(3, 2).mean(axis=1) @ p_D, "communication": sent_D @ p_D}
    return values | {"global": expert, "z": z}, tokens


def test_losses_of_a_micro_batch_match_the_loop():
    logits_BSE, valid_BS = grouped_logits(0), batch()[1]
    expected, tokens = grouped_reference(logits_BSE, valid_BS)
    found = grouped_losses(logits_BSE, valid_BS)
    assert found.keys() == expected.keys()
    for name, loss in found.items():
        np.testing.assert_allclose(loss.mean(), expected[name], rtol=1e-5, err_msg=name)
        assert loss.count == tokens


def test_global_balance_loss_takes_the_load_of_the_whole_batch():
    """So the micro-batches' parts add up to the batch's loss, whatever one of them prefers; the expert-level do not."""
    logits_BSE, valid_BS = grouped_logits(0), batch()[1]
    logits_BSE[: B // 2, :, :3] += 2
    whole = grouped_stats(logits_BSE, valid_BS)
    counts_E, parts = jnp.sum(whole.counts_BE, axis=0), {"global": [], "expert": []}
    for rows in (slice(0, B // 2), slice(B // 2, B)):
        losses = losses_of(grouped_stats(logits_BSE[rows], valid_BS[rows]), counts_E)
        for name, found in parts.items():
            found.append(float(losses[name].sum))
    expected = losses_of(whole)
    np.testing.assert_allclose(sum(parts["global"]), expected["global"].sum, rtol=1e-5)
    assert sum(parts["expert"]) > 1.05 * expected["expert"].sum


def test_losses_take_each_layer_by_itself():
    """One layer's excess does not hide another's lack: pooled over layers, this load would be even."""
    one_sided, valid_BS = np.zeros((B, S, 6), np.float32), np.ones((B, S), bool)
    one_sided[..., [0, 2]] = 3
    other_sided = one_sided[..., ::-1].copy()
    layers = [grouped_stats(logits, valid_BS) for logits in (one_sided, other_sided)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    for name, loss in losses_of(stacked).items():
        apart = [losses_of(layer)[name] for layer in layers]
        np.testing.assert_allclose(loss.sum, sum(float(part.sum) for part in apart), rtol=1e-5)
        assert loss.count == 2 * B * S
    assert losses_of(stacked)["expert"].mean() > 2


def test_perfect_balance_gives_1():
    """All experts, devices and ways of sending alike; the communication loss needs each token to use M devices."""
    even_E, tokens = jnp.full(6, 4.0), jnp.array(12.0)
    affinity_E = jnp.array([5.0, 1.0, 2.0, 2.0, 0.5, 1.5])  # sums to the tokens; scores need not be even
    for loss in (
        expert_balance_loss(even_E, affinity_E, tokens, 2),
        device_balance_loss(even_E, affinity_E, tokens, 2, 3),
        device_balance_loss(jnp.array([8.0, 0, 3, 5, 4, 4]), affinity_E, tokens, 2, 3),
        communication_balance_loss(jnp.full(3, 8.0), affinity_E, tokens, 2),
        global_balance_loss(10 * even_E, affinity_E, tokens),
    ):
        np.testing.assert_allclose(loss.mean(), 1.0, rtol=1e-6)
    np.testing.assert_allclose(communication_balance_loss(jnp.full(3, 4.0), affinity_E, tokens, 2).mean(), 0.5)


@pytest.mark.parametrize("name", ["expert", "device", "communication", "global", "z"])
def test_descent_on_the_logits_lowers_each_loss(name):
    logits_BSE, valid_BS = grouped_logits(1), batch()[1]
    logits_BSE[..., 0] += 2
    slope = jax.jit(jax.grad(lambda logits_BSE: losses_of(grouped_stats(logits_BSE, valid_BS))[name].mean()))
    gradient_BSE = np.asarray(slope(logits_BSE))
    assert np.all(np.isfinite(gradient_BSE)) and np.all(gradient_BSE[valid_BS][:, 0] > 0)
    assert not np.any(gradient_BSE[~valid_BS])


def test_nothing_counted_gives_no_nan():
    losses = grouped_losses(grouped_logits(0), np.zeros((B, S), bool))
    assert all(loss.sum == 0 and loss.count == 0 for loss in losses.values())


# Figures -------------------------------------------------------------------------------------------------------------


def test_load_metrics_are_means_by_layer():
    load = RouterLoad(
        counts_LE=jnp.array([[8.0, 0, 8, 0], [4, 4, 4, 4]]),
        tokens_L=jnp.array([8.0, 8.0]),
        entropy_L=jnp.array([4.0, 8.0]),
        confidence_L=jnp.array([6.0, 2.0]),
        dropped_L=jnp.array([4.0, 0.0]),
    )
    metrics = load_metrics(load, jnp.array([[3.0, 0, -4, 0], [0, 0, 0, 0]]))
    expected = {
        "max_violation": [1.0, 0.0],
        "load_entropy": [np.log(2), np.log(4)],
        "dead_experts": [2.0, 0.0],
        "score_entropy": [0.5, 1.0],
        "confidence": [0.75, 0.25],
        "dropped_fraction": [0.25, 0.0],
        "bias_norm": [5.0, 0.0],
    }
    assert metrics.keys() == {"expert_load", *expected, *(f"{name}_by_layer" for name in expected)}
    for name, layers in expected.items():
        np.testing.assert_allclose(metrics[f"{name}_by_layer"], layers, rtol=1e-6, atol=1e-7, err_msg=name)
        np.testing.assert_allclose(metrics[name], np.mean(layers), rtol=1e-6, err_msg=name)
    np.testing.assert_array_equal(metrics["expert_load"], [[2, 0, 2, 0], [1, 1, 1, 1]])
    without = load_metrics(load._replace(dropped_L=None))
    assert not {"dropped_fraction", "bias_norm"} & without.keys()
    np.testing.assert_array_equal(relative_load(jnp.zeros(3)), 0)


def test_router_load_sums_over_the_batch():
    valid_BS = batch()[1]
    stats = jax.tree.map(lambda x: x[None], grouped_stats(grouped_logits(0), valid_BS))
    load = router_load(stats, has_capacity=True)
    assert load.tokens_L == valid_BS.sum() and load.dropped_L == valid_BS.sum()
    np.testing.assert_array_equal(load.counts_LE, np.sum(stats.counts_BE, axis=1))
    assert router_load(stats).dropped_L is None


@pytest.mark.parametrize(
    ("counts", "violation", "entropy"),
    [([4, 4, 4, 4], 0.0, np.log(4)), ([16, 0, 0, 0], 3.0, 0.0), ([8, 8, 0, 0], 1.0, np.log(2)), ([0] * 4, 0.0, 0.0)],
)
def test_load_figures(counts, violation, entropy):
    counts_LE = np.array([counts, [1, 1, 1, 1]])
    np.testing.assert_allclose(max_violation(counts_LE), [violation, 0.0], atol=1e-6)
    np.testing.assert_allclose(load_entropy(counts_LE), [entropy, np.log(4)], atol=1e-6)
