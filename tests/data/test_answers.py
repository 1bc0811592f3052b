"""Final answers: what is read of a solution, and when two are the same."""

import importlib.util
import sys

import pytest

from moe_jax.data import DataError
from moe_jax.data.answers import Judge, final_answer
from moe_jax.data.problems import boxed

needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="needs the extra math: math-verify"
)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"So it is $\boxed{18}$.", "18"),
        (r"First \boxed{3}, no: \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{5}</think>It is \boxed{6}", "6"),
        (r"<think>\boxed{5}</think>I do not know", None),
        ("<think>1+1=2</think><answer>2</answer>", "2"),
        (r"<answer>\boxed{7}</answer>", "7"),
        (r"<answer>7</answer> and \boxed{8}", "7"),
        ("72\n#### 1,080", "1,080"),
        ("the answer is 12", None),
        (r"\boxed{}", None),
        (r"\boxed{\left( 3, \dfrac{\pi}{2} \right)}", r"( 3, \frac{\pi}{2} )"),
        (r"\boxed{\$1{,}080}", "1,080"),
        (r"\boxed{18\text{ dollars}}", "18"),
        (r"\boxed{3\text{ million}}", r"3\text{ million}"),
        (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}"),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


def test_boxed_reads_nested_braces_and_leaves_out_what_is_not_closed():
    assert boxed(r"\boxed{a{b}c} \fbox{d} \boxed 7 \boxed{\{1\}} \boxed{open") == ["a{b}c", "d", "7", r"\{1\}"]


def test_numbers_are_compared_without_math_verify(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    judge = Judge(["18", "1080"])
    assert judge("18.0", "18") and judge("$1,080", "1080")
    assert not judge("19", "18") and not judge(None, "18") and not judge(r"\frac{36}{2}", "18")
    with pytest.raises(DataError, match=r"'x\^2' is not a plain number.*pip install 'moe_jax\[math\]'"):
        Judge(["18", "x^2"])


@needs_math_verify
@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("0.5", r"\frac{1}{2}", True),
        (r"\frac{36}{2}", "18", True),
        (r"(x+1)^2", "x^2+2x+1", True),
        ("3,2,1", "1,2,3", True),
        ("C", r"\text{(C)}", True),
        ("x+2", "x+1", False),
        ("2, 3", "2", False),
        ("17", "18", False),
    ],
)
def test_mathematics_is_judged_by_its_value(answer, reference, same):
    assert Judge([reference, r"\pi"])(answer, reference) is same
