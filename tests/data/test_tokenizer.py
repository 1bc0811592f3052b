import json
import re

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from moe_jax.data import DataError
from moe_jax.data.tokenizer import ByteTokenizer, DecodeStream, HFTokenizer, load_tokenizer

CORPUS = ["the cat sat on the mat, the end\n", "größer als 12 + 30 = 42 €", "a 🙂 and a cat"] * 20
TEXT = "the größe of a 🙂: 12 €\n\n  end "


def train_byte_level(folder, special=("<|end|>", "<|pad|>", "<|start|>"), **config):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.enable_truncation(3)  # as files of training pipelines have it
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def train_sentencepiece_like(folder):
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(["the cat sat on the mat"] * 20, trainer)
    parts = json.loads(tokenizer.to_str())
    vocabulary = parts["model"]["vocab"]
    for token in byte_tokens:
        vocabulary[token] = len(vocabulary)
    (folder / "tokenizer.json").write_text(json.dumps(parts))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    folder = train_byte_level(
        tmp_path_factory.mktemp("byte_level"),
        bos_token={"content": "<|start|>", "lstrip": False},
        eos_token="<|end|>",
        pad_token="<|pad|>",
    )
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def sentencepiece_like(tmp_path_factory):
    return load_tokenizer(train_sentencepiece_like(tmp_path_factory.mktemp("sentencepiece")))


# --- bytes


def test_byte_ids_are_fixed():
    tokenizer = ByteTokenizer()
    assert tokenizer.vocab_size == 265
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (0, 1, 2, (2,))
    text = "<pad><bos><eos><think></think><answer></answer><|user|><|assistant|>"
    assert tokenizer.encode(text) == list(range(9))
    assert tokenizer.encode("A<think>é") == [9 + 65, 3, 9 + 0xC3, 9 + 0xA9]
    assert tokenizer.encode("<thin k>") == [9 + byte for byte in b"<thin k>"]
    assert tokenizer.encode("") == []


@pytest.mark.parametrize("text", ["", TEXT, "\0\r\n\x7f", "<|user", "".join(map(chr, range(0xD800)))])
def test_byte_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert int(tokenizer.token_bytes_V[ids].sum()) == len(text.encode())


def test_byte_decode():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("<think>1+1</think><eos>")
    assert tokenizer.decode(ids) == "<think>1+1</think><eos>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "1+1"
    assert tokenizer.decode(np.array([9 + 0xE2, 9 + 65])) == "\ufffdA"
    assert tokenizer.decode([9 + 65, 271]) == "A"  # a model's vocabulary may be padded
    assert tokenizer.token_bytes_V.tolist() == [0] * 9 + [1] * 256
    assert tokenizer.token_bytes_V.dtype == np.int32


def test_byte_chat():
    tokenizer = ByteTokenizer()
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
    ]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=False) == "<bos>S<|user|>Q<|assistant|>A<eos>"
    assert tokenizer.apply_chat_template(messages[1:2]) == "<bos><|user|>Q<|assistant|>"
    with pytest.raises(ValueError, match="message 0 has role 'tool'"):
        tokenizer.apply_chat_template([{"role": "tool", "content": ""}])
    with pytest.raises(ValueError, match="no tools"):
        tokenizer.apply_chat_template(messages, tools=[{"name": "f"}])


# --- tokenizer.json


def test_byte_level_round_trip(byte_level):
    assert byte_level.decode(byte_level.encode(TEXT)) == TEXT
    ids = byte_level.encode(TEXT + "<|end|>")
    assert ids[-1] == byte_level.eos_id and len(ids) < len(TEXT.encode())
    assert byte_level.decode(ids, skip_special_tokens=True) == TEXT
    assert byte_level.vocab_size == 300
    assert (byte_level.eos_id, byte_level.pad_id, byte_level.bos_id) == (0, 1, 2)
    assert byte_level.stop_ids == (0,)


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece_like"])
def test_token_bytes_add_up_to_the_text(name, request):
    tokenizer = request.getfixturevalue(name)
    for text in (TEXT, "the cat\tsat"):
        size = int(tokenizer.token_bytes_V[tokenizer.encode(text)].sum())
        # The SentencePiece convention puts a space before the first word.
        assert size == len(text.encode()) + (name == "sentencepiece_like")
    assert tokenizer.token_bytes_V.shape == (tokenizer.vocab_size,) and tokenizer.token_bytes_V[tokenizer.eos_id] == 0


def test_sentencepiece_like(sentencepiece_like):
    assert sentencepiece_like.decode(sentencepiece_like.encode(TEXT)) == TEXT
    assert sentencepiece_like.pad_id == 0  # the unknown token, for lack of a padding token


@pytest.mark.parametrize(
    ("special", "config", "expected"),
    [
        (["<e>", "<my_PAD>"], {"eos_token": "<e>", "pad_token": "<e>"}, "<my_PAD>"),  # never the stop token
        (["<e>", "<b>", "<r0>", "<r1>"], {"eos_token": "<e>", "bos_token": "<b>"}, "<r1>"),
        (
            ["<e>", "<b>", "<r0>", "<r1>"],
            {"eos_token": "<e>", "bos_token": "<b>", "chat_template": "<r1>{{ messages }}"},
            "<r0>",
        ),
        (["<e>", "<b>"], {"eos_token": "<e>", "bos_token": "<b>"}, "<b>"),
    ],
)
def test_choice_of_padding(tmp_path, special, config, expected):
    tokenizer = HFTokenizer(train_byte_level(tmp_path, special, **config))
    assert tokenizer.decode([tokenizer.pad_id]) == expected


def test_last_resort_for_padding_is_said(tmp_path):
    train_byte_level(tmp_path, ["<e>"], eos_token="<e>", bos_token="<e>")
    with pytest.warns(UserWarning, match="no token to pad with: id 297"):
        assert HFTokenizer(tmp_path).pad_id == 297


def test_a_lone_tokenizer_json(tmp_path):
    tokenizer = HFTokenizer(train_byte_level(tmp_path) / "tokenizer.json")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (None, None, ())
    assert tokenizer.pad_id == 1


def test_generation_config_adds_stop_tokens(tmp_path):
    train_byte_level(tmp_path, eos_token="<|end|>")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    assert HFTokenizer(tmp_path).stop_ids == (0, 2)


# --- streaming


@pytest.mark.parametrize("name", ["byte", "byte_level"])
def test_stream_equals_decode_on_any_ids(name, request):
    tokenizer = ByteTokenizer() if name == "byte" else request.getfixturevalue(name)
    for seed in range(20):
        ids = np.random.default_rng(seed).integers(0, tokenizer.vocab_size + 5, 60).tolist()
        for skip in (False, True):
            stream = DecodeStream(tokenizer, skip_special_tokens=skip)
            text = "".join([stream.feed([index]) for index in ids] + [stream.finish()])
            assert text == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", ["byte", "byte_level", "sentencepiece_like"])
def test_stream_gives_whole_characters(name, request):
    tokenizer = ByteTokenizer() if name == "byte" else request.getfixturevalue(name)
    stream = DecodeStream(tokenizer)
    parts = [stream.feed([index]) for index in tokenizer.encode(TEXT)]
    assert "".join(parts).lstrip() == TEXT and not any("\ufffd" in part for part in parts)
    assert stream.finish() == ""


def test_stream_finishes_incomplete_characters():
    stream = DecodeStream(ByteTokenizer())
    assert stream.feed([9 + 0xF0, 9 + 0x9F]) == ""
    assert stream.finish() == "\ufffd"
    assert stream.feed([9 + 65]) == "A"


# --- chat templates

TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role not in ['user', 'assistant'] %}
        {{- raise_exception('unknown role ' + message.role) }}
    {%- endif %}
    {%- if message.role == 'assistant' %}
<a>{% generation %}{{ message.content }}{% endgeneration %}{{ eos_token }}
    {%- else %}
<u>{{ message.content | trim }}
    {%- endif %}
{%- endfor %}
{%- if tools %}{{ tools | tojson }}{% endif %}
{% if add_generation_prompt %}
<a>
{%- endif %}"""
USER = [{"role": "user", "content": " 1 < 2? "}]


def test_template_of_the_configuration(tmp_path):
    train_byte_level(tmp_path, bos_token="<|start|>", eos_token="<|end|>", chat_template=TEMPLATE)
    tokenizer = HFTokenizer(tmp_path)
    assert tokenizer.apply_chat_template(USER) == "<|start|><u>1 < 2?<a>"
    chat = [*USER, {"role": "assistant", "content": "yes"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=False, tools=[{"name": "é<"}])
    assert text == '<|start|><u>1 < 2?<a>yes<|end|>[{"name": "é<"}]'
    with pytest.raises(DataError, match="unknown role robot"):
        tokenizer.apply_chat_template([{"role": "robot", "content": ""}])


def test_named_templates_and_the_template_file(tmp_path):
    templates = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    train_byte_level(tmp_path, eos_token="<|end|>", chat_template=templates)
    tokenizer = HFTokenizer(tmp_path)
    assert tokenizer.apply_chat_template(USER) == "plain"
    assert tokenizer.apply_chat_template(USER, tools=[{"name": "f"}]) == "tools"
    (tmp_path / "chat_template.jinja").write_text("{{ strftime_now('%Y') }}")
    assert re.fullmatch(r"\d{4}", HFTokenizer(tmp_path).apply_chat_template(USER))


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ messages", "{{ raise_exception.__globals__.x }}"],
)
def test_templates_are_contained(tmp_path, template):
    train_byte_level(tmp_path, eos_token="<|end|>", chat_template=template)
    with pytest.raises(DataError, match="chat template 'default'"):
        HFTokenizer(tmp_path).apply_chat_template(USER)


def test_no_template(byte_level):
    with pytest.raises(DataError, match=r"has no chat template: add a chat_template.jinja"):
        byte_level.apply_chat_template(USER)


# --- bad input


def test_names_that_are_no_paths():
    assert isinstance(load_tokenizer("byte"), ByteTokenizer)
    with pytest.raises(DataError, match=r"hf download Qwen/Qwen2.5-0.5B "):
        load_tokenizer("Qwen/Qwen2.5-0.5B")
    with pytest.raises(DataError, match=r"no_such_file.json.*OWNER/MODEL"):
        load_tokenizer("folder/no_such_file.json")


def test_bad_files(tmp_path):
    with pytest.raises(DataError, match=r"tokenizer.json does not exist"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer.json is not a tokenizer"):
        load_tokenizer(tmp_path)
    train_byte_level(tmp_path, eos_token="<nowhere>")
    with pytest.raises(DataError, match=r"tokenizer_config.json: eos_token = '<nowhere>' is not in the vocabulary"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": 3}')
    with pytest.raises(DataError, match="eos_token = 3 must be a string"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config.json is not valid JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": [1]}')
    with pytest.raises(DataError, match="chat_template must be a string or a list"):
        load_tokenizer(tmp_path)


def test_no_beginning_where_the_model_was_trained_without_one(tmp_path):
    names = {"bos_token": "<|start|>", "eos_token": "<|end|>"}
    train_byte_level(tmp_path, **names, add_bos_token=True)
    with_one = HFTokenizer(tmp_path)
    train_byte_level(tmp_path, **names, add_bos_token=False)
    without = HFTokenizer(tmp_path)
    assert with_one.bos_id is not None and without.bos_id is None
    assert with_one.pad_id == without.pad_id
