"""Dense against sparse at equal compute: a ladder of small models, its scaling laws, and what sparsity buys.

    python -m experiments.scaling_curves [--quick] [--dry-run] [--workers 2] [--data.path TEXT] [--help]
    python -m experiments.scaling_curves --ladder h100_day --data.path TEXT --dry-run
    python -m experiments.scaling_curves --plan.families dense sparse sparse:activation_ratio=1/16 mla mha

For each budget of training FLOPs, dense models of several sizes and, for each, the sparse model that costs the same
FLOPs per token (`--plan.match-by` active or total parameters instead), each with several seeds. A seed has the same
text in the same order in every family. Families are `dense`, `sparse` (a token uses 3 of 29 routed experts and 1 shared
one: activation ratio 4/30, granularity 4), `mla`, `gqa`, `mha`, and changes of these: "sparse:granularity=8". From the
runs follow each budget's best size (IsoFLOP parabolas), the loss that compute buys, and the efficiency leverage: the
compute that a dense model needs for the sparse one's loss, over the sparse one's. All losses are bits per byte of the
same held-out text. The largest budget is also predicted from the smaller ones. report.md says it all, with pictures.

Learning rate and batch follow stated rules (`--plan.learning-rate-dense.scale`, …), or are swept:
`--plan.learning-rate-factors 0.5 1 2` trains each configuration with each, and the best counts.

Each run has its folder runs/<hash of its configuration> and its result results/<hash>.json: the same command goes on
where it was stopped, and a ladder that shares runs with another one can share its folder. `--shard 0/4` does a quarter
of the runs, on another machine perhaps (then copy the folders results/ together); `--fit` trains nothing and reports
what is there. Without --shard all that is missing is trained, and reported. `--dry-run` prints what would be trained
and what it will take. Models are trained from scratch: there is no --init.

Ladders: laptop (150 runs, 35 minutes on 2 idle cores), quick (36 runs, 3 minutes), h100_day and v5e16_week, which the
estimator plans for one H100 and a day and 16 v5e and a week at a quarter of the roofline; neither has been run. Their
learning rates and batches are the published rules; the laptop's, below their range, are of the same exponents through
a sweep at 8e10 FLOPs.

Hardware: 2 CPU cores, 50 minutes beside other work (1.66 hours of one core). Result of the default, seeds 0 to 2, the
standard library's text; differences are sparse - dense in bits per byte, with 95 % intervals:

    FLOPs     same size and seed        best size of each         efficiency leverage
    8e9       -.019 [-.075, +.037]
    2.53e10   -.048 [-.185, +.089]      -.038 [-.090, +.015]      1.02 [ .88, 1.16]
    8e10      -.074 [-.115, -.033]      -.101 [-.141, -.050]      1.41 [1.28, 1.54]
    2.53e11   -.131 [-.162, -.100]      -.158 [-.188, -.131]      1.94 [1.81, 2.10]
    8e11      -.167 [-.183, -.150]      -.180 [-.198, -.162]      2.68 [2.44, 2.98]  (beyond the dense runs' losses)

Sparse wins from 8e10 FLOPs on, and the more so the more compute there is, as published at 1e18 to 1e22 FLOPs (Ling,
arXiv:2507.17702: more than 7 at 3.4 % active). The best loss of a budget goes as C^-.0945 [.0913, .0984] for dense and
C^-.121 [.115, .127] for sparse models; from the four smaller budgets the largest one's is predicted with errors of
+1.3 % and -.9 %. The irreducible loss is not determined by so little compute.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moe_jax.analysis.ladder import Ladder, Planned, plan, shard_of
from moe_jax.analysis.scaling_law import PowerLaw
from moe_jax.config import (
    AttentionConfig,
    CheckpointConfig,
    ConfigError,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    TextConfig,
    to_dict,
)

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh

    from moe_jax.analysis import cost
    from moe_jax.analysis.workload import Workload
    from moe_jax.data.text import TextCorpus
    from moe_jax.data.tokenizer import Tokenizer
    from moe_jax.training.signals import StopGuard

NAME = "scaling_curves"


@dataclass(frozen=True)
class Hardware:
    """What the plan's hours and dollars are of; it changes no result."""

    chip: str = ""
    """A kind of chip (`moe_jax/analysis/cost.py` has them); empty: CPU cores, one for each worker."""
    chips: int = 1
    topology: str = ""
    """TPUs and their torus, e.g. v5e:4x4, instead of a chip."""
    roofline_share: float = 0.25
    """Speed relative to the roofline, which small models are far from: an assumption, to be replaced by a measurement
    of the ladder's first runs."""
    core_flops: float = 1.0e10
    """FLOP/s of a CPU core, as FLOPs are counted here: measured with this program."""
    run_seconds: float = 5.0
    """What a run takes besides its steps: compiling, validation, files."""
    dollars_per_hour: float = -1.0
    """Of a chip; -1: the table's, and 0 for a CPU."""


@dataclass(frozen=True)
class Config:
    ladder: str = "laptop"
    """laptop; quick (or --quick); h100_day; v5e16_week: the defaults of everything else."""
    run_dir: str = ""
    """Where everything goes; empty: runs/scaling_curves-<ladder>. The same command resumes."""
    seed: int = 0
    """The first of the seeds; the others follow it."""
    num_seeds: int = 3
    shard: str = ""
    """"i/n": train the i-th (from 0) of n parts of the runs, and report nothing."""
    workers: int = 1
    """Processes of one thread each, on a CPU: for small models faster than one process of several threads."""
    dry_run: bool = False
    """Print the runs and what they will take, and end."""
    fit: bool = False
    """Report what is there, and train nothing."""
    plan: Ladder = field(default_factory=lambda: LADDERS["laptop"].plan)
    model: ModelConfig = field(default_factory=lambda: LADDERS["laptop"].model)
    """What all models share; sizes and numbers of experts are the ladder's."""
    tokenizer: str = "byte"
    """"byte", or a path to a tokenizer.json or its folder; `model.vocab_size` must hold its tokens."""
    data: TextConfig = TextConfig()
    validation_tokens: int = 2**16
    """Held-out tokens to validate on, spread evenly over that text; 0 takes all."""
    chunk: int = 16
    """Optimizer steps per call of the compiled program."""
    checkpoint: CheckpointConfig = CheckpointConfig(every=20, keep=1)
    """`every` counts chunks. A run's checkpoints are deleted when its result is there."""
    hardware: Hardware = Hardware()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        for name in ("num_seeds", "workers", "chunk"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Config.{name} = {getattr(self, name)}: must be at least 1")
        for name in ("seed", "validation_tokens"):
            if getattr(self, name) < 0:
                raise ConfigError(f"Config.{name} = {getattr(self, name)}: must be 0 or greater")
        parse_shard(self.shard)
        if self.fit and self.shard:
            raise ConfigError("--fit and --shard: a shard trains, --fit reports what all have trained; choose one")
        if self.workers > 1 and (self.hardware.chip or self.hardware.topology):
            raise ConfigError(f"--workers {self.workers}: are for CPUs; with accelerators use --shard, or one process")

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.num_seeds)

    @property
    def folder(self) -> Path:
        return Path(self.run_dir or f"runs/{NAME}-{self.ladder}").absolute()


def parse_shard(shard: str) -> tuple[int, int]:
    """(i, n) of "i/n"; (0, 1) of nothing.

    Raises:
        ConfigError: it is not written so, or i is not less than n.
    """
    first, _, count = (shard or "0/1").partition("/")
    if not (first.isdigit() and count.isdigit() and int(first) < int(count)):
        raise ConfigError(f"--shard {shard}: must be i/n with i from 0 to n - 1, e.g. 0/4")
    return int(first), int(count)


class _Defaults(NamedTuple):
    """What a ladder's name stands for."""

    plan: Ladder
    model: ModelConfig
    options: dict[str, Any]


def _geometric(first: float, last: float, count: int) -> tuple[float, ...]:
    return tuple(float(f"{first * (last / first) ** (i / (count - 1)):.3g}") for i in range(count))


def _model(head_dim: int, vocab_size: int = 265, **changes: Any) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size,
        attention=AttentionConfig(kind="gqa", num_heads=4, num_kv_heads=4, head_dim=head_dim, qk_norm="head"),
        moe=MoEConfig(num_experts=0, bias_update_rate=0.01),
        **{"max_position": 128, "initializer_range": 0.06, **changes},
    )


def _rule(value: float, budget: float, exponent: float) -> PowerLaw:
    """The power law through one point."""
    return PowerLaw(value / budget**exponent, exponent)


_LAPTOP = Ladder(
    budgets=_geometric(8e9, 8e11, 5),
    sizes=("1x8", "1x16", "1x24", "1x32", "1x48", "2x48", "2x64", "3x64"),
    sizes_per_budget=5,
    tokens_per_parameter=130.0,
    batch_tokens=_rule(512, 8e10, 0.327),
    learning_rate_dense=_rule(2e-2, 8e10, -0.125),
    learning_rate_sparse=_rule(2e-2, 8e10, -0.125),
    optimizer=OptimizerConfig(weight_decay=0.0, final_fraction=0.1),
)
_QUICK = replace(_LAPTOP, budgets=_geometric(8e9, 8e10, 3), sizes=("1x8", "1x16", "1x24", "1x32"), sizes_per_budget=3)
_ACCELERATOR = Ladder(
    budgets=_geometric(1.7e15, 1.7e17, 5),
    sizes=("2x128", "3x192", "4x256", "5x320", "6x384", "7x448", "8x512", "9x576"),
    tokens_per_parameter=80.0,
    sequence_length=1024,
    multiple=8,
    # DeepSeek LLM's rules (arXiv:2401.02954, §3.1), and Ling's learning rate of sparse models (arXiv:2507.17702): both
    # were fitted to budgets from about 1e17 FLOPs on.
    batch_tokens=PowerLaw(0.2920, 0.3271),
    learning_rate_dense=PowerLaw(0.3118, -0.1250),
    learning_rate_sparse=PowerLaw(1.1576, -0.1529),
    optimizer=OptimizerConfig(weight_decay=0.1, final_fraction=0.1),
)
_POD = replace(
    _ACCELERATOR,
    budgets=_geometric(8e16, 8e18, 5),
    sizes=("5x320", "6x384", "7x448", "8x512", "10x640", "12x768", "14x896", "16x1024", "18x1152"),
)
LADDERS: dict[str, _Defaults] = {
    "laptop": _Defaults(_LAPTOP, _model(8), {"workers": 2}),
    "quick": _Defaults(_QUICK, _model(8), {"workers": 2, "num_seeds": 2}),
    "h100_day": _Defaults(
        _ACCELERATOR,
        _model(64, max_position=1024, initializer_range=0.02, dtype="bfloat16", remat="block"),
        {"hardware": Hardware(chip="h100", run_seconds=60.0), "num_seeds": 2, "validation_tokens": 2**22},
    ),
    "v5e16_week": _Defaults(
        _POD,
        _model(64, max_position=1024, initializer_range=0.02, dtype="bfloat16", remat="block"),
        {
            "hardware": Hardware(topology="v5e:4x4", run_seconds=120.0),
            "num_seeds": 2,
            "validation_tokens": 2**22,
            "mesh": MeshConfig(data=1, fsdp=-1),
        },
    ),
}


def workload(cfg: Config, run: Planned) -> tuple[Workload, cost.Hardware, dict[str, int]] | None:
    """What a device does in a step of the run, on what hardware, with which mesh; None on a CPU.

    Raises:
        ConfigError: unknown hardware, or a mesh that fits neither it nor the batch.
    """
    from moe_jax.analysis import cost
    from moe_jax.analysis.workload import mesh_sizes, training_workload

    hardware = cfg.hardware
    if not (hardware.chip or hardware.topology):
        return None
    machine = cost.parse_hardware(hardware.topology, hardware.chip, 0 if hardware.topology else hardware.chips)
    sizes = mesh_sizes(cfg.mesh, machine.devices)
    return training_workload(run.model, sizes, run.train.batch_size, run.train.sequence_length), machine, sizes


def seconds_of(cfg: Config, run: Planned) -> float:
    """What a run should take on the plan's hardware."""
    from moe_jax.analysis.cost import roofline

    hardware = cfg.hardware
    if not (found := workload(cfg, run)):
        return run.flops / hardware.core_flops + hardware.run_seconds
    work, machine, sizes = found
    step = roofline(work.step, machine, sizes).step_seconds / hardware.roofline_share
    return run.train.steps * step + hardware.run_seconds


def plan_table(cfg: Config, runs: Sequence[Planned]) -> str:
    """The runs, a line for the seeds of each configuration, with parameters, FLOPs, tokens, hours and dollars."""
    from moe_jax.analysis.scaling_report import short
    from moe_jax.analysis.tables import markdown

    hardware = cfg.hardware
    price, chips, too_large = max(hardware.dollars_per_hour, 0.0), 1, dict[str, float]()
    for run in runs:
        if found := workload(cfg, run):
            work, machine, _ = found
            chips = machine.chips
            price = machine.chip.dollars_per_hour or 0.0 if hardware.dollars_per_hour < 0 else hardware.dollars_per_hour
            if work.memory.total > machine.device.hbm_bytes:
                too_large[f"{run.family} {run.size}, batch {run.train.batch_size}"] = work.memory.total / 1e9
    head = ["budget", "family", "size", "runs", "params", "active", "no embed.", "off", "batch", "learning rate"]
    rows = [[*head, "steps", "tokens", "FLOPs", "hours", "dollars"]]
    groups: dict[tuple, list[Planned]] = {}
    for run in runs:
        key = (run.budget, run.family, run.size, run.learning_rate_factor, run.batch_factor)
        groups.setdefault(key, []).append(run)
    hours = 0.0
    for group in groups.values():
        run, counts = group[0], group[0].counts
        needs = sum(seconds_of(cfg, each) for each in group) / 3600
        hours += needs
        rows.append(
            [
                f"{run.budget:.3g}",
                run.family,
                run.size,
                str(len(group)),
                short(counts.total + counts.mtp),
                short(counts.active),
                short(counts.active_non_embedding),
                f"{run.match_error[run.match_by]:+.1%}",
                str(run.train.batch_size),
                f"{run.train.optimizer.learning_rate:.3g}",
                f"{run.train.steps:,}",
                short(run.tokens),
                f"{run.flops:.3g}",
                f"{needs:.3g}",
                f"{needs * chips * price:.2f}",
            ]
        )
    parts = cfg.workers * parse_shard(cfg.shard)[1]
    largest = short(max(run.tokens for run in runs))
    total = f"{len(runs)} runs, {sum(run.flops for run in runs):.3g} FLOPs; largest run {largest} tokens"
    speed = (
        f"{chips} x {hardware.chip or hardware.topology} at {hardware.roofline_share:.0%} of the roofline (assumed)"
        if hardware.chip or hardware.topology
        else f"CPU, {hardware.core_flops:.3g} FLOP/s a core; {hours / parts:.2f} hours with {parts} processes"
    )
    return (
        f"{markdown(rows)}\n\n{total}; {hours:.2f} hours, ${hours * chips * price:,.2f}, on {speed}.\n"
        f"off: {runs[0].match_by} over the dense model's of the same size, minus 1; no embed.: active, without"
        " embeddings." + "".join(f"\nDOES NOT FIT: {name} takes {gb:.1f} GB a device" for name, gb in too_large.items())
    )


class Rated(NamedTuple):
    """Optimizer state with the learning rate in it, so that one compiled program serves every schedule."""

    rate: jax.Array
    inner: Any


class Program:
    """One model's compiled functions, for all budgets, learning rates and seeds."""

    def __init__(self, run: Planned, tokenizer: Tokenizer, mesh: Mesh, chunk: int):
        import jax
        import jax.numpy as jnp
        import optax

        from moe_jax.model.definition import Definition
        from moe_jax.training.optimizer import make_optimizer
        from moe_jax.training.state import TrainState, init_state, make_update
        from moe_jax.training.supervised import BitsPerByte, make_loss, make_totals

        definition, banned = Definition.of(run.model), (tokenizer.pad_id,)
        unit = replace(run.train.optimizer, learning_rate=1.0, schedule="constant", warmup_steps=1)
        inner = make_optimizer(unit, 1, definition)

        def init(params: Any) -> Rated:
            return Rated(jnp.zeros(()), inner.init(params))

        def change(updates: Any, state: Any, params: Any = None) -> tuple[Any, Rated]:
            changes, after = inner.update(updates, state.inner, params)
            return jax.tree.map(lambda x: x * state.rate, changes), Rated(state.rate, after)

        optimizer = optax.GradientTransformation(init, change)
        trained = definition.at(run.train.precision)
        update = make_update(make_loss(trained, banned), make_totals(trained), optimizer, balance=run.model.moe)

        def steps(state: TrainState, batches: Any, rates_N: Any, count: Any) -> tuple[TrainState, dict[str, jax.Array]]:
            """`count` updates, on the first of N batches; metrics are means over them."""
            batches = jax.tree.map(lambda *rows: jnp.stack(rows), *batches)

            def one(i: Any, carry: Any) -> Any:
                state, sums = carry
                opt_state: Any = state.opt_state
                state = state._replace(opt_state=opt_state._replace(rate=rates_N[i]))
                state, metrics = update(state, jax.tree.map(lambda x: x[i], batches))
                return state, {name: total + metrics[name] for name, total in sums.items()}

            _, shapes = jax.eval_shape(update, state, jax.tree.map(lambda x: x[0], batches))
            zeros = {name: jnp.zeros(()) for name, shape in shapes.items() if shape.shape == ()}
            state, sums = jax.lax.fori_loop(0, count, one, (state, zeros))
            return state, {name: total / count for name, total in sums.items()}

        self.init = jax.jit(lambda key: init_state(definition, optimizer, key, mesh))
        self.steps = jax.jit(steps, donate_argnums=0)
        self.bits_per_byte = BitsPerByte(definition, tokenizer.token_bytes_V, banned)
        self.chunk, self.mesh = chunk, mesh


class Laboratory:
    """What runs share: the text, and the compiled programs."""

    def __init__(self, cfg: Config, corpus: TextCorpus, tokenizer: Tokenizer, mesh: Mesh, guard: StopGuard):
        self.cfg, self.corpus, self.tokenizer, self.mesh, self.guard = cfg, corpus, tokenizer, mesh, guard
        self.programs: dict[Any, Program] = {}
        self.held_out: list[dict[str, Any]] = []

    def validation(self) -> list[dict[str, Any]]:
        """Batches of held-out text, the same for every run."""

        from moe_jax.data.text import spread_validation_batches

        if not self.held_out:
            length = self.cfg.plan.sequence_length
            count = math.ceil(self.cfg.validation_tokens / (VALIDATION_ROWS * length))
            self.held_out = spread_validation_batches(self.corpus, self.tokenizer, VALIDATION_ROWS, length, count)
        return self.held_out

    def program(self, run: Planned) -> Program:
        fixed = replace(run.train.optimizer, learning_rate=1.0, warmup_steps=1)
        key = (run.model, run.train.batch_size, fixed)
        if key not in self.programs:
            self.programs[key] = Program(run, self.tokenizer, self.mesh, self.cfg.chunk)
        return self.programs[key]

    def train(self, planned: Planned, folder: Path) -> dict[str, Any]:
        """Trains and validates one run, from where it was stopped; returns its result.

        Raises:
            RunError, CheckpointError: the folder is in use or cannot be used.
        """
        import jax.numpy as jnp
        import numpy as np

        from moe_jax.data.text import TrainBatches
        from moe_jax.rng import random_key
        from moe_jax.sharding import own_rows, put_batch
        from moe_jax.training.loop import NonFiniteError, run_phase
        from moe_jax.training.optimizer import learning_rate_schedule
        from moe_jax.training.run import Run

        train, program = planned.train, self.program(planned)
        rows = own_rows(train.batch_size, self.mesh)
        data = TrainBatches(self.corpus, self.tokenizer, train.batch_size, train.sequence_length, planned.seed, rows)
        rates = np.zeros(-(-train.steps // program.chunk) * program.chunk, np.float32)
        schedule: Any = learning_rate_schedule(train.optimizer, train.steps)
        rates[: train.steps] = schedule(jnp.arange(train.steps))

        def body(state: Any, step: int) -> tuple[Any, dict[str, Any]]:
            start = step * program.chunk
            count = min(program.chunk, train.steps - start)
            batches = [put_batch(next(data), self.mesh, train.batch_size) for _ in range(count)]
            batches += batches[-1:] * (program.chunk - count)  # not reached
            return program.steps(state, tuple(batches), rates[start : start + program.chunk], count)

        started = time.monotonic()
        values = {"name": planned.name, "model": to_dict(planned.model), "train": to_dict(train), "seed": planned.seed}
        with Run.open(folder, NAME, values) as run:
            chunks = len(rates) // program.chunk
            try:
                state = program.init(random_key(planned.seed, "weights"))
                state = run_phase(
                    run, self.guard, "train", chunks, state, body, checkpoint=self.cfg.checkpoint, data=data
                )
            except NonFiniteError as error:
                return {"diverged": str(error).partition(";")[0], "seconds": time.monotonic() - started}
            batches = (put_batch(batch, self.mesh) for batch in self.validation())
            found = program.bits_per_byte(state.params, state.rest, batches, between=self.guard.check)
            curve = run.metrics("train")
            if run.writes:
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        result = {**found, "train_loss": curve[-1]["loss_main"], "seconds": time.monotonic() - started}
        result |= {name: curve[-1][name] for name in ("moe/max_violation",) if name in curve[-1]}
        if found["bits_per_byte"] > 8:
            result["diverged"] = f"{found['bits_per_byte']:.2f} bits per byte, more than without a model"
        return result


VALIDATION_ROWS = 32


def experiment(cfg: Config, arguments: Sequence[str], guard: StopGuard, mesh: Mesh) -> None:
    """Trains what is missing of this process's part, by itself or by workers, and reports."""
    import jax

    from moe_jax.analysis.scaling_report import report
    from moe_jax.data.text import TextCorpus
    from moe_jax.data.tokenizer import load_tokenizer
    from moe_jax.training.run import Progress

    runs, writes = plan(cfg.plan, cfg.model, cfg.seeds), jax.process_index() == 0
    tokenizer = load_tokenizer(cfg.tokenizer)
    tokenizer.check_fits(cfg.model.vocab_size)
    corpus = TextCorpus.load(cfg.data.path)
    files = [cfg.folder / "results" / f"{run_key(cfg, run, corpus, tokenizer)}.json" for run in runs]
    part, parts = parse_shard(cfg.shard)
    owner = shard_of(runs, [seconds_of(cfg, run) for run in runs], parts)
    mine = [pair for pair, shard in zip(zip(runs, files, strict=True), owner, strict=True) if shard == part]
    missing = [] if cfg.fit else [(run, file) for run, file in mine if not file.exists()]
    if cfg.workers > 1 and missing:
        run_workers(cfg, arguments, [file for _, file in mine], guard)
        missing = []
    # Runs of one program one after another; within it the seeds of a budget.
    lab = Laboratory(cfg, corpus, tokenizer, mesh, guard)
    for number, (run, file) in enumerate(missing, 1):
        print(f"{number} of {len(missing)}: {run.name}", flush=True)
        result = lab.train(run, cfg.folder / "runs" / file.stem)
        if writes:
            write_result(file, run, result)
        print(
            f"    {result.get('diverged') or format(result['bits_per_byte'], '.4f') + ' bits per byte'},"
            f" {result['seconds']:.1f} s",
            flush=True,
        )
    if cfg.shard or not writes:
        return
    results = [read_result(file) for file in files]
    with Progress("fits", 2 * len(cfg.plan.families)) as progress:
        text = report(
            cfg.folder,
            [(run, result) for run, result in zip(runs, results, strict=True) if result is not None],
            missing=[run.name for run, result in zip(runs, results, strict=True) if result is None],
            reference=cfg.plan.families[0],
            data=corpus.name,
            progress=lambda done, total: progress.update(done),
        )
    print(f"\n{text}\n\nReport, pictures and table: {cfg.folder}")


def run_key(cfg: Config, run: Planned, corpus: TextCorpus, tokenizer: Tokenizer) -> str:
    import hashlib

    vocabulary = hashlib.blake2b(tokenizer.token_bytes_V.tobytes(), digest_size=8).hexdigest()
    text = {"corpus": corpus.fingerprint, "vocabulary": vocabulary, "validation_tokens": cfg.validation_tokens}
    return run.key(text)


def write_result(file: Path, run: Planned, result: dict[str, Any]) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(json.dumps({"run": run.name, **result}, indent=2) + "\n", encoding="utf-8")
    partial.rename(file)


def read_result(file: Path) -> dict[str, Any] | None:
    """
    Raises:
        ConfigError: the file is damaged.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{file} is damaged ({error}): delete it, and the same command trains its run again"
        ) from error


def run_workers(cfg: Config, arguments: Sequence[str], files: Sequence[Path], guard: StopGuard) -> None:
    """Trains this process's part by several processes of one thread each.

    Raises:
        ConfigError: one of them failed; its log is named.
    """
    from moe_jax.training.run import Progress

    part, parts = parse_shard(cfg.shard)
    cfg.folder.mkdir(parents=True, exist_ok=True)
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"
    environment = os.environ | {"XLA_FLAGS": flags, "NPROC": "1", "JAX_PLATFORMS": "cpu"}
    running: dict[Path, subprocess.Popen] = {}
    try:
        for worker in range(cfg.workers):
            shard = f"{part * cfg.workers + worker}/{parts * cfg.workers}"
            log = cfg.folder / f"worker-{shard.replace('/', '-of-')}.log"
            command = [sys.executable, "-m", "experiments.scaling_curves", *arguments]
            command += ["--shard", shard, "--workers", "1"]
            with open(log, "a", encoding="utf-8") as output:
                running[log] = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        with Progress("runs", len(files)) as progress:
            while any(process.poll() is None for process in running.values()):
                guard.check()
                progress.update(sum(file.exists() for file in files))
                time.sleep(0.5)
    finally:
        for process in running.values():
            if process.poll() is None:
                process.terminate()
        for process in running.values():
            process.wait()
    failed = [str(log) for log, process in running.items() if process.returncode]
    if failed:
        raise ConfigError(f"a worker failed, see the end of {', '.join(failed)}; the same command goes on")


def parse(arguments: Sequence[str]) -> Config:
    """The configuration that the command line says; the ladder's name decides the defaults.

    Raises:
        ConfigError: an illegal value.
    """
    import tyro

    words = [word for argument in arguments for word in argument.split("=", 1)]
    given = [value for flag, value in itertools.pairwise([*words, ""]) if flag == "--ladder"]
    name = given[-1] if given else "laptop"
    if name not in LADDERS:
        raise ConfigError(f"--ladder {name}: there are {', '.join(LADDERS)}")
    defaults = LADDERS[name]
    default = Config(ladder=name, plan=defaults.plan, model=defaults.model, **defaults.options)
    return tyro.cli(Config, default=default, args=list(arguments), description=__doc__)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    arguments = [word for flag in arguments for word in (("--ladder", "quick") if flag == "--quick" else (flag,))]
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        cfg = parse(arguments)
        if cfg.dry_run:
            print(plan_table(cfg, plan(cfg.plan, cfg.model, cfg.seeds)))
            return 0
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    import jax

    from moe_jax.data import DataError
    from moe_jax.sharding import make_mesh
    from moe_jax.training.checkpoint import CheckpointError
    from moe_jax.training.distributed import DistributedError, StopAgreement, ending_together, initialize
    from moe_jax.training.run import RunError
    from moe_jax.training.signals import StopGuard, Stopped, farewell

    foreseen = (ConfigError, DataError, RunError, CheckpointError, DistributedError, OSError)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # workers, and the next session, find what is compiled
        jax.config.update("jax_compilation_cache_dir", str(cfg.folder / "compiled"))
    try:
        processes = initialize()
        patience: dict[str, Any] = {"agree": StopAgreement(), "grace_seconds": 60} if processes else {}
        with ending_together(foreseen), StopGuard(**patience) as guard:
            mesh = make_mesh(cfg.mesh)
            with jax.set_mesh(mesh):
                experiment(cfg, arguments, guard, mesh)
    except foreseen as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stop:
        print(farewell(stop.signum, stop.where), file=sys.stderr)
        return stop.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
