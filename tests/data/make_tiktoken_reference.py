"""Writes a small `tiktoken.model` in `tiktoken/`, and the ids that the tiktoken library gives with it.

Command: `pip install tiktoken==0.14.0 tokenizers && PYTHONPATH=. python tests/data/make_tiktoken_reference.py`
"""

import base64
import json
import pathlib

import tiktoken
import tiktoken.load
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from moe_jax.data.byte_level import byte_characters
from moe_jax.data.tiktoken_files import PATTERNS

FOLDER = pathlib.Path(__file__).with_name("tiktoken")
CLASS = "tokenization_moonshot.TikTokenTokenizer"
CORPUS = [
    "The router chooses experts; it doesn't choose THEM evenly. We'll see: they've 12345 tokens.\r\n\r\n",
    "路由器选择专家,专家处理词元。Größe und Übermaß, naïve café, aaaaaaaa bbbbbbb abababab",
    "def f(x):\n    return x ** 2  # squared\n\n\n        if x:\t\tpass   \n",
]
TEXTS = [
    *CORPUS,
    "",
    " ",
    "a",
    "  leading and trailing  ",
    "aaaaa aaaaaaaaaaaaaaa aab baa abaabaaab",
    "ABCdef ABC'LL i'M WE'RE 'tis don'ts",
    "1 12 123 1234 1234567 ١٢٣ ²³",
    "专家and词元mixed路由器123个 日本語テキスト 한국어",
    "🙂🙃 e\u0301 \u200b zero\u00a0width\u3000space ſ 'ſ",
    "[BOS]system<|im_middle|>hi<|im_end|> [EOT <|im_end| >[EOS][EOS]",
    "tabs\t\t\tand\r\nlines\n\n \n  \n   x",
    "<|reserved_token_603|>?!...///\\\\",
]
SPECIAL = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_middle|>", 6: "[UNK]", 7: "[PAD]"}
TEMPLATE = "{% for m in messages %}[BOS]{{ m.role }}<|im_middle|>{{ m.content }}<|im_end|>{% endfor %}"


def main() -> None:
    trained = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.Split(tokenizers.Regex(PATTERNS[CLASS]), "isolated")
    trained.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(CORPUS * 2, trainers.BpeTrainer(vocab_size=360, initial_alphabet=alphabet))
    byte_of = byte_characters()
    vocabulary = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    tokens = [bytes(byte_of[character] for character in token) for token, _ in vocabulary]
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    (FOLDER / "tiktoken.model").write_bytes(b"".join(lines))
    special = {len(tokens) + place: text for place, text in SPECIAL.items()}
    config = {
        "added_tokens_decoder": {str(index): {"content": text, "special": True} for index, text in special.items()},
        "auto_map": {"AutoTokenizer": [CLASS, None]},
        "bos_token": "[BOS]",
        "chat_template": TEMPLATE,
        "eos_token": "[EOS]",
        "pad_token": "[PAD]",
        "tokenizer_class": "TikTokenTokenizer",
        "unk_token": "[UNK]",
    }
    (FOLDER / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")

    ranks = tiktoken.load.load_tiktoken_bpe(str(FOLDER / "tiktoken.model"))
    ids = range(len(ranks), max(special) + 1)
    names = {special.get(index, f"<|reserved_token_{index}|>"): index for index in ids}
    encoding = tiktoken.Encoding("small", pat_str=PATTERNS[CLASS], mergeable_ranks=ranks, special_tokens=names)
    texts = [*TEXTS, f"x<|reserved_token_{len(ranks) + 4}|>y"]
    reference = [{"text": text, "ids": encoding.encode(text, allowed_special="all")} for text in texts]
    (FOLDER / "reference.json").write_text(json.dumps(reference, indent=1) + "\n")


if __name__ == "__main__":
    main()
