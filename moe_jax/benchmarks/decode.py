"""How fast one completion is decoded, beside what the memory allows (`python -m moe_jax benchmark decode`).

At batch 1 every token reads every active weight once, so memory bandwidth bounds the tokens per second. Speculative
decoding gets around the bound by reading the weights once for several tokens; how many depends on the text, so it is
measured with a model that is trained here, on generated problems, until its drafts are good.

All contenders of a table are timed in turns, so that noise hits all alike, and of each the best turn counts.

Measured on 2 cores whose memory gives 38 to 40 GB/s, float32, as shares of the bound, three runs: dense 86 to 93 %
(250 tokens/s), dense with latent attention 77 to 86 %, sparse 67 to 74 % (225 tokens/s), sparse with latent attention
57 to 65 %. (At times the same machine gave its two cores 48 to 56 GB/s together, and took longer for what one of them
hands to the other: shares were then lower by a third.) What remains of the sparse layers is the copy of each expert's
matrix that XLA:CPU makes before it multiplies; unrolled loops, gathers, branches, several loops side by side and
experts in arrays of their own gave no more. At 4,096 positions one layer's latent attention takes .9 ms absorbed, 4.9
to 5.6 ms expanded at every step, 2.4 to 2.7 ms with expanded keys and values cached.

Drafting (`--train-minutes 12`, 421 steps, loss .26 to .38): of the first drafts 89 to 97 % are kept; 1 to 4 drafts give
1.25, 1.56, 1.49 and 1.54 times the tokens/s of plain decoding. A pass over two tokens takes 1.5 times as long as over
one, which is read at the memory's rate.

B batch (1), S sequence, T cached positions, C latent, H heads, J drafts.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from moe_jax.analysis.flops import parameter_counts
from moe_jax.analysis.tables import aligned
from moe_jax.benchmarks.environment import environment
from moe_jax.config import (
    AttentionConfig,
    ConfigError,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    OptimizerConfig,
    ProblemConfig,
    SamplingConfig,
)
from moe_jax.data.problem_text import ProblemText, encode_problem
from moe_jax.data.problems import ProblemSource, load_problems
from moe_jax.data.tokenizer import ByteTokenizer
from moe_jax.model.attention import MLA, Entries
from moe_jax.model.definition import Arrays, Definition
from moe_jax.model.layers import Initializer, rotation
from moe_jax.ops.attention import attention
from moe_jax.rng import random_key
from moe_jax.sampling.stream import Stream
from moe_jax.sharding import make_mesh
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import init_state, make_update
from moe_jax.training.supervised import make_loss, make_totals

_BANDWIDTH_ARRAY = 512 * 2**20
"""Bytes that the bandwidth is measured on: far more than any cache."""


def dense_model() -> ModelConfig:
    """34 M parameters, all active, and a prediction module of 4 M."""
    return ModelConfig(
        vocab_size=ByteTokenizer().vocab_size,
        hidden_size=512,
        num_layers=10,
        intermediate_size=1536,
        attention=AttentionConfig(kind="gqa", num_heads=8, num_kv_heads=8, head_dim=64),
        mtp=MTPConfig(depth=1, loss_coef=1.0),
    )


def sparse_model() -> ModelConfig:
    """190 M parameters, 31 M active: 64 experts, 6 per token, 1 shared."""
    moe = MoEConfig(num_experts=64, num_experts_per_token=6, num_shared_experts=1, expert_size=256)
    return dataclasses.replace(dense_model(), num_layers=8, moe=moe, mtp=MTPConfig())


def with_mla(cfg: ModelConfig) -> ModelConfig:
    """The same with latent attention, whose cache is less than a sixth of the other's."""
    attention = AttentionConfig(num_heads=8, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64)
    return dataclasses.replace(cfg, attention=attention)


PROBLEMS = ProblemConfig(min_terms=6, max_terms=6, worked_fraction=1.0, step_error_rate=0.0, test_problems=256)
"""What the model of the speculative part learns: chains of sums, worked out without mistakes."""


@dataclass(frozen=True)
class DecodeBenchmark:
    """What to measure."""

    tokens: int = 64
    """New tokens of a turn of plain decoding."""
    repeats: int = 5
    """Turns."""
    context: int = 4096
    """Cached positions in the comparison of attention's forms."""
    drafts: tuple[int, ...] = (1, 2, 3, 4)
    """Numbers of drafts to try."""
    temperature: float = 1.0
    prompts: int = 4
    """Held-out problems that a turn of the speculative part answers."""
    train_minutes: float = 0.0
    """At most so long the speculative part's model is trained; 0 leaves the part out unless there are `weights`."""
    target_acceptance: float = 0.95
    """Training ends when so many first drafts are kept on held-out problems."""
    weights: Path | None = None
    """An .npz file: what was trained is stored there, and taken from there if it exists."""
    plain: dict[str, ModelConfig] = field(
        default_factory=lambda: {
            "dense": dense_model(),
            "dense, MLA": with_mla(dense_model()),
            "sparse": sparse_model(),
            "sparse, MLA": with_mla(sparse_model()),
        }
    )
    speculative: ModelConfig = field(default_factory=dense_model)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("repeats", "context", "prompts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"DecodeBenchmark.{name} = {getattr(self, name)}: must be at least 1")
        if self.tokens < 2:
            raise ConfigError(f"DecodeBenchmark.tokens = {self.tokens}: must be at least 2, the first is not timed")
        if not self.drafts or min(self.drafts) < 1:
            raise ConfigError(f"DecodeBenchmark.drafts = {self.drafts}: give one number or more, all at least 1")


@dataclass(frozen=True)
class Plain:
    """One model, decoded token by token."""

    name: str
    parameters: int
    megabytes_per_token: float
    """Of the active weights; of the embedding one row is read, which does not count."""
    tokens_per_s: float
    bound_tokens_per_s: float

    @property
    def of_bound(self) -> float:
        return self.tokens_per_s / self.bound_tokens_per_s


@dataclass(frozen=True)
class AttentionForm:
    """One way to attend to a long context with latent attention, for one token and layer."""

    name: Literal["absorbed", "expanded at every step", "expanded keys and values cached"]
    microseconds: float
    cache_bytes_per_token: int


@dataclass(frozen=True)
class Speculative:
    """One number of drafts; 0 is plain decoding."""

    drafts: int
    tokens_per_s: float
    speed_up: float
    """Over plain decoding; ratio of the best turns."""
    acceptance: dict[str, float]


@dataclass(frozen=True)
class Results:
    environment: dict[str, Any]
    gigabytes_per_s: float
    plain: tuple[Plain, ...]
    attention: tuple[AttentionForm, ...]
    context: int
    training: dict[str, float] | None
    speculative: tuple[Speculative, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `json.dumps`."""
        values = dataclasses.asdict(self)
        for plain, row in zip(self.plain, values["plain"], strict=True):
            row["of_bound"] = plain.of_bound
        return values


def benchmark_decode(config: DecodeBenchmark) -> Results:
    """Measures; says on the standard error what it is about."""
    bandwidth = _bandwidth_meter()
    with jax.set_mesh(make_mesh(MeshConfig(data=1), jax.devices()[:1])):
        gigabytes_per_s, plain = _plain(config, bandwidth)
        _say("attention")
        forms = _attention_forms(config)
        training, speculative = _speculative(config) if config.train_minutes or config.weights else (None, ())
    return Results(environment(), gigabytes_per_s, plain, forms, config.context, training, speculative)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


# ---------------------------------------------------------------------------------------------------------------------
# plain decoding, and what the memory allows
# ---------------------------------------------------------------------------------------------------------------------


def _bandwidth_meter() -> Callable[[], float]:
    """A function that reads a large array once, on all cores, and returns bytes per second."""
    array = jnp.ones(_BANDWIDTH_ARRAY // 4, jnp.float32)
    read = jax.jit(jnp.max)
    read(array).block_until_ready()
    return lambda: array.nbytes / _seconds(lambda: read(array))


def bytes_per_token(cfg: ModelConfig) -> int:
    """Of the weights that a token is multiplied with. They are stored, and read, in float32."""
    embedding = 0 if cfg.tie_word_embeddings else cfg.vocab_size * cfg.hidden_size
    return 4 * (parameter_counts(cfg).active - embedding)


def _plain(config: DecodeBenchmark, bandwidth: Callable[[], float]) -> tuple[float, tuple[Plain, ...]]:
    best, rates = 0.0, dict.fromkeys(config.plain, 0.0)
    for name, cfg in config.plain.items():  # one after another: two sparse models need not fit the memory at once
        _say(f"plain decoding: {name}")
        definition = Definition.of(dataclasses.replace(cfg, mtp=MTPConfig()))
        sampling = SamplingConfig(max_new_tokens=config.tokens)
        params, rest = definition.init(random_key(config.seed, "weights"))
        stream = Stream(definition, params, rest, sampling, stop_ids=(), pad_id=0)
        for turn in range(config.repeats + 1):
            best = max(best, bandwidth())
            tokens, seconds = _drawn(stream, [[1, 2, 3, 4]], config.seed)
            if turn:  # the first compiles
                rates[name] = max(rates[name], tokens / seconds)
    return best / 1e9, tuple(
        Plain(
            name,
            parameter_counts(cfg).total,
            bytes_per_token(cfg) / 1e6,
            rates[name],
            best / bytes_per_token(cfg),
        )
        for name, cfg in config.plain.items()
    )


def _drawn(stream: Stream, prompts: Sequence[Sequence[int]], seed: int) -> tuple[int, float]:
    """How many tokens came after the prompts' first ones, and in how many seconds."""
    tokens, seconds = 0, 0.0
    for number, prompt in enumerate(prompts):
        completion = stream(prompt, random_key(seed, "draws", number))
        next(completion)
        start = time.perf_counter()
        tokens += sum(1 for _ in completion)
        seconds += time.perf_counter() - start
    return tokens, seconds


# ---------------------------------------------------------------------------------------------------------------------
# latent attention at a long context
# ---------------------------------------------------------------------------------------------------------------------


def _attention_forms(config: DecodeBenchmark) -> tuple[AttentionForm, ...]:
    cfg, T = with_mla(dense_model()), config.context
    a = cfg.attention
    layer = MLA(cfg, Initializer(cfg, nnx.Rngs(config.seed)))
    keys = jax.random.split(random_key(config.seed, "attention"), 3)
    x_BSD = jax.random.normal(keys[0], (1, 1, cfg.hidden_size))
    latent = Entries(
        jax.random.normal(keys[1], (1, T, a.kv_lora_rank)), jax.random.normal(keys[2], (1, T, a.qk_rope_head_dim))
    )
    rot = rotation(jnp.full((1, 1), T - 1), a.rope, a.qk_rope_head_dim)
    mask_BST = jnp.ones((1, 1, T), bool)
    graph, state = nnx.split(layer)

    def expand(layer: MLA, latent: Entries) -> tuple[Array, Array]:
        expanded = jnp.einsum("BTC,CHN->BTHN", latent.first, layer.key_value_b_CHN[...])
        key_BTHN, value_BTHV = jnp.split(expanded, [a.qk_nope_head_dim], axis=-1)
        key_BTHR = jnp.broadcast_to(latent.second[:, :, None], (*key_BTHN.shape[:3], a.qk_rope_head_dim))
        return jnp.concatenate([key_BTHN, key_BTHR], axis=-1), value_BTHV

    def attend(layer: MLA, key: Array, value: Array) -> Array:
        query = jnp.concatenate(layer._queries(x_BSD, rot), axis=-1)
        return layer._output(attention(query, key, value, mask_BST, layer.scale))

    absorbed = jax.jit(lambda state, latent: nnx.merge(graph, state).attend_cached(x_BSD, rot, latent, mask_BST))
    anew = jax.jit(lambda state, latent: attend(nnx.merge(graph, state), *expand(nnx.merge(graph, state), latent)))
    cached = jax.jit(lambda state, key, value: attend(nnx.merge(graph, state), key, value))
    key, value = jax.jit(lambda state, latent: expand(nnx.merge(graph, state), latent))(state, latent)
    runs: list[tuple[Any, Callable[[], Any], int]] = [
        ("absorbed", lambda: absorbed(state, latent), 4 * (a.kv_lora_rank + a.qk_rope_head_dim)),
        ("expanded at every step", lambda: anew(state, latent), 4 * (a.kv_lora_rank + a.qk_rope_head_dim)),
        ("expanded keys and values cached", lambda: cached(state, key, value), 4 * (key.size + value.size) // T),
    ]
    best = [np.inf] * len(runs)
    for turn in range(10 * config.repeats + 1):
        for index, (_, run, _) in enumerate(runs):
            seconds = _seconds(run)
            best[index] = min(best[index], seconds) if turn else np.inf
    return tuple(AttentionForm(name, 1e6 * seconds, size) for (name, _, size), seconds in zip(runs, best, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# speculative decoding
# ---------------------------------------------------------------------------------------------------------------------


def _speculative(config: DecodeBenchmark) -> tuple[dict[str, float] | None, tuple[Speculative, ...]]:
    tokenizer, source = ByteTokenizer(), load_problems(PROBLEMS, config.seed)
    definition = Definition.of(config.speculative)
    training = None
    if config.weights is not None and config.weights.exists():
        with np.load(config.weights) as file:
            arrays = {name: jnp.asarray(file[name]) for name in definition.variables}
        params, rest = ({n: arrays[n] for n in names} for names in _names(definition))
    else:
        params, rest, training = train(config, definition, source, tokenizer)
        if config.weights is not None:
            np.savez(config.weights, allow_pickle=False, **jax.device_get({**params, **rest}))
    prompts = [encode_problem(problem, tokenizer) for problem in source.test[: config.prompts]]
    _say("speculative decoding")
    streams = {drafts: _stream(config, definition, params, rest, tokenizer, drafts) for drafts in (0, *config.drafts)}
    rates = dict.fromkeys(streams, 0.0)
    for turn in range(config.repeats + 1):
        for drafts, stream in streams.items():
            tokens, seconds = _drawn(stream, prompts, config.seed + turn)
            if turn:  # the first compiles
                rates[drafts] = max(rates[drafts], tokens / seconds)
    return training, tuple(
        Speculative(drafts, rates[drafts], rates[drafts] / rates[0], stream.acceptance())
        for drafts, stream in streams.items()
    )


def _names(definition: Definition) -> tuple[list[str], list[str]]:
    params = definition.param_names
    return params, [name for name in definition.variables if name not in set(params)]


def _stream(
    config: DecodeBenchmark, definition: Definition, params: Arrays, rest: Arrays, tokenizer: ByteTokenizer, drafts: int
) -> Stream:
    sampling = SamplingConfig(max_new_tokens=128, temperature=config.temperature, speculative_tokens=drafts)
    return Stream(definition, params, rest, sampling, stop_ids=tokenizer.stop_ids, pad_id=tokenizer.pad_id)


def train(
    config: DecodeBenchmark, definition: Definition, source: ProblemSource, tokenizer: ByteTokenizer
) -> tuple[Arrays, Arrays, dict[str, float]]:
    """Trains on worked problems until the first draft is kept often enough on held-out ones, or time is up."""
    rows, length, check_every, most_steps = 8, 128, 20, 2000
    optimizer = make_optimizer(
        OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup_steps=20), most_steps, definition
    )
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    state = init_state(definition, optimizer, random_key(config.seed, "weights"), mesh)
    update = make_update(
        make_loss(definition, (tokenizer.pad_id,)), make_totals(definition), optimizer, balance=definition.cfg.moe
    )
    text = ProblemText(source, tokenizer, rows, length, "train")
    prompts = [encode_problem(problem, tokenizer) for problem in source.test[-8:]]
    start, step, kept, metrics = time.perf_counter(), 0, 0.0, {}
    for step in range(1, most_steps + 1):
        state, metrics = update(state, jax.tree.map(jnp.asarray, next(text)))
        minutes = (time.perf_counter() - start) / 60
        if step % check_every == 0 or minutes > config.train_minutes:
            stream = _stream(config, definition, state.params, state.rest, tokenizer, 1)
            _drawn(stream, prompts, config.seed)
            kept = stream.acceptance()["acceptance"]
            loss = float(metrics["loss"])
            _say(f"step {step}: {minutes:.1f} min, loss {loss:.3f}, first draft kept {kept:.0%}")
            if kept >= config.target_acceptance or minutes > config.train_minutes:
                break
    minutes = (time.perf_counter() - start) / 60
    return state.params, state.rest, {"steps": step, "minutes": minutes, "acceptance": kept}


# ---------------------------------------------------------------------------------------------------------------------
# showing
# ---------------------------------------------------------------------------------------------------------------------


def table(results: Results) -> str:
    """The results, readable."""
    env = results.environment
    parts = [
        f"{env['platform']} ({env['device']}, {env['machine']}), {env['cores']} cores, jax {env['jax']}, float32;"
        f" memory {results.gigabytes_per_s:.1f} GB/s (best reading of 512 MiB)",
        "Plain decoding, batch 1\n"
        + aligned(
            ["model", "parameters", "MB a token", "tokens/s", "bound", "of bound"],
            [
                [
                    row.name,
                    f"{row.parameters / 1e6:.0f} M",
                    f"{row.megabytes_per_token:.0f}",
                    f"{row.tokens_per_s:.1f}",
                    f"{row.bound_tokens_per_s:.1f}",
                    f"{row.of_bound:.0%}",
                ]
                for row in results.plain
            ],
        ),
        f"Latent attention, one token and layer, {results.context} positions cached\n"
        + aligned(
            ["form", "µs", "cache bytes a position"],
            [[row.name, f"{row.microseconds:,.0f}", str(row.cache_bytes_per_token)] for row in results.attention],
        ),
    ]
    if results.speculative:
        parts.append("Speculative decoding, batch 1, held-out problems\n" + "\n".join(_speculative_lines(results)))
    return "\n\n".join(parts)


def _speculative_lines(results: Results) -> Iterator[str]:
    if results.training:
        t = results.training
        yield f"  trained here: {t['steps']:.0f} steps, {t['minutes']:.1f} min"
    places = max(row.drafts for row in results.speculative)
    yield aligned(
        ["drafts", "tokens/s", "× plain", "tokens a pass", *[f"kept {j}" for j in range(1, places + 1)]],
        [
            [
                str(row.drafts),
                f"{row.tokens_per_s:.1f}",
                f"{row.speed_up:.2f}",
                f"{row.acceptance.get('tokens_per_pass', 1):.2f}",
                *[
                    f"{row.acceptance[f'acceptance_{j}']:.0%}" if f"acceptance_{j}" in row.acceptance else ""
                    for j in range(1, places + 1)
                ],
            ]
            for row in results.speculative
        ],
    )
