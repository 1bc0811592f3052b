"""The byte-level tokenizer as a tokenizer.json, with the same ids for all bytes and special tokens."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from moe_jax.data.tokenizer import ByteTokenizer, byte_characters


def write_byte_tokenizer(folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json.

    A vocabulary of single bytes without merges, each under the printable character that GPT-2 writes it as, behind the
    special tokens. Without a chat template: models that were trained on bytes here complete texts.
    """
    ours = ByteTokenizer()
    first_byte = len(ours.special_tokens)
    vocabulary = {token: index for index, token in enumerate(ours.special_tokens)}
    vocabulary |= {character: first_byte + byte for character, byte in byte_characters().items()}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ours.special_tokens])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos")}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **named, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
