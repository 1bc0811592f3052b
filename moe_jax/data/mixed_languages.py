"""Working that mixes two languages, as DeepSeek-R1-Zero's does (arXiv:2501.12948, §2.2)."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from moe_jax.data.problems import Document, Problem, ProblemSource
from moe_jax.rng import random_generator

WORDS = ({"+": "and", "-": "less"}, {"+": "加", "-": "减"})
"""The signs in English and in Chinese; "and" and "加" have three bytes each."""

_STEP = re.compile(r"(?<=[0-9])[+-](?=[0-9]+=)")


class MixedLanguages(ProblemSource):
    """A source of arithmetic whose documents write the signs of their working as words of two languages.

    `7+1=8+5=13+9=22` becomes `7and1=8加5=13加9=22`: the first word's language is a coin's choice, and each further word
    is in the other language than the one before with probability `switch_rate`. Problems, answers and mistakes are the
    given source's.
    """

    def __init__(self, source: ProblemSource, switch_rate: float, seed: int):
        self._source, self._switch_rate, self._seed = source, switch_rate, seed
        self.works_in_equations, self.levels, self.test = source.works_in_equations, source.levels, source.test

    def sample(self, step: int, count: int, purpose: str, level: int = 0) -> list[Problem]:
        return self._source.sample(step, count, purpose, level)

    def documents(self, step: int, count: int, purpose: str) -> list[Document]:
        rng = random_generator(self._seed, f"{purpose} languages", step)
        return [self._mixed(document, rng) for document in self._source.documents(step, count, purpose)]

    def is_correct(self, problem: Problem, answer: str) -> bool:
        return self._source.is_correct(problem, answer)

    def credits(self, answers: Sequence[tuple[Problem, str]]) -> list[float]:
        return self._source.credits(answers)

    def _mixed(self, document: Document, rng: np.random.Generator) -> Document:
        if not document.worked:
            return document
        language = int(rng.integers(2))

        def word(match: re.Match[str]) -> str:
            nonlocal language
            if match.start() > first:
                language ^= int(rng.random() < self._switch_rate)
            return WORDS[language][match[0]]

        found = _STEP.search(document.completion)
        first = found.start() if found else 0
        return Document(document.prompt, _STEP.sub(word, document.completion), document.worked)
