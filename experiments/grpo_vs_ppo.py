"""GRPO against PPO: what the critic costs, and what it gives, from the same base with the same number of samples.

    python -m experiments.grpo_vs_ppo [--num-seeds 3] [--methods grpo ppo ppo_shared] [--help]
    python -m experiments.grpo_vs_ppo --init Qwen2.5-0.5B --data.source gsm8k --data.path DIR --num-seeds 1

For each seed one base, as in grpo_math, and from it each method on the same problems with the same rewards. GRPO
compares a sample with its group; PPO asks a critic, a second model that starts as a copy of the policy (`ppo_shared`: a
head on the policy's trunk), with λ = 1 and 0.95, which DeepSeek-R1's appendix finds far worse for long answers. All
else is equal but where the KL stands: k3 in GRPO's loss, k1 in PPO's rewards, the same weight. The critic's rate was
chosen on another seed: `--seed 100 --num-seeds 1 --methods ppo --critic-learning-rates 3e-4 1e-3 3e-3`.

Hardware: 2 CPU cores, 24 GB. Time: 33 minutes beside other work. Result, seeds 0 to 2, 10,240 samples a run:

    method               pass@1          pass@1 − GRPO    reward, last quarter   step     numbers held
    base                 .354 ± .032
    GRPO                 .828 ± .050                      .916 ± .064            1        2.40 M
    PPO, λ = 1           .822 ± .068     -.007 ± .019     .917 ± .064            1.69     3.39 M
    PPO, λ = 0.95        .795 ± .058     -.033 ± .021     .891 ± .067            1.49     3.39 M
    PPO, shared trunk    .808 ± .044     -.020 ± .021     .897 ± .033             .97     2.40 M

With λ = 1 PPO learns as much as GRPO from as many samples, with λ = 0.95 less: the order that DeepSeek-R1's appendix
reports. The critic explains a tenth of the variance of the returns (.37 at the end with λ = 0.95, whose returns lean on
it) and does not pay for itself: its steps take 1.69 ± .53 times as long within a seed (GRPO: 1.3 to 2.0 s, beside
other work), and weights, moments, reference and start are 1.41 times the numbers. A value head on the trunk
costs nothing and explained nothing. On seed 100 the critic's rates give .850, .842 and .847.

Peak memory: the allocator of a CPU does not say. The compiler plans 638 MB for GRPO and 642 MB for PPO: 628 MB are the
activations of 256 rows in one micro-batch, beside which a model of 481 k weights is nothing, and the critic's update
comes after the policy's. `analysis.rl_cost` computes less than half of that, 296 and 301 MB. What grows with the model
is the state, 11.5 and 16.8 MB with a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from experiments import grpo_math
from moe_jax.analysis.tables import markdown
from moe_jax.config import (
    CheckpointConfig,
    ConfigError,
    EvaluationConfig,
    MeshConfig,
    ModelConfig,
    ProblemConfig,
    RLConfig,
    TrainConfig,
)
from moe_jax.rl.objectives import with_objective
from moe_jax.training.experiment import Session, main

if TYPE_CHECKING:
    from pathlib import Path

    from moe_jax.training.run import Run
    from moe_jax.training.state import TrainState

Method = Literal["grpo", "ppo", "ppo_shared"]


class Variant(NamedTuple):
    """A method with its settings."""

    name: str
    title: str
    method: Method
    rl: RLConfig


@dataclass(frozen=True)
class Config:
    seed: int = 0
    """The first of the seeds; the others follow it."""
    num_seeds: int = 3
    run_dir: str = ""
    """Where everything goes; empty: runs/grpo_vs_ppo-seed<seed>. The same command resumes."""
    methods: tuple[Method, ...] = ("grpo", "ppo", "ppo_shared")
    lambdas: tuple[float, ...] = (1.0, 0.95)
    """PPO with a separate critic: λ of the advantage estimation; each is a variant. A shared trunk: rl.critic.lam."""
    critic_learning_rates: tuple[float, ...] = (3e-3,)
    """PPO with a separate critic: each is a variant."""
    init: str = ""
    """A Hugging Face folder or repository, or the folder of another run: the base of all methods and seeds."""
    prompt: str = grpo_math.CONFIG.prompt
    """As in grpo_math."""
    preset: str = grpo_math.CONFIG.preset
    """A named model (`moe_jax/presets.py`), which the flags --model.… then change."""
    tokenizer: str = "byte"
    """"byte", or a path to a tokenizer.json or its folder."""
    prompt_length: int = grpo_math.CONFIG.prompt_length
    """Tokens of room for a prompt. Problems with longer ones are skipped."""
    model: ModelConfig = grpo_math.CONFIG.model
    data: ProblemConfig = grpo_math.CONFIG.data
    pretrain: TrainConfig = grpo_math.CONFIG.pretrain
    rl: RLConfig = grpo_math.CONFIG.rl
    """GRPO's; PPO's is `objectives.ppo` of it."""
    evaluation: EvaluationConfig = grpo_math.CONFIG.evaluation
    checkpoint: CheckpointConfig = replace(grpo_math.CONFIG.checkpoint, keep=1)
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        if self.num_seeds < 1:
            raise ConfigError(f"Config.num_seeds = {self.num_seeds}: must be at least 1")
        for name in ("methods", "lambdas", "critic_learning_rates"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"Config.{name} = {values}: must name at least one, and each once")
        if self.rl.loss.baseline == "critic":
            raise ConfigError("Config.rl.loss.baseline = 'critic': is PPO's; rl.loss is GRPO's, use 'group'")
        if self.data.curriculum_threshold:
            raise ConfigError(
                f"Config.data.curriculum_threshold = {self.data.curriculum_threshold}: must be 0, methods are compared"
                " on the same problems"
            )
        self.of_grpo_math(self.seed)  # what its phases cannot do is refused here
        variants(self)

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.num_seeds)

    def of_grpo_math(self, seed: int) -> grpo_math.Config:
        """A seed's base and problems."""
        names = {field.name for field in fields(grpo_math.Config)} & {field.name for field in fields(self)}
        return grpo_math.Config(**{name: getattr(self, name) for name in names} | {"seed": seed, "controls": False})


def variants(cfg: Config) -> list[Variant]:
    """All methods of the configuration, PPO with each λ and each rate of the critic."""
    ppo = with_objective(cfg.rl, "ppo")

    def of(method: Method) -> Iterator[Variant]:
        if method == "grpo":
            yield Variant("grpo", "GRPO", method, cfg.rl)
        elif method == "ppo_shared":
            yield Variant("ppo_shared", "PPO, shared trunk", method, with_critic(kind="shared"))
        else:
            several = len(cfg.critic_learning_rates) > 1
            for lam in cfg.lambdas:
                for rate in cfg.critic_learning_rates:
                    optimizer = replace(ppo.critic.optimizer, learning_rate=rate)
                    name = f"ppo_{lam:g}" + (f"_{rate:g}" if several else "")
                    title = f"PPO, λ = {lam:g}" + (f", critic's rate {rate:g}" if several else "")
                    yield Variant(name, title, method, with_critic(kind="separate", lam=lam, optimizer=optimizer))

    def with_critic(**changes: Any) -> RLConfig:
        return replace(ppo, critic=replace(ppo.critic, **changes))

    return [variant for method in cfg.methods for variant in of(method)]


def config_for(grpo: grpo_math.Config) -> Config:
    """The defaults for problems of another source, or from a checkpoint."""
    shared = {field.name for field in fields(grpo_math.Config)} & {field.name for field in fields(Config)}
    return Config(**{name: getattr(grpo, name) for name in shared if name != "checkpoint"})


CONFIG = Config()
CONFIGS = {source: config_for(grpo) for source, grpo in grpo_math.CONFIGS.items()}
"""Defaults by `--data.source`."""


def from_checkpoint(cfg: Config) -> Config:
    """Defaults with --init: grpo_math's, and verl's rate for the critic."""
    grpo = grpo_math.from_checkpoint(cfg.of_grpo_math(cfg.seed))
    return replace(config_for(grpo), critic_learning_rates=(1e-5,))


class Laboratory:
    """Each seed's problems, and what all seeds share: the compiled steps."""

    def __init__(self, cfg: Config, session: Session):
        from moe_jax.rl.train import PolicyTrainer

        self.cfg, self.session, self.run = cfg, session, session.run
        self.of_seed = {seed: grpo_math.Laboratory(cfg.of_grpo_math(seed), session) for seed in cfg.seeds}
        self.shared = shared = self.of_seed[cfg.seed]
        self.trainers = {
            variant.name: PolicyTrainer(shared.definition, variant.rl, shared.tokenizer, cfg.prompt_length)
            for variant in variants(cfg)
        }

    def base(self, seed: int) -> TrainState:
        """The model that a seed's methods start from."""
        from moe_jax.rng import random_key

        cfg, shared = self.cfg, self.shared
        if cfg.init:
            return shared.start()
        key, data = random_key(seed, "weights"), self.of_seed[seed].texts["base"]
        return shared.pretrainer.from_scratch(self.session, f"base-seed{seed}", key, data, cfg.checkpoint)

    def result(self, variant: Variant, seed: int, base: TrainState) -> dict[str, Any]:
        """Trains a policy and evaluates it, once: a resumed run reads the result."""
        phase = f"{variant.name}-seed{seed}"
        file = f"evaluations/{phase}.json"
        if (known := self.run.result(file)) is not None:
            return known
        environment = self.of_seed[seed].environments["grpo"]
        state = self.trainers[variant.name].train(
            self.session, phase, environment, base.params, base.rest, seed=seed, checkpoint=self.cfg.checkpoint
        )
        return self.held_out(phase, seed, state)

    def held_out(self, name: str, seed: int, state: TrainState) -> dict[str, Any]:
        """Accuracy on the seed's held-out problems, once."""
        from moe_jax.rl.evaluation import held_out

        lab = self.of_seed[seed]
        policy = {name: state.params[name] for name in lab.definition.param_names}  # less the head of a shared critic
        return held_out(
            self.session,
            name,
            lambda: state._replace(params=policy),
            self.shared.sample,
            lab.source,
            lab.problems,
            lab.tokenizer,
            self.cfg.evaluation,
            prompt_length=self.cfg.prompt_length,
            seed=seed,
        )

    def memory(self, variant: Variant, base: TrainState) -> dict[str, Any]:
        """What a variant holds and needs, from one step that is thrown away; measured once."""
        from moe_jax.rl.memory import measure_memory

        file = f"memory/{variant.name}.json"
        if (known := self.run.result(file)) is not None:
            return known
        environment, seed = self.shared.environments["grpo"], self.cfg.seed
        found = measure_memory(self.trainers[variant.name], environment, base, seed, self.session.mesh)
        self.run.write_json(file, found)
        return found


def experiment(cfg: Config, session: Session) -> None:
    lab = Laboratory(cfg, session)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in ("base", *(v.name for v in variants(cfg)))}
    memory: dict[str, dict[str, Any]] = {}
    for seed in cfg.seeds:  # a seed's methods one after another: comparable before the last seed has come
        base = lab.base(seed)
        results["base"].append(lab.held_out(f"base-seed{seed}", seed, base))
        for variant in variants(cfg):
            if variant.name not in memory:
                memory[variant.name] = lab.memory(variant, base)
            results[variant.name].append(lab.result(variant, seed, base))
    if session.run.writes:
        report(cfg, session.run, results, memory)


def report(
    cfg: Config, run: Run, results: Mapping[str, Sequence[Mapping[str, Any]]], memory: Mapping[str, Mapping[str, Any]]
) -> None:
    """Writes summary.json, table.md and the plots, and prints the tables."""
    from moe_jax.analysis.rl_cost import policy_step_cost
    from moe_jax.analysis.seed_statistics import mean_over_seeds

    methods, consensus = variants(cfg), f"cons_at_{cfg.evaluation.samples}"

    def per_seed(name: str) -> dict[str, np.ndarray]:
        """The figures of a method, one value for each seed."""
        found = results[name]
        figures = {
            "pass_at_1": [result["pass_at_1"]["mean"] for result in found],
            "consensus": [result[consensus]["mean"] for result in found],
            "mean_length": [result["mean_length"] for result in found],
        }
        if name != "base":
            phases = [run.metrics(f"{name}-seed{seed}") for seed in cfg.seeds]
            last = max(cfg.rl.steps // 4, 1)
            figures["reward"] = [np.mean([row["reward"] for row in rows[-last:]]) for rows in phases]
            for figure in TIMES:  # without the first step, which compiles
                figures[figure] = [np.median([row[figure] for row in rows[1:] or rows]) for rows in phases]
        return {figure: np.array(values) for figure, values in figures.items()}

    singles = {name: per_seed(name) for name in results}
    reference = methods[0]
    summary: dict[str, Any] = {
        "seeds": list(cfg.seeds),
        "samples": cfg.rl.steps * cfg.rl.num_prompts * cfg.rl.group_size,
        "seconds": run.elapsed,
        "reference": reference.title,
        "methods": {},
    }
    for name, title in (("base", "base"), *((variant.name, variant.title) for variant in methods)):
        entry: dict[str, Any] = {
            "title": title,
            "figures": {figure: mean_over_seeds(values) for figure, values in singles[name].items()},
            "per_seed": {figure: values.tolist() for figure, values in singles[name].items()},
        }
        if name not in ("base", reference.name):
            entry["against"] = {
                figure: mean_over_seeds(singles[name][figure] - singles[reference.name][figure])
                for figure in ("pass_at_1", "consensus", "reward")
            } | {"time_ratio": mean_over_seeds(singles[name]["step_time"] / singles[reference.name]["step_time"])}
        summary["methods"][name] = entry
    for variant in methods:
        computed = policy_step_cost(cfg.model, variant.rl, cfg.prompt_length)
        summary["methods"][variant.name]["memory"] = {
            **memory[variant.name],
            "state_computed": computed.state_bytes,
            "peak_computed": computed.peak_bytes,
        }
    run.write_json("summary.json", summary)
    text = tables(summary)
    run.path("table.md").write_text(text + "\n", encoding="utf-8")
    plots = plot(cfg, run, summary)
    print(
        f"\n{text}\n\nMeans and 95 % intervals (Student's t) over {cfg.num_seeds} seeds; {summary['samples']:,}"
        f" samples a run; times are medians of steps.\n{run.elapsed:.0f} s, seeds {cfg.seeds[0]} to {cfg.seeds[-1]}."
        f"\nRun folder: {run.dir}\nPlots: {', '.join(str(path) for path in plots)}"
    )


TIMES = ("step_time", "time/generate", "time/update")


def tables(summary: Mapping[str, Any]) -> str:
    """What the methods reach, and what they cost, as Markdown."""

    def cell(interval: Mapping[str, float] | None, sign: str = "") -> str:
        if interval is None:
            return "—"
        half = interval["high"] - interval["mean"]
        return f"{interval['mean']:{sign}.3f}" + (f" ± {half:.3f}" if math.isfinite(half) else "")

    def megabytes(number: float | None) -> str:
        return "—" if number is None else f"{number / 1e6:.1f}"

    entries, reference = summary["methods"].values(), summary["reference"]
    quality = [["method", "pass@1", f"pass@1 − {reference}", "cons@k", "reward, last quarter", f"reward − {reference}"]]
    cost = [["method", "s a step", "sampling", "reference, update", f"step, times {reference}'s"]]
    held = [["numbers held", "policy", "reference", "critic", "optimizer", "start"]]
    peaks = [["MB", "held", "with gradient, computed", "peak, compiler's plan", "peak, computed", "peak, device"]]
    for entry in entries:
        figures, against = entry["figures"], entry.get("against", {})
        quality.append(
            [
                entry["title"],
                cell(figures["pass_at_1"]),
                cell(against.get("pass_at_1"), "+"),
                cell(figures["consensus"]),
                cell(figures.get("reward")),
                cell(against.get("reward"), "+"),
            ]
        )
        if memory := entry.get("memory"):
            cost.append([entry["title"], *(cell(figures[name]) for name in TIMES), cell(against.get("time_ratio"))])
            held.append([entry["title"], *(f"{memory['numbers'][name]:,}" for name in held[0][1:])])
            sizes = ("held", "state_computed", "peak_planned", "peak_computed", "peak_device")
            peaks.append([entry["title"], *(megabytes(memory[size]) for size in sizes)])
    return "\n\n".join(markdown(rows) for rows in (quality, cost, held, peaks))


def plot(cfg: Config, run: Run, summary: Mapping[str, Any]) -> list[Path]:
    """Reward and accuracy over the steps with the held-out accuracy beside them, and what the critics explain."""
    from moe_jax.analysis import plots
    from moe_jax.analysis.plots import Level, Panel, Series
    from moe_jax.analysis.seed_statistics import mean_over_seeds

    palette = {"grpo": [plots.BLUE], "ppo": [plots.ORANGE, plots.PURPLE, plots.SKY], "ppo_shared": [plots.GREEN]}
    used = {method: 0 for method in palette}
    colors: dict[str, str] = {}
    for variant in variants(cfg):
        shades = palette[variant.method]
        colors[variant.name] = shades[used[variant.method] % len(shades)]
        used[variant.method] += 1

    def curves(metric: str) -> list[Series]:
        """Each method's mean over seeds in the band of its interval."""
        found = []
        for variant in variants(cfg):
            rows = [run.metrics(f"{variant.name}-seed{seed}") for seed in cfg.seeds]
            values_ST = np.array([[row.get(metric, math.nan) for row in of_seed] for of_seed in rows])
            if np.isnan(values_ST).all():
                continue
            points = [mean_over_seeds(values_S) for values_S in values_ST.T]
            low, high = ([point[part] for point in points] for part in ("low", "high"))
            band = (low, high) if cfg.num_seeds > 1 else ((), ())
            steps, means = range(1, len(points) + 1), [point["mean"] for point in points]
            found.append(Series(variant.title, steps, means, colors[variant.name], "-", *band))
        return found

    levels = []
    for name, entry in summary["methods"].items():
        level = entry["figures"]["pass_at_1"]
        low, high = (level[part] if math.isfinite(level[part]) else level["mean"] for part in ("low", "high"))
        label = f"{entry['title']}: {100 * level['mean']:.1f} %"
        levels.append(Level(label, level["mean"], low, high, colors.get(name, plots.GREY)))
    samples = f"step ({cfg.rl.num_prompts * cfg.rl.group_size} samples each)"
    band = "95 % bands over seeds" if cfg.num_seeds > 1 else ""
    panels = {
        "learning": (
            "Reward and accuracy with as many samples",
            [
                Panel("mean reward", curves("reward"), from_zero=True, series_title=band),
                Panel(
                    "accuracy",
                    curves("rewards/accuracy/mean"),
                    levels,
                    "drawn in training",
                    "held-out pass@1",
                    share=True,
                ),
            ],
        ),
        "critic": (
            "What the critic explains of the returns",
            [Panel("explained variance", curves("critic/explained_variance"))],
        ),
    }
    files = {name: run.path("plots", f"{name}.png") for name in panels}
    return [files[name] for name, (title, of) in panels.items() if plots.plot_curves(files[name], title, of, samples)]


if __name__ == "__main__":
    main("grpo_vs_ppo", CONFIGS, experiment, from_init=from_checkpoint)
