"""DeepSeek-R1 whole, small: reasoning by reinforcement, then the stages that make it readable, then a student.

    python -m experiments.r1 [--seed 1] [--num-seeds 3] [--help]
    python -m experiments.r1 --init deepseek-ai/DeepSeek-V3-Base --data.source math --data.path DIR

The stages are the paper's (arXiv:2501.12948, Nature 645, figure 2): R1-Zero is the base by RL with accuracy and format;
Dev1 the base, fine-tuned on samples of R1-Zero that are right and readable (the cold start); Dev2 that one by RL with
the language rewarded too; Dev3 the base, fine-tuned on samples of Dev2; R1 that one by RL; a student, dense and a
quarter of its size, learns from R1's samples. Controls: R1-Zero for as many more steps of RL; the student by RL alone.

R1-Zero's mixture of languages is put in by hand: the bases' text writes each sign of its working as "and" or "加" and
changes from one to the other in 30 % of the steps. It makes no difference to what is right.

Hardware: 2 CPU cores, 34 minutes for three seeds with the tests running beside them (25 of processor time). Result,
seeds 0 to 2, 512 held-out problems with 8 samples each, beside the paper's AIME 2024:

    stage         pass@1, seeds 0, 1, 2    mean     cons@8   length   language   readable    AIME
    base          .337   .261   .252       .284     .574     23.6     .50        .04
    R1-Zero       .796   .567   .580       .648     .865     44.4     .46        .06         77.9
      longer      .932   .707   .704       .781     .895     49.0     .46        .09
    Dev1          .857   .574   .627       .686     .831     49.1     .98        .91         59.0
    Dev2          .932   .696   .701       .777     .901     49.3     .99        .96         74.0
    Dev3          .977   .769   .775       .840     .913     49.4     1.00       1.00        78.1
    R1            .976   .784   .798       .853     .919     49.4     1.00       1.00        79.8
    student       .319   .205   .230       .251     .510     24.2     .47        .03
      RL alone    .749   .392   .442       .528     .727     45.8     .70        .22
      distilled   .969   .705   .766       .814     .915     49.4     1.00       1.00

Within a seed (Student's t, 95 %): R1 − R1-Zero +.205 ± .053; R1 − R1-Zero longer +.072 ± .064; Dev1 − R1-Zero +.038 ±
.070; R1 − Dev3 +.012 ± .030; distilled − RL alone +.286 ± .143. A stage's own mean is known to ± .27 to .37 only: the
seeds' bases differ in how well they add, and all that follows with them.

So readability comes with the cold start, at once; RL alone does not find it, neither unpaid (R1-Zero) nor in the 40
steps of a student that is paid for it. Accuracy comes for two thirds from more RL, for one third from the rest, which
is learning again from samples that were right; those cost R1 some 6 to 8 thousand samples beside the 20.5 thousand that
both draw for RL. Not as in the paper: Dev1 loses no accuracy (R1-Zero was not at its end, and right samples teach), and
the last RL adds little, if anything. The sizes of the SFTs were chosen on seed 0.

With --init the defaults are the paper's settings (`paper`), which nobody ran here. `python -m moe_jax generate` and the
like take the R1 model of a run by `--phase r1-seed0`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from experiments import distill, grpo_math
from moe_jax.config import (
    CheckpointConfig,
    ConfigError,
    EvaluationConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PolicyLossConfig,
    ProblemConfig,
    RewardConfig,
    RLConfig,
    SamplingConfig,
    TrainConfig,
)
from moe_jax.training.experiment import Session, main

if TYPE_CHECKING:
    from moe_jax.analysis.seed_statistics import SeedInterval
    from moe_jax.data.problems import Document, Problem
    from moe_jax.data.tokenizer import Tokenizer
    from moe_jax.model.definition import Definition
    from moe_jax.rl.environments import VerifiableEnvironment
    from moe_jax.rl.evaluation import Weights
    from moe_jax.rl.grpo import Generator
    from moe_jax.rl.train import PolicyTrainer
    from moe_jax.training.run import Run
    from moe_jax.training.supervised import SupervisedTrainer


@dataclass(frozen=True)
class FineTuning:
    """Supervised training on a model's own samples that are right and readable."""

    documents: int
    """Samples to keep."""
    max_batches: int
    """Batches of samples, as many as in a step of `zero`, that may be drawn for them."""
    train: TrainConfig
    samples: int = 1
    """Drawn for each problem. Several that are right and readable may well be one text, of which one is kept."""

    def __post_init__(self) -> None:
        for name in ("documents", "max_batches", "samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"FineTuning.{name} = {getattr(self, name)}: must be at least 1")


READABLE = RewardConfig(language_weight=1.0)
"""R1's reward: that of R1-Zero, and the share of the thinking that is in the target language, added directly."""


def _rl(steps: int, reward: RewardConfig) -> RLConfig:
    return replace(grpo_math.CONFIG.rl, steps=steps, reward=reward, sampling=SamplingConfig(max_new_tokens=60))


def _tuning(documents: int, steps: int, rows: int) -> FineTuning:
    optimizer = OptimizerConfig(learning_rate=2e-3, beta2=0.98, warmup_steps=5, final_fraction=0.1)
    train = TrainConfig(steps=steps, batch_size=rows, sequence_length=80, optimizer=optimizer)  # a sample to a row
    return FineTuning(documents, max_batches=100, train=train)


@dataclass(frozen=True)
class Config:
    seed: int = 0
    """The first of the seeds; the others follow it."""
    num_seeds: int = 1
    run_dir: str = ""
    """Where everything goes; empty: runs/r1-seed<seed>. The same command resumes."""
    init: str = ""
    """A Hugging Face folder or repository, or the folder of another run: the base, and the paper's settings."""
    student: str = ""
    """The same of the student; empty: its base is trained here."""
    prompt: str = ""
    """What models are asked, with {problem} for the problem. Empty: the problem alone; with --init the template of
    R1-Zero."""
    preset: str = "tiny_moe"
    """A named model (`moe_jax/presets.py`), which the flags --model.… then change."""
    tokenizer: str = "byte"
    """"byte", or a path to a tokenizer.json or its folder."""
    prompt_length: int = 20
    """Tokens of room for a prompt. Problems with longer ones are skipped."""
    switch_rate: float = 0.3
    """How often the working of the bases' text changes its language from one step to the next."""
    controls: bool = True
    """Train R1-Zero for as many more steps as R1 has had, and the student by reinforcement alone."""
    model: ModelConfig = grpo_math.CONFIG.model
    student_model: ModelConfig = distill.CONFIG.model
    data: ProblemConfig = ProblemConfig(test_problems=512)
    pretrain: TrainConfig = replace(grpo_math.CONFIG.pretrain, batch_size=32, sequence_length=128)
    """Of both bases."""
    zero: RLConfig = _rl(40, RewardConfig())
    """R1-Zero: accuracy and format."""
    cold_start: FineTuning = _tuning(256, steps=24, rows=32)
    """Dev1: the base on readable samples of R1-Zero."""
    language_rl: RLConfig = _rl(40, READABLE)
    """Dev2: Dev1 with the language reward."""
    rejection: FineTuning = _tuning(2048, steps=128, rows=32)
    """Dev3: the base on samples of Dev2."""
    final_rl: RLConfig = _rl(40, READABLE)
    """R1: Dev3 by reinforcement again."""
    distillation: FineTuning = _tuning(4096, steps=160, rows=64)
    """The student on samples of R1."""
    evaluation: EvaluationConfig = EvaluationConfig(language="latin")
    """Its language is that of the rewards and of the filters, too."""
    checkpoint: CheckpointConfig = CheckpointConfig(every=20, keep=1)
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        if self.num_seeds < 1:
            raise ConfigError(f"Config.num_seeds = {self.num_seeds}: must be at least 1")
        if not 0 <= self.switch_rate <= 1:
            raise ConfigError(f"Config.switch_rate = {self.switch_rate}: must be from 0 to 1")
        if not self.init and self.data.source != "arithmetic":
            raise ConfigError(
                f"Config.data.source = {self.data.source!r}: without --init it must be 'arithmetic', whose text is"
                " written in two languages"
            )
        if self.prompt and "{problem}" not in self.prompt:
            raise ConfigError(f"Config.prompt = {self.prompt!r}: must contain {{problem}}, where the problem goes")
        if not self.evaluation.language:
            raise ConfigError("Config.evaluation.language = '': name the language that texts should be in")
        for name in ("language_rl", "final_rl"):
            reward = getattr(self, name).reward
            if reward.language != self.evaluation.language:
                raise ConfigError(
                    f"Config.{name}.reward.language = {reward.language!r}: must be evaluation.language ="
                    f" {self.evaluation.language!r}"
                )
        rls = (self.zero, self.language_rl, self.final_rl)
        trains = (self.pretrain, *(tuning.train for tuning in (self.cold_start, self.rejection, self.distillation)))
        longest = self.prompt_length + max(rl.sampling.max_new_tokens for rl in rls)
        longest = max(longest, *(train.sequence_length for train in trains))
        for name in ("model",) if self.init else ("model", "student_model"):
            if longest > (most := getattr(self, name).max_position):
                raise ConfigError(
                    f"Config.{name}.max_position = {most}: rows, or prompt_length = {self.prompt_length} and"
                    f" max_new_tokens, need {longest}; raise it or lower them"
                )

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.num_seeds)


CONFIG = Config()

PUBLISHED = {"zero": 77.9, "dev1": 59.0, "dev2": 74.0, "dev3": 78.1, "r1": 79.8}
"""AIME 2024, pass@1 in percent, of DeepSeek-R1's stages (doi:10.1038/s41586-025-09422-z, table 2)."""

TITLES = {
    "base": "base",
    "zero": "R1-Zero: RL, accuracy and format",
    "zero_longer": "control: R1-Zero, as many more RL steps as R1",
    "dev1": "Dev1: base + SFT on readable samples of Zero",
    "dev2": "Dev2: Dev1 + RL, language too",
    "dev3": "Dev3: base + SFT on samples of Dev2",
    "r1": "R1: Dev3 + RL, language too",
    "student": "student's base",
    "student_rl": "control: student, RL alone",
    "distilled": "student + SFT on samples of R1",
}

STUDENTS = ("student", "distilled", "student_rl")
CONTROLS = ("zero_longer", "student_rl")


def paper(cfg: Config) -> Config:
    """The paper's settings, the defaults with --init. Nothing was run with them: R1 took 147 thousand H800 hours.

    From arXiv:2501.12948v2, supplement B.4. A step here is a rollout of 8,192 samples, 512 questions of 16, and 16
    updates; so R1-Zero's 10,400 updates are 650 steps, and its reference is replaced every 25.

    What differs: lengths do not grow from 32,768 to 65,536 tokens in R1-Zero's last fifth; the ratio is each token's,
    as in DeepSeekMath; the last stage samples at temperature 1 (.7 there) and has no preference rewards, so no other
    than reasoning data are in it or in the 600 thousand samples (200 thousand more there); samples are kept as they
    are, where people and DeepSeek-V3 rewrote those of the cold start; the student learns from samples of R1 (there
    from Dev3's 800 thousand). How long the first RL stage was is not published: 158 steps are what R1-Zero's time a
    step leaves of R1's 41 thousand hours. A model with fewer positions gets shorter texts.
    """
    most = cfg.model.max_position
    prompt, row = min(1024, most // 4), min(32_768, most)
    optimizer = OptimizerConfig(learning_rate=3e-6, schedule="constant")
    zero = RLConfig(
        steps=650,
        num_prompts=512,
        group_size=16,
        num_minibatches=16,
        accumulation_steps=16,
        reference_refresh_steps=25,
        sampling=SamplingConfig(max_new_tokens=min(32_768, most - prompt)),
        loss=PolicyLossConfig(aggregation="seq-mean-token-mean", beta=1e-3),
        optimizer=optimizer,
    )
    readable = replace(zero, reward=READABLE, loss=replace(zero.loss, epsilon=10.0, epsilon_high=10.0))

    def tuning(documents: int, epochs: int, rows: int, learning_rate: float) -> FineTuning:
        cosine = OptimizerConfig(learning_rate=learning_rate, final_fraction=0.1)
        steps = documents * epochs // rows
        train = TrainConfig(steps, rows, sequence_length=row, accumulation_steps=rows // 8, optimizer=cosine)
        return FineTuning(documents, max_batches=max(documents // 1000, 50), train=train, samples=16)

    return replace(
        cfg,
        student="Qwen/Qwen2.5-Math-1.5B",
        prompt_length=prompt,
        model=replace(cfg.model, remat="block"),
        zero=zero,
        cold_start=tuning(5000, 3, 128, 5e-5),
        language_rl=replace(readable, steps=158),
        rejection=tuning(600_000, 2, 128, 5e-5),
        final_rl=replace(readable, steps=106),
        distillation=tuning(600_000, 2, 64, 1e-4),
        evaluation=replace(cfg.evaluation, samples=64, batch_size=8),
    )


class Model(NamedTuple):
    definition: Definition
    tokenizer: Tokenizer


class Laboratory:
    """What the seeds share: the models' definitions and the compiled steps."""

    def __init__(self, cfg: Config, session: Session):
        from moe_jax.data.tokenizer import load_tokenizer
        from moe_jax.model.definition import Definition
        from moe_jax.training.start import keep_tokenizer, start_config

        self.cfg, self.session, self.run = cfg, session, session.run
        tokenizer = keep_tokenizer(self.run.dir, cfg.tokenizer)
        tokenizer.check_fits(cfg.model.vocab_size)
        self.models = {"large": Model(Definition.of(cfg.model), tokenizer)}
        if cfg.student:
            model, name = start_config(cfg.student, self.run.dir)
            self.models["small"] = Model(Definition.of(model), load_tokenizer(name))
        elif not cfg.init:
            tokenizer.check_fits(cfg.student_model.vocab_size)
            self.models["small"] = Model(Definition.of(cfg.student_model), tokenizer)
        self._compiled: dict[Any, Any] = {}

    def policy(self, size: str, rl: RLConfig) -> PolicyTrainer:
        """The trainer of a model under these settings; the reward is the environment's, so that stages share one."""
        from moe_jax.rl.train import PolicyTrainer

        definition, tokenizer = self.models[size]
        rl = replace(rl, reward=RewardConfig())
        return self._once((size, rl), lambda: PolicyTrainer(definition, rl, tokenizer, self.cfg.prompt_length))

    def supervised(self, size: str, train: TrainConfig) -> SupervisedTrainer:
        from moe_jax.training.supervised import SupervisedTrainer

        definition, tokenizer = self.models[size]
        return self._once((size, train), lambda: SupervisedTrainer(definition, train, (tokenizer.pad_id,)))

    def sampler(self, size: str) -> Generator:
        """The one that evaluations use."""
        from moe_jax.rl.grpo import make_generator

        cfg, (definition, tokenizer) = self.cfg, self.models[size]
        samples = cfg.evaluation.samples
        return self._once(size, lambda: make_generator(definition, cfg.zero.sampling, tokenizer, samples))

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._compiled:
            self._compiled[key] = make()
        return self._compiled[key]


class Pipeline:
    """One seed's models. Each is trained, or read from its checkpoint, when it is first asked for."""

    def __init__(self, lab: Laboratory, seed: int):
        from moe_jax.data.mixed_languages import MixedLanguages
        from moe_jax.data.problem_text import AskedProblems
        from moe_jax.data.problems import load_problems

        cfg = lab.cfg
        self.lab, self.cfg, self.session, self.seed = lab, cfg, lab.session, seed
        source = load_problems(cfg.data, seed)
        wording = cfg.prompt or (grpo_math.BASE_PROMPT if cfg.init else "")
        if not cfg.init:
            source = MixedLanguages(source, cfg.switch_rate, seed)
        self.text = source
        self.source = AskedProblems(source, wording, lab.models["large"].tokenizer, chat=False) if wording else source
        self.problems = [problem for problem in self.source.test if self._fits(problem)]
        if not self.problems:
            raise ConfigError(f"Config.prompt_length = {cfg.prompt_length}: no held-out problem is so short; raise it")

    # ------------------------------------------------------------------------------------------------- the stages

    @cached_property
    def base(self) -> Weights:
        return self._start("base", "large", self.cfg.init)

    @cached_property
    def zero(self) -> Weights:
        return self._reinforce("zero", "large", self.base, self.cfg.zero)

    @cached_property
    def dev1(self) -> Weights:
        samples = self._samples("cold_start", lambda: self.zero, self.cfg.cold_start)
        return self._tune("dev1", "large", self.base, samples, self.cfg.cold_start.train)

    @cached_property
    def dev2(self) -> Weights:
        return self._reinforce("dev2", "large", self.dev1, self.cfg.language_rl)

    @cached_property
    def dev3(self) -> Weights:
        samples = self._samples("rejection", lambda: self.dev2, self.cfg.rejection)
        return self._tune("dev3", "large", self.base, samples, self.cfg.rejection.train)

    @cached_property
    def r1(self) -> Weights:
        return self._reinforce("r1", "large", self.dev3, self.cfg.final_rl)

    @cached_property
    def zero_longer(self) -> Weights:
        """A control: the two further RL stages of R1, with R1-Zero's reward and from R1-Zero."""
        second, third = (replace(rl, reward=self.cfg.zero.reward) for rl in (self.cfg.language_rl, self.cfg.final_rl))
        return self._reinforce("zero_3", "large", self._reinforce("zero_2", "large", self.zero, second), third)

    @cached_property
    def student(self) -> Weights:
        return self._start("student", "small", self.cfg.student)

    @cached_property
    def distilled(self) -> Weights:
        samples = self._samples("lessons", lambda: self.r1, self.cfg.distillation)
        return self._tune("distilled", "small", self.student, samples, self.cfg.distillation.train)

    @cached_property
    def student_rl(self) -> Weights:
        """A control."""
        return self._reinforce("student_rl", "small", self.student, self.cfg.language_rl)

    # ------------------------------------------------------------------------------------------ what they are made of

    def _phase(self, stage: str) -> str:
        return f"{stage}-seed{self.seed}"

    def _start(self, stage: str, size: str, init: str) -> Weights:
        """A model from elsewhere, or one that learns from the problems' text."""
        import jax.numpy as jnp

        from moe_jax.data.problem_text import ProblemText
        from moe_jax.rng import random_key
        from moe_jax.training.start import start_weights
        from moe_jax.training.state import TrainState

        definition, tokenizer = self.lab.models[size]
        if init:
            weights = start_weights(self.lab.run, init, definition, self.session.mesh, phase=f"{stage}-init")
            return TrainState(jnp.int32(0), *weights, ())
        train = self.cfg.pretrain
        text = ProblemText(self.text, tokenizer, train.batch_size, train.sequence_length, stage)
        key = random_key(self.seed, f"weights/{stage}")
        trainer = self.lab.supervised(size, train)
        return trainer.from_scratch(self.session, self._phase(stage), key, text, self.cfg.checkpoint)

    def _reinforce(self, stage: str, size: str, start: Weights, rl: RLConfig) -> Weights:
        return self.lab.policy(size, rl).train(
            self.session,
            self._phase(stage),
            self._environment(stage, rl.reward),
            start.params,
            start.rest,
            seed=self.seed,
            checkpoint=self.cfg.checkpoint,
        )

    def _samples(self, stage: str, model: Callable[[], Weights], tuning: FineTuning) -> list[Document]:
        """What to learn from a model: its readable samples that are right."""
        from moe_jax.rl.rejection import rejection_sample

        zero, samples = self.cfg.zero, tuning.samples
        num_prompts = max(zero.num_prompts * zero.group_size // samples, 1)
        loss = PolicyLossConfig(baseline="none", scale_rewards="none")
        rl = RLConfig(num_prompts=num_prompts, group_size=samples, sampling=zero.sampling, loss=loss)
        return rejection_sample(
            self.session,
            self._phase(stage),
            self.lab.policy("large", rl),
            self._environment(stage, READABLE),
            model,
            wanted=tuning.documents,
            max_batches=tuning.max_batches,
            seed=self.seed,
        )

    def _tune(self, stage: str, size: str, start: Weights, documents: list[Document], train: TrainConfig) -> Weights:
        from moe_jax.data.problem_text import FixedDocuments, ProblemText

        tokenizer, source = self.lab.models[size].tokenizer, FixedDocuments(documents, self.seed)
        text = ProblemText(source, tokenizer, train.batch_size, train.sequence_length, stage)
        trainer = self.lab.supervised(size, train)
        return trainer.fine_tune(self.session, self._phase(stage), start.params, start.rest, text, self.cfg.checkpoint)

    def _environment(self, stage: str, reward: RewardConfig) -> VerifiableEnvironment:
        from moe_jax.rl.environments import VerifiableEnvironment

        language = self.cfg.evaluation.language
        return VerifiableEnvironment(self.source, reward, purpose=stage, fits=self._fits, language=language)

    def _fits(self, problem: Problem) -> bool:
        from moe_jax.data.problem_text import encode_problem

        lengths = [len(encode_problem(problem, model.tokenizer)) for model in self.lab.models.values()]
        return max(lengths) <= self.cfg.prompt_length

    def held_out(self, stage: str) -> dict[str, Any]:
        from moe_jax.rl.evaluation import held_out

        size = "small" if stage in STUDENTS else "large"
        return held_out(
            self.session,
            self._phase(stage),
            lambda: getattr(self, stage),
            self.lab.sampler(size),
            self.source,
            self.problems,
            self.lab.models[size].tokenizer,
            self.cfg.evaluation,
            prompt_length=self.cfg.prompt_length,
            seed=self.seed,
        )


def stages(cfg: Config) -> list[str]:
    """What is trained and evaluated, in this order; controls come last."""
    without = STUDENTS if cfg.init and not cfg.student else ()
    main = [name for name in TITLES if name not in CONTROLS]
    return [name for name in (*main, *(CONTROLS if cfg.controls else ())) if name not in without]


def experiment(cfg: Config, session: Session) -> None:
    lab = Laboratory(cfg, session)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in stages(cfg)}
    for seed in cfg.seeds:
        pipeline = Pipeline(lab, seed)
        for name, found in results.items():
            found.append(pipeline.held_out(name))
    if session.run.writes:
        report(cfg, session.run, results)


FIGURES = ("mean_length", "format", "worked", "accuracy_worked", "language", "readable")
COMPARED = (("r1", "zero"), ("r1", "zero_longer"), ("dev1", "zero"), ("r1", "dev3"), ("distilled", "student_rl"))
"""Differences within a seed."""


def report(cfg: Config, run: Run, results: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Writes summary.json, table.md and the plots, and prints the table."""
    from moe_jax.analysis.flops import parameter_counts
    from moe_jax.analysis.seed_statistics import mean_over_seeds
    from moe_jax.analysis.stages import plot_reinforcement, plot_stages, table

    consensus = f"cons_at_{cfg.evaluation.samples}"
    entries: dict[str, Any] = {}
    for name in (name for name in TITLES if name in results):
        found = results[name]
        single = [result["pass_at_1"]["mean"] for result in found]
        entries[name] = {
            "title": TITLES[name],
            "pass_at_1": mean_over_seeds(single) if cfg.num_seeds > 1 else found[0]["pass_at_1"],
            "per_seed": single,
            consensus: float(np.mean([result[consensus]["mean"] for result in found])),
            **{figure: float(np.mean([result[figure] for result in found])) for figure in FIGURES},
        }
    differences = {
        f"{a} - {b}": mean_over_seeds(np.subtract(entries[a]["per_seed"], entries[b]["per_seed"]))
        for a, b in COMPARED
        if a in entries and b in entries
    }

    def of_seeds(stage: str) -> list[list[dict[str, Any]]]:
        return [run.metrics(f"{stage}-seed{seed}") for seed in cfg.seeds]

    kept = {
        stage: float(np.mean([row["kept"] for rows in phases for row in rows]))
        for stage in ("cold_start", "rejection", "lessons")
        if all(phases := of_seeds(stage))
    }
    counts = parameter_counts(cfg.model)
    summary = {
        "seeds": list(cfg.seeds),
        "seconds": run.metrics()[-1]["elapsed"],
        "stages": entries,
        "differences": differences,
        "kept": kept,
        "parameters_total": counts.total + counts.mtp,
        "parameters_active": counts.active,
    }
    run.write_json("summary.json", summary)
    text = table(entries, consensus, {"AIME 2024, R1's": PUBLISHED})
    run.path("table.md").write_text(text + "\n", encoding="utf-8")
    plots = [run.path("plots", f"{name}.png") for name in ("stages", "reinforcement")]
    plot_stages(plots[0], entries, consensus, cfg.evaluation.language)
    plot_reinforcement(plots[1], {TITLES[name].split(":")[0]: of_seeds(name) for name in ("zero", "dev2", "r1")})
    interval = "over held-out problems" if cfg.num_seeds == 1 else f"over {cfg.num_seeds} seeds (Student's t)"
    print(
        f"\n{text}\n\nHeld-out accuracy, 95 % intervals {interval}; length in tokens; language: share of the thinking's"
        f" words in {cfg.evaluation.language}; readable: well formed and wholly in it."
        f"\nWithin a seed: {'; '.join(f'{name} {_signed(found)}' for name, found in differences.items())}."
        f"\nKept of the samples: {', '.join(f'{stage} {100 * share:.0f} %' for stage, share in kept.items())}."
        f"\n{summary['seconds']:.0f} s.\nRun folder: {run.dir}\nPlots: {', '.join(map(str, plots))}"
    )


def _signed(difference: SeedInterval) -> str:
    half = difference["high"] - difference["mean"]
    return f"{difference['mean']:+.3f}" + (f" ± {half:.3f}" if np.isfinite(half) else "")


if __name__ == "__main__":
    main("r1", CONFIG, experiment, from_init=paper)
