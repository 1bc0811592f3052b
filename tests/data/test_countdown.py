"""Countdown: any right expression counts, nothing else does, and nothing is executed."""

import re
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.config import ProblemConfig
from moe_jax.data.countdown import value_of
from moe_jax.data.problems import Problem, load_problems

CFG = ProblemConfig(source="countdown", min_terms=3, max_terms=4, max_term=12, test_problems=40)
SOURCE = load_problems(CFG, seed=0)


def test_problems_have_the_solution_they_say():
    problems = SOURCE.test + SOURCE.sample(3, 200, "rl")
    for problem in problems:
        assert SOURCE.is_correct(problem, problem.answer)
        target, *numbers = map(int, re.findall(r"\d+", problem.prompt))
        assert value_of(problem.answer) == (target, Counter(numbers))
        assert 3 <= len(numbers) <= 4 and min(numbers) >= 1 and max(numbers) <= 12 and target > 0
        assert problem.worked and problem.worked.endswith(f"={target}")
    assert all(sign in "".join(problem.answer for problem in problems) for sign in "+-*/(")


def test_problems_depend_on_seed_purpose_and_step_and_are_not_held_out():
    again = load_problems(CFG, seed=0)
    assert again.test == SOURCE.test and again.sample(3, 50, "rl") == SOURCE.sample(3, 50, "rl")
    assert SOURCE.sample(3, 50, "rl") != SOURCE.sample(4, 50, "rl") != SOURCE.sample(4, 50, "control")
    held_out = {problem.key for problem in SOURCE.test}
    assert len(held_out) == 40
    assert not held_out & {problem.key for step in range(20) for problem in SOURCE.sample(step, 100, "rl")}


def test_few_problems_leave_some_to_train_on():
    few = load_problems(
        ProblemConfig(source="countdown", min_terms=2, max_terms=2, max_term=2, test_problems=50), seed=0
    )
    assert 1 <= len(few.test) < 8 and len(few.sample(0, 20, "rl")) == 20


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("3*5+7", True),
        (" 7 + (3 * 5) ", True),
        ("3*5+7=22", True),
        ("5*3--7", True),
        ("3*5+7=21", False),
        ("3*5+7=22=22", False),
        ("22", False),  # a number that is not there
        ("3*5+7+2-2", False),
        ("3*5+7*1", False),
        ("5+5+5+7", False),
        ("(3*5+7", False),
        ("3*5+7)", False),
        ("3*5+", False),
        ("", False),
        ("3*5+7 ", True),
        ("3**5+7", False),
        ("3//5", False),
        ("__import__('os').getpid()", False),
        ("7/(5-5)", False),
        ("٣*5+7", False),
        ("(" * 150 + "3*5+7", False),
        ("9" * 100, False),
        ("9**9**9", False),
        ("-" * 5000 + "1", False),
    ],
)
def test_only_expressions_of_the_given_numbers_count(answer, right):
    problem = Problem("Make 22 from 3, 5, 7.", "3*5+7", "Make 22 from 3, 5, 7.")
    assert SOURCE.is_correct(problem, answer) is right


def test_a_solution_may_leave_numbers_out():
    problem = Problem("Make 8 from 3, 5, 7.", "", "Make 8 from 3, 5, 7.")
    assert SOURCE.is_correct(problem, "5+3") and not SOURCE.is_correct(problem, "3+3+2")


expressions = st.recursive(
    st.integers(0, 99).map(str),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map("".join) | inner.map("({})".format),
    max_leaves=8,
)


@given(expressions)
def test_values_are_those_of_exact_arithmetic(expression):
    try:
        expected = eval(re.sub(r"(\d+)", r"Fraction(\1)", expression), {"Fraction": Fraction})
    except ZeroDivisionError:
        expected = None
    found = value_of(expression)
    if len(expression) <= 200:
        assert (None if found is None else found[0]) == expected


def test_documents_are_worked_or_guessed():
    documents = SOURCE.documents(0, 100, "pretrain")
    assert documents == load_problems(CFG, seed=0).documents(0, 100, "pretrain")
    assert sum(document.worked for document in documents) == 40
    assert sum("<think>" not in document.completion for document in documents) == 10
    for document in documents:
        answer = re.fullmatch(r"(?:<think>.*</think>)?<answer>(.*)</answer><eos>", document.completion)
        assert answer and value_of(answer[1]) is not None
        if document.worked:
            assert SOURCE.is_correct(Problem(document.prompt, "", document.prompt), answer[1])
