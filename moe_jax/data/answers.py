"""The final answer of a free-form solution, and whether it is right: numbers exactly, mathematics by math-verify."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

from moe_jax.data import DataError
from moe_jax.data.problems import boxed, parse_number, same_answer

_ANSWER_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_HASHES = re.compile(r"####[ \t]*(.+)")
_MULTIPLE = re.compile(r"hundred|thousand|million|billion|trillion|dozen|half|percent", re.IGNORECASE)
_UNIT = re.compile(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}$")


def final_answer(completion: str) -> str | None:
    """The answer that a completion ends with, or None if it gives none.

    After the thinking (`</think>`), if there is any, it is the last of what stands in answer tags, else in
    `\\boxed{}`, else behind `####`. Nothing else counts: a number somewhere in a text is no answer. Of what is written
    in LaTeX the typesetting is taken off (`\\left`, `\\!`, dollar signs, units behind a number).
    """
    text = completion.rpartition("</think>")[2]
    found = _ANSWER_TAG.findall(text)
    if found and (inside := boxed(found[-1])):
        found = inside
    found = found or boxed(text) or _HASHES.findall(text)
    answer = _without_typesetting(found[-1]) if found else ""
    return answer or None


def _without_typesetting(answer: str) -> str:
    answer = answer.strip().strip("$").strip().removesuffix(".")
    answer = re.sub(r"\\[!,;:]|\\left(?![a-z])|\\right(?![a-z])|\{,\}", _kept_comma, answer)
    answer = answer.replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac").replace(r"\$", "")
    unit = _UNIT.search(answer)
    if unit and parse_number(answer[: unit.start()]) is not None and not _MULTIPLE.search(unit[1]):
        answer = answer[: unit.start()]
    return answer.strip()


def _kept_comma(match: re.Match[str]) -> str:
    return "," if match[0] == "{,}" else ""


class Judge:
    """Whether an answer equals a reference.

    Two plain numbers are compared exactly. Where the reference or the answer is something else, math-verify decides;
    but where all references are plain numbers it is not used at all, so that figures on such data do not depend on
    what is installed.

    Call it in the main thread: math-verify limits its time by a signal.
    """

    def __init__(self, references: Iterable[str]):
        """
        Raises:
            DataError: math-verify is needed and is not installed.
        """
        other = [reference for reference in references if parse_number(reference) is None]
        self.uses_math_verify = bool(other)
        self._known: dict[tuple[str, str], bool] = {}
        if not other:
            return
        try:
            import math_verify
        except ImportError as error:
            raise DataError(
                f"the answer {other[0]!r} is not a plain number, and math-verify judges those: pip install"
                " 'moe_jax[math]'"
            ) from error
        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it reports each answer that it cannot read
        self._math = math_verify

    def __call__(self, answer: str | None, reference: str) -> bool:
        """False for None; decided once for each pair."""
        if answer is None:
            return False
        if (answer, reference) not in self._known:
            self._known[answer, reference] = self._same(answer, reference)
        return self._known[answer, reference]

    def _same(self, answer: str, reference: str) -> bool:
        reference = _without_typesetting(reference)
        if same_answer(answer, reference) or not self.uses_math_verify:
            return same_answer(answer, reference)
        if parse_number(answer) is not None and parse_number(reference) is not None:
            return False
        gold, prediction = (self._math.parse(rf"\boxed{{{text}}}") for text in (reference, answer))
        return bool(self._math.verify(gold, prediction))
