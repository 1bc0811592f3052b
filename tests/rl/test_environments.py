"""Environments: named reward parts for completions, and the random control."""

import numpy as np
import pytest

from moe_jax.config import ProblemConfig, RewardConfig
from moe_jax.data import DataError
from moe_jax.data.problems import load_problems
from moe_jax.rl.environments import VerifiableEnvironment
from moe_jax.rng import random_generator

SOURCE = load_problems(ProblemConfig(min_terms=3, max_terms=3, test_problems=16), seed=0)


def rng() -> np.random.Generator:
    return random_generator(0, "reward", 0, 0)


def test_parts_of_right_wrong_and_malformed_completions():
    environment = VerifiableEnvironment(SOURCE, RewardConfig())
    problem = environment.problems(0, 1)[0]
    right = f"<think>{problem.worked}</think><answer>{problem.answer}</answer><eos>"
    assert environment.score(problem, right, True, rng()) == pytest.approx(
        {"reward": 1.1, "accuracy": 1, "format": 1, "worked": 1}
    )
    guess = "<think></think><answer>999</answer><eos>"
    assert environment.score(problem, guess, True, rng()) == pytest.approx(
        {"reward": 0.1, "accuracy": 0, "format": 1, "worked": 0}
    )
    bare = f"<answer>{problem.answer}</answer><eos>"
    assert environment.score(problem, bare, True, rng()) == {"reward": 0, "accuracy": 1, "format": 0, "worked": 0}
    assert environment.score(problem, right, False, rng()) == {"reward": 0, "accuracy": 0, "format": 0, "worked": 1}


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
            environment.score(problem, text, True, random_generator(0, "reward", step, index))
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
    assert environment.score(problem, right, True, rng())["accuracy"] == 1
    assert environment.score(problem, right, True, rng())["worked"] == 1
    verbose = f"<think></think><answer>It is {problem.answer}</answer>"
    assert environment.score(problem, verbose, True, rng())["accuracy"] == 0


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
