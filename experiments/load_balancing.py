"""Balancing the experts' load: nothing, an auxiliary loss, or a bias without a loss (arXiv:2408.15664).

    python -m experiments.load_balancing [--num-seeds 3] [--methods none auxiliary bias uniform hash] [--help]

One tiny sparse model, trained from the same initial weights on the same batches once per method and seed. The methods
differ in the balancing alone: none; the expert-level auxiliary loss (DeepSeek-V2 eq. 23), with the baseline's
coefficient of the paper, 1e-3, and with ten times it; the loss-free bias (DeepSeek-V3 eq. 16), with the paper's rate,
1e-3, and with ten times it, since the paper's runs have many times as many steps to find the bias in. `uniform` and
`hash` are controls without a learned choice. A sweep is the same command: `--methods bias --bias-update-rates 3e-4 3e-3
--seed 100`.

Reported are the validation loss, MaxVio of all validation batches together (MaxVio_global), and the mean MaxVio of the
last quarter of the training batches (MaxVio_batch), both means over the sparse layers; over seeds with Student's 95 %
intervals, and the differences within a seed.

Hardware: 2 CPU cores, 23 minutes beside other work. Result, seeds 0 to 2, 819,200 tokens a run, 532 k parameters:

    method              bits per byte    MaxVio_global    MaxVio_batch
    none                2.698 ± .185     5.51 ± 1.56      5.53 ± 1.97
    auxiliary, α 1e-3   2.680 ± .184     2.39 ±  .46      2.58 ±  .26
    auxiliary, α 1e-2   2.650 ± .169      .45 ±  .15       .65 ±  .07
    bias, γ 1e-3        2.670 ± .163      .41 ±  .30      1.10 ±  .84
    bias, γ 1e-2        2.656 ± .148      .31 ±  .17       .51 ±  .06

The bias (γ 1e-2) has .13 times the MaxVio_global of the baseline's auxiliary loss, at no worse a loss (within a seed
-.024 ± .041 bits per byte), as published; and .68 times that of the auxiliary loss with ten times the coefficient
(+.006 ± .029). Balancing itself pays: against none -.048 ± .023 (auxiliary, α 1e-2) and -.042 ± .038 (bias, γ 1e-2);
three seeds show no difference in the loss between these two. γ = 1e-3 needs all 400 steps to find its bias.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from moe_jax.analysis.tables import markdown
from moe_jax.config import (
    CheckpointConfig,
    ConfigError,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    OptimizerConfig,
    TextConfig,
    TrainConfig,
)
from moe_jax.presets import tiny_moe
from moe_jax.training.experiment import Session, main

if TYPE_CHECKING:
    from pathlib import Path

    from jax.sharding import Mesh

    from moe_jax.data.tokenizer import Tokenizer
    from moe_jax.training.run import Run
    from moe_jax.training.state import Update

Method = Literal["none", "auxiliary", "bias", "uniform", "hash"]


class Variant(NamedTuple):
    """A method with its strength."""

    name: str
    title: str
    method: Method
    strength: int
    """Which of the method's strengths, counted from 0."""
    moe: MoEConfig


def _model() -> ModelConfig:
    """`tiny_moe` with four times as many experts, of half the size, twice as many per token, and no MTP module."""
    tiny = tiny_moe()
    # The scale for the best 4 of 32, computed as for `tiny_moe`.
    moe = replace(tiny.moe, num_experts=32, num_experts_per_token=4, expert_size=32, routed_scaling_factor=2.0)
    return replace(tiny, moe=moe, mtp=MTPConfig(depth=0))


@dataclass(frozen=True)
class Config:
    seed: int = 0
    """The first of the seeds; the others follow it."""
    num_seeds: int = 3
    run_dir: str = ""
    """Where everything goes; empty: runs/load_balancing-seed<seed>. The same command resumes."""
    methods: tuple[Method, ...] = ("none", "auxiliary", "bias")
    auxiliary_coefs: tuple[float, ...] = (1e-3, 1e-2)
    """α of the auxiliary loss; each is a variant."""
    bias_update_rates: tuple[float, ...] = (1e-3, 1e-2)
    """γ of the loss-free bias; each is a variant."""
    init: str = ""
    """A Hugging Face folder or repository, or the folder of another run: a sparse model for all methods and seeds to
    start from, with balancing biases of zero. Its tokenizer comes with it."""
    preset: str = ""
    """A named model (`moe_jax/presets.py`) in place of this file's."""
    tokenizer: str = "byte"
    """"byte", or a path to a tokenizer.json or its folder."""
    model: ModelConfig = _model()
    """What it says of balancing is replaced by each method's, but for `bias_zero_mean`."""
    data: TextConfig = TextConfig()
    train: TrainConfig = TrainConfig(
        steps=400,
        batch_size=8,
        sequence_length=256,
        optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=40, final_fraction=0.1),
    )
    validation_batches: int = 120
    """Batches of the held-out text to validate on, spread evenly over it; 0 takes all."""
    checkpoint: CheckpointConfig = CheckpointConfig(keep=1)
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        if self.num_seeds < 1:
            raise ConfigError(f"Config.num_seeds = {self.num_seeds}: must be at least 1")
        if self.validation_batches < 0:
            raise ConfigError(f"Config.validation_batches = {self.validation_batches}: must be 0 (all) or greater")
        for name in ("methods", "auxiliary_coefs", "bias_update_rates"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"Config.{name} = {values}: must name at least one, and each once")
            if name != "methods" and min(values) <= 0:
                raise ConfigError(f"Config.{name} = {values}: must be greater than 0; without balancing is 'none'")
        if not self.model.moe.num_experts:
            raise ConfigError("Config.model.moe.num_experts = 0: a dense model has no load to balance")
        if self.train.sequence_length > self.model.max_position:
            raise ConfigError(
                f"Config.train.sequence_length = {self.train.sequence_length}: must not exceed model.max_position ="
                f" {self.model.max_position}"
            )
        variants(self)  # what a method does not go with is refused here

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.num_seeds)


def variants(cfg: Config) -> list[Variant]:
    """All methods of the configuration, each with each of its strengths."""
    unbalanced = replace(
        cfg.model.moe,
        routing="learned",
        selection_bias=False,
        bias_zero_mean=False,
        sequence_balance_coef=0.0,
        expert_balance_coef=0.0,
        device_balance_coef=0.0,
        communication_balance_coef=0.0,
        global_balance_coef=0.0,
        z_loss_coef=0.0,
        capacity_factor=0.0,
    )

    def of(method: Method) -> Iterator[Variant]:
        if method == "none":
            yield Variant("none", "no balancing", method, 0, unbalanced)
        elif method == "auxiliary":
            for strength, coef in enumerate(cfg.auxiliary_coefs):
                moe = replace(unbalanced, expert_balance_coef=coef)
                yield Variant(f"auxiliary_{coef:g}", f"auxiliary loss, α = {coef:g}", method, strength, moe)
        elif method == "bias":
            zero_mean = cfg.model.moe.bias_zero_mean
            for strength, rate in enumerate(cfg.bias_update_rates):
                moe = replace(unbalanced, selection_bias=True, bias_update_rate=rate, bias_zero_mean=zero_mean)
                yield Variant(f"bias_{rate:g}", f"loss-free bias, γ = {rate:g}", method, strength, moe)
        else:
            yield Variant(method, f"control: {method} routing", method, 0, replace(unbalanced, routing=method))

    return [variant for method in cfg.methods for variant in of(method)]


CONFIG = Config()

FIGURES = {
    "bits_per_byte": "bits per byte",
    "max_violation_global": "MaxVio_global",
    "max_violation_batch": "MaxVio_batch",
}
"""What is compared, and its title."""


class Laboratory:
    """What the phases share: the text, and each variant's compiled steps."""

    def __init__(self, cfg: Config, session: Session):
        from moe_jax.data.text import TextCorpus, spread_validation_batches
        from moe_jax.training.start import keep_tokenizer

        self.cfg, self.session, self.run = cfg, session, session.run
        self.tokenizer = keep_tokenizer(self.run.dir, cfg.tokenizer)
        self.tokenizer.check_fits(cfg.model.vocab_size)
        self.corpus = TextCorpus.load(cfg.data.path)
        sizes = cfg.train.batch_size, cfg.train.sequence_length
        self.validation = spread_validation_batches(self.corpus, self.tokenizer, *sizes, cfg.validation_batches)
        self.models: dict[MoEConfig, Model] = {}
        self.started: dict[str, Any] | None = None
        self.updates = {variant.name: self._update(variant) for variant in variants(cfg)}

    def model(self, variant: Variant) -> Model:
        """The variant's model, without the strengths that only its training knows."""
        moe = replace(variant.moe, expert_balance_coef=0.0, bias_update_rate=0.0)
        if moe not in self.models:
            cfg = replace(self.cfg.model, moe=moe)
            self.models[moe] = Model(cfg, self.cfg.train, self.tokenizer, self.session.mesh)
        return self.models[moe]

    def _update(self, variant: Variant) -> Update:
        from moe_jax.model.definition import Definition
        from moe_jax.training.state import make_update
        from moe_jax.training.supervised import make_loss, make_totals

        definition = Definition.of(replace(self.cfg.model, moe=variant.moe)).at(self.cfg.train.precision)
        return make_update(
            make_loss(definition, (self.tokenizer.pad_id,)),
            make_totals(definition),
            self.model(variant).optimizer,
            accumulation_steps=self.cfg.train.accumulation_steps,
            balance=variant.moe,
        )

    def result(self, variant: Variant, seed: int) -> dict[str, Any]:
        """Trains and validates a variant, once: a resumed run reads the result."""
        phase = f"{variant.name}-seed{seed}"
        file = f"evaluations/{phase}.json"
        if (known := self.run.result(file)) is not None:
            return known
        params, rest = self.train(variant, seed, phase)
        rows = self.run.metrics(phase)
        last_quarter = rows[-max(len(rows) // 4, 1) :]
        result = {
            **self.validate(variant, phase, params, rest),
            "max_violation_batch": float(np.mean([row["moe/max_violation"] for row in last_quarter])),
            "largest_bias": max((float(np.max(np.abs(bias))) for bias in rest.values()), default=0.0),
            "seconds": sum(row["step_time"] for row in rows),
        }
        self.run.rewind(f"{phase}-validation", 0)  # it was logged already if the run was killed just then
        self.run.log(f"{phase}-validation", len(rows), {name: result[name] for name in FIGURES})
        self.run.write_json(file, result)
        return result

    def train(self, variant: Variant, seed: int, phase: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """The weights and biases after training. Weights and batches depend on the seed alone."""
        import jax
        import jax.numpy as jnp

        from moe_jax.data.text import TrainBatches
        from moe_jax.rng import random_key
        from moe_jax.sharding import own_rows
        from moe_jax.training.supervised import train_supervised

        cfg, train = self.cfg, self.cfg.train
        rows = own_rows(train.batch_size, self.session.mesh)
        data = TrainBatches(self.corpus, self.tokenizer, train.batch_size, train.sequence_length, seed, rows)
        state = self.model(variant).init(random_key(seed, "weights"))
        if cfg.init:
            state = state._replace(params=jax.tree.map(jnp.copy, self.start()))
        update = self.updates[variant.name]
        state = train_supervised(
            self.session, phase, update, state, data, train.steps, cfg.checkpoint, train.batch_size
        )
        return state.params, state.rest

    def start(self) -> dict[str, Any]:
        """The weights of `init`: those that are trained, which all methods share."""
        from moe_jax.model.definition import Definition
        from moe_jax.training.start import start_weights

        if self.started is None:
            definition = Definition.of(self.cfg.model)
            self.started, _ = start_weights(self.run, self.cfg.init, definition, self.session.mesh)
        return self.started

    def validate(self, variant: Variant, phase: str, params: Any, rest: Any) -> dict[str, Any]:
        """Loss, MaxVio and each expert's load over all validation batches."""
        import jax

        from moe_jax.losses.balance import max_violation
        from moe_jax.sharding import put_batch
        from moe_jax.training.run import Progress

        model, guard, mesh = self.model(variant), self.session.guard, self.session.mesh
        counts_LE: Any = 0.0
        with Progress(f"validate {phase}", len(self.validation)) as progress:

            def batches() -> Iterator[dict[str, jax.Array]]:
                nonlocal counts_LE
                for number, batch in enumerate(self.validation, 1):
                    placed = put_batch(batch, mesh)
                    counts_LE += np.array(jax.device_get(model.expert_counts(params, rest, placed)), np.float64)
                    yield placed
                    progress.update(number)

            validation = model.bits_per_byte(params, rest, batches(), between=guard.check)
        return {
            **validation,
            "max_violation_global": float(np.mean(max_violation(counts_LE))),
            "expert_load": (counts_LE / counts_LE.mean(axis=1, keepdims=True)).tolist(),
        }


class Model:
    """Compiled once for all variants that differ in how they are trained alone: the first state, and validation."""

    def __init__(self, cfg: ModelConfig, train: TrainConfig, tokenizer: Tokenizer, mesh: Mesh):
        import jax

        from moe_jax import sharding
        from moe_jax.model.definition import Definition
        from moe_jax.training.optimizer import make_optimizer
        from moe_jax.training.state import init_state
        from moe_jax.training.supervised import BitsPerByte

        definition = Definition.of(cfg)
        self.optimizer = optimizer = make_optimizer(train.optimizer, train.steps, definition)
        self.init = jax.jit(lambda key: init_state(definition, optimizer, key, mesh))
        self.bits_per_byte = BitsPerByte(definition, tokenizer.token_bytes_V, (tokenizer.pad_id,))

        @jax.jit
        def expert_counts(params: Any, rest: Any, batch: dict[str, jax.Array]) -> jax.Array:
            """Assignments to each expert, [L, E]."""
            segments_BS, positions_BS = batch["segment_ids_BS"], batch["positions_BS"]
            model = definition.merge(params, rest)
            router = model(batch["tokens_BS"], segment_ids_BS=segments_BS, positions_BS=positions_BS).router
            assert router is not None
            return sharding.replicate(router.counts_BE.sum(axis=1))

        self.expert_counts = expert_counts


def experiment(cfg: Config, session: Session) -> None:
    lab = Laboratory(cfg, session)
    results: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in variants(cfg)}
    for seed in cfg.seeds:  # a seed's variants one after another: comparable before the last seed has come
        for variant in variants(cfg):
            results[variant.name].append(lab.result(variant, seed))
    if session.run.writes:
        report(cfg, session.run, results)


def report(cfg: Config, run: Run, results: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Writes summary.json, table.md and the plots, and prints the table."""
    from moe_jax.analysis.flops import parameter_counts
    from moe_jax.analysis.seed_statistics import mean_over_seeds

    methods, parameters = variants(cfg), parameter_counts(cfg.model)

    def per_seed(variant: Variant, figure: str) -> np.ndarray:
        return np.array([result[figure] for result in results[variant.name]])

    def compare(variant: Variant, other: Variant) -> dict[str, Any]:
        means = [per_seed(each, "max_violation_global").mean() for each in (variant, other)]
        return {
            name: mean_over_seeds(per_seed(variant, name) - per_seed(other, name)) for name in (*FIGURES, "loss")
        } | {"ratio": means[0] / max(means[1], 1e-9)}

    summary: dict[str, Any] = {"seeds": list(cfg.seeds), "methods": {}}
    references: list[Variant] = []  # no balancing, and the auxiliary loss with each of its coefficients
    for variant in sorted(methods, key=lambda variant: variant.method != "none"):
        summary["methods"][variant.name] = {
            "title": variant.title,
            "figures": {name: mean_over_seeds(per_seed(variant, name)) for name in (*FIGURES, "loss", "largest_bias")},
            "against": {other.name: compare(variant, other) for other in references},
            "per_seed": {name: per_seed(variant, name).tolist() for name in (*FIGURES, "loss", "seconds")},
        }
        if variant.method in ("none", "auxiliary"):
            references.append(variant)
    summary |= {
        "tokens": cfg.train.steps * cfg.train.batch_size * cfg.train.sequence_length,
        "seconds": run.metrics()[-1]["elapsed"],
        "parameters_total": parameters.total + parameters.mtp,
        "parameters_active": parameters.active,
    }
    run.write_json("summary.json", summary)
    text = tables(summary)
    run.path("table.md").write_text(text + "\n", encoding="utf-8")
    plots = plot(run, methods, results, summary)
    moe = cfg.model.moe
    print(
        f"\n{text}\n\nMean and 95 % interval (Student's t) over {cfg.num_seeds} seeds, differences within a seed; below"
        f" 0 is better.\n{PUBLISHED}\n\n{summary['parameters_total']:,} parameters"
        f" ({summary['parameters_active']:,} active), {moe.num_experts_per_token} of {moe.num_experts} experts a token,"
        f" {summary['tokens']:,} tokens a run, {summary['seconds']:.0f} s, seeds {cfg.seeds[0]} to {cfg.seeds[-1]}."
        f"\nRun folder: {run.dir}\nPlots: {', '.join(str(path) for path in plots)}"
    )


PUBLISHED = (
    "Published, 1B parameters (arXiv:2408.15664 table 2): auxiliary loss, α = 0.001: perplexity 9.56, MaxVio_global"
    " 0.72; loss-free bias, γ = 0.001: 9.50, 0.04."
)


def tables(summary: Mapping[str, Any]) -> str:
    """Figures of all variants, and the differences between them, as Markdown."""
    entries = summary["methods"]

    def cells(intervals: Mapping[str, Any], sign: str = "") -> list[str]:
        halves = {name: intervals[name]["high"] - intervals[name]["mean"] for name in FIGURES}
        return [
            f"{intervals[name]['mean']:{sign}.3f}" + (f" ± {half:.3f}" if math.isfinite(half) else "")
            for name, half in halves.items()
        ]

    figures = [["method", *FIGURES.values()]]
    figures += [[entry["title"], *cells(entry["figures"])] for entry in entries.values()]
    differences = [["difference", *FIGURES.values(), "MaxVio_global, ratio"]]
    differences += [
        [f"{entry['title']} − {entries[other]['title']}", *cells(against, "+"), f"{against['ratio']:.2f}"]
        for entry in entries.values()
        for other, against in entry["against"].items()
    ]
    return "\n\n".join(markdown(rows) for rows in (figures, differences) if len(rows) > 1)


def plot(
    run: Run, methods: Sequence[Variant], results: Mapping[str, Sequence[Mapping[str, Any]]], summary: Mapping[str, Any]
) -> list[Path]:
    """MaxVio over the steps, the load of the experts from the busiest on, and the loss against MaxVio."""
    from moe_jax.analysis import plots
    from moe_jax.analysis.plots import Panel, Point, Series

    colors = {
        "none": plots.GREY,
        "auxiliary": plots.ORANGE,
        "bias": plots.BLUE,
        "uniform": plots.GREEN,
        "hash": plots.PURPLE,
    }

    def curve(variant: Variant, start: int, values_ST: np.ndarray) -> Series:
        """The mean over seeds in the band from the lowest to the highest of them."""
        steps = range(start, start + values_ST.shape[1])
        low, high, style = values_ST.min(axis=0), values_ST.max(axis=0), ("-", "--", ":", "-.")[variant.strength % 4]
        return Series(
            variant.title,
            steps,
            values_ST.mean(axis=0).tolist(),
            colors[variant.method],
            style,
            low.tolist(),
            high.tolist(),
        )

    def over_steps(variant: Variant) -> np.ndarray:
        phases = [f"{variant.name}-seed{seed}" for seed in summary["seeds"]]
        return np.array([[row["moe/max_violation"] for row in run.metrics(phase)] for phase in phases])

    def sorted_loads(variant: Variant) -> np.ndarray:
        loads_SLE = np.array([result["expert_load"] for result in results[variant.name]])
        return -np.sort(-loads_SLE, axis=2).mean(axis=1)

    def point(variant: Variant) -> Point:
        entry = summary["methods"][variant.name]
        figures, singles = entry["figures"], entry["per_seed"]
        return Point(
            variant.title,
            figures["max_violation_global"],
            figures["bits_per_byte"],
            singles["max_violation_global"],
            singles["bits_per_byte"],
            colors[variant.method],
            ("o", "s", "^", "D")[variant.strength % 4],
        )

    files = [run.path("plots", f"{name}.png") for name in ("max_violation", "expert_load", "loss_and_max_violation")]
    curves = [curve(variant, 1, over_steps(variant)) for variant in methods]
    plots.plot_curves(
        files[0],
        "Largest load of an expert in each training batch",
        [Panel("MaxVio_batch\n(mean of layers, 0 is balanced)", curves, from_zero=True)],
    )
    loads = [curve(variant, 1, sorted_loads(variant)) for variant in methods]
    plots.plot_curves(
        files[1],
        "Load of the experts on the validation text",
        [Panel("load\n(mean of layers, 1 is an even share)", loads, from_zero=True, joined=True)],
        xlabel="expert, from the busiest on",
    )
    plots.plot_points(
        files[2],
        "Quality and balance: means, 95 % intervals, single seeds",
        [point(variant) for variant in methods],
        "MaxVio_global (0 is balanced)",
        "validation loss (bits per byte)",
    )
    return files


if __name__ == "__main__":
    main("load_balancing", CONFIG, experiment)
