"""Any task of reasoning-gym (arXiv:2505.24760), mathematics and logic, with its curriculum."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Sequence
from typing import Any

from moe_jax.config import ProblemConfig
from moe_jax.data import DataError
from moe_jax.data.problems import Document, Levels, Problem, ProblemSource, hold_out, tagged_completion
from moe_jax.rng import random_generator


class ReasoningGymSource(ProblemSource):
    """Any task of the package reasoning-gym (arXiv:2505.24760), scored by the task's own checker.

    Only a full score counts: many checkers give partial credit for wrong answers, which a policy learns to collect.
    The tasks come without working, so every document is a guess-style one with the reference answer (an empty answer
    for the few tasks that have a checker but no reference): a base model learns the format from them, no strategy.

    The held-out problems are excluded by their question. Of a task with few different questions, at most half of those
    that were seen are held out, so that some are left to train on.

    With a `curriculum_threshold` the problems come from the level that training has reached, all of the task's
    attributes at that level of its own curriculum (or their last). The held-out problems, and those of documents, are
    then of all levels in equal shares, so that accuracy on them means the same from the first step to the last.
    """

    def __init__(self, cfg: ProblemConfig, seed: int):
        self._cfg, self._seed = cfg, seed
        self._create_dataset, number = _reasoning_gym_factory(cfg.task, with_levels=cfg.curriculum_threshold > 0)
        self.levels = Levels(number, cfg.curriculum_threshold, cfg.curriculum_window)
        self._checker = self._create_dataset(size=1, seed=0, level=0)
        self.test = []
        for level in range(number):
            share = cfg.test_problems * (level + 1) // number - cfg.test_problems * level // number
            self.test += hold_out(share, functools.partial(self._generate_held_out, level))
        self.test = list({problem.key: problem for problem in self.test}.values())
        if not self.test:
            raise DataError(f"ProblemConfig.task = {cfg.task!r}: has one question only, so none can be held out")
        self._held_out = {problem.key for problem in self.test}

    def sample(self, step: int, count: int, purpose: str, level: int = 0) -> list[Problem]:
        problems: list[Problem] = []
        for attempt in range(100):
            fresh = self._generate(count - len(problems), level, purpose, step, attempt)
            problems += [problem for problem in fresh if problem.key not in self._held_out]
            if len(problems) == count:
                return problems
        raise DataError(
            f"reasoning_gym task {self._cfg.task!r} gave fewer than {count} problems that are not held out; lower"
            f" ProblemConfig.test_problems = {self._cfg.test_problems}"
        )

    def documents(self, step: int, count: int, purpose: str) -> list[Document]:
        rng = random_generator(self._seed, f"{purpose} documents", step)
        num_bare = round(self._cfg.bare_fraction * count)
        bare_P = rng.permutation(count) < num_bare
        problems: list[Problem] = []
        for level in range(self.levels.count):
            share = count * (level + 1) // self.levels.count - count * level // self.levels.count
            problems += self.sample(step, share, purpose, level) if share else []
        return [
            Document(problem.prompt, tagged_completion(None if bare else "", problem.answer), worked=False)
            for problem, bare in zip(problems, bare_P, strict=True)
        ]

    def is_correct(self, problem: Problem, answer: str) -> bool:
        return self.credits([(problem, answer)]) == [1.0]

    def credits(self, answers: Sequence[tuple[Problem, str]]) -> list[float]:
        """The task's own scores, which are partial credit where they are less than 1."""
        found = []
        for problem, answer in answers:
            try:
                score = float(self._checker.score_answer(answer, problem.entry))
            except Exception:  # several checkers raise whatever comes when the answer is malformed
                score = 0.0
            found.append(1.0 if score >= 1 - 1e-9 else max(score, 0.0))
        return found

    def _generate_held_out(self, level: int, count: int, attempt: int) -> list[Problem]:
        return self._generate(count, level, "held-out problems", attempt)

    def _generate(self, count: int, level: int, purpose: str, *indices: int) -> list[Problem]:
        rng = random_generator(self._seed, purpose, *indices, *([level] if self.levels.count > 1 else []))
        dataset = self._create_dataset(size=count, seed=int(rng.integers(2**31)), level=level)
        problems = []
        for index in range(count):
            entry = dataset[index]
            answer = "" if entry["answer"] is None else str(entry["answer"])
            problems.append(Problem(entry["question"], answer, key=entry["question"], entry=entry))
        return problems


def _reasoning_gym_factory(task: str, *, with_levels: bool) -> tuple[Callable[..., Any], int]:
    """(create(size, seed, level) → dataset, number of levels)."""
    try:
        from reasoning_gym.factory import (  # pyright: ignore[reportMissingImports]
            CURRICULA,
            DATASETS,
            create_curriculum,
            create_dataset,
        )
    except ImportError as error:
        raise DataError(
            "ProblemConfig.source = 'reasoning_gym' needs the package reasoning-gym: pip install reasoning-gym"
        ) from error
    if task not in DATASETS:
        near = difflib.get_close_matches(task, list(DATASETS), n=3, cutoff=0)
        raise DataError(
            f"ProblemConfig.task = {task!r}: reasoning-gym has no such task; the nearest are {', '.join(near)}"
        )
    if not with_levels:
        return lambda size, seed, level: create_dataset(task, size=size, seed=seed), 1
    if task not in CURRICULA:
        raise DataError(
            f"ProblemConfig.curriculum_threshold: reasoning-gym has no curriculum for {task!r}; set it to 0"
        )

    def create(size: int, seed: int, level: int) -> Any:
        curriculum = create_curriculum(task)
        curriculum.set_global_level(level)
        config = curriculum.generate_configuration({"size": size, "seed": seed})
        config.validate()
        return DATASETS[task][0](config=config)

    return create, max(len(attribute.levels) for attribute in create_curriculum(task).attributes.values())
