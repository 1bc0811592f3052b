"""Rewards from rules (DeepSeek-R1, arXiv:2501.12948, §2.2.2 and §2.3.2): a completion's format, the exactness of its
answer, the language of its thinking, its length and its repetitions.

Pure functions of strings. A completion is the decoded text of what the model wrote, special tokens visible. One <eos>
at its very end is dropped here, so callers may leave it or take it off.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from moe_jax.config import RewardConfig
from moe_jax.data.problems import Problem, ProblemSource

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


class Judged(NamedTuple):
    answer: str | None
    """None where there is none, or where the completion did not stop by itself: it has not had its last word."""
    credit: float
    """What the answer is worth, from 0 to 1; 1 is right."""


def judge(
    problems: Sequence[Problem], texts: Sequence[str], finished: Sequence[bool], source: ProblemSource
) -> list[Judged]:
    """The answers of completions, and what they are worth; all at once, as `ProblemSource.credits` is.

    Texts beyond the problems are left out.
    """
    answers = [
        parse_completion(text).answer if stopped else None
        for _, text, stopped in zip(problems, texts, finished, strict=False)
    ]
    given = [(problem, answer) for problem, answer in zip(problems, answers, strict=True) if answer is not None]
    credit = iter(source.credits(given))
    return [Judged(answer, 0.0 if answer is None else next(credit)) for answer in answers]


def language_reward(text: str, language: str) -> float | None:
    """The share of the words in the thinking that are in the language (DeepSeek-R1 §2.3.2), by their script alone.

    A word is a run of letters, of Chinese and Japanese each character; commands of LaTeX (`\\frac`) are none. It
    belongs to a language if all its letters do. None if there is no word: nothing is said of a chain of numbers.
    """
    words = _WORD.findall(_COMMAND.sub(" ", parse_completion(text).think or ""))
    if not words:
        return None
    return sum(bool(_SCRIPTS[language].fullmatch(word)) for word in words) / len(words)


def readable(text: str, language: str) -> bool:
    """Whether a reader of the language can follow it: well formed, and all words of its thinking are in the language.

    A thinking without a word cannot be followed.
    """
    return parse_completion(text).well_formed and language_reward(text, language) == 1


_HAN, _KANA = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff", "\u3040-\u30ff"
_MARKS = "\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u097f\u0e00-\u0e7f"
_WORD = re.compile(rf"[{_HAN}{_KANA}]|(?:(?![{_HAN}{_KANA}])(?:[^\W\d_]|[{_MARKS}]))+")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_SCRIPTS = {
    name: re.compile(f"[{letters}]+")
    for name, letters in {
        "latin": "A-Za-z\u00aa\u00ba\u00c0-\u024f\u1e00-\u1eff\u0300-\u036f",
        "zh": _HAN,
        "ja": _HAN + _KANA,
        "ko": "\u1100-\u11ff\u3130-\u318f\uac00-\ud7af",
        "ru": "\u0400-\u052f\u0300-\u036f",
        "ar": "\u0600-\u06ff\u0750-\u077f",
        "el": "\u0370-\u03ff\u1f00-\u1fff\u0300-\u036f",
        "he": "\u0591-\u05f4",
        "hi": "\u0900-\u097f",
        "th": "\u0e00-\u0e7f",
    }.items()
}


def repetition_penalty(text: str, ngram: int) -> float | None:
    """Minus the share of the n-grams of words that stood in the text before, from 0 to almost -1.

    Words are what stands between white space, in lower case. None for fewer than n words.
    """
    words = text.lower().split()
    ngrams = [tuple(words[place : place + ngram]) for place in range(len(words) - ngram + 1)]
    return len(set(ngrams)) / len(ngrams) - 1 if ngrams else None


def extra_parts(text: str, tokens: int, room: int, cfg: RewardConfig) -> dict[str, float | None]:
    """The parts that have a weight: `language`, `length` (the share of the room that the tokens take), `repetition`."""
    parts: dict[str, float | None] = {}
    if cfg.language_weight:
        parts["language"] = language_reward(text, cfg.language)
    if cfg.length_weight:
        parts["length"] = tokens / room
    if cfg.repetition_weight:
        parts["repetition"] = repetition_penalty(text, cfg.repetition_ngram)
    return parts


def total_reward(parts: Mapping[str, float | None], cfg: RewardConfig) -> float:
    """accuracy · (format if `accuracy_needs_format`) + format_weight · format + the other parts that have a weight.

    With `partial_credit`, `credit` takes the place of accuracy. A part that is None is left out.
    """
    answer, form = parts["credit" if cfg.partial_credit else "accuracy"], parts["format"] or 0.0
    total = (answer or 0.0) * (form if cfg.accuracy_needs_format else 1.0) + cfg.format_weight * form
    for name, weight in (
        ("language", cfg.language_weight),
        ("length", cfg.length_weight),
        ("repetition", cfg.repetition_weight),
    ):
        value = parts.get(name)
        if weight and value is not None:
            total += weight * value
    return total


def worked(completion: str, in_equations: bool = True) -> bool:
    """Whether the thinking shows working: a step with a result (`7+1=8`), or, if not `in_equations`, any text."""
    think = parse_completion(completion).think
    if think is None:
        return False
    return bool(_EQUATION.search(think) if in_equations else think.strip())
