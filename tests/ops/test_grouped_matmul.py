"""Grouped products against a float64 loop over groups. T rows, D input width, F output width, E groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.ops.grouped_matmul import Gathered, _tiled_weight_gradient, grouped_matmul, product, weight_gradient

IMPLEMENTATIONS = ["ragged", "blocked", "reference"]

# Rows of x, and rows of each group. Few different shapes, as each is compiled anew.
GROUPS = {
    "balanced": (300, [50, 50, 50, 50, 50, 50]),
    "all on one": (300, [0, 0, 0, 300, 0, 0]),
    "all on the first": (300, [300, 0, 0, 0, 0, 0]),
    "all on the last": (300, [0, 0, 0, 0, 0, 300]),
    "empty at both ends": (300, [0, 70, 0, 0, 230, 0]),
    "rows beyond the sum": (300, [130, 0, 3, 40, 0, 1]),
    "no rows at all": (300, [0, 0, 0, 0, 0, 0]),
    "tiny last groups": (300, [280, 3, 3, 4, 9, 1]),
    "tiny first groups": (300, [1, 0, 2, 1, 1, 295]),
    "whole blocks": (520, [128, 256, 32, 96]),
    "one off whole blocks": (520, [129, 127, 31, 161]),
    "one off short blocks": (520, [33, 160, 1, 326]),
    "fewer rows than groups": (3, [0, 1, 0, 0, 1, 0, 1, 0]),
    "few rows, some beyond the sum": (6, [0, 2, 0, 0, 1, 0, 0, 1]),
    "one row": (1, [0, 1]),
    "one group": (40, [40]),
}


def make_inputs(num_rows, sizes, D=8, F=6, seed=0):
    rng = np.random.default_rng(seed)
    x_TD, w_EDF, dy_TF = (rng.normal(size=s) for s in ((num_rows, D), (len(sizes), D, F), (num_rows, F)))
    return x_TD, w_EDF, dy_TF, np.array(sizes, np.int32)


def loop_over_groups(x_TD, w_EDF, dy_TF, sizes_E):
    """y, dx and dw in float64."""
    x_TD, w_EDF, dy_TF = (np.asarray(a, np.float64) for a in (x_TD, w_EDF, dy_TF))
    y_TF, dx_TD, dw_EDF = np.zeros_like(dy_TF), np.zeros_like(x_TD), np.zeros_like(w_EDF)
    start = 0
    for e, size in enumerate(np.asarray(sizes_E)):
        rows = slice(start, start + size)
        y_TF[rows] = x_TD[rows] @ w_EDF[e]
        dx_TD[rows] = dy_TF[rows] @ w_EDF[e].T
        dw_EDF[e] = x_TD[rows].T @ dy_TF[rows]
        start += size
    return y_TF, dx_TD, dw_EDF


def value_and_gradients(implementation, x_TD, w_EDF, dy_TF, sizes_E):
    y_TF, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes_E, implementation=implementation), x_TD, w_EDF)
    return y_TF, *pull(dy_TF)


compiled = jax.jit(value_and_gradients, static_argnums=0)


def check(implementation, inputs, dtype=jnp.float32, tolerance=2e-5):
    x_TD, w_EDF, dy_TF = (jnp.asarray(a, dtype) for a in inputs[:3])
    expected = loop_over_groups(x_TD, w_EDF, dy_TF, inputs[3])
    for name, got, want in zip(
        ("y", "dx", "dw"), compiled(implementation, x_TD, w_EDF, dy_TF, inputs[3]), expected, strict=True
    ):
        assert got.dtype == dtype
        np.testing.assert_allclose(
            np.asarray(got, np.float64), want, rtol=tolerance, atol=tolerance * max(1, np.abs(want).max()), err_msg=name
        )


@pytest.mark.parametrize("case", GROUPS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_a_loop_over_groups(implementation, case):
    check(implementation, make_inputs(*GROUPS[case]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_random_sizes(implementation):
    num_rows, num_groups = 300, 6
    for seed in range(20):
        rng = np.random.default_rng(seed)
        used = rng.integers(num_rows + 1)
        sizes = rng.multinomial(used, rng.dirichlet(np.full(num_groups, 0.2)))
        check(implementation, make_inputs(num_rows, sizes, seed=seed))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_accumulates_in_float32(implementation):
    # 2^-8 is the rounding of the result; sums over 300 rows kept in bfloat16 would be off by far more.
    check(implementation, make_inputs(620, [300, 0, 270, 20], D=64, F=16), jnp.bfloat16, tolerance=2**-8)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_beyond_the_sum_do_not_matter(implementation):
    x_TD, w_EDF, dy_TF, sizes_E = make_inputs(300, [60, 0, 45, 0, 0, 0])
    x_TD[105:], dy_TF[105:] = 1e30, 1e30
    y_TF, dx_TD, dw_EDF = compiled(
        implementation, *(jnp.asarray(a, jnp.float32) for a in (x_TD, w_EDF, dy_TF)), sizes_E
    )
    assert not np.any(y_TF[105:])
    assert not np.any(dx_TD[105:])
    expected = loop_over_groups(x_TD, w_EDF, dy_TF, sizes_E)
    np.testing.assert_allclose(dw_EDF, expected[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["ragged", "blocked"])
def test_an_infinity_stays_in_its_group(implementation):
    x_TD, w_EDF, dy_TF, sizes_E = make_inputs(300, [60, 0, 45, 0, 0, 0])
    dy_TF[60:] = np.inf
    arrays = (jnp.asarray(a, jnp.float32) for a in (x_TD, w_EDF, dy_TF))
    _, dx_TD, dw_EDF = compiled(implementation, *arrays, sizes_E)
    assert np.all(np.isfinite(dw_EDF[:2])) and np.all(np.isfinite(dx_TD[:60])) and not np.any(np.isfinite(dw_EDF[2]))


@pytest.mark.parametrize("implementation", ["ragged", "blocked"])
def test_gathered_rows_are_the_rows_that_they_name(implementation):
    x_TD, w_EDF, dy_TF, sizes_E = make_inputs(300, [0, 120, 3, 0, 97, 60])  # 20 rows of no group
    rng = np.random.default_rng(0)
    index_T = rng.integers(0, 300, 300).astype(np.int32)
    index_T[280:] = 300  # rows of no group name nothing
    taken_TD, taken_TF = (np.concatenate([a[index_T[:280]], np.zeros((20, a.shape[1]))]) for a in (x_TD, dy_TF))

    @jax.jit
    def run(x_TD, w_EDF, dy_TF):
        x, dy = Gathered(x_TD, index_T), Gathered(dy_TF, index_T)
        return (
            product(x, w_EDF, sizes_E, implementation=implementation),
            product(dy, w_EDF, sizes_E, transpose_w=True, implementation=implementation),
            weight_gradient(x, dy, sizes_E, implementation),
        )

    found = run(*(jnp.asarray(a, jnp.float32) for a in (x_TD, w_EDF, dy_TF)))
    for a, b in zip(found, loop_over_groups(taken_TD, w_EDF, taken_TF, sizes_E), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-4)


def test_groups_longer_than_the_longest_block():
    check("blocked", make_inputs(4200, [2100, 0, 5, 2050], D=3, F=2), tolerance=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_under_scan_and_checkpoint(implementation):
    """Gradients through a scan over rematerialised layers equal those of plain layers written one by one."""
    rng = np.random.default_rng(0)
    x_TD = jnp.asarray(rng.normal(size=(90, 8)), jnp.float32)
    w_LEDF = jnp.asarray(rng.normal(size=(3, 4, 8, 8)) / 3, jnp.float32)
    sizes_LE = jnp.array([[20, 0, 70, 0], [0, 30, 30, 30], [89, 1, 0, 0]])

    @jax.checkpoint
    def layer(x_TD, w_and_sizes):
        w_EDF, sizes_E = w_and_sizes
        return x_TD + jnp.tanh(grouped_matmul(x_TD, w_EDF, sizes_E, implementation=implementation)), None

    def scanned(x_TD, w_LEDF):
        return jnp.sum(jax.lax.scan(layer, x_TD, (w_LEDF, sizes_LE))[0] ** 2)

    def unrolled(x_TD, w_LEDF):
        for w_EDF, sizes_E in zip(w_LEDF, np.asarray(sizes_LE), strict=True):
            group_T = np.repeat(np.arange(4), sizes_E)
            x_TD = x_TD + jnp.tanh(jnp.einsum("TD,TDF->TF", x_TD, w_EDF[group_T]))
        return jnp.sum(x_TD**2)

    got = jax.jit(jax.value_and_grad(scanned, (0, 1)))(x_TD, w_LEDF)
    want = jax.value_and_grad(unrolled, (0, 1))(x_TD, w_LEDF)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("implementation", ["ragged", "blocked"])
@pytest.mark.parametrize(
    "x_spec, w_spec", [(("data", None), (None, None, None)), (("data", None), ("data", None, None))]
)
def test_sharded_inputs_give_the_same_numbers(implementation, x_spec, w_spec):
    assert jax.device_count() == 8
    inputs = make_inputs(256, [50, 0, 100, 6, 20, 0, 40, 30], D=16, F=8)
    x_TD, w_EDF, dy_TF = (jnp.asarray(a, jnp.float32) for a in inputs[:3])
    mesh = Mesh(np.array(jax.devices()), ("data",))
    sharded = (
        jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec)))
        for a, spec in ((x_TD, x_spec), (w_EDF, w_spec), (dy_TF, x_spec))
    )
    for got, want in zip(
        compiled(implementation, *sharded, inputs[3]), loop_over_groups(x_TD, w_EDF, dy_TF, inputs[3]), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_matrices_of_empty_groups_reach_nothing():
    x_TD, w_EDF, dy_TF, sizes_E = make_inputs(300, [0, 160, 0, 140, 0, 0])
    w_EDF[sizes_E == 0] = np.nan
    got = compiled("blocked", *(jnp.asarray(a, jnp.float32) for a in (x_TD, w_EDF, dy_TF)), sizes_E)
    assert all(np.all(np.isfinite(a)) for a in got)


def test_the_default_on_cpu_is_blocked():
    x_TD, w_EDF, dy_TF, sizes_E = make_inputs(300, [50, 0, 100, 150, 0, 0])
    arrays = [jnp.asarray(a, jnp.float32) for a in (x_TD, w_EDF, dy_TF)]
    for got, want in zip(compiled(None, *arrays, sizes_E), compiled("blocked", *arrays, sizes_E), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("platform, ragged", [("cpu", False), ("tpu", True)])
def test_the_platform_lowered_for_chooses(platform, ragged):
    x_TD, w_EDF, _, sizes_E = make_inputs(64, [30, 34])
    x_TD, w_EDF = jnp.asarray(x_TD, jnp.float32), jnp.asarray(w_EDF, jnp.float32)
    text = jax.jit(grouped_matmul).trace(x_TD, w_EDF, sizes_E).lower(lowering_platforms=(platform,)).as_text()
    assert ("ragged_dot" in text) == ragged
    assert ("stablehlo.while" in text) != ragged


@pytest.mark.parametrize("num_rows, sizes", [(300, [0, 120, 3, 0, 97, 60]), (3, [0, 1, 0, 1]), (40, [0, 0, 0])])
def test_the_tpus_weight_gradient_is_that_of_a_loop(num_rows, sizes):
    """Its kernel, interpreted; rows of no group hold what is not a number."""
    x_TD, w_EDF, dy_TF, sizes_E = make_inputs(num_rows, sizes)
    expected = loop_over_groups(x_TD, w_EDF, dy_TF, sizes_E)[2]
    x_TD[sum(sizes) :], dy_TF[sum(sizes) :] = np.nan, np.inf
    arrays = (jnp.asarray(a, jnp.float32) for a in (x_TD, dy_TF))
    found = jax.jit(functools.partial(_tiled_weight_gradient, interpret=True))(*arrays, sizes_E)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_the_tpus_weight_gradient_does_the_work_of_its_rows():
    def gradient(x_TD, dy_TF, sizes_E):
        return weight_gradient(x_TD, dy_TF, sizes_E)

    shapes = jax.ShapeDtypeStruct((1024, 256), jnp.bfloat16), jax.ShapeDtypeStruct((1024, 128), jnp.bfloat16)
    traced = jax.jit(gradient).trace(*shapes, jax.ShapeDtypeStruct((4,), jnp.int32))
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in text and "ragged_dot" not in text


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x_TD=jnp.zeros((4, 5))), "D must agree"),
        (dict(w_EDF=jnp.zeros((3, 8, 6))), "E in w and group_sizes"),
        (dict(x_TD=jnp.zeros((2, 4, 8))), r"\[T, D\]"),
        (dict(x_TD=jnp.zeros((4, 8), jnp.bfloat16)), "cast one"),
        (dict(group_sizes_E=jnp.array([1.0, 3.0])), "integer"),
        (dict(implementation="cuda"), "implementation='cuda'"),
    ],
)
def test_refuses(change, message):
    legal = dict(x_TD=jnp.zeros((4, 8)), w_EDF=jnp.zeros((2, 8, 6)), group_sizes_E=jnp.array([1, 3]))
    with pytest.raises(ValueError, match=message):
        grouped_matmul(**(legal | change))
