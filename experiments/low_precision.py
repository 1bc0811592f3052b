"""Eight bits against thirty-two: does the loss notice? And four bits after training, rounded or trained for.

    python -m experiments.low_precision [--num-seeds 3] [--arms fp32 control fp8 ...] [--help]

One tiny sparse model, trained from the same initial weights on the same batches in several arithmetics:

- `fp32`: everything in float32, the reference; `bf16`: products in bfloat16;
- `fp8`, `int8`: the three products of every matrix of a block, forward and backward, of 8-bit operands, in V3's
  recipe (arXiv:2412.19437 §3.3: scales per 1 × 128 and 128 × 128), the rest in float32;
- `bf16_moments`: float32 with the optimizer's moments in bfloat16;
- `v3`: all that V3 does: fp8 products, bfloat16 for the rest, bfloat16 moments; stored weights are float32;
- `control`: float32 from weights a millionth larger. Training is chaotic: two runs drift apart from any difference, and
  no gap that is not larger than this one's says anything of precision.

Reported is the gap to `fp32` within a seed, relative to its loss, in training (mean of the last quarter of the steps)
and on held-out text, with Student's 95 % intervals, beside the 0.25 % that V3's report gives for its fp8 training.
Evaluation is in each arm's own arithmetic.

Then the weights of `fp32` are used in fewer bits without more training (`--bits`); and 4-bit weights are trained for:
`--int4-steps` more steps with rounded weights (straight-through gradients), against as many without rounding until
their end. Exact emulation of the rounding on CPUs; nothing here says how fast 8 bits are.

Hardware: 2 CPU cores, 96 minutes beside a dozen other processes; the third seed, beside fewer, took 6. Result, seeds 0
to 2, 480,792 parameters, 327,680 tokens a run:

    training in                 gap, training loss     gap, held-out loss    bits per byte
    float32                                                                  3.336 ± .071
    control                     +.08 ±  .88 %          +.15 ± 1.14 %         3.341 ± .039
    bfloat16                    -.10 ±  .63 %          -.04 ±  .60 %         3.335 ± .058
    fp8 products                -.26 ± 1.29 %          +.09 ± 1.11 %         3.339 ± .089
    int8 products               -.35 ±  .31 %          -.25 ±  .37 %         3.328 ± .072
    float32, bfloat16 moments   +.12 ± 1.37 %          +.20 ± 1.19 %         3.343 ± .035
    V3: all of it               -.40 ± 1.60 %          -.17 ± 1.19 %         3.330 ± .105

No gap can be told from the control's: at this size three seeds resolve about 1 %, not V3's .25 %. (That int8 trained a
little better is one of twelve comparisons.) After training, bits per byte change by +.0001 ± .0022 in fp8, +.0002 ±
.0004 in int8 and +.0028 ± .0015 in int4. Of the .0040 ± .0064 that rounding to int4 costs after 60 more steps, training
for it recovers .0024, 55 ± 67 %: a direction, no more; a model of half a million weights has little to lose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moe_jax.analysis.tables import markdown
from moe_jax.config import (
    CheckpointConfig,
    ConfigError,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TextConfig,
    TrainConfig,
)
from moe_jax.presets import tiny_moe
from moe_jax.training.experiment import Session, main

if TYPE_CHECKING:
    from pathlib import Path

    from moe_jax.model.definition import Arrays, Definition
    from moe_jax.training.run import Run
    from moe_jax.training.state import TrainState
    from moe_jax.training.supervised import SupervisedTrainer

Arm = Literal["fp32", "control", "bf16", "fp8", "int8", "bf16_moments", "v3"]
Bits = Literal["fp8", "int8", "int4"]

TITLES: dict[str, str] = {
    "fp32": "float32",
    "control": "control: float32, weights · (1 + 1e-6)",
    "bf16": "bfloat16",
    "fp8": "fp8 products",
    "int8": "int8 products",
    "bf16_moments": "float32, bfloat16 moments",
    "v3": "V3: fp8, bfloat16, bfloat16 moments",
}
PUBLISHED = 0.0025
"""V3's report: the relative error of the loss stays below this, for 16 and 230 B parameters, against bfloat16."""


@dataclass(frozen=True)
class Config:
    seed: int = 0
    """The first of the seeds; the others follow it."""
    num_seeds: int = 3
    run_dir: str = ""
    """Where everything goes; empty: runs/low_precision-seed<seed>. The same command resumes."""
    arms: tuple[Arm, ...] = ("fp32", "control", "bf16", "fp8", "int8", "bf16_moments", "v3")
    bits: tuple[Bits, ...] = ("fp8", "int8", "int4")
    """In what `fp32`'s weights are tried after training; fp8 and int8 round activations too, int4 weights alone."""
    int4_steps: int = 60
    """Steps of fine-tuning for 4-bit weights, and of its control; 0: none."""
    int4_learning_rate: float = 1e-3
    """Peak of both."""
    init: str = ""
    """A Hugging Face folder or repository, or the folder of another run, for all arms and seeds to start from. Its
    tokenizer comes with it."""
    preset: str = ""
    """A named model (`moe_jax/presets.py`) in place of `tiny_moe`."""
    tokenizer: str = "byte"
    """"byte", or a path to a tokenizer.json or its folder."""
    model: ModelConfig = tiny_moe()
    """Its dtype, quantization and the optimizer's moment_dtype are each arm's."""
    data: TextConfig = TextConfig()
    train: TrainConfig = TrainConfig(
        steps=160,
        batch_size=8,
        sequence_length=256,
        optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=16, final_fraction=0.1),
    )
    """Its precision is each arm's."""
    validation_batches: int = 60
    """Batches of the held-out text to validate on, spread evenly over it; 0 takes all."""
    checkpoint: CheckpointConfig = CheckpointConfig(keep=1)
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        if self.num_seeds < 1:
            raise ConfigError(f"Config.num_seeds = {self.num_seeds}: must be at least 1")
        for name in ("validation_batches", "int4_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(f"Config.{name} = {getattr(self, name)}: must be 0 or greater")
        if self.int4_learning_rate <= 0:
            raise ConfigError(f"Config.int4_learning_rate = {self.int4_learning_rate}: must be greater than 0")
        if "fp32" not in self.arms or len(set(self.arms)) < len(self.arms):
            raise ConfigError(f"Config.arms = {self.arms}: must name each once, and fp32, which all are compared with")
        if len(set(self.bits)) < len(self.bits):
            raise ConfigError(f"Config.bits = {self.bits}: must name each once")
        if self.train.precision != "model" or self.model.quantization != "none":
            raise ConfigError("Config.train.precision and Config.model.quantization are each arm's: choose --arms")
        if self.train.sequence_length > self.model.max_position:
            raise ConfigError(
                f"Config.train.sequence_length = {self.train.sequence_length}: must not exceed model.max_position ="
                f" {self.model.max_position}"
            )

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.num_seeds)


CONFIG = Config()


def arithmetic(model: ModelConfig, arm: str) -> ModelConfig:
    """The model as an arm trains and evaluates it."""
    dtype = "bfloat16" if arm in ("bf16", "v3") else "float32"
    quantization = {"fp8": "fp8", "v3": "fp8", "int8": "int8"}.get(arm, "none")
    return replace(model, dtype=dtype, quantization=quantization)


def optimizer_of(train: TrainConfig, arm: str) -> OptimizerConfig:
    moments = "bfloat16" if arm in ("bf16_moments", "v3") else "float32"
    return replace(train.optimizer, moment_dtype=moments)


class Laboratory:
    """What the phases share: the text, the models, and each arm's compiled step."""

    def __init__(self, cfg: Config, session: Session):
        from moe_jax.data.text import TextCorpus, spread_validation_batches
        from moe_jax.training.start import keep_tokenizer

        self.cfg, self.session, self.run = cfg, session, session.run
        self.tokenizer = keep_tokenizer(self.run.dir, cfg.tokenizer)
        self.tokenizer.check_fits(cfg.model.vocab_size)
        self.corpus = TextCorpus.load(cfg.data.path)
        sizes = cfg.train.batch_size, cfg.train.sequence_length
        self.validation = spread_validation_batches(self.corpus, self.tokenizer, *sizes, cfg.validation_batches)
        self.definitions: dict[ModelConfig, Definition] = {}
        self.evaluators: dict[ModelConfig, Any] = {}
        self.trainers: dict[tuple[ModelConfig, OptimizerConfig, int], SupervisedTrainer] = {}
        self.started: tuple[Arrays, Arrays] | None = None

    def definition(self, model: ModelConfig) -> Definition:
        from moe_jax.model.definition import Definition

        return self.definitions.setdefault(model, Definition.of(model))

    def trainer(self, model: ModelConfig, optimizer: OptimizerConfig, steps: int) -> SupervisedTrainer:
        """Compiled once for all seeds."""
        from moe_jax.training.supervised import SupervisedTrainer

        key = model, optimizer, steps
        if key not in self.trainers:
            train = replace(self.cfg.train, optimizer=optimizer, steps=steps)
            self.trainers[key] = SupervisedTrainer(self.definition(model), train, (self.tokenizer.pad_id,))
        return self.trainers[key]

    def first_weights(self, seed: int) -> tuple[Arrays, Arrays]:
        from moe_jax.rng import random_key
        from moe_jax.training.start import start_weights

        definition, mesh = self.definition(arithmetic(self.cfg.model, "fp32")), self.session.mesh
        if not self.cfg.init:
            return definition.init(random_key(seed, "weights"), mesh)
        if self.started is None:
            self.started = start_weights(self.run, self.cfg.init, definition, mesh)
        return self.started

    def train(self, arm: str, seed: int) -> TrainState:
        """An arm's state at the end. First weights and batches depend on the seed alone."""
        import jax

        model = arithmetic(self.cfg.model, arm)
        params, rest = self.first_weights(seed)
        if arm == "control":
            params = jax.jit(lambda params: jax.tree.map(lambda x: x * (1 + 1e-6), params))(params)
        trainer = self.trainer(model, optimizer_of(self.cfg.train, arm), self.cfg.train.steps)
        return self.phase(f"{arm}-seed{seed}", trainer, params, rest, seed)

    def phase(self, phase: str, trainer: SupervisedTrainer, params: Arrays, rest: Arrays, seed: int) -> TrainState:
        from moe_jax.data.text import TrainBatches
        from moe_jax.sharding import own_rows

        train = self.cfg.train
        rows = own_rows(train.batch_size, self.session.mesh)
        data = TrainBatches(self.corpus, self.tokenizer, train.batch_size, train.sequence_length, seed, rows)
        return trainer.fine_tune(self.session, phase, params, rest, data, self.cfg.checkpoint, train.batch_size)

    def validate(self, model: ModelConfig, state: TrainState) -> dict[str, float]:
        """Loss and bits per byte of held-out text in a model's arithmetic."""
        from moe_jax.sharding import put_batch
        from moe_jax.training.run import Progress
        from moe_jax.training.supervised import BitsPerByte

        if model not in self.evaluators:
            banned = (self.tokenizer.pad_id,)
            self.evaluators[model] = BitsPerByte(self.definition(model), self.tokenizer.token_bytes_V, banned)
        with Progress(f"validate in {model.quantization}, {model.dtype}", len(self.validation)) as progress:

            def batches() -> Any:
                for number, batch in enumerate(self.validation, 1):
                    yield put_batch(batch, self.session.mesh)
                    progress.update(number)

            return self.evaluators[model](state.params, state.rest, batches(), between=self.session.guard.check)

    def arm(self, arm: str, seed: int) -> dict[str, Any]:
        """An arm's figures, once: a resumed run reads them."""
        phase = f"{arm}-seed{seed}"
        if (known := self.run.result(f"evaluations/{phase}.json")) is not None:
            return known
        validation = self.validate(arithmetic(self.cfg.model, arm), self.train(arm, seed))
        rows = self.run.metrics(phase)
        last_quarter = rows[-max(len(rows) // 4, 1) :]
        result = validation | {
            "training_loss": float(np.mean([row["loss_main"] for row in last_quarter])),
            "seconds": sum(row["step_time"] for row in rows),
        }
        self.run.write_json(f"evaluations/{phase}.json", result)
        return result

    def fewer_bits(self, seed: int) -> dict[str, dict[str, float]]:
        """Held-out figures of the `fp32` weights in fewer bits, and of 4-bit weights after fine-tuning."""
        file = f"evaluations/bits-seed{seed}.json"
        if (known := self.run.result(file)) is not None:
            return known
        plain = arithmetic(self.cfg.model, "fp32")
        state = self.train("fp32", seed)
        found = {bits: self.validate(replace(plain, quantization=bits), state) for bits in self.cfg.bits}
        if self.cfg.int4_steps:
            rounded = replace(plain, quantization="int4")
            for name, model in (("unaware", plain), ("aware", rounded)):
                tuned = self.fine_tune(f"int4-{name}-seed{seed}", model, state, seed)
                found[f"{name} float32"] = self.validate(plain, tuned)
                found[f"{name} int4"] = self.validate(rounded, tuned)
        self.run.write_json(file, found)
        return found

    def fine_tune(self, phase: str, model: ModelConfig, state: TrainState, seed: int) -> TrainState:
        cfg = self.cfg
        optimizer = replace(cfg.train.optimizer, learning_rate=cfg.int4_learning_rate, warmup_steps=5)
        trainer = self.trainer(model, optimizer, cfg.int4_steps)
        # Other batches than those that the weights were trained on.
        return self.phase(phase, trainer, state.params, state.rest, seed + 1_000_000)


def experiment(cfg: Config, session: Session) -> None:
    lab = Laboratory(cfg, session)
    arms: dict[str, list[dict[str, Any]]] = {arm: [] for arm in cfg.arms}
    bits: list[dict[str, dict[str, float]]] = []
    for seed in cfg.seeds:  # a seed's arms one after another: comparable before the last seed has come
        for arm in cfg.arms:
            arms[arm].append(lab.arm(arm, seed))
        bits.append(lab.fewer_bits(seed))
    if session.run.writes:
        report(cfg, session.run, arms, bits)


def report(
    cfg: Config,
    run: Run,
    arms: Mapping[str, Sequence[Mapping[str, Any]]],
    bits: Sequence[Mapping[str, Mapping[str, float]]],
) -> None:
    """Writes summary.json, table.md and the plots, and prints the tables."""
    from moe_jax.analysis.flops import parameter_counts
    from moe_jax.analysis.seed_statistics import mean_over_seeds

    parameters = parameter_counts(cfg.model)

    def per_seed(arm: str, figure: str) -> np.ndarray:
        return np.array([result[figure] for result in arms[arm]])

    def gap(arm: str, figure: str) -> Any:
        return mean_over_seeds(per_seed(arm, figure) / per_seed("fp32", figure) - 1)

    figures = ("training_loss", "loss", "bits_per_byte", "seconds")
    summary: dict[str, Any] = {
        "seeds": list(cfg.seeds),
        "published_gap": PUBLISHED,
        "arms": {
            arm: {
                "figures": {name: mean_over_seeds(per_seed(arm, name)) for name in figures},
                "gap": {name: gap(arm, name) for name in ("training_loss", "loss")},
                "per_seed": {name: per_seed(arm, name).tolist() for name in figures},
            }
            for arm in cfg.arms
        },
        "bits": bits_summary(per_seed("fp32", "bits_per_byte"), bits),
        "tokens": cfg.train.steps * cfg.train.batch_size * cfg.train.sequence_length,
        "parameters_total": parameters.total + parameters.mtp,
        "parameters_active": parameters.active,
        "seconds": run.metrics()[-1]["elapsed"],
    }
    run.write_json("summary.json", summary)
    text = tables(summary)
    run.path("table.md").write_text(text + "\n", encoding="utf-8")
    file = plot(run, cfg)
    print(
        f"\n{text}\n\nMeans and 95 % intervals (Student's t) over {cfg.num_seeds} seeds, gaps within a seed."
        f" DeepSeek-V3's report: below {PUBLISHED:.2%} of fp8 against bfloat16, at 16 and 230 B parameters.\n"
        f"{summary['parameters_total']:,} parameters ({summary['parameters_active']:,} active), {summary['tokens']:,}"
        f" tokens a run, {summary['seconds']:.0f} s, seeds {cfg.seeds[0]} to {cfg.seeds[-1]}."
        f"\nRun folder: {run.dir}\nPlot: {file}"
    )


def bits_summary(trained: np.ndarray, bits: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Bits per byte in fewer bits, the change against float32 of the same steps, and what fine-tuning recovers."""
    from moe_jax.analysis.seed_statistics import mean_over_seeds

    values = {name: np.array([found[name]["bits_per_byte"] for found in bits]) for name in bits[0]}
    longer = values.get("unaware float32", trained)
    entries = {}
    for name, value in values.items():
        baseline = longer if name.startswith(("aware", "unaware")) else trained
        entries[name] = {"bits_per_byte": mean_over_seeds(value), "change": mean_over_seeds(value - baseline)}
    summary: dict[str, Any] = {"entries": entries}
    if "aware int4" in values:
        lost = values["unaware int4"] - longer
        summary["recovered"] = mean_over_seeds((values["unaware int4"] - values["aware int4"]) / lost)
    return summary


BITS_TITLES = {
    "fp8": "fp8, weights and activations",
    "int8": "int8, weights and activations",
    "int4": "int4, weights",
    "unaware float32": "float32, trained on",
    "unaware int4": "int4 of the same",
    "aware float32": "trained on for int4, unrounded",
    "aware int4": "trained on for int4, int4",
}


def tables(summary: Mapping[str, Any]) -> str:
    """Arms with their gaps, and the figures in fewer bits, as Markdown."""

    def cell(interval: Mapping[str, float], form: str) -> str:
        half = interval["high"] - interval["mean"]
        return f"{interval['mean']:{form}}" + (f" ± {half:{form.lstrip('+')}}" if math.isfinite(half) else "")

    rows = [["training in", "training loss", "gap", "bits per byte, held out", "gap of the held-out loss"]]
    for arm, entry in summary["arms"].items():
        figures, gaps = entry["figures"], entry["gap"]
        shown = [cell(gaps[name], "+.2%") if arm != "fp32" else "" for name in ("training_loss", "loss")]
        rows.append(
            [
                TITLES[arm],
                cell(figures["training_loss"], ".4f"),
                shown[0],
                cell(figures["bits_per_byte"], ".4f"),
                shown[1],
            ]
        )
    parts = [markdown(rows)]
    if entries := summary["bits"]["entries"]:
        rows = [["weights of float32 in", "bits per byte, held out", "change"]]
        for name, entry in entries.items():
            change = "" if name == "unaware float32" else cell(entry["change"], "+.4f")
            rows.append([BITS_TITLES[name], cell(entry["bits_per_byte"], ".4f"), change])
        parts.append(markdown(rows))
    if (recovered := summary["bits"].get("recovered")) is not None:
        parts.append(f"Training for 4 bits recovers {cell(recovered, '.0%')} of what rounding loses.")
    return "\n\n".join(parts)


def plot(run: Run, cfg: Config) -> Path:
    """The arms' training loss, and their gaps to `fp32`."""
    from moe_jax.analysis import plots
    from moe_jax.analysis.plots import Panel, Series

    looks = {
        "fp32": (plots.GREY, "-"),
        "control": (plots.GREY, ":"),
        "bf16": (plots.SKY, "-"),
        "fp8": (plots.BLUE, "-"),
        "int8": (plots.ORANGE, "-"),
        "bf16_moments": (plots.GREEN, "-"),
        "v3": (plots.PURPLE, "-"),
    }

    def losses(arm: str) -> np.ndarray:
        """[seeds, steps], smoothed over a tenth of the steps."""
        raw = np.array([[row["loss_main"] for row in run.metrics(f"{arm}-seed{seed}")] for seed in cfg.seeds])
        width = max(raw.shape[1] // 10, 1)
        return np.array([np.convolve(row, np.ones(width) / width, mode="valid") for row in raw])

    reference = losses("fp32")
    steps = range(cfg.train.steps - reference.shape[1] + 1, cfg.train.steps + 1)

    def curve(arm: str, values_ST: np.ndarray, band: bool) -> Series:
        edges = (values_ST.min(axis=0).tolist(), values_ST.max(axis=0).tolist()) if band else ((), ())
        return Series(TITLES[arm], steps, values_ST.mean(axis=0).tolist(), *looks[arm], *edges)

    gaps = [arm for arm in cfg.arms if arm != "fp32"]
    percent = {arm: 100 * (losses(arm) / reference - 1) for arm in gaps}
    file = run.path("plots", "loss.png")
    plots.plot_curves(
        file,
        "Training in fewer bits: mean of seeds, smoothed over a tenth of the steps",
        [
            Panel("training loss (nats per token)", [curve(arm, losses(arm), False) for arm in cfg.arms], joined=True),
            Panel(
                "gap to float32 (%),\nband: lowest to highest seed",
                [curve(arm, percent[arm], arm in ("control", "v3")) for arm in gaps],
                joined=True,
            ),
        ],
    )
    return file


if __name__ == "__main__":
    main("low_precision", CONFIG, experiment)
