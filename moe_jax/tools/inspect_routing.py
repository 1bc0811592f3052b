"""`python -m moe_jax inspect-routing`: how a run's model routes tokens to experts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_jax.config import from_dict
from moe_jax.tools.model import ToolError, mendable


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
    from moe_jax.training.weights import older_weights

    phase, definition, step, params, rest, tokenizer, rows = routed_text(run, phase, text, tokens)
    print(f"{run}: {phase}, step {step}; {', '.join(rows.names)}: {len(rows.tokens_T):,} tokens", flush=True)
    route = make_routing(definition, rows)
    found = route(step, params, rest)
    older = (route(*weights) for weights in older_weights(run, definition, phase, step))
    folder = run / "routing" if out is None else out
    title = {"run": str(run), "phase": phase}
    try:
        report = write_report(folder, title, rows, found, older, tokenizer, definition.cfg.moe.num_experts)
    except OSError as error:
        raise ToolError(f"cannot write {folder}: {error}. Name another folder with --out") from error
    print(f"\n{report}\n\nPlots and tables: {folder}")


def routed_text(
    run: Path, phase: str | None, text: Sequence[Path], tokens: int
) -> tuple[str, Any, int, Any, Any, Any, Any]:
    """(phase, definition, step, params, rest, tokenizer, rows): a run's sparse model and text for it to route."""
    from moe_jax.analysis.inspect_routing import pack_texts, read_text
    from moe_jax.training.weights import newest_phase, restore_weights, run_definition, run_tokenizer

    with mendable():
        config, definition = run_definition(run)
        phase = newest_phase(run, phase)
        step, params, rest = restore_weights(run, definition, phase)
        model = definition.cfg
        if not model.moe.num_experts:
            raise ToolError(f"{run} trained a dense model: there is no routing to inspect (moe.num_experts = 0)")
        tokenizer = run_tokenizer(run, config, model.vocab_size)
        texts = [read_text(path) for path in text] or [_held_out(config)]
        length = (config.get("train") or config.get("pretrain") or {}).get("sequence_length", 256)
        rows = pack_texts(texts, tokenizer, min(length, model.max_position), tokens)
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
