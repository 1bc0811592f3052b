"""`python -m moe_jax benchmark`: speed on this machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from moe_jax.tools.inspect_routing import routed_text
from moe_jax.tools.model import ToolError


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
    from moe_jax.benchmarks import moe_report

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
    moe_report.plot_moe(results, plot)
    print(json.dumps(results.to_json()) if as_json else f"{moe_report.table(results)}\n\nPlot: {plot}")


def benchmark_decode(
    tokens: int = 64,
    repeats: int = 5,
    context: int = 4096,
    drafts: tuple[int, ...] = (1, 2, 3, 4),
    temperature: float = 1.0,
    train_minutes: float = 0.0,
    weights: Path | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Times decoding at batch 1 beside what the memory's bandwidth allows: plain, and with drafts.

    Prints tables: dense and sparse models of 30 M and more active parameters with random weights, forms of latent
    attention at a long context, and, with a model that is trained here, speculative decoding.

    Args:
        tokens: New tokens of a turn of plain decoding.
        repeats: Turns; the best one counts.
        context: Cached positions in the comparison of latent attention's forms.
        drafts: Numbers of tokens to draft.
        temperature: Of the speculative part.
        train_minutes: At most so long a model of 34 M parameters and a prediction module is trained on worked
            problems; less if nine of ten first drafts are kept on held-out ones before. 0 leaves the speculative part
            out, unless --weights has a model.
        weights: An .npz file to keep the trained model in; it is used if it exists.
        as_json: Prints the results as one JSON object, and nothing else.
    """
    if weights is not None and weights.suffix != ".npz":
        raise ToolError(f"--weights {weights}: must be an .npz file")
    if weights is not None and not train_minutes and not weights.exists():
        raise ToolError(f"--weights {weights}: there is no such file; --train-minutes 10 makes one")

    from moe_jax.benchmarks import decode as benchmark

    config = benchmark.DecodeBenchmark(
        tokens=tokens,
        repeats=repeats,
        context=context,
        drafts=drafts,
        temperature=temperature,
        train_minutes=train_minutes,
        weights=weights,
    )
    results = benchmark.benchmark_decode(config)
    print(json.dumps(results.to_json()) if as_json else benchmark.table(results))


def benchmark_grpo(
    prompts: int = 8,
    group_size: int = 8,
    completion_tokens: int = 64,
    prompt_lengths: tuple[int, ...] = (8, 192),
    share_prompts: tuple[bool, ...] = (True,),
    pack_completions: bool = False,
    beta: float = 0.001,
    stop_tokens: int = 0,
    slots: int = 0,
    compactions: int = 0,
    cache_parts: int = 1,
    repeats: int = 5,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Times whole steps of GRPO, phase by phase, beside the rate at which this machine multiplies matrices.

    A step is sampling, scoring, the reference's log-probabilities and the update, of a dense model of 5 M parameters
    in float32. Prints a table: seconds, FLOPs and completion tokens/s. Leave the machine alone meanwhile.

    Args:
        prompts: Prompts a step.
        group_size: Samples of each.
        completion_tokens: Tokens of a completion.
        prompt_lengths: Tokens of a prompt; each length is timed.
        share_prompts: Whether a group's samples are trained behind one prompt; with both values they are compared.
        pack_completions: Whether short completions of a group are trained one after another in the same columns.
        beta: Weight of the KL to a reference; 0: no reference.
        stop_tokens: So many of the vocabulary's tokens end a completion; 0: none ends early.
        slots: Rows decoded at a time, 0: all.
        compactions: How often the rows decoded at a time are halved when half of them have finished.
        cache_parts: In how many parts the cache of new tokens is added as they come.
        repeats: Steps of each kind, in turns.
        as_json: Prints the results as one JSON object, and nothing else.
    """
    from moe_jax.benchmarks import grpo as benchmark

    config = benchmark.GRPOBenchmark(
        prompts=prompts,
        group_size=group_size,
        completion_tokens=completion_tokens,
        prompt_lengths=prompt_lengths,
        share_prompts=share_prompts,
        pack_completions=pack_completions,
        beta=beta,
        stop_tokens=stop_tokens,
        slots=slots,
        compactions=compactions,
        cache_parts=cache_parts,
        repeats=repeats,
    )
    results = benchmark.benchmark_grpo(config)
    print(json.dumps(results.to_json()) if as_json else benchmark.table(results))


def _load_profile(run: Path) -> tuple[float, ...]:
    """How uneven the loads are that a run's newest router gives to held-out text."""
    import numpy as np

    from moe_jax.analysis.inspect_routing import make_routing
    from moe_jax.analysis.routing import expert_counts
    from moe_jax.benchmarks.routings import load_profile

    phase, definition, step, params, rest, _, rows = routed_text(run, None, (), 32_768)
    print(f"{run}: {phase}, step {step}; {', '.join(rows.names)}", file=sys.stderr, flush=True)
    experts_LTK = make_routing(definition, rows)(step, params, rest).experts_LTK
    E = definition.cfg.moe.num_experts
    return load_profile(np.array([expert_counts(experts_TK, E) for experts_TK in experts_LTK]))
