"""Tools that act on a run: `python -m moe_jax <tool>`.

Heavy imports stand inside the tools, so that `--help` and mistakes are answered at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import tyro

from moe_jax.config import ConfigError, ModelConfig, SamplingConfig, from_dict

app = tyro.extras.SubcommandApp()

_CONTROLS = ("control", "random_reward")
"""Phases that train a model for comparison, not for use."""


class ToolError(Exception):
    """A tool cannot do what it was asked for: one line says what and how to mend it."""


@app.command
def generate(
    run: Path,
    prompt: str | None = None,
    phase: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
) -> None:
    """Completes a prompt with the model of a run, and shows the text while it is drawn.

    Without a prompt it completes each line of the standard input; on a terminal it asks for them.

    Args:
        run: The folder of a run, finished or in progress.
        prompt: What the model reads, to the last character.
        phase: Whose checkpoint: base, grpo, ... By default the phase trained last, controls aside.
        max_new_tokens: Tokens after which a completion is cut off.
        temperature: 1 draws from the model's distribution, 0 takes the most probable token.
        top_k: Only the k most probable tokens; 0 keeps all.
        top_p: Only the smallest set of tokens that holds this much probability.
        min_p: Only tokens at least this times as probable as the most probable one.
        seed: Of the draws; the same seed and prompts give the same completions.
    """
    sampling = SamplingConfig(max_new_tokens, temperature, top_k, top_p, min_p)

    import jax

    from moe_jax.data.problem_text import encode_prompt
    from moe_jax.data.tokenizer import DecodeStream
    from moe_jax.sampling.stream import make_stream
    from moe_jax.training.run import RunError, load_config

    try:
        config = load_config(run)["config"]
    except RunError as error:
        raise ToolError(str(error)) from error
    phase = _phase(run, phase)
    definition, step, params, rest = _restore(run, config, phase)
    tokenizer = _tokenizer(run, config, definition.cfg)
    print(f"{run}: {phase}, step {step}", file=sys.stderr, flush=True)
    stream = make_stream(definition, sampling, stop_ids=tokenizer.stop_ids, pad_id=tokenizer.pad_id)
    interactive = prompt is None and sys.stdin.isatty()
    for number, text in enumerate(_lines(interactive) if prompt is None else [prompt]):
        try:
            key = jax.random.fold_in(jax.random.key(seed), number)
            tokens = stream(params, rest, encode_prompt(text, tokenizer), key)
        except ValueError as error:
            if not interactive:
                raise ToolError(str(error) if prompt is not None else f"line {number + 1}: {error}") from error
            print(error, file=sys.stderr)
            continue
        decoder = DecodeStream(tokenizer)
        for token in tokens:
            if token not in tokenizer.stop_ids:
                print(decoder.feed([token]), end="", flush=True)
        print(decoder.finish(), flush=True)


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


def _phase(run: Path, asked: str | None) -> str:
    """The phase whose checkpoint is wanted: the one that was asked for, or the one that was logged last."""
    with_checkpoint = {
        folder.name for folder in (run / "checkpoints").glob("*") if any(c.name.isdigit() for c in folder.iterdir())
    }
    if not with_checkpoint:
        raise ToolError(f"{run} has no checkpoint yet: the run saves one at the end of each phase at the latest")
    if asked is not None:
        if asked not in with_checkpoint:
            raise ToolError(f"{run} has no checkpoint of phase {asked!r}: use {' or '.join(sorted(with_checkpoint))}")
        return asked
    logged = []
    with suppress(FileNotFoundError), open(run / "metrics.jsonl", encoding="utf-8") as file:
        for line in file:
            with suppress(ValueError):  # a run in progress may be writing the last line
                logged.append(json.loads(line)["phase"])
    choices = [phase for phase in with_checkpoint if phase not in _CONTROLS] or list(with_checkpoint)
    latest = {phase: index for index, phase in enumerate(logged)}
    return max(choices, key=lambda phase: (latest.get(phase, -1), phase))


def _restore(run: Path, config: dict[str, Any], phase: str) -> tuple[Any, int, dict[str, Any], dict[str, Any]]:
    """The model's definition, the step of its newest intact checkpoint, and that checkpoint's params and rest."""
    import jax

    from moe_jax.model.definition import Definition
    from moe_jax.training.checkpoint import Checkpointer, CheckpointError

    if "model" not in config:
        raise ToolError(f"{run / 'config.json'} describes no model: this tool needs a run that trained one")
    definition = Definition.of(from_dict(ModelConfig, config["model"]))
    arrays = {name: jax.ShapeDtypeStruct(v.shape, v.dtype) for name, v in definition.variables.items()}
    params = {name: arrays.pop(name) for name in definition.param_names}
    try:
        with Checkpointer(run / "checkpoints" / phase) as checkpoints:
            restored = checkpoints.restore({"params": params, "rest": arrays}, partial=True)
    except CheckpointError as error:
        raise ToolError(str(error)) from error
    if restored is None:
        raise ToolError(f"{run / 'checkpoints' / phase} has no complete checkpoint")
    return definition, restored.step, restored.state["params"], restored.state["rest"]


def _tokenizer(run: Path, config: dict[str, Any], model: ModelConfig) -> Any:
    from moe_jax.data import DataError
    from moe_jax.data.tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(config.get("tokenizer", "byte"))
        tokenizer.check_fits(model.vocab_size)
    except (ConfigError, DataError) as error:
        raise ToolError(
            f"{run / 'config.json'}: {error}; put back the tokenizer that the run was trained with"
        ) from error
    return tokenizer


def main(args: Sequence[str] | None = None) -> int:
    """Runs a tool; the exit code: 0, or 2 for what the user can mend (said in one line on standard error)."""
    try:
        app.cli(prog="python -m moe_jax", description="Tools that act on a run.", args=args)
    except (ToolError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    except BrokenPipeError:
        # The reader of a pipe left; Python would complain when it flushes the output at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


if __name__ == "__main__":
    sys.exit(main())
