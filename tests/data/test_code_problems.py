"""Code problems: references pass, wrong ones fail, files are read, tests stay here."""

import json

import pytest

from moe_jax.config import ConfigError, ProblemConfig, SandboxConfig
from moe_jax.data import DataError
from moe_jax.data.code_problems import source_code
from moe_jax.data.problems import load_problems

BOX = SandboxConfig(seconds=1, workers=2)
CFG = ProblemConfig(source="code", test_problems=60, sandbox=BOX)
MBPP = {
    "text": "Write a function that adds.",
    "code": "def add(a, b):\n    return a + b",
    "test_list": ["assert add(1, 2) == 3", "assert add((1,), (2,)) == (1, 2)", "assert set(add([1], [])) == {1}"],
}
HUMAN_EVAL = {
    "prompt": 'from typing import List\n\n\ndef twice(xs: List[int]) -> List[int]:\n    """Doubles."""\n',
    "entry_point": "twice",
    "canonical_solution": "    return [2 * x for x in xs]\n",
    "test": """
def check(candidate):
    assert candidate([1]) == [2]
    assert candidate([]) == []
    for i in range(3):
        assert candidate([i]) == [2 * i]
""",
}
OWN = {"prompt": "Largest.", "function": "top", "tests": [[[[1, 3, 2]], 3], [[[5]], 5]], "solution": "top = max"}


@pytest.fixture(scope="module")
def source():
    return load_problems(CFG, seed=0)


def test_generated_references_pass_their_own_tests(source):
    problems = source.test + source.sample(0, 60, "rl")
    assert source.credits([(problem, problem.answer) for problem in problems]) == [1.0] * len(problems)
    assert {"list xs", "text xs"} == {kind for kind in ("list xs", "text xs") for p in problems if kind in p.prompt}
    others = [problem.answer for problem in problems[1:] + problems[:1]]
    credits = source.credits(list(zip(problems, others, strict=True)))
    assert sum(credit == 1 for credit in credits) < 0.1 * len(problems)
    assert any(0 < credit < 1 for credit in credits)  # partial, for those who ask for it


def test_generated_problems_depend_on_seed_purpose_and_step(source):
    again = load_problems(CFG, seed=0)
    assert again.test == source.test and again.sample(2, 20, "rl") == source.sample(2, 20, "rl")
    assert [p.entry for p in again.test] == [p.entry for p in source.test]
    assert source.sample(2, 20, "rl") != source.sample(3, 20, "rl")
    held_out = {problem.key for problem in source.test}
    assert len(held_out) == 60
    assert not held_out & {problem.key for problem in source.sample(0, 2000, "rl")}


def test_documents_are_worked_or_guessed(source):
    documents = source.documents(0, 50, "pretrain")
    assert sum(document.worked for document in documents) == 20
    assert all("def f(xs):\n    return " in document.completion for document in documents)
    assert documents == load_problems(CFG, seed=0).documents(0, 50, "pretrain")


@pytest.mark.parametrize(
    "answer", ["```python\n{}```", "Here:\n```\n{}```\nDone.", "```py\ndef f(xs): return 0\n```\nor\n```python\n{}```"]
)
def test_code_is_read_from_its_fence(source, answer):
    problem = source.test[0]
    assert source_code(answer.format(problem.answer)) == problem.answer
    assert source.is_correct(problem, answer.format(problem.answer))


def test_a_hostile_answer_costs_one_wrong_answer(source):
    good, bad = source.test[:2]
    answers = [(bad, "def f(xs):\n    while True: pass"), (good, good.answer), (bad, "import os\nos._exit(0)")]
    assert source.credits(answers) == [0.0, 1.0, 0.0]


def write(folder, *records, test=({**OWN, "prompt": "Held out."},)) -> ProblemConfig:
    for name, lines in (("train", records), ("test", test)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ProblemConfig(source="code", path=str(folder), sandbox=BOX)


def test_files_of_three_formats(tmp_path):
    source = load_problems(write(tmp_path, OWN, MBPP, HUMAN_EVAL), seed=0)
    problems = {problem.entry["function"]: problem for problem in source.sample(0, 3, "rl") if problem.entry}
    assert set(problems) == {"top", "add", "twice"}
    assert source.credits([(problem, problem.answer) for problem in problems.values()]) == [1.0] * 3
    assert [len(problems[name].entry["tests"]) for name in ("top", "add", "twice")] == [2, 2, 2]
    add, twice = problems["add"], problems["twice"]
    assert add.prompt == "Write a function that adds.\nWrite it as a Python function named add."
    assert source.credits([(add, "def add(a, b): return 3")]) == [0.5]
    assert source.is_correct(twice, "    return [x + x for x in xs]")  # the prompt goes on
    assert source.is_correct(twice, "def twice(xs: List[int]): return [x + x for x in xs]")  # with its imports
    assert not source.is_correct(twice, "    return xs")
    assert all("==" not in problem.prompt for problem in problems.values())


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "x"}, "has neither 'tests'"),
        ({**OWN, "tests": [[1, 2]]}, r"\[arguments, expected\]"),
        ({**OWN, "function": 3}, "field 'function' is int"),
        ({**MBPP, "test_list": ["assert f(1) == 1", "assert g(1) == 1"]}, "several functions: f, g"),
        ({**MBPP, "test_list": ["assert f(1 == 1"]}, "a test is not Python"),
    ],
)
def test_malformed_records_are_named(tmp_path, record, message):
    with pytest.raises(DataError, match=rf"train\.jsonl, line 2: .*{message}"):
        load_problems(write(tmp_path, OWN, record), seed=0)


def test_records_without_a_readable_test_are_left_out(tmp_path):
    unreadable = {**MBPP, "text": "Other.", "test_list": ["assert abs(f(1) - 2) < 1e-3"]}
    source = load_problems(write(tmp_path, OWN, unreadable), seed=0)
    assert {problem.prompt for problem in source.sample(0, 4, "rl")} == {
        "Largest.\nWrite it as a Python function named top."
    }
    with pytest.raises(DataError, match="no record has a test"):
        load_problems(write(tmp_path, unreadable), seed=0)


def test_limits_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match=r"SandboxConfig\.memory_mb = 8"):
        SandboxConfig(memory_mb=8)
