"""What `benchmarks/moe.py` measured, as tables and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from moe_jax.analysis.flops import parameter_counts
from moe_jax.analysis.plots import BLUE, GREEN, GREY, ORANGE, PURPLE
from moe_jax.analysis.tables import aligned
from moe_jax.benchmarks.moe import FullStep, Results, Timing, dense_equal
from moe_jax.benchmarks.routings import LOAD_SIGMA

_STYLES = {"balanced": (BLUE, "o"), "measured": (GREEN, "s"), "worst": (ORANGE, "^")}


def table(results: Results) -> str:
    """The results, readable. Times are medians, with the least in brackets."""
    config, env = results.config, results.environment
    D, F, K, T = config.hidden_size, config.expert_size, config.experts_per_token, config.tokens
    popularity = f"log-normal popularity, sigma {LOAD_SIGMA}" if config.load_profile is None else "a run's loads"
    head = ["E", "routing", "MaxVio", "forward ms", "× dense", "fwd + bwd ms", "× dense", "GFLOP/s"]
    dense = _passes(results, "dense")
    lines = [["", "dense", "", *_cells(dense, "× dense"), f"{dense[1].gflops_per_s:.1f}"]]
    for E in config.experts:
        for routing in config.routing:
            moe = _passes(results, "moe", E, routing)
            lines.append([*_about(moe[0]), *_cells(moe, "× dense"), f"{moe[1].gflops_per_s:.1f}"])
        batched = _passes(results, "batched", E)
        lines.append([str(E), "batched", "", *_cells(batched, "× dense"), f"{batched[1].gflops_per_s:.1f}"])
    parts = [
        f"{env['platform']} ({env['device']}, {env['machine']}), {env['cores']} cores, jax {env['jax']},"
        f" {config.dtype}\nmedian (least) of {config.repeats} rounds"
        + (f"; measured routing: {popularity}" if "measured" in config.routing else ""),
        f"Layer: {T:,} tokens, hidden {D}, {K} experts of {F} per token; dense: one feed-forward of {K * F}; batched:"
        " experts alone,\nXLA's batched products of equal groups that are in place, without router and dispatch\n"
        + aligned(head, lines),
    ]

    head = ["E", "routing", "MaxVio", "forward ms", "of dense rate", "fwd + bwd ms", "of dense rate", "GFLOP/s"]
    product = _passes(results, "product")
    lines = [["", "one dense product", "", *_cells(product, ""), f"{product[1].gflops_per_s:.1f}", "", ""]]
    for E in config.experts:
        for routing in config.routing:
            found = _passes(results, "grouped", E, routing)
            line = [*_about(found[0]), *_cells(found, "rate"), f"{found[1].gflops_per_s:.1f}"]
            try:
                ragged = results.find("ragged", "forward_backward", E, routing)
                line += [_ms(ragged), f"{ragged.median_s / found[1].median_s:.1f}"]
            except KeyError:
                line += ["", ""]
            lines.append(line)
    head += ["ragged_dot fwd + bwd ms", "× grouped"]
    parts.append(f"Grouped product: [{T * K}, {D}] × [E, {D}, {2 * F}]\n" + aligned(head, lines))

    if config.step is not None:
        parts.append(_step_table(results, config.step))
    return "\n\n".join([*parts, *results.notes])


def _step_table(results: Results, step: FullStep) -> str:
    lines = []
    for name, cfg in {"moe_step": step.model, "dense_step": dense_equal(step.model)}.items():
        found, counts = results.find(name, "step"), parameter_counts(cfg)
        lines.append(
            [
                name.removesuffix("_step"),
                f"{(counts.total + counts.mtp) / 1e6:.1f} M",
                f"{counts.active / 1e6:.1f} M",
                "" if found.max_violation is None else f"{found.max_violation:.2f}",
                _ms(found),
                f"{found.ratio:.2f}",
                f"{found.tokens_per_s:,.0f}",
                f"{found.gflops_per_s:.1f}",
            ]
        )
    head = ["model", "parameters", "active", "MaxVio", "step ms", "× dense", "tokens/s", "GFLOP/s"]
    title = f"Training step, AdamW, batch {step.batch_size} × {step.sequence_length} of random tokens"
    return f"{title}\n{aligned(head, lines)}"


def _passes(results: Results, contender: str, *which: Any) -> tuple[Timing, Timing]:
    return results.find(contender, "forward", *which), results.find(contender, "forward_backward", *which)


def _about(timing: Timing) -> list[str]:
    return [str(timing.experts), str(timing.routing), f"{timing.max_violation:.2f}"]


def _cells(passes: tuple[Timing, Timing], compared: str) -> Iterator[str]:
    for timing in passes:
        yield _ms(timing)
        yield f"{timing.ratio:.2f}" if compared == "× dense" else f"{1 / timing.ratio:.0%}"


def _ms(timing: Timing) -> str:
    return f"{1e3 * timing.median_s:,.2f} ({1e3 * timing.min_s:,.2f})"


def plot_moe(results: Results, path: Path) -> None:
    """Writes one PNG: time of forward and backward pass against E at fixed active work, of the layer and the product.

    E is on a logarithmic axis, and so is time beside ragged_dot, which is shown where it was measured. Dense equals are
    horizontal lines.
    """
    config, env = results.config, results.environment
    figure = Figure(figsize=(8.5, 7.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("Forward and backward pass at fixed active work", x=0.01, ha="left", fontsize=13, fontweight="bold")
    axes = figure.subplots(2, 1, sharex=True)
    panels = [("MoE layer (ms)", "moe", "dense layer of the\nsame active FLOPs", "dense")]
    panels += [("grouped product (ms)", "grouped", "one dense product\nof the same size", "product")]
    for ax, (ylabel, name, reference_label, reference) in zip(axes, panels, strict=True):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#E4E4E4", linewidth=0.8)
        ax.set_axisbelow(True)
        for routing in config.routing:
            found = sorted(
                (
                    t
                    for t in results.timings
                    if (t.contender, t.passes, t.routing) == (name, "forward_backward", routing)
                ),
                key=lambda t: t.experts or 0,
            )
            color, marker = _STYLES[routing]
            ax.plot(
                [t.experts for t in found],
                [1e3 * t.median_s for t in found],
                color=color,
                marker=marker,
                linewidth=2,
                markersize=5,
                label=f"{routing}, MaxVio {_span([t.max_violation or 0 for t in found])}",
            )
        ragged: dict[int, float] = {}
        if name == "grouped":
            for timing in results.timings:  # of the routings, the one that suits it best
                if timing.contender == "ragged" and timing.experts is not None:
                    ragged[timing.experts] = min(ragged.get(timing.experts, np.inf), 1e3 * timing.median_s)
        if ragged:
            sizes = sorted(ragged)
            label = "jax.lax.ragged_dot"
            ax.plot(sizes, [ragged[E] for E in sizes], "D--", color=PURPLE, linewidth=2, markersize=5, label=label)
        level = 1e3 * results.find(reference, "forward_backward").median_s
        ax.axhline(level, color=GREY, linewidth=1.5, linestyle=(0, (5, 3)), label=reference_label)
        if ragged:
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            ax.yaxis.set_minor_locator(NullLocator())
        else:
            ax.set_ylim(bottom=0)
        ax.set_ylabel(ylabel)
        ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, alignment="left")
    axes[0].set_title(
        f"{config.tokens:,} tokens, hidden {config.hidden_size}, {config.experts_per_token} experts of"
        f" {config.expert_size} per token, {config.dtype}; {env['platform']}, {env['cores']} cores",
        loc="left",
        fontsize=9,
        color="#444444",
    )
    axes[1].set_xscale("log", base=2)
    axes[1].set_xticks(sorted(config.experts), [str(E) for E in sorted(config.experts)])
    axes[1].xaxis.set_minor_locator(NullLocator())
    axes[1].set_xlabel("experts E")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return low if low == high else f"{low} to {high}"
