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
from typing import Annotated, Any, Literal

import tyro

from moe_jax.config import ConfigError, ModelConfig, SamplingConfig, from_dict

app = tyro.extras.SubcommandApp()
benchmark = app.command(tyro.extras.SubcommandApp(), name="benchmark", help="Measures speed on this machine.")

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


@app.command
def inspect_routing(
    run: Path,
    phase: str | None = None,
    text: tuple[Path, ...] = (),
    tokens: int = 32_768,
    out: Path | None = None,
) -> None:
    """Shows how a run's model routes tokens to experts: load, co-activation, specialisation, saturation.

    Prints tables, and writes them (CSV, and summary.json) with plots (PNG) to the run's folder `routing`.

    Args:
        run: The folder of a run, finished or in progress.
        phase: Whose checkpoints: base, grpo, ... By default the phase trained last, controls aside.
        text: Files (plain text or .jsonl) or folders; several are compared with one another. By default held-out text
            of the kind that the run was trained on.
        tokens: How many tokens to route, of all texts together.
        out: Another folder for the files.
    """
    if tokens < 1:
        raise ToolError(f"--tokens {tokens}: must be at least 1")

    from moe_jax.analysis.inspect_routing import make_routing, write_report

    phase, definition, step, params, rest, tokenizer, rows = _routed(run, phase, text, tokens)
    print(f"{run}: {phase}, step {step}; {', '.join(rows.names)}: {len(rows.tokens_T):,} tokens", flush=True)
    route = make_routing(definition, rows)
    found = route(step, params, rest)
    older = (route(step, *arrays) for step, *arrays in _older(run, definition, phase, step))
    folder = run / "routing" if out is None else out
    title = {"run": str(run), "phase": phase}
    try:
        report = write_report(folder, title, rows, found, older, tokenizer, definition.cfg.moe.num_experts)
    except OSError as error:
        raise ToolError(f"cannot write {folder}: {error}. Name another folder with --out") from error
    print(f"\n{report}\n\nPlots and tables: {folder}")


@benchmark.command(name="moe")
def benchmark_moe(
    hidden_size: int = 256,
    expert_size: int = 128,
    experts: tuple[int, ...] = (8, 64, 256),
    experts_per_token: int = 6,
    tokens: int = 4096,
    dtype: Literal["float32", "bfloat16"] = "float32",
    routing: tuple[Literal["balanced", "measured", "worst"], ...] = ("balanced", "measured", "worst"),
    run: Path | None = None,
    repeats: int = 10,
    full_step: bool = True,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
    plot: Path = Path("benchmark_moe.png"),
) -> None:
    """Times sparse layers and training steps against dense ones of the same active work, and grouped products.

    Prints tables and writes a plot. Leave the machine alone meanwhile: two cores need several minutes.

    Args:
        hidden_size: Width of the tokens.
        expert_size: Inner width of an expert; the dense layer is as wide as the experts of a token together.
        experts: Numbers of experts.
        experts_per_token: How many of them a token uses.
        tokens: How many tokens a layer works on.
        dtype: Of the arithmetic.
        routing: balanced: each expert equally often; measured: as uneven as the router of --run, by default a
            log-normal popularity; worst: all tokens on the same experts.
        run: The folder of a run with a sparse model.
        repeats: How often each is timed.
        full_step: Also times training steps of a sparse model of 34 M parameters and of its dense equal.
        as_json: Prints the results as one JSON object, and nothing else.
        plot: A PNG file: time against the number of experts.
    """
    if run is not None and "measured" not in routing:
        raise ToolError("--run says what the measured routing is like: add measured to --routing, or leave --run out")
    if plot.suffix != ".png":
        raise ToolError(f"--plot {plot}: must be a .png file")
    try:
        plot.parent.mkdir(parents=True, exist_ok=True)
        plot.open("ab").close()
    except OSError as error:
        raise ToolError(f"cannot write {plot}: {error}. Name another file with --plot") from error

    from moe_jax.benchmarks import moe as benchmark

    config = benchmark.MoEBenchmark(
        hidden_size=hidden_size,
        expert_size=expert_size,
        experts=experts,
        experts_per_token=experts_per_token,
        tokens=tokens,
        dtype=dtype,
        routing=routing,
        load_profile=None if run is None else _load_profile(run),
        repeats=repeats,
        step=benchmark.FullStep() if full_step else None,
    )
    results = benchmark.benchmark_moe(config)
    benchmark.plot_moe(results, plot)
    print(json.dumps(results.to_json()) if as_json else f"{benchmark.table(results)}\n\nPlot: {plot}")


def _load_profile(run: Path) -> tuple[float, ...]:
    """How uneven the loads are that a run's newest router gives to held-out text."""
    import numpy as np

    from moe_jax.analysis.inspect_routing import make_routing
    from moe_jax.analysis.routing import expert_counts
    from moe_jax.benchmarks.moe import load_profile

    phase, definition, step, params, rest, _, rows = _routed(run, None, (), 32_768)
    print(f"{run}: {phase}, step {step}; {', '.join(rows.names)}", file=sys.stderr, flush=True)
    experts_LTK = make_routing(definition, rows)(step, params, rest).experts_LTK
    E = definition.cfg.moe.num_experts
    return load_profile(np.array([expert_counts(experts_TK, E) for experts_TK in experts_LTK]))


def _routed(
    run: Path, phase: str | None, text: Sequence[Path], tokens: int
) -> tuple[str, Any, int, Any, Any, Any, Any]:
    """(phase, definition, step, params, rest, tokenizer, rows): a run's sparse model and text for it to route."""
    from moe_jax.analysis.inspect_routing import pack_texts, read_text
    from moe_jax.data import DataError
    from moe_jax.training.run import RunError, load_config

    try:
        config = load_config(run)["config"]
    except RunError as error:
        raise ToolError(str(error)) from error
    phase = _phase(run, phase)
    definition, step, params, rest = _restore(run, config, phase)
    model = definition.cfg
    if not model.moe.num_experts:
        raise ToolError(f"{run} trained a dense model: there is no routing to inspect (moe.num_experts = 0)")
    tokenizer = _tokenizer(run, config, model)
    try:
        texts = [read_text(path) for path in text] or [_held_out(config)]
        length = (config.get("train") or config.get("pretrain") or {}).get("sequence_length", 256)
        rows = pack_texts(texts, tokenizer, min(length, model.max_position), tokens)
    except DataError as error:
        raise ToolError(str(error)) from error
    return phase, definition, step, params, rest, tokenizer, rows


def _held_out(config: dict[str, Any]) -> Any:
    """Text of the kind that a run was trained on and not in what it was trained on."""
    from moe_jax.analysis.inspect_routing import Text
    from moe_jax.config import ProblemConfig
    from moe_jax.data.problems import load_problems, tagged_completion
    from moe_jax.data.text import TextCorpus

    data = config.get("data", {})
    if "source" not in data:
        corpus = TextCorpus.load(data.get("path", ""))
        return Text(f"held-out text of {corpus.name}", corpus.validation)
    problems = load_problems(from_dict(ProblemConfig, data), config["seed"]).test
    documents = [p.prompt + tagged_completion(p.worked, p.answer).removesuffix("<eos>") for p in problems]
    return Text(f"held-out problems of {data['source']}", documents)


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
    from moe_jax.model.definition import Definition
    from moe_jax.training.checkpoint import Checkpointer, CheckpointError

    if "model" not in config:
        raise ToolError(f"{run / 'config.json'} describes no model: this tool needs a run that trained one")
    definition = Definition.of(from_dict(ModelConfig, config["model"]))
    try:
        with Checkpointer(run / "checkpoints" / phase) as checkpoints:
            restored = checkpoints.restore(_arrays(definition), partial=True)
    except CheckpointError as error:
        raise ToolError(str(error)) from error
    if restored is None:
        raise ToolError(f"{run / 'checkpoints' / phase} has no complete checkpoint")
    return definition, restored.step, restored.state["params"], restored.state["rest"]


def _older(run: Path, definition: Any, phase: str, newest: int) -> Iterator[tuple[int, dict[str, Any], dict[str, Any]]]:
    """(step, params, rest) of the intact checkpoints before the newest one, oldest first, one at a time in memory."""
    from moe_jax.training.checkpoint import Checkpointer, CheckpointError

    with Checkpointer(run / "checkpoints" / phase) as checkpoints:
        for step in checkpoints.steps():
            if step >= newest:
                break
            # A damaged one is left out, with the warning of `restore`; so is one that a run in progress deletes.
            with suppress(CheckpointError):
                if (restored := checkpoints.restore(_arrays(definition), step=step, partial=True)) is not None:
                    yield restored.step, restored.state["params"], restored.state["rest"]


def _arrays(definition: Any) -> dict[str, dict[str, Any]]:
    """What to restore of a checkpoint: shapes and dtypes of params and rest."""
    import jax

    arrays = {name: jax.ShapeDtypeStruct(v.shape, v.dtype) for name, v in definition.variables.items()}
    params = {name: arrays.pop(name) for name in definition.param_names}
    return {"params": params, "rest": arrays}


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
