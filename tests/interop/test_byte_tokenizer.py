"""The exported byte-level tokenizer is the one that the model was trained with."""

import numpy as np

from moe_jax.data.tokenizer import ByteTokenizer, HFTokenizer
from moe_jax.interop.byte_tokenizer import write_byte_tokenizer


def test_ids_texts_and_special_tokens_are_the_same(tmp_path):
    write_byte_tokenizer(tmp_path)
    ours, exported = ByteTokenizer(), HFTokenizer(tmp_path)
    assert exported.vocab_size == ours.vocab_size
    assert exported.token_strings_V == ours.token_strings_V
    assert np.array_equal(exported.is_special_V, ours.is_special_V)
    for name in ("pad_id", "bos_id", "eos_id", "stop_ids"):
        assert getattr(exported, name) == getattr(ours, name)
    every_byte = "".join(map(chr, range(0x250))) + "€ 日本 🙂\ud7ff"
    for text in ("", " ", "  a\n\n b ", "<think>7+1=8</think><answer>8</answer><eos>", "<think >", every_byte):
        ids = ours.encode(text)
        assert exported.encode(text) == ids
        assert exported.decode(ids) == ours.decode(ids) == text
        assert exported.decode(ids, skip_special_tokens=True) == ours.decode(ids, skip_special_tokens=True)
    assert not exported.has_chat_template
