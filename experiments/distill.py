"""Distillation: a small dense student learns from a sparse teacher, beside learning alone by reinforcement.

    python -m experiments.distill [--num-seeds 3] [--methods supervised logits sequences on_policy rl] [--help]
    python -m experiments.distill --teacher DIR --student DIR [--data.source gsm8k --data.path DIR]

The teacher, sparse, is trained as in experiments/grpo_math.py. A student, dense and a quarter of its size, has a base
on the same text, and from it learns in turn: more of that text (`supervised`); the teacher's top-k distributions on the
teacher's samples, stored once (`logits`, forward KL); those samples that are right (`sequences`); the teacher's
distributions on samples of its own (`on_policy`, reverse KL, GKD arXiv:2306.13649); rewards alone (`rl`, GRPO with as
many samples). With --teacher and --student these are checkpoints or runs; with different tokenizers, by sequences only.

Hardware: 2 CPU cores, 8 minutes. Result, seeds 0 to 2 of the students, one teacher (pass@1 .877, 4.36 TFLOPs), 512
held-out problems with 4 samples each, parameters 90 k and 344 k (197 k active), means and 95 % intervals (Student's t):

    student          pass@1         − RL alone       TFLOPs: its own, the teacher's for it
    base             .176 ± .074    -.200 ± .195      .64
    supervised       .269 ± .113    -.107 ± .160     1.01
    logits           .697 ± .282    +.321 ± .140     1.01    .47
    sequences        .800 ± .283    +.424 ± .102     1.01    .20
    on_policy        .705 ± .343    +.328 ± .144     1.09    .27
    rl               .376 ± .269                     1.22

The direction is that of DeepSeek-R1 (AIME 2024: 72.6 distilled, 47.0 by RL alone, Qwen-32B), in every seed: seeds
differ more than methods (RL alone .31 to .50), a seed's methods less. RL finds the worked solutions (.90 of its
samples, of the others .93 to 1.00) but not the skill. The right samples alone teach more than all samples with their
distributions, which hold the teacher's mistakes, too; the three ways' differences were not tested.

The size of the gap is this setting's: RL took 40 updates, distillation 160, of as many samples; one teacher stands for
all; its training, 4.36 TFLOPs, costs more than any student and is in no row. No pair of published checkpoints was run.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from experiments.grpo_math import BASE_PROMPT, CHAT_PROMPT
from moe_jax.analysis.flops import parameter_counts, training_flops_per_token
from moe_jax.config import (
    CheckpointConfig,
    ConfigError,
    EvaluationConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PolicyLossConfig,
    ProblemConfig,
    RLConfig,
    SamplingConfig,
    TrainConfig,
)
from moe_jax.presets import tiny_dense, tiny_moe
from moe_jax.training.experiment import Session, main

if TYPE_CHECKING:
    from pathlib import Path

    from moe_jax.data.problems import Problem, ProblemSource
    from moe_jax.data.tokenizer import Tokenizer
    from moe_jax.model.definition import Arrays, Definition
    from moe_jax.rl.environments import VerifiableEnvironment
    from moe_jax.rl.grpo import Generator, Rollout
    from moe_jax.rl.train import PolicyTrainer
    from moe_jax.training.run import Run
    from moe_jax.training.state import TrainState

Method = Literal["supervised", "logits", "sequences", "on_policy", "rl"]


def _student() -> ModelConfig:
    """`tiny_dense` with two thirds of the layers, of three quarters of the width."""
    return replace(tiny_dense(), hidden_size=48, num_layers=2, intermediate_size=128)


def _optimizer(learning_rate: float) -> OptimizerConfig:
    return OptimizerConfig(learning_rate=learning_rate, beta2=0.98, warmup_steps=5, final_fraction=0.05)


@dataclass(frozen=True)
class Config:
    seed: int = 0
    """The first of the students' seeds, the others follow it; and the teacher's."""
    num_seeds: int = 3
    run_dir: str = ""
    """Where everything goes; empty: runs/distill-seed<seed>. The same command resumes."""
    methods: tuple[Method, ...] = ("supervised", "logits", "sequences", "on_policy", "rl")
    teacher: str = ""
    """A Hugging Face folder or repository, or the folder of another run; empty: one is trained here."""
    init: str = ""
    """The same of the student (--student is another name of this flag): it takes the place of the students' bases."""
    prompt: str = ""
    """What models are asked, with {problem} for the problem. Empty: the problem alone; with a student from elsewhere
    the prompts of experiments/grpo_math.py."""
    preset: str = ""
    """A named model (`moe_jax/presets.py`) in place of this file's student."""
    tokenizer: str = "byte"
    """"byte", or a path to a tokenizer.json or its folder."""
    prompt_length: int = 20
    """Tokens of room for a prompt."""
    model: ModelConfig = field(default_factory=_student)
    """The student."""
    teacher_model: ModelConfig = field(default_factory=tiny_moe)
    data: ProblemConfig = ProblemConfig(test_problems=512)
    teacher_pretrain: TrainConfig = TrainConfig(
        steps=450,
        batch_size=64,
        sequence_length=64,
        optimizer=OptimizerConfig(name="muon", learning_rate=2e-2, warmup_steps=30, final_fraction=0.1),
    )
    pretrain: TrainConfig = TrainConfig(
        steps=300,
        batch_size=64,
        sequence_length=64,
        optimizer=OptimizerConfig(name="muon", learning_rate=2e-2, warmup_steps=30, final_fraction=0.1),
    )
    """Of the students' bases, on the same text."""
    rl: RLConfig = RLConfig(
        steps=40,
        num_prompts=32,
        group_size=8,
        sampling=SamplingConfig(max_new_tokens=48),
        loss=PolicyLossConfig(beta=1e-3),
        optimizer=OptimizerConfig(learning_rate=3e-4, beta2=0.98, warmup_steps=3, final_fraction=0.05),
    )
    """Of the teacher and of the student that learns alone; on-policy distillation draws as many samples."""
    distill: TrainConfig = TrainConfig(steps=160, batch_size=64, sequence_length=68, optimizer=_optimizer(2e-3))
    """On-policy distillation takes its rows of an update and its optimizer."""
    store_prompts: int = 1280
    """Prompts that the teacher samples for, `rl.group_size` times each."""
    store_shards: int = 10
    top_k: int = 16
    """Tokens whose log-probabilities the teacher gives."""
    temperature: float = 1.0
    """Of both distributions in the divergence."""
    beta_logits: float = 0.0
    """Divergence on the teacher's samples: 0 forward KL, 1 reverse KL, between them generalised Jensen-Shannon."""
    beta_on_policy: float = 1.0
    """The same on the student's samples."""
    evaluation: EvaluationConfig = EvaluationConfig(samples=4)
    checkpoint: CheckpointConfig = CheckpointConfig(every=20, keep=1)
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        if self.num_seeds < 1:
            raise ConfigError(f"Config.num_seeds = {self.num_seeds}: must be at least 1")
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ConfigError(f"Config.methods = {self.methods}: must name at least one, and each once")
        if self.store_shards < 1 or self.store_prompts < 1 or self.store_prompts % self.store_shards:
            raise ConfigError(
                f"Config.store_prompts = {self.store_prompts}: must be a multiple of store_shards = {self.store_shards}"
            )
        if self.samples_a_step % self.distill.batch_size:
            raise ConfigError(
                f"Config.distill.batch_size = {self.distill.batch_size}: must divide the {self.samples_a_step} samples"
                " of a step (rl.num_prompts x rl.group_size)"
            )
        if self.top_k < 1:
            raise ConfigError(f"Config.top_k = {self.top_k}: must be at least 1")
        if self.temperature <= 0:
            raise ConfigError(f"Config.temperature = {self.temperature}: must be greater than 0")
        for name in ("beta_logits", "beta_on_policy"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"Config.{name} = {getattr(self, name)}: must be from 0 to 1")
        if self.prompt and "{problem}" not in self.prompt:
            raise ConfigError(f"Config.prompt = {self.prompt!r}: must contain {{problem}}, where the problem goes")
        if self.row > self.distill.sequence_length:
            raise ConfigError(
                f"Config.distill.sequence_length = {self.distill.sequence_length}: must have room for prompt_length ="
                f" {self.prompt_length} and rl.sampling.max_new_tokens = {self.rl.sampling.max_new_tokens}"
            )
        longest = max(self.distill.sequence_length, self.pretrain.sequence_length)
        if longest > self.model.max_position:
            raise ConfigError(f"Config.model.max_position = {self.model.max_position}: rows have {longest} tokens")

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.num_seeds)

    @property
    def samples_a_step(self) -> int:
        return self.rl.num_prompts * self.rl.group_size

    @property
    def row(self) -> int:
        """Tokens of a prompt and its completion."""
        return self.prompt_length + self.rl.sampling.max_new_tokens


CONFIG = Config()

PUBLISHED = (
    "Published (DeepSeek-R1, arXiv:2501.12948, pass@1): DeepSeek-R1-Distill-Qwen-32B, trained on samples of R1: AIME"
    " 2024 72.6, MATH-500 94.3, GPQA Diamond 62.1, LiveCodeBench 57.2; Qwen-32B-Zero, by RL alone: 47.0, 91.6, 55.0,"
    " 40.2."
)


class Student(NamedTuple):
    """A student's base: what all methods of a seed start from."""

    params: Arrays
    rest: Arrays


class Teacher(NamedTuple):
    definition: Definition
    tokenizer: Tokenizer
    source: ProblemSource
    """Asked as this model reads problems."""
    params: Arrays
    rest: Arrays


def same_tokens(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether each token id stands for the same in both."""
    ids = [(x.pad_id, x.bos_id, x.eos_id, sorted(x.stop_ids)) for x in (a, b)]
    return ids[0] == ids[1] and a.token_strings_V == b.token_strings_V


class Laboratory:
    """What the students share: the problems, the teacher, the compiled steps."""

    def __init__(self, cfg: Config, session: Session):
        from moe_jax.data.problems import load_problems
        from moe_jax.model.definition import Definition
        from moe_jax.rl.train import PolicyTrainer
        from moe_jax.training.start import keep_tokenizer

        self.cfg, self.session, self.run = cfg, session, session.run
        self.tokenizer = keep_tokenizer(self.run.dir, cfg.tokenizer)
        self.tokenizer.check_fits(cfg.model.vocab_size)
        self.definition = Definition.of(cfg.model)
        self.raw = load_problems(cfg.data, cfg.seed)
        self.source = self._asked(self.tokenizer)
        self.problems = [problem for problem in self.source.test if self._fits(problem)]
        if not self.problems:
            raise ConfigError(f"Config.prompt_length = {cfg.prompt_length}: no held-out problem is so short; raise it")
        self.teacher_cfg, self.teacher_tokenizer = self._teacher_config()
        self.trainer = PolicyTrainer(self.definition, cfg.rl, self.tokenizer, cfg.prompt_length)

    def _asked(self, tokenizer: Tokenizer) -> ProblemSource:
        from moe_jax.data.problem_text import AskedProblems

        chat = bool(self.cfg.init) and tokenizer.has_chat_template
        alone = not self.cfg.init or self.cfg.tokenizer == "byte"
        wording = self.cfg.prompt or (CHAT_PROMPT if chat else "" if alone else BASE_PROMPT)
        return AskedProblems(self.raw, wording, tokenizer, chat=chat) if wording else self.raw

    def _fits(self, problem: Problem) -> bool:
        from moe_jax.data.problem_text import encode_problem

        return len(encode_problem(problem, self.tokenizer)) <= self.cfg.prompt_length

    def _teacher_config(self) -> tuple[ModelConfig, Tokenizer]:
        """
        Raises:
            ConfigError: its tokens are other ones, and a method compares distributions over tokens.
        """
        from moe_jax.data.tokenizer import load_tokenizer
        from moe_jax.training.start import start_config

        cfg = self.cfg
        if not cfg.teacher:
            self.tokenizer.check_fits(cfg.teacher_model.vocab_size)
            return cfg.teacher_model, self.tokenizer
        model, name = start_config(cfg.teacher, self.run.dir)
        tokenizer = load_tokenizer(name)
        by_tokens = [method for method in cfg.methods if method in ("logits", "on_policy")]
        if by_tokens and not same_tokens(tokenizer, self.tokenizer):
            raise ConfigError(
                f"--methods {' '.join(by_tokens)}: the teacher {cfg.teacher} (tokenizer {name}, {tokenizer.vocab_size}"
                f" tokens) and the student {cfg.init or 'of this experiment'} (tokenizer {cfg.tokenizer},"
                f" {self.tokenizer.vocab_size} tokens) have different tokenizers, so that their distributions cannot be"
                " compared: distil by --methods sequences, or take models that share one"
            )
        return model, tokenizer

    @cached_property
    def teacher_definition(self) -> Definition:
        from moe_jax.model.definition import Definition

        return Definition.of(self.teacher_cfg)

    @cached_property
    def teacher(self) -> Teacher:
        """Given, or trained as in experiments/grpo_math.py: on the bases' text, then by reinforcement."""
        from moe_jax.rl.train import PolicyTrainer
        from moe_jax.training.start import start_weights

        cfg, definition = self.cfg, self.teacher_definition
        if cfg.teacher:
            source = self._asked(self.teacher_tokenizer)
            params, rest = start_weights(self.run, cfg.teacher, definition, self.session.mesh, phase="teacher")
            return Teacher(definition, self.teacher_tokenizer, source, params, rest)
        base = self._pretrain("teacher-base", definition, cfg.teacher_pretrain, cfg.seed)
        trainer = PolicyTrainer(definition, cfg.rl, self.tokenizer, cfg.prompt_length)
        state = self._reinforce("teacher-rl", trainer, base, cfg.seed)
        return Teacher(definition, self.tokenizer, self.source, state.params, state.rest)

    def _pretrain(self, phase: str, definition: Definition, train: TrainConfig, seed: int) -> TrainState:
        from moe_jax.data.problem_text import ProblemText
        from moe_jax.rng import random_key
        from moe_jax.training.supervised import SupervisedTrainer

        name = phase.split("-seed")[0]
        if name not in self._updates:
            self._updates[name] = SupervisedTrainer(definition, train, (self.tokenizer.pad_id,))
        text = ProblemText(self.raw, self.tokenizer, train.batch_size, train.sequence_length, phase)
        key = random_key(seed, "weights")
        return self._updates[name].from_scratch(self.session, phase, key, text, self.cfg.checkpoint)

    @cached_property
    def _updates(self) -> dict[str, Any]:
        """Compiled updates, by what they train."""
        return {}

    def _reinforce(self, phase: str, trainer: PolicyTrainer, base: Any, seed: int) -> TrainState:
        return trainer.train(
            self.session,
            phase,
            self._environment(seed),
            base.params,
            base.rest,
            seed=seed,
            checkpoint=self.cfg.checkpoint,
        )

    def _environment(self, seed: int) -> VerifiableEnvironment:
        from moe_jax.rl.environments import VerifiableEnvironment

        return VerifiableEnvironment(self.source, self.cfg.rl.reward, purpose=f"rl-seed{seed}", fits=self._fits)

    @cached_property
    def store(self) -> Path:
        """The teacher's samples, all of them, with its log-probabilities where the student's tokens are the same.

        Shard by shard: those that an earlier session wrote are kept.
        """
        from moe_jax.data.teacher_logits import StoreInfo, StoreWriter
        from moe_jax.rl.grpo import make_generator
        from moe_jax.training.distillation import make_scorer

        cfg = self.cfg
        with_logits = same_tokens(self.teacher_tokenizer, self.tokenizer)
        origin = f"{cfg.teacher or 'teacher-rl'}, {cfg.store_prompts} x {cfg.rl.group_size} samples, seed {cfg.seed}"
        info = StoreInfo(
            cfg.top_k if with_logits else 0, cfg.model.vocab_size, cfg.temperature, cfg.store_shards, origin
        )
        writer = StoreWriter(self.run.path("teacher_samples", "store.json").parent, info)
        if not (missing := writer.missing()):
            return writer.folder
        teacher = self.teacher
        sample = make_generator(teacher.definition, cfg.rl.sampling, teacher.tokenizer, cfg.rl.group_size)
        score = None
        if with_logits:
            score = make_scorer(
                teacher.definition, cfg.top_k, temperature=cfg.temperature, banned_ids=self.banned_for_teacher
            )
        for shard in missing:
            self.session.guard.check()
            writer.write(shard, self._shard(shard, sample, score))
        return writer.folder

    @property
    def banned_for_teacher(self) -> tuple[int, ...]:
        """Padding, and rows of its vocabulary that are no token: a student may have fewer of them."""
        tokenizer = self.teacher_tokenizer
        return (tokenizer.pad_id, *range(tokenizer.vocab_size, self.teacher_cfg.vocab_size))

    def _shard(self, shard: int, sample: Generator, score: Any) -> list[Any]:
        """The documents of a shard; the samples are kept as text too."""
        from moe_jax.data import DataError
        from moe_jax.data.problem_text import encode_problem
        from moe_jax.rl.environments import VerifiableEnvironment
        from moe_jax.rl.teacher_samples import retokenized_documents, scored_documents
        from moe_jax.sharding import put_batch

        cfg, teacher = self.cfg, self.teacher
        sizes = replace(cfg.rl, num_prompts=cfg.store_prompts // cfg.store_shards, num_minibatches=1)
        environments = [
            VerifiableEnvironment(source, cfg.rl.reward, purpose="teacher samples")
            for source in (teacher.source, self.source)
        ]
        problems, asked = (environment.problems(shard, sizes.num_prompts) for environment in environments)
        longest = max(len(encode_problem(problem, teacher.tokenizer)) for problem in problems)
        if longest > cfg.prompt_length:
            raise DataError(f"a prompt has {longest} tokens: raise --prompt-length = {cfg.prompt_length}")
        samples = self._rollout("teacher samples", shard, cfg.seed, environments[0], sample, teacher, sizes)
        self.run.write_rows(f"rollouts/teacher_samples/{shard:06d}.jsonl", samples.rows(shard))
        if score is None:
            return retokenized_documents(samples, asked, self.tokenizer, cfg.distill.sequence_length)
        return scored_documents(
            samples, lambda batch: score(teacher.params, teacher.rest, put_batch(batch, self.session.mesh))
        )

    def _rollout(
        self,
        purpose: str,
        step: int,
        seed: int,
        environment: VerifiableEnvironment,
        sample: Generator,
        model: Any,
        sizes: RLConfig,
    ) -> Rollout:
        """Scored samples of the teacher, or of a student, whose tokenizer is the experiment's."""
        from moe_jax.rl.grpo import rollout
        from moe_jax.rng import random_key

        return rollout(
            environment,
            sample,
            model.params,
            model.rest,
            getattr(model, "tokenizer", self.tokenizer),
            sizes,
            prompt_length=self.cfg.prompt_length,
            step=step,
            seed=seed,
            key=random_key(seed, purpose, step),
        )

    def base(self, seed: int) -> Student:
        """What the students of a seed start from: the given one, or a base that is trained on the problems' text."""
        from moe_jax.training.start import start_weights

        cfg = self.cfg
        if cfg.init:
            return Student(*start_weights(self.run, cfg.init, self.definition, self.session.mesh))
        state = self._pretrain(f"base-seed{seed}", self.definition, cfg.pretrain, seed)
        return Student(state.params, state.rest)

    def train(self, method: Method, seed: int, phase: str, make_base: Callable[[], Student]) -> Student:
        base = make_base()
        if method == "rl":
            state = self._reinforce(phase, self.trainer, base, seed)
        elif method == "on_policy":
            state = self._on_policy(phase, seed, base)
        else:
            state = self._offline(method, phase, seed, base)
        return Student(state.params, state.rest)

    def _update(self, method: Method, updates: int) -> tuple[Any, Any]:
        """(update, optimizer) of a method, compiled once for all seeds."""
        from moe_jax.training.distillation import make_distillation_loss
        from moe_jax.training.optimizer import make_optimizer
        from moe_jax.training.state import make_update
        from moe_jax.training.supervised import make_loss, make_totals

        if method not in self._updates:
            cfg, banned = self.cfg, (self.tokenizer.pad_id,)
            optimizer = make_optimizer(cfg.distill.optimizer, updates, self.definition)
            trained = self.definition.at(cfg.distill.precision)
            if method in ("logits", "on_policy"):
                beta = cfg.beta_logits if method == "logits" else cfg.beta_on_policy
                options = {"beta": beta, "temperature": cfg.temperature, "banned_ids": banned}
                loss = make_distillation_loss(trained, **options)
            else:
                loss = make_loss(trained, banned)
            totals, pieces = make_totals(trained), cfg.distill.accumulation_steps
            self._updates[method] = make_update(loss, totals, optimizer, accumulation_steps=pieces), optimizer
        return self._updates[method]

    def _offline(self, method: Method, phase: str, seed: int, base: Student) -> TrainState:
        """Training on text that is there: the bases' for comparison, or the teacher's samples."""
        from moe_jax.data.problem_text import ProblemText
        from moe_jax.data.teacher_logits import StoredBatches, TeacherLogits
        from moe_jax.training.state import start_state
        from moe_jax.training.supervised import train_supervised

        cfg, train = self.cfg, self.cfg.distill
        sizes = train.batch_size, train.sequence_length
        if method == "supervised":
            data: Any = ProblemText(self.source, self.tokenizer, *sizes, phase)
        else:
            stored = TeacherLogits(self.store, only_correct=method == "sequences")
            data = StoredBatches(stored, *sizes, self.tokenizer.pad_id, seed)
        update, optimizer = self._update(method, train.steps)
        state = start_state(self.definition, optimizer, *base, self.session.mesh)
        return train_supervised(self.session, phase, update, state, data, train.steps, cfg.checkpoint)

    def _on_policy(self, phase: str, seed: int, base: Student) -> TrainState:
        from moe_jax.rl.on_policy import distill_on_policy
        from moe_jax.training.distillation import make_scorer
        from moe_jax.training.state import start_state

        cfg, session, teacher, sample = self.cfg, self.session, self.teacher, self.trainer.sample
        rows = cfg.distill.batch_size
        update, optimizer = self._update("on_policy", cfg.rl.steps * (cfg.samples_a_step // rows))
        if "score" not in self._updates:
            options: dict[str, Any] = {"temperature": cfg.temperature, "banned_ids": self.banned_for_teacher}
            self._updates["score"] = make_scorer(teacher.definition, cfg.top_k, **options)
        environment = self._environment(seed)
        return distill_on_policy(
            session,
            phase,
            start_state(self.definition, optimizer, *base, session.mesh),
            lambda state, step: self._rollout(f"rollout/{phase}", step, seed, environment, sample, state, cfg.rl),
            partial(self._updates["score"], teacher.params, teacher.rest),
            update,
            cfg.rl,
            rows,
            seed,
            cfg.checkpoint,
        )

    def held_out(self, name: str, model: Callable[[], Any], teacher: bool = False) -> dict[str, Any]:
        """What the held-out problems say of a model, once: a resumed run neither trains nor samples it again."""
        from moe_jax.rl.evaluation import held_out

        source, problems, tokenizer = self.source, self.problems, self.tokenizer
        if teacher:
            source, tokenizer = self._asked(self.teacher_tokenizer), self.teacher_tokenizer
            keys = {problem.key for problem in self.problems}
            problems = [problem for problem in source.test if problem.key in keys]
        return held_out(
            self.session,
            name,
            model,
            self._sampler(teacher),
            source,
            problems,
            tokenizer,
            self.cfg.evaluation,
            prompt_length=self.cfg.prompt_length,
            seed=self.cfg.seed,
        )

    def _sampler(self, teacher: bool) -> Generator:
        from moe_jax.rl.grpo import make_generator

        definition = self.teacher_definition if teacher else self.definition
        tokenizer = self.teacher_tokenizer if teacher else self.tokenizer
        name = f"sampler-{'teacher' if teacher else 'student'}"
        if name not in self._updates:
            cfg = self.cfg
            self._updates[name] = make_generator(definition, cfg.rl.sampling, tokenizer, cfg.evaluation.samples)
        return self._updates[name]


def experiment(cfg: Config, session: Session) -> None:
    lab = Laboratory(cfg, session)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in ("base", *cfg.methods)}
    taught = any(method in ("logits", "sequences", "on_policy") for method in cfg.methods)
    teacher = lab.held_out("teacher", lambda: lab.teacher, teacher=True) if taught else None
    for seed in cfg.seeds:  # a seed's students one after another: comparable before the last seed has come
        base = cache(partial(lab.base, seed))
        results["base"].append(lab.held_out(f"base-seed{seed}", base))
        for method in cfg.methods:
            phase = f"{method}-seed{seed}"
            results[method].append(lab.held_out(phase, partial(lab.train, method, seed, phase, base)))
    if session.run.writes:
        report(cfg, session.run, results, teacher, lab.teacher_cfg)


class Cost(NamedTuple):
    """FLOPs of models' products, by `analysis.flops`; padding that is computed counts."""

    student: float
    """The student's: its base, its samples, its training."""
    teacher: float
    """The teacher's for this student: samples and scores, not its training."""


def training_cost(model: ModelConfig, train: TrainConfig) -> float:
    tokens = train.steps * train.batch_size * train.sequence_length
    return tokens * training_flops_per_token(model, train.sequence_length, include_mtp=True)


def sampling_cost(cfg: Config, model: ModelConfig, lengths: Sequence[float], prompts: int) -> float:
    """Of batches of `prompts` prompts, each sampled `rl.group_size` times up to the batch's longest completion."""
    tokens = sum(prompts * (cfg.prompt_length + cfg.rl.group_size * length) for length in lengths)
    return tokens * training_flops_per_token(model, cfg.row) / 3


def sampled_steps_cost(cfg: Config, run: Run, model: ModelConfig, phase: str, passes: int) -> float:
    """Of a phase that samples and trains on its samples; a step's rows go through the model `passes` times forward."""
    lengths = [row["completions/max_length"] for row in run.metrics(phase)]
    rows = len(lengths) * cfg.samples_a_step * cfg.row
    forward = training_flops_per_token(model, cfg.row) / 3
    return sampling_cost(cfg, model, lengths, cfg.rl.num_prompts) + passes * rows * forward


def costs(cfg: Config, run: Run, name: str, seed: int, teacher: ModelConfig) -> Cost:
    """What a student cost."""
    base = 0.0 if cfg.init else training_cost(cfg.model, cfg.pretrain)
    reference = 1 if cfg.rl.loss.beta else 0
    scores = training_flops_per_token(teacher, cfg.row) / 3 * cfg.row
    if name == "base":
        return Cost(base, 0.0)
    if name == "rl":
        return Cost(base + sampled_steps_cost(cfg, run, cfg.model, f"rl-seed{seed}", 3 + reference), 0.0)
    if name == "on_policy":
        student = sampled_steps_cost(cfg, run, cfg.model, f"on_policy-seed{seed}", 3)
        return Cost(base + student, cfg.rl.steps * cfg.samples_a_step * scores)
    student = base + training_cost(cfg.model, cfg.distill)
    if name == "supervised":
        return Cost(student, 0.0)
    store = sampling_cost(
        cfg, teacher, [cfg.rl.sampling.max_new_tokens] * cfg.store_shards, cfg.store_prompts // cfg.store_shards
    )
    return Cost(student, store + (cfg.store_prompts * cfg.rl.group_size * scores if name == "logits" else 0))


def report(
    cfg: Config,
    run: Run,
    results: Mapping[str, Sequence[Mapping[str, Any]]],
    teacher: Mapping[str, Any] | None,
    teacher_cfg: ModelConfig,
) -> None:
    """Writes summary.json, table.md and the plots, and prints the table."""
    from moe_jax.analysis.distillation_report import TITLES, plot, table
    from moe_jax.analysis.seed_statistics import mean_over_seeds

    def per_seed(name: str) -> np.ndarray:
        return np.array([result["pass_at_1"]["mean"] for result in results[name]])

    students = {}
    for name, found in results.items():
        spent = [costs(cfg, run, name, seed, teacher_cfg) for seed in cfg.seeds]
        students[name] = {
            "title": TITLES[name],
            "pass_at_1": mean_over_seeds(per_seed(name)),
            "per_seed": per_seed(name).tolist(),
            "against_rl": mean_over_seeds(per_seed(name) - per_seed("rl")) if "rl" in results else None,
            "worked": float(np.mean([result["worked"] for result in found])),
            "mean_length": float(np.mean([result["mean_length"] for result in found])),
            "student_flops": float(np.mean([cost.student for cost in spent])),
            "teacher_flops": float(np.mean([cost.teacher for cost in spent])),
        }
    trained = None  # nothing is known of a given teacher's training
    if teacher and not cfg.teacher:
        reinforced = sampled_steps_cost(cfg, run, teacher_cfg, "teacher-rl", 3 + bool(cfg.rl.loss.beta))
        trained = training_cost(teacher_cfg, cfg.teacher_pretrain) + reinforced
    sizes = {"student": parameter_counts(cfg.model), "teacher": parameter_counts(teacher_cfg)}
    summary = {
        "seeds": list(cfg.seeds),
        "students": students,
        "teacher": {"pass_at_1": teacher["pass_at_1"], "training_flops": trained} if teacher else None,
        "parameters_total": {name: counts.total for name, counts in sizes.items()},
        "parameters_active": {name: counts.active for name, counts in sizes.items()},
        "seconds": run.metrics()[-1]["elapsed"],
    }
    run.write_json("summary.json", summary)
    text = table(summary)
    run.path("table.md").write_text(text + "\n", encoding="utf-8")
    phases = {name: [run.metrics(f"{name}-seed{seed}") for seed in cfg.seeds] for name in ("on_policy", "rl")}
    accuracies = {
        name: np.array([[row["rewards/accuracy/mean"] for row in rows] for rows in found])
        for name, found in phases.items()
        if all(found)
    }
    plots = plot(run.dir / "plots", summary, accuracies)
    print(
        f"\n{text}\n\nHeld-out pass@1, mean and 95 % interval (Student's t) over {cfg.num_seeds} seeds of the students;"
        f" there is one teacher.\n{PUBLISHED}\n\nParameters: {sizes['student'].total:,} of the student,"
        f" {sizes['teacher'].total:,} of the teacher ({sizes['teacher'].active:,} active). {summary['seconds']:.0f} s."
        f"\nRun folder: {run.dir}\nPlots: {', '.join(str(path) for path in plots)}"
    )


if __name__ == "__main__":
    arguments = [re.sub(r"^--student(?=$|=)", "--init", argument) for argument in sys.argv[1:]]
    main("distill", CONFIG, experiment, arguments)
