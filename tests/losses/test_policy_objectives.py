"""Every option of the policy objective against loops in float64, and the common objectives against TRL's own losses.

Shapes: B batch of samples, S tokens of a sample.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe_jax.config import PolicyLossConfig
from moe_jax.losses.policy import kl_estimate, policy_loss

B, S, MAX_LENGTH = 8, 6, 9
GOLDENS = json.loads(Path(__file__).with_name("trl_goldens.json").read_text())

CONFIGS = {
    "dr_grpo": PolicyLossConfig(aggregation="seq-mean-token-sum-norm"),
    "gspo": PolicyLossConfig(
        importance_sampling_level="sequence", epsilon=0.05, epsilon_high=0.08, aggregation="seq-mean-token-mean"
    ),
    "gspo_token_mean_kl": PolicyLossConfig(importance_sampling_level="sequence", beta=0.2, kl_estimator="k3_weighted"),
    "cispo": PolicyLossConfig(surrogate="cispo", epsilon=1.0, epsilon_high=0.3),
    "cispo_low": PolicyLossConfig(surrogate="cispo", epsilon=0.2, epsilon_high=0.3, beta=0.1, kl_estimator="k2"),
    "reinforce": PolicyLossConfig(surrogate="reinforce", aggregation="seq-mean-token-sum"),
    "k1": PolicyLossConfig(beta=0.3, kl_estimator="k1", aggregation="seq-mean-token-sum"),
    "r1": PolicyLossConfig(epsilon=10.0, epsilon_high=10.0, beta=0.001),
    "off_policy_mask": PolicyLossConfig(off_policy_mask_threshold=0.05, beta=0.1),
    "token_truncate": PolicyLossConfig(sampler_correction="token_truncate", sampler_correction_max=1.1, beta=0.1),
    "token_mask": PolicyLossConfig(sampler_correction="token_mask", sampler_correction_max=1.1),
    "sequence_truncate": PolicyLossConfig(sampler_correction="sequence_truncate", sampler_correction_max=1.2),
    "sequence_mask": PolicyLossConfig(
        sampler_correction="sequence_mask", sampler_correction_max=1.2, off_policy_mask_threshold=0.05
    ),
}
BY_SEQUENCE = ["dr_grpo", "gspo", "off_policy_mask", "sequence_mask"]


def batch(token_advantages=False):
    """Log-probabilities, old, advantages, mask, reference, sampler's; the last sample has no token that counts."""
    rng = np.random.default_rng(1)
    logprobs_BS = -rng.exponential(size=(B, S))
    old_BS, ref_BS = (logprobs_BS + rng.normal(size=(B, S), scale=0.4) for _ in range(2))
    sampler_BS = old_BS + rng.normal(size=(B, S), scale=0.2)
    lengths_B = np.array([6, 3, 1, 4, 5, 2, 6, 0])
    advantages = rng.normal(size=(B, S) if token_advantages else B)
    arrays = (x.astype(np.float32) for x in (logprobs_BS, old_BS, advantages, ref_BS, sampler_BS))
    logprobs_BS, old_BS, advantages, ref_BS, sampler_BS = arrays
    return logprobs_BS, old_BS, advantages, np.arange(S) < lengths_B[:, None], ref_BS, sampler_BS


def reference(logprobs_BS, old_BS, advantages, mask_BS, ref_BS, sampler_BS, cfg, frozen_BS):
    """(sum, count) from the papers' formulas; what is a constant for the gradient comes from `frozen_BS`."""
    total, tokens, sequences = 0.0, 0, 0
    corrected = cfg.sampler_correction != "none"
    for b in range(B):
        columns = np.flatnonzero(mask_BS[b])
        if not len(columns):
            continue
        p, q, ref, drawn, frozen = (
            x[b, columns].astype(np.float64) for x in (logprobs_BS, old_BS, ref_BS, sampler_BS, frozen_BS)
        )
        advantage = np.broadcast_to(advantages[b] if advantages.ndim == 1 else advantages[b, columns], len(columns))
        advantage = advantage.astype(np.float64)

        def ratio(now, old=q):
            if cfg.importance_sampling_level == "sequence":
                return np.full(len(now), (np.prod(np.exp(now)) / np.prod(np.exp(old))) ** (1 / len(now)))
            return np.exp(now) / np.exp(old)

        low, high = 1 - cfg.epsilon, 1 + cfg.epsilon_high
        if cfg.surrogate == "clip":
            loss = -np.minimum(ratio(p) * advantage, np.minimum(np.maximum(ratio(p), low), high) * advantage)
        elif cfg.surrogate == "cispo":
            loss = -np.minimum(np.maximum(ratio(frozen), low), high) * advantage * p
        else:
            loss = -advantage * p
        if cfg.off_policy_mask_threshold:
            far = np.mean((drawn if corrected else q) - frozen) > cfg.off_policy_mask_threshold
            loss = np.where(far & (advantage < 0), 0, loss)
        if corrected:
            weight = np.exp(q) / np.exp(drawn)
            if cfg.sampler_correction.startswith("sequence"):
                weight = np.full(len(q), np.prod(weight))
            bound = cfg.sampler_correction_max
            beyond = bound if cfg.sampler_correction.endswith("truncate") else 0.0
            loss = loss * np.where(weight > bound, beyond, weight)
        if cfg.beta:
            r = np.exp(ref) / np.exp(p)
            kl = {"k1": -np.log(r), "k2": np.log(r) ** 2 / 2}.get(cfg.kl_estimator, r - 1 - np.log(r))
            if cfg.kl_estimator == "k3_weighted":
                kl = kl * np.exp(p) / np.exp(q)
            loss = loss + cfg.beta * kl
        tokens += len(columns)
        sequences += 1
        divisor = {"seq-mean-token-mean": len(columns), "seq-mean-token-sum-norm": MAX_LENGTH}
        total += np.sum(loss) / divisor.get(cfg.aggregation, 1)
    return total, tokens if cfg.aggregation == "token-mean" else sequences


@functools.cache
def gradient(cfg):
    """Batch → its policy loss, and the sum's gradient with respect to the log-probabilities."""

    def loss(logprobs_BS, old_BS, advantages, mask_BS, ref_BS, sampler_BS):
        if not cfg.beta:
            ref_BS = None
        if cfg.sampler_correction == "none":
            sampler_BS = None
        result = policy_loss(
            logprobs_BS,
            old_BS,
            advantages,
            mask_BS,
            cfg,
            ref_BS,
            sampler_logprobs_BS=sampler_BS,
            max_length=MAX_LENGTH,
        )
        return result.loss.sum, result

    def run(*data):
        (_, result), grad_BS = jax.value_and_grad(loss, has_aux=True)(*data)
        return result, grad_BS

    return jax.jit(run)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("token_advantages", [False, True])
def test_losses_and_gradients_match_the_papers_formulas(name, token_advantages):
    cfg, data = CONFIGS[name], batch(token_advantages)
    (loss, _), grad_BS = gradient(cfg)(*data)
    total, count = reference(*data, cfg, data[0])
    np.testing.assert_allclose(loss.sum, total, rtol=1e-5)
    assert loss.count == count
    logprobs64, step = data[0].astype(np.float64), 1e-6
    for index in np.ndindex(B, S):
        up, down = logprobs64.copy(), logprobs64.copy()
        up[index] += step
        down[index] -= step
        slope = (reference(up, *data[1:], cfg, data[0])[0] - reference(down, *data[1:], cfg, data[0])[0]) / (2 * step)
        np.testing.assert_allclose(grad_BS[index], slope, atol=5e-6)


def test_each_option_does_something_on_this_batch():
    """The comparisons above would not see an option that nothing on the batch triggers."""
    data = batch()
    plain = policy_loss(*data[:4], PolicyLossConfig()).loss.sum
    for name, cfg in CONFIGS.items():
        (loss, metrics), _ = gradient(cfg)(*data)
        assert abs(loss.sum - plain) > 1e-4, name
        if cfg.off_policy_mask_threshold:
            assert 0 < metrics["off_policy_masked"].mean() < 1
        if cfg.sampler_correction != "none":
            assert 0 < metrics["sampling/correction/bounded"].mean() < 1
            assert metrics["sampling/correction/mean"].mean() > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_what_the_mask_hides_does_not_matter(name):
    logprobs_BS, old_BS, advantages_B, mask_BS, ref_BS, sampler_BS = batch()
    one = gradient(CONFIGS[name])(logprobs_BS, old_BS, advantages_B, mask_BS, ref_BS, sampler_BS)
    for garbage in (np.float32(np.nan), np.float32(-np.inf)):
        hidden = [np.where(mask_BS, x, garbage) for x in (logprobs_BS, old_BS, ref_BS, sampler_BS)]
        other = gradient(CONFIGS[name])(*hidden[:2], advantages_B, mask_BS, *hidden[2:])
        for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", BY_SEQUENCE)
def test_eight_devices_give_the_numbers_of_one(name):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, data, run = NamedSharding(mesh, PartitionSpec("data")), batch(), gradient(CONFIGS[name])
    one, many = run(*data), run(*(jax.device_put(x, rows) for x in data))
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", BY_SEQUENCE)
def test_micro_batches_add_up_to_the_batch(name):
    data, run = batch(), gradient(CONFIGS[name])
    whole, whole_grad = run(*data)
    parts = [run(*(x[row : row + 2] for x in data)) for row in range(0, B, 2)]
    np.testing.assert_allclose(sum(float(p.loss.sum) for p, _ in parts), whole.loss.sum, rtol=1e-5)
    assert sum(float(p.loss.count) for p, _ in parts) == whole.loss.count
    np.testing.assert_allclose(np.concatenate([grad for _, grad in parts]), whole_grad, atol=1e-6)


OURS = {
    "grpo": PolicyLossConfig(aggregation="seq-mean-token-mean", beta=0.1),
    "dapo": PolicyLossConfig(epsilon_high=0.28),
    "dr_grpo": PolicyLossConfig(aggregation="seq-mean-token-sum-norm"),
    "gspo": PolicyLossConfig(
        aggregation="seq-mean-token-mean", importance_sampling_level="sequence", epsilon=0.03, epsilon_high=0.04
    ),
    "cispo": PolicyLossConfig(surrogate="cispo", epsilon=1.0, epsilon_high=0.3),
    "k3_weighted": PolicyLossConfig(aggregation="seq-mean-token-mean", beta=0.1, kl_estimator="k3_weighted"),
    "off_policy_mask": PolicyLossConfig(aggregation="seq-mean-token-mean", beta=0.1, off_policy_mask_threshold=0.1),
}


@pytest.mark.parametrize("name", GOLDENS["cases"])
def test_trl_gets_the_same_loss_and_gradient(name):
    golden, cfg = GOLDENS["cases"][name], OURS[name]
    data = {key: np.array(value) for key, value in GOLDENS["tensors"].items()}
    data = {key: value.astype(np.float32) if value.dtype != bool else value for key, value in data.items()}
    ref_BS = data["ref_logprobs_BS"] if cfg.beta else None

    def loss(logprobs_BS):
        arrays = (data[key] for key in ("old_logprobs_BS", "advantages_B", "mask_BS"))
        result = policy_loss(logprobs_BS, *arrays, cfg, ref_BS, max_length=data["mask_BS"].shape[1])
        return result.loss.mean(), result.metrics

    (value, metrics), grad_BS = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(data["logprobs_BS"]))
    np.testing.assert_allclose(value, golden["loss"], rtol=2e-6, atol=2e-7)
    np.testing.assert_allclose(grad_BS, golden["gradient_BS"], atol=1e-6)
    if cfg.beta:
        np.testing.assert_allclose(metrics["kl"].mean(), golden["kl"], rtol=2e-6)


def test_kl_estimators_estimate_the_kl_and_have_the_gradients_that_are_said():
    """Over all tokens of a small vocabulary, weighted by their probability, not by samples."""
    rng = np.random.default_rng(0)
    logits_V, ref_V, old_V = (jnp.asarray(rng.normal(size=6), jnp.float32) for _ in range(3))
    ref_V, old_V = jax.nn.log_softmax(ref_V), jax.nn.log_softmax(old_V)

    def exact(logits_V):
        logp_V = jax.nn.log_softmax(logits_V)
        return jnp.sum(jnp.exp(logp_V) * (logp_V - ref_V))

    def expected(logits_V, estimator, drawn_V):
        """The mean over tokens drawn from a distribution that is a constant for the gradient."""
        logp_V = jax.nn.log_softmax(logits_V)
        return jnp.sum(jnp.exp(drawn_V) * kl_estimate(logp_V, ref_V, estimator, logp_V - drawn_V))

    own_V = jax.nn.log_softmax(logits_V)
    value, slope = jax.value_and_grad(exact)(logits_V)
    found = {name: jax.value_and_grad(expected)(logits_V, name, own_V) for name in ("k1", "k2", "k3", "k3_weighted")}
    for name in ("k1", "k3", "k3_weighted"):
        np.testing.assert_allclose(found[name][0], value, rtol=1e-5)
    np.testing.assert_allclose(found["k1"][1], 0, atol=1e-6)
    np.testing.assert_allclose(found["k2"][1], slope, atol=1e-6)
    np.testing.assert_allclose(found["k3_weighted"][1], slope, atol=1e-6)
    assert np.abs(found["k3"][1] - slope).max() > 0.01
    off_value, off_slope = jax.value_and_grad(expected)(logits_V, "k3_weighted", old_V)
    np.testing.assert_allclose(off_value, value, rtol=1e-5)
    np.testing.assert_allclose(off_slope, slope, atol=1e-6)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (CONFIGS["token_mask"], "sampler_correction = 'token_mask'"),
        (CONFIGS["dr_grpo"], "aggregation = 'seq-mean-token-sum-norm'"),
    ],
)
def test_what_an_option_needs_is_asked_for(cfg, message):
    with pytest.raises(ValueError, match=message):
        policy_loss(*batch()[:4], cfg)
