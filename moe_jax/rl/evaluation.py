"""Held-out accuracy: pass@1 with an interval, cons@k, format, length, language.

P problems, G samples of each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
from jax import Array

from moe_jax.analysis.evaluation_statistics import majority_answer, mean_interval
from moe_jax.config import EvaluationConfig
from moe_jax.data.problems import Problem, ProblemSource
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.model.definition import Arrays
from moe_jax.rl.grpo import Generator, decode_completions, encode_prompts
from moe_jax.rl.rewards import format_reward, judge, language_reward, readable, worked
from moe_jax.rng import random_key
from moe_jax.training.experiment import Session
from moe_jax.training.run import Progress


def evaluate(
    sample: Generator,
    params: Arrays,
    rest: Arrays,
    source: ProblemSource,
    problems: list[Problem],
    tokenizer: Tokenizer,
    cfg: EvaluationConfig,
    *,
    prompt_length: int,
    key: Array,
    between: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Samples every problem `cfg.samples` times at temperature 1 and scores the completions.

    Returns `pass_at_1` (mean accuracy of single samples) and `cons_at_<k>` (accuracy of the majority's answer), each
    with its 95 % interval over problems; `format`, `worked`, `mean_length`; the accuracy of the completions that show
    their working and of those that do not (`accuracy_worked`, `accuracy_guessed`; 0 where there are none); and a few
    `examples`. With `cfg.language` also `language`, the mean share of the thinking's words that are in it (of thinkings
    with words; not-a-number where there are none), and `readable`, the share of completions wholly in it.
    `between(done, total)` is called after every batch of problems.
    """
    accuracy: list[list[float]] = []
    consensus: list[float] = []
    details: dict[str, list[float]] = {"format": [], "worked": [], "length": []}
    shares: list[float] = []
    legible: list[float] = []
    examples = []
    for start in range(0, len(problems), cfg.batch_size):
        chunk = problems[start : start + cfg.batch_size]
        padded = chunk + [chunk[-1]] * (cfg.batch_size - len(chunk) if start else 0)
        tokens_PS, mask_PS = encode_prompts(padded, tokenizer, prompt_length)
        samples = jax.device_get(sample(params, rest, tokens_PS, mask_PS, jax.random.fold_in(key, start)))
        texts = decode_completions(samples, tokenizer)
        lengths = np.sum(samples.mask_BN, axis=1)
        judged = judge([problem for problem in chunk for _ in range(cfg.samples)], texts, samples.finished_B, source)
        majorities = [
            majority_answer([one.answer for one in judged[first : first + cfg.samples]])
            for first in range(0, len(judged), cfg.samples)
        ]
        agreed = [(problem, answer) for problem, answer in zip(chunk, majorities, strict=True) if answer is not None]
        right = iter(source.credits(agreed))
        consensus += [float(answer is not None and next(right) == 1) for answer in majorities]
        for i, problem in enumerate(chunk):
            rows = range(i * cfg.samples, (i + 1) * cfg.samples)
            accuracy.append([float(judged[row].credit == 1) for row in rows])
            details["format"] += [format_reward(texts[row], bool(samples.finished_B[row])) for row in rows]
            details["worked"] += [float(worked(texts[row], source.works_in_equations)) for row in rows]
            details["length"] += [float(lengths[row]) for row in rows]
            if cfg.language:
                found = [language_reward(texts[row], cfg.language) for row in rows]
                shares += [share for share in found if share is not None]
                legible += [float(samples.finished_B[row] and readable(texts[row], cfg.language)) for row in rows]
            if len(examples) < 8:
                examples.append({"prompt": problem.prompt, "answer": problem.answer, "completion": texts[rows[0]]})
        between(min(start + cfg.batch_size, len(problems)), len(problems))
    language = {}
    if cfg.language:
        language = {"language": float(np.mean(shares or [np.nan])), "readable": float(np.mean(legible))}
    return {
        "pass_at_1": mean_interval(np.array(accuracy)),
        f"cons_at_{cfg.samples}": mean_interval(np.array(consensus)),
        "format": float(np.mean(details["format"])),
        "worked": float(np.mean(details["worked"])),
        "mean_length": float(np.mean(details["length"])),
        **language,
        "accuracy_worked": _mean_where(np.array(accuracy), np.array(details["worked"]) > 0),
        "accuracy_guessed": _mean_where(np.array(accuracy), np.array(details["worked"]) == 0),
        "examples": examples,
    }


class Weights(Protocol):
    """A model: a `TrainState`, for one."""

    @property
    def params(self) -> Arrays: ...
    @property
    def rest(self) -> Arrays: ...


def held_out(
    session: Session,
    name: str,
    model: Callable[[], Weights],
    sample: Generator,
    source: ProblemSource,
    problems: list[Problem],
    tokenizer: Tokenizer,
    cfg: EvaluationConfig,
    *,
    prompt_length: int,
    seed: int,
) -> dict[str, Any]:
    """What `evaluate` says of a model, once: a resumed run reads `evaluations/<name>.json` and asks for no `model`."""
    file, phase = f"evaluations/{name}.json", f"evaluate_{name}"
    if (known := session.run.result(file)) is not None:
        return known
    weights = model()
    with Progress(f"evaluate {name}", len(problems)) as progress:

        def between(done: int, total: int) -> None:
            progress.update(done)
            session.guard.check()

        result = evaluate(
            sample,
            weights.params,
            weights.rest,
            source,
            problems,
            tokenizer,
            cfg,
            prompt_length=prompt_length,
            key=random_key(seed, "evaluation"),
            between=between,
        )
    figures = {figure: result[figure] for figure in ("worked", "language", "readable") if figure in result}
    session.run.rewind(phase, -1)  # it was logged already if the run was killed just then
    session.run.log(phase, 0, {"pass_at_1": result["pass_at_1"]["mean"], **figures})
    session.run.write_json(file, result)
    return result


def _mean_where(values: np.ndarray, where: np.ndarray) -> float:
    chosen = values.reshape(-1)[where]
    return float(np.mean(chosen)) if chosen.size else 0.0
