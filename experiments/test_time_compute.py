"""Accuracy bought with tokens at test time: more samples, and longer thinking, before and after reinforcement.

    python -m experiments.test_time_compute --run runs/grpo_math-seed0
    python -m experiments.test_time_compute [--seed 1] [--data.source gsm8k --data.path DIR] [--help]
    python -m experiments.test_time_compute --init Qwen2.5-0.5B-Instruct --data.source gsm8k --data.path DIR

The base and the policy of a finished run of grpo_math on its held-out problems; without --run both are trained first,
by grpo_math's own phases; with --init that model alone is measured. Every problem is sampled 32 times. Of these come
pass@1 and cons@k (the majority's answer; of 32 samples 32 / k disjoint groups), and best-of-k, in which the rule picks
that knows the answer: an upper bound, no method. A budget cuts the same samples off: what is longer is wrong.

Intervals are 95 % over problems. Beside them stands DeepSeek-R1-Zero on AIME 2024 (arXiv:2501.12948, table 2).

Hardware: 2 CPU cores, 24 GB. Time: 1 minute with --run, else 3 to 6 more to train. Result, seed 0, 1,024 problems:

    samples             1      2      4      8      16     32      tokens of one
    base, cons@k       .358   .358   .524   .754   .914   .966     18
    base, best-of-k    .358   .584   .818   .956   .990   .996
    GRPO, cons@k       .846   .847   .986   .997   .998   .998     34
    GRPO, best-of-k    .846   .974   .997   .998   .999   .999

Intervals are below ± .015 (of the budgets ± .025). RL and the vote buy the same thing: one sample of the policy, 34
tokens, is worth 8 to 16 of the base, 150 to 300 tokens; but four of the policy, 135 tokens, are worth more than all 32
of the base, 590. A vote of 32 removes 95 % of the base's errors, 99 % of the policy's, and 64 samples 54 % of R1-Zero's
(.710 to .867). This is the toy's: its guesses are the truth plus noise without a bias, so the truth is the commonest
answer of nearly every problem; where a model is wrong with confidence no vote helps. Room for a sample helps up to what
its working takes: budgets of 32, 40, 48 and 64 tokens give the policy .134, .584, .846 and .846.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

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
    SamplingConfig,
    TrainConfig,
)
from moe_jax.training.experiment import Session, main

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from moe_jax.analysis.evaluation_statistics import Interval
    from moe_jax.analysis.test_time import Drawn, Spent
    from moe_jax.model.definition import Arrays
    from moe_jax.training.run import Run


@dataclass(frozen=True)
class Config:
    seed: int = 0
    run_dir: str = ""
    """Where everything goes; empty: runs/test_time_compute-seed<seed>. The same command resumes."""
    run: str = ""
    """A finished run of grpo_math, whose base and policy are measured. It decides all that follows `budgets`."""
    sampling: SamplingConfig = SamplingConfig(max_new_tokens=64)
    """How samples are drawn; max_new_tokens is the largest budget."""
    evaluation: EvaluationConfig = EvaluationConfig(samples=32, batch_size=64)
    budgets: tuple[int, ...] = (16, 24, 32, 40, 48)
    """Smaller budgets, in tokens of a sample."""
    init: str = ""
    """A Hugging Face folder or repository, or the folder of another run: its model alone is measured."""
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
    checkpoint: CheckpointConfig = grpo_math.CONFIG.checkpoint
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        longest = self.sampling.max_new_tokens
        if sorted(set(self.budgets)) != list(self.budgets) or not all(0 < budget < longest for budget in self.budgets):
            raise ConfigError(
                f"Config.budgets = {self.budgets}: must rise, from at least 1 to less than sampling.max_new_tokens ="
                f" {longest}"
            )
        if self.prompt_length + longest > self.model.max_position:
            raise ConfigError(
                f"Config.sampling.max_new_tokens = {longest}: with prompt_length = {self.prompt_length} it exceeds"
                f" model.max_position = {self.model.max_position}; lower one of them"
            )
        self.of_grpo_math()  # what its phases cannot do is refused here

    def of_grpo_math(self) -> grpo_math.Config:
        """What the models are trained by."""
        names = {field.name for field in fields(grpo_math.Config)} & {field.name for field in fields(self)}
        return grpo_math.Config(**{name: getattr(self, name) for name in names}, controls=False)


_OWN = {"run_dir", "evaluation", "mesh", "checkpoint"}
"""Fields of grpo_math's that are this experiment's to choose."""


def config_for(grpo: grpo_math.Config) -> Config:
    """The defaults for models that are trained so: a third more room than in training, and eighths of it."""
    room = min(grpo.rl.sampling.max_new_tokens * 4 // 3, grpo.model.max_position - grpo.prompt_length)
    shared = {field.name for field in fields(grpo_math.Config)} & {field.name for field in fields(Config)} - _OWN
    return Config(
        sampling=replace(grpo.rl.sampling, max_new_tokens=room),
        evaluation=EvaluationConfig(samples=32, batch_size=max(grpo.evaluation.batch_size // 4, 1)),
        budgets=tuple(sorted({max(room * eighths // 8, 1) for eighths in range(2, 7)} - {room})),
        checkpoint=grpo.checkpoint,
        **{name: getattr(grpo, name) for name in shared},
    )


CONFIGS = {source: config_for(grpo) for source, grpo in grpo_math.CONFIGS.items()}
"""Defaults by `--data.source`."""


def from_checkpoint(cfg: Config) -> Config:
    """Defaults with --init."""
    if cfg.run:
        raise ConfigError(f"--init {cfg.init}: --run {cfg.run} brings its own models; leave one of them out")
    return config_for(grpo_math.from_checkpoint(cfg.of_grpo_math()))


def from_run(run: str) -> Config:
    """Defaults with --run.

    Raises:
        RunError: it is no run of grpo_math.
    """
    from pathlib import Path

    from moe_jax.config import from_dict
    from moe_jax.training.run import RunError, load_config
    from moe_jax.training.weights import TOKENIZER_FOLDER

    saved = load_config(run)
    if saved["experiment"] != "grpo_math":
        raise RunError(f"--run {run}: is a run of {saved['experiment']}, must be one of grpo_math; or use --init {run}")
    cfg = config_for(from_dict(grpo_math.Config, {**saved["config"], "run_dir": ""}))
    copy = Path(run) / TOKENIZER_FOLDER
    return replace(cfg, run=run, tokenizer=str(copy) if copy.is_dir() else cfg.tokenizer)


class Laboratory:
    """The models and their samples."""

    def __init__(self, cfg: Config, session: Session):
        from moe_jax.rl.grpo import make_generator

        self.cfg, self.session, self.run = cfg, session, session.run
        self.training = grpo_math.Laboratory(cfg.of_grpo_math(), session)
        self.sample = make_generator(
            self.training.definition, cfg.sampling, self.training.tokenizer, cfg.evaluation.samples
        )

    def models(self) -> Iterator[tuple[str, Arrays, Arrays]]:
        """(name, params, rest) of what is measured."""
        if self.cfg.run:
            for name, phase, steps in (
                ("base", "init", 0) if self.cfg.init else ("base", "base", self.cfg.pretrain.steps),
                ("policy", "grpo", self.cfg.rl.steps),
            ):
                yield name, *self._of_run(phase, steps)
            return
        base = self.training.start()
        yield "model" if self.cfg.init else "base", base.params, base.rest
        if not self.cfg.init:
            policy = self.training.reinforce("grpo", base)
            yield "policy", policy.params, policy.rest

    def _of_run(self, phase: str, steps: int) -> tuple[Arrays, Arrays]:
        from pathlib import Path

        from moe_jax.training.weights import restore_weights

        weights = restore_weights(Path(self.cfg.run), self.training.definition, phase, self.session.mesh)
        if weights.step != steps:
            raise ConfigError(
                f"--run {self.cfg.run}: has {weights.step} of {steps} steps of {phase}; finish it by its own command"
            )
        return weights.params, weights.rest

    def draw(self, name: str, params: Arrays, rest: Arrays) -> Drawn:
        """A model's samples of all held-out problems; each batch is drawn once: a resumed run reads it."""
        import numpy as np

        from moe_jax.analysis.test_time import from_rows
        from moe_jax.training.run import Progress

        rows: list[dict[str, Any]] = []
        problems, size = self.training.problems, self.cfg.evaluation.batch_size
        with Progress(f"sample {name}", len(problems)) as progress:
            for start in range(0, len(problems), size):
                file = f"samples/{name}/{start:06d}.json"
                found = self.run.result(file)
                if found is None:
                    found = self._draw(params, rest, start)
                    self.run.write_json(file, found)
                    self.run.rewind(f"sample_{name}", start)
                    right = float(np.mean([row["right"] for row in found]))
                    self.run.log(f"sample_{name}", start + len(found), {"accuracy": right})
                rows += found
                progress.update(len(rows))
                self.session.guard.check()
        return from_rows(rows)

    def _draw(self, params: Arrays, rest: Arrays, start: int) -> list[dict[str, Any]]:
        import jax
        import numpy as np

        from moe_jax.analysis.test_time import Drawn, to_rows
        from moe_jax.rl.grpo import decode_completions, encode_prompts
        from moe_jax.rl.rewards import judge
        from moe_jax.rng import random_key

        lab, G, size = self.training, self.cfg.evaluation.samples, self.cfg.evaluation.batch_size
        chunk = lab.problems[start : start + size]
        padded = chunk + [chunk[-1]] * (size - len(chunk))
        tokens_PS, mask_PS = encode_prompts(padded, lab.tokenizer, self.cfg.prompt_length)
        key = random_key(self.cfg.seed, "test_time", start)
        samples = jax.device_get(self.sample(params, rest, tokens_PS, mask_PS, key))
        texts, rows = decode_completions(samples, lab.tokenizer), len(chunk) * G
        asked = [problem for problem in chunk for _ in range(G)]
        judged = judge(asked, texts[:rows], samples.finished_B[:rows], lab.source)
        drawn = Drawn(
            [[one.answer for one in judged[first : first + G]] for first in range(0, rows, G)],
            np.array([one.credit == 1 for one in judged]).reshape(-1, G),
            np.sum(samples.mask_BN, axis=1)[:rows].reshape(-1, G),
        )
        return to_rows([problem.prompt for problem in chunk], drawn)


def experiment(cfg: Config, session: Session) -> None:
    if cfg.run:
        refuse_conflicts(cfg, from_run(cfg.run))
    lab = Laboratory(cfg, session)
    drawn = {name: lab.draw(name, params, rest) for name, params, rest in lab.models()}
    if session.run.writes:
        report(cfg, session.run, drawn)


def refuse_conflicts(cfg: Config, decided: Config) -> None:
    """
    Raises:
        ConfigError: flags changed what the run of `--run` decides.
    """
    names = [field.name for field in fields(grpo_math.Config)]
    for name in sorted(set(names) - _OWN - {"controls"}, key=names.index):
        asked, known = getattr(cfg, name), getattr(decided, name)
        if asked != known:
            raise ConfigError(f"--{name.replace('_', '-')}: --run {cfg.run} decides it; leave the flag out")


TITLES = {"base": "base", "policy": "after GRPO", "model": "the model"}
PUBLISHED = {"title": "DeepSeek-R1-Zero, AIME 2024 (published)", "samples": 64, "pass_at_1": 0.710, "consensus": 0.867}
"""arXiv:2501.12948, table 2."""


def report(cfg: Config, run: Run, drawn: Mapping[str, Drawn]) -> None:
    """Writes summary.json, table.md and the plot, and prints the tables."""
    from moe_jax.analysis.test_time import powers_of_two, spent

    room, ks = cfg.sampling.max_new_tokens, powers_of_two(cfg.evaluation.samples)
    budgets = [*cfg.budgets, room]
    by_samples = {name: [spent(found, k, room) for k in ks] for name, found in drawn.items()}
    by_budget = {
        name: {k: [spent(found, k, budget) for budget in budgets] for k in sorted({1, ks[-1]})}
        for name, found in drawn.items()
    }
    problems = len(next(iter(drawn.values())).right_PG)
    summary = {
        "problems": problems,
        "by_samples": {name: [point._asdict() for point in points] for name, points in by_samples.items()},
        "by_budget": {
            name: {str(k): [point._asdict() for point in points] for k, points in of_k.items()}
            for name, of_k in by_budget.items()
        },
        "published": PUBLISHED,
        "seed": cfg.seed,
        "seconds": run.elapsed,
    }
    run.write_json("summary.json", summary)
    text = tables(by_samples, by_budget)
    run.path("table.md").write_text(text + "\n", encoding="utf-8")
    file = plot(run, by_samples, by_budget)
    print(
        f"\n{text}\n\n{problems} held-out problems, {cfg.evaluation.samples} samples of each at temperature"
        f" {cfg.sampling.temperature:g}; 95 % intervals over problems; tokens are means per problem. best-of-k"
        f" knows the answer: an upper bound.\n{run.elapsed:.0f} s, seed {cfg.seed}."
        f"\nRun folder: {run.dir}\nPlot: {file}"
    )


def tables(by_samples: Mapping[str, Sequence[Spent]], by_budget: Mapping[str, Mapping[int, Sequence[Spent]]]) -> str:
    """More samples, longer samples, and what the vote is worth, as Markdown."""
    from moe_jax.analysis.test_time import errors_removed

    def cell(interval: Interval) -> str:
        return f"{interval['mean']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"

    more = [["model", "samples k", "tokens", "cons@k (k = 1: pass@1)", "best-of-k (upper bound)"]]
    votes = [["model", "samples k", "pass@1", "cons@k", "errors removed"]]
    longer = [["model", "budget", "cut off"]]
    votes_of = sorted({k for of_k in by_budget.values() for k in of_k})
    longer[0] += [title for k in votes_of for title in (f"tokens of {k}", "pass@1" if k == 1 else f"cons@{k}")]
    for name, points in by_samples.items():
        more += [
            [TITLES[name], str(point.k), f"{point.tokens:,.0f}", cell(point.consensus), cell(point.best)]
            for point in points
        ]
        one, most = points[0].consensus["mean"], points[-1]
        gain = errors_removed(one, most.consensus["mean"])
        votes.append([TITLES[name], str(most.k), f"{one:.3f}", f"{most.consensus['mean']:.3f}", f"{100 * gain:.0f} %"])
    one, most = PUBLISHED["pass_at_1"], PUBLISHED["consensus"]
    gain = errors_removed(one, most)
    votes.append([PUBLISHED["title"], str(PUBLISHED["samples"]), f"{one:.3f}", f"{most:.3f}", f"{100 * gain:.0f} %"])
    for name, of_k in by_budget.items():
        for points in zip(*of_k.values(), strict=True):
            cells = [text for point in points for text in (f"{point.tokens:,.0f}", cell(point.consensus))]
            longer.append([TITLES[name], str(points[0].budget), f"{points[0].cut_off:.2f}", *cells])
    return "\n\n".join(markdown(rows) for rows in (more, longer, votes))


def plot(
    run: Run, by_samples: Mapping[str, Sequence[Spent]], by_budget: Mapping[str, Mapping[int, Sequence[Spent]]]
) -> Path:
    """Accuracy over the mean tokens spent on a problem: above more samples, below longer ones."""
    from moe_jax.analysis import plots
    from moe_jax.analysis.plots import Panel, Series

    colors = {"base": plots.ORANGE, "policy": plots.BLUE, "model": plots.BLUE}

    def curve(name: str, label: str, points: Sequence[Spent], style: str, figure: str = "consensus") -> Series:
        intervals = [getattr(point, figure) for point in points]
        mean, low, high = ([interval[part] for interval in intervals] for part in ("mean", "low", "high"))
        tokens = [point.tokens for point in points]
        return Series(f"{TITLES[name]}, {label}", tokens, mean, colors[name], style, low, high)

    more = [
        curve(name, label, points, style, figure)
        for name, points in by_samples.items()
        for label, style, figure in (("majority", "-", "consensus"), ("best (upper bound)", ":", "best"))
    ]
    longer = [
        curve(name, "one sample" if k == 1 else f"majority of {k}", points, "--" if k == 1 else "-")
        for name, of_k in by_budget.items()
        for k, points in of_k.items()
    ]
    counts = [point.k for point in next(iter(by_samples.values()))]
    budgets = [point.budget for point in next(iter(next(iter(by_budget.values())).values()))]
    file = run.path("plots", "accuracy_and_tokens.png")
    plots.plot_curves(
        file,
        "Accuracy on held-out problems against tokens spent",
        [
            Panel(
                f"accuracy\n{counts[0]} to {counts[-1]} samples",
                more,
                share=True,
                joined=True,
                series_title="more samples",
            ),
            Panel(
                f"accuracy\nat most {budgets[0]} to {budgets[-1]} tokens each",
                longer,
                share=True,
                joined=True,
                series_title="longer thinking",
            ),
        ],
        xlabel="tokens spent on a problem (mean; logarithmic)",
        log_x=True,
    )
    return file


def _defaults(arguments: Sequence[str]) -> Config | dict[str, Config]:
    """The configurations that flags change: those of a run that is named, or those of the sources of problems."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--run", default="")
    run = parser.parse_known_args(arguments)[0].run
    if not run:
        return CONFIGS
    from moe_jax.training.run import RunError

    try:
        return from_run(run)
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main("test_time_compute", _defaults(sys.argv[1:]), experiment, from_init=from_checkpoint)
