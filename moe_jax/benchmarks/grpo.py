"""How fast a step of GRPO is, beside what the machine can multiply (`python -m moe_jax benchmark grpo`).

A step is what `PolicyTrainer.step` does: sampling a group for each prompt, scoring, the reference's log-probabilities
and the update. The model is a dense one of 5 M parameters, as small as the cores' caches, with random weights; no
completion ends early unless asked to, so that every step has the same work.

FLOPs are those of the tokens that a step reads (2 per weight and token, attention's scores by the pairs that may see
each other), which is not the work of a step without shared prompts: tokens per second are what compares. Of packed rows
those of drawn tokens count, not of columns left empty.

The contenders of a table are timed in turns, and the matrix rate with them.

Measured on two CPU cores, nothing else running, in turns, `--cache-parts 2` and else the defaults (8 prompts x 8
samples x 64 tokens, float32, β .001): with prompts of 8 tokens 1.16 and 1.22 s a step (Tunix 0.1.7 1.77 and 1.77 s, TRL
1.16 2.21 and 2.33 s), with 192 tokens 2.15 s (earlier: TRL 9.37 s, Tunix 8.88 s). Of the 1.16 s sampling takes .36, the
reference .15 and the update .63. With `--stop-tokens 8`, where completions have 29 of 64 tokens on average, 1.26 s, and
with `--pack-completions` 1.04 s.

P prompts, G samples of each, S prompt tokens, N completion tokens.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.analysis.flops import parameter_counts, training_flops_per_token
from moe_jax.analysis.tables import aligned
from moe_jax.benchmarks.environment import environment
from moe_jax.config import (
    AttentionConfig,
    ConfigError,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    PolicyLossConfig,
    RLConfig,
    SamplingConfig,
)
from moe_jax.data.problems import Problem
from moe_jax.data.tokenizer import ByteTokenizer
from moe_jax.model.definition import Definition
from moe_jax.rl.environments import Completion, Parts
from moe_jax.rl.train import PHASES, PolicyState, PolicyTrainer
from moe_jax.rng import random_generator, random_key
from moe_jax.sharding import make_mesh

_MATRIX = 1024
"""Side of the square matrices that the machine's rate is measured with."""


def dense_model() -> ModelConfig:
    """5.2 M parameters: the size at which TRL and Tunix were measured."""
    return ModelConfig(
        vocab_size=ByteTokenizer().vocab_size,
        hidden_size=256,
        num_layers=6,
        intermediate_size=768,
        attention=AttentionConfig(kind="gqa", num_heads=8, num_kv_heads=8, head_dim=32),
        moe=MoEConfig(),
    )


@dataclass(frozen=True)
class GRPOBenchmark:
    """What to measure."""

    prompts: int = 8
    group_size: int = 8
    completion_tokens: int = 64
    prompt_lengths: tuple[int, ...] = (8, 192)
    share_prompts: tuple[bool, ...] = (True,)
    """`RLConfig.share_prompts`: with both values they are compared."""
    pack_completions: bool = False
    """`RLConfig.pack_completions`."""
    beta: float = 0.001
    stop_tokens: int = 0
    """So many of the vocabulary's tokens end a completion; 0: all completions have full length."""
    slots: int = 0
    compactions: int = 0
    cache_parts: int = 1
    """As in `SamplingConfig`."""
    repeats: int = 5
    """Steps, after one that compiles."""
    model: ModelConfig = field(default_factory=dense_model)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompts", "completion_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"GRPOBenchmark.{name} = {getattr(self, name)}: must be at least 1")
        if self.group_size < 2:
            raise ConfigError(f"GRPOBenchmark.group_size = {self.group_size}: must be at least 2")
        if not self.prompt_lengths or min(self.prompt_lengths) < 2:
            raise ConfigError(
                f"GRPOBenchmark.prompt_lengths = {self.prompt_lengths}: give one or more, all at least 2: <bos> is one"
            )
        vocabulary = ByteTokenizer().vocab_size
        if not 0 <= self.stop_tokens < vocabulary - 1:
            raise ConfigError(
                f"GRPOBenchmark.stop_tokens = {self.stop_tokens}: must be from 0 to {vocabulary - 2}, the vocabulary"
                " without padding and a token to go on with"
            )


@dataclass(frozen=True)
class Phase:
    """One part of a step; its median over the steps."""

    name: str
    seconds: float
    flops: int

    @property
    def gflops_per_s(self) -> float:
        return self.flops / self.seconds / 1e9


@dataclass(frozen=True)
class Step:
    """Steps with prompts of one length; medians."""

    prompt_length: int
    share_prompts: bool
    seconds: float
    completion_tokens: float
    """Drawn in a step, mean."""
    phases: tuple[Phase, ...]

    @property
    def flops(self) -> int:
        return sum(phase.flops for phase in self.phases)

    @property
    def completion_tokens_per_s(self) -> float:
        return self.completion_tokens / self.seconds


@dataclass(frozen=True)
class Results:
    environment: dict[str, Any]
    parameters: int
    gflops_per_s: float
    """Of a product of two large matrices: what the machine can multiply."""
    steps: tuple[Step, ...]
    config: GRPOBenchmark

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `json.dumps`."""
        values = dataclasses.asdict(self)
        for step, row in zip(self.steps, values["steps"], strict=True):
            row["completion_tokens_per_s"] = step.completion_tokens_per_s
            row["of_matrix_rate"] = step.flops / step.seconds / 1e9 / self.gflops_per_s
            for phase, cell in zip(step.phases, row["phases"], strict=True):
                cell["gflops_per_s"] = phase.gflops_per_s
        return values


class _Tokenizer(ByteTokenizer):
    """Bytes, of which the last `stop_tokens` end a completion."""

    def __init__(self, stop_tokens: int):
        super().__init__()
        self.stop_ids = tuple(range(self.vocab_size - stop_tokens, self.vocab_size))


class _Digits:
    """Prompts of random digits, all of one length; a reward in which a group's samples differ."""

    def __init__(self, prompt_length: int, seed: int):
        self.prompt_length, self.seed = prompt_length, seed

    def problems(self, step: int, count: int) -> list[Problem]:
        digits = random_generator(self.seed, "benchmark", step).integers(10, size=(count, self.prompt_length - 1))
        return [Problem("".join(map(str, row)), "", str(index)) for index, row in enumerate(digits.tolist())]

    def score(self, completions: Sequence[Completion]) -> list[Parts]:
        rewards = [float(len(set(one.text)) % 7) for one in completions]
        return [{"reward": reward, "accuracy": reward / 6} for reward in rewards]

    def observe(self, step: int, accuracy: float) -> None:
        """Learns nothing."""


class _Contender:
    """Steps of GRPO with prompts of one length."""

    def __init__(self, config: GRPOBenchmark, prompt_length: int, share_prompts: bool, mesh: Any):
        self.prompt_length, self.share_prompts, self.seed, self.mesh = prompt_length, share_prompts, config.seed, mesh
        rl = RLConfig(
            steps=config.repeats + 1,
            num_prompts=config.prompts,
            group_size=config.group_size,
            share_prompts=share_prompts,
            pack_completions=config.pack_completions and share_prompts,
            min_active_groups=0.0,
            loss=PolicyLossConfig(beta=config.beta),
            sampling=SamplingConfig(
                max_new_tokens=config.completion_tokens,
                slots=config.slots,
                compactions=config.compactions,
                cache_parts=config.cache_parts,
            ),
            optimizer=OptimizerConfig(learning_rate=1e-6, schedule="constant", warmup_steps=0),
        )
        definition = Definition.of(config.model)
        self.trainer = PolicyTrainer(definition, rl, _Tokenizer(config.stop_tokens), prompt_length)
        self.problems = _Digits(prompt_length, config.seed)
        self.state: PolicyState = self.trainer.start(*definition.init(random_key(config.seed, "weights"), mesh), mesh)
        self.seconds: list[float] = []
        self.metrics: list[dict[str, Any]] = []

    def step(self, number: int) -> None:
        start = time.perf_counter()
        self.state, metrics, _ = self.trainer.step(self.problems, self.state, "benchmark", number, self.seed, self.mesh)
        jax.block_until_ready(self.state)
        self.seconds.append(time.perf_counter() - start)
        self.metrics.append(metrics)

    def result(self, config: GRPOBenchmark) -> Step:
        """Of all steps but the first, which compiled."""
        rows = self.metrics[1:]
        tokens = float(np.mean([row["num_tokens"] for row in rows]))
        flops = phase_flops(config, self.prompt_length, self.share_prompts, tokens)
        phases = tuple(
            Phase(name, float(np.median([row[f"time/{name}"] for row in rows])), flops.get(name, 0)) for name in PHASES
        )
        seconds = float(np.median(self.seconds[1:]))
        return Step(self.prompt_length, self.share_prompts, seconds, tokens, phases)


def phase_flops(config: GRPOBenchmark, prompt_length: int, share_prompts: bool, drawn: float) -> dict[str, int]:
    """FLOPs of each phase that multiplies. Sampling works on the `drawn` tokens, training on whole rows, unless they
    are packed."""
    P, G, S, N = config.prompts, config.group_size, prompt_length, config.completion_tokens
    token = training_flops_per_token(config.model, 0) // 3
    pair = training_flops_per_token(config.model, 2) // 3 - token
    head = 2 * config.model.vocab_size * config.model.hidden_size

    def passed(prompts: int, completions: float, length: float) -> float:
        """A forward pass over prompts, and over completions of a length; the head reads completions alone."""
        tokens = prompts * S + completions * length
        pairs = prompts * S * (S + 1) / 2 + completions * length * (S + (length + 1) / 2)
        return tokens * (token - head) + completions * length * head + pairs * pair

    sampled = passed(P, P * G, drawn / (P * G))
    packed = config.pack_completions and share_prompts
    trained = passed(P if share_prompts else P * G, P * G, drawn / (P * G) if packed else N)
    return {"generate": round(sampled), "reference": round(trained) if config.beta else 0, "update": round(3 * trained)}


def benchmark_grpo(config: GRPOBenchmark) -> Results:
    """Measures; says on the standard error what it is about."""
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    rate, best = _matrix_meter(), 0.0
    with jax.set_mesh(mesh):
        kinds = [(length, share) for length in config.prompt_lengths for share in config.share_prompts]
        contenders = [_Contender(config, length, share, mesh) for length, share in kinds]
        for number in range(config.repeats + 1):
            print(f"step {number} of {config.repeats}", file=sys.stderr, flush=True)
            for contender in contenders:
                best = max(best, rate())
                contender.step(number)
    steps = tuple(contender.result(config) for contender in contenders)
    return Results(environment(), parameter_counts(config.model).total, best / 1e9, steps, config)


def _matrix_meter() -> Callable[[], float]:
    """A function that multiplies two large matrices once, and returns FLOPs per second."""
    a = jnp.ones((_MATRIX, _MATRIX), jnp.float32)
    multiply = jax.jit(jnp.matmul)
    multiply(a, a).block_until_ready()

    def rate() -> float:
        start = time.perf_counter()
        multiply(a, a).block_until_ready()
        return 2 * _MATRIX**3 / (time.perf_counter() - start)

    return rate


def table(results: Results) -> str:
    """The results, readable."""
    env, config = results.environment, results.config
    lines = []
    for step in results.steps:
        name = f"{step.prompt_length}, {'shared' if step.share_prompts else 'not shared'}"
        whole = Phase("step", step.seconds, step.flops)
        for phase in (whole, *step.phases):
            first = phase is whole
            rate = phase.gflops_per_s
            lines.append(
                [
                    name if first else "",
                    phase.name,
                    f"{phase.seconds:.3f}",
                    f"{phase.seconds / step.seconds:.0%}",
                    f"{phase.flops / 1e9:.1f}" if phase.flops else "",
                    f"{rate:.1f}" if phase.flops else "",
                    f"{rate / results.gflops_per_s:.0%}" if phase.flops else "",
                    f"{step.completion_tokens_per_s:,.0f}" if first else "",
                ]
            )
    head = ["prompt", "phase", "s", "share", "GFLOP", "GFLOP/s", "of rate", "completion tokens/s"]
    return (
        f"{env['platform']} ({env['device']}, {env['machine']}), {env['cores']} cores, jax {env['jax']},"
        f" {config.model.dtype}; matrix rate {results.gflops_per_s:.0f} GFLOP/s ({_MATRIX} × {_MATRIX}, best reading)"
        "\n\n"
        f"{results.parameters / 1e6:.2f} M parameters; {config.prompts} prompts × {config.group_size} samples ×"
        f" {config.completion_tokens} tokens, beta {config.beta:g}; medians of {config.repeats} steps\n"
        + aligned(head, lines)
    )
