"""Reasoning by reinforcement alone: a base model, GRPO from verifiable rewards, and two controls.

    python -m experiments.grpo_math [--seed 1] [--data.source gsm8k --data.path DIR] [--help]
    python -m experiments.grpo_math --init Qwen2.5-0.5B-Instruct --data.source gsm8k --data.path DIR

Phases: a tiny DeepSeek-style model (MLA, sparse MoE, MTP) learns from text that mixes worked and guessed solutions;
GRPO trains it from accuracy and format rewards (R1-Zero, arXiv:2501.12948); the controls are as much further supervised
training of the same base, and the same reinforcement with a random reward. Held-out problems decide.

Hardware: 2 CPU cores, 24 GB. Time: 3 to 6 minutes. Result, pass@1 at temperature 1 on 1,024
held-out problems with 8 samples each, 95 % intervals below ± .012:

    seed   base   after GRPO   more supervised training   random reward
    0      .352   .849         .360                       .069
    1      .363   .848         .371                       .083
    2      .335   .813         .344                       .043

With --init, GRPO starts from a Hugging Face folder, a repository, or another run's model (`from_checkpoint` has the
batch, lengths, learning rate, expected memory and time); nothing was measured of that yet.

Mostly the selection of a strategy: worked solutions go from .39 to .89 of the samples, and the base is right in .77 to
.82 of those; partly a better skill, since afterwards .90 to .95 of them are right. Answers grow from 19 to 34 tokens.
Training amplifies rounding: earlier versions came to .881, .849 and .820, and to .850, .830 and .811. What a random
reward leaves is chance (.335, .166 and .084 in an earlier version): here the working goes wrong, the guesses stay.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

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
from moe_jax.presets import tiny_moe
from moe_jax.training.experiment import Session, main

if TYPE_CHECKING:
    from moe_jax.data.problem_text import ProblemText
    from moe_jax.data.problems import Problem
    from moe_jax.training.run import Run
    from moe_jax.training.state import TrainState


@dataclass(frozen=True)
class Config:
    seed: int = 0
    run_dir: str = ""
    """Where everything goes; empty: runs/grpo_math-seed<seed>. The same command resumes."""
    init: str = ""
    """A Hugging Face folder or repository, or the folder of another run: GRPO on its model, without pre-training."""
    prompt: str = ""
    """What the model is asked, with {problem} for the problem. Empty: the problem alone; with --init CHAT_PROMPT, the
    user's message, where there is a chat template, and BASE_PROMPT where there is none."""
    preset: str = "tiny_moe"
    """A named model (`moe_jax/presets.py`), which the flags --model.… then change."""
    tokenizer: str = "byte"
    """"byte", or a path to a tokenizer.json or its folder."""
    prompt_length: int = 20
    """Tokens of room for a prompt. Problems with longer ones are skipped, counted and reported."""
    controls: bool = True
    """Run the two controls."""
    model: ModelConfig = field(default_factory=tiny_moe)
    data: ProblemConfig = ProblemConfig(test_problems=1024)
    pretrain: TrainConfig = TrainConfig(
        steps=450,
        batch_size=64,
        sequence_length=64,
        optimizer=OptimizerConfig(name="muon", learning_rate=2e-2, warmup_steps=30, final_fraction=0.1),
    )
    rl: RLConfig = RLConfig(
        steps=40,
        num_prompts=32,
        group_size=8,
        sampling=SamplingConfig(max_new_tokens=48),
        loss=PolicyLossConfig(beta=1e-3),
        optimizer=OptimizerConfig(learning_rate=3e-4, beta2=0.98, warmup_steps=3, final_fraction=0.05),
    )
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig(every=20)
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        if self.prompt and "{problem}" not in self.prompt:
            raise ConfigError(f"Config.prompt = {self.prompt!r}: must contain {{problem}}, where the problem goes")
        if not self.init and self.pretrain.sequence_length > self.model.max_position:
            raise ConfigError(
                f"Config.pretrain.sequence_length = {self.pretrain.sequence_length}: must not exceed"
                f" model.max_position = {self.model.max_position}"
            )
        room = self.prompt_length + self.rl.sampling.max_new_tokens
        if room > self.model.max_position:
            raise ConfigError(
                f"Config.prompt_length = {self.prompt_length} and rl.sampling.max_new_tokens ="
                f" {self.rl.sampling.max_new_tokens}: together {room} tokens, more than model.max_position ="
                f" {self.model.max_position}; raise it or lower one of them"
            )


CONFIG = Config()


def _longer(cfg: Config, prompt: int, completion: int, row: int, rows: int) -> Config:
    """The same experiment with room for longer texts."""
    return replace(
        cfg,
        prompt_length=prompt,
        pretrain=replace(cfg.pretrain, sequence_length=row, batch_size=rows),
        rl=replace(cfg.rl, num_prompts=8, sampling=replace(cfg.rl.sampling, max_new_tokens=completion)),
        evaluation=replace(cfg.evaluation, batch_size=64),
    )


_SHORT = replace(CONFIG, data=replace(CONFIG.data, min_terms=3, max_terms=4))
CONFIGS = {
    "arithmetic": CONFIG,
    "words": _longer(_SHORT, prompt=128, completion=64, row=256, rows=16),
    "countdown": _longer(_SHORT, prompt=40, completion=80, row=128, rows=32),
    "gsm8k": _longer(CONFIG, prompt=512, completion=256, row=768, rows=8),
    "math": _longer(CONFIG, prompt=512, completion=512, row=1024, rows=6),
    "reasoning_gym": _longer(CONFIG, prompt=384, completion=64, row=512, rows=8),
    "code": _longer(CONFIG, prompt=160, completion=192, row=384, rows=10),
}
"""Defaults by `--data.source`."""

CHAT_PROMPT = (
    "{problem}\n\nFirst reason step by step inside <think> and </think>, then give the final answer, a number and"
    " nothing else, inside <answer> and </answer>."
)
BASE_PROMPT = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant"
    " first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning"
    " process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think>"
    " reasoning process here </think> <answer> answer here </answer>. User: {problem}. Assistant:"
)
"""DeepSeek-R1-Zero's (arXiv:2501.12948, table 1)."""


def from_checkpoint(cfg: Config) -> Config:
    """Defaults with --init: GRPO of Qwen2.5-0.5B on GSM8K with one GPU of 80 GB.

    32 problems of 8 samples a step as in R1-Zero with half as many samples, learning rate 1e-6 (arXiv:2402.03300), KL
    weight 1e-3 (R1-Zero's). 200 steps are .86 epochs of GSM8K. A right answer counts without the think tags: the model
    was not trained to write them.

    Memory (`analysis.rl_cost`, computed, not measured): 20 GB. The state is 13.8 GB, seven times float32 weights of
    .49 B parameters: weights, two moments, two gradients, start, reference. Sampling 256 rows of 896 tokens takes
    3.4 GB (12 KB of cache a token); a micro-batch of 32 rows 6.4 GB, of which attention's three copies of one layer's
    14 x 896 x 896 float32 scores a row are 4.3 GB. Time: 6 s a step on an H100 at 30 % of its peaks, 20 minutes.
    """
    return replace(
        cfg,
        prompt_length=384,
        controls=False,
        model=replace(cfg.model, remat="block"),
        rl=RLConfig(
            steps=200,
            num_prompts=32,
            group_size=8,
            accumulation_steps=8,
            sampling=SamplingConfig(max_new_tokens=512),
            reward=RewardConfig(accuracy_needs_format=False),
            loss=PolicyLossConfig(beta=1e-3),
            optimizer=OptimizerConfig(learning_rate=1e-6, schedule="constant", beta2=0.99),
        ),
        evaluation=EvaluationConfig(samples=4, batch_size=64),
        checkpoint=CheckpointConfig(every=50, keep=1),
    )


class Laboratory:
    """What the phases share: the problems, the model, the compiled steps."""

    def __init__(self, cfg: Config, session: Session):
        from moe_jax.data.problem_text import AskedProblems, encode_problem
        from moe_jax.data.problems import load_problems
        from moe_jax.model.definition import Definition
        from moe_jax.rl.environments import VerifiableEnvironment
        from moe_jax.rl.grpo import make_generator
        from moe_jax.rl.train import PolicyTrainer
        from moe_jax.training.start import keep_tokenizer

        self.cfg, self.session, self.run = cfg, session, session.run
        self.tokenizer = keep_tokenizer(self.run.dir, cfg.tokenizer)
        self.tokenizer.check_fits(cfg.model.vocab_size)
        self.definition = Definition.of(cfg.model)

        # What there is to learn; whatever is wrong with it shows before minutes of training.
        self.source = load_problems(cfg.data, cfg.seed)
        chat = bool(cfg.init) and self.tokenizer.has_chat_template
        prompt = cfg.prompt or (CHAT_PROMPT if chat else BASE_PROMPT if cfg.init else "")
        if prompt:
            self.source = AskedProblems(self.source, prompt, self.tokenizer, chat=chat)

        def fits(problem: Problem) -> bool:
            return len(encode_problem(problem, self.tokenizer)) <= cfg.prompt_length

        self.problems = [problem for problem in self.source.test if fits(problem)]
        if not self.problems:
            raise ConfigError(f"Config.prompt_length = {cfg.prompt_length}: no held-out problem is so short; raise it")
        self.environments = {
            "grpo": VerifiableEnvironment(self.source, cfg.rl.reward, fits=fits),
            "random_reward": VerifiableEnvironment(self.source, replace(cfg.rl.reward, random=True), fits=fits),
        }
        self.environments["grpo"].problems(0, cfg.rl.num_prompts)
        self.texts: dict[str, ProblemText] = {}
        if not cfg.init:
            self._prepare_pretraining()
        self.trainer = PolicyTrainer(self.definition, cfg.rl, self.tokenizer, cfg.prompt_length)
        self.sample = make_generator(self.definition, cfg.rl.sampling, self.tokenizer, cfg.evaluation.samples)

    def _prepare_pretraining(self) -> None:
        """The texts of the base and of the supervised control, and their compiled step."""
        from moe_jax.data.problem_text import ProblemText
        from moe_jax.training.supervised import SupervisedTrainer

        cfg = self.cfg
        self.texts = {
            purpose: ProblemText(
                self.source, self.tokenizer, cfg.pretrain.batch_size, cfg.pretrain.sequence_length, purpose
            )
            for purpose in ("base", "control")
        }
        self.pretrainer = SupervisedTrainer(self.definition, cfg.pretrain, banned_ids=(self.tokenizer.pad_id,))

    def start(self) -> TrainState:
        """The model that GRPO starts from: a checkpoint's, or the base that is trained here."""
        import jax.numpy as jnp

        from moe_jax.training.start import start_weights
        from moe_jax.training.state import TrainState

        if not self.cfg.init:
            return self.pretrain()
        params, rest = start_weights(self.run, self.cfg.init, self.definition, self.session.mesh)
        return TrainState(jnp.int32(0), params, rest, ())

    def pretrain(self) -> TrainState:
        """The base model."""
        from moe_jax.rng import random_key

        cfg, key = self.cfg, random_key(self.cfg.seed, "weights")
        return self.pretrainer.from_scratch(self.session, "base", key, self.texts["base"], cfg.checkpoint)

    def pretrain_longer(self, base: TrainState) -> TrainState:
        """A control: the base's training goes on for as many completion tokens as GRPO drew."""
        import jax
        import jax.numpy as jnp

        from moe_jax.training.run import RunError
        from moe_jax.training.supervised import train_supervised

        cfg, session, text = self.cfg, self.session, self.texts["control"]
        rows = self.run.metrics("grpo")
        if len(rows) != cfg.rl.steps:
            raise RunError(f"{self.run.dir}/metrics.jsonl has {len(rows)} of {cfg.rl.steps} rows of grpo: restore it")
        start = text.get_state()
        tokens_a_batch = float(np.sum(next(text)["loss_mask_BS"]))
        text.set_state(start)
        steps = max(round(sum(row["num_tokens"] for row in rows) / tokens_a_batch), 1)
        copy = jax.tree.map(jnp.copy, base)
        return train_supervised(session, "control", self.pretrainer.update, copy, text, steps, cfg.checkpoint)

    def reinforce(self, phase: str, base: TrainState) -> TrainState:
        """GRPO on a copy of the base; `phase` names the environment, and so the reward."""
        cfg = self.cfg
        return self.trainer.train(
            self.session,
            phase,
            self.environments[phase],
            base.params,
            base.rest,
            seed=cfg.seed,
            checkpoint=cfg.checkpoint,
        )

    def held_out(self, name: str, state: TrainState) -> dict[str, Any]:
        """Evaluates a model on the held-out problems, once: a resumed run reads the result."""
        from moe_jax.rl.evaluation import held_out

        return held_out(
            self.session,
            name,
            lambda: state,
            self.sample,
            self.source,
            self.problems,
            self.tokenizer,
            self.cfg.evaluation,
            prompt_length=self.cfg.prompt_length,
            seed=self.cfg.seed,
        )

    def too_long(self) -> dict[str, int]:
        """How much had no room (`prompt_length`, `pretrain.sequence_length`), in this session."""
        return {
            "held_out_problems_skipped": len(self.source.test) - len(self.problems),
            "training_problems_skipped": sum(environment.skipped for environment in self.environments.values()),
            "documents_skipped": sum(text.skipped for text in self.texts.values()),
        }


def experiment(cfg: Config, session: Session) -> None:
    lab = Laboratory(cfg, session)
    if cfg.init:
        print(expected_cost(cfg), flush=True)
    base = lab.start()
    results = {"before": lab.held_out("before", base)}
    results["after"] = lab.held_out("grpo", lab.reinforce("grpo", base))
    if cfg.controls and not cfg.init:
        results["control"] = lab.held_out("control", lab.pretrain_longer(base))
    if cfg.controls:
        results["random_reward"] = lab.held_out("random_reward", lab.reinforce("random_reward", base))
    if session.run.writes:
        report(cfg, session.run, results, lab.too_long())


def expected_cost(cfg: Config) -> str:
    """Memory and time of a step, computed, not measured; the time on one H100 at 30 % of its peaks."""
    from moe_jax.analysis.rl_cost import policy_step_cost

    cost = policy_step_cost(cfg.model, cfg.rl, cfg.prompt_length)
    seconds = cost.seconds(0.3 * 989e12, 0.3 * 3.35e12)
    return (
        f"Estimate: {cost.peak_bytes / 1e9:.1f} GB ({cost.state_bytes / 1e9:.1f} state,"
        f" {cost.sampling_bytes / 1e9:.1f} sampling, {cost.update_bytes / 1e9:.1f} update);"
        f" {seconds:.1f} s a step, {cfg.rl.steps * seconds / 60:.0f} min for {cfg.rl.steps} steps on an H100 at 30 %"
        " of its peaks, evaluations aside."
    )


def report(cfg: Config, run: Run, results: dict[str, Any], too_long: dict[str, int]) -> None:
    """Writes summary.json and the plots, and prints the table."""
    from moe_jax.analysis.flops import parameter_counts
    from moe_jax.analysis.plots import plot_grpo

    parameters, grpo = parameter_counts(cfg.model), run.metrics("grpo")
    summary = {f"pass_at_1_{name}": result["pass_at_1"] for name, result in results.items()}
    consensus = f"cons_at_{cfg.evaluation.samples}"
    summary |= {f"{consensus}_{name}": result[consensus] for name, result in results.items()}
    for figure in ("format", "worked", "mean_length", "accuracy_worked", "accuracy_guessed"):
        summary |= {f"{figure}_{name}": result[figure] for name, result in results.items()}
    summary |= {
        **too_long,
        "seed": cfg.seed,
        "seconds": run.metrics()[-1]["elapsed"],
        "parameters_total": parameters.total + parameters.mtp,
        "parameters_active": parameters.active,
        "completion_tokens_per_second": float(np.median([row["tokens_per_second"] for row in grpo])),
        "sampling_logp_difference_max": max(
            (row["sampling/sampling_logp_difference/max"] for row in grpo if not row["update_skipped"]), default=None
        ),
    }
    run.write_json("summary.json", summary)
    plots = plot_grpo(run.metrics(), run.dir / "plots", {name: result["pass_at_1"] for name, result in results.items()})

    titles = {
        "before": "base model",
        "after": "after GRPO",
        "control": "control: more supervised training",
        "random_reward": "control: random reward",
    }
    print(f"\n{'':36}pass@1 (95 % interval)    {consensus.replace('_at_', '@'):8}  worked  length")
    for name, result in results.items():
        p = result["pass_at_1"]
        print(
            f"{titles[name]:36}{p['mean']:.3f} [{p['low']:.3f}, {p['high']:.3f}]      {result[consensus]['mean']:.3f}"
            f"     {result['worked']:.2f}    {result['mean_length']:.1f}"
        )
    before = results["before"]
    for name, count in too_long.items():
        if count:
            print(f"{name}: {count}, too long for their room")
    print(
        f"\nThe base is right in {before['accuracy_worked']:.2f} of the completions that show their working and in"
        f" {before['accuracy_guessed']:.2f} of the others."
        f"\n{before['pass_at_1']['problems']} held-out problems, {summary['parameters_total']:,} parameters"
        f" ({summary['parameters_active']:,} active), {summary['seconds']:.0f} s, seed {cfg.seed}."
        f"\nRun folder: {run.dir}\nPlots: {', '.join(str(path) for path in plots)}"
    )


if __name__ == "__main__":
    main("grpo_math", CONFIGS, experiment, from_init=from_checkpoint)
