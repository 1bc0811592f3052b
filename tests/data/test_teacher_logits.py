"""The store of teacher logits: what is written is read, by shard and resumed as at once, and damage is named."""

import numpy as np
import pytest

from moe_jax.data import DataError
from moe_jax.data.teacher_logits import ScoredDocument, StoredBatches, StoreInfo, StoreWriter, TeacherLogits

INFO = StoreInfo(top_k=3, vocab_size=50, temperature=1.0, num_shards=3, origin="a teacher")


def document(number, k=3):
    rng = np.random.default_rng(number)
    S = 4 + number % 5
    ids_SK = np.stack([rng.permutation(50)[:k] for _ in range(S)])
    logprobs_SJ = np.log(rng.dirichlet(np.ones(k + 1), S))
    return ScoredDocument(rng.integers(0, 50, S), np.arange(S) >= 2, ids_SK, logprobs_SJ, number % 2 == 0)


def fill(folder, shards, info=INFO):
    writer = StoreWriter(folder, info)
    for shard in shards:
        writer.write(shard, [document(10 * shard + n, info.top_k) for n in range(5)])
    return writer


def test_what_was_written_is_read_by_number_over_all_shards(tmp_path):
    fill(tmp_path, range(3))
    source = TeacherLogits(tmp_path)
    assert len(source) == 15
    for index in range(15):
        wanted, got = document(10 * (index // 5) + index % 5), source[index]
        for x, y in zip(wanted[:3], got[:3], strict=True):
            np.testing.assert_array_equal(x, y)
        np.testing.assert_allclose(wanted.teacher_logprobs_SJ, got.teacher_logprobs_SJ, rtol=1e-3)
        assert got.correct == wanted.correct
    right = TeacherLogits(tmp_path, only_correct=True)
    assert 0 < len(right) < 15 and all(right[index].correct for index in range(len(right)))


def test_a_store_written_in_two_sessions_is_the_one_written_at_once(tmp_path):
    fill(tmp_path / "whole", range(3))
    assert fill(tmp_path / "resumed", [2]).missing() == [0, 1]
    half = tmp_path / "resumed" / ".00000.tmp"  # a session that was killed while it wrote
    half.mkdir()
    (half / "tokens.npy").write_bytes(b"torn")
    writer = StoreWriter(tmp_path / "resumed", INFO)
    fill(tmp_path / "resumed", writer.missing())
    assert writer.missing() == []
    whole, resumed = TeacherLogits(tmp_path / "whole"), TeacherLogits(tmp_path / "resumed")
    for index in range(len(whole)):
        for x, y in zip(whole[index], resumed[index], strict=True):
            np.testing.assert_array_equal(x, y)


def test_batches_go_on_where_they_were_and_an_epoch_has_each_document_once(tmp_path):
    fill(tmp_path, range(3))
    batches = StoredBatches(TeacherLogits(tmp_path), batch_size=5, sequence_length=10, pad_id=49, seed=1)
    first = [next(batches) for _ in range(3)]
    place = batches.get_state()
    after = [next(batches) for _ in range(2)]
    resumed = StoredBatches(TeacherLogits(tmp_path), batch_size=5, sequence_length=10, pad_id=49, seed=1)
    resumed.set_state(place)
    for batch in after:
        again = next(resumed)
        assert batch.keys() == again.keys()
        for name, x in batch.items():
            np.testing.assert_array_equal(x, again[name])
    rows = {tuple(row) for batch in first for row in batch["tokens_BS"].tolist()}
    stored = TeacherLogits(tmp_path)
    assert rows == {(*stored[i].tokens_S, *[49] * (10 - len(stored[i].tokens_S))) for i in range(15)}
    batch = first[0]
    lengths = np.sum(batch["segment_ids_BS"], axis=1)
    assert batch["teacher_ids_BSK"].shape == (5, 10, 3) and batch["teacher_logprobs_BSJ"].dtype == np.float32
    np.testing.assert_array_equal(np.sum(batch["loss_mask_BS"], axis=1), lengths - 2)
    np.testing.assert_array_equal(np.max(batch["positions_BS"], axis=1), lengths - 1)
    with pytest.raises(DataError, match="seed2"):
        StoredBatches(TeacherLogits(tmp_path), 5, 10, 49, seed=2).set_state(place)


def test_documents_alone_can_be_stored(tmp_path):
    info = StoreInfo(0, 50, 1.0, 1, "another tokenizer")
    writer = StoreWriter(tmp_path, info)
    one = document(3)
    writer.write(0, [one._replace(teacher_ids_SK=np.zeros((8 - 1, 0)), teacher_logprobs_SJ=np.zeros((7, 1)))])
    batch = next(StoredBatches(TeacherLogits(tmp_path), 2, 9, 0, seed=0))
    assert "teacher_ids_BSK" not in batch
    np.testing.assert_array_equal(batch["tokens_BS"][0, :7], one.tokens_S)


def test_bad_input_is_named(tmp_path):
    with pytest.raises(DataError, match="is no store"):
        TeacherLogits(tmp_path)
    writer = fill(tmp_path, [0, 1])
    with pytest.raises(DataError, match="shard 2 of 3 is incomplete"):
        TeacherLogits(tmp_path)
    with pytest.raises(DataError, match="no document"):
        writer.write(2, [])
    with pytest.raises(DataError, match="vocabulary of 50"):
        writer.write(2, [document(1)._replace(tokens_S=np.full(5, 50))])
    with pytest.raises(DataError, match="shapes"):
        writer.write(2, [document(1, k=2)])
    with pytest.raises(DataError, match="not StoreInfo"):
        StoreWriter(tmp_path, INFO.__class__(**{**vars(INFO), "temperature": 2.0}))
    writer.write(2, [document(1)])
    batches = StoredBatches(TeacherLogits(tmp_path), 4, 5, 0, seed=0)
    with pytest.raises(DataError, match="a row holds 5"):
        for _ in range(4):
            next(batches)
    (tmp_path / "00001" / "ends.npy").write_bytes(b"torn")
    with pytest.raises(DataError, match="00001 is damaged"):
        TeacherLogits(tmp_path)
    wrong = tmp_path / "wrong"
    StoreWriter(wrong, StoreInfo(3, 50, 1.0, 1, "x")).write(0, [document(1)])
    with pytest.raises(DataError, match="no document is correct"):
        TeacherLogits(wrong, only_correct=True)
