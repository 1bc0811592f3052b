"""Environments: where problems come from, and what a completion of one is worth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from moe_jax.config import RewardConfig
from moe_jax.data import DataError
from moe_jax.data.problems import Problem, ProblemSource
from moe_jax.rl.rewards import reward_parts, total_reward, worked


class Environment(Protocol):
    """What the reinforcement-learning loop asks for."""

    def problems(self, step: int, count: int) -> list[Problem]:
        """The problems of a step; the model reads their `prompt`. The same arguments give the same problems."""
        ...

    def score(self, problem: Problem, completion: str, finished: bool, rng: np.random.Generator) -> dict[str, float]:
        """Named parts of a completion's reward; `reward` is what the policy is trained on.

        Args:
            completion: the decoded text that followed the prompt, special tokens visible.
            finished: whether it ended by a stop token, not for want of room.
            rng: the only source of chance. Give each completion one of its own, such as
                `rng.random_generator(seed, "reward", step, index)`, so that the order does not matter.
        """
        ...


class VerifiableEnvironment:
    """Rewards from rules alone, as DeepSeek-R1-Zero's: exact answers and the format of the completion.

    The parts are `reward`, `accuracy`, `format`, and `worked` (1 if the thinking shows working; it is logged, never
    rewarded). With `RewardConfig.random` the reward is a fair coin that does not look at the completion; the other
    parts are still what they are.
    """

    def __init__(
        self,
        source: ProblemSource,
        cfg: RewardConfig,
        purpose: str = "rl",
        fits: Callable[[Problem], bool] = lambda problem: True,
    ):
        """`fits` says whether a problem can be used, its prompt not being too long; others are drawn in its place."""
        self._source, self._cfg, self._purpose, self._fits = source, cfg, purpose, fits
        self.skipped = 0
        """Problems that did not fit, so far."""

    def problems(self, step: int, count: int) -> list[Problem]:
        found: list[Problem] = []
        for attempt in range(100):
            purpose = f"{self._purpose}/{attempt}" if attempt else self._purpose
            drawn = self._source.sample(step, count, purpose)
            fitting = [problem for problem in drawn if self._fits(problem)]
            self.skipped += len(drawn) - len(fitting)
            found += fitting
            if len(found) >= count:
                return found[:count]
        raise DataError(
            f"of {100 * count} problems only {len(found)} have prompts short enough for the model: give prompts more"
            " room (--prompt-length), or take easier problems"
        )

    def score(self, problem: Problem, completion: str, finished: bool, rng: np.random.Generator) -> dict[str, float]:
        parts = reward_parts(problem, completion, finished, self._source.is_correct)
        reward = float(rng.integers(2)) if self._cfg.random else total_reward(parts, self._cfg)
        return {"reward": reward, **parts, "worked": float(worked(completion, self._source.works_in_equations))}
