"""Accuracy against the tokens that are spent on a problem: more samples (a vote, or the best), and longer ones.

P problems, G samples of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax.analysis.evaluation_statistics import Interval, majority_answer, mean_interval, pass_at_k


class Drawn(NamedTuple):
    """Samples of problems, judged."""

    answers_PG: Sequence[Sequence[str | None]]
    """None: without an answer."""
    right_PG: np.ndarray
    """bool."""
    tokens_PG: np.ndarray
    """Their lengths, the stop token included."""

    @property
    def samples(self) -> int:
        return self.right_PG.shape[1]


class Spent(NamedTuple):
    """What k samples of at most `budget` tokens are worth."""

    k: int
    budget: int
    tokens: float
    """Mean over problems of all k samples' tokens."""
    cut_off: float
    """The share of samples that the budget ended."""
    consensus: Interval
    """cons@k, accuracy of the majority's answer; at k = 1 pass@1."""
    best: Interval
    """Accuracy of a choice that knows the answer: an upper bound for any way to choose among the k."""


def powers_of_two(samples: int) -> list[int]:
    """1, 2, 4, … up to `samples`."""
    return [2**i for i in range(samples.bit_length())]


def cut(drawn: Drawn, budget: int) -> Drawn:
    """The samples as a sampler that stops at `budget` tokens would have drawn them.

    A longer one has no answer, is wrong, and costs the budget. No new samples are needed: a token does not depend on
    those after it.
    """
    whole_PG = drawn.tokens_PG <= budget
    answers_PG = [
        [answer if whole else None for answer, whole in zip(answers, wholes, strict=True)]
        for answers, wholes in zip(drawn.answers_PG, whole_PG, strict=True)
    ]
    return Drawn(answers_PG, drawn.right_PG & whole_PG, np.minimum(drawn.tokens_PG, budget))


def consensus_at_k(drawn: Drawn, k: int) -> np.ndarray:
    """[P], how often the majority of k samples is right: the mean over the G // k groups of k that follow each other.

    Of answers with equally many votes the first one wins (`majority_answer`), so that two samples are worth one.

    Raises:
        ValueError: unless 1 ≤ k ≤ G.
    """
    if not 1 <= k <= drawn.samples:
        raise ValueError(f"consensus_at_k: k = {k}, must be from 1 to the {drawn.samples} samples of a problem")

    def majority_is_right(answers: Sequence[str | None], right: Sequence[bool]) -> bool:
        majority = majority_answer(answers)
        return majority is not None and bool(right[answers.index(majority)])

    starts = range(0, drawn.samples - k + 1, k)
    return np.array(
        [
            np.mean([majority_is_right(answers[start : start + k], right[start : start + k]) for start in starts])
            for answers, right in zip(drawn.answers_PG, drawn.right_PG, strict=True)
        ]
    )


def spent(drawn: Drawn, k: int, budget: int) -> Spent:
    """The worth of k samples of at most `budget` tokens; intervals are over problems."""
    within = cut(drawn, budget)
    return Spent(
        k,
        budget,
        float(k * within.tokens_PG.mean()),
        float(np.mean(drawn.tokens_PG > budget)),
        mean_interval(consensus_at_k(within, k)),
        mean_interval([pass_at_k(drawn.samples, int(right), k) for right in within.right_PG.sum(axis=1)]),
    )


def errors_removed(before: float, after: float) -> float:
    """The share of the errors at accuracy `before` that are gone at `after`; not-a-number where there were none."""
    return (after - before) / (1 - before) if before < 1 else float("nan")


def to_rows(prompts: Sequence[str], drawn: Drawn) -> list[dict[str, Any]]:
    """One record per problem, which `from_rows` reads."""
    return [
        {"prompt": prompt, "answers": list(answers), "right": right.astype(int).tolist(), "tokens": tokens.tolist()}
        for prompt, answers, right, tokens in zip(
            prompts, drawn.answers_PG, drawn.right_PG, drawn.tokens_PG, strict=True
        )
    ]


def from_rows(rows: Sequence[dict[str, Any]]) -> Drawn:
    return Drawn(
        [row["answers"] for row in rows],
        np.array([row["right"] for row in rows], bool),
        np.array([row["tokens"] for row in rows], int),
    )
