"""Environments: where problems come from, and what completions of them are worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from moe_jax.config import RewardConfig
from moe_jax.data import DataError
from moe_jax.data.problems import Problem, ProblemSource
from moe_jax.rl.rewards import extra_parts, format_reward, judge, readable, total_reward, worked


class Completion(NamedTuple):
    """What an environment scores."""

    problem: Problem
    text: str
    """The decoded text that followed the prompt, special tokens visible."""
    finished: bool
    """Whether it ended by a stop token, not for want of room."""
    tokens: int
    """Its length ..."""
    room: int
    """... and the most that it could have had."""
    rng: np.random.Generator
    """The only source of chance. Each completion has one of its own, such as
    `rng.random_generator(seed, "reward", step, index)`, so that the order does not matter."""


Parts = dict[str, Any]
"""Named parts of a completion's reward, numbers; `reward` is what the policy is trained on. None in another part means
that it says nothing of this completion, which then does not count in the part's mean."""


class Environment(Protocol):
    """What the reinforcement-learning loop asks for."""

    def problems(self, step: int, count: int) -> list[Problem]:
        """The problems of a step; the model reads their `prompt`.

        The same arguments, after the same observations, give the same problems.
        """
        ...

    def score(self, completions: Sequence[Completion]) -> list[Parts]:
        """The parts of each completion's reward; a step's completions come together, to be judged side by side."""
        ...

    def observe(self, step: int, accuracy: float) -> None:
        """Told, in order, of each step's mean accuracy before the next step's problems are asked for.

        It is all that an environment may remember. A run that resumes tells it again of the earlier steps, from
        metrics.jsonl, so that nothing needs to be saved.
        """
        ...


class VerifiableEnvironment:
    """Rewards from rules alone, as DeepSeek-R1-Zero's: exact answers and the format of the completion.

    The parts are `reward`, `accuracy`, `format`, those that `RewardConfig` gives a weight (`credit` with
    `partial_credit`), `worked` (1 if the thinking shows working), `readable` (1 if it is well formed and wholly in the
    `language`, where one is given), and `level` where the source has a curriculum, whose level rises with the
    accuracies observed. The last three are logged, never rewarded. With `RewardConfig.random` the
    reward is a fair coin that does not look at the completion; the other parts are still what they are.
    """

    def __init__(
        self,
        source: ProblemSource,
        cfg: RewardConfig,
        purpose: str = "rl",
        fits: Callable[[Problem], bool] = lambda problem: True,
        language: str = "",
    ):
        """`fits` says whether a problem can be used, its prompt not being too long; others are drawn in its place."""
        self._source, self._cfg, self._purpose, self._fits = source, cfg, purpose, fits
        self._language = language
        self._accuracies: dict[int, float] = {}
        self.skipped = 0
        """Problems that did not fit, so far."""

    @property
    def level(self) -> int:
        """The curriculum's level, from 0."""
        return self._source.levels.after(accuracy for _, accuracy in sorted(self._accuracies.items()))

    def problems(self, step: int, count: int) -> list[Problem]:
        found: list[Problem] = []
        for attempt in range(100):
            purpose = f"{self._purpose}/{attempt}" if attempt else self._purpose
            drawn = self._source.sample(step, count, purpose, self.level)
            fitting = [problem for problem in drawn if self._fits(problem)]
            self.skipped += len(drawn) - len(fitting)
            found += fitting
            if len(found) >= count:
                return found[:count]
        raise DataError(
            f"of {100 * count} problems only {len(found)} have prompts short enough for the model: give prompts more"
            " room (--prompt-length), or take easier problems"
        )

    def score(self, completions: Sequence[Completion]) -> list[Parts]:
        """As `Environment.score`. One that did not stop by itself earns neither accuracy nor format: it has not had its
        last word."""
        problems, texts = [one.problem for one in completions], [one.text for one in completions]
        found = judge(problems, texts, [one.finished for one in completions], self._source)
        scores = []
        for one, judged in zip(completions, found, strict=True):
            parts: Parts = {
                "accuracy": float(judged.credit == 1),
                "format": format_reward(one.text, one.finished),
            }
            if self._cfg.partial_credit:
                parts["credit"] = judged.credit
            parts |= extra_parts(one.text, one.tokens, one.room, self._cfg)
            reward = float(one.rng.integers(2)) if self._cfg.random else total_reward(parts, self._cfg)
            parts = {"reward": reward, **parts, "worked": float(worked(one.text, self._source.works_in_equations))}
            if self._language:
                parts["readable"] = float(one.finished and readable(one.text, self._language))
            if self._source.levels.count > 1:
                parts["level"] = float(self.level)
            scores.append(parts)
        return scores

    def observe(self, step: int, accuracy: float) -> None:
        self._accuracies[step] = accuracy
