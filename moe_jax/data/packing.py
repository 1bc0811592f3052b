"""Several documents to a row: first-fit packing, with segment ids that keep documents apart.

Legend: B rows (batch), S sequence length in tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.data import DataError


class Packed(NamedTuple):
    """Rows of packed documents, and how many documents went into them."""

    batch: dict[str, np.ndarray]
    """int32 arrays [B, S]:

    - tokens_BS: token ids, the padding id where no document lies;
    - segment_ids_BS: 1, 2, … for the documents of a row, 0 for padding;
    - positions_BS: position in the document, from 0;
    - loss_mask_BS, when masks are given: 1 where the token *at* this place is to be predicted.
    """
    documents_used: int
    """The documents packed are the first `documents_used` ones; the next batch starts with the one after them."""


def pack(
    documents: Sequence[Sequence[int]],
    sequence_length: int,
    num_rows: int | None = None,
    pad_id: int = 0,
    masks: Sequence[Sequence[int]] | None = None,
    split_long: bool = False,
) -> Packed:
    """Packs documents into rows by first fit: each goes whole into the first row that has room for it.

    Packing stops at the first document that fits no row, so that what is used is always a prefix: the place in a
    stream of documents is one number.

    Args:
      documents: token ids, one sequence a document. Empty documents take no room.
      sequence_length: S, tokens per row.
      num_rows: B, exactly; rows left over are all padding. None: as many rows as all the documents need.
      pad_id: token id of padding.
      masks: for each document as many 0s and 1s as it has tokens, 1 where the token is to be predicted.
      split_long: cut documents longer than a row into pieces of S tokens (the last one shorter), each a segment of its
        own. Otherwise such a document is an error. A document of which only some pieces found room counts as not
        used, and its pieces are taken out again.

    Raises:
      DataError: a document is longer than a row, or longer than `num_rows` rows hold; a mask is not as long as its
        document.
    """
    free_B = np.full(num_rows if num_rows is not None else 0, sequence_length)
    placed: list[tuple[int, int, int, int]] = []  # (document, where its piece starts, row, column)
    used = 0
    for index, document in enumerate(documents):
        length = len(document)
        if length > sequence_length and not split_long:
            raise DataError(
                f"document {index} has {length} tokens, but a row holds sequence_length = {sequence_length}: "
                "raise sequence_length, or let long documents be split (split_long=True)"
            )
        if masks is not None and len(masks[index]) != length:
            raise DataError(f"document {index} has {length} tokens, but its mask has {len(masks[index])} entries")
        pieces = []
        free_after_B = free_B.copy() if length > sequence_length else free_B
        for start in range(0, length, sequence_length):
            size = min(sequence_length, length - start)
            fits_B = free_after_B >= size
            row = int(fits_B.argmax()) if fits_B.size else 0
            if not fits_B.size or not fits_B[row]:
                if num_rows is not None:
                    break
                row = len(free_after_B)
                # Rows are added in doubling blocks; those never used are cut off below.
                free_after_B = np.append(free_after_B, np.full(max(row, 1), sequence_length))
            pieces.append((index, start, row, sequence_length - int(free_after_B[row])))
            free_after_B[row] -= size
        else:
            free_B = free_after_B
            placed += pieces
            used = index + 1
            continue
        if index == 0:
            raise DataError(
                f"document 0 has {length} tokens, more than {num_rows} rows of sequence_length = {sequence_length} "
                "hold: raise one of them"
            )
        break

    rows = num_rows if num_rows is not None else 1 + max((row for _, _, row, _ in placed), default=-1)
    tokens_BS = np.full((rows, sequence_length), pad_id, np.int32)
    segment_ids_BS = np.zeros((rows, sequence_length), np.int32)
    positions_BS = np.zeros((rows, sequence_length), np.int32)
    loss_mask_BS = np.zeros((rows, sequence_length), np.int32)
    positions_S = np.arange(sequence_length, dtype=np.int32)
    segments_B = [0] * rows
    for index, start, row, column in placed:
        piece = documents[index][start : start + sequence_length]
        place = (row, slice(column, column + len(piece)))
        segments_B[row] += 1
        tokens_BS[place] = piece
        segment_ids_BS[place] = segments_B[row]
        positions_BS[place] = positions_S[: len(piece)]
        if masks is not None:
            loss_mask_BS[place] = masks[index][start : start + sequence_length]
    batch = {"tokens_BS": tokens_BS, "segment_ids_BS": segment_ids_BS, "positions_BS": positions_BS}
    if masks is not None:
        batch["loss_mask_BS"] = loss_mask_BS
    return Packed(batch, used)


def packed_batches(
    documents: Iterable[tuple[Sequence[int], Sequence[int]]],
    sequence_length: int,
    num_rows: int,
    pad_id: int = 0,
) -> Iterator[Packed]:
    """Batches of exactly `num_rows` rows from a stream of (tokens, mask) pairs, as `pack` makes them.

    Documents that found no room open the next batch. To resume, start a new iterator from the stream without its
    first N documents, where N is the sum of `documents_used` over the batches taken: the batches that follow are the
    same. A finite stream ends with a batch whose last rows may be padding.

    Raises:
      DataError: as `pack`, a document longer than a row included.
    """
    stream = iter(documents)
    pending: list[tuple[Sequence[int], Sequence[int]]] = []
    tokens_pending = 0
    capacity = num_rows * sequence_length
    while True:
        # With one token more than all rows hold, at least one document is left over: a larger prefix cannot fit.
        while tokens_pending <= capacity:
            pair = next(stream, None)
            if pair is None:
                break
            pending.append(pair)
            tokens_pending += len(pair[0])
        if not pending:
            return
        packed = pack(
            [tokens for tokens, _ in pending],
            sequence_length,
            num_rows,
            pad_id,
            masks=[mask for _, mask in pending],
        )
        yield packed
        tokens_pending -= sum(len(tokens) for tokens, _ in pending[: packed.documents_used])
        del pending[: packed.documents_used]
