"""What sparsity costs: sparse layers and training steps against dense ones (`python -m moe_jax benchmark moe`).

Everything is measured in one process and in rounds, each of which times every contender once in another order, so that
noise and a machine that slows down hit all alike.

S tokens of the one sequence (T when routed), D model, F feed-forward, E experts, K experts per token, R = T·K rows,
C rows of an expert.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from tqdm import tqdm

from moe_jax.analysis.flops import parameter_counts, training_flops_per_token
from moe_jax.benchmarks.environment import environment
from moe_jax.benchmarks.routings import RoutingName, assign, expert_counts, expert_loads, max_violation
from moe_jax.config import ConfigError, MeshConfig, ModelConfig, MoEConfig, OptimizerConfig
from moe_jax.model.definition import Definition
from moe_jax.model.layers import Initializer, SwiGLU, gated
from moe_jax.model.moe import MoE
from moe_jax.model.router import Router, RouterOutput
from moe_jax.ops.grouped_matmul import grouped_matmul
from moe_jax.presets import v3_34m
from moe_jax.rng import random_generator, random_key
from moe_jax.sharding import make_mesh
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import init_state, make_update
from moe_jax.training.supervised import make_loss, make_totals

Passes = Literal["forward", "forward_backward", "step"]

RAGGED_FLOP_LIMIT = 1e12
"""`jax.lax.ragged_dot` is not measured on CPUs, where it multiplies by every expert, if that takes more than this."""
_RAGGED_REPEATS = 2
_WARM_UPS = 2


@dataclass(frozen=True)
class FullStep:
    """A whole training step to measure: the pre-training loss, its gradients, AdamW."""

    model: ModelConfig = field(default_factory=v3_34m)
    batch_size: int = 8
    sequence_length: int = 256


@dataclass(frozen=True)
class MoEBenchmark:
    """What to measure."""

    hidden_size: int = 256
    expert_size: int = 128
    experts: tuple[int, ...] = (8, 64, 256)
    experts_per_token: int = 6
    tokens: int = 4096
    dtype: Literal["float32", "bfloat16"] = "float32"
    routing: tuple[RoutingName, ...] = ("balanced", "measured", "worst")
    load_profile: tuple[float, ...] | None = None
    """The measured routing's loads (`routings.load_profile`); None: log-normal."""
    repeats: int = 10
    """Rounds that are timed."""
    step: FullStep | None = field(default_factory=FullStep)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden_size", "expert_size", "experts_per_token", "tokens", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"MoEBenchmark.{name} = {getattr(self, name)}: must be greater than 0")
        for name in ("experts", "routing"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"MoEBenchmark.{name} = {values}: give one value or more, each once")
        if min(self.experts) < self.experts_per_token:
            raise ConfigError(
                f"MoEBenchmark.experts = {self.experts}: none may be less than experts_per_token ="
                f" {self.experts_per_token}"
            )


@dataclass(frozen=True)
class Timing:
    """One contender's time for one kind of passes."""

    contender: str
    """moe, dense: a layer. batched: experts alone, in groups of equal size. grouped, ragged, product: one product.
    moe_step, dense_step: a training step."""
    passes: Passes
    experts: int | None
    routing: RoutingName | None
    max_violation: float | None
    """Largest load over the mean, minus 1; of a step, the mean over layers in the last step."""
    repeats: int
    median_s: float
    min_s: float
    ratio: float
    """Median over that of the reference for the same passes: the dense layer, the dense product, the dense step."""
    gflops_per_s: float
    """Of the active work: products with the chosen experts alone. Routers do not count."""
    tokens_per_s: float


@dataclass(frozen=True)
class Results:
    config: MoEBenchmark
    environment: dict[str, Any]
    timings: tuple[Timing, ...]
    notes: tuple[str, ...]
    """What was left out and why."""

    def find(self, contender: str, passes: Passes, experts: int | None = None, routing: str | None = None) -> Timing:
        """The timing of one contender.

        Raises:
            KeyError: it was not measured.
        """
        wanted = (contender, passes, experts, routing)
        for timing in self.timings:
            if (timing.contender, timing.passes, timing.experts, timing.routing) == wanted:
                return timing
        raise KeyError(wanted)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `json.dumps`."""
        return dataclasses.asdict(self)


# ---------------------------------------------------------------------------------------------------------------------
# contenders
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """Something to time."""

    name: str
    passes: Passes
    run: Callable[[], Any]
    flops: float
    tokens: int
    reference: str
    """The contender whose time for the same passes is 1."""
    experts: int | None = None
    routing: RoutingName | None = None
    max_violation: Callable[[], float | None] = lambda: None
    most_repeats: int | None = None
    """Of one that is so slow that few rounds say enough."""


class _Prescribed(nnx.Variable):
    """Experts that tokens are sent to, int32 [T, K]."""


class _PrescribedRouter(Router):
    """The learned router at its full cost: what it returns is its own but for the experts, which are prescribed.

    Its weights are those of the experts that it chose, so the compiler cannot leave its choice out.
    """

    def __init__(self, cfg: ModelConfig, init: Initializer, num_tokens: int):
        super().__init__(cfg, init)
        self.prescribed_TK = _Prescribed(jnp.zeros((num_tokens, cfg.moe.num_experts_per_token), jnp.int32))

    def __call__(self, x_TD: Array, keys_T: Array, layer: Array | int) -> RouterOutput:
        return super().__call__(x_TD, keys_T, layer)._replace(experts_TK=self.prescribed_TK[...])


def _both_passes(apply: Callable[..., tuple[Array, Any]]) -> dict[Passes, Callable[..., Any]]:
    """`apply(params, x, *others)` → (y, aux), and the same with the gradients of params and x. Nothing is left unused.

    Both take (params, x, dy, *others), `dy` being the gradient of y.
    """

    def forward(params: Any, x: Array, _: Array, *others: Any) -> Any:
        return apply(params, x, *others)

    def forward_backward(params: Any, x: Array, dy: Array, *others: Any) -> Any:
        y, pull_back, aux = jax.vjp(lambda params, x: apply(params, x, *others), params, x, has_aux=True)
        return y, aux, pull_back(dy)

    return {"forward": jax.jit(forward), "forward_backward": jax.jit(forward_backward)}


def _layer_contenders(config: MoEBenchmark, routings: dict[tuple[int, RoutingName], np.ndarray]) -> Iterator[Contender]:
    """The sparse layer under each routing, the dense layer that is as wide as K experts, and the experts alone."""
    D, F, K, T = config.hidden_size, config.expert_size, config.experts_per_token, config.tokens
    x_BSD, dy_BSD = (_normal(config, purpose, (1, T, D)) for purpose in ("x", "dy"))
    flops: dict[Passes, float] = {"forward": 6.0 * T * D * K * F, "forward_backward": 18.0 * T * D * K * F}

    dense_graph, dense_params = nnx.split(
        SwiGLU(D, K * F, Initializer(_layer_config(config, K), nnx.Rngs(config.seed)))
    )
    for passes, run in _both_passes(lambda params, x: (nnx.merge(dense_graph, params)(x), None)).items():
        yield Contender("dense", passes, partial(run, dense_params, x_BSD, dy_BSD), flops[passes], T, "dense")

    yield from _batched_contenders(config, flops)

    valid_BS, keys_BS = jnp.ones((1, T), bool), jnp.zeros((1, T), jnp.int32)
    for E in config.experts:
        cfg = _layer_config(config, E)
        init = Initializer(cfg, nnx.Rngs(config.seed))
        layer = MoE(cfg, init)
        layer.router = _PrescribedRouter(cfg, init, T)
        graph, params, prescribed, rest = nnx.split(layer, nnx.Param, _Prescribed, ...)

        def apply(
            params: Any, x: Array, prescribed: Any, rest: Any, valid_BS: Array, keys_BS: Array, graph: Any = graph
        ) -> tuple[Array, Any]:
            return nnx.merge(graph, params, prescribed, rest)(x, valid_BS, keys_BS, 0, False)

        functions = _both_passes(apply)
        for routing in config.routing:
            experts_TK = routings[E, routing]
            chosen = jax.tree.map(lambda _, experts_TK=experts_TK: jnp.asarray(experts_TK), prescribed)
            violation = max_violation(np.bincount(experts_TK.ravel(), minlength=E))
            for passes, run in functions.items():
                timed = partial(run, params, x_BSD, dy_BSD, chosen, rest, valid_BS, keys_BS)
                yield Contender(
                    "moe", passes, timed, flops[passes], T, "dense", E, routing, lambda violation=violation: violation
                )


def _batched_contenders(config: MoEBenchmark, flops: dict[Passes, float]) -> Iterator[Contender]:
    """The experts as XLA's batched products of groups of equal size (C rows, rounded up), which are in place already.

    What is left of a sparse layer without router, dispatch and uneven groups.
    """
    D, F, T = config.hidden_size, config.expert_size, config.tokens

    def experts(params: tuple[Array, Array], x_ECD: Array) -> tuple[Array, None]:
        gate_up_EDF, down_EFD = (w.astype(x_ECD.dtype) for w in params)
        gate_up_ECF = jnp.einsum("ECD,EDF->ECF", x_ECD, gate_up_EDF)
        inside_ECF = gated(gate_up_ECF.reshape(*gate_up_ECF.shape[:2], 2, F))
        return jnp.einsum("ECF,EFD->ECD", inside_ECF, down_EFD), None

    functions = _both_passes(experts)
    for E in config.experts:
        C = -(-T * config.experts_per_token // E)
        gate_up_EDF, down_EFD = _normal(config, "gate_up", (E, D, 2 * F)), _normal(config, "down", (E, F, D))
        params = gate_up_EDF.astype(jnp.float32), down_EFD.astype(jnp.float32)
        x_ECD, dy_ECD = (_normal(config, purpose, (E, C, D)) for purpose in ("x", "dy"))
        for passes, run in functions.items():
            yield Contender("batched", passes, partial(run, params, x_ECD, dy_ECD), flops[passes], T, "dense", E)


def _layer_config(config: MoEBenchmark, num_experts: int) -> ModelConfig:
    # Balance losses are the training step's.
    moe = MoEConfig(
        num_experts=num_experts,
        num_experts_per_token=config.experts_per_token,
        expert_size=config.expert_size,
        sequence_balance_coef=0,
    )
    return ModelConfig(hidden_size=config.hidden_size, moe=moe, dtype=config.dtype)


def _product_contenders(
    config: MoEBenchmark, routings: dict[tuple[int, RoutingName], np.ndarray], notes: list[str]
) -> Iterator[Contender]:
    """The product with gate and up of the chosen experts, as `grouped_matmul` and as one dense product of its size."""
    D, width, R, T = config.hidden_size, 2 * config.expert_size, config.tokens * config.experts_per_token, config.tokens
    rows_RD, dy_RF = _normal(config, "rows", (R, D)), _normal(config, "dy_rows", (R, width))
    flops: dict[Passes, float] = {"forward": 2.0 * R * D * width, "forward_backward": 6.0 * R * D * width}
    w_DF = _normal(config, "weights", (D, width))
    for passes, run in _both_passes(lambda w_DF, x_RD: (x_RD @ w_DF, None)).items():
        yield Contender("product", passes, partial(run, w_DF, rows_RD, dy_RF), flops[passes], T, "product")

    def product(w_EDF: Array, x_RD: Array, sizes_E: Array, implementation: Any = None) -> tuple[Array, None]:
        return grouped_matmul(x_RD, w_EDF, sizes_E, implementation=implementation), None

    grouped, ragged = _both_passes(product), _both_passes(partial(product, implementation="ragged"))
    on_cpu = jax.default_backend() == "cpu"
    for E in config.experts:
        w_EDF = _normal(config, "expert_weights", (E, D, width))
        work = E * flops["forward_backward"]
        measure_ragged = not on_cpu or work <= RAGGED_FLOP_LIMIT
        if not measure_ragged:
            notes.append(
                f"ragged_dot with {E} experts was not measured: it multiplies by every expert on CPUs, {work:.1e} FLOPs"
                f" (limit {RAGGED_FLOP_LIMIT:.0e})"
            )
        for routing in config.routing:
            counts_E = np.bincount(routings[E, routing].ravel(), minlength=E)
            arguments = (w_EDF, rows_RD, dy_RF, jnp.asarray(counts_E, jnp.int32))
            about: Any = {
                "tokens": T,
                "reference": "product",
                "experts": E,
                "routing": routing,
                "max_violation": lambda counts_E=counts_E: max_violation(counts_E),
            }
            for passes, run in grouped.items():
                yield Contender("grouped", passes, partial(run, *arguments), flops[passes], **about)
            if measure_ragged:
                timed, most = partial(ragged["forward_backward"], *arguments), _RAGGED_REPEATS if on_cpu else None
                yield Contender(
                    "ragged", "forward_backward", timed, flops["forward_backward"], **about, most_repeats=most
                )


def _normal(config: MoEBenchmark, purpose: str, shape: tuple[int, ...]) -> Array:
    return jax.random.normal(random_key(config.seed, purpose), shape, jnp.dtype(config.dtype))


def dense_equal(cfg: ModelConfig) -> ModelConfig:
    """The dense model with as many parameters as are active in a sparse one, but for less than one unit of width."""
    dense = dataclasses.replace(cfg, moe=MoEConfig(num_experts=0), first_k_dense=cfg.num_layers, intermediate_size=1)
    missing = parameter_counts(cfg).active - parameter_counts(dense).active
    width = 1 + round(missing / (3 * cfg.hidden_size * cfg.num_layers))
    return dataclasses.replace(dense, intermediate_size=width)


class _Training:
    """Training steps on one batch of random tokens."""

    def __init__(self, step: FullStep, cfg: ModelConfig, seed: int):
        definition = Definition.of(cfg)
        optimizer = make_optimizer(OptimizerConfig(name="adamw"), 1000, definition)
        mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
        shape = (step.batch_size, step.sequence_length)
        tokens_BS = random_generator(seed, "tokens").integers(cfg.vocab_size, size=shape, dtype=np.int32)
        self.batch = {
            "tokens_BS": jnp.asarray(tokens_BS),
            "segment_ids_BS": jnp.ones(shape, jnp.int32),
            "positions_BS": jnp.tile(jnp.arange(shape[1], dtype=jnp.int32), (shape[0], 1)),
        }
        self.state = init_state(definition, optimizer, random_key(seed, "weights"), mesh)
        self.update = make_update(make_loss(definition), make_totals(definition), optimizer, balance=cfg.moe)
        self.metrics: dict[str, Array] = {}

    def __call__(self) -> Any:
        self.state, self.metrics = self.update(self.state, self.batch)
        return self.state, self.metrics

    def max_violation(self) -> float | None:
        found = self.metrics.get("moe/max_violation")
        return None if found is None else float(jnp.mean(found))


def _step_contenders(step: FullStep, dtype: Literal["float32", "bfloat16"], seed: int) -> Iterator[Contender]:
    sparse = dataclasses.replace(step.model, dtype=dtype)
    tokens = step.batch_size * step.sequence_length
    for name, cfg in {"moe_step": sparse, "dense_step": dense_equal(sparse)}.items():
        training = _Training(step, cfg, seed)
        flops = float(tokens * training_flops_per_token(cfg, step.sequence_length))
        violation = training.max_violation
        yield Contender(name, "step", training, flops, tokens, "dense_step", max_violation=violation)


# ---------------------------------------------------------------------------------------------------------------------
# measuring
# ---------------------------------------------------------------------------------------------------------------------


def benchmark_moe(config: MoEBenchmark) -> Results:
    """Times everything that `config` asks for, on the default device.

    Sparse layers have no shared experts, and their time includes the router (its full choice, whatever routing is then
    prescribed), its statistics and the dispatch. Weights are float32 and cast as in a model; the bare products are in
    `config.dtype`.

    Raises:
        ConfigError: sizes that do not fit.
    """
    routings: dict[tuple[int, RoutingName], np.ndarray] = {
        (E, routing): assign(
            expert_counts(
                expert_loads(routing, E, config.experts_per_token, config.load_profile, config.seed),
                config.tokens,
                config.experts_per_token,
            ),
            config.tokens,
            random_generator(config.seed, f"routing {routing}", E),
        )
        for E in config.experts
        for routing in config.routing
    }
    notes: list[str] = []
    contenders = [*_layer_contenders(config, routings), *_product_contenders(config, routings, notes)]
    if config.step is not None:
        contenders += _step_contenders(config.step, config.dtype, config.seed)
    seconds = _measure(contenders, config.repeats, random_generator(config.seed, "order"))
    return Results(config, environment(), _timings(contenders, seconds), tuple(notes))


def _measure(contenders: Sequence[Contender], repeats: int, rng: np.random.Generator) -> list[list[float]]:
    """Seconds of each contender's runs."""
    most = [repeats if c.most_repeats is None else min(repeats, c.most_repeats) for c in contenders]
    warm_ups = [_WARM_UPS if c.most_repeats is None else 1 for c in contenders]
    seconds: list[list[float]] = [[] for _ in contenders]
    with tqdm(total=sum(most) + sum(warm_ups), unit="run", dynamic_ncols=True) as bar:

        def timed(index: int) -> float:
            start = time.perf_counter()
            jax.block_until_ready(contenders[index].run())
            elapsed = time.perf_counter() - start
            bar.update()
            return elapsed

        bar.set_description("compile")
        for index, count in enumerate(warm_ups):
            for _ in range(count):
                timed(index)
        for number in range(repeats):
            bar.set_description(f"round {number + 1}/{repeats}")
            for index in rng.permutation(len(contenders)):
                if number < most[index]:
                    seconds[index].append(timed(index))
    return seconds


def _timings(contenders: Sequence[Contender], seconds: Sequence[Sequence[float]]) -> tuple[Timing, ...]:
    medians = [float(np.median(s)) for s in seconds]
    by_name = {(c.name, c.passes): median for c, median in zip(contenders, medians, strict=True)}
    return tuple(
        Timing(
            contender=c.name,
            passes=c.passes,
            experts=c.experts,
            routing=c.routing,
            max_violation=c.max_violation(),
            repeats=len(s),
            median_s=median,
            min_s=min(s),
            ratio=median / by_name[c.reference, c.passes],
            gflops_per_s=c.flops / median / 1e9,
            tokens_per_s=c.tokens / median,
        )
        for c, s, median in zip(contenders, seconds, medians, strict=True)
    )
