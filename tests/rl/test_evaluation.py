"""Held-out evaluation: what is counted, with a sampler whose completions are known."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from moe_jax.config import EvaluationConfig, MeshConfig, ProblemConfig
from moe_jax.data.problems import load_problems
from moe_jax.data.tokenizer import ByteTokenizer
from moe_jax.rl.evaluation import evaluate, held_out
from moe_jax.sampling.sampler import Samples
from moe_jax.sharding import make_mesh
from moe_jax.training.experiment import Session
from moe_jax.training.run import Run
from moe_jax.training.signals import StopGuard

TOKENIZER = ByteTokenizer()
SOURCE = load_problems(ProblemConfig(min_terms=2, max_terms=2, test_problems=10), seed=0)
ROOM = 40


def answers(problem):
    """Four samples: worked and right, right but bare, wrong, and right but cut off."""
    wrong = int(problem.answer) + 1
    return [
        f"<think>1={problem.answer}</think><answer>{problem.answer}</answer><eos>",
        f"<answer>{problem.answer}</answer><eos>",
        f"<think></think><answer>{wrong}</answer><eos>",
        f"<think>1={problem.answer}</think><answer>{problem.answer}</answer>",
    ]


def sample(params, rest, tokens_PS, mask_PS, key):
    by_prompt = {problem.prompt: problem for problem in SOURCE.test}
    rows = []
    for tokens, mask in zip(tokens_PS, mask_PS, strict=True):
        prompt = TOKENIZER.decode(tokens[mask].tolist(), skip_special_tokens=True)
        rows += [TOKENIZER.encode(text) for text in answers(by_prompt[prompt])]
    tokens_BN = np.array([row + [TOKENIZER.pad_id] * (ROOM - len(row)) for row in rows], np.int32)
    mask_BN = np.arange(ROOM) < np.array([len(row) for row in rows])[:, None]
    finished_B = np.array([row[-1] == TOKENIZER.eos_id for row in rows])
    return Samples(tokens_BN, np.zeros(mask_BN.shape), mask_BN, finished_B)


@pytest.mark.parametrize("batch_size", [4, 10, 16])
def test_every_problem_counts_once(batch_size):
    seen = []
    result = evaluate(
        sample,
        {},
        {},
        SOURCE,
        SOURCE.test,
        TOKENIZER,
        EvaluationConfig(samples=4, batch_size=batch_size),
        prompt_length=8,
        key=jax.random.key(0),
        between=lambda done, total: seen.append((done, total)),
    )
    assert result["pass_at_1"]["mean"] == 0.5 and result["pass_at_1"]["problems"] == 10
    assert result["cons_at_4"]["mean"] == 1.0  # two votes to one; what was cut off has none
    assert result["format"] == 0.5 and result["worked"] == 0.5
    assert result["accuracy_worked"] == 0.5 and result["accuracy_guessed"] == 0.5
    assert seen[-1] == (10, 10) and len(result["examples"]) == 8
    assert "language" not in result


def test_language_is_that_of_the_thinkings_with_words_and_readable_is_of_all():
    def in_words(*args):
        texts = [
            "<think>1and1=2</think><answer>2</answer><eos>",
            "<think>1and1=2加1=3</think><answer>3</answer><eos>",
            "<think></think><answer>2</answer><eos>",
            "<think>1and1=2</think><answer>2</answer>",
        ]
        rows = [TOKENIZER.encode(text) for text in texts]
        tokens_BN = np.array([row + [TOKENIZER.pad_id] * (ROOM - len(row)) for row in rows], np.int32)
        mask_BN = np.arange(ROOM) < np.array([len(row) for row in rows])[:, None]
        return Samples(tokens_BN, np.zeros(mask_BN.shape), mask_BN, np.array([True, True, True, False]))

    cfg = EvaluationConfig(samples=4, batch_size=1, language="latin")
    options = {"prompt_length": 8, "key": jax.random.key(0)}
    result = evaluate(in_words, {}, {}, SOURCE, SOURCE.test[:1], TOKENIZER, cfg, **options)
    assert result["language"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert result["readable"] == 0.25  # without a word, and cut off: not readable


def test_a_model_is_evaluated_once(tmp_path):
    asked = []

    def model():
        asked.append(True)
        return SimpleNamespace(params={}, rest={})

    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    cfg, options = EvaluationConfig(samples=4, batch_size=10), {"prompt_length": 8, "seed": 0}
    with StopGuard() as guard, Run.open(tmp_path / "run", "test", {}) as run:
        session = Session(run, guard, mesh)
        arguments = (session, "some", model, sample, SOURCE, SOURCE.test, TOKENIZER, cfg)
        first, second = held_out(*arguments, **options), held_out(*arguments, **options)
        assert first == second and len(asked) == 1
        (row,) = run.metrics("evaluate_some")
        assert row["pass_at_1"] == first["pass_at_1"]["mean"] == 0.5
