"""Dispatch strategies against a plain loop over experts in float64, on one device and on eight.

B batch, S sequence, D model, F feed-forward, K experts per token, E experts.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.config import MeshConfig, MoEConfig
from moe_jax.model.dispatch import dispatch, sort_by_expert, within_capacity
from moe_jax.model.moe import run_experts
from moe_jax.sharding import make_mesh

B, S, D, F, K, E = 8, 32, 4, 6, 2, 8
CONFIG = MoEConfig(num_experts=E, num_experts_per_token=K, expert_size=F)
AXES = ("expert", "embed", None, "mlp"), ("expert", "mlp", "embed")
MESHES = {
    "one device": MeshConfig(data=1),
    "data only": MeshConfig(data=8),
    "experts": MeshConfig(data=1, expert=8),
    "data, fsdp, experts": MeshConfig(data=2, fsdp=2, expert=2),
    "experts, tensor": MeshConfig(data=1, expert=4, tensor=2),
}


def routings():
    rng = np.random.default_rng(0)
    random = np.stack([rng.permutation(E)[:K] for _ in range(B * S)]).reshape(B, S, K)
    holes = np.where(rng.random((B, S, K)) < 0.4, E, random)
    return {
        "random": random,
        "some to none": holes,
        "all to two of one shard": np.broadcast_to([5, 4], (B, S, K)),
        "all to one": np.full((B, S, K), E - 1),
        "all to none": np.full((B, S, K), E),
    }


ROUTINGS = routings()


@functools.cache
def inputs():
    rng = np.random.default_rng(1)
    shapes = (B, S, D), (B, S, K), (E, D, 2, F), (E, F, D)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes], rng.normal(size=(B, S, D))


def loop_over_experts(x_BSD, weights_BSK, gate_up_ED2F, down_EFD, experts_BSK):
    y_BSD = jnp.zeros_like(x_BSD)
    for e in range(E):
        gate, up = (x_BSD @ gate_up_ED2F[e, :, i] for i in range(2))
        weight_BS = jnp.sum(jnp.where(experts_BSK == e, weights_BSK, 0), axis=-1)
        y_BSD += weight_BS[..., None] * ((gate * jax.nn.sigmoid(gate) * up) @ down_EFD[e])
    return y_BSD


@functools.cache
def expected(routing):
    with jax.enable_x64(True):
        arrays, cotangent_BSD = inputs()
        arrays = [jnp.asarray(a, jnp.float64) for a in arrays]
        y, pull = jax.vjp(lambda *a: loop_over_experts(*a, jnp.asarray(ROUTINGS[routing])), *arrays)
        return [np.asarray(a) for a in (y, *pull(jnp.asarray(cotangent_BSD)))]


@functools.cache
def compiled(mesh, cfg):
    def run(x_BSD, weights_BSK, gate_up_ED2F, down_EFD, experts_BSK, cotangent_BSD):
        def forward(x_BSD, weights_BSK, *arrays):
            return dispatch(x_BSD, experts_BSK, weights_BSK, arrays, AXES, run_experts, cfg)

        y, pull = jax.vjp(forward, x_BSD, weights_BSK, gate_up_ED2F, down_EFD)
        return y, *pull(cotangent_BSD.astype(y.dtype))

    arrays, cotangent_BSD = inputs()
    with jax.set_mesh(make_mesh(MESHES[mesh])):
        return jax.jit(run).lower(*arrays, ROUTINGS["random"].astype(np.int32), cotangent_BSD).compile()


def check(mesh, cfg, routing):
    arrays, cotangent_BSD = inputs()
    experts_BSK = ROUTINGS[routing].astype(np.int32)
    found = compiled(mesh, cfg)(*arrays, experts_BSK, cotangent_BSD.astype(np.float32))
    for name, a, b in zip(("y", "x", "weights", "gate_up", "down"), found, expected(routing), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5, err_msg=f"{mesh}, {routing}: {name}")


@pytest.mark.parametrize("mesh", ["one device", "data only"])
def test_local_equals_a_loop_over_experts(mesh):
    for routing in ROUTINGS:
        check(mesh, CONFIG, routing)


@pytest.mark.parametrize("buffer", [0.3, 2.0], ids=["many rounds", "roomy"])
@pytest.mark.parametrize("strategy", ["all_gather", "all_to_all"])
@pytest.mark.parametrize("mesh", ["experts", "data, fsdp, experts", "experts, tensor"])
def test_strategies_equal_a_loop_over_experts(mesh, strategy, buffer):
    """Nothing is dropped, however uneven the routing and small the buffers."""
    cfg = dataclasses.replace(CONFIG, dispatch=strategy, dispatch_buffer=buffer)
    for routing in ROUTINGS:
        check(mesh, cfg, routing)


def collectives(mesh, strategy):
    text = compiled(mesh, dataclasses.replace(CONFIG, dispatch=strategy)).as_text()
    return {name for name in ("all-gather", "reduce-scatter", "all-to-all") if f"{name}(" in text}


def test_the_config_chooses_the_communication():
    assert collectives("experts", "all_to_all") == {"all-to-all"}
    assert {"all-gather", "reduce-scatter"} <= collectives("experts", "all_gather")
    assert "all-to-all" not in collectives("experts", "all_gather")
    # K = 2: beyond two shards a token travels less by all-to-all.
    assert "all-to-all" in collectives("experts", "auto")
    assert "all-to-all" not in collectives("data, fsdp, experts", "auto")
    assert collectives("data only", "auto") == set()


@pytest.mark.parametrize("mesh", ["experts", "experts, tensor"])
def test_a_batch_that_does_not_divide(mesh):
    (x_BSD, weights_BSK, *weights), cotangent_BSD = inputs()
    experts_BSK = ROUTINGS["random"].astype(np.int32)

    def forward(x_BSD, weights_BSK, *arrays):
        return dispatch(x_BSD, experts_BSK[:3], weights_BSK, arrays, AXES, run_experts, CONFIG)

    with jax.set_mesh(make_mesh(MESHES[mesh])):
        run = jax.jit(lambda dy, *a: (forward(*a), *jax.vjp(forward, *a)[1](dy)))
        found = run(jnp.asarray(cotangent_BSD[:3], jnp.float32), x_BSD[:3], weights_BSK[:3], *weights)
    for a, b in zip(found[:3], expected("random")[:3], strict=True):  # y, and the gradients of x and weights
        np.testing.assert_allclose(a, b[:3], rtol=1e-4, atol=2e-5)
    assert all(np.all(np.isfinite(a)) and np.any(a) for a in found[3:])


def test_whole_experts_are_not_kept_for_the_backward_pass():
    """Gathered over fsdp, they are gathered again: eight layers take hardly more memory than two."""
    wide = 512
    experts_BSK, weights_BSK = ROUTINGS["random"][:, :1].astype(np.int32), inputs()[0][1][:, :1]

    def temporary_bytes(layers):
        def loss(arrays, x_BSD):
            def layer(x_BSD, arrays):
                return x_BSD + dispatch(x_BSD, experts_BSK, weights_BSK, arrays, AXES, run_experts, CONFIG), None

            return jnp.sum(jax.lax.scan(layer, x_BSD, arrays)[0] ** 2)

        mesh = make_mesh(MeshConfig(data=1, fsdp=8))
        with jax.set_mesh(mesh):
            shapes = (layers, E, 8, 2, wide), (layers, E, wide, 8)
            specs = PartitionSpec(None, None, "fsdp"), PartitionSpec(None, None, None, "fsdp")
            arrays = tuple(
                jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
                for shape, spec in zip(shapes, specs, strict=True)
            )
            x = jax.ShapeDtypeStruct((B, 1, 8), jnp.float32)
            return jax.jit(jax.grad(loss)).lower(arrays, x).compile().memory_analysis().temp_size_in_bytes

    one_layer = 4 * E * 8 * 3 * wide
    assert temporary_bytes(8) - temporary_bytes(2) < 3 * one_layer  # kept, it would be six times one layer


def test_tpus_send_only_rows_that_exist():
    arrays, _ = inputs()
    x_BSD, weights_BSK, *weights = arrays
    cfg = dataclasses.replace(CONFIG, dispatch="all_to_all")
    experts_BSK = ROUTINGS["random"].astype(np.int32)
    with jax.set_mesh(make_mesh(MESHES["experts"])):
        run = jax.jit(lambda x, w, *arrays: dispatch(x, experts_BSK, w, arrays, AXES, run_experts, cfg))
        traced = run.trace(x_BSD, weights_BSK, *weights)
        assert "ragged_all_to_all" in traced.lower(lowering_platforms=("tpu",)).as_text()
        assert "ragged_all_to_all" not in traced.lower(lowering_platforms=("cpu",)).as_text()


# ---------------------------------------------------------------------------------------------------------------------


def test_sorting_is_stable_and_counts():
    experts_TK = np.array([[3, 0], [4, 3], [0, 4], [3, 1]])  # 4: none
    order = sort_by_expert(jnp.asarray(experts_TK), 4)
    np.testing.assert_array_equal(order.assignment_R, np.argsort(experts_TK.ravel(), kind="stable"))
    np.testing.assert_array_equal(np.asarray(order.assignment_R)[order.row_TK], np.arange(8).reshape(4, 2))
    np.testing.assert_array_equal(order.group_sizes_E, [2, 1, 0, 3])


@pytest.mark.parametrize("tokens", [1, 16, 17, 500])
def test_sorting_of_few_and_of_many(tokens):
    """Stable, with assignments to none."""
    experts_TK = np.random.default_rng(tokens).integers(0, 6, (tokens, 2))  # 5: none
    order = sort_by_expert(jnp.asarray(experts_TK), 5)
    expected = np.argsort(experts_TK.ravel(), kind="stable")
    np.testing.assert_array_equal(order.assignment_R, expected)
    np.testing.assert_array_equal(expected[np.asarray(order.row_TK).ravel()], np.arange(2 * tokens))
    np.testing.assert_array_equal(order.group_sizes_E, np.bincount(experts_TK.ravel(), minlength=6)[:5])


def test_sorting_where_expert_and_index_do_not_fit_one_number():
    experts_TK = np.random.default_rng(0).integers(2**20 + 1, size=(2048, 2))
    order = sort_by_expert(jnp.asarray(experts_TK), 2**20)
    np.testing.assert_array_equal(order.assignment_R, np.argsort(experts_TK.ravel(), kind="stable"))
    assert np.sum(order.group_sizes_E) == np.sum(experts_TK < 2**20)


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in jax.tree.leaves(value, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from equations(getattr(inner, "jaxpr", inner))


def test_gradients_gather_and_do_not_add_by_scatter():
    """What is scattered is one number per assignment, once (int32, inverting a permutation), and the counts with which
    a kernel for TPU plans its tiles: never a row of activations."""
    (x_BSD, weights_BSK, *arrays), _ = inputs()

    def loss(x_BSD, weights_BSK):
        return jnp.sum(dispatch(x_BSD, ROUTINGS["random"], weights_BSK, arrays, AXES, run_experts, CONFIG))

    found = list(equations(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x_BSD, weights_BSK).jaxpr))
    assert any(e.primitive.name == "gather" and e.outvars[0].aval.shape == (B * S * K, D) for e in found)
    scattered = [e.outvars[0].aval for e in found if e.primitive.name.startswith("scatter")]
    assert [(a.shape, a.dtype) for a in scattered if a.size > E] == [((B * S * K,), jnp.int32)]


# Capacity ------------------------------------------------------------------------------------------------------------


def drop_by_hand(experts_TK, affinity_TK, unit_size, units, factor):
    kept = experts_TK.copy()
    capacity = np.ceil(factor * np.sum(experts_TK < unit_size * units) / units)
    for unit in range(units):
        mine = [(affinity_TK[i], i) for i in np.ndindex(*experts_TK.shape) if experts_TK[i] // unit_size == unit]
        for _, i in sorted(mine, reverse=True)[int(capacity) :]:
            kept[i] = unit_size * units
    return kept


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.3, 100.0])
def test_capacity_drops_the_lowest_affinities(groups, factor):
    cfg = dataclasses.replace(CONFIG, num_groups=groups, num_groups_per_token=groups, capacity_factor=factor)
    units = groups if groups > 1 else E
    rng = np.random.default_rng(3)
    # Uneven, and some tokens are padding.
    experts_TK = np.minimum(np.stack([rng.permutation(E)[:K] for _ in range(40)]), rng.integers(3, E, (40, 1)))
    experts_TK[30:] = E
    affinity_TK = rng.random((40, K)).astype(np.float32)
    found = jax.jit(functools.partial(within_capacity, cfg=cfg))(jnp.asarray(experts_TK), jnp.asarray(affinity_TK))
    np.testing.assert_array_equal(found, drop_by_hand(experts_TK, affinity_TK, E // units, units, factor))
    assert (factor < 100) == bool(np.any(np.asarray(found) != experts_TK))
