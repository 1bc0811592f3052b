"""Environments: named reward parts for completions, and the random control."""

import numpy as np
import pytest

from moe_jax.config import ProblemConfig, RewardConfig, SandboxConfig
from moe_jax.data import DataError
from moe_jax.data.problems import load_problems
from moe_jax.rl.environments import Completion, VerifiableEnvironment
from moe_jax.rng import random_generator

SOURCE = load_problems(ProblemConfig(min_terms=3, max_terms=3, test_problems=16), seed=0)


def rng() -> np.random.Generator:
    return random_generator(0, "reward", 0, 0)


def score(environment, problem, text, finished=True, rng=rng):
    return environment.score([Completion(problem, text, finished, tokens=8, room=32, rng=rng())])[0]


def test_parts_of_right_wrong_and_malformed_completions():
    environment = VerifiableEnvironment(SOURCE, RewardConfig())
    problem = environment.problems(0, 1)[0]
    right = f"<think>{problem.worked}</think><answer>{problem.answer}</answer><eos>"
    assert score(environment, problem, right, True) == pytest.approx(
        {"reward": 1.1, "accuracy": 1, "format": 1, "worked": 1}
    )
    guess = "<think></think><answer>999</answer><eos>"
    assert score(environment, problem, guess, True) == pytest.approx(
        {"reward": 0.1, "accuracy": 0, "format": 1, "worked": 0}
    )
    bare = f"<answer>{problem.answer}</answer><eos>"
    assert score(environment, problem, bare, True) == {"reward": 0, "accuracy": 1, "format": 0, "worked": 0}
    assert score(environment, problem, right, False) == {"reward": 0, "accuracy": 0, "format": 0, "worked": 1}


def test_readability_is_told_and_not_rewarded():
    environment = VerifiableEnvironment(SOURCE, RewardConfig(), language="latin")
    problem = environment.problems(0, 1)[0]
    for word, expected in (("and", 1), ("加", 0)):
        think = problem.worked.replace("+", word)
        text = f"<think>{think}</think><answer>{problem.answer}</answer><eos>"
        parts = {"reward": 1.1, "accuracy": 1, "format": 1, "worked": 1, "readable": expected}
        assert score(environment, problem, text) == pytest.approx(parts)
        assert score(environment, problem, text, finished=False)["readable"] == 0


def test_problems_are_those_of_the_purpose():
    environment = VerifiableEnvironment(SOURCE, RewardConfig(), purpose="control")
    assert environment.problems(5, 8) == SOURCE.sample(5, 8, "control")
    assert environment.problems(5, 8) != VerifiableEnvironment(SOURCE, RewardConfig()).problems(5, 8)


def test_random_reward_is_a_fair_coin_that_does_not_look():
    environment = VerifiableEnvironment(SOURCE, RewardConfig(random=True))
    problem = SOURCE.test[0]
    right = f"<think>{problem.worked}</think><answer>{problem.answer}</answer><eos>"
    rewards = {}
    for text in (right, "nonsense"):
        scores = [
            score(environment, problem, text, rng=lambda: random_generator(0, "reward", step, index))  # noqa: B023
            for step in range(20)
            for index in range(50)
        ]
        rewards[text] = [score["reward"] for score in scores]
        assert {score["accuracy"] for score in scores} == {float(text == right)}
        assert {score["format"] for score in scores} == {float(text == right)}
    assert rewards[right] == rewards["nonsense"]
    assert set(rewards[right]) == {0.0, 1.0}
    assert abs(np.mean(rewards[right]) - 0.5) < 0.05


def test_reasoning_gym_partial_scores_are_worth_nothing():
    pytest.importorskip("reasoning_gym")
    source = load_problems(ProblemConfig(source="reasoning_gym", task="chain_sum", test_problems=4), seed=0)
    environment = VerifiableEnvironment(source, RewardConfig())
    problem = source.test[0]
    right = f"<think>so</think><answer>{problem.answer}</answer>"
    assert score(environment, problem, right, True)["accuracy"] == 1
    assert score(environment, problem, right, True)["worked"] == 1
    verbose = f"<think></think><answer>It is {problem.answer}</answer>"
    assert score(environment, problem, verbose, True)["accuracy"] == 0


def test_problems_that_do_not_fit_are_replaced_and_counted():
    source = load_problems(ProblemConfig(min_terms=2, max_terms=4, test_problems=10), seed=0)
    short = VerifiableEnvironment(source, RewardConfig(), fits=lambda problem: len(problem.prompt) <= 4)
    problems = short.problems(3, 20)
    assert len(problems) == 20 and all(len(problem.prompt) <= 4 for problem in problems)
    assert short.skipped > 0
    assert problems == VerifiableEnvironment(source, RewardConfig(), fits=short._fits).problems(3, 20)
    impossible = VerifiableEnvironment(source, RewardConfig(), fits=lambda problem: False)
    with pytest.raises(DataError, match="--prompt-length"):
        impossible.problems(0, 4)


def test_parts_that_have_a_weight_are_added():
    cfg = RewardConfig(language_weight=0.5, length_weight=-0.4, repetition_weight=1.0, repetition_ngram=1)
    environment = VerifiableEnvironment(SOURCE, cfg)
    problem = SOURCE.test[0]
    scores = score(environment, problem, f"<think>so да so</think><answer>{problem.answer}</answer>")
    assert scores["language"] == pytest.approx(2 / 3) and scores["length"] == 8 / 32
    assert scores["repetition"] == 0  # the tags stand on the words beside them
    assert scores["reward"] == pytest.approx(1.1 + 0.5 * 2 / 3 - 0.4 / 4)
    silent = score(environment, problem, f"<think>{problem.worked}</think><answer>{problem.answer}</answer>")
    assert silent["language"] is None and silent["reward"] == pytest.approx(1.1 - 0.4 / 4)


def test_partial_credit_is_paid_where_it_is_asked_for():
    pytest.importorskip("reasoning_gym")
    source = load_problems(ProblemConfig(source="reasoning_gym", task="chain_sum", test_problems=4), seed=0)
    problem = source.test[0]
    verbose = f"<think>so</think><answer>It is {problem.answer}</answer>"
    strict = score(VerifiableEnvironment(source, RewardConfig()), problem, verbose)
    assert strict["reward"] == pytest.approx(0.1) and "credit" not in strict
    partial = score(VerifiableEnvironment(source, RewardConfig(partial_credit=True)), problem, verbose)
    assert partial["accuracy"] == 0 and 0 < partial["credit"] < 1
    assert partial["reward"] == pytest.approx(partial["credit"] + 0.1)


def test_completions_are_scored_together_and_in_order():
    environment = VerifiableEnvironment(SOURCE, RewardConfig())
    problems = environment.problems(0, 8)
    completions = [
        Completion(p, f"<think></think><answer>{p.answer if i % 2 else 'x'}</answer>", i != 3, 8, 32, rng())
        for i, p in enumerate(problems)
    ]
    assert [parts["accuracy"] for parts in environment.score(completions)] == [0, 1, 0, 0, 0, 1, 0, 1]


def test_code_is_an_environment_too():
    cfg = ProblemConfig(source="code", test_problems=4, sandbox=SandboxConfig(seconds=1, workers=2))
    environment = VerifiableEnvironment(load_problems(cfg, seed=0), RewardConfig())
    problem = environment.problems(0, 1)[0]
    right, wrong = f"<think>.</think><answer>{problem.answer}</answer>", "<think>.</think><answer>exit()</answer>"
    assert score(environment, problem, right)["reward"] == pytest.approx(1.1)
    assert score(environment, problem, wrong)["reward"] == pytest.approx(0.1)


def test_a_curriculum_follows_the_accuracies_and_nothing_else():
    pytest.importorskip("reasoning_gym")
    cfg = ProblemConfig(
        source="reasoning_gym", task="chain_sum", test_problems=22, curriculum_threshold=0.5, curriculum_window=2
    )
    source = load_problems(cfg, seed=0)
    trained, resumed = VerifiableEnvironment(source, RewardConfig()), VerifiableEnvironment(source, RewardConfig())
    accuracies, seen = [0.9, 0.2, 0.6, 0.7, 0.1, 1.0, 1.0], []
    for step, accuracy in enumerate(accuracies):
        seen.append((trained.level, trained.problems(step, 4)))
        trained.observe(step, accuracy)
    assert [level for level, _ in seen] == [0, 0, 1, 1, 2, 2, 3]
    for step, accuracy in enumerate(accuracies[:5]):
        resumed.observe(step, accuracy)
    assert (resumed.level, resumed.problems(5, 4)) == seen[5]
    problem = seen[-1][1][0]
    assert score(trained, problem, f"<think></think><answer>{problem.answer}</answer>")["level"] == 3
