"""Rewards from rules: a completion's format and the exactness of its answer (DeepSeek-R1, arXiv:2501.12948, §2.2.2).

Pure functions of strings. A completion is the decoded text of what the model wrote, special tokens visible. One <eos>
at its very end is dropped here, so callers may leave it or take it off.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from moe_jax.config import RewardConfig
from moe_jax.data.problems import Problem, same_answer

_TAG = re.compile(r"(</?think>|</?answer>)")
_THINK_PAIR, _ANSWER_PAIR = ["<think>", "</think>"], ["<answer>", "</answer>"]
_FOREIGN = re.compile(r"<pad>|<bos>|<eos>|<\|user\|>|<\|assistant\|>")
_EQUATION = re.compile(r"=\s*[+-]?\$?[0-9]")


class Parsed(NamedTuple):
    think: str | None
    """The text between the think tags; None unless they open the completion's tags and are its only pair."""
    answer: str | None
    """The text between the answer tags; None unless they are the only pair, alone or after the thinking."""
    well_formed: bool
    """<think>…</think><answer>…</answer>: each tag once, around and between them nothing but white space."""


def parse_completion(text: str) -> Parsed:
    """Reads a completion strictly, so that nothing is gained by writing a tag twice.

    An answer inside the thinking does not count, and neither does any of several answers. The answer of a completion
    without thinking, or with text around its tags, is read, though the completion is not well formed. A special token
    other than the four tags makes it malformed.
    """
    text = text.removesuffix("<eos>")
    pieces = _TAG.split(text)
    between, tags = pieces[0::2], pieces[1::2]
    think = answer = None
    if tags[:2] == _THINK_PAIR and not set(tags[2:]) & set(_THINK_PAIR):
        think = between[1]
    if tags == _ANSWER_PAIR:
        answer = between[1]
    elif tags == _THINK_PAIR + _ANSWER_PAIR:
        answer = between[3]
    outside_is_blank = not "".join(between[0::2]).strip()
    well_formed = think is not None and answer is not None and outside_is_blank and not _FOREIGN.search(text)
    return Parsed(think, answer, well_formed)


def format_reward(text: str, finished: bool) -> float:
    """1 for a well-formed completion that stopped by itself, else 0."""
    return float(finished and parse_completion(text).well_formed)


def accuracy_reward(
    answer: str | None, problem: Problem, is_correct: Callable[[Problem, str], bool] | None = None
) -> float:
    """1 for a right answer, else 0: never partial credit.

    Without `is_correct`, numbers are compared exactly, whatever way they are written (`data.problems.same_answer`).
    """
    if answer is None:
        return 0.0
    return float(is_correct(problem, answer) if is_correct else same_answer(answer, problem.answer))


def reward_parts(
    problem: Problem,
    completion: str,
    finished: bool,
    is_correct: Callable[[Problem, str], bool] | None = None,
) -> dict[str, float]:
    """The parts that a reward is made of: `accuracy` and `format`, each 0 or 1.

    A completion that did not stop by itself (`finished` False: it ran out of tokens) scores 0 in both: it has not had
    its last word.
    """
    answer = parse_completion(completion).answer if finished else None
    return {
        "accuracy": accuracy_reward(answer, problem, is_correct),
        "format": format_reward(completion, finished),
    }


def total_reward(parts: Mapping[str, float], cfg: RewardConfig) -> float:
    """accuracy · (format if `accuracy_needs_format`) + format_weight · format."""
    counted = parts["format"] if cfg.accuracy_needs_format else 1.0
    return parts["accuracy"] * counted + cfg.format_weight * parts["format"]


def worked(completion: str, in_equations: bool = True) -> bool:
    """Whether the thinking shows working: a step with a result (`7+1=8`), or, if not `in_equations`, any text."""
    think = parse_completion(completion).think
    if think is None:
        return False
    return bool(_EQUATION.search(think) if in_equations else think.strip())
