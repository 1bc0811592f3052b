"""tiktoken.model files are read as the tiktoken library reads them; `tiktoken/` holds what it gives."""

import base64
import itertools
import json
import pathlib
import re
import shutil

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.data import DataError
from moe_jax.data.tiktoken_files import read_tiktoken
from moe_jax.data.tokenizer import HFTokenizer, load_tokenizer

FOLDER = pathlib.Path(__file__).with_name("tiktoken")
REFERENCE = json.loads((FOLDER / "reference.json").read_text())


@pytest.mark.parametrize("entry", REFERENCE, ids=lambda entry: repr(entry["text"][:12]))
def test_the_ids_are_those_of_tiktoken(entry):
    tokenizer = load_tokenizer(FOLDER)
    assert tokenizer.encode(entry["text"]) == entry["ids"]
    assert tokenizer.decode(entry["ids"]) == entry["text"]


def test_special_tokens_and_template():
    tokenizer = load_tokenizer(FOLDER)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert text == "[BOS]user<|im_middle|>hi<|im_end|>"
    first = tokenizer.vocab_size - 8
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (first, first + 1, first + 7)
    assert tokenizer.is_special_V.sum() == 8
    assert b"".join(tokenizer.token_strings_V[i] for i in tokenizer.encode("专家 é")) == "专家 é".encode()


def test_as_a_tokenizer_json(tmp_path):
    """What `to_json` writes is the same tokenizer, without the code's file."""
    (tmp_path / "tokenizer.json").write_text(load_tokenizer(FOLDER).to_json())
    tokenizer = load_tokenizer(tmp_path)
    assert all(tokenizer.encode(entry["text"]) == entry["ids"] for entry in REFERENCE)


def plain_bpe(ranks, word):
    """As tiktoken defines it: a whole word that is a token, else always the neighbours of lowest rank, leftmost."""
    if word in ranks:
        return [ranks[word]]
    parts = [bytes([byte]) for byte in word]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        i = min(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def write(folder, tokens, config=None):
    folder.mkdir(exist_ok=True)
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]
    (folder / "tiktoken.model").write_bytes(b"\n".join(lines) + b"\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"pat_str": r"[^ ]+|\s+"} if config is None else config))
    return folder


BYTES = [bytes([byte]) for byte in range(256)]


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.lists(st.text("abc", min_size=2, max_size=6), unique=True, max_size=25),
    words=st.lists(st.text("abc", min_size=1, max_size=24), min_size=1, max_size=8),
)
def test_any_ranks_merge_as_defined(tmp_path_factory, tokens, words):
    """Also ranks that no training gives: tokens without parts, and ties between different splits of one token."""
    tokens = BYTES + [token.encode() for token in tokens]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    tokenizer = read_tiktoken(write(tmp_path_factory.mktemp("tiktoken"), tokens))
    for word in words:
        assert tokenizer.encode(word).ids == plain_bpe(ranks, word.encode()), word


def test_a_tie_between_two_splits_of_one_token(tmp_path):
    tokens = [*BYTES, b"aa", b"aaa", b"ba"]
    tokenizer = read_tiktoken(write(tmp_path, tokens))
    ranks = {token: rank for rank, token in enumerate(tokens)}
    for n in range(1, 12):
        assert tokenizer.encode("a" * n).ids == plain_bpe(ranks, b"a" * n)


@pytest.mark.parametrize(
    ("tokens", "config", "message"),
    [
        (BYTES, {}, r'this tokenizer cuts .*Put the pattern there as "pat_str"'),
        (BYTES, {"auto_map": {"AutoTokenizer": ["tokenization_x.Y", None]}}, "how tokenization_x.Y cuts"),
        (BYTES, {"pat_str": "("}, "pat_str is not a regular expression"),
        (BYTES, {"added_tokens_decoder": {"300": "x"}}, "tokenizer_config.json: must be a JSON object with"),
        (BYTES, {"pat_str": ".", "added_tokens_decoder": {"7": {"content": "<x>"}}}, "'<x>' has the id 7"),
        (BYTES[:-1], None, "tiktoken.model: byte 255 has no token"),
        ([*BYTES, b"a"], None, "tiktoken.model: the ranks are not 0, 1, 2"),
    ],
)
def test_what_cannot_be_read_is_named(tokens, config, message, tmp_path):
    with pytest.raises(DataError, match=message):
        HFTokenizer(write(tmp_path, tokens, config))


def test_damaged_files_are_named(tmp_path):
    write(tmp_path, BYTES)
    (tmp_path / "tiktoken.model").write_bytes(b"AA== 0\nnot base64 1\n")
    with pytest.raises(DataError, match=r"tiktoken.model: must hold a token in base64"):
        HFTokenizer(tmp_path)
    write(tmp_path, BYTES)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match=re.escape("tokenizer_config.json: must be a JSON object")):
        HFTokenizer(tmp_path)


@pytest.mark.filterwarnings("ignore:.*has no token to pad with")
def test_a_tokenizer_json_goes_before_it(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "both")
    tokenizers.Tokenizer(tokenizers.models.BPE({"x": 0}, [])).save(str(tmp_path / "both" / "tokenizer.json"))
    config = json.loads((FOLDER / "tokenizer_config.json").read_text())
    config = {"chat_template": config["chat_template"]}
    (tmp_path / "both" / "tokenizer_config.json").write_text(json.dumps(config))
    assert HFTokenizer(tmp_path / "both").vocab_size == 1
