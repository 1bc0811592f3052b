"""Documents with a teacher's top-k log-probabilities on disk: written shard by shard, read at random through Grain.

A store is a folder with `store.json`, which says what it holds, and a folder per shard with arrays that are mapped to
memory, so that reading a document reads no other. A shard appears whole or not at all: writing goes on with those that
are `missing`.

Legend: B rows (batch), S tokens of a document or of a row, T tokens of a shard, N documents of a shard, K tokens that a
stored distribution names, J = K + 1 outcomes (those tokens, and all others together).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np

from moe_jax.data import DataError

_META = "store.json"


@dataclass(frozen=True)
class StoreInfo:
    """What a store holds."""

    top_k: int
    """K; 0 stores the documents alone, as for a student whose tokens are other ones."""
    vocab_size: int
    """Of the tokens, and of the distributions."""
    temperature: float
    """That the log-probabilities were taken at."""
    num_shards: int
    origin: str
    """The teacher and how it was sampled, in words: a store of another origin is not gone on with."""


class ScoredDocument(NamedTuple):
    """A document as the teacher sees it."""

    tokens_S: np.ndarray
    loss_mask_S: np.ndarray
    """1 where the token at this place is to be learned."""
    teacher_ids_SK: np.ndarray
    """The teacher's K most probable tokens to follow each token."""
    teacher_logprobs_SJ: np.ndarray
    correct: bool
    """Whether its answer is right: what distillation by sequences keeps."""


class StoreWriter:
    """Writes the shards of a store, in any order and over several sessions.

    Raises:
        DataError: the folder holds a store of something else, or cannot be written.
    """

    def __init__(self, folder: Path, info: StoreInfo):
        if info.num_shards < 1 or info.top_k < 0:
            raise DataError(f"num_shards = {info.num_shards}, top_k = {info.top_k}: must be at least 1 and 0")
        self.folder, self.info = folder, info
        if (folder / _META).exists():
            if (found := read_info(folder)) != info:
                raise DataError(f"{folder} holds {found}, not {info}: delete it, or use another folder")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            partial = folder / f".{_META}.tmp"
            partial.write_text(json.dumps(asdict(info), indent=2) + "\n", encoding="utf-8")
            partial.rename(folder / _META)

    def missing(self) -> list[int]:
        """The shards that are not written yet."""
        return [shard for shard in range(self.info.num_shards) if not _shard(self.folder, shard).exists()]

    def write(self, shard: int, documents: Sequence[ScoredDocument]) -> None:
        """Writes a shard, whole or not at all. Token ids are kept in 32 bits, log-probabilities in 16.

        Raises:
            DataError: no document, arrays that do not belong together, tokens outside the vocabulary.
        """
        if not documents:
            raise DataError(f"shard {shard} of {self.folder} has no document: draw more samples, or use fewer shards")
        for number, document in enumerate(documents):
            self._check(shard, number, document)
        arrays = {
            "tokens": np.concatenate([one.tokens_S for one in documents]).astype(np.int32),
            "loss_mask": np.concatenate([one.loss_mask_S for one in documents]).astype(np.int8),
            "teacher_ids": np.concatenate([one.teacher_ids_SK for one in documents]).astype(np.int32),
            # -inf, an outcome without probability, stays; finite values that half precision lacks become its smallest.
            "teacher_logprobs": np.concatenate([_half(one.teacher_logprobs_SJ) for one in documents]),
            "ends": np.cumsum([len(one.tokens_S) for one in documents]),
            "correct": np.array([one.correct for one in documents], bool),
        }
        final = _shard(self.folder, shard)
        partial = final.with_name(f".{final.name}.tmp")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name, array in arrays.items():
            np.save(partial / f"{name}.npy", array)
        partial.rename(final)

    def _check(self, shard: int, number: int, document: ScoredDocument) -> None:
        S, K = len(document.tokens_S), self.info.top_k
        shapes = [np.shape(x) for x in document[:4]]
        where = f"shard {shard}, document {number}"
        if shapes != [(S,), (S,), (S, K), (S, K + 1)] or not S:
            raise DataError(f"{where}: shapes {shapes} must be (S,), (S,), (S, {K}), (S, {K + 1}) with S above 0")
        for ids in (document.tokens_S, document.teacher_ids_SK):
            if ids.size and not 0 <= ids.min() <= ids.max() < self.info.vocab_size:
                raise DataError(
                    f"{where}: tokens from {ids.min()} to {ids.max()} do not lie in a vocabulary of"
                    f" {self.info.vocab_size}: the store's tokenizer is another one"
                )


class TeacherLogits:
    """The documents of a complete store, in order of shards: a random-access source for Grain.

    Raises:
        DataError: the folder is no store, or a shard is missing or damaged; with `only_correct`, no document is.
    """

    def __init__(self, folder: Path, only_correct: bool = False):
        self.folder, self.info, self.only_correct = folder, read_info(folder), only_correct
        self._shards = [_read_shard(folder, shard, self.info) for shard in range(self.info.num_shards)]
        self._places = [
            (shard, number)
            for shard, arrays in enumerate(self._shards)
            for number, correct in enumerate(arrays["correct"])
            if correct or not only_correct
        ]
        if not self._places:
            raise DataError(f"{folder}: no document is correct: draw more samples, or take a better teacher")

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> ScoredDocument:
        shard, number = self._places[index]
        arrays = self._shards[shard]
        tokens = slice(arrays["ends"][number - 1] if number else 0, arrays["ends"][number])
        names = ("tokens", "loss_mask", "teacher_ids", "teacher_logprobs")
        return ScoredDocument(
            *[np.array(arrays[name][tokens]) for name in names], correct=bool(arrays["correct"][number])
        )


class StoredBatches:
    """Endless batches of a store, reshuffled each epoch; an iterator whose place can be saved.

    Dicts of arrays [B, S]: int32 `tokens_BS`, `segment_ids_BS`, `positions_BS`, `loss_mask_BS` as `packing.pack` makes
    them, one document to a row, and, where K is not 0, `teacher_ids_BSK` and float32 `teacher_logprobs_BSJ`.

    Raises:
        DataError: a document is longer than a row.
    """

    def __init__(self, source: TeacherLogits, batch_size: int, sequence_length: int, pad_id: int, seed: int):
        self._pad_id, self._length = pad_id, sequence_length
        documents = grain.MapDataset.source(source).shuffle(seed).repeat().map(self._row)
        # The files are mapped to memory: threads that read ahead would only cost.
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        self._batches = iter(documents.to_iter_dataset(options).batch(batch_size))
        kept = "/correct" if source.only_correct else ""
        self._source = f"{source.info.origin}{kept}/{len(source)} documents/B{batch_size}/S{sequence_length}/seed{seed}"

    def __iter__(self) -> StoredBatches:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        return {"source": self._source, "place": self._batches.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on at a place.

        Raises:
            DataError: it was saved with another store, other sizes or another seed.
        """
        if state["source"] != self._source:
            raise DataError(
                f"the saved place belongs to {state['source']}, but this is {self._source}: resume with the store and"
                " the settings of the run, or start a new one"
            )
        self._batches.set_state(state["place"])

    def _row(self, document: ScoredDocument) -> dict[str, np.ndarray]:
        S, room = len(document.tokens_S), self._length
        if room < S:
            raise DataError(f"a document has {S} tokens, but a row holds {room}: raise the sequence length")
        end = (0, room - S)
        row = {
            "tokens_BS": np.pad(document.tokens_S, end, constant_values=self._pad_id),
            "segment_ids_BS": np.pad(np.ones(S, np.int32), end),
            "positions_BS": np.pad(np.arange(S, dtype=np.int32), end),
            "loss_mask_BS": np.pad(document.loss_mask_S.astype(np.int32), end),
        }
        if document.teacher_ids_SK.shape[1]:
            row["teacher_ids_BSK"] = np.pad(document.teacher_ids_SK, (end, (0, 0)))
            row["teacher_logprobs_BSJ"] = np.pad(document.teacher_logprobs_SJ.astype(np.float32), (end, (0, 0)))
        return row


def read_info(folder: Path) -> StoreInfo:
    """
    Raises:
        DataError: the folder is no store, or its store.json is damaged.
    """
    try:
        return StoreInfo(**json.loads((folder / _META).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise DataError(f"{folder} is no store of teacher logits: it has no {_META}") from None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{folder / _META} cannot be read ({error}): delete the store and write it again") from error


def _shard(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}"


def _half(x: np.ndarray) -> np.ndarray:
    lowest = float(np.finfo(np.float16).min)
    return np.where(np.isneginf(x), x, np.maximum(x, lowest)).astype(np.float16)


def _read_shard(folder: Path, shard: int, info: StoreInfo) -> dict[str, np.ndarray]:
    names = ("tokens", "loss_mask", "teacher_ids", "teacher_logprobs", "ends", "correct")
    path = _shard(folder, shard)
    try:
        # Arrays without an element (K = 0) cannot be mapped.
        mode = "r" if info.top_k else None
        arrays = {name: np.load(path / f"{name}.npy", mmap_mode=mode) for name in names}
    except FileNotFoundError as error:
        raise DataError(f"{folder}: shard {shard} of {info.num_shards} is incomplete ({error}): write it") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}): delete this folder and write the shard again") from error
    T = len(arrays["tokens"])
    widths = arrays["teacher_ids"].shape, arrays["teacher_logprobs"].shape
    if widths != ((T, info.top_k), (T, info.top_k + 1)) or int(arrays["ends"][-1]) != T:
        raise DataError(f"{path}: its arrays do not belong together: delete this folder and write the shard again")
    return arrays
