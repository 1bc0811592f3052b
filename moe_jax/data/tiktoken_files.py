"""Tokenizers that come as a `tiktoken.model` and Python code, read without running that code.

Such a file holds each token's bytes (in base64) and its id, a line each, in the order in which training merged them;
Moonlight and Kimi-K2 have one. What the code adds is a pattern that cuts a text into words, and the special tokens,
which stand in tokenizer_config.json too.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from moe_jax.data import DataError
from moe_jax.data.byte_level import byte_characters

TIKTOKEN_FILE = "tiktoken.model"

_CAPITALS, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_MOONSHOT = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}*{_SMALL}+{_CONTRACTIONS}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}+{_SMALL}*{_CONTRACTIONS}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
PATTERNS = {
    "tokenization_moonshot.TikTokenTokenizer": _MOONSHOT,
    "tokenization_kimi.TikTokenTokenizer": _MOONSHOT,
}
"""The pattern of each class of code, by the name that tokenizer_config.json's auto_map gives."""


def read_tiktoken(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a folder with tiktoken.model and tokenizer_config.json.

    It gives the ids that the `tiktoken` library gives with all special tokens allowed. Ids between those that
    tokenizer_config.json names are `<|reserved_token_ID|>`, as in the models' code.

    Raises:
      DataError: a file is missing or malformed, or the pattern is not known.
    """
    config_file = folder / "tokenizer_config.json"
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        special = {int(index): token["content"] for index, token in config.get("added_tokens_decoder", {}).items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{config_file}: must be a JSON object with the special tokens of {TIKTOKEN_FILE}"
            f" (added_tokens_decoder), which lies beside it ({error!r}): download it again"
        ) from error
    ranks = _read_ranks(folder / TIKTOKEN_FILE)
    if special and min(special) < len(ranks):
        raise DataError(
            f"{config_file}: the special token {special[min(special)]!r} has the id {min(special)}, and"
            f" {TIKTOKEN_FILE} has {len(ranks)} tokens: take both files from the same model"
        )
    tokenizer = tokenizers.Tokenizer(_bpe(ranks))
    pattern = _pattern(config, config_file)
    try:
        words = pre_tokenizers.Split(Regex(pattern), "isolated")
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{config_file}: pat_str is not a regular expression: {error}") from error
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_of_words])
    tokenizer.decoder = decoders.ByteLevel()
    # Ids of added tokens are given in order from the first that is free, so gaps need a token of their own.
    ids = range(len(ranks), max(special, default=-1) + 1)
    names = [special.get(index, f"<|reserved_token_{index}|>") for index in ids]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    return tokenizer


def _pattern(config: Mapping[str, Any], config_file: Path) -> str:
    if isinstance(config.get("pat_str"), str):
        return config["pat_str"]
    code = config.get("auto_map", {}).get("AutoTokenizer", [None])
    name = code[0] if isinstance(code, list) else code
    name = str(name).rpartition("--")[2]  # of code in another repository: "org/name--module.Class"
    if name not in PATTERNS:
        raise DataError(
            f"{config_file}: how {name if code != [None] else 'this tokenizer'} cuts a text into words before"
            f" {TIKTOKEN_FILE} applies is not known (known: {', '.join(PATTERNS)}). Put the pattern there as"
            ' "pat_str", as the Python file of the repository calls it, or give a tokenizer.json'
        )
    return PATTERNS[name]


def _read_ranks(file: Path) -> dict[bytes, int]:
    try:
        lines = [line.split() for line in file.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file}: must hold a token in base64 and its rank on every line ({error}): download it again"
        ) from error
    absent = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if absent or sorted(ranks.values()) != list(range(len(lines))):
        reason = f"byte {absent[0]} has no token" if absent else "the ranks are not 0, 1, 2, ..., each once"
        raise DataError(f"{file}: {reason}: download it again")
    return ranks


def _bpe(ranks: Mapping[bytes, int]) -> models.BPE:
    """The merges that make the tokens: of each the two parts that it is made of when its bytes stand alone.

    tiktoken merges whichever neighbours together have the lowest rank. Whenever it merges two, no merge has crossed
    the ends of what they make, so inside all went as if those bytes stood alone, and the two are these parts. A token
    that is never made so is found as a whole word only (`ignore_merges`), as in tiktoken.
    """
    character = {byte: name for name, byte in byte_characters().items()}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            rank, place = min((ranks.get(a + b, len(ranks)), place) for place, (a, b) in enumerate(pairwise(parts)))
            if rank == len(ranks):
                break
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        if len(parts) == 2:
            merges.append(tuple("".join(map(character.__getitem__, part)) for part in parts))
    names = {"".join(map(character.__getitem__, token)): rank for token, rank in ranks.items()}
    return models.BPE(vocab=names, merges=merges, ignore_merges=True)
