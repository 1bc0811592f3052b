"""Problems as text: prompts, and an endless, packed, resumable stream of supervised batches.

B rows, S tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, islice
from typing import Any, Protocol

import numpy as np

from moe_jax.data import DataError
from moe_jax.data.packing import packed_batches
from moe_jax.data.problems import Document, Problem, ProblemSource
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.rng import random_generator

_DOCUMENTS_AT_A_TIME = 256
_TOO_MANY = 2048


def encode_prompt(prompt: str, tokenizer: Tokenizer) -> list[int]:
    """A prompt as the model sees it in training and in sampling: <bos>, if the tokenizer has one, then the text."""
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return start + tokenizer.encode(prompt)


def encode_problem(problem: Problem, tokenizer: Tokenizer) -> list[int]:
    """A problem's prompt as the model sees it."""
    return tokenizer.encode(problem.prompt) if problem.chat else encode_prompt(problem.prompt, tokenizer)


class AskedProblems(ProblemSource):
    """A source whose problems are put into words for a model that was trained elsewhere.

    Args:
        wording: what the model reads, with {problem} for the problem.
        chat: whether that is the user's message, which the tokenizer's chat template makes a prompt of.
    """

    def __init__(self, source: ProblemSource, wording: str, tokenizer: Tokenizer, *, chat: bool):
        self._source, self._wording, self._tokenizer, self._chat = source, wording, tokenizer, chat
        self.works_in_equations, self.levels = source.works_in_equations, source.levels
        self.test = [self._ask(problem) for problem in source.test]

    def sample(self, step: int, count: int, purpose: str, level: int = 0) -> list[Problem]:
        return [self._ask(problem) for problem in self._source.sample(step, count, purpose, level)]

    def documents(self, step: int, count: int, purpose: str) -> list[Document]:
        return self._source.documents(step, count, purpose)

    def is_correct(self, problem: Problem, answer: str) -> bool:
        return self._source.is_correct(problem, answer)

    def credits(self, answers: Sequence[tuple[Problem, str]]) -> list[float]:
        return self._source.credits(answers)

    def _ask(self, problem: Problem) -> Problem:
        text = self._wording.replace("{problem}", problem.prompt)
        if self._chat:
            text = self._tokenizer.apply_chat_template([{"role": "user", "content": text}])
        return replace(problem, prompt=text, chat=self._chat)


class DocumentSource(Protocol):
    """Supervised text without end; every `ProblemSource` is one."""

    def documents(self, step: int, count: int, purpose: str) -> list[Document]:
        """`count` documents; the same arguments give the same ones, always."""
        ...


class FixedDocuments:
    """Documents that are there, in a new order every epoch.

    Raises:
        DataError: there are none.
    """

    def __init__(self, documents: Sequence[Document], seed: int):
        if not documents:
            raise DataError("no document to train on: sample more, or filter less")
        self._documents, self._seed = documents, seed

    def documents(self, step: int, count: int, purpose: str) -> list[Document]:
        size, orders = len(self._documents), {}
        found = []
        for place in range(step * count, (step + 1) * count):
            epoch, index = divmod(place, size)
            if epoch not in orders:
                orders[epoch] = random_generator(self._seed, f"{purpose} epoch", epoch).permutation(size)
            found.append(self._documents[orders[epoch][index]])
        return found


class ProblemText:
    """Batches of packed documents [B, S] of a problem source; an iterator whose place is how many documents it used.

    Only completions are predicted, not the prompts. Documents longer than a row are left out and counted in `skipped`;
    if no document of many is short enough, that is a DataError.

    Args:
        purpose: names the stream of documents; different purposes give different ones.
    """

    def __init__(
        self, source: DocumentSource, tokenizer: Tokenizer, batch_size: int, sequence_length: int, purpose: str
    ):
        if not tokenizer.stop_ids:
            raise DataError("the tokenizer names no end-of-text token: add eos_token to its tokenizer_config.json")
        self._source, self._tokenizer, self._purpose = source, tokenizer, purpose
        self._rows, self._length = batch_size, sequence_length
        self.skipped = 0
        """Documents left out in this session because they are longer than a row."""
        self.set_state({"documents": 0})

    def __iter__(self) -> ProblemText:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batch, used = next(self._batches)
        self._used += used
        return batch

    def get_state(self) -> dict[str, int]:
        return {"documents": self._used}

    def set_state(self, state: dict[str, Any]) -> None:
        self._used = int(state["documents"])
        self._batches = packed_batches(self._documents(), self._length, self._rows, self._tokenizer.pad_id)

    def _documents(self) -> Iterator[tuple[list[int], list[int]]]:
        """(tokens, mask) of the documents from the current place on."""
        first, offset = divmod(self._used, _DOCUMENTS_AT_A_TIME)
        in_a_row = 0
        for chunk in count(first):
            documents = self._source.documents(chunk, _DOCUMENTS_AT_A_TIME, self._purpose)
            for document in islice(documents, offset if chunk == first else 0, None):
                prompt = encode_prompt(document.prompt, self._tokenizer)
                completion = self._tokenizer.encode(document.completion.removesuffix("<eos>"))
                completion.append(self._tokenizer.stop_ids[0])
                in_a_row += 1
                if len(prompt) + len(completion) > self._length:
                    self.skipped += 1
                    if in_a_row >= _TOO_MANY:
                        raise DataError(
                            f"the last {in_a_row} documents are longer than a row of {self._length} tokens: raise"
                            " --pretrain.sequence-length"
                        )
                    prompt, completion = [], []  # takes no room, and keeps the count of documents
                else:
                    in_a_row = 0
                yield prompt + completion, [0] * len(prompt) + [1] * len(completion)
