"""What sparsity costs: sparse layers and training steps against dense ones (`python -m moe_jax benchmark moe`).

Everything is measured in one process and in rounds, each of which times every contender once in another order, so that
noise and a machine that slows down hit all alike.

S tokens of the one sequence (T when routed), D model, F feed-forward, E experts, K experts per token, R = T·K rows.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from tqdm import tqdm

from moe_jax.analysis.flops import parameter_counts, training_flops_per_token
from moe_jax.analysis.plots import BLUE, GREEN, GREY, ORANGE, PURPLE
from moe_jax.config import (
    AttentionConfig,
    ConfigError,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RoPEConfig,
)
from moe_jax.model.definition import Definition
from moe_jax.model.layers import Initializer, SwiGLU
from moe_jax.model.moe import MoE
from moe_jax.model.router import Router, RouterOutput
from moe_jax.ops.grouped_matmul import grouped_matmul
from moe_jax.rng import random_generator, random_key
from moe_jax.sharding import make_mesh
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import init_state, make_update
from moe_jax.training.supervised import make_loss, make_totals

RoutingName = Literal["balanced", "measured", "worst"]
Passes = Literal["forward", "forward_backward", "step"]

LOAD_SIGMA = 0.4
"""Of the logarithm of experts' popularity, where no run says what routing is like: MaxVio 1.4 at 64 experts."""
RAGGED_FLOP_LIMIT = 1e12
"""`jax.lax.ragged_dot` is not measured on CPUs, where it multiplies by every expert, if that takes more than this."""
_RAGGED_REPEATS = 2
_WARM_UPS = 2
_MIXING_SWEEPS = 8


def v3_style() -> ModelConfig:
    """A DeepSeek-V3 of 34 M parameters, 5.5 M of them active: 64 experts, 6 per token, 1 shared."""
    return ModelConfig(
        vocab_size=512,
        hidden_size=256,
        num_layers=6,
        intermediate_size=768,
        first_k_dense=1,
        attention=AttentionConfig(
            kind="mla",
            num_heads=8,
            q_lora_rank=96,
            kv_lora_rank=64,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
            rope=RoPEConfig(layout="interleaved"),
        ),
        moe=MoEConfig(
            num_experts=64,
            num_experts_per_token=6,
            num_shared_experts=1,
            expert_size=128,
            num_groups=8,
            num_groups_per_token=4,
            routed_scaling_factor=2.5,
        ),
    )


@dataclass(frozen=True)
class FullStep:
    """A whole training step to measure: the pre-training loss, its gradients, AdamW."""

    model: ModelConfig = field(default_factory=v3_style)
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
    """The measured routing's loads (`load_profile`); None: log-normal, `LOAD_SIGMA`."""
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
    """moe, dense: a layer. grouped, ragged, product: one product. moe_step, dense_step: a training step."""
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
# routings
# ---------------------------------------------------------------------------------------------------------------------


def load_profile(counts_LE: np.ndarray) -> tuple[float, ...]:
    """A run's loads, ascending, 1 being an even share: the mean over its layers of their sorted loads."""
    load_LE = counts_LE / np.mean(counts_LE, axis=1, keepdims=True)
    return tuple(np.mean(np.sort(load_LE, axis=1), axis=0).tolist())


def expert_loads(routing: RoutingName, config: MoEBenchmark, num_experts: int) -> np.ndarray:
    """How popular each expert is, [E], in any unit. Popular ones stand anywhere; of "worst" they are the first K."""
    E = num_experts
    if routing == "balanced":
        return np.ones(E)
    if routing == "worst":
        return (np.arange(E) < config.experts_per_token).astype(float)
    quantiles_E = (np.arange(E) + 0.5) / E
    if config.load_profile is None:
        load_E = np.exp([LOAD_SIGMA * NormalDist().inv_cdf(q) for q in quantiles_E])
    else:
        profile = np.asarray(config.load_profile)
        load_E = np.interp(quantiles_E, (np.arange(len(profile)) + 0.5) / len(profile), profile)
        load_E = np.maximum(load_E, 1e-6)  # a collapsed run may have used fewer experts than K
    return random_generator(config.seed, "popularity", E).permutation(load_E)


def expert_counts(load_E: np.ndarray, num_tokens: int, experts_per_token: int) -> np.ndarray:
    """T·K assignments in proportion to the loads: int64 [E]. No expert gets more than T; the others take the rest."""
    T, K = num_tokens, experts_per_token
    full_E = np.zeros(len(load_E), bool)
    while True:
        left = T * (K - np.count_nonzero(full_E))
        if left == 0:
            return np.where(full_E, T, 0)
        share_E = load_E * (left / np.sum(load_E[~full_E]))
        over_E = ~full_E & (share_E > T)
        if not np.any(over_E):
            break
        full_E |= over_E
    share_E = np.where(full_E, T, share_E)
    counts_E = np.floor(share_E).astype(np.int64)
    rest = T * K - np.sum(counts_E)
    counts_E[np.argsort(counts_E - share_E, kind="stable")[:rest]] += 1
    return counts_E


def assign(counts_E: np.ndarray, num_tokens: int, rng: np.random.Generator) -> np.ndarray:
    """K different experts for each token, int32 [T, K], with exactly these counts and otherwise at random."""
    T = num_tokens
    # An expert's assignments follow each other, at most T of them, so that no token gets one twice.
    experts_TK = np.repeat(np.arange(len(counts_E), dtype=np.int32), counts_E).reshape(-1, T).T.copy()
    K = experts_TK.shape[1]
    for _ in range(_MIXING_SWEEPS * K):  # pairs of tokens exchange an expert, where neither then has one twice
        first, second = rng.permutation(T)[: T // 2 * 2].reshape(2, -1)
        i, j = rng.integers(K, size=(2, T // 2))
        x, y = experts_TK[first, i], experts_TK[second, j]
        legal = ~np.any(experts_TK[first] == y[:, None], axis=1) & ~np.any(experts_TK[second] == x[:, None], axis=1)
        experts_TK[first[legal], i[legal]], experts_TK[second[legal], j[legal]] = y[legal], x[legal]
    return experts_TK[rng.permutation(T)]


def _max_violation(counts_E: np.ndarray) -> float:
    return float(np.max(counts_E) / np.mean(counts_E) - 1)


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
    """The sparse layer under each routing, and the dense layer that is as wide as K experts."""
    D, F, K, T = config.hidden_size, config.expert_size, config.experts_per_token, config.tokens
    x_BSD, dy_BSD = (_normal(config, purpose, (1, T, D)) for purpose in ("x", "dy"))
    flops: dict[Passes, float] = {"forward": 6.0 * T * D * K * F, "forward_backward": 18.0 * T * D * K * F}

    dense_graph, dense_params = nnx.split(
        SwiGLU(D, K * F, Initializer(_layer_config(config, K), nnx.Rngs(config.seed)))
    )
    for passes, run in _both_passes(lambda params, x: (nnx.merge(dense_graph, params)(x), None)).items():
        yield Contender("dense", passes, partial(run, dense_params, x_BSD, dy_BSD), flops[passes], T, "dense")

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
            violation = _max_violation(np.bincount(experts_TK.ravel(), minlength=E))
            for passes, run in functions.items():
                timed = partial(run, params, x_BSD, dy_BSD, chosen, rest, valid_BS, keys_BS)
                yield Contender(
                    "moe", passes, timed, flops[passes], T, "dense", E, routing, lambda violation=violation: violation
                )


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
                "max_violation": lambda counts_E=counts_E: _max_violation(counts_E),
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
            expert_counts(expert_loads(routing, config, E), config.tokens, config.experts_per_token),
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
    return Results(config, _environment(), _timings(contenders, seconds), tuple(notes))


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


def _environment() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "machine": platform.machine(),
        "cores": cores,
        "jax": jax.__version__,
    }


# ---------------------------------------------------------------------------------------------------------------------
# showing
# ---------------------------------------------------------------------------------------------------------------------

_STYLES = {"balanced": (BLUE, "o"), "measured": (GREEN, "s"), "worst": (ORANGE, "^")}


def table(results: Results) -> str:
    """The results, readable. Times are medians, with the least in brackets."""
    config, env = results.config, results.environment
    D, F, K, T = config.hidden_size, config.expert_size, config.experts_per_token, config.tokens
    popularity = f"log-normal popularity, sigma {LOAD_SIGMA}" if config.load_profile is None else "a run's loads"
    head = ["E", "routing", "MaxVio", "forward ms", "× dense", "fwd + bwd ms", "× dense", "GFLOP/s"]
    dense = _passes(results, "dense")
    lines = [["", "dense", "", *_cells(dense, "× dense"), f"{dense[1].gflops_per_s:.1f}"]]
    for E in config.experts:
        for routing in config.routing:
            moe = _passes(results, "moe", E, routing)
            lines.append([*_about(moe[0]), *_cells(moe, "× dense"), f"{moe[1].gflops_per_s:.1f}"])
    parts = [
        f"{env['platform']} ({env['device']}, {env['machine']}), {env['cores']} cores, jax {env['jax']},"
        f" {config.dtype}\nmedian (least) of {config.repeats} rounds"
        + (f"; measured routing: {popularity}" if "measured" in config.routing else ""),
        f"Layer: {T:,} tokens, hidden {D}, {K} experts of {F} per token; dense: one feed-forward of {K * F}\n"
        + _aligned(head, lines),
    ]

    head = ["E", "routing", "MaxVio", "forward ms", "of dense rate", "fwd + bwd ms", "of dense rate", "GFLOP/s"]
    product = _passes(results, "product")
    lines = [["", "one dense product", "", *_cells(product, ""), f"{product[1].gflops_per_s:.1f}", "", ""]]
    for E in config.experts:
        for routing in config.routing:
            found = _passes(results, "grouped", E, routing)
            line = [*_about(found[0]), *_cells(found, "rate"), f"{found[1].gflops_per_s:.1f}"]
            try:
                ragged = results.find("ragged", "forward_backward", E, routing)
                line += [_ms(ragged), f"{ragged.median_s / found[1].median_s:.1f}"]
            except KeyError:
                line += ["", ""]
            lines.append(line)
    head += ["ragged_dot fwd + bwd ms", "× grouped"]
    parts.append(f"Grouped product: [{T * K}, {D}] × [E, {D}, {2 * F}]\n" + _aligned(head, lines))

    if config.step is not None:
        parts.append(_step_table(results, config.step))
    return "\n\n".join([*parts, *results.notes])


def _step_table(results: Results, step: FullStep) -> str:
    lines = []
    for name, cfg in {"moe_step": step.model, "dense_step": dense_equal(step.model)}.items():
        found, counts = results.find(name, "step"), parameter_counts(cfg)
        lines.append(
            [
                name.removesuffix("_step"),
                f"{(counts.total + counts.mtp) / 1e6:.1f} M",
                f"{counts.active / 1e6:.1f} M",
                "" if found.max_violation is None else f"{found.max_violation:.2f}",
                _ms(found),
                f"{found.ratio:.2f}",
                f"{found.tokens_per_s:,.0f}",
                f"{found.gflops_per_s:.1f}",
            ]
        )
    head = ["model", "parameters", "active", "MaxVio", "step ms", "× dense", "tokens/s", "GFLOP/s"]
    title = f"Training step, AdamW, batch {step.batch_size} × {step.sequence_length} of random tokens"
    return f"{title}\n{_aligned(head, lines)}"


def _passes(results: Results, contender: str, *which: Any) -> tuple[Timing, Timing]:
    return results.find(contender, "forward", *which), results.find(contender, "forward_backward", *which)


def _about(timing: Timing) -> list[str]:
    return [str(timing.experts), str(timing.routing), f"{timing.max_violation:.2f}"]


def _cells(passes: tuple[Timing, Timing], compared: str) -> Iterator[str]:
    for timing in passes:
        yield _ms(timing)
        yield f"{timing.ratio:.2f}" if compared == "× dense" else f"{1 / timing.ratio:.0%}"


def _ms(timing: Timing) -> str:
    return f"{1e3 * timing.median_s:,.2f} ({1e3 * timing.min_s:,.2f})"


def _aligned(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[n]) for line in [head, *lines]) for n in range(len(head))]
    rows = ("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in [head, *lines])
    return "\n".join(f"  {row}" for row in rows)


def plot_moe(results: Results, path: Path) -> None:
    """Writes one PNG: time of forward and backward pass against E at fixed active work, of the layer and the product.

    E is on a logarithmic axis, and so is time beside ragged_dot, which is shown where it was measured. Dense equals are
    horizontal lines.
    """
    config, env = results.config, results.environment
    figure = Figure(figsize=(8.5, 7.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("Forward and backward pass at fixed active work", x=0.01, ha="left", fontsize=13, fontweight="bold")
    axes = figure.subplots(2, 1, sharex=True)
    panels = [("MoE layer (ms)", "moe", "dense layer of the\nsame active FLOPs", "dense")]
    panels += [("grouped product (ms)", "grouped", "one dense product\nof the same size", "product")]
    for ax, (ylabel, name, reference_label, reference) in zip(axes, panels, strict=True):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#E4E4E4", linewidth=0.8)
        ax.set_axisbelow(True)
        for routing in config.routing:
            found = sorted(
                (
                    t
                    for t in results.timings
                    if (t.contender, t.passes, t.routing) == (name, "forward_backward", routing)
                ),
                key=lambda t: t.experts or 0,
            )
            color, marker = _STYLES[routing]
            ax.plot(
                [t.experts for t in found],
                [1e3 * t.median_s for t in found],
                color=color,
                marker=marker,
                linewidth=2,
                markersize=5,
                label=f"{routing}, MaxVio {_span([t.max_violation or 0 for t in found])}",
            )
        ragged: dict[int, float] = {}
        if name == "grouped":
            for timing in results.timings:  # of the routings, the one that suits it best
                if timing.contender == "ragged" and timing.experts is not None:
                    ragged[timing.experts] = min(ragged.get(timing.experts, np.inf), 1e3 * timing.median_s)
        if ragged:
            sizes = sorted(ragged)
            label = "jax.lax.ragged_dot"
            ax.plot(sizes, [ragged[E] for E in sizes], "D--", color=PURPLE, linewidth=2, markersize=5, label=label)
        level = 1e3 * results.find(reference, "forward_backward").median_s
        ax.axhline(level, color=GREY, linewidth=1.5, linestyle=(0, (5, 3)), label=reference_label)
        if ragged:
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            ax.yaxis.set_minor_locator(NullLocator())
        else:
            ax.set_ylim(bottom=0)
        ax.set_ylabel(ylabel)
        ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, alignment="left")
    axes[0].set_title(
        f"{config.tokens:,} tokens, hidden {config.hidden_size}, {config.experts_per_token} experts of"
        f" {config.expert_size} per token, {config.dtype}; {env['platform']}, {env['cores']} cores",
        loc="left",
        fontsize=9,
        color="#444444",
    )
    axes[1].set_xscale("log", base=2)
    axes[1].set_xticks(sorted(config.experts), [str(E) for E in sorted(config.experts)])
    axes[1].xaxis.set_minor_locator(NullLocator())
    axes[1].set_xlabel("experts E")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return low if low == high else f"{low} to {high}"
