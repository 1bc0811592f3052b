"""Routing rules against transcriptions of the published ones in numpy.

T tokens, D model, E experts, K experts per token, B batch, S sequence.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.model import router as router_module
from moe_jax.model.layers import Initializer
from moe_jax.model.router import (
    Router,
    RouterOutput,
    estimated_scaling_factor,
    fixed_experts,
    router_stats,
    updated_bias,
)

route = functools.partial(jax.jit, static_argnames="cfg")(router_module.route)
call = jax.jit(lambda router, x_TD: router(x_TD, jnp.zeros(len(x_TD), jnp.int32), 0))

T, D = 64, 12
V3 = MoEConfig(num_experts=16, num_experts_per_token=4, num_groups=4, num_groups_per_token=2, routed_scaling_factor=2.5)
V2 = MoEConfig(
    num_experts=16,
    num_experts_per_token=4,
    num_groups=4,
    num_groups_per_token=2,
    score="softmax",
    group_score="max",
    normalize_weights=False,
    routed_scaling_factor=16.0,
    selection_bias=False,
)
MIXTRAL = MoEConfig(num_experts=8, num_experts_per_token=2, score="softmax", selection_bias=False)
OLMOE = dataclasses.replace(MIXTRAL, normalize_weights=False)


def logits(num_experts, seed=0):
    return np.random.default_rng(seed).normal(size=(T, num_experts)).astype(np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def softmax(x):
    e = np.exp(np.asarray(x, np.float64) - np.max(x, axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def chosen(routed):
    """{expert: weight} of each token; the experts' order has no meaning."""
    pairs = zip(np.asarray(routed.experts_TK), np.asarray(routed.weights_TK), strict=True)
    return [dict(zip(experts.tolist(), weights.tolist(), strict=True)) for experts, weights in pairs]


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose([a[e] for e in sorted(a)], [b[e] for e in sorted(b)], rtol=2e-5)


def v3_rule(scores_TE, bias_E, cfg):
    """DeepSeek-V3's rule, one token at a time."""
    result, size = [], cfg.num_experts // cfg.num_groups
    for scores in scores_TE:
        biased = scores + bias_E
        groups = [biased[g * size : (g + 1) * size] for g in range(cfg.num_groups)]
        group_scores = [sum(sorted(group)[-2:]) for group in groups]
        kept = np.argsort(group_scores)[-cfg.num_groups_per_token :]
        candidates = [e for e in range(cfg.num_experts) if e // size in kept]
        experts = sorted(candidates, key=lambda e, biased=biased: biased[e])[-cfg.num_experts_per_token :]
        total = sum(scores[e] for e in experts)
        result.append({e: scores[e] / (total + 1e-20) * cfg.routed_scaling_factor for e in experts})
    return result


BIASES = {
    "zero": np.zeros(16),
    "small": np.random.default_rng(7).normal(size=16) * 0.3,
    "all strongly negative": -5 + np.random.default_rng(8).normal(size=16),
    "one group favoured, an expert of each other group near 0": np.array([3.0] * 4 + [-9, -9, -9, 0.0] * 3),
}


@pytest.mark.parametrize("bias_E", BIASES.values(), ids=BIASES.keys())
def test_deepseek_v3_rule(bias_E):
    scores = sigmoid(logits(16))
    routed = route(jnp.asarray(scores, jnp.float32), jnp.asarray(bias_E, jnp.float32), V3)
    assert_same(chosen(routed), v3_rule(scores, bias_E, V3))


def test_no_bias_brings_a_masked_expert_back():
    """Biased scores of kept groups are below 0: a mask with 0 instead of -inf would prefer the groups that lost."""
    routed = route(jnp.asarray(sigmoid(logits(16)), jnp.float32), jnp.full(16, -50.0), V3)
    groups = np.asarray(routed.experts_TK) // 4
    assert max(len(set(row)) for row in groups.tolist()) == 2
    assert_same(chosen(routed), v3_rule(sigmoid(logits(16)), np.zeros(16), V3))


def test_bias_chooses_and_does_not_weigh():
    scores = sigmoid(logits(16))
    cfg = dataclasses.replace(V3, num_groups=1, num_groups_per_token=1)
    routed = route(jnp.asarray(scores, jnp.float32), 10.0 * np.eye(16, dtype=np.float32)[3], cfg)
    for token, experts in enumerate(chosen(routed)):
        assert 3 in experts
        total = sum(scores[token, e] for e in experts)
        assert experts[3] == pytest.approx(2.5 * scores[token, 3] / total, rel=1e-5)


def test_normalised_weights_sum_to_the_scaling_factor():
    routed = route(jnp.asarray(sigmoid(logits(16)), jnp.float32), None, V3)
    np.testing.assert_allclose(np.sum(routed.weights_TK, axis=1), 2.5, rtol=1e-5)


def test_deepseek_v2_group_limited_greedy():
    scores = softmax(logits(16))
    expected = []
    for row in scores:
        kept = np.argsort([row[g * 4 : g * 4 + 4].max() for g in range(4)])[-2:]
        experts = sorted((e for e in range(16) if e // 4 in kept), key=lambda e, row=row: row[e])[-4:]
        expected.append({e: 16.0 * row[e] for e in experts})
    assert_same(chosen(route(jnp.asarray(scores, jnp.float32), None, V2)), expected)


def test_group_scores_differ():
    """max and the sum of two choose different groups: a group with one best expert against one with two good ones."""
    scores = jnp.array([[0.9, 0.0, 0.6, 0.6]])
    cfg = MoEConfig(num_experts=4, num_experts_per_token=1, num_groups=2, num_groups_per_token=1)
    assert route(scores, None, cfg).experts_TK.item() in (2, 3)
    assert route(scores, None, dataclasses.replace(cfg, group_score="max")).experts_TK.item() == 0


def test_a_groups_two_best_may_be_equal():
    scores = jnp.array([[0.6, 0.0, 0.4, 0.4]])
    cfg = MoEConfig(num_experts=4, num_experts_per_token=1, num_groups=2, num_groups_per_token=1)
    assert route(scores, None, cfg).experts_TK.item() in (2, 3)


def router_of(cfg, seed=0):
    model = ModelConfig(hidden_size=D, moe=cfg)
    abstract = jax.eval_shape(lambda: Router(model, Initializer(model, nnx.Rngs(0))))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray((x.ndim == 2) * rng.normal(size=x.shape), jnp.float32), abstract)


def tokens():
    return np.random.default_rng(3).normal(size=(T, D)).astype(np.float32)


def test_mixtral_is_a_softmax_over_the_best_logits():
    router, x = router_of(MIXTRAL), tokens()
    all_logits = x.astype(np.float64) @ np.asarray(router.gate_DE[...], np.float64)
    expected = []
    for row in all_logits:
        best = np.argsort(row)[-2:]
        expected.append(dict(zip(best.tolist(), softmax(row[best]).tolist(), strict=True)))
    assert_same(chosen(call(router, x)), expected)


@pytest.mark.parametrize("normalize", [True, False], ids=["qwen3", "olmoe"])
def test_softmax_router_with_and_without_renormalisation(normalize):
    router, x = router_of(dataclasses.replace(OLMOE, normalize_weights=normalize)), tokens()
    expected = []
    for row in softmax(x.astype(np.float64) @ np.asarray(router.gate_DE[...], np.float64)):
        best = np.argsort(row)[-2:]
        expected.append({int(e): row[e] / (row[best].sum() if normalize else 1) for e in best})
    assert_same(chosen(call(router, x)), expected)


def test_sigmoid_router_is_the_v3_rule_on_its_affinities():
    router, x = router_of(V3), tokens()
    router.bias[...] = jnp.asarray(BIASES["small"], jnp.float32)
    scores = sigmoid(x.astype(np.float64) @ np.asarray(router.gate_DE[...], np.float64))
    routed = call(router, x)
    np.testing.assert_allclose(routed.scores_TE, scores, rtol=1e-4, atol=1e-6)
    assert_same(chosen(routed), v3_rule(scores, BIASES["small"], V3))


def test_affinities_are_float32_for_bfloat16_tokens():
    router, x = router_of(V3), jnp.asarray(tokens(), jnp.bfloat16)
    routed = call(router, x)
    assert routed.scores_TE.dtype == routed.weights_TK.dtype == jnp.float32
    exact = sigmoid(np.asarray(x, np.float64) @ np.asarray(router.gate_DE[...], np.float64))
    np.testing.assert_allclose(routed.scores_TE, exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cfg", [V3, V2, MIXTRAL], ids=["v3", "v2", "mixtral"])
def test_gate_has_a_gradient(cfg):
    router, x = router_of(cfg), tokens()
    graph, params, rest = nnx.split(router, nnx.Param, ...)
    weigh = jnp.arange(1.0, cfg.num_experts_per_token + 1)

    def loss(params):
        return jnp.sum(nnx.merge(graph, params, rest)(x, None, 0).weights_TK * weigh)

    (gradient,) = jax.tree.leaves(jax.jit(jax.grad(loss))(params))
    assert gradient.shape == (D, cfg.num_experts) and np.all(np.isfinite(gradient)) and np.any(gradient)


def test_bias_has_no_gradient_and_is_no_parameter():
    router = router_of(V3)
    assert [path for path, _ in nnx.to_flat_state(nnx.state(router, nnx.Param))] == [("gate_DE",)]
    gradient = jax.jit(
        jax.grad(lambda bias: jnp.sum(route(jnp.asarray(sigmoid(logits(16))), bias, V3).weights_TK ** 2))
    )
    np.testing.assert_array_equal(gradient(jnp.asarray(BIASES["small"])), 0)


def test_gradients_stay_finite_when_all_affinities_vanish():
    @jax.jit
    @jax.grad
    def gradient(logits_TE):
        scores_TE = jax.nn.sigmoid(logits_TE)
        routed = RouterOutput(*route(scores_TE, None, V3), scores_TE, logits_TE)
        stats = router_stats(routed, jnp.ones((1, T), bool), jnp.zeros(T), V3)
        return jnp.sum(routed.weights_TK[:, 0]) + jnp.sum(stats.affinity_BE[:, 0]) + 1e-6 * jnp.sum(stats.z_B)

    for shift in (50.0, 90.0, 200.0):
        assert np.all(np.isfinite(gradient(logits(16) - shift)))


def test_bias_moves_by_the_sign_of_the_violation():
    bias_LE = jnp.array([[0.5, 0.0, -0.5, 0.0], [1.0, 1.0, 1.0, 1.0]])
    counts_LE = jnp.array([[8, 4, 0, 4], [3, 3, 3, 4]], jnp.int32)
    moved = updated_bias(bias_LE, counts_LE, 0.1) - bias_LE
    np.testing.assert_allclose(moved, [[-0.1, 0, 0.1, 0], [0.1, 0.1, 0.1, -0.1]], atol=1e-6)


def test_zero_mean_updates_keep_the_mean():
    counts_LE = jnp.array([[8, 4, 0, 4], [3, 3, 3, 7]], jnp.int32)
    moved = updated_bias(jnp.ones((2, 4)), counts_LE, 0.1, zero_mean=True) - 1
    np.testing.assert_allclose(moved, [[-0.1, 0, 0.1, 0], [0.05, 0.05, 0.05, -0.15]], atol=1e-6)
    assert np.mean(updated_bias(jnp.ones((2, 4)), counts_LE, 0.1), axis=1)[1] > 1.04


def test_repeated_updates_balance_the_load():
    scores = np.asarray(sigmoid(logits(16) + np.linspace(-1, 1, 16)), jnp.float32)
    cfg = dataclasses.replace(V3, num_groups=1, num_groups_per_token=1)

    @jax.jit
    def step(bias):
        experts = route(scores, bias, cfg).experts_TK
        counts = jnp.sum(experts.reshape(-1, 1) == jnp.arange(16), axis=0)
        return updated_bias(bias[None], counts[None], 0.01)[0], counts

    bias, first = step(jnp.zeros(16))
    for _ in range(100):
        bias, last = step(bias)
    assert np.max(first) > 1.7 * T * 4 / 16
    assert np.max(last) < 1.3 * T * 4 / 16


CONTROLS = {"score": "softmax", "selection_bias": False, "sequence_balance_coef": 0.0}


def stats_by_loop(routed, valid, dropped, cfg):
    """Every field of `RouterStats` in float64, one token at a time."""
    (B, S), E, N, K = valid.shape, cfg.num_experts, cfg.num_groups, cfg.num_experts_per_token
    scores_BSE = np.asarray(routed.scores_TE, np.float64).reshape(B, S, E)
    logits_BSE = np.asarray(routed.logits_TE, np.float64).reshape(B, S, E)
    experts_BSK = np.asarray(routed.experts_TK).reshape(B, S, K)
    counts, unbiased, affinity = np.zeros((3, B, E))
    groups, (z, entropy, confidence, drops) = np.zeros((B, N)), np.zeros((4, B))
    for b, s in zip(*np.nonzero(valid), strict=True):
        share = scores_BSE[b, s] / scores_BSE[b, s].sum()
        counts[b, experts_BSK[b, s]] += 1
        unbiased[b, np.argsort(share)[-K:]] += 1
        affinity[b] += share
        groups[b, sorted({e // (E // N) for e in experts_BSK[b, s]})] += 1
        z[b] += np.log(np.sum(np.exp(logits_BSE[b, s]))) ** 2
        entropy[b] -= np.sum(share * np.log(share))
        confidence[b] += share.max()
        drops[b] += dropped[b * S + s]
    return (
        counts,
        unbiased,
        affinity,
        valid.sum(axis=1),
        groups,
        z,
        entropy,
        confidence,
        drops,
        np.where(valid[..., None], experts_BSK, -1),
    )


def test_stats_are_sums_over_valid_tokens_only():
    router, x = router_of(V3), tokens()
    router.bias[...] = jnp.asarray(BIASES["small"], jnp.float32)
    routed = call(router, x)
    valid = np.arange(16) < np.array([[16], [5], [1], [0]])
    dropped = np.random.default_rng(1).integers(0, 3, T).astype(np.float32)
    stats = jax.jit(router_stats, static_argnums=3)(routed, valid, dropped, V3)
    for name, found, wanted in zip(stats._fields, stats, stats_by_loop(routed, valid, dropped, V3), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-5, err_msg=name)
    assert not np.array_equal(stats.counts_BE, stats.unbiased_counts_BE)
    assert np.any(stats.group_tokens_BN[0] < 16) and np.all(np.sum(stats.group_tokens_BN[:3], axis=1) > 0)


def test_without_the_sequence_loss_no_second_choice_is_made():
    routed = call(router_of(V3), tokens())
    valid = np.ones((4, 16), bool)
    for change in ({"sequence_balance_coef": 0.0}, {"selection_bias": False}):
        stats = router_stats(routed, valid, np.zeros(T), dataclasses.replace(V3, **change))
        np.testing.assert_array_equal(stats.unbiased_counts_BE, stats.counts_BE)


def test_only_affinities_and_z_have_a_gradient():
    router, x = router_of(V3), tokens()
    graph, params, rest = nnx.split(router, nnx.Param, ...)

    @jax.jit
    @jax.jacrev
    def gradients(params):
        routed = nnx.merge(graph, params, rest)(x, None, 0)
        stats = router_stats(routed, jnp.ones((1, T), bool), jnp.sum(routed.weights_TK, axis=1), V3)
        return {name: value.ravel()[0] for name, value in stats._asdict().items() if name != "experts_BSK"}

    with_gradient = {name for name, tree in gradients(params).items() if np.any(jax.tree.leaves(tree)[0])}
    assert with_gradient == {"affinity_BE", "z_B"}


# Controls ------------------------------------------------------------------------------------------------------------


def test_uniform_routing_loads_every_expert_alike_on_full_rows():
    cfg = MoEConfig(num_experts=8, num_experts_per_token=3, routing="uniform", **CONTROLS)
    positions_T = np.tile(np.arange(T // 4), 4)
    experts_TK = np.asarray(fixed_experts(positions_T, 0, cfg))
    np.testing.assert_array_equal(np.bincount(experts_TK.ravel(), minlength=8), T * 3 / 8)
    np.testing.assert_array_equal(experts_TK[3], [1, 2, 3])
    assert all(len(set(row)) == 3 for row in experts_TK.tolist())


def test_hash_routing_draws_distinct_experts_evenly_for_each_token_and_layer():
    cfg, ids = MoEConfig(num_experts=16, num_experts_per_token=4, routing="hash", **CONTROLS), np.arange(4096)
    draw = jax.jit(lambda keys_T, layer: fixed_experts(keys_T, layer, cfg))
    first, second = np.asarray(draw(ids, 0)), np.asarray(draw(ids, 1))
    assert all(len(set(row)) == 4 for row in first.tolist())
    np.testing.assert_array_equal(np.asarray(draw(ids[::-1].copy(), 0)), first[::-1])
    for experts_TK in (first, second):
        load_E = np.bincount(experts_TK.ravel(), minlength=16) / (len(ids) * 4 / 16)
        np.testing.assert_allclose(load_E, 1, atol=0.12)  # 4 standard deviations: sqrt(3/4 / 1024) = 0.027
    # Independent draws of 4 of 16 have 1 in common on average: between layers, and between neighbouring tokens.
    for other in (second, np.roll(first, 1, axis=0)):
        common = np.mean([len(set(a) & set(b)) for a, b in zip(first.tolist(), other.tolist(), strict=True)])
        assert common == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("routing", ["hash", "uniform"])
def test_the_gate_weighs_fixed_experts_and_learns(routing):
    cfg = MoEConfig(num_experts=8, num_experts_per_token=2, routing=routing, routed_scaling_factor=2.0, **CONTROLS)
    router, x, keys_T = router_of(cfg), tokens(), np.arange(T, dtype=np.int32)
    routed = jax.jit(lambda router, x: router(x, keys_T, 3))(router, x)
    np.testing.assert_array_equal(routed.experts_TK, fixed_experts(keys_T, 3, cfg))
    scores = softmax(x.astype(np.float64) @ np.asarray(router.gate_DE[...], np.float64))
    expected = [
        {int(e): 2.0 * row[e] / row[list(experts)].sum() for e in experts}
        for row, experts in zip(scores, np.asarray(routed.experts_TK), strict=True)
    ]
    assert_same(chosen(routed), expected)
    gradient = jax.grad(lambda gate: jnp.sum(router_with(router, gate)(x, keys_T, 3).weights_TK[:, 0]))
    assert np.any(gradient(router.gate_DE[...]))


def router_with(router, gate_DE):
    graph, state = nnx.split(router)
    state["gate_DE"] = state["gate_DE"].replace(gate_DE)
    return nnx.merge(graph, state)


# Scale ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("experts", "chosen_experts", "scale"), [(64, 6, 2.446), (384, 8, 2.827), (8, 2, 1.41)])
def test_estimated_scaling_factor_is_the_published_one(experts, chosen_experts, scale):
    cfg = MoEConfig(num_experts=experts, num_experts_per_token=chosen_experts, routed_scaling_factor=7.0)
    assert estimated_scaling_factor(cfg) == pytest.approx(scale, rel=5e-3)


def test_estimated_scaling_factor_of_other_routers():
    """Equal weights of K experts have norm 1/√K; weights that are not normalised need a larger factor."""
    uniform = MoEConfig(num_experts=8, num_experts_per_token=4, score="softmax", selection_bias=False)
    assert 1 < estimated_scaling_factor(uniform) < 2
    plain = dataclasses.replace(uniform, normalize_weights=False)
    assert estimated_scaling_factor(plain) > estimated_scaling_factor(uniform)
    every = MoEConfig(num_experts=2, num_experts_per_token=2, routing="uniform", **CONTROLS)
    logits = np.random.default_rng(5).normal(size=(100_000, 2))
    assert estimated_scaling_factor(every) == pytest.approx(
        np.mean(1 / np.linalg.norm(softmax(logits), axis=1)), rel=5e-3
    )
