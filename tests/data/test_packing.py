import itertools

import numpy as np
import pytest

from moe_jax.data import DataError
from moe_jax.data.packing import pack, packed_batches


def segments(batch):
    """The documents of a batch, read back by segment id, as (row, tokens, positions)."""
    found = []
    for row, (tokens_S, segments_S, positions_S) in enumerate(
        zip(batch["tokens_BS"], batch["segment_ids_BS"], batch["positions_BS"], strict=True)
    ):
        for segment in range(1, segments_S.max(initial=0) + 1):
            inside_S = segments_S == segment
            found.append((row, tokens_S[inside_S].tolist(), positions_S[inside_S].tolist()))
    return found


def test_first_fit_by_hand():
    batch, used = pack([[1, 2, 3], [4, 5, 6, 7], [8], [9, 9]], sequence_length=5, pad_id=77)
    np.testing.assert_array_equal(batch["tokens_BS"], [[1, 2, 3, 8, 77], [4, 5, 6, 7, 77], [9, 9, 77, 77, 77]])
    np.testing.assert_array_equal(batch["segment_ids_BS"], [[1, 1, 1, 2, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(batch["positions_BS"], [[0, 1, 2, 0, 0], [0, 1, 2, 3, 0], [0, 1, 0, 0, 0]])
    assert used == 4
    assert all(array.dtype == np.int32 for array in batch.values())
    assert "loss_mask_BS" not in batch


def test_stops_at_the_first_document_that_does_not_fit():
    batch, used = pack([[1, 1, 1], [2, 2, 2], [3, 3], [4]], sequence_length=4, num_rows=2)
    assert used == 2  # [4] would fit, but then the documents used would not be a prefix
    np.testing.assert_array_equal(batch["tokens_BS"], [[1, 1, 1, 0], [2, 2, 2, 0]])


def test_rows_left_over_are_padding():
    batch, used = pack([[1]], sequence_length=2, num_rows=3)
    assert used == 1 and batch["segment_ids_BS"].tolist() == [[1, 0], [0, 0], [0, 0]]


def test_no_documents():
    batch, used = pack([], sequence_length=4)
    assert used == 0 and batch["tokens_BS"].shape == (0, 4)


def test_masks_stay_on_their_tokens():
    batch, _ = pack([[5, 6, 7], [8, 9]], sequence_length=6, masks=[[0, 1, 1], [0, 1]])
    np.testing.assert_array_equal(batch["loss_mask_BS"], [[0, 1, 1, 0, 1, 0]])


def test_long_documents():
    with pytest.raises(DataError, match=r"document 1 has 5 tokens.*sequence_length = 4.*split_long"):
        pack([[1], [1, 2, 3, 4, 5]], sequence_length=4)
    batch, used = pack([[1], [1, 2, 3, 4, 5]], sequence_length=4, split_long=True)
    assert used == 2
    assert segments(batch) == [(0, [1], [0]), (0, [5], [0]), (1, [1, 2, 3, 4], [0, 1, 2, 3])]
    # Half of a document is never in a batch.
    batch, used = pack([[7], [1, 2, 3, 4, 5, 6, 6, 6]], sequence_length=4, num_rows=2, split_long=True)
    assert used == 1 and segments(batch) == [(0, [7], [0])]
    with pytest.raises(DataError, match="more than 2 rows"):
        pack([[1] * 9], sequence_length=4, num_rows=2, split_long=True)


def test_mask_of_wrong_length():
    with pytest.raises(DataError, match="document 0 has 2 tokens, but its mask has 1"):
        pack([[1, 2]], sequence_length=4, masks=[[1]])


@pytest.mark.parametrize("num_rows", [None, 1, 3])
@pytest.mark.parametrize("seed", range(10))
def test_every_used_document_is_there_once_and_whole(seed, num_rows):
    rng = np.random.default_rng(seed)
    documents = [rng.integers(1, 100, rng.integers(0, 8)).tolist() for _ in range(rng.integers(0, 30))]
    batch, used = pack(documents, 7, num_rows)
    found = segments(batch)
    assert sorted(tokens for _, tokens, _ in found) == sorted(d for d in documents[:used] if d)
    assert all(positions == list(range(len(tokens))) for _, tokens, positions in found)
    assert (batch["tokens_BS"][batch["segment_ids_BS"] == 0] == 0).all()
    if num_rows is None:
        assert used == len(documents) and (batch["segment_ids_BS"].max(axis=1, initial=0) > 0).all()
    elif used < len(documents):
        free = (batch["segment_ids_BS"] == 0).sum(axis=1)
        assert (free < len(documents[used])).all()


def stream(start=0):
    for index in itertools.count(start):
        length = 20 + index * 7919 % 36
        yield [index % 200 + 9] * length, [0] + [1] * (length - 1)


def test_stream_resumes_at_the_documents_used():
    batches = list(itertools.islice(packed_batches(stream(), 128, 32), 4))
    done = batches[0].documents_used + batches[1].documents_used
    again = list(itertools.islice(packed_batches(stream(done), 128, 32), 2))
    for before, after in zip(batches[2:], again, strict=True):
        assert before.documents_used == after.documents_used
        for key, array in before.batch.items():
            np.testing.assert_array_equal(array, after.batch[key])
    filled = np.mean([packed.batch["segment_ids_BS"] > 0 for packed in batches])
    assert filled > 0.9  # first fit of 20-55 tokens in rows of 128


def test_finite_stream_is_used_up():
    pairs = list(itertools.islice(stream(), 50))
    batches = list(packed_batches(pairs, 64, 4))
    assert sum(packed.documents_used for packed in batches) == 50
    assert sum(int((packed.batch["segment_ids_BS"] > 0).sum()) for packed in batches) == sum(len(t) for t, _ in pairs)
    assert all(packed.batch["tokens_BS"].shape == (4, 64) for packed in batches)
