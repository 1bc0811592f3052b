"""Distillation losses against loops in float64: values, gradients, chunks, top-k, padding, devices.

Shapes: B batch, S sequence, D student's width, C teacher's width, V vocabulary, K stored tokens.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe_jax.losses.distillation import distillation_loss, hidden_state_loss, relation_loss
from moe_jax.ops.token_divergence import Teacher, TopK, token_divergence, top_k_logprobs

B, S, D, C, V, K = 8, 6, 4, 3, 12, 3
BANNED = (0, 7)
FORMS = [
    pytest.param({}, id="one chunk"),
    pytest.param({"chunk_size": 2}, id="chunks of 2"),
    pytest.param({"chunk_size": 2, "shards": (4, 1)}, id="chunks and shards"),
    pytest.param({"chunk_size": 1, "shards": (2, 2)}, id="shards of rows and columns"),
]
BETAS = [0.0, 0.3, 1.0]


def example(seed=0):
    """Hidden states and heads of student and teacher, and weights, of which some are 0."""
    rng = np.random.default_rng(seed)
    shapes = [(B, S, D), (D, V), (B, S, C), (C, V)]
    arrays = [1.5 * rng.normal(size=shape).astype(np.float32) for shape in shapes]
    weights_BS = (rng.uniform(size=(B, S)) * (rng.uniform(size=(B, S)) > 0.3)).astype(np.float32)
    return *arrays, weights_BS


def log_probabilities(hidden, head, temperature, banned):
    logits = hidden.astype(np.float64) @ head.astype(np.float64) / temperature
    logits[..., list(banned)] = -np.inf
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def divergence(log_p, log_q, beta):
    """Σ over the outcomes, one at a time: GKD's definition, and its two ends."""
    total = 0.0
    for lp, lq in zip(log_p, log_q, strict=True):
        p, q = np.exp(lp), np.exp(lq)
        if p == q == 0:
            continue
        m = {0: q, 1: p}.get(beta, beta * p + (1 - beta) * q)
        total += {0: 1, 1: 0}.get(beta, beta) * p * np.log(p / m) + {0: 0, 1: 1}.get(beta, 1 - beta) * q * np.log(q / m)
    return total


def bucketed(log_p, ids):
    """The K tokens' log-probabilities, and that of all others together."""
    others = np.delete(np.exp(log_p), ids).sum()
    return np.append(log_p[ids], np.log(others))


def reference(hidden, head, teacher_hidden, teacher_head, weights, beta, temperature, banned=(), k=None):
    log_q = log_probabilities(hidden, head, temperature, banned)
    log_p = log_probabilities(teacher_hidden, teacher_head, temperature, banned)
    total = 0.0
    for index in zip(*np.nonzero(weights), strict=True):
        p, q = log_p[index], log_q[index]
        if k:
            ids = np.argsort(-p)[:k]
            p, q = bucketed(p, ids), bucketed(q, ids)
        total += weights[index] * temperature**2 * divergence(p, q, beta)
    return total


def central_differences(loss, x, step=1e-6):
    x = np.array(x, np.float64)
    grad = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        value = x[index]
        x[index] = value + step
        up = loss(x)
        x[index] = value - step
        grad[index] = (up - loss(x)) / (2 * step)
        x[index] = value
    return grad


@functools.cache
def gradient(k=None, **form):
    """Arrays of `example` → (sum, count), and the gradients of the sum by all four arrays of the models."""

    def loss(hidden, head, teacher_hidden, teacher_head, weights):
        teacher = Teacher(teacher_hidden, teacher_head)
        if k:
            options = {name: form[name] for name in form if name != "beta"}
            teacher = top_k_logprobs(*teacher, k, **options)
        result = distillation_loss(hidden, head, teacher, weights, **form)
        return result.sum, result

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("form", FORMS)
def test_values_match_the_loop(form, beta):
    arrays = example()
    (value, result), _ = gradient(beta=beta, temperature=2.0, banned_ids=BANNED, **form)(*arrays)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, reference(*arrays, beta, 2.0, BANNED), rtol=1e-5)
    np.testing.assert_allclose(result.count, arrays[-1].sum(), rtol=1e-6)


@functools.cache
def reference_gradients(beta, k):
    small = [x[:2] if x.shape[0] == B else x for x in example()]
    hidden, head, *rest = small
    return small, (
        central_differences(lambda x: reference(x, head, *rest, beta, 2.0, BANNED, k), hidden),
        central_differences(lambda x: reference(hidden, x, *rest, beta, 2.0, BANNED, k), head),
    )


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("k", [None, K])
@pytest.mark.parametrize("form", FORMS[:2])
def test_gradients_match_central_differences_and_reach_the_student_alone(form, k, beta):
    arrays, expected = reference_gradients(beta, k)
    (value, _), grads = gradient(k, beta=beta, temperature=2.0, banned_ids=BANNED, **form)(*arrays)
    np.testing.assert_allclose(value, reference(*arrays, beta, 2.0, BANNED, k), rtol=1e-5)
    for grad, want in zip(grads, expected, strict=False):
        np.testing.assert_allclose(grad, want, atol=2e-5)
    assert not np.any(grads[2]) and not np.any(grads[3])
    assert not np.any(np.asarray(grads[1])[:, list(BANNED)])


@pytest.mark.parametrize("beta", BETAS)
def test_a_student_that_is_the_teacher_has_nothing_to_learn(beta):
    hidden, head, *_, weights = example()
    (value, _), grads = gradient(beta=beta)(hidden, head, hidden, head, weights)
    np.testing.assert_allclose(value, 0, atol=1e-5)
    assert max(np.abs(grad).max() for grad in grads) < 1e-5


def test_cut_down_distributions_diverge_less_and_whole_ones_the_same():
    arrays = example()
    for beta in BETAS:
        whole, *cut = (float(gradient(k, beta=beta)(*arrays)[0][0]) for k in (None, 1, K, V))
        assert 0 < cut[0] < cut[1] < whole
        np.testing.assert_allclose(cut[2], whole, rtol=1e-5)


def test_stored_distributions_are_normalised_and_may_be_narrow():
    hidden, head, teacher_hidden, teacher_head, weights = example()
    teacher = top_k_logprobs(jnp.asarray(teacher_hidden), jnp.asarray(teacher_head), K)
    np.testing.assert_allclose(np.exp(teacher.logprobs).sum(-1), 1, rtol=1e-5)
    exact, shifted, narrow = (
        distillation_loss(hidden, head, t, weights).sum
        for t in (
            teacher,
            TopK(teacher.ids, teacher.logprobs + 3),
            TopK(teacher.ids, teacher.logprobs.astype(jnp.bfloat16)),
        )
    )
    np.testing.assert_allclose(shifted, exact, rtol=1e-5)
    np.testing.assert_allclose(narrow, exact, rtol=0.02)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("k", [None, K])
def test_padding_counts_nowhere_even_if_it_is_not_finite(k, beta):
    arrays = example()
    padding = arrays[-1] == 0
    assert padding.any()
    spoiled = [np.where(padding[..., None], bad, x) for x, bad in ((arrays[0], np.nan), (arrays[2], np.inf))]
    form = gradient(k, beta=beta, temperature=2.0, banned_ids=BANNED, chunk_size=2)
    (value, _), grads = form(*arrays)
    (spoiled_value, _), spoiled_grads = form(spoiled[0], arrays[1], spoiled[1], arrays[3], arrays[4])
    np.testing.assert_array_equal(spoiled_value, value)
    for spoiled_grad, grad in zip(spoiled_grads, grads, strict=True):
        np.testing.assert_array_equal(spoiled_grad, grad)
    assert not np.any(np.asarray(grads[0])[padding])


def test_far_apart_distributions_stay_finite():
    hidden, head, teacher_hidden, teacher_head, weights = example()
    for beta in BETAS:
        (value, _), grads = gradient(beta=beta)(1e3 * hidden, head, 1e3 * teacher_hidden, teacher_head, weights)
        assert np.isfinite(value) and all(np.all(np.isfinite(grad)) for grad in grads)


@pytest.mark.parametrize("k", [None, K])
def test_eight_devices_give_the_numbers_of_one(k):
    arrays = example()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("data",), ()))
    spread = [jax.device_put(x, rows if x.shape[0] == B else everywhere) for x in arrays]
    form = gradient(k, beta=0.3, chunk_size=2, shards=(8, 1))
    for one, many in zip(jax.tree.leaves(form(*arrays)), jax.tree.leaves(form(*spread)), strict=True):
        np.testing.assert_allclose(one, many, atol=1e-5)


def test_logits_of_all_tokens_never_exist():
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 256, 8), (8, 4096), (2, 256, 8), (8, 4096))]
    weights = jax.ShapeDtypeStruct((2, 256), jnp.float32)
    whole = 2 * 256 * 4096 * 4
    for k in (None, K):
        compiled = gradient(k, chunk_size=16).lower(*shapes, weights).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < whole


def test_bfloat16_is_close_and_keeps_the_types():
    arrays = example()
    narrow = [jnp.asarray(x, jnp.bfloat16) if x.ndim == 3 else x for x in arrays]
    exact, rounded = (gradient(beta=0.3, chunk_size=2)(*x) for x in (arrays, narrow))
    np.testing.assert_allclose(rounded[0][0], exact[0][0], rtol=0.03)
    assert [grad.dtype for grad in rounded[1][:2]] == [jnp.bfloat16, jnp.float32]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 1.5}, "beta = 1.5"),
        ({"temperature": 0.0}, "temperature = 0"),
        ({"banned_ids": (V,)}, r"banned_ids = \(12,\)"),
        ({"chunk_size": 0}, "chunk_size = 0"),
        ({"shards": (3, 1)}, r"shards = \(3, 1\)"),
        ({"shards": (1, 4)}, r"shards = \(1, 4\)"),
    ],
)
def test_illegal_arguments_are_named(change, message):
    hidden, head, teacher_hidden, teacher_head, _ = example()
    with pytest.raises(ValueError, match=message):
        token_divergence(hidden, head, Teacher(teacher_hidden, teacher_head), **change)


def test_what_does_not_belong_together_is_refused():
    hidden, head, teacher_hidden, teacher_head, _ = map(jnp.asarray, example())
    with pytest.raises(ValueError, match=r"vocabulary has 12 tokens, the teacher's 11.*by sequences"):
        token_divergence(hidden, head, Teacher(teacher_hidden, teacher_head[:, 1:]))
    with pytest.raises(ValueError, match="teacher's hidden"):
        token_divergence(hidden, head, Teacher(teacher_hidden[1:], teacher_head))
    with pytest.raises(ValueError, match="top-k ids"):
        token_divergence(hidden, head, TopK(jnp.zeros((B, S, K), jnp.int32), jnp.zeros((B, S, K))))
    with pytest.raises(ValueError, match="k = 11"):
        top_k_logprobs(hidden, head, 11, banned_ids=BANNED)


def test_hidden_states_are_matched_through_the_projection():
    hidden, _, teacher_hidden, _, weights = example()
    projection = np.random.default_rng(1).normal(size=(D, C)).astype(np.float32)

    def reference(projection):
        error = hidden.astype(np.float64) @ projection - teacher_hidden
        return np.sum(weights * np.mean(error**2, axis=-1))

    def loss(hidden, teacher, projection):
        return hidden_state_loss(hidden, teacher, weights, projection).sum

    bad = np.where(weights[..., None] == 0, np.nan, hidden)
    value, grads = jax.value_and_grad(loss, (0, 1, 2))(bad, teacher_hidden, projection)
    np.testing.assert_allclose(value, reference(projection), rtol=1e-5)
    np.testing.assert_allclose(grads[2], central_differences(reference, projection), rtol=1e-4, atol=1e-5)
    assert np.any(grads[0]) and np.all(np.isfinite(grads[0])) and not np.any(grads[1])
    assert hidden_state_loss(hidden, hidden, weights).sum == 0
    with pytest.raises(ValueError, match="projection_DC"):
        hidden_state_loss(hidden, teacher_hidden, weights)


def relation_example():
    rng = np.random.default_rng(3)
    student, teacher = (rng.normal(size=(2, 4, width)).astype(np.float32) for width in (4, 6))
    segments = np.array([[1, 1, 2, 2], [1, 1, 1, 0]])
    mask = (segments[:, :, None] == segments[:, None, :]) & np.tri(4, dtype=bool) & (segments > 0)[:, None, :]
    return student, teacher, mask, (segments > 0).astype(np.float32)


def relation_reference(student, teacher, mask, weights, num_heads):
    total = 0.0
    for b, s in zip(*np.nonzero(weights), strict=True):
        seen = np.nonzero(mask[b, s])[0]
        for h in range(num_heads):
            logs = []
            for x in (teacher, student):
                width = x.shape[-1] // num_heads
                head = x[b, :, h * width : (h + 1) * width].astype(np.float64)
                scores = head[seen] @ head[s] / np.sqrt(width)
                logs.append(scores - np.log(np.exp(scores).sum()))
            total += weights[b, s] * divergence(*logs, 0) / num_heads
    return total


def test_relations_match_the_loop_and_ignore_padding():
    student, teacher, mask, weights = relation_example()

    def loss(student, teacher):
        return relation_loss(student, teacher, mask, weights, 2).sum

    bad = np.where(weights[..., None] == 0, np.nan, student)
    value, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(bad, teacher)
    np.testing.assert_allclose(value, relation_reference(student, teacher, mask, weights, 2), rtol=1e-5)
    want = central_differences(lambda x: relation_reference(x, teacher, mask, weights, 2), student)
    np.testing.assert_allclose(grads[0], want, atol=1e-5)
    assert not np.any(grads[1])
    np.testing.assert_allclose(relation_loss(student, student, mask, weights, 2).sum, 0, atol=1e-6)
    with pytest.raises(ValueError, match="num_heads = 4"):
        relation_loss(student, teacher, mask, weights, 4)
