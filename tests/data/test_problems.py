"""Problems: deterministic, held-out problems stay held out, and documents keep the promised mixture."""

import importlib.util
import json
import re
import sys
import time

import pytest

from moe_jax.config import ConfigError, ProblemConfig
from moe_jax.data import DataError
from moe_jax.data.problems import Levels, load_problems, parse_number, read_problems, same_answer
from moe_jax.rng import random_generator

SMALL = ProblemConfig(min_terms=2, max_terms=4, test_problems=300)
needs_reasoning_gym = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="needs the extra reasoning-gym"
)


def answer_of(completion: str) -> int:
    match = re.search(r"<answer>(-?\d+)</answer><eos>$", completion)
    assert match
    return int(match[1])


def value_of(prompt: str) -> int:
    assert re.fullmatch(r"\d+([+-]\d+)+\?", prompt)
    return sum(int(term) for term in re.findall(r"[+-]?\d+", prompt))


@pytest.mark.parametrize("operations", ["+", "+-"])
def test_arithmetic_problems_are_right(operations):
    cfg = ProblemConfig(min_terms=3, max_terms=5, max_term=20, operations=operations, test_problems=64)
    source = load_problems(cfg, seed=0)
    problems = source.test + source.sample(0, 200, "rl")
    for problem in problems:
        assert problem.answer == str(value_of(problem.prompt))
        assert problem.worked is not None and problem.worked.endswith(f"={problem.answer}")
        assert source.is_correct(problem, problem.answer)
        assert not source.is_correct(problem, str(int(problem.answer) + 1))
    terms = [len(re.findall(r"\d+", problem.prompt)) for problem in problems]
    assert set(terms) == {3, 4, 5}
    numbers = {int(number) for problem in problems for number in re.findall(r"\d+", problem.prompt)}
    assert min(numbers) == 1 and max(numbers) == 20
    assert any(problem.answer.startswith("-") for problem in problems) == (operations == "+-")


def test_arithmetic_depends_on_seed_purpose_and_step_alone():
    source, again = load_problems(SMALL, seed=3), load_problems(SMALL, seed=3)
    source.sample(0, 10, "rl")  # what was drawn before must not matter
    assert source.sample(7, 10, "rl") == again.sample(7, 10, "rl")
    assert source.documents(7, 10, "pretrain") == again.documents(7, 10, "pretrain")
    assert source.test == again.test
    assert source.sample(7, 10, "rl") != source.sample(8, 10, "rl")
    assert source.sample(7, 10, "rl") != source.sample(7, 10, "control")
    other = load_problems(SMALL, seed=4)
    assert source.sample(7, 10, "rl") != other.sample(7, 10, "rl")
    assert {problem.key for problem in source.test} != {problem.key for problem in other.test}


def test_arithmetic_test_set_is_unique_and_never_drawn():
    source = load_problems(SMALL, seed=0)
    held_out = {problem.key for problem in source.test}
    assert len(source.test) == len(held_out) == 300
    drawn = {problem.key for step in range(20) for problem in source.sample(step, 300, "rl")}
    drawn |= {document.prompt for step in range(20) for document in source.documents(step, 300, "pretrain")}
    assert not drawn & held_out
    # Two-term sums are few (81): half are held out and half are left.
    assert len([key for key in held_out if key.count("+") == 1]) == 40
    assert len([key for key in drawn if key.count("+") == 1]) == 41


def test_more_held_out_problems_than_there_are_is_refused():
    with pytest.raises(ConfigError, match=r"ProblemConfig.test_problems = 2048.*404"):
        ProblemConfig(min_terms=2, max_terms=3)


def test_documents_keep_exact_shares_in_random_order():
    cfg = ProblemConfig(worked_fraction=0.4, bare_fraction=0.25)
    documents = load_problems(cfg, seed=0).documents(5, 100, "pretrain")
    worked = [document.worked for document in documents]
    assert sum(worked) == 40 and worked != sorted(worked, reverse=True)
    bare = [document for document in documents if "<think>" not in document.completion]
    assert len(bare) == 15 and not any(document.worked for document in bare)
    empty = [document for document in documents if document.completion.startswith("<think></think><answer>")]
    assert len(empty) == 45 and not any(document.worked for document in empty)


def test_worked_documents_follow_the_steps_they_write():
    cfg = ProblemConfig(worked_fraction=1.0, step_error_rate=0.3, operations="+-")
    wrong_steps = steps = 0
    for document in load_problems(cfg, seed=1).documents(0, 400, "pretrain"):
        match = re.fullmatch(r"<think>(\d)(.*)</think><answer>(-?\d+)</answer><eos>", document.completion)
        assert match
        value, terms = int(match[1]), [match[1]]
        for term, written in re.findall(r"([+-]\d+)=(-?\d+)", match[2]):
            error = int(written) - (value + int(term))
            assert abs(error) <= 9
            wrong_steps, steps = wrong_steps + (error != 0), steps + 1
            value = int(written)  # the mistake is carried on
            terms.append(term)
        assert "".join(terms) + "?" == document.prompt
        assert value == int(match[3])
    assert abs(wrong_steps / steps - 0.3) < 0.03


def test_worked_documents_without_errors_are_right():
    cfg = ProblemConfig(worked_fraction=1.0, step_error_rate=0.0)
    for document in load_problems(cfg, seed=1).documents(0, 50, "pretrain"):
        assert answer_of(document.completion) == value_of(document.prompt)


def test_guesses_are_as_far_off_as_configured():
    cfg = ProblemConfig(worked_fraction=0.0, min_terms=8, max_terms=8)
    documents = load_problems(cfg, seed=0).documents(0, 4000, "pretrain")
    errors = [answer_of(document.completion) - value_of(document.prompt) for document in documents]
    mean = sum(errors) / len(errors)
    spread = (sum(error**2 for error in errors) / len(errors)) ** 0.5
    assert abs(mean) < 0.4
    assert abs(spread - 2.4 * 8**0.5) < 0.3


def test_documents_are_fast():
    source = load_problems(ProblemConfig(), seed=0)
    times = []
    for step in range(10):
        start = time.perf_counter()
        source.documents(step, 300, "pretrain")
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05


def test_random_generator_is_one_stream_per_purpose_and_indices():
    draws = [
        random_generator(*key).integers(2**60)
        for key in [(0, "a", 1), (0, "a", 2), (1, "a", 1), (0, "b", 1), (0, "a", 1, 0), (0, "a", 1, 1)]
    ]
    assert len(set(draws[:4] + draws[5:])) == 5
    assert random_generator(0, "a", 1).integers(2**60) == draws[0]


@pytest.mark.parametrize("text", ["1080", "1,080", " +1080 ", "1080.00", "1080.", "$1,080", "$ 1080.0", "01080"])
def test_numbers_are_equal_however_written(text):
    assert same_answer(text, "1080")


@pytest.mark.parametrize(
    "text", ["", "1080 or 1081", "10 80", "1,08,0", "108,0", "1080.01", "-1080", "x", "1e3", "١٠٨٠"]
)
def test_other_texts_are_no_such_number(text):
    assert not same_answer(text, "1080")


def test_negative_numbers():
    assert same_answer("-12", "-12.0") and same_answer("-$12", "-12") and same_answer("$-12", "-12")
    assert not same_answer("12", "-12")
    assert parse_number("0.1") != parse_number("0.10000000000000000000000000000000000001")


def test_answers_that_are_no_numbers_are_compared_as_text():
    assert same_answer(" yes ", "yes") and not same_answer("Yes", "yes")


def write_gsm8k(folder, train: list, test: list) -> ProblemConfig:
    for name, records in (("train", train), ("test", test)):
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return ProblemConfig(source="gsm8k", path=str(folder))


def gsm8k_record(number: int) -> dict:
    working = f"He has {number}/2 = <<{number}/2={number / 2}>>{number / 2}.\nTwice that is ${number:,}.\n"
    return {"question": f"Half of {number} apples, twice?", "answer": f"{working}#### {number:,}"}


def test_gsm8k_reads_the_original_format(tmp_path):
    train = [gsm8k_record(1000 + number) for number in range(20)]
    test = [gsm8k_record(5), {"question": " Half of 1003  apples,  TWICE?", "answer": "#### 1003"}]
    source = load_problems(write_gsm8k(tmp_path, train, test), seed=0)
    assert [problem.answer for problem in source.test] == ["5", "1003"]
    epoch = source.sample(0, 19, "rl")
    # Each problem once in an epoch, the one that stands in the test file (spaces and capitals aside) never.
    assert {problem.answer for problem in epoch} == {str(1000 + number) for number in range(20) if number != 3}
    problem = next(problem for problem in epoch if problem.answer == "1000")
    assert problem.prompt == "Half of 1000 apples, twice?"
    assert problem.worked == "He has 1000/2 = 500.0.\nTwice that is $1,000."
    assert source.is_correct(problem, "$1,000.00") and not source.is_correct(problem, "100")
    assert source.sample(1, 19, "rl") != epoch
    assert source.sample(0, 19, "control") != epoch
    assert source.sample(0, 45, "rl")[:19] == epoch


def test_gsm8k_documents(tmp_path):
    cfg = write_gsm8k(tmp_path, [gsm8k_record(1000 + number) for number in range(20)], [gsm8k_record(5)])
    source = load_problems(cfg, seed=0)
    documents = source.documents(2, 100, "pretrain")
    assert documents == load_problems(cfg, seed=0).documents(2, 100, "pretrain")
    assert sum(document.worked for document in documents) == 40
    assert sum("<think>" not in document.completion for document in documents) == 10
    for document in documents:
        truth = int(document.prompt.split()[2])
        if document.worked:
            assert document.completion.startswith(f"<think>He has {truth}/2 = {truth / 2}.\nTwice")
            assert answer_of(document.completion) == truth
        else:
            assert abs(answer_of(document.completion) - truth) < 20


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "a", "answer":', "not valid JSON"),
        ("[1]", "not a JSON object but list"),
        ({"question": "a"}, "field 'answer' is missing"),
        ({"question": 3, "answer": "#### 3"}, "field 'question' is int, not text"),
        ({"question": "a", "answer": "3"}, "does not end in '#### N'"),
        ({"question": "a", "answer": "#### three"}, "no number"),
        ({"question": " ", "answer": "#### 3"}, "'question' is empty"),
    ],
)
def test_gsm8k_names_file_and_line_of_what_is_malformed(tmp_path, line, message):
    cfg = write_gsm8k(tmp_path, [gsm8k_record(1), "", line], [gsm8k_record(5)])
    with pytest.raises(DataError, match=rf"train\.jsonl, line 3: .*{message}"):
        load_problems(cfg, seed=0)


def test_gsm8k_refuses_bytes_that_are_no_text(tmp_path):
    cfg = write_gsm8k(tmp_path, [gsm8k_record(1)], [gsm8k_record(5)])
    (tmp_path / "test.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(DataError, match=r"test\.jsonl, line 1: "):
        load_problems(cfg, seed=0)


def test_gsm8k_missing_empty_or_exhausted_files(tmp_path):
    with pytest.raises(DataError, match=r"test\.jsonl: cannot be read .*ProblemConfig\.path"):
        load_problems(ProblemConfig(source="gsm8k", path=str(tmp_path)), seed=0)
    with pytest.raises(DataError, match=r"train\.jsonl: holds no problem"):
        load_problems(write_gsm8k(tmp_path, [], [gsm8k_record(5)]), seed=0)
    with pytest.raises(DataError, match=r"train\.jsonl: all of its problems are in"):
        load_problems(write_gsm8k(tmp_path, [gsm8k_record(5)], [gsm8k_record(5)]), seed=0)


@needs_reasoning_gym
def test_reasoning_gym_task():
    cfg = ProblemConfig(source="reasoning_gym", task="chain_sum", test_problems=50)
    source = load_problems(cfg, seed=0)
    held_out = {problem.key for problem in source.test}
    assert len(held_out) == 50
    problems = source.sample(3, 40, "rl")
    assert problems == load_problems(cfg, seed=0).sample(3, 40, "rl")
    assert problems != source.sample(4, 40, "rl")
    assert not held_out & {problem.key for problem in problems}
    assert all(source.is_correct(problem, problem.answer) for problem in problems)
    assert not source.is_correct(problems[0], f"the answer is {problems[0].answer}")  # a partial score in the package
    documents = source.documents(3, 40, "rl")
    assert [document.prompt for document in documents] == [problem.prompt for problem in problems]
    assert not any(document.worked for document in documents)
    assert sum("<think>" not in document.completion for document in documents) == round(40 / 6)


@needs_reasoning_gym
def test_reasoning_gym_task_with_few_questions_leaves_some_to_train_on():
    source = load_problems(ProblemConfig(source="reasoning_gym", task="tower_of_hanoi", test_problems=300), seed=0)
    held_out = {problem.key for problem in source.test}
    assert 10 < len(held_out) == len(source.test) < 300
    assert not held_out & {problem.key for problem in source.sample(0, 100, "rl")}


@needs_reasoning_gym
def test_reasoning_gym_task_without_reference_answers():
    source = load_problems(ProblemConfig(source="reasoning_gym", task="graph_color", test_problems=5), seed=0)
    assert source.documents(0, 4, "pretrain")[0].completion.endswith("<answer></answer><eos>")
    assert not source.is_correct(source.test[0], "")


@needs_reasoning_gym
def test_reasoning_gym_checker_that_raises_judges_wrong():
    source = load_problems(ProblemConfig(source="reasoning_gym", task="prime_factorization", test_problems=5), seed=0)
    assert not source.is_correct(source.test[0], "x")


@needs_reasoning_gym
def test_reasoning_gym_unknown_task_names_the_nearest():
    with pytest.raises(DataError, match=r"'chainsum'.*chain_sum"):
        load_problems(ProblemConfig(source="reasoning_gym", task="chainsum"), seed=0)


def test_reasoning_gym_missing_package_names_the_remedy(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("reasoning_gym.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(DataError, match="pip install reasoning-gym"):
        load_problems(ProblemConfig(source="reasoning_gym", task="chain_sum"), seed=0)


@pytest.mark.parametrize(
    ("record", "answer"),
    [
        ({"question": "How many?", "answer": "7 of them\n#### 1,080"}, "1080"),
        (
            {"problem": "Which?", "solution": r"Not \boxed{1} but $\boxed{\frac{1}{2}}$.", "level": "Level 1"},
            r"\frac{1}{2}",
        ),
        ({"problem": "Which?", "solution": r"\boxed{1}", "answer": r"\pi"}, r"\pi"),
        ({"problem": "Which?", "answer": 204}, "204"),
    ],
)
def test_files_of_problems_in_both_formats(tmp_path, record, answer):
    lines, single = tmp_path / "problems.jsonl", tmp_path / "1.json"
    lines.write_text(json.dumps(record) + "\n\n")
    single.write_text(json.dumps(record, indent=2))
    (problem,) = read_problems(lines)
    assert problem.answer == answer and problem.prompt in record.values()
    assert read_problems(single) == [problem]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x"}', "line 2: has neither 'question' and 'answer'"),
        ('{"problem": "x", "solution": "7"}', r"line 2: field 'solution' has no \\boxed"),
        ('{"problem": "x"}', "line 2: field 'solution' is missing"),
        ("[]", "line 2: not a JSON object but list"),
    ],
)
def test_a_record_of_neither_format_is_named(tmp_path, line, message):
    file = tmp_path / "problems.jsonl"
    file.write_text('{"question": "x", "answer": "#### 1"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        read_problems(file)
    with pytest.raises(DataError, match=r"absent\.jsonl: cannot be read.*give a \.jsonl file"):
        read_problems(tmp_path / "absent.jsonl")


def test_stories_tell_the_sums():
    cfg = ProblemConfig(source="words", min_terms=2, max_terms=4, operations="+-", test_problems=100)
    source = load_problems(cfg, seed=0)
    problems = source.test + source.sample(0, 200, "rl")
    for problem in problems:
        match = re.fullmatch(r"(\w+) has (\d+) (\w+)\.((?: S?[Hh]e [a-z ]+ \d+\.)+) How many \3 now\?", problem.prompt)
        assert match
        amount = int(match[2])
        for verb, number in re.findall(r"[Hh]e ([a-z ]+) (\d+)\.", match[4]):
            amount += int(number) * (-1 if verb in ("drops", "gives away", "loses", "sells") else 1)
            assert amount >= 0
        assert problem.answer == str(amount) and source.is_correct(problem, str(amount))
        assert problem.worked and problem.worked.endswith(f"={amount}")
    prompts = [problem.prompt for problem in problems]
    assert any("sells" in prompt for prompt in prompts) and any("wins" in prompt for prompt in prompts)
    held_out = {problem.key for problem in source.test}
    assert len(held_out) == 100 and not held_out & {problem.key for problem in source.sample(1, 500, "rl")}
    assert source.sample(0, 9, "rl") == load_problems(cfg, seed=0).sample(0, 9, "rl")
    assert source.documents(0, 50, "base")[0].prompt.endswith(" now?")


def test_math_answers_are_judged_as_mathematics(tmp_path):
    pytest.importorskip("math_verify")
    for name, answers in (("train", ["\\frac{1}{2}", "12"]), ("test", ["x+1"])):
        records = [{"problem": f"{name} {a}?", "solution": f"So $\\boxed{{{a}}}$."} for a in answers]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    source = load_problems(ProblemConfig(source="math", path=str(tmp_path)), seed=0)
    problems = {problem.answer: problem for problem in source.sample(0, 2, "rl")}
    half = problems["\\frac{1}{2}"]
    for answer in ("\\boxed{0.5}", "0.5", "$\\dfrac{1}{2}$", "Thus \\boxed{\\frac12}"):
        assert source.is_correct(half, answer), answer
    for answer in ("2", "", "\\boxed{0.5} or \\boxed{2}", "no"):
        assert not source.is_correct(half, answer), answer
    assert source.is_correct(source.test[0], "1 + x")
    documents = source.documents(0, 10, "base")
    assert sum("boxed" in document.completion for document in documents) == sum(d.worked for d in documents) == 4


def test_levels_rise_when_a_window_of_steps_is_good():
    levels = Levels(count=3, threshold=0.5, window=2)
    assert levels.after([]) == levels.after([1.0]) == levels.after([0.4, 0.5]) == 0
    assert levels.after([0.4, 0.6]) == levels.after([0.0, 0.5, 0.5]) == 1
    assert levels.after([1.0, 1.0, 0.0, 1.0]) == 2  # the window begins anew with each level
    assert levels.after([1.0, 1.0, 1.0]) == 1
    assert levels.after([1.0] * 20) == 2
    assert Levels().after([1.0] * 20) == 0


@needs_reasoning_gym
def test_reasoning_gym_curriculum():
    cfg = ProblemConfig(source="reasoning_gym", task="chain_sum", test_problems=33, curriculum_threshold=0.7)
    source = load_problems(cfg, seed=0)
    assert source.levels == Levels(count=11, threshold=0.7, window=5)

    def longest(level: int) -> int:
        return max(len(re.findall(r"\d+", problem.prompt)) for problem in source.sample(0, 50, "rl", level))

    assert longest(0) < longest(4) < longest(10)
    assert source.sample(0, 9, "rl", 4) == load_problems(cfg, seed=0).sample(0, 9, "rl", 4)
    assert source.sample(0, 9, "rl", 4) != source.sample(1, 9, "rl", 4)
    terms = [len(re.findall(r"\d+", problem.prompt)) for problem in source.test]
    assert len(terms) == 33 and min(terms) == 2 and max(terms) > 8  # of all levels
    held_out = {problem.key for problem in source.test}
    assert not held_out & {problem.key for problem in source.sample(0, 200, "rl", 0)}
    assert len(source.documents(0, 20, "base")) == 20
    assert all(source.is_correct(problem, problem.answer) for problem in source.test)


@needs_reasoning_gym
def test_reasoning_gym_logic_and_partial_credit():
    source = load_problems(ProblemConfig(source="reasoning_gym", task="knights_knaves", test_problems=5), seed=0)
    problem = source.test[0]
    assert source.credits([(problem, problem.answer), (problem, "nobody")]) == [1.0, pytest.approx(0, abs=0.1)]
    chain = load_problems(ProblemConfig(source="reasoning_gym", task="chain_sum", test_problems=5), seed=0)
    verbose = f"the answer is {chain.test[0].answer}"
    assert 0 < chain.credits([(chain.test[0], verbose)])[0] < 1 and not chain.is_correct(chain.test[0], verbose)


def test_settings_of_other_sources_are_refused():
    for source, fields in (
        ("countdown", {"path": "x"}),
        ("words", {"task": "x"}),
        ("code", {"curriculum_threshold": 0.5}),
    ):
        with pytest.raises(ConfigError, match=rf"ProblemConfig\.{next(iter(fields))} = "):
            ProblemConfig(source=source, **fields)
    with pytest.raises(ConfigError, match=r"ProblemConfig\.path = ''"):
        ProblemConfig(source="math")
