"""A teacher's samples as documents for a student (`data.teacher_logits`).

B rows, S tokens of a document, K tokens that the teacher names, J = K + 1 outcomes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from moe_jax.data.problem_text import encode_problem
from moe_jax.data.problems import Problem
from moe_jax.data.teacher_logits import ScoredDocument
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.ops.token_divergence import TopK
from moe_jax.rl.grpo import Rollout
from moe_jax.rl.on_policy import sampled_rows


def scored_documents(samples: Rollout, score: Callable[[dict[str, np.ndarray]], TopK]) -> list[ScoredDocument]:
    """Every sample with its prompt and the teacher's distribution after each token; `score` takes rows [B, S]."""
    batch = sampled_rows(samples)
    top = score(batch)
    parts = (batch["tokens_BS"], batch["loss_mask_BS"], np.asarray(top.ids), np.asarray(top.logprobs))
    documents = []
    for row, correct in enumerate(_right(samples)):
        kept_S = batch["segment_ids_BS"][row] > 0
        documents.append(ScoredDocument(*[part[row][kept_S] for part in parts], correct=correct))
    return documents


def retokenized_documents(
    samples: Rollout, asked: Sequence[Problem], tokenizer: Tokenizer, longest: int
) -> list[ScoredDocument]:
    """The samples that stopped by themselves, in a student's tokens and after the prompts that it reads; no logits.

    Args:
        samples: the teacher's.
        asked: the samples' problems in the student's wording.
        tokenizer: the student's.
        longest: tokens that a document has at most; what is behind them is cut off.
    """
    group = len(samples.completions) // len(asked)
    documents = []
    for row, (text, correct) in enumerate(zip(samples.completions, _right(samples), strict=True)):
        if not samples.samples.finished_B[row]:
            continue
        prompt = encode_problem(asked[row // group], tokenizer)
        tokens = [*prompt, *tokenizer.encode(text), tokenizer.stop_ids[0]][:longest]
        S = len(tokens)
        mask_S = np.arange(S) >= len(prompt)
        documents.append(
            ScoredDocument(np.array(tokens), mask_S, np.zeros((S, 0), np.int32), np.zeros((S, 1)), correct)
        )
    return documents


def _right(samples: Rollout) -> list[bool]:
    return [part["accuracy"] == 1 for part in samples.parts]
