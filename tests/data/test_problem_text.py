"""Packed text about problems: what is predicted, where it resumes, what does not fit."""

import numpy as np
import pytest

from moe_jax.config import ProblemConfig
from moe_jax.data import DataError
from moe_jax.data.problem_text import FixedDocuments, ProblemText, encode_prompt
from moe_jax.data.problems import Document, load_problems
from moe_jax.data.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
SOURCE = load_problems(ProblemConfig(min_terms=2, max_terms=3, test_problems=20), seed=0)


def text(purpose="base", length=40, rows=4):
    return ProblemText(SOURCE, TOKENIZER, rows, length, purpose)


def documents(batch):
    for row in range(len(batch["tokens_BS"])):
        for segment in range(1, batch["segment_ids_BS"][row].max() + 1):
            where = batch["segment_ids_BS"][row] == segment
            yield batch["tokens_BS"][row][where], batch["loss_mask_BS"][row][where]


def test_completions_are_predicted_and_prompts_are_not():
    for tokens, mask in documents(next(text())):
        assert tokens[0] == TOKENIZER.bos_id and tokens[-1] == TOKENIZER.eos_id
        prompt = TOKENIZER.decode(tokens[mask == 0][1:].tolist())
        completion = TOKENIZER.decode(tokens[mask == 1].tolist())
        assert prompt.endswith("?") and completion.startswith(("<think>", "<answer>"))
        assert prompt not in {problem.prompt for problem in SOURCE.test}
        np.testing.assert_array_equal(tokens[mask == 0], encode_prompt(prompt, TOKENIZER))


def test_it_resumes_at_the_document():
    whole = text()
    batches = [next(whole) for _ in range(30)]
    first = text()
    for _ in range(17):
        next(first)
    second = text()
    second.set_state(first.get_state())
    for expected in batches[17:]:
        found = next(second)
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name])


def test_purposes_differ():
    assert np.any(next(text("base"))["tokens_BS"] != next(text("control"))["tokens_BS"])


def test_long_documents_are_counted_and_none_that_fits_is_an_error():
    short = text(length=16)
    batch = next(short)
    assert short.skipped > 0 and all(len(tokens) <= 16 for tokens, _ in documents(batch))
    with pytest.raises(DataError, match="sequence-length"):
        next(text(length=4))


def test_fixed_documents_are_all_used_before_any_comes_again():
    kept = [Document(f"{n}?", f"<answer>{n}</answer><eos>", False) for n in range(7)]
    source = FixedDocuments(kept, seed=0)
    found = [one for step in range(7) for one in source.documents(step, 3, "sft")]
    epochs = [found[start : start + 7] for start in range(0, 21, 7)]
    assert all(set(epoch) == set(kept) for epoch in epochs) and epochs[0] != epochs[1]
    assert FixedDocuments(kept, seed=0).documents(4, 3, "sft") == found[12:15]
    with pytest.raises(DataError, match="sample more"):
        FixedDocuments([], seed=0)
