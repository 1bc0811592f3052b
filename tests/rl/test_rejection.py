"""Rejection sampling: what is kept, what is drawn again, and what a resumed run does not draw."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from moe_jax.config import MeshConfig, PolicyLossConfig, ProblemConfig, RewardConfig, RLConfig, SamplingConfig
from moe_jax.data import DataError
from moe_jax.data.problems import load_problems
from moe_jax.data.tokenizer import ByteTokenizer
from moe_jax.rl.environments import VerifiableEnvironment
from moe_jax.rl.rejection import rejection_sample
from moe_jax.sampling.sampler import Samples
from moe_jax.sharding import make_mesh
from moe_jax.training.experiment import Session
from moe_jax.training.run import Run
from moe_jax.training.signals import StopGuard

TOKENIZER = ByteTokenizer()
SOURCE = load_problems(ProblemConfig(min_terms=2, max_terms=2, test_problems=10), seed=0)
GROUP, ROOM = 6, 40


def answers(prompt):
    """Readable and right twice, mixed, a guess, wrong, cut off."""
    a, b = map(int, prompt.rstrip("?").split("+"))
    good = f"<think>{a}and{b}={a + b}</think><answer>{a + b}</answer><eos>"
    return [
        good,
        good,
        f"<think>{a}加{b}={a + b}</think><answer>{a + b}</answer><eos>",
        f"<think></think><answer>{a + b}</answer><eos>",
        f"<think>{a}and{b}={a + b + 1}</think><answer>{a + b + 1}</answer><eos>",
        f"<think>{a}and{b}={a + b}</think><answer>{a + b}</answer>",
    ]


def sample(params, rest, tokens_PS, mask_PS, key):
    prompts = [
        TOKENIZER.decode(tokens[mask].tolist(), skip_special_tokens=True)
        for tokens, mask in zip(tokens_PS, mask_PS, strict=True)
    ]
    rows = [TOKENIZER.encode(text) for prompt in prompts for text in answers(prompt)]
    tokens_BN = np.array([row + [TOKENIZER.pad_id] * (ROOM - len(row)) for row in rows], np.int32)
    mask_BN = np.arange(ROOM) < np.array([len(row) for row in rows])[:, None]
    finished_B = np.array([row[-1] == TOKENIZER.eos_id for row in rows])
    return Samples(tokens_BN, np.zeros(mask_BN.shape, np.float32), mask_BN, finished_B)


RL = RLConfig(num_prompts=4, group_size=GROUP, sampling=SamplingConfig(max_new_tokens=ROOM), loss=PolicyLossConfig())
TRAINER = SimpleNamespace(cfg=RL, tokenizer=TOKENIZER, prompt_length=8, sample=sample)
ENVIRONMENT = VerifiableEnvironment(SOURCE, RewardConfig(), purpose="cold", language="latin")


def draw(folder, asked, wanted=6, max_batches=5):
    def model():
        asked.append(True)
        return SimpleNamespace(params={}, rest={})

    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    with StopGuard() as guard, Run.open(folder, "test", {}) as run:
        session = Session(run, guard, mesh)
        options = {"wanted": wanted, "max_batches": max_batches, "seed": 0}
        return rejection_sample(session, "cold", TRAINER, ENVIRONMENT, model, **options), run.metrics("cold")  # pyright: ignore


def test_what_is_right_and_readable_is_kept_once(tmp_path):
    asked = []
    kept, metrics = draw(tmp_path / "run", asked)
    problems = [problem for step in range(2) for problem in SOURCE.sample(step, 4, "cold")]
    texts = [(problem.prompt, answers(problem.prompt)[0]) for problem in problems]
    assert [(one.prompt, one.completion) for one in kept] == list(dict.fromkeys(texts))[:6] and len(asked) == 2
    assert all(one.worked for one in kept)
    assert [row["step"] for row in metrics] == [1, 2]
    assert metrics[0]["kept"] == pytest.approx(2 / 6) and metrics[0]["accuracy"] == pytest.approx(4 / 6)


def test_batches_that_are_there_are_not_drawn_again(tmp_path):
    whole, metrics = draw(tmp_path / "run", [])
    (tmp_path / "run" / "rollouts" / "cold" / "000002.jsonl").unlink()  # killed between the log and the file
    asked = []
    again, metrics_again = draw(tmp_path / "run", asked)
    assert again == whole and len(asked) == 1
    without_time = [{k: v for k, v in row.items() if k != "elapsed"} for row in metrics]
    assert [{k: v for k, v in row.items() if k != "elapsed"} for row in metrics_again] == without_time


def test_too_few_are_an_error_that_says_what_helps(tmp_path):
    with pytest.raises(DataError, match=r"cold: of 1 batches of samples only 4 of 6 .* allow more batches"):
        draw(tmp_path / "run", [], max_batches=1)
