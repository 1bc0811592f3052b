"""Code: the answer is a Python function, and unit tests in a sandbox judge it.

Tests are pairs of arguments and the expected value. The expected values stay in this process (`sandbox.py`).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.config import ProblemConfig
from moe_jax.data import DataError
from moe_jax.data.problems import (
    Document,
    FileSource,
    Problem,
    ProblemSource,
    document_kinds,
    hold_out,
    question_key,
    read_jsonl,
    tagged_completion,
    text_field,
)
from moe_jax.data.sandbox import Program, Sandbox, same_value
from moe_jax.rng import random_generator

_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
_MOST_TESTS = 100


def source_code(answer: str) -> str:
    """What stands in an answer's last code fence, or the answer itself."""
    fenced = _FENCE.findall(answer)
    return fenced[-1] if fenced else answer


class CodeJudge:
    """Runs answers against their problems' tests, `entry["tests"]` of `entry["function"]`."""

    def __init__(self, cfg: ProblemConfig):
        """
        Raises:
            DataError: this machine cannot confine a program.
        """
        self._sandbox = Sandbox(cfg.sandbox)

    def credits(self, answers: Sequence[tuple[Problem, str]]) -> list[float]:
        """The shares of tests passed, all answers' programs side by side."""
        programs, expected = [], []
        for problem, answer in answers:
            entry = problem.entry or {}
            code = source_code(answer)
            if entry["stem"]:
                defined = f"def {entry['function']}" in code
                code = f"{_imports(entry['stem'])}\n{code}" if defined else entry["stem"] + code
            programs.append(Program(code, entry["function"], [arguments for arguments, _ in entry["tests"]]))
            expected.append([value for _, value in entry["tests"]])
        found = []
        for results, values in zip(self._sandbox.run(programs), expected, strict=True):
            passed = [result.ok and _same(result.value, value) for result, value in zip(results, values, strict=True)]
            found.append(sum(passed) / len(passed))
        return found


def _same(value: Any, expected: Any) -> bool:
    try:
        return same_value(value, expected)
    except RecursionError:  # nested as deep as it could be read
        return False


def _imports(stem: str) -> str:
    return "\n".join(line for line in stem.splitlines() if line.startswith(("import ", "from ")))


class CodeFileSource(FileSource):
    """Problems with tests, one JSON object a line, in `train.jsonl` and `test.jsonl`; three formats are read:

    - `prompt`, `function`, `tests`: [[arguments, expected], …], and perhaps `solution`;
    - MBPP (arXiv:2108.07732): `text` (or `prompt`), `code`, `test_list`;
    - HumanEval (arXiv:2107.03374): `prompt`, `entry_point`, `test`, `canonical_solution`.

    Of the last two, tests are the lines `assert f(literals) == literal`; a record without one is left out. Prompts name
    the function and show no test, whose expected values a program could repeat.
    """

    def __init__(self, cfg: ProblemConfig, seed: int):
        super().__init__(cfg, seed, _read_code)
        self._judge = CodeJudge(cfg)

    def is_correct(self, problem: Problem, answer: str) -> bool:
        return self._judge.credits([(problem, answer)]) == [1.0]

    def credits(self, answers: Sequence[tuple[Problem, str]]) -> list[float]:
        return self._judge.credits(answers)


def _read_code(path: Path) -> list[Problem]:
    remedy = "ProblemConfig.path must name a folder with train.jsonl and test.jsonl of code problems"
    problems = [
        problem for problem in read_jsonl(path, _code_problem, remedy) if problem.entry and problem.entry["tests"]
    ]
    if not problems:
        raise DataError(
            f"{path}: no record has a test of the form `assert f(literals) == literal`; convert its tests to"
            " `tests`: [[arguments, expected], …]"
        )
    return problems


def _code_problem(record: dict[str, Any]) -> Problem:
    if "tests" in record:
        function, tests = text_field(record, "function"), record["tests"]
        if not isinstance(tests, list) or not all(
            isinstance(test, list) and len(test) == 2 and isinstance(test[0], list) for test in tests
        ):
            raise ValueError("field 'tests' is not a list of [arguments, expected], with a list of arguments")
        return _problem(
            text_field(record, "prompt"), function, [(tuple(a), e) for a, e in tests], record.get("solution", "")
        )
    if "test_list" in record:
        tests = record["test_list"]
        if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
            raise ValueError("field 'test_list' is not a list of texts")
        calls = [call for test in tests for call in _calls(test)]
        text = text_field(record, "text" if "text" in record else "prompt")
        functions = {name for name, _, _ in calls}
        if len(functions) > 1:
            raise ValueError(f"field 'test_list' calls several functions: {', '.join(sorted(functions))}")
        function = functions.pop() if functions else ""
        return _problem(text, function, [(arguments, value) for _, arguments, value in calls], record.get("code", ""))
    if "entry_point" in record:
        function, stem = text_field(record, "entry_point"), text_field(record, "prompt")
        calls = [call for call in _calls(text_field(record, "test")) if call[0] in ("candidate", function)]
        solution = stem + record.get("canonical_solution", "")
        return _problem(stem, function, [(arguments, value) for _, arguments, value in calls], solution, stem)
    raise ValueError("has neither 'tests', nor 'test_list' (MBPP), nor 'entry_point' and 'test' (HumanEval)")


def _problem(
    text: str, function: str, tests: list[tuple[tuple[Any, ...], Any]], solution: str, stem: str = ""
) -> Problem:
    text = text.strip()
    prompt = text if f"{function}(" in text else f"{text}\nWrite it as a Python function named {function}."
    entry = {"function": function, "tests": tests[:_MOST_TESTS], "stem": stem}
    return Problem(prompt, solution, question_key(text), entry=entry)


def _calls(code: str) -> list[tuple[str, tuple[Any, ...], Any]]:
    """(function, arguments, expected) of each assertion `f(literals) == literal` in a text."""
    try:
        nodes = list(ast.walk(ast.parse(code)))
    except SyntaxError as error:
        raise ValueError(f"a test is not Python: {error.msg}") from error
    found = []
    for node in nodes:
        if not isinstance(node, ast.Assert) or not isinstance(node.test, ast.Compare):
            continue
        call, operations, right = node.test.left, node.test.ops, node.test.comparators[0]
        if len(operations) != 1 or not isinstance(operations[0], ast.Eq | ast.Is) or not isinstance(call, ast.Call):
            continue
        if not isinstance(call.func, ast.Name) or call.keywords:
            continue
        try:
            arguments = tuple(ast.literal_eval(argument) for argument in call.args)
            found.append((call.func.id, arguments, ast.literal_eval(right)))
        except ValueError:
            continue
    return found


# -------------------------------------------------------------------------------------------------- generated problems

_LIST_FILTERS = {
    "even numbers": "x % 2 == 0",
    "odd numbers": "x % 2 == 1",
    "positive numbers": "x > 0",
    "negative numbers": "x < 0",
    "numbers above {k}": "x > {k}",
    "numbers below {k}": "x < {k}",
    "multiples of {m}": "x % {m} == 0",
    "numbers": "",
}
_LIST_MAPS = {
    "doubled": "2 * x",
    "squared": "x * x",
    "negated": "-x",
    "plus {k}": "x + {k}",
    "times {m}": "{m} * x",
    "without their signs": "abs(x)",
    "": "x",
}
_LIST_ENDS = {
    "the list of": "[{each}]",
    "the sum of": "sum({each})",
    "the largest, or 0 if there is none, of": "max(({each}), default=0)",
    "the smallest, or 0 if there is none, of": "min(({each}), default=0)",
    "in rising order": "sorted({each})",
    "in reverse": "[{each}][::-1]",
    "the set of": "set({each})",
    "how many different values there are among": "len(set({each}))",
}
_TEXT_FILTERS = {
    "vowels": 'x in "aeiou"',
    "letters that are no vowels": 'x.isalpha() and x not in "aeiou"',
    "digits": "x.isdigit()",
    "letters": "x.isalpha()",
    "characters other than spaces": 'x != " "',
    "letters before {c}": 'x.isalpha() and x < "{c}"',
    "characters other than {c}": 'x != "{c}"',
}
_TEXT_MAPS = {"in capitals": "x.upper()", "each twice": "2 * x", "": "x"}
_TEXT_ENDS = {
    "the text of": '"".join({each})',
    "in reverse": '"".join({each})[::-1]',
    "how many there are of": "sum(1 for _ in ({each}))",
    "the set of": "set({each})",
    "the number of each, as a dictionary, of": "{{y: [{each}].count(y) for y in ({each})}}",
}
_NUM_TESTS = 12


class GeneratedCodeSource(ProblemSource):
    """Small functions of lists and texts, composed of a filter, a change of each item, and what is made of them all.

    `Write a Python function f(x) that returns the sum of the even numbers in the list xs, squared.` The reference is
    one expression, and its values on random arguments are the tests. A worked document names the parts between its
    think tags; a guess is another problem's solution. The held-out problems are excluded by their prompt.
    """

    def __init__(self, cfg: ProblemConfig, seed: int):
        self._cfg, self._seed = cfg, seed

        def draw(count: int, attempt: int) -> list[Problem]:
            rng = random_generator(seed, "held-out problems", attempt)
            return [_generate(rng) for _ in range(count)]

        self.test = hold_out(cfg.test_problems, draw)
        self._held_out = {problem.key for problem in self.test}
        self._judge = CodeJudge(cfg)

    def sample(self, step: int, count: int, purpose: str, level: int = 0) -> list[Problem]:
        return self._training(random_generator(self._seed, purpose, step), count)

    def documents(self, step: int, count: int, purpose: str) -> list[Document]:
        rng = random_generator(self._seed, purpose, step)
        worked_P, bare_P = document_kinds(self._cfg, count, rng)
        problems, others = self._training(rng, count), self._training(rng, count)
        documents = []
        for row, problem in enumerate(problems):
            if worked_P[row]:
                completion = tagged_completion(problem.worked, problem.answer)
            else:
                completion = tagged_completion(None if bare_P[row] else "", others[row].answer)
            documents.append(Document(problem.prompt, completion, bool(worked_P[row])))
        return documents

    def is_correct(self, problem: Problem, answer: str) -> bool:
        return self._judge.credits([(problem, answer)]) == [1.0]

    def credits(self, answers: Sequence[tuple[Problem, str]]) -> list[float]:
        return self._judge.credits(answers)

    def _training(self, rng: np.random.Generator, count: int) -> list[Problem]:
        problems: list[Problem] = []
        while len(problems) < count:
            problem = _generate(rng)
            if problem.key not in self._held_out:
                problems.append(problem)
        return problems


def _generate(rng: np.random.Generator) -> Problem:
    of_lists = bool(rng.integers(2))
    tables = (_LIST_FILTERS, _LIST_MAPS, _LIST_ENDS) if of_lists else (_TEXT_FILTERS, _TEXT_MAPS, _TEXT_ENDS)
    numbers = {"k": int(rng.integers(1, 10)), "m": int(rng.integers(2, 7)), "c": "bcdfghklmnprst"[rng.integers(14)]}

    def choose(table: Mapping[str, str]) -> tuple[str, str]:
        words = list(table)[rng.integers(len(table))]
        return words.format(**numbers), table[words]

    (which, condition), (change, changed), (what, whole) = map(choose, tables)
    condition, changed = condition.format(**numbers), changed.format(**numbers)
    each = f"{changed} for x in xs" + (f" if {condition}" if condition else "")
    expression = whole.format(each=each)
    kind = "list" if of_lists else "text"
    ending = f", {what}" if what.startswith("in ") else ""
    beginning = "the list of" if ending and of_lists else "the text of" if ending else what
    described = f"{beginning} the {which} in the {kind} xs" + (f", {change}" if change else "") + ending
    prompt = f"Write a Python function f(xs) that returns {described}."
    function: Callable[[Any], Any] = eval(f"lambda xs: {expression}", {})  # of the tables above, not of a model's
    arguments = [_list(rng) if of_lists else _text(rng) for _ in range(_NUM_TESTS)]
    tests = [((argument,), function(argument)) for argument in arguments]
    working = f"keep: {condition or 'all'}; each: {changed}; then: {whole.format(each='...')}"
    entry = {"function": "f", "tests": tests, "stem": ""}
    return Problem(prompt, f"def f(xs):\n    return {expression}\n", prompt, working, entry)


def _list(rng: np.random.Generator) -> list[int]:
    return rng.integers(-12, 25, int(rng.integers(0, 9))).tolist()


def _text(rng: np.random.Generator) -> str:
    return "".join(rng.choice(list("abcdefghiklmnoprstu 0123456789"), int(rng.integers(0, 13))))
