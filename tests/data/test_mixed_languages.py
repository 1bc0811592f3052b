"""Two languages in one text: the working's words change, and nothing else does."""

import re
from itertools import pairwise

import numpy as np
import pytest

from moe_jax.config import ProblemConfig
from moe_jax.data.mixed_languages import MixedLanguages
from moe_jax.data.problems import load_problems
from moe_jax.rl.rewards import language_reward, parse_completion, worked

SOURCE = load_problems(ProblemConfig(min_terms=6, max_terms=6, operations="+-", test_problems=20), seed=0)


def mixed(switch_rate=0.3):
    return MixedLanguages(SOURCE, switch_rate, seed=0)


def test_only_the_signs_of_the_working_are_words():
    signs = str.maketrans({"加": "+", "减": "-"})
    for plain, found in zip(SOURCE.documents(3, 200, "base"), mixed().documents(3, 200, "base"), strict=True):
        back = found.completion.translate(signs).replace("and", "+").replace("less", "-")
        assert (found.prompt, back, found.worked) == (plain.prompt, plain.completion, plain.worked)
        think = parse_completion(found.completion.removesuffix("<eos>")).think
        if found.worked:
            assert worked(found.completion) and re.search(r"and|less|加|减", think)
            assert not re.search(r"\d[+-]\d+=", think)
    assert mixed().test is SOURCE.test and mixed().sample(1, 5, "rl") == SOURCE.sample(1, 5, "rl")


@pytest.mark.parametrize(("rate", "low", "high"), [(0.0, 0, 0), (0.3, 0.25, 0.35), (1.0, 1, 1)])
def test_the_language_changes_as_often_as_asked(rate, low, high):
    texts = [document.completion for document in mixed(rate).documents(0, 1000, "base") if document.worked]
    chinese = [[word in "加减" for word in re.findall(r"and|less|加|减", text)] for text in texts]
    assert all(len(words) == 5 for words in chinese)
    assert low <= np.mean([a != b for words in chinese for a, b in pairwise(words)]) <= high
    assert 0.45 < np.mean([words[0] for words in chinese]) < 0.55
    assert 0.45 < np.mean([language_reward(text, "latin") for text in texts]) < 0.55


def test_the_same_step_has_the_same_text():
    assert mixed().documents(5, 50, "base") == mixed().documents(5, 50, "base") != mixed().documents(6, 50, "base")
