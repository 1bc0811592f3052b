"""Text to token ids and back: bytes, or any Hugging Face tokenizer.json.

Legend: V vocabulary.
"""

from __future__ import annotations

import codecs
import datetime
import json
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy as np
import tokenizers

from moe_jax.config import ConfigError
from moe_jax.data import DataError
from moe_jax.data.byte_level import byte_characters
from moe_jax.data.tiktoken_files import TIKTOKEN_FILE, read_tiktoken


class Tokenizer(ABC):
    """What the laboratory asks of a tokenizer.

    Special tokens that stand written out in a text are encoded as one token each, and none is added that is not
    written: who wants a beginning-of-sequence token puts it there.
    """

    pad_id: int
    """Fills rows. It differs from every stop token, and the sampler never emits it."""
    bos_id: int | None
    """Begins a document; None where the tokenizer has no such token."""
    eos_id: int | None
    """Ends a document; None where the tokenizer has no such token."""
    stop_ids: tuple[int, ...]
    """Tokens at which generation ends: `eos_id` and what else the tokenizer's folder names."""
    has_chat_template = False
    """Whether models are known to have been trained on conversations as `apply_chat_template` writes them."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """V: one more than the largest token id. A model's vocabulary may be larger, not smaller."""

    def check_fits(self, vocab_size: int) -> None:
        """Refuses a model whose vocabulary is too small for this tokenizer.

        Raises:
          ConfigError: it is.
        """
        if self.vocab_size > vocab_size:
            raise ConfigError(
                f"ModelConfig.vocab_size = {vocab_size}: the tokenizer has {self.vocab_size} tokens; set"
                f" --model.vocab-size {self.vocab_size} or more"
            )

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""

    @abstractmethod
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids: U+FFFD for bytes that are no UTF-8, nothing for ids outside the vocabulary."""

    @abstractmethod
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """A conversation as the text that the model was (or will be) trained on.

        Args:
          messages: `{"role": …, "content": …}` each.
          add_generation_prompt: end with what opens the assistant's turn.
          tools: JSON schemas of functions, for templates that show them.
        """

    @property
    @abstractmethod
    def token_strings_V(self) -> list[bytes]:
        """The bytes that each token puts into the text, special tokens included (their names)."""

    @property
    @abstractmethod
    def is_special_V(self) -> np.ndarray:
        """bool [V]: which tokens are special."""

    @cached_property
    def token_bytes_V(self) -> np.ndarray:
        """int32 [V]: how many bytes of UTF-8 text each token stands for, 0 for special tokens and unused ids.

        Sums of losses in nats over sums of these bytes, divided by ln 2, are bits per byte: comparable whatever the
        tokenizer. (Exact unless the tokenizer rewrites text, by Unicode normalisation for instance.)
        """
        sizes_V = np.array([len(string) for string in self.token_strings_V], np.int32)
        return np.where(self.is_special_V, 0, sizes_V).astype(np.int32)


class ByteTokenizer(Tokenizer):
    """The bytes of UTF-8, after a few special tokens: 265 ids, no file needed."""

    special_tokens = (
        "<pad>",
        "<bos>",
        "<eos>",
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "<|user|>",
        "<|assistant|>",
    )

    def __init__(self) -> None:
        self.pad_id, self.bos_id, self.eos_id = 0, 1, 2
        self.stop_ids = (2,)
        self._ids = {token: index for index, token in enumerate(self.special_tokens)}
        self._pattern = re.compile("(" + "|".join(map(re.escape, self.special_tokens)) + ")")

    @property
    def vocab_size(self) -> int:
        return len(self.special_tokens) + 256

    def encode(self, text: str) -> list[int]:
        first_byte = len(self.special_tokens)
        ids: list[int] = []
        for part in self._pattern.split(text):
            if part in self._ids:
                ids.append(self._ids[part])
            else:
                ids.extend([first_byte + byte for byte in part.encode("utf-8")])
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        strings = (
            self.token_strings_V[index]
            for index in map(int, ids)
            if 0 <= index < self.vocab_size and not (skip_special_tokens and index < len(self.special_tokens))
        )
        return b"".join(strings).decode("utf-8", errors="replace")

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """`<bos>system text<|user|>question<|assistant|>answer<eos>`, and so on.

        Raises:
          ValueError: a role other than system (first), user or assistant; or tools, for which bytes have no format.
        """
        if tools:
            raise ValueError("the byte tokenizer's chat format has no tools: leave them out, or load a tokenizer.json")
        text = "<bos>"
        for index, message in enumerate(messages):
            role, content = message["role"], message["content"]
            if role == "system" and index == 0:
                text += content
            elif role == "user":
                text += f"<|user|>{content}"
            elif role == "assistant":
                text += f"<|assistant|>{content}<eos>"
            else:
                raise ValueError(f"message {index} has role {role!r}: use user, assistant, or system for the first one")
        return text + ("<|assistant|>" if add_generation_prompt else "")

    @cached_property
    def token_strings_V(self) -> list[bytes]:
        return [token.encode() for token in self.special_tokens] + [bytes([byte]) for byte in range(256)]

    @cached_property
    def is_special_V(self) -> np.ndarray:
        return np.arange(self.vocab_size) < len(self.special_tokens)


class HFTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`, or else a `tiktoken.model`, with what stands beside it in its folder.

    - `tokenizer_config.json`: bos_token (none begins a document if add_bos_token is false), eos_token, pad_token,
      chat_template;
    - `chat_template.jinja`: goes before the template in the configuration;
    - `generation_config.json`: eos_token_id, further tokens at which generation stops.

    The padding token is the one configured if it is not a stop token; else the first special token that has "pad" in
    its name; else the unknown token; else the last special token that neither the chat template writes nor begins or
    stops a text; else the beginning-of-sequence token. Where no such token exists it is the last ordinary token, with
    a warning, for that token can then never be generated.

    Args:
      path: a tokenizer.json or tiktoken.model, or the folder that holds it.

    Raises:
      DataError: a missing or malformed file, a configured token that is not in the vocabulary.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.file = (tokenizer_file(path) or path / "tokenizer.json") if path.is_dir() else path
        if not self.file.is_file():
            raise DataError(f"{self.file} does not exist: name a tokenizer.json, or the folder that holds one")
        if self.file.name == TIKTOKEN_FILE:
            self._tokenizer = read_tiktoken(self.file.parent)
        else:
            try:
                self._tokenizer = tokenizers.Tokenizer.from_file(str(self.file))
            except Exception as error:  # the library raises plain Exception
                raise DataError(f"{self.file} is not a tokenizer of the `tokenizers` library: {error}") from error
        # Training pipelines store these two in the file, and they would cut or pad every text.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._added = self._tokenizer.get_added_tokens_decoder()

        config_file = self.file.parent / "tokenizer_config.json"
        config = _read_json(config_file)
        self._named = {
            name: _token_text(config[name], config_file, name)
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
            if config.get(name) is not None
        }
        ids = {name: self._tokenizer.token_to_id(text) for name, text in self._named.items()}
        for name in ("bos_token", "eos_token", "pad_token"):
            if name in ids and ids[name] is None:
                raise DataError(
                    f"{config_file}: {name} = {self._named[name]!r} is not in the vocabulary of {self.file}: "
                    "take both files from the same model, or correct the name"
                )
        begins = config.get("add_bos_token", True)
        self.bos_id, self.eos_id = ids.get("bos_token") if begins else None, ids.get("eos_token")
        generation_eos = _read_json(self.file.parent / "generation_config.json").get("eos_token_id")
        further = generation_eos if isinstance(generation_eos, list) else [generation_eos]
        if not all(index is None or type(index) is int for index in further):
            raise DataError(
                f"{self.file.parent / 'generation_config.json'}: eos_token_id = {generation_eos!r} must be a token's"
                " number, or a list of them"
            )
        stops = [self.eos_id, *further]
        self.stop_ids = tuple(dict.fromkeys(index for index in stops if index is not None))
        self._templates = self._read_templates(config, config_file)
        self.has_chat_template = "default" in self._templates
        self.pad_id = self._choose_pad_id(ids)

    def _choose_pad_id(self, ids: Mapping[str, int | None]) -> int:
        bos = ids.get("bos_token")
        special = [index for index, token in sorted(self._added.items()) if token.special]
        templates = "".join(self._templates.values())
        candidates = [
            ids.get("pad_token"),
            *(index for index in special if "pad" in self._added[index].content.lower()),
            ids.get("unk_token"),
            *(i for i in reversed(special) if i != bos and self._added[i].content not in templates),
            bos,
        ]
        for index in candidates:
            if index is not None and index not in self.stop_ids:
                return index
        index = max(index for index in range(self.vocab_size) if index not in self.stop_ids)
        warnings.warn(
            f"{self.file} has no token to pad with: id {index} ({self._tokenizer.id_to_token(index)!r}) serves, and "
            "will never be generated. Add a pad_token to the tokenizer to avoid this.",
            stacklevel=3,
        )
        return index

    def _read_templates(self, config: Mapping[str, Any], config_file: Path) -> dict[str, str]:
        file = self.file.parent / "chat_template.jinja"
        if file.is_file():
            return {"default": file.read_text(encoding="utf-8")}
        template = config.get("chat_template")
        if template is None:
            return {}
        if isinstance(template, str):
            return {"default": template}
        try:
            return {entry["name"]: entry["template"] for entry in template}
        except (TypeError, KeyError) as error:
            raise DataError(
                f"{config_file}: chat_template must be a string or a list of {{name, template}}, not {template!r}"
            ) from error

    def to_json(self) -> str:
        """The content of a tokenizer.json."""
        return self._tokenizer.to_str(pretty=True)

    @cached_property
    def vocab_size(self) -> int:
        # Not the number of tokens: ids may have gaps.
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return self._tokenizer.decode([int(index) for index in ids], skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Renders the folder's Jinja template in a sandbox, as `transformers` does.

        Of several named templates it takes "tool_use" when there are tools, else "default".

        Raises:
          DataError: there is no template, or it does not compile, or it refuses the messages.
        """
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise DataError(
                f"{self.file.parent} has no chat template: add a chat_template.jinja there, or give the model "
                f"plain text (templates found: {', '.join(self._templates) or 'none'})"
            )
        # A template is untrusted code: it sees plain JSON types only, and a copy.
        variables = json.loads(json.dumps({"messages": list(messages), "tools": list(tools) if tools else None}))
        try:
            template = _jinja_environment().from_string(self._templates[name])
            return template.render(
                **variables, documents=None, add_generation_prompt=add_generation_prompt, **self._named
            )
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template {name!r} of {self.file.parent} failed: {error}") from error

    @cached_property
    def token_strings_V(self) -> list[bytes]:
        strings = [b""] * self.vocab_size
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        decoder = json.loads(self._tokenizer.to_str())["decoder"]
        kinds = {part["type"] for part in [decoder, *(decoder or {}).get("decoders", [])] if part}
        # A decoder may strip the space before a text's first word, so a word is decoded behind another one.
        anchor = next((i for token, i in vocabulary.items() if i not in self._added and token.isalnum()), None)
        prefix = [] if anchor is None else [anchor]
        prefix_length = len(self._tokenizer.decode(prefix))
        for token, index in vocabulary.items():
            if index in self._added:
                strings[index] = self._added[index].content.encode()
            elif "ByteLevel" in kinds:
                known = all(character in _BYTE_OF_CHARACTER for character in token)
                strings[index] = bytes(map(_BYTE_OF_CHARACTER.__getitem__, token)) if known else token.encode()
            elif "ByteFallback" in kinds and re.fullmatch("<0x[0-9A-F]{2}>", token):
                strings[index] = bytes([int(token[3:5], 16)])
            else:
                strings[index] = self._tokenizer.decode([*prefix, index])[prefix_length:].encode()
        return strings

    @cached_property
    def is_special_V(self) -> np.ndarray:
        special_V = np.zeros(self.vocab_size, bool)
        special_V[[index for index, token in self._added.items() if token.special]] = True
        return special_V


def tokenizer_file(folder: Path) -> Path | None:
    """What `HFTokenizer` reads from a folder, None if there is no such file."""
    return next((folder / name for name in ("tokenizer.json", TIKTOKEN_FILE) if (folder / name).is_file()), None)


class DecodeStream:
    """Text while it is generated: gives out characters as soon as their last byte is there.

    What it gives out, `finish()` included, is together what `decode` makes of the text behind a prompt: other than at
    the start of a text, the space before a first word is kept.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, ids: Iterable[int]) -> str:
        """The characters that these ids complete, "" if none."""
        strings = self._tokenizer.token_strings_V
        skip_V = self._tokenizer.is_special_V & self._skip_special_tokens
        return self._decoder.decode(b"".join(strings[i] for i in ids if i < len(strings) and not skip_V[i]))

    def finish(self) -> str:
        """U+FFFD for a character that was left incomplete, else ""; the stream can then be used anew."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


def load_tokenizer(name: str | Path) -> Tokenizer:
    """The tokenizer that a configuration names.

    Args:
      name: "byte", or the path of a tokenizer.json or of a folder with one.

    Raises:
      DataError: no such path. Nothing is downloaded.
    """
    if str(name) == "byte":
        return ByteTokenizer()
    if not Path(name).exists():
        raise DataError(
            f'tokenizer {str(name)!r} is neither "byte" nor a path that exists. Tokenizers are not downloaded here: '
            f"get one with `hf download {name if _looks_like_repository(str(name)) else 'OWNER/MODEL'} "
            "tokenizer.json tokenizer_config.json --local-dir DIR` and give DIR"
        )
    return HFTokenizer(name)


def _looks_like_repository(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None and not name.endswith(".json")


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if the file does not exist."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{file} must hold a JSON object, not {type(value).__name__}")
    return value


def _token_text(value: Any, file: Path, name: str) -> str:
    """A token in a configuration is its text, or an object with its text under "content"."""
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise DataError(f"{file}: {name} = {value!r} must be a string or an object with a string 'content'")
    return text


def _jinja_environment() -> jinja2.Environment:
    """The sandbox in which `transformers` renders chat templates: the same functions, filters and white space."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(format: str) -> str:
        return datetime.datetime.now().strftime(format)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        # Jinja's own filter escapes HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's words for training masks; the text is its body."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's interface)

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


_BYTE_OF_CHARACTER = byte_characters()
