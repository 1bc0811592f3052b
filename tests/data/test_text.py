import itertools
import json

import grain
import numpy as np
import pytest

from moe_jax.data import DataError
from moe_jax.data import text as text_module
from moe_jax.data.text import TextCorpus, TrainBatches, spread_validation_batches, validation_batches
from moe_jax.data.tokenizer import ByteTokenizer
from moe_jax.training.loop import _merged

TOKENIZER = ByteTokenizer()


@pytest.fixture(autouse=True)
def small_window(monkeypatch):
    """Short tests then see several windows, and several epochs."""
    monkeypatch.setattr(text_module, "_WINDOW_PIECES", 20)


def document(index):
    return f"{index} is a number.\n" * (1 + index * 7 % 9)


@pytest.fixture
def corpus(tmp_path):
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps({"text": document(index)}) + "\n" for index in range(60)))
    return TextCorpus.load(file)


def segment_texts(batches):
    """The text of each segment, in order, with its special tokens."""
    texts = []
    for batch in batches:
        for tokens_S, segments_S, positions_S in zip(
            batch["tokens_BS"], batch["segment_ids_BS"], batch["positions_BS"], strict=True
        ):
            assert (tokens_S[segments_S == 0] == TOKENIZER.pad_id).all()
            for segment in range(1, segments_S.max() + 1):
                assert positions_S[segments_S == segment].tolist() == list(range((segments_S == segment).sum()))
                texts.append(TOKENIZER.decode(tokens_S[segments_S == segment]))
    return texts


# --- corpora


def test_standard_library_is_a_corpus():
    corpus = TextCorpus.load("")
    train, validation = corpus.documents("train"), corpus.documents("validation")
    assert len(train) > 100 and sum(map(len, train)) > 1_000_000
    assert 0.01 < len(validation) / (len(train) + len(validation)) < 0.12
    assert not set(train) & set(validation)
    with pytest.raises(ValueError, match="split = 'test'"):
        corpus.documents("test")


def test_split_is_by_content(tmp_path, corpus):
    moved = tmp_path / "moved.jsonl"
    lines = [json.dumps({"text": document(index), "id": index}) for index in reversed(range(61))]
    moved.write_text("\n\n".join(lines))
    again = TextCorpus.load(moved)
    assert set(corpus.validation) <= set(again.validation) and corpus.validation
    assert set(again.validation) <= {*corpus.validation, document(60)}
    assert again.fingerprint != corpus.fingerprint


def test_text_files_are_cut_at_blank_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "_DOCUMENT_CHARACTERS", 20)
    text = "one\ntwo\n\nthree\r\n\r\nfour\n \n\n\n" + "long line\n" * 5 + "x" * 50 + "\n\nend"
    parts = list(text_module._split_text(text))
    assert "".join(parts) == text
    assert all(0 < len(part) <= 20 for part in parts)
    assert parts[:2] == ["one\ntwo\n\nthree\r\n\r\n", "four\n \n\n\n"]
    assert list(text_module._split_text("a\n\nb")) == ["a\n\nb"]
    assert list(text_module._split_text("")) == []


def test_folder_of_files(tmp_path):
    (tmp_path / "b.txt").write_bytes("\ufeffzwei".encode())
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.jsonl").write_text('{"text": "drei"}\n{"text": " "}\n')
    (tmp_path / "a.txt").write_text("eins")
    (tmp_path / "notes.md").write_text("not read")
    corpus = TextCorpus.load(tmp_path)
    assert sorted(corpus.train + corpus.validation) == ["drei", "eins", "zwei"]
    assert len(corpus.validation) == 1  # the rule for tiny corpora


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', r"a.jsonl, line 3: not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}', r'a.jsonl, line 2: must be an object with a string "text"'),
        ("a.jsonl", b'["text"]', r"a.jsonl, line 1: must be an object"),
        ("a.jsonl", b'{"text": 3}', r"a.jsonl, line 1: must be an object"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', r"a.jsonl, line 2: not UTF-8 \(byte 0xe9\): convert"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a.jsonl, line 1: .*not valid Unicode"),
        ("a.txt", b"one\ntwo \xff", r"a.txt, line 2: not UTF-8 \(byte 0xff\)"),
        ("a.txt", b"", r"a.txt: 0 different documents"),
        ("a.txt", b" \n\n ", r"a.txt: 0 different documents"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "a"}', r"1 different documents, but training and validation need one"),
        ("a.csv", b"a", r"a.csv must end in .txt"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        TextCorpus.load(tmp_path / name)


def test_bad_paths(tmp_path):
    with pytest.raises(DataError, match=r"nowhere.txt does not exist: give a .txt or .jsonl"):
        TextCorpus.load(tmp_path / "nowhere.txt")
    with pytest.raises(DataError, match=r"holds no .txt or .jsonl files"):
        TextCorpus.load(tmp_path)


# --- training batches


def test_an_epoch_is_every_document_once(corpus):
    short = [document(index) for index in range(60)]
    length = 2 + max(map(len, short))
    expected = sorted(f"<bos>{text}<eos>" for text in corpus.train)
    epochs = []
    for seed in (0, 1):
        # A window of one epoch's pieces makes the boundary of the epoch visible.
        documents = grain.MapDataset.source(corpus.train).shuffle(seed).repeat()
        pieces = text_module._pieces(documents, TOKENIZER, length)
        texts = [TOKENIZER.decode(piece["tokens"]) for piece in itertools.islice(pieces, 2 * len(expected))]
        epochs += [texts[: len(expected)], texts[len(expected) :]]
    assert all(sorted(epoch) == expected for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_batches(corpus):
    batches = list(itertools.islice(TrainBatches(corpus, TOKENIZER, 4, 32, seed=0), 40))
    for batch in batches:
        assert set(batch) == {"tokens_BS", "segment_ids_BS", "positions_BS"}
        assert all(array.shape == (4, 32) and array.dtype == np.int32 for array in batch.values())
    texts = segment_texts(batches)
    legal = {
        TOKENIZER.decode(ids[start : start + 32])
        for text in corpus.train
        for ids in [[TOKENIZER.bos_id, *TOKENIZER.encode(text), TOKENIZER.eos_id]]
        for start in range(0, len(ids), 32)
    }
    assert set(texts) <= legal
    assert np.mean([batch["segment_ids_BS"] > 0 for batch in batches]) > 0.85

    def tokens(seed):
        return next(TrainBatches(corpus, TOKENIZER, 4, 32, seed=seed))["tokens_BS"]

    np.testing.assert_array_equal(tokens(0), batches[0]["tokens_BS"])
    assert (tokens(1) != tokens(0)).any()


def test_batches_mix_long_documents(tmp_path, monkeypatch):
    for index in range(9):
        (tmp_path / f"{index}.jsonl").write_text(json.dumps({"text": f"{index}" * 4000}))
    corpus = TextCorpus.load(tmp_path)
    monkeypatch.setattr(text_module, "_WINDOW_PIECES", 500)
    batch = next(TrainBatches(corpus, TOKENIZER, 16, 64, seed=0))
    assert len({row[1] for row in batch["tokens_BS"].tolist()}) >= 4


def test_resuming_gives_the_same_batches(corpus):
    straight = TrainBatches(corpus, TOKENIZER, 2, 128, seed=5)
    for _ in range(24):
        resumed = TrainBatches(corpus, TOKENIZER, 2, 128, seed=5)
        resumed.set_state(json.loads(json.dumps(straight.get_state())))
        expected, found = next(straight), next(resumed)
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name])


def test_state_survives_json_and_refuses_other_data(corpus):
    iterator = TrainBatches(corpus, TOKENIZER, 4, 32, seed=0)
    for _ in range(5):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = next(iterator)
    again = TrainBatches(corpus, TOKENIZER, 4, 32, seed=0)
    again.set_state(state)
    np.testing.assert_array_equal(next(again)["tokens_BS"], expected["tokens_BS"])
    for other in (
        TrainBatches(corpus, TOKENIZER, 4, 32, seed=1),
        TrainBatches(corpus, TOKENIZER, 4, 64, seed=0),
        TrainBatches(corpus, TOKENIZER, 8, 32, seed=0),
        TrainBatches(TextCorpus("", corpus.train[1:], corpus.validation, "other"), TOKENIZER, 4, 32, seed=0),
    ):
        with pytest.raises(DataError, match="the saved place in the data belongs to"):
            other.set_state(state)


def test_rows_do_not_depend_on_who_makes_them(corpus):
    whole = TrainBatches(corpus, TOKENIZER, 4, 64, seed=0)
    shares = [TrainBatches(corpus, TOKENIZER, 4, 64, seed=0, rows=rows) for rows in ([0, 1], [2], [3])]
    for _ in range(12):
        batch, parts = next(whole), [next(share) for share in shares]
        for name, array in batch.items():
            np.testing.assert_array_equal(array, np.concatenate([part[name] for part in parts]))
    states = [share.get_state() for share in shares]
    assert _merged(states) == whole.get_state()  # so that any number of processes can go on
    assert len({row.tobytes() for row in batch["tokens_BS"]}) == 4
    tiny = TextCorpus("tiny", ("one",), ("two",), "")
    assert segment_texts([next(TrainBatches(tiny, TOKENIZER, 4, 32, seed=0))]).count("<bos>one<eos>") >= 4


# --- validation batches


def test_every_validation_token_once(corpus):
    batches = list(validation_batches(corpus, TOKENIZER, 3, 16))
    assert all(batch["tokens_BS"].shape == (3, 16) for batch in batches)
    pieces = []
    for text in corpus.validation:
        ids = [TOKENIZER.bos_id, *TOKENIZER.encode(text), TOKENIZER.eos_id]
        pieces += [TOKENIZER.decode(ids[start : start + 16]) for start in range(0, len(ids), 16)]
    assert sorted(segment_texts(batches)) == sorted(pieces)
    bytes_seen = sum(int(TOKENIZER.token_bytes_V[b["tokens_BS"]][b["segment_ids_BS"] > 0].sum()) for b in batches)
    assert bytes_seen == sum(len(text.encode()) for text in corpus.validation)


def test_some_validation_batches_are_spread_over_all(corpus):
    batches = list(validation_batches(corpus, TOKENIZER, 3, 16))
    few = spread_validation_batches(corpus, TOKENIZER, 3, 16, 3)
    for batch, place in zip(few, (0, round((len(batches) - 1) / 2), -1), strict=True):
        np.testing.assert_array_equal(batch["tokens_BS"], batches[place]["tokens_BS"])
    assert len(spread_validation_batches(corpus, TOKENIZER, 3, 16, 0)) == len(batches)


def test_validation_rows_do_not_depend_on_who_makes_them(corpus):
    alone = list(validation_batches(corpus, TOKENIZER, 4, 16))
    shares = [list(validation_batches(corpus, TOKENIZER, 4, 16, rows=rows)) for rows in ([0, 1], [2, 3])]
    assert len(alone) == len(shares[0]) == len(shares[1])
    for whole, *parts in zip(alone, *shares, strict=True):
        for key, array in whole.items():
            np.testing.assert_array_equal(array, np.concatenate([part[key] for part in parts]))
