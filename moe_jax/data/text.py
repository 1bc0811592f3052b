"""Text corpora as batches of packed tokens: deterministic, resumable, divided among processes (through Grain).

Each row of the batch has a line of its own: every B-th document of an order that is shuffled anew each epoch → tokens →
pieces of at most S tokens, shuffled in a window → rows by first fit. So a process reads only the documents of the rows
that it has, and the batches are the same for any number of processes. Each piece is a segment of its own, so that
nothing attends across documents.

Legend: B rows (batch), S sequence length in tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import grain
import numpy as np

from moe_jax.data import DataError
from moe_jax.data.tokenizer import Tokenizer

_DOCUMENT_CHARACTERS = 8192
"""Longest document that is made of a .txt file."""
_VALIDATION_ONE_IN = 20
_WINDOW_TOKENS, _WINDOW_PIECES = 2**19, 2**11
"""Pieces of one long document follow each other. Shuffling this much of all lines together (the smaller of the two)
keeps successive batches from being the same documents, at the price of tokenizing as much again when a run resumes."""
_OPEN_ROWS = 8
"""How many rows of a line first fit fills at a time."""

Split = Literal["train", "validation"]


@dataclass(frozen=True)
class TextCorpus:
    """Documents in memory, divided into a training and a validation part.

    A document belongs to validation by a hash of its content, 1 in 20, so that the division is the same everywhere, is
    not moved by other documents coming or going, and copies of a document never lie on both sides. Where that leaves
    one side empty, as tiny corpora do, the document with the smallest hash (and its copies) is the validation part.
    """

    name: str
    train: tuple[str, ...]
    validation: tuple[str, ...]
    fingerprint: str
    """Hash of all documents and their order: positions in a corpus mean nothing in another one."""

    @classmethod
    def load(cls, path: str | Path = "") -> TextCorpus:
        """Reads a corpus.

        Args:
          path:
            - "": the running interpreter's own standard library, a document for each .py file (tests and installed
              packages left out). Real text on every machine, though not the same for every version of Python;
            - a .txt file: cut at blank lines into documents of at most 8,192 characters (longer paragraphs are cut at
              ends of lines, or where they must be);
            - a .jsonl file: an object with a string "text" on each line, a document each;
            - a folder: all such files in it and below it, sorted by path.
            Files are UTF-8. Blank documents and blank lines of a .jsonl are passed over.

        Raises:
          DataError: no such path, a malformed line (named), text that is not UTF-8, fewer than two different documents.
        """
        name = str(path) if str(path) else "the standard library of this Python"
        documents, digests = [], []
        for where, text in _read(path):
            if not text.strip():
                continue
            try:
                digest = hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
            except UnicodeEncodeError as error:
                raise DataError(f'{where}: "text" is not valid Unicode ({error.reason}): correct the line') from error
            documents.append(text)
            digests.append(digest)
        if len(set(digests)) < 2:
            raise DataError(
                f"{name}: {len(set(digests))} different documents, but training and validation need one each: "
                "give more text (a .txt file is divided at blank lines)"
            )
        held_out = {digest for digest in digests if int.from_bytes(digest[:8], "big") % _VALIDATION_ONE_IN == 0}
        if not held_out or len(held_out) == len(set(digests)):
            held_out = {min(digests)}
        pairs = list(zip(documents, digests, strict=True))
        return cls(
            name,
            train=tuple(text for text, digest in pairs if digest not in held_out),
            validation=tuple(text for text, digest in pairs if digest in held_out),
            fingerprint=hashlib.blake2b(b"".join(digests), digest_size=8).hexdigest(),
        )

    def documents(self, split: Split) -> Sequence[str]:
        """The documents of one side, in the order of the files."""
        if split not in ("train", "validation"):
            raise ValueError(f"split = {split!r}: must be 'train' or 'validation'")
        return self.train if split == "train" else self.validation


class TrainBatches:
    """Endless batches for training: dicts of int32 arrays [B, S], the rows asked for.

    tokens_BS, segment_ids_BS (1, 2, … in each row, 0 for padding) and positions_BS (from 0 in each segment). A document
    is [bos] text [eos], as far as the tokenizer has these tokens; special tokens written in the text are encoded as
    such.
    """

    def __init__(
        self,
        corpus: TextCorpus,
        tokenizer: Tokenizer,
        batch_size: int,
        sequence_length: int,
        seed: int,
        rows: Sequence[int] | None = None,
    ):
        """
        Args:
          corpus: what to read.
          tokenizer: turns it into tokens.
          batch_size: B, rows of the whole batch.
          sequence_length: S, tokens per row.
          seed: decides the order of everything.
          rows: which rows of the batch to make, e.g. `sharding.own_rows`. Default: all.
        """
        # Grain seeds epoch n with seed + n: neighbouring seeds would share their epochs if they were used as they are.
        order_seed, window_seed = (int(word) >> 1 for word in np.random.SeedSequence(seed).generate_state(2))
        documents = grain.MapDataset.source(corpus.train).shuffle(order_seed).repeat()
        window = max(_OPEN_ROWS, min(_WINDOW_PIECES, _WINDOW_TOKENS // sequence_length) // batch_size)

        def line(row: int) -> grain.DatasetIterator:
            pieces = _pieces(documents[row::batch_size], tokenizer, sequence_length)
            shuffled = grain.experimental.WindowShuffleIterDataset(pieces, window_size=window, seed=window_seed + row)
            return iter(_packed_rows(shuffled, _OPEN_ROWS, sequence_length, tokenizer.pad_id).map(_rename))

        self._lines = {row: line(row) for row in (range(batch_size) if rows is None else rows)}
        self._source = f"{corpus.fingerprint}/V{tokenizer.vocab_size}/B{batch_size}/S{sequence_length}/seed{seed}"

    def __iter__(self) -> TrainBatches:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        rows = [next(line) for line in self._lines.values()]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def get_state(self) -> dict[str, Any]:
        """The place behind the last batch: JSON, to be merged with those of processes that make other rows."""
        return {"source": self._source, "rows": {str(row): line.get_state() for row, line in self._lines.items()}}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on at a place.

        Raises:
          DataError: it was saved with other data, tokenizer, sizes or seed.
        """
        if state["source"] != self._source:
            raise DataError(
                f"the saved place in the data belongs to {state['source']}, but this is {self._source} "
                "(corpus/vocabulary/rows/sequence length/seed): resume with the data and settings of the run, or start "
                "a new one"
            )
        for row, line in self._lines.items():
            line.set_state(state["rows"][str(row)])


def validation_batches(
    corpus: TextCorpus,
    tokenizer: Tokenizer,
    batch_size: int,
    sequence_length: int,
    rows: Sequence[int] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """All validation documents once, in order: batches as `TrainBatches`', the last one filled with padding.

    `rows` are those of each batch to give out, by default all.
    """
    fill = {"tokens_BS": tokenizer.pad_id, "segment_ids_BS": 0, "positions_BS": 0}

    def chosen_rows(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        missing = ((0, batch_size - len(batch["tokens_BS"])), (0, 0))
        whole = {key: np.pad(array, missing, constant_values=fill[key]) for key, array in batch.items()}
        return whole if rows is None else {key: array[list(rows)] for key, array in whole.items()}

    pieces = _pieces(grain.MapDataset.source(corpus.validation), tokenizer, sequence_length)
    packed = _packed_rows(pieces, batch_size, sequence_length, tokenizer.pad_id)
    return iter(packed.batch(batch_size, drop_remainder=False).map(_rename).map(chosen_rows))


def spread_validation_batches(
    corpus: TextCorpus, tokenizer: Tokenizer, batch_size: int, sequence_length: int, count: int
) -> list[dict[str, np.ndarray]]:
    """`count` of the validation batches, spread evenly over that text; of 0, or of more than there are, all."""
    batches = list(validation_batches(corpus, tokenizer, batch_size, sequence_length))
    places = np.linspace(0, len(batches) - 1, min(count or len(batches), len(batches)))
    return [batches[place] for place in places.round().astype(int)]


class _Pieces(grain.experimental.FlatMapTransform):
    """A document's tokens, cut into pieces of at most S."""

    def __init__(self, tokenizer: Tokenizer, sequence_length: int) -> None:
        self._tokenizer = tokenizer
        self._sequence_length = sequence_length

    def flat_map(self, element: str) -> list[dict[str, np.ndarray]]:
        ends = (self._tokenizer.bos_id, self._tokenizer.eos_id)
        bos, eos = ([index] if index is not None else [] for index in ends)
        tokens = np.array(bos + self._tokenizer.encode(element) + eos, np.int32)
        return [
            {"tokens": tokens[start : start + self._sequence_length]}
            for start in range(0, len(tokens), self._sequence_length)
        ]


def _pieces(documents: grain.MapDataset, tokenizer: Tokenizer, sequence_length: int) -> grain.IterDataset:
    # The documents lie in memory: threads that read ahead would only cost.
    stream = documents.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    return grain.experimental.FlatMapIterDataset(stream, _Pieces(tokenizer, sequence_length))


def _packed_rows(pieces: grain.IterDataset, rows: int, sequence_length: int, pad_id: int) -> grain.IterDataset:
    return grain.experimental.FirstFitPackIterDataset(
        pieces,
        length_struct={"tokens": sequence_length},
        num_packing_bins=rows,
        shuffle_bins=False,
        padding_struct={"tokens": pad_id},
    )


def _rename(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        "tokens_BS": batch["tokens"],
        "segment_ids_BS": batch["tokens_segment_ids"],
        "positions_BS": batch["tokens_positions"],
    }


def _read(path: str | Path) -> Iterator[tuple[str, str]]:
    """Documents, each with the place to name if something is wrong with it."""
    if not str(path):
        library = Path(sysconfig.get_paths()["stdlib"])
        left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
        files = [file for file in library.rglob("*.py") if not left_out & set(file.relative_to(library).parts)]
        if not files:
            raise DataError(f"{library} holds no .py files (an embedded Python?): give a path to text instead")
        for file in sorted(files, key=lambda file: file.relative_to(library).as_posix()):
            yield str(file), _decode(file.read_bytes(), file)
        return
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path} does not exist: give a .txt or .jsonl file, or a folder of such files")
    if path.is_dir():
        files = sorted(file for suffix in ("*.txt", "*.jsonl") for file in path.rglob(suffix))
        if not files:
            raise DataError(f"{path} holds no .txt or .jsonl files: give a folder that does")
    else:
        files = [path]
    for file in files:
        if file.suffix == ".txt":
            for text in _split_text(_decode(file.read_bytes(), file)):
                yield str(file), text
        elif file.suffix == ".jsonl":
            yield from _read_jsonl(file)
        else:
            raise DataError(f"{file} must end in .txt (plain text) or .jsonl (one JSON object a line)")


def _read_jsonl(file: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            entry = json.loads(_decode(line, file, number))
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not valid JSON ({error.msg}, column {error.colno}): correct the line") from error
        text = entry.get("text") if isinstance(entry, dict) else None
        if not isinstance(text, str):
            raise DataError(f'{where}: must be an object with a string "text", as in {{"text": "…"}}')
        yield where, text


def _decode(data: bytes, file: Path, line: int = 1) -> str:
    """UTF-8 text, without a byte-order mark. `line` is where the data begin."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line += data[: error.start].count(b"\n")
        raise DataError(
            f"{file}, line {line}: not UTF-8 (byte 0x{data[error.start]:02x}): convert the file, for instance with "
            "`iconv -f latin1 -t utf-8`"
        ) from error


def _split_text(text: str) -> Iterator[str]:
    """Cuts a text behind blank lines into parts of at most _DOCUMENT_CHARACTERS; together they are the text."""
    start = end = 0
    for paragraph_end in [*(match.end() for match in re.finditer(r"\n[ \t\r]*\n", text)), len(text)]:
        if paragraph_end - start > _DOCUMENT_CHARACTERS and end > start:
            yield text[start:end]
            start = end
        while paragraph_end - start > _DOCUMENT_CHARACTERS:
            newline = text.rfind("\n", start, start + _DOCUMENT_CHARACTERS)
            cut = newline + 1 if newline > start else start + _DOCUMENT_CHARACTERS
            yield text[start:cut]
            start = cut
        end = paragraph_end
    if start < len(text):
        yield text[start:]
