"""The value loss and its figures against loops in float64. Shapes: B batch of samples, S tokens of a sample."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe_jax.losses.critic import explained_variance, value_loss

B, S = 8, 5
MASK_BS = np.arange(S) < np.array([5, 3, 1, 4, 0, 2, 5, 5])[:, None]


def batch():
    rng = np.random.default_rng(0)
    values_BS, returns_BS = rng.normal(size=(2, B, S))
    old_BS = values_BS + rng.normal(size=(B, S), scale=0.4)
    return [x.astype(np.float32) for x in (values_BS, old_BS, returns_BS)]


def reference(values_BS, old_BS, returns_BS, cliprange):
    total, clipped = 0.0, 0
    for b, s in zip(*np.nonzero(MASK_BS), strict=True):
        value, old, target = float(values_BS[b, s]), float(old_BS[b, s]), float(returns_BS[b, s])
        error = (value - target) ** 2
        if cliprange:
            bounded = (min(max(value, old - cliprange), old + cliprange) - target) ** 2
            clipped += bounded > error
            error = max(error, bounded)
        total += error / 2
    return total, clipped


@pytest.mark.parametrize("cliprange", [0.0, 0.3])
def test_loss_and_gradient_match_the_loop(cliprange):
    values_BS, old_BS, returns_BS = batch()

    def loss(values_BS):
        result = value_loss(values_BS, old_BS, returns_BS, MASK_BS, cliprange)
        return result.loss.sum, result

    (_, result), grad_BS = jax.value_and_grad(loss, has_aux=True)(values_BS)
    total, clipped = reference(values_BS, old_BS, returns_BS, cliprange)
    np.testing.assert_allclose(result.loss.sum, total, rtol=1e-5)
    assert result.loss.count == MASK_BS.sum()
    assert result.metrics["critic/clip_ratio"].sum == clipped and bool(clipped) == bool(cliprange)
    values64, step = values_BS.astype(np.float64), 1e-6
    for index in np.ndindex(B, S):
        up, down = values64.copy(), values64.copy()
        up[index] += step
        down[index] -= step
        slope = reference(up, old_BS, returns_BS, cliprange)[0] - reference(down, old_BS, returns_BS, cliprange)[0]
        np.testing.assert_allclose(grad_BS[index], slope / (2 * step), atol=2e-6)


def test_what_the_mask_hides_does_not_matter_and_eight_devices_give_the_numbers_of_one():
    data = batch()
    hidden = [np.where(MASK_BS, x, np.float32(np.nan)) for x in data]
    rows = NamedSharding(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec("data"))

    @jax.jit
    def run(values_BS, old_BS, returns_BS, mask_BS):
        def loss(values_BS):
            return value_loss(values_BS, old_BS, returns_BS, mask_BS, 0.3).loss.sum

        return jax.value_and_grad(loss)(values_BS)

    one, other = run(*data, MASK_BS), run(*hidden, MASK_BS)
    many = run(*(jax.device_put(x, rows) for x in (*data, MASK_BS)))
    for x, y, z in zip(one, other, many, strict=True):
        np.testing.assert_array_equal(x, y)
        np.testing.assert_allclose(x, z, rtol=1e-5)


def test_explained_variance():
    values_BS, _, returns_BS = batch()
    of = jax.jit(explained_variance)
    np.testing.assert_allclose(of(returns_BS + 3, returns_BS, MASK_BS), 1, rtol=1e-5)
    np.testing.assert_allclose(of(np.zeros_like(returns_BS), returns_BS, MASK_BS), 0, atol=1e-6)
    expected = 1 - np.var((returns_BS - values_BS)[MASK_BS]) / np.var(returns_BS[MASK_BS])
    np.testing.assert_allclose(of(values_BS, returns_BS, MASK_BS), expected, rtol=1e-4)
    assert of(values_BS, np.ones_like(returns_BS), MASK_BS) == 0
