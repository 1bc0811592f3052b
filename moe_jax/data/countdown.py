"""Countdown: reach a number from given ones by + - * /, each used at most once."""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction

import numpy as np

from moe_jax.config import ProblemConfig
from moe_jax.data.problems import Document, Problem, ProblemSource, document_kinds, hold_out, tagged_completion
from moe_jax.rng import random_generator

_TOKEN = re.compile(r"\s*([0-9]{1,9}|[-+*/()])")
_LONGEST = 200


def value_of(expression: str) -> tuple[Fraction, Counter[int]] | None:
    """The exact value of an expression of whole numbers, + - * / and parentheses, and how often it has each number.

    None for any other text, a division by zero, and what is longer than 200 characters. Nothing is executed.
    """
    tokens: list[str] = []
    place = 0
    expression = expression.strip()
    while place < len(expression) <= _LONGEST:
        match = _TOKEN.match(expression, place)
        if match is None:
            return None
        tokens.append(match[1])
        place = match.end()
    numbers: Counter[int] = Counter()
    try:
        value = _sum(tokens, numbers)
    except (IndexError, ZeroDivisionError, ValueError):
        return None
    return None if tokens else (value, numbers)


def _sum(tokens: list[str], numbers: Counter[int]) -> Fraction:
    """Takes a sum off the front of the tokens; a text that ends too soon is an IndexError."""
    value = _product(tokens, numbers)
    while tokens and tokens[0] in "+-":
        sign = 1 if tokens.pop(0) == "+" else -1
        value += sign * _product(tokens, numbers)
    return value


def _product(tokens: list[str], numbers: Counter[int]) -> Fraction:
    value = _atom(tokens, numbers)
    while tokens and tokens[0] in "*/":
        multiply = tokens.pop(0) == "*"
        factor = _atom(tokens, numbers)
        value = value * factor if multiply else value / factor
    return value


def _atom(tokens: list[str], numbers: Counter[int]) -> Fraction:
    token = tokens.pop(0)
    if token == "(":
        value = _sum(tokens, numbers)
        if tokens.pop(0) != ")":
            raise ValueError("a parenthesis is not closed")
        return value
    if token == "-":
        return -_atom(tokens, numbers)
    numbers[int(token)] += 1  # ValueError: an operator where a number belongs
    return Fraction(int(token))


class CountdownSource(ProblemSource):
    """`Make 22 from 3, 5, 7.`, answered by an expression such as `3*5+7` (or `3*5+7=22`).

    A problem has `min_terms` to `max_terms` numbers from 1 to `max_term`, and a solution, from left to right and with
    every number, whose steps are positive whole numbers; any other solution is as right. A worked document is that
    chain, `3*5=15+7=22`, each step wrong by ±1 to ±9 with probability `step_error_rate`, with the expression as its
    answer; a guess is a random expression of the numbers. The held-out problems are excluded by their prompt.
    """

    works_in_equations = True

    def __init__(self, cfg: ProblemConfig, seed: int):
        self._cfg, self._seed = cfg, seed

        def draw(count: int, attempt: int) -> list[Problem]:
            rng = random_generator(seed, "held-out problems", attempt)
            return [self._draw(rng) for _ in range(count)]

        self.test = hold_out(cfg.test_problems, draw)
        self._held_out = {problem.key for problem in self.test}

    def sample(self, step: int, count: int, purpose: str, level: int = 0) -> list[Problem]:
        return self._training(random_generator(self._seed, purpose, step), count)

    def documents(self, step: int, count: int, purpose: str) -> list[Document]:
        cfg, rng = self._cfg, random_generator(self._seed, purpose, step)
        worked_P, bare_P = document_kinds(cfg, count, rng)
        documents = []
        for row, problem in enumerate(self._training(rng, count)):
            if worked_P[row]:
                completion = tagged_completion(self._with_mistakes(problem, rng), problem.answer)
            else:
                completion = tagged_completion(None if bare_P[row] else "", self._guess(problem, rng))
            documents.append(Document(problem.prompt, completion, bool(worked_P[row])))
        return documents

    def is_correct(self, problem: Problem, answer: str) -> bool:
        """Whether the expression has the target's value and no number more often than the problem has it.

        What follows one = must be the target, written as a number.
        """
        target, *given = map(int, re.findall(r"[0-9]+", problem.key))
        expression, equals, result = answer.partition("=")
        found = value_of(expression)
        if found is None or (equals and result.strip() != str(target)):
            return False
        value, numbers = found
        return value == target and numbers <= Counter(given)

    def _training(self, rng: np.random.Generator, count: int) -> list[Problem]:
        problems: list[Problem] = []
        while len(problems) < count:
            problem = self._draw(rng)
            if problem.key not in self._held_out:
                problems.append(problem)
        return problems

    def _draw(self, rng: np.random.Generator) -> Problem:
        cfg = self._cfg
        numbers = rng.integers(1, cfg.max_term + 1, int(rng.integers(cfg.min_terms, cfg.max_terms + 1))).tolist()
        value, expression, working = numbers[0], str(numbers[0]), str(numbers[0])
        for place, number in enumerate(numbers[1:], start=1):
            results = {"+": value + number, "*": value * number}
            if value > number:
                results["-"] = value - number
            if value % number == 0:
                results["/"] = value // number
            signs = sorted(sign for sign, result in results.items() if result <= 100 * cfg.max_term) or ["+"]
            sign = signs[int(rng.integers(len(signs)))]
            value = results[sign]
            bracket = sign in "*/" and place > 1
            expression = f"({expression}){sign}{number}" if bracket else f"{expression}{sign}{number}"
            working += f"{sign}{number}={value}"
        shown = ", ".join(map(str, sorted(numbers)))
        prompt = f"Make {value} from {shown}."
        return Problem(prompt, expression, prompt, working)

    def _with_mistakes(self, problem: Problem, rng: np.random.Generator) -> str:
        """The working with wrong results; the next step goes on from the right one."""

        def written(match: re.Match[str]) -> str:
            if rng.random() >= self._cfg.step_error_rate:
                return match[0]
            return f"={int(match[1]) + int(rng.integers(1, 10)) * int(rng.choice([-1, 1]))}"

        return re.sub(r"=([0-9]+)", written, problem.worked or "")

    def _guess(self, problem: Problem, rng: np.random.Generator) -> str:
        numbers = rng.permutation([int(n) for n in re.findall(r"[0-9]+", problem.key)[1:]]).tolist()
        signs = rng.choice(list("+-*"), len(numbers) - 1).tolist()
        return str(numbers[0]) + "".join(f"{sign}{number}" for sign, number in zip(signs, numbers[1:], strict=True))
