"""`python -m moe_jax generate`: completions and conversations, shown while they are drawn."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from moe_jax.config import ConfigError, MeshConfig, SamplingConfig
from moe_jax.tools.model import ONE_DEVICE, ToolError, check_source, load_model, mendable

_FORGET = "/new"
_OF_DRAWS = {"temperature", "top_k", "top_p", "min_p"}
_NOT_APPLIED = (
    "repetition_penalty",
    "no_repeat_ngram_size",
    "penalty_alpha",
    "num_beams",
    "typical_p",
    "epsilon_cutoff",
)
"""Fields of a generation_config.json that would change what is drawn, and that the sampler does not have."""


def generate(
    run: Path | None = None,
    checkpoint: str | None = None,
    prompt: str | None = None,
    phase: str | None = None,
    system: str | None = None,
    raw: bool = False,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    speculative_tokens: int = 0,
    seed: int = 0,
    tokenizer: Path | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    mesh: MeshConfig = ONE_DEVICE,
) -> None:
    """Answers or completes a prompt with the model of a run or of a checkpoint, and shows the text while it is drawn.

    A checkpoint that has a chat template answers messages through it; other models, and those of runs that began with
    random weights, complete the text as it is. Without a prompt each line of the standard input is one; on a terminal
    it asks for them, and a chat goes on until `/new` starts another (Ctrl-C cuts an answer off, Ctrl-D ends).

    Args:
        run: The folder of a run, finished or in progress.
        checkpoint: A Hugging Face folder, or the name of a repository.
        prompt: The message, or what the model is to complete, to the last character.
        phase: Whose checkpoint of the run: base, grpo, ... By default the phase trained last, controls aside.
        system: The system message of a chat.
        raw: Complete the text without the chat template.
        max_new_tokens: Tokens after which an answer is cut off; by default what the checkpoint's
            generation_config.json says, as it is for the options below, else 1024 in a chat and 256 without.
        temperature: 1 draws from the model's distribution, 0 takes the most probable token. A checkpoint whose
            generation_config.json does not say `do_sample` takes the most probable token, as in transformers, unless
            this or one of the options below is given; a run draws at 1.
        top_k: Only the k most probable tokens; 0, the default, keeps all.
        top_p: Only the smallest set of tokens that holds this much probability; by default 1.
        min_p: Only tokens at least this times as probable as the most probable one; by default 0.
        speculative_tokens: Tokens that the model's multi-token prediction modules draft and the model checks at once.
            The distribution is the same; at temperature 0 so is the text.
        seed: Of the draws; the same seed and prompts give the same completions.
        tokenizer: A tokenizer.json or its folder, for a checkpoint that has none.
        dtype: Arithmetic; by default the run's or the checkpoint's.
        mesh: Devices that a large model is spread over.
    """
    check_source(run, checkpoint, phase)
    asked = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "speculative_tokens": speculative_tokens,
    }
    sampling_config(None, asked, chat=False)  # mistakes show before the model is read

    import jax

    from moe_jax.data.problem_text import encode_prompt
    from moe_jax.sampling.stream import Stream

    model, placed = load_model(run, checkpoint, phase, tokenizer, dtype, mesh)
    chat = model.chats and not raw
    if system is not None and not chat:
        raise ToolError("--system: this model has no chat template (or --raw is given): put the text into the prompt")
    sampling = sampling_config(model.generation, asked, chat=chat)
    reader = model.tokenizer
    print(f"{model.title}: {_describe(sampling, chat)}", file=sys.stderr, flush=True)
    for name in _NOT_APPLIED:
        if (value := (model.generation or {}).get(name)) not in (None, 0, 0.0, 1, 1.0):
            print(f"{name} = {value} of generation_config.json is not applied", file=sys.stderr)
    interactive = prompt is None and sys.stdin.isatty()
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    with jax.set_mesh(placed):
        stream = Stream(
            model.definition, model.params, model.rest, sampling, stop_ids=reader.stop_ids, pad_id=reader.pad_id
        )
        for number, text in enumerate(_lines(interactive) if prompt is None else [prompt]):
            if chat and interactive and text.strip() == _FORGET:
                messages = list(opening)
                continue
            messages = [*(messages if interactive else opening), {"role": "user", "content": text}]
            with mendable():
                ids = reader.encode(reader.apply_chat_template(messages)) if chat else encode_prompt(text, reader)
            try:
                key = jax.random.fold_in(jax.random.key(seed), number)
                tokens = stream(ids, key)
            except ValueError as error:
                if not interactive:
                    raise ToolError(str(error) if prompt is not None else f"line {number + 1}: {error}") from error
                print(f"{error}{f', or begin anew with {_FORGET}' if chat else ''}", file=sys.stderr)
                messages.pop()
                continue
            answer = _show(tokens, reader, hide_special=chat, interruptible=interactive)
            messages.append({"role": "assistant", "content": answer})
    if found := stream.acceptance():
        kept = ", ".join(f"{found.get(f'acceptance_{j}', 0):.0%}" for j in range(1, sampling.speculative_tokens + 1))
        print(f"{found['tokens_per_pass']:.2f} tokens a pass; drafts kept, by place: {kept}", file=sys.stderr)


def sampling_config(generation: Mapping[str, Any] | None, asked: Mapping[str, Any], *, chat: bool) -> SamplingConfig:
    """What the user asked for (not None), else what a generation_config.json states, else the defaults.

    A generation_config.json that does not say `do_sample`, or that is not there ({}), means the most probable token, as
    in transformers; but who asks for a temperature, top_k, top_p or min_p asks for draws. Other than there, a top_k
    that is not stated keeps all tokens. None: of a model that was trained here, which draws.

    Raises:
        ConfigError: an illegal value.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    stated: dict[str, Any] = {}
    for name in asked:
        value = (generation or {}).get(name)
        if value is None or name in given:
            continue
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ConfigError(f"generation_config.json: {name} = {value!r}: must be a number; or give another one here")
        stated[name] = value
    greedy = generation is not None and generation.get("do_sample") is not True
    if greedy and not given.keys() & _OF_DRAWS:
        stated = {name: value for name, value in stated.items() if name not in _OF_DRAWS} | {"temperature": 0.0}
    return SamplingConfig(**{"max_new_tokens": 1024 if chat else 256, **stated, **given})


def _describe(sampling: SamplingConfig, chat: bool) -> str:
    parts = [f"temperature {sampling.temperature:g}"]
    parts += [f"top_k {sampling.top_k}"] if sampling.top_k else []
    parts += [f"top_p {sampling.top_p:g}"] if sampling.top_p < 1 else []
    parts += [f"min_p {sampling.min_p:g}"] if sampling.min_p else []
    parts += [f"{sampling.speculative_tokens} drafts a pass"] if sampling.speculative_tokens else []
    return f"{'chat' if chat else 'completion'}, {', '.join(parts)}, at most {sampling.max_new_tokens} new tokens"


def _show(tokens: Iterable[int], tokenizer: Any, *, hide_special: bool, interruptible: bool) -> str:
    """Prints a completion while it is drawn, and returns it."""
    from moe_jax.data.tokenizer import DecodeStream

    decoder, text = DecodeStream(tokenizer, skip_special_tokens=hide_special), ""

    def put(piece: str, end: str = "") -> None:
        nonlocal text
        text += piece
        print(piece, end=end, flush=True)

    try:
        for token in tokens:
            if token not in tokenizer.stop_ids:
                put(decoder.feed([token]))
    except KeyboardInterrupt:
        if not interruptible:
            raise
    put(decoder.finish(), end="\n")
    return text


def _lines(interactive: bool) -> Iterator[str]:
    """The prompts on the standard input, one a line; on a terminal with line editing."""
    if not interactive:
        yield from (line.removesuffix("\n") for line in sys.stdin)
        return
    with suppress(ImportError):
        import readline  # noqa: F401 (gives `input` its editing keys)
    with suppress(EOFError):
        while True:
            yield input("> ")
    print()
