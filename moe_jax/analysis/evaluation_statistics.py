"""Figures of an evaluation on problems with several samples each: pass@k, cons@k and intervals.

Shapes: P problems, G samples of each.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TypedDict

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
