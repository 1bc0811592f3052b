"""Rewards: exact, strict, and without a way to be paid for tricks."""

import pytest

from moe_jax.config import ConfigError, ProblemConfig, RewardConfig
from moe_jax.data.problems import Problem, load_problems
from moe_jax.rl.rewards import (
    Parsed,
    format_reward,
    judge,
    language_reward,
    parse_completion,
    readable,
    repetition_penalty,
    total_reward,
    worked,
)

PROBLEM = Problem("7+1+5?", "13", "7+1+5?")
SOURCE = load_problems(ProblemConfig(min_terms=3, max_terms=3, test_problems=4), seed=0)


def reward_parts(problem, text, finished):
    credit = judge([problem], [text], [finished], SOURCE)[0].credit
    return {"accuracy": credit, "format": format_reward(text, finished)}


def accuracy(answer):
    return SOURCE.credits([(PROBLEM, answer)])[0]


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
    assert accuracy("13") == accuracy(" +13.0 ") == 1
    for answer in ("", "12", "130", "13 14", "7+1+5", "13, or 12"):
        assert accuracy(answer) == 0


def test_answers_are_judged_in_their_order_and_padding_is_left_out():
    texts = ["no answer", "<answer>13</answer>", "<answer>13</answer>", "<answer>12</answer>", "<answer>13</answer>"]
    judged = judge([PROBLEM] * 4, texts, [True, True, False, True, True], SOURCE)
    assert [tuple(one) for one in judged] == [(None, 0.0), ("13", 1.0), (None, 0.0), ("12", 0.0)]


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


def think(text: str) -> str:
    return f"<think>{text}</think><answer>1</answer>"


@pytest.mark.parametrize(
    ("text", "language", "share"),
    [
        ("First the sum, then 答案 done", "latin", 5 / 7),
        ("We take \\frac{1}{2} of 8", "latin", 1.0),
        ("naïve café", "latin", 1.0),
        ("Это mix", "ru", 0.5),
        ("所以 so 是", "zh", 3 / 4),
        ("これは是", "ja", 1.0),
        ("그래서 x", "ko", 0.5),
        ("हिन्दी में", "hi", 1.0),
        ("Ηeλ", "el", 0.0),  # letters of two scripts: a word of neither
        ("7+1=8", "latin", None),
        ("", "latin", None),
    ],
)
def test_language_is_the_share_of_words_in_its_script(text, language, share):
    assert language_reward(think(text), language) == (None if share is None else pytest.approx(share))


def test_language_of_a_completion_without_thinking_says_nothing():
    assert language_reward("Just words", "latin") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>7and1=8</think><answer>8</answer>", True),
        ("<think>7and1=8加1=9</think><answer>9</answer>", False),  # mixed
        ("<think>7加1=8</think><answer>8</answer>", False),  # another language
        ("<think>7+1=8</think><answer>8</answer>", False),  # nothing to read
        ("<think></think><answer>8</answer>", False),
        ("<think>7and1=8</think><answer>8", False),  # not well formed
    ],
)
def test_readable_is_well_formed_and_wholly_in_the_language(text, expected):
    assert readable(text, "latin") == expected


def test_repetition_counts_ngrams_that_were_there_before():
    assert repetition_penalty("a b c d", 2) == 0
    assert repetition_penalty("a b a b a b", 2) == pytest.approx(2 / 5 - 1)
    assert repetition_penalty("So so SO so", 1) == pytest.approx(1 / 4 - 1)
    assert repetition_penalty("a b", 3) is None


def test_weighted_parts_are_added_and_none_is_left_out():
    cfg = RewardConfig(language_weight=0.5, length_weight=-0.2, repetition_weight=1.0)
    parts = {"accuracy": 1.0, "format": 1.0, "language": 0.5, "length": 0.5, "repetition": -0.25}
    assert total_reward(parts, cfg) == pytest.approx(1 + 0.1 + 0.25 - 0.1 - 0.25)
    assert total_reward({**parts, "language": None, "repetition": None}, cfg) == pytest.approx(1 + 0.1 - 0.1)
    partial = RewardConfig(partial_credit=True)
    assert total_reward({"accuracy": 0.0, "credit": 0.5, "format": 1.0}, partial) == pytest.approx(0.6)
    with pytest.raises(ConfigError, match=r"RewardConfig\.language = 'latn'.*'latin'"):
        RewardConfig(language="latn")  # pyright: ignore[reportArgumentType]
