"""Multi-token prediction: what training with it does to the model, and how much of its drafts the model accepts.

    python -m experiments.mtp [--num-seeds 3] [--depths 1 2] [--parallel-depths 1] [--help]

One tiny sparse model is trained on the same batches without further heads (D = 0), with V3's causal chain of D modules
(DeepSeek-V3 §2.2) and with D heads in parallel (arXiv:2404.19737). The modules are dropped at evaluation. D = 0 is
trained twice: on as many tokens as the others, and on more, so many that the training FLOPs are equal: for each D those
of the costlier kind. λ falls from `model.mtp.loss_coef` to `model.mtp.late_loss_coef` after 10/14.8 of the tokens, as
V3's did. All variants of a seed start from the same weights of the trunk.

Half of each batch's rows are text, the other half sums, `58+64?<answer>122</answer>`, of which the answer alone is
predicted. A sum is written from the left, and its first digits hang on a carry from the last one, which comes after
them: that is the planning. Reported are

- bits per byte of the main head on held-out text;
- the share of held-out sums that the main head answers right, greedily, and the share with the right first digit;
- the rate at which the main head accepts the modules' drafts on held-out text, by how far ahead they are: Σ min(p, q)
  for sampling, equal argmax for greedy decoding. The text is given up to the draft, so that a draft is judged after the
  text, not after other drafts. Tokens per pass are 1 + Σ_k Π_{j ≤ k} accepted_j: all drafts of a position in one pass.

Over seeds with Student's 95 % intervals; differences are within a seed.

Hardware: 2 CPU cores, 69 minutes beside other work. Result, seeds 0 to 2, 614,400 tokens a run at equal tokens:

                   bits per byte   difference to D = 0 at   drafts accepted, sampling   tokens
                                   equal tokens / FLOPs     first, second               per pass
    D = 0          3.067 ± .066
    D = 1 causal   3.023 ± .095    -.044 ± .040 / +.221 ± .121    72.2 ± 2.6 %                1.72 ± .03
    D = 2 causal   3.013 ± .108    -.055 ± .063 / +.416 ± .116    73.1 ± 3.3, 67.5 ± 3.4 %    2.24 ± .08
    D = 1 parallel 3.032 ± .045    -.035 ± .048 / +.230 ± .143    61.1 ± 2.0 %                1.61 ± .02

At equal tokens a causal module helps the main head by a little, more than noise for D = 1 alone; at equal FLOPs every
module loses to more tokens, which a model this far from convergence needs most. Published (DeepSeek-V3, table 4, equal
tokens, 15.7B and 228.7B): Pile bits per byte .729 → .729 and .658 → .657, most tasks better. So the gain in loss is
larger here, and none is seen on the task: on the sums all variants are within noise (D = 0 91.6 ± 19.7 % right, D = 2
62.6 ± 100.8: one seed of three had not learned the carry yet). Published acceptance (V3 §5.4.3): 85 to 90 %, 1.8 times
the tokens per second. The causal chain's first draft beats the parallel head's by 11 points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moe_jax.analysis.flops import training_flops_per_token
from moe_jax.analysis.tables import markdown
from moe_jax.config import (
    CheckpointConfig,
    ConfigError,
    MeshConfig,
    ModelConfig,
    MTPConfig,
    OptimizerConfig,
    ProblemConfig,
    TextConfig,
    TrainConfig,
)
from moe_jax.presets import tiny_moe
from moe_jax.training.experiment import Session, main

if TYPE_CHECKING:
    from pathlib import Path

    import jax

    from moe_jax.data.problem_text import ProblemText
    from moe_jax.data.text import TrainBatches
    from moe_jax.model.definition import Arrays, Definition
    from moe_jax.model.transformer import Transformer
    from moe_jax.training.run import Run
    from moe_jax.training.state import TrainState, Update

Results = Mapping[str, Sequence[Mapping[str, Any]]]
"""Results of a variant, by its name: one for each seed."""


class Variant(NamedTuple):
    """How a model is trained."""

    name: str
    title: str
    mtp: MTPConfig
    steps: int
    ahead: int
    """Tokens that it predicts ahead; of a run without modules, those of the variants whose FLOPs it has."""


@dataclass(frozen=True)
class Config:
    seed: int = 0
    """The first of the seeds; the others follow it."""
    num_seeds: int = 3
    run_dir: str = ""
    """Where everything goes; empty: runs/mtp-seed<seed>. The same command resumes."""
    depths: tuple[int, ...] = (1, 2)
    """D of the causal chains."""
    parallel_depths: tuple[int, ...] = (1,)
    """D of the parallel heads."""
    init: str = ""
    """A Hugging Face folder or repository, or the folder of another run: a model whose trunk all variants start from.
    Its tokenizer comes with it; modules are new."""
    preset: str = ""
    """A named model (`moe_jax/presets.py`) in place of this file's."""
    tokenizer: str = "byte"
    """"byte", or a path to a tokenizer.json or its folder."""
    model: ModelConfig = field(default_factory=tiny_moe)
    """The variants replace the depth, the kind and the tokens of λ of its `mtp`."""
    data: TextConfig = TextConfig()
    problems: ProblemConfig = ProblemConfig(
        min_terms=2,
        max_terms=2,
        max_term=99,
        worked_fraction=0.0,
        guess_std=0.0,
        bare_fraction=1.0,
        test_problems=1000,
    )
    """The default: sums of two numbers, without working or mistakes."""
    problem_rows: int = 8
    """Rows of a batch that hold problems; the others are text."""
    train: TrainConfig = TrainConfig(
        steps=300,
        batch_size=16,
        sequence_length=128,
        optimizer=OptimizerConfig(name="muon", learning_rate=1e-2, warmup_steps=30, final_fraction=0.1),
    )
    """`steps` are those at equal tokens."""
    validation_batches: int = 60
    """Batches of the held-out text to validate on, spread evenly over it; 0 takes all."""
    checkpoint: CheckpointConfig = CheckpointConfig(keep=1)
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        if self.num_seeds < 1:
            raise ConfigError(f"Config.num_seeds = {self.num_seeds}: must be at least 1")
        if self.validation_batches < 0:
            raise ConfigError(f"Config.validation_batches = {self.validation_batches}: must be 0 (all) or greater")
        for name in ("depths", "parallel_depths"):
            values = getattr(self, name)
            if len(set(values)) < len(values) or min(values, default=1) < 1:
                raise ConfigError(f"Config.{name} = {values}: must be 1 or more, and each once; D = 0 is always there")
        if not self.depths + self.parallel_depths:
            raise ConfigError("Config.depths = (): name at least one, here or in parallel_depths")
        if not 0 < self.problem_rows < self.train.batch_size:
            raise ConfigError(
                f"Config.problem_rows = {self.problem_rows}: must lie between 0 and train.batch_size ="
                f" {self.train.batch_size}, some rows are text"
            )
        if self.train.sequence_length > self.model.max_position:
            raise ConfigError(
                f"Config.train.sequence_length = {self.train.sequence_length}: must not exceed model.max_position ="
                f" {self.model.max_position}"
            )

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.num_seeds)

    @property
    def step_tokens(self) -> int:
        return self.train.batch_size * self.train.sequence_length


_LATE = 10 / 14.8
"""DeepSeek-V3 §4.2: λ changes after 10T of 14.8T tokens."""


def variants(cfg: Config) -> list[Variant]:
    """D = 0 and all heads at equal tokens, then D = 0 at the FLOPs of each number of tokens ahead."""
    without = replace(cfg.model.mtp, depth=0, kind="causal", hidden_first=False)
    found = [Variant("none", "D = 0", without, cfg.train.steps, 0)]
    late = round(_LATE * cfg.train.steps * cfg.step_tokens)
    for depth in cfg.depths:
        mtp = replace(cfg.model.mtp, depth=depth, kind="causal", late_after_tokens=late)
        found.append(Variant(f"causal_{depth}", f"D = {depth}, causal", mtp, cfg.train.steps, depth))
    for depth in cfg.parallel_depths:
        mtp = replace(without, depth=depth, kind="parallel", late_after_tokens=late)
        found.append(Variant(f"parallel_{depth}", f"D = {depth}, parallel", mtp, cfg.train.steps, depth))
    for depth in sorted({*cfg.depths, *cfg.parallel_depths}):
        most = max(training_flops(cfg, variant) for variant in found if variant.mtp.depth == depth)
        steps = round(most / training_flops(cfg, found[0]) * cfg.train.steps)
        found.append(Variant(f"none_flops_{depth}", f"D = 0, FLOPs of D = {depth}", without, steps, depth))
    return found


def training_flops(cfg: Config, variant: Variant) -> int:
    """Of the whole training, modules included."""
    model = replace(cfg.model, mtp=variant.mtp)
    per_token = training_flops_per_token(model, cfg.train.sequence_length, include_mtp=True)
    return variant.steps * cfg.step_tokens * per_token


CONFIG = Config()

FIGURES = {
    "bits_per_byte": "bits per byte",
    "accuracy": "problems right (%)",
    "first_accuracy": "first token right (%)",
}
"""What is compared, and its title."""


class Mixture:
    """Batches whose first rows are text and whose last rows are problems, of which only the answers are predicted."""

    def __init__(self, text: TrainBatches, problems: ProblemText):
        self.text, self.problems = text, problems

    def __next__(self) -> dict[str, np.ndarray]:
        text, problems = next(self.text), next(self.problems)
        text["loss_mask_BS"] = np.ones_like(text["tokens_BS"])
        return {name: np.concatenate([text[name], problems[name]]) for name in problems}

    def get_state(self) -> dict[str, Any]:
        return {"text": self.text.get_state(), "problems": self.problems.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        self.text.set_state(state["text"])
        self.problems.set_state(state["problems"])


class Compiled(NamedTuple):
    """The programs of a variant."""

    update: Update
    init: Callable[[jax.Array], TrainState]
    accepted: Callable[..., jax.Array] | None
    """`make_acceptance`, if there are modules."""


class Laboratory:
    """What the phases share: the data, and the compiled evaluations."""

    def __init__(self, cfg: Config, session: Session):
        from moe_jax.data.text import TextCorpus, spread_validation_batches
        from moe_jax.model.definition import Definition
        from moe_jax.training.start import keep_tokenizer
        from moe_jax.training.supervised import BitsPerByte

        self.cfg, self.session, self.run = cfg, session, session.run
        self.tokenizer = keep_tokenizer(self.run.dir, cfg.tokenizer)
        self.tokenizer.check_fits(cfg.model.vocab_size)
        self.banned = (self.tokenizer.pad_id,)
        self.corpus = TextCorpus.load(cfg.data.path)
        sizes = cfg.train.batch_size, cfg.train.sequence_length
        self.validation = spread_validation_batches(self.corpus, self.tokenizer, *sizes, cfg.validation_batches)
        self.main = Definition.of(replace(cfg.model, mtp=variants(cfg)[0].mtp))
        self.bits_per_byte = BitsPerByte(self.main, self.tokenizer.token_bytes_V, self.banned)
        self.mistakes = make_mistakes(self.main, self.banned)
        self.programs: dict[str, Compiled] = {}
        self.started: Arrays | None = None

    def result(self, variant: Variant, seed: int) -> dict[str, Any]:
        """Trains and evaluates a variant, once: a resumed run reads the result."""
        phase = f"{variant.name}-seed{seed}"
        file = f"evaluations/{phase}.json"
        if (known := self.run.result(file)) is not None:
            return known
        params, rest = self.train(variant, seed, phase)
        rows = self.run.metrics(phase)
        result = self.evaluate(variant, seed, phase, params, rest)
        result["seconds"] = sum(row["step_time"] for row in rows)
        self.run.rewind(f"{phase}-validation", 0)  # it was logged already if the run was killed just then
        self.run.log(f"{phase}-validation", len(rows), {name: result[name] for name in FIGURES})
        self.run.write_json(file, result)
        return result

    def train(self, variant: Variant, seed: int, phase: str) -> tuple[Arrays, Arrays]:
        """The weights and biases after training. The trunk's first weights and the batches depend on the seed alone."""
        import jax
        import jax.numpy as jnp

        from moe_jax.data.problem_text import ProblemText
        from moe_jax.data.problems import load_problems
        from moe_jax.data.text import TrainBatches
        from moe_jax.rng import random_key
        from moe_jax.training.supervised import train_supervised

        cfg, train = self.cfg, self.cfg.train
        text_rows = train.batch_size - cfg.problem_rows
        problems = load_problems(cfg.problems, seed)
        data = Mixture(
            TrainBatches(self.corpus, self.tokenizer, text_rows, train.sequence_length, seed),
            ProblemText(problems, self.tokenizer, cfg.problem_rows, train.sequence_length, "training"),
        )
        program = self.compiled(variant)
        state = program.init(random_key(seed, "weights"))
        if cfg.init:
            trunk = {name: array for name, array in self.start().items() if not name.startswith("mtp.")}
            state = state._replace(params=state.params | jax.tree.map(jnp.copy, trunk))
        state = train_supervised(self.session, phase, program.update, state, data, variant.steps, cfg.checkpoint)
        return state.params, state.rest

    def compiled(self, variant: Variant) -> Compiled:
        """The same for all seeds."""
        import jax

        from moe_jax.model.definition import Definition
        from moe_jax.training.optimizer import make_optimizer
        from moe_jax.training.state import init_state, make_update
        from moe_jax.training.supervised import make_loss, make_totals

        if variant.name not in self.programs:
            train, mesh = self.cfg.train, self.session.mesh
            definition = Definition.of(replace(self.cfg.model, mtp=variant.mtp))
            optimizer = make_optimizer(train.optimizer, variant.steps, definition)
            trained = definition.at(train.precision)
            update = make_update(
                make_loss(trained, self.banned),
                make_totals(trained),
                optimizer,
                accumulation_steps=train.accumulation_steps,
                balance=self.cfg.model.moe,
            )
            init = jax.jit(lambda key: init_state(definition, optimizer, key, mesh))
            accepted = make_acceptance(definition, self.banned) if variant.mtp.depth else None
            self.programs[variant.name] = Compiled(update, init, accepted)
        return self.programs[variant.name]

    def start(self) -> Arrays:
        """The weights of `init`."""
        from moe_jax.model.definition import Definition
        from moe_jax.training.start import start_weights

        if self.started is None:
            definition = Definition.of(self.cfg.model)
            self.started, _ = start_weights(self.run, self.cfg.init, definition, self.session.mesh)
        return self.started

    def evaluate(self, variant: Variant, seed: int, phase: str, params: Arrays, rest: Arrays) -> dict[str, Any]:
        """Of the main head alone bits per byte and accuracy; of the modules how many drafts it accepts."""
        import jax

        from moe_jax.sharding import put_batch
        from moe_jax.training.run import Progress

        mesh, guard = self.session.mesh, self.session.guard
        # Without the modules' weights: one program for all variants.
        main_params, main_rest = (
            {name: array for name, array in arrays.items() if name in self.main.variables} for arrays in (params, rest)
        )
        accepted = self.compiled(variant).accepted
        sums: Any = 0.0
        with Progress(f"validate {phase}", len(self.validation)) as progress:

            def batches() -> Iterator[dict[str, jax.Array]]:
                nonlocal sums
                for number, batch in enumerate(self.validation, 1):
                    placed = put_batch(batch, mesh)
                    if accepted is not None:
                        sums += np.array(jax.device_get(accepted(params, rest, placed)), np.float64)
                    yield placed
                    progress.update(number)

            result: dict[str, Any] = self.bits_per_byte(main_params, main_rest, batches(), between=guard.check)
        result |= self.accuracy(seed, main_params, main_rest)
        if accepted is not None:
            count_N, *rates = sums
            names = ("sampling", "greedy", "sampling_prefix", "greedy_prefix")
            shares = {name: (rate_N / count_N).tolist() for name, rate_N in zip(names, rates, strict=True)}
            result["acceptance"] = {name: shares[name] for name in ("sampling", "greedy")}
            result["tokens_per_pass"] = {name: 1 + sum(shares[f"{name}_prefix"]) for name in ("sampling", "greedy")}
        return result

    def accuracy(self, seed: int, params: Arrays, rest: Arrays) -> dict[str, float]:
        """Percent of the held-out problems whose answer, or the first token of it, is the most probable one.

        Judged in one pass with the true answer as input: greedy decoding gives the answer if, and only if, each of its
        tokens is the most probable one after those before it.
        """
        import jax

        from moe_jax.data.packing import pack
        from moe_jax.data.problem_text import encode_problem
        from moe_jax.data.problems import load_problems, tagged_completion
        from moe_jax.sharding import put_batch

        tokenizer, train = self.tokenizer, self.cfg.train
        documents, masks = [], []
        for problem in load_problems(self.cfg.problems, seed).test:
            prompt = encode_problem(problem, tokenizer)
            completion = tokenizer.encode(tagged_completion(None, problem.answer).removesuffix("<eos>"))
            documents.append(prompt + completion)
            masks.append([0] * len(prompt) + [1] * len(completion))
        packed = pack(documents, train.sequence_length, None, tokenizer.pad_id, masks).batch
        missing = -len(packed["tokens_BS"]) % train.batch_size
        packed = {name: np.pad(array, ((0, missing), (0, 0))) for name, array in packed.items()}
        opening = len(tokenizer.encode("<answer>"))  # which is certain
        right, first_right = [], []
        for start in range(0, len(packed["tokens_BS"]), train.batch_size):
            batch = {name: array[start : start + train.batch_size] for name, array in packed.items()}
            wrong_BS = np.asarray(jax.device_get(self.mistakes(params, rest, put_batch(batch, self.session.mesh))))
            for wrong_S, segments_S, mask_S in zip(
                wrong_BS, batch["segment_ids_BS"], batch["loss_mask_BS"], strict=True
            ):
                for segment in range(1, segments_S.max() + 1):
                    wrong = wrong_S[(segments_S == segment) & (mask_S > 0)]
                    right.append(not wrong.any())
                    first_right.append(not wrong[opening])
            self.session.guard.check()
        return {"accuracy": 100 * float(np.mean(right)), "first_accuracy": 100 * float(np.mean(first_right))}


def make_mistakes(definition: Definition, banned: tuple[int, ...]) -> Any:
    """(params, rest, batch) → bool [B, S]: whether another token than the one at this place was the most probable."""
    import jax
    import jax.numpy as jnp

    from moe_jax.sharding import replicate

    @jax.jit
    def mistakes(params: Arrays, rest: Arrays, batch: dict[str, jax.Array]) -> jax.Array:
        model, tokens_BS = definition.merge(params, rest), batch["tokens_BS"]
        segments_BS, positions_BS = batch["segment_ids_BS"], batch["positions_BS"]
        hidden_BSD = model(tokens_BS, segment_ids_BS=segments_BS, positions_BS=positions_BS).hidden_BSD

        def row(hidden_SD: jax.Array) -> jax.Array:  # one at a time: a row's logits alone may be large
            return jnp.argmax(_logits(model, hidden_SD, banned), axis=-1)

        best_BS = jax.lax.map(row, hidden_BSD)
        return replicate(jnp.pad(best_BS[:, :-1] != tokens_BS[:, 1:], ((0, 0), (1, 0))))

    return mistakes


def make_acceptance(definition: Definition, banned: tuple[int, ...]) -> Any:
    """(params, rest, batch) → [5, N], sums over positions for the N drafts from the nearest on:

    - positions, those whose farthest target lies in the document;
    - the chance that the main head accepts the draft when sampling, Σ_v min(p_v, q_v) (arXiv:2211.17192), and 1 where
      its most probable token is the draft's;
    - the same two, multiplied over the drafts up to this one.
    """
    import jax
    import jax.numpy as jnp

    from moe_jax.losses.language_model import next_token_targets
    from moe_jax.sharding import replicate

    depth = definition.cfg.mtp.depth

    @jax.jit
    def acceptance(params: Arrays, rest: Arrays, batch: dict[str, jax.Array]) -> jax.Array:
        model = definition.merge(params, rest)
        tokens_BS, segments_BS, positions_BS = (batch[f"{name}_BS"] for name in ("tokens", "segment_ids", "positions"))
        hidden_BSD = model(tokens_BS, segment_ids_BS=segments_BS, positions_BS=positions_BS).hidden_BSD
        hidden_NBSD = model.predict_ahead(hidden_BSD, tokens_BS, segments_BS, positions_BS).hidden_NBSD
        _, counted_BS = next_token_targets(tokens_BS, segments_BS, offset=depth + 1)

        def row(of_row: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            hidden_SD, hidden_NSD, counted_S = of_row
            p_SV = jax.nn.softmax(_logits(model, hidden_SD, banned))
            accepted, prefix = [], jnp.ones((2, len(hidden_SD)))
            for k in range(1, depth + 1):
                q_SV = jax.nn.softmax(_logits(model, hidden_NSD[k - 1], banned))
                ahead_SV = jnp.roll(p_SV, -k, axis=0)  # the main head's for the same token, k positions later
                same_S = jnp.argmax(ahead_SV, axis=-1) == jnp.argmax(q_SV, axis=-1)
                rates_2S = jnp.stack([jnp.sum(jnp.minimum(ahead_SV, q_SV), axis=-1), same_S])
                prefix = prefix * rates_2S
                accepted.append(jnp.concatenate([jnp.ones((1, len(hidden_SD))), rates_2S, prefix]))
            return jnp.sum(jnp.stack(accepted, axis=1) * counted_S, axis=-1)

        sums_B5N = jax.lax.map(row, (hidden_BSD, jnp.swapaxes(hidden_NBSD, 0, 1), counted_BS))
        return replicate(jnp.sum(sums_B5N, axis=0))

    return acceptance


def _logits(model: Transformer, hidden_SD: jax.Array, banned: tuple[int, ...]) -> jax.Array:
    import jax.numpy as jnp

    logits_SV = model.logits(hidden_SD[None])[0]
    return logits_SV.at[:, jnp.array(banned)].set(-jnp.inf)


def experiment(cfg: Config, session: Session) -> None:
    lab = Laboratory(cfg, session)
    results: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in variants(cfg)}
    for seed in cfg.seeds:  # a seed's variants one after another: comparable before the last seed has come
        for variant in variants(cfg):
            results[variant.name].append(lab.result(variant, seed))
    if session.run.writes:
        report(cfg, session.run, results)


def report(cfg: Config, run: Run, results: Results) -> None:
    """Writes summary.json, table.md and the plots, and prints the table."""
    from moe_jax.analysis.seed_statistics import mean_over_seeds

    found = variants(cfg)
    at_flops = {variant.ahead: variant for variant in found if variant.name.startswith("none_flops")}

    def per_seed(variant: Variant, figure: str) -> np.ndarray:
        return np.array([result[figure] for result in results[variant.name]])

    def against(variant: Variant, other: Variant) -> dict[str, Any]:
        return {name: mean_over_seeds(per_seed(variant, name) - per_seed(other, name)) for name in FIGURES}

    def acceptance(variant: Variant) -> dict[str, Any]:
        def of(kind: str) -> dict[str, Any]:
            rates_SN = np.array([result["acceptance"][kind] for result in results[variant.name]])
            passes_S = np.array([result["tokens_per_pass"][kind] for result in results[variant.name]])
            by_draft = [mean_over_seeds(rates_S) for rates_S in rates_SN.T]
            return {"by_draft": by_draft, "tokens_per_pass": mean_over_seeds(passes_S)}

        return {kind: of(kind) for kind in ("sampling", "greedy")}

    entries = {}
    for variant in found:
        entry = entries[variant.name] = {
            "title": variant.title,
            "tokens": variant.steps * cfg.step_tokens,
            "flops": training_flops(cfg, variant),
            "figures": {name: mean_over_seeds(per_seed(variant, name)) for name in FIGURES},
            "per_seed": {name: per_seed(variant, name).tolist() for name in (*FIGURES, "loss", "seconds")},
        }
        if variant.mtp.depth:
            others = {"equal tokens": found[0], "equal FLOPs": at_flops[variant.ahead]}
            entry["against"] = {name: against(variant, other) for name, other in others.items()}
            entry["acceptance"] = acceptance(variant)
    summary = {"seeds": list(cfg.seeds), "variants": entries, "seconds": run.metrics()[-1]["elapsed"]}
    run.write_json("summary.json", summary)
    text = tables(summary)
    run.path("table.md").write_text(text + "\n", encoding="utf-8")
    plots = plot(run, summary)
    print(
        f"\n{text}\n\nMean and 95 % interval (Student's t) over {cfg.num_seeds} seeds, differences within a seed.\n"
        f"{PUBLISHED}\n\n{summary['seconds']:.0f} s, seeds {cfg.seeds[0]} to {cfg.seeds[-1]}.\nRun folder: {run.dir}\n"
        f"Plots: {', '.join(str(path) for path in plots)}"
    )


PUBLISHED = """\
Published, one causal module at equal tokens, dropped at evaluation (DeepSeek-V3 table 4), D = 0 → D = 1:
  15.7B, 1.33T tokens: Pile .729 → .729 bits per byte; HumanEval 20.7 → 26.8, GSM8K 25.4 → 31.4, MATH 10.7 → 12.6 %
  228.7B, 540B tokens: Pile .658 → .657 bits per byte; HumanEval 44.5 → 53.7, GSM8K 72.3 → 74.0, MATH 38.6 → 39.8 %
Its module's drafts are accepted at 85 to 90 % (§5.4.3)."""


def tables(summary: Mapping[str, Any]) -> str:
    """Figures of all variants, differences to D = 0, and the acceptance of drafts, as Markdown."""
    entries = summary["variants"].values()

    def cells(intervals: Mapping[str, Any], sign: str = "") -> list[str]:
        return [_cell(intervals[name], f"{sign}.3f" if name == "bits_per_byte" else f"{sign}.1f") for name in FIGURES]

    figures = [["training", "tokens", "TFLOPs", *FIGURES.values()]]
    figures += [
        [entry["title"], f"{entry['tokens']:,}", f"{entry['flops'] / 1e12:.2f}", *cells(entry["figures"])]
        for entry in entries
    ]
    differences = [["difference to D = 0", "at", *FIGURES.values()]]
    drafts = [["drafts accepted (%)", "by", "ahead", "rate", "tokens per pass"]]
    for entry in entries:
        for equal, intervals in entry.get("against", {}).items():
            differences.append([entry["title"], equal, *cells(intervals, "+")])
        for kind, rates in entry.get("acceptance", {}).items():
            for k, rate in enumerate(rates["by_draft"], 1):
                passes = _cell(rates["tokens_per_pass"], ".2f") if k == len(rates["by_draft"]) else ""
                drafts.append([entry["title"], kind, str(k), _cell(rate, ".1f", 100), passes])
    return "\n\n".join(markdown(rows) for rows in (figures, differences, drafts))


def _cell(interval: Mapping[str, Any], form: str, scale: float = 1) -> str:
    half = scale * (interval["high"] - interval["mean"])
    return f"{scale * interval['mean']:{form}}" + (f" ± {half:{form.lstrip('+')}}" if math.isfinite(half) else "")


def plot(run: Run, summary: Mapping[str, Any]) -> list[Path]:
    """Loss and accuracy against training FLOPs, and the acceptance of drafts by how far ahead they are."""
    from moe_jax.analysis import plots
    from moe_jax.analysis.plots import Panel, Point, Series

    colors = {"none": plots.GREY, "causal": plots.BLUE, "parallel": plots.ORANGE}
    markers = ("o", "s", "^", "D", "v", "P", "X", "*")
    entries = summary["variants"]
    files = [run.path("plots", f"{name}.png") for name in ("bits_per_byte", "accuracy", "acceptance")]

    def points(figure: str) -> list[Point]:
        found = []
        for marker, (name, entry) in enumerate(entries.items()):
            flops = entry["flops"] / 1e12
            place = {"mean": flops, "low": math.nan, "high": math.nan}
            singles = entry["per_seed"][figure]
            color = colors[name.split("_")[0]]
            found.append(
                Point(
                    entry["title"],
                    place,
                    entry["figures"][figure],
                    [flops] * len(singles),
                    singles,
                    color,
                    markers[marker % len(markers)],
                )
            )
        return found

    title = "means, 95 % intervals, single seeds"
    plots.plot_points(
        files[0], f"Main head on held-out text: {title}", points("bits_per_byte"), "TFLOPs", "bits per byte"
    )
    plots.plot_points(files[1], f"Held-out problems: {title}", points("accuracy"), "TFLOPs", "right (%)")

    drafting = [name for name in entries if "acceptance" in entries[name]]

    def rates(name: str, kind: str) -> Series:
        entry, number = entries[name], drafting.index(name)
        found = entry["acceptance"][kind]["by_draft"]
        mean, low, high = ([rate[end] for rate in found] for end in ("mean", "low", "high"))
        ahead = [draft + 0.04 * (number - (len(drafting) - 1) / 2) for draft in range(1, len(found) + 1)]
        low, high = (low, high) if np.isfinite(low).all() else ([], [])
        color, marker = colors[name.split("_")[0]], markers[list(entries).index(name) % len(markers)]
        return Series(entry["title"], ahead, mean, color, low=low, high=high, marker=marker)

    panels = [
        Panel(f"accepted, {kind}", [rates(name, kind) for name in drafting], share=True)
        for kind in ("sampling", "greedy")
    ]
    xlabel = "tokens ahead of the main head's next one"
    plots.plot_curves(files[2], "The modules' drafts on held-out text", panels, xlabel)
    return files


if __name__ == "__main__":
    main("mtp", CONFIG, experiment)
