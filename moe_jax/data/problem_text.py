"""Supervised text about problems: an endless, packed, resumable stream of batches.

B rows, S tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice
from typing import Any

import numpy as np

from moe_jax.data.packing import packed_batches
from moe_jax.data.problems import ProblemSource
from moe_jax.data.tokenizer import Tokenizer

_DOCUMENTS_AT_A_TIME = 256


def encode_prompt(prompt: str, tokenizer: Tokenizer) -> list[int]:
    """A prompt as the model sees it in training and in sampling: <bos>, if the tokenizer has one, then the text."""
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return start + tokenizer.encode(prompt)


class ProblemText:
    """Batches of packed documents [B, S] of a problem source; an iterator whose place is how many documents it used.

    Only completions are predicted, not the prompts. Documents longer than a row are left out and counted in `skipped`.

    Args:
        purpose: names the stream of documents; different purposes give different ones.
    """

    def __init__(
        self, source: ProblemSource, tokenizer: Tokenizer, batch_size: int, sequence_length: int, purpose: str
    ):
        self._source, self._tokenizer, self._purpose = source, tokenizer, purpose
        self._rows, self._length = batch_size, sequence_length
        self.set_state({"documents": 0, "skipped": 0})

    def __iter__(self) -> ProblemText:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batch, used = next(self._batches)
        self._used += used
        return batch

    @property
    def skipped(self) -> int:
        """Documents left out so far because they are longer than a row."""
        return self._skipped

    def get_state(self) -> dict[str, int]:
        return {"documents": self._used, "skipped": self._skipped}

    def set_state(self, state: dict[str, Any]) -> None:
        self._used, self._skipped = int(state["documents"]), int(state["skipped"])
        self._batches = packed_batches(self._documents(), self._length, self._rows, self._tokenizer.pad_id)

    def _documents(self) -> Iterator[tuple[list[int], list[int]]]:
        """(tokens, mask) of the documents from the current place on."""
        first, offset = divmod(self._used, _DOCUMENTS_AT_A_TIME)
        for chunk in count(first):
            documents = self._source.documents(chunk, _DOCUMENTS_AT_A_TIME, self._purpose)
            for document in islice(documents, offset if chunk == first else 0, None):
                prompt = encode_prompt(document.prompt, self._tokenizer)
                completion = self._tokenizer.encode(document.completion)
                if len(prompt) + len(completion) > self._length:
                    self._skipped += 1
                    prompt, completion = [], []  # takes no room, and keeps the count of documents
                yield prompt + completion, [0] * len(prompt) + [1] * len(completion)
