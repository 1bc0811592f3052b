"""Figures of an evaluation on problems with several samples each: pass@k, cons@k and intervals.

Shapes: P problems, G samples of each.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.typing import ArrayLike

from moe_jax.data.problems import parse_number

_Z_95 = 1.959963984540054
"""97.5 % quantile of the normal distribution."""


class Interval(TypedDict):
    mean: float
    low: float
    high: float
    problems: int


def majority_answer(answers: Sequence[str | None]) -> str | None:
    """The answer that most samples give, for cons@k (self-consistency, arXiv:2203.11171).

    Different ways to write a number are one answer. None is a sample without an answer and has no vote; with no vote
    at all the result is None. Of answers with equally many votes the one that was given first wins.
    """
    first_form: dict[object, str] = {}
    votes: Counter[object] = Counter()
    for answer in answers:
        if answer is None:
            continue
        number = parse_number(answer)
        value = answer.strip() if number is None else number
        first_form.setdefault(value, answer)
        votes[value] += 1
    if not votes:
        return None
    return first_form[max(votes, key=votes.__getitem__)]


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Chance that at least one of k samples is right: 1 - C(n-c, k) / C(n, k), unbiased (arXiv:2107.03374, eq. 1).

    Raises:
        ValueError: unless 1 ≤ k ≤ num_samples and 0 ≤ num_correct ≤ num_samples.
    """
    if not 1 <= k <= num_samples or not 0 <= num_correct <= num_samples:
        raise ValueError(
            f"pass_at_k(num_samples={num_samples}, num_correct={num_correct}, k={k}): needs 1 <= k <= num_samples and"
            " 0 <= num_correct <= num_samples"
        )
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def mean_interval(values: ArrayLike) -> Interval:
    """The mean over problems and its 95 % interval.

    Problems are the independent draws, samples of one problem are not: samples are averaged first, and the interval is
    mean ± 1.96 · s / √P cut to [0, 1], with s the standard deviation of the problems' means (P - 1 in the denominator).
    Where all problems have the same mean (all right, all wrong, or there is one problem) s says nothing, and Wilson's
    interval for P Bernoulli trials stands in, which is wider than a point.

    Args:
        values: [P] accuracies per problem, or [P, G] accuracies per sample, between 0 and 1.

    Raises:
        ValueError: no problems, another shape, or values that are not between 0 and 1.
    """
    values_PG = np.asarray(values, dtype=np.float64)
    if values_PG.ndim not in (1, 2) or values_PG.size == 0:
        raise ValueError(
            f"mean_interval: values have shape {values_PG.shape}, must be [problems] or [problems, samples]"
        )
    if not np.all((values_PG >= 0) & (values_PG <= 1)):
        raise ValueError("mean_interval: values must lie between 0 and 1")
    means_P = values_PG.reshape(len(values_PG), -1).mean(axis=1)
    number, mean = len(means_P), float(means_P.mean())
    if number > 1 and np.ptp(means_P) > 0:
        center, half = mean, _Z_95 * float(means_P.std(ddof=1)) / math.sqrt(number)
    else:
        shrink = 1 + _Z_95**2 / number
        center = (mean + _Z_95**2 / (2 * number)) / shrink
        half = _Z_95 / shrink * math.sqrt(mean * (1 - mean) / number + _Z_95**2 / (4 * number**2))
    return {
        "mean": mean,
        "low": min(max(center - half, 0.0), mean),
        "high": max(min(center + half, 1.0), mean),
        "problems": number,
    }


def figures(rows: Sequence[Mapping[str, Any]], groups: Sequence[str], samples: int) -> dict[str, Any]:
    """pass@k for powers of two and all samples, cons@k, and what the completions are like; of problems that have all
    their samples. `groups` says which file each problem is of; with several, pass@1 of each is there too."""
    by_problem: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_problem.setdefault(row["problem"], []).append(row)
    whole = {problem: found for problem, found in by_problem.items() if len(found) == samples}
    if not whole:
        return {"problems": 0}
    right = {problem: [row["correct"] for row in found] for problem, found in whole.items()}
    result: dict[str, Any] = {"problems": len(whole)}
    for k in sorted({2**i for i in range(samples.bit_length())} | {samples}):
        result[f"pass_at_{k}"] = mean_interval([pass_at_k(samples, sum(r), k) for r in right.values()])
    result[f"cons_at_{samples}"] = mean_interval([_majority_is_right(found) for found in whole.values()])
    flat = [row for found in whole.values() for row in found]
    result |= {
        "answered": float(np.mean([row["answer"] is not None for row in flat])),
        "cut_off": float(np.mean([row["cut_off"] for row in flat])),
        "mean_tokens": float(np.mean([row["tokens"] for row in flat])),
    }
    if len(set(groups)) > 1:
        of_group: dict[str, list[list[bool]]] = {}
        for problem, found in right.items():
            of_group.setdefault(groups[problem], []).append(found)
        result["pass_at_1_by_file"] = {group: mean_interval(np.array(of_group[group])) for group in sorted(of_group)}
    return result


def _majority_is_right(rows: Sequence[Mapping[str, Any]]) -> float:
    ordered = sorted(rows, key=lambda row: row["sample"])
    majority = majority_answer([row["answer"] for row in ordered])
    return float(next((row["correct"] for row in ordered if row["answer"] == majority and majority is not None), False))


def figures_table(summary: Mapping[str, Any]) -> str:
    """What `figures` found, a line each."""

    def lines() -> Iterator[str]:
        by_file = summary.get("pass_at_1_by_file", {})
        intervals = {name: value for name, value in summary.items() if isinstance(value, dict) and "mean" in value}
        for name, value in {**intervals, **{f"pass_at_1 {name}": value for name, value in by_file.items()}}.items():
            title = name.replace("_at_", "@")
            yield f"{title:24}{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
        if summary["problems"]:
            yield (
                f"answered {summary['answered']:.2f}, cut off {summary['cut_off']:.2f},"
                f" mean length {summary['mean_tokens']:.0f} tokens"
            )

    return "\n".join(lines())
