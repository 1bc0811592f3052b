"""Token log-probabilities against loops in float64, in every implementation, chunked, padded, banned and sharded.

Shapes: B batch, S sequence, D model, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe_jax.ops.token_logprobs import token_logprobs

B, S, D, V = 8, 7, 5, 11
BANNED = (0, 9)
FORMS = [
    pytest.param({"implementation": "plain"}, id="plain"),
    pytest.param({}, id="one chunk"),
    pytest.param({"chunk_size": 3}, id="chunks of 3"),
    pytest.param({"chunk_size": 3, "shards": (4, 1)}, id="chunks and shards"),
    pytest.param({"chunk_size": 1, "shards": (4, 7)}, id="shards of rows and columns"),
]


def example(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    hidden_BSD = rng.normal(size=(B, S, D)).astype(dtype)
    head_DV = rng.normal(size=(D, V)).astype(dtype)
    allowed = [token for token in range(V) if token not in BANNED]
    targets_BS = rng.choice(allowed, size=(B, S)).astype(np.int32)
    weights_BS = rng.normal(size=(B, S)).astype(dtype)
    return hidden_BSD, head_DV, targets_BS, weights_BS


def reference(hidden_BSD, head_DV, targets_BS, banned=()):
    """Log-probabilities and entropies, token by token in float64."""
    logprobs, entropies = np.zeros(targets_BS.shape), np.zeros(targets_BS.shape)
    for index in np.ndindex(*targets_BS.shape):
        logits = {
            v: float(np.dot(hidden_BSD[index].astype(np.float64), head_DV[:, v].astype(np.float64)))
            for v in range(head_DV.shape[1])
            if v not in banned
        }
        log_total = np.log(sum(np.exp(x) for x in logits.values()))
        logprobs[index] = logits.get(int(targets_BS[index]), -np.inf) - log_total
        entropies[index] = -sum(np.exp(x - log_total) * (x - log_total) for x in logits.values())
    return logprobs, entropies


def central_differences(loss, x, step=1e-5):
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
def gradient(banned=(), **form):
    """(hidden, head, targets, weights) → Σ weight · logprob where the weight is not 0, its parts and gradients."""

    def loss(hidden, head, targets, weights):
        result = token_logprobs(hidden, head, targets, banned_ids=banned, with_entropy=True, **form)
        return jnp.sum(jnp.where(weights != 0, result.logprobs, 0) * weights), result

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


@pytest.mark.parametrize("banned", [(), BANNED])
@pytest.mark.parametrize("form", FORMS)
def test_values_match_the_loop(form, banned):
    hidden_BSD, head_DV, targets_BS, weights_BS = example()
    (_, result), _ = gradient(banned, **form)(hidden_BSD, head_DV, targets_BS, weights_BS)
    logprobs_BS, entropy_BS = reference(hidden_BSD, head_DV, targets_BS, banned)
    assert result.logprobs.dtype == jnp.float32
    np.testing.assert_allclose(result.logprobs, logprobs_BS, atol=2e-6)
    np.testing.assert_allclose(result.entropy, entropy_BS, atol=2e-6)


@functools.cache
def reference_gradient():
    hidden_BSD, head_DV, targets_BS, weights_BS = example()

    def loss(hidden, head):
        return np.sum(reference(hidden, head, targets_BS, BANNED)[0] * weights_BS)

    # A token's hidden state moves that token's term alone: all tokens are moved at once.
    hidden64, step, columns = hidden_BSD.astype(np.float64), 1e-5, []
    for axis in range(D):
        shift = step * np.eye(D)[axis]
        up, down = (reference(hidden64 + sign * shift, head_DV, targets_BS, BANNED)[0] for sign in (1, -1))
        columns.append(weights_BS * (up - down) / (2 * step))
    return np.stack(columns, axis=-1), central_differences(lambda head: loss(hidden_BSD, head), head_DV)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_match_central_differences(form):
    _, (grad_hidden, grad_head) = gradient(BANNED, **form)(*example())
    expected_hidden, expected_head = reference_gradient()
    np.testing.assert_allclose(grad_hidden, expected_hidden, atol=3e-6)
    np.testing.assert_allclose(grad_head, expected_head, atol=2e-5)
    assert not np.any(np.asarray(grad_head)[:, list(BANNED)])


@pytest.mark.parametrize("form", FORMS[:3])
def test_bfloat16_accumulates_in_float32(form):
    hidden_BSD, head_DV, targets_BS, weights_BS = example()
    hidden_BSD = jnp.asarray(hidden_BSD, jnp.bfloat16)
    exact_BSD, rounded_DV = (np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in (hidden_BSD, head_DV))
    (_, result), grads = gradient((), **form)(hidden_BSD, head_DV, targets_BS, weights_BS)
    np.testing.assert_allclose(result.logprobs, reference(exact_BSD, rounded_DV, targets_BS)[0], atol=3e-6)
    assert [grad.dtype for grad in grads] == [jnp.bfloat16, jnp.float32]
    _, exact_grads = gradient((), **form)(exact_BSD, rounded_DV, targets_BS, weights_BS)
    for grad, exact in zip(grads, exact_grads, strict=True):
        np.testing.assert_allclose(grad.astype(jnp.float32), exact, atol=0.03)


@pytest.mark.parametrize("form", FORMS)
def test_a_banned_target_is_impossible_and_gives_no_gradient(form):
    hidden_BSD, head_DV, targets_BS, weights_BS = example()
    targets_BS[:, 2] = BANNED[1]
    hidden_targets_BS = np.where(targets_BS == BANNED[1], 0, weights_BS)
    (_, result), grads = gradient(BANNED, **form)(hidden_BSD, head_DV, targets_BS, hidden_targets_BS)
    assert np.all(np.isneginf(result.logprobs[:, 2]))
    assert np.array_equal(np.isfinite(result.logprobs), targets_BS != BANNED[1])
    assert all(np.all(np.isfinite(grad)) for grad in grads)
    _, unmasked_grads = gradient(BANNED, **form)(hidden_BSD, head_DV, targets_BS, weights_BS)
    for grad, unmasked in zip(grads, unmasked_grads, strict=True):
        np.testing.assert_array_equal(grad, unmasked)


def test_entropy_is_a_metric():
    hidden_BSD, head_DV, targets_BS, _ = example()
    for implementation in ("chunked", "plain"):

        @jax.jit
        @jax.grad
        def entropy_gradient(hidden, implementation=implementation):
            return jnp.sum(
                token_logprobs(hidden, head_DV, targets_BS, with_entropy=True, implementation=implementation).entropy
            )

        assert not np.any(entropy_gradient(hidden_BSD))
    assert jax.eval_shape(lambda: token_logprobs(hidden_BSD, head_DV, targets_BS)).entropy is None


def test_large_logits_do_not_overflow():
    hidden_BSD, head_DV, targets_BS, _ = example()
    weights_BS = np.ones((B, S), np.float32)
    (_, result), grads = gradient()(1e3 * hidden_BSD, head_DV, targets_BS, weights_BS)
    (_, plain), plain_grads = gradient(implementation="plain")(1e3 * hidden_BSD, head_DV, targets_BS, weights_BS)
    np.testing.assert_allclose(result.logprobs, plain.logprobs, rtol=1e-6, atol=1e-3)
    np.testing.assert_allclose(result.entropy, plain.entropy, atol=1e-5)
    for grad, plain_grad in zip(grads, plain_grads, strict=True):
        np.testing.assert_allclose(grad, plain_grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("lead", [(), (2,), (2, 4)])
def test_any_leading_axes(lead):
    hidden_BSD, head_DV, targets_BS, _ = example()
    count = int(np.prod(lead))
    hidden, targets = hidden_BSD[:count].reshape(*lead, S, D), targets_BS[:count].reshape(*lead, S)
    result = jax.jit(lambda *args: token_logprobs(*args, chunk_size=2).logprobs)(hidden, head_DV, targets)
    assert result.shape == (*lead, S)
    np.testing.assert_allclose(result, reference(hidden, head_DV, targets)[0], atol=2e-6)


@pytest.mark.parametrize(
    ("mesh_shape", "form"),
    [((8, 1), {}), ((8, 1), {"chunk_size": 2, "shards": (8, 1)}), ((2, 4), {"chunk_size": 2})],
)
def test_eight_devices_give_the_numbers_of_one(form, mesh_shape):
    hidden_BSD, head_DV, targets_BS, weights_BS = example()
    head_DV = np.concatenate([head_DV, head_DV[:, :1]], axis=1)  # 12 tokens, so that 4 devices can share them
    mesh = jax.make_mesh(mesh_shape, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    rows, head = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("data",), (None, "tensor")))
    arguments = (hidden_BSD, head_DV, targets_BS, weights_BS)
    spread = [jax.device_put(x, s) for x, s in zip(arguments, (rows, head, rows, rows), strict=True)]
    one_device, many_devices = (gradient(BANNED, **form)(*x) for x in (arguments, spread))
    for one, many in zip(jax.tree.leaves(one_device), jax.tree.leaves(many_devices), strict=True):
        np.testing.assert_allclose(one, many, atol=1e-5)


def test_shards_communicate_once_and_not_in_every_chunk():
    hidden_BSD, head_DV, targets_BS, _ = example()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())

    def loss(hidden, head, targets):
        return jnp.sum(token_logprobs(hidden, head, targets, chunk_size=2, shards=(8, 1)).logprobs)

    compiled = jax.jit(jax.grad(loss, (0, 1)), in_shardings=(rows, everywhere, rows), out_shardings=(rows, everywhere))
    program = compiled.lower(hidden_BSD, head_DV, targets_BS).compile().as_text()
    assert program.count(" while(") == 1, "the backward pass is one loop over chunks"
    loops = program.split("\nENTRY")[0]
    assert not any(f" {name}(" in loops for name in ("all-reduce", "all-gather", "all-to-all", "collective-permute"))
    assert program.count(" all-reduce(") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"banned_ids": (V,)}, r"banned_ids = \(11,\).*\[0, 11\)"),
        ({"banned_ids": tuple(range(V))}, "at least one token"),
        ({"chunk_size": 0}, "chunk_size = 0"),
        ({"shards": (3, 1)}, r"shards = \(3, 1\).*first axis"),
        ({"implementation": "fast"}, "implementation = 'fast'"),
    ],
)
def test_illegal_arguments_are_named(change, message):
    hidden_BSD, head_DV, targets_BS, _ = example()
    with pytest.raises(ValueError, match=message):
        token_logprobs(hidden_BSD, head_DV, targets_BS, **change)


def test_shapes_that_do_not_belong_together_are_named():
    hidden_BSD, head_DV, targets_BS, _ = example()
    with pytest.raises(ValueError, match="do not belong together"):
        token_logprobs(hidden_BSD, head_DV, targets_BS[:, 1:])
    with pytest.raises(ValueError, match="do not belong together"):
        token_logprobs(hidden_BSD, head_DV.T, targets_BS)
