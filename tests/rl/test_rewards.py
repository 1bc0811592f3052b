"""Rewards: exact, strict, and without a way to be paid for tricks."""

import pytest

from moe_jax.config import RewardConfig
from moe_jax.data.problems import Problem
from moe_jax.rl.rewards import Parsed, accuracy_reward, parse_completion, reward_parts, total_reward, worked

PROBLEM = Problem("7+1+5?", "13", "7+1+5?")
GOOD = "<think>7+1=8+5=13</think><answer>13</answer><eos>"


def test_well_formed_completion():
    assert parse_completion(GOOD) == Parsed("7+1=8+5=13", "13", True)
    assert parse_completion("<think></think><answer>13</answer>") == Parsed("", "13", True)
    assert parse_completion("\n<think>a\nb</think>\n<answer> 13 </answer>\n") == Parsed("a\nb", " 13 ", True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "13",
        "<answer>13</answer>",
        "<think>7+1=8</think>",
        "<think>7</think><answer>13",
        "<think>7<answer>13</answer>",
        "7<think>7</think><answer>13</answer>",
        "<think>7</think>so<answer>13</answer>",
        "<think>7</think><answer>13</answer>!",
        "<answer>13</answer><think>7</think>",
        "<think><think>7</think><answer>13</answer>",
        "<think>7</think></think><answer>13</answer>",
        "<think>7</think><think>7</think><answer>13</answer>",
        "<think>7</think><answer>12</answer><answer>13</answer>",
        "<think>7</think><answer><answer>13</answer>",
        "<think>7<answer>13</answer></think>",
        "<think>7<answer>12</answer></think><answer>13</answer>",
        "<think>7<answer></think>13</answer>",
        "<think>7<bos></think><answer>13</answer>",
        "<think>7</think><answer>13</answer><eos><eos>",
        "<think>7</think><answer>13<|user|></answer>",
        "<THINK>7</THINK><answer>13</answer>",
    ],
)
def test_malformed_completions_earn_no_format_reward(text):
    assert not parse_completion(text).well_formed
    assert reward_parts(PROBLEM, text, finished=True)["format"] == 0
    assert total_reward(reward_parts(PROBLEM, text, finished=True), RewardConfig()) == 0


@pytest.mark.parametrize(
    "text",
    [
        "13",
        "<think>7</think><answer>13",
        "<think>7<answer>13</answer></think>",
        "<think>7<answer>13</answer>",
        "<think>7<answer>13</answer></think><answer>13</answer>",
        "<think>7</think><answer>12</answer><answer>13</answer>",
        "<think>7</think><answer>13</answer><answer>13</answer>",
        "<answer>13</answer><think>7</think>",
        "</answer>13<answer>",
    ],
)
def test_answers_in_the_wrong_place_do_not_count(text):
    assert parse_completion(text).answer is None
    assert reward_parts(PROBLEM, text, finished=True)["accuracy"] == 0


def test_an_answer_without_thinking_is_read_but_not_well_formed():
    parts = reward_parts(PROBLEM, "<answer>13</answer>", finished=True)
    assert parts == {"accuracy": 1.0, "format": 0.0}
    assert total_reward(parts, RewardConfig()) == 0
    assert total_reward(parts, RewardConfig(accuracy_needs_format=False)) == 1


def test_accuracy_has_no_partial_credit():
    assert accuracy_reward("13", PROBLEM) == accuracy_reward(" +13.0 ", PROBLEM) == 1
    for answer in (None, "", "12", "130", "13 14", "7+1+5", "13, or 12"):
        assert accuracy_reward(answer, PROBLEM) == 0


def test_another_checker_can_judge():
    assert accuracy_reward("thirteen", PROBLEM, lambda problem, answer: answer == "thirteen") == 1
    assert accuracy_reward(None, PROBLEM, lambda problem, answer: True) == 0


def test_a_completion_that_did_not_stop_earns_nothing():
    assert reward_parts(PROBLEM, GOOD, finished=True) == {"accuracy": 1.0, "format": 1.0}
    assert reward_parts(PROBLEM, GOOD, finished=False) == {"accuracy": 0.0, "format": 0.0}


def test_total_reward_is_the_configured_sum():
    cfg = RewardConfig(format_weight=0.25)
    assert total_reward({"accuracy": 1.0, "format": 1.0}, cfg) == 1.25
    assert total_reward({"accuracy": 0.0, "format": 1.0}, cfg) == 0.25
    assert total_reward({"accuracy": 1.0, "format": 0.0}, cfg) == 0


def test_worked_needs_steps_in_the_thinking():
    assert worked(GOOD)
    assert worked("<think>3-9=-6</think><answer>-6</answer>")
    assert not worked("<think></think><answer>13</answer>")
    assert not worked("<think>13</think><answer>13</answer>")
    assert not worked("<think>==</think><answer>7+1=8</answer>")
    assert not worked("<answer>7+1=8</answer>")
    assert worked("<think>First, the blocks.</think><answer>x</answer>", in_equations=False)
    assert not worked("<think> </think><answer>x</answer>", in_equations=False)
