"""The models that a pipeline's stages end in, side by side: a table and plots.

A stage's entry has `title`, `pass_at_1` (with its interval), `per_seed` (pass@1 of each seed) and the other
figures of `rl.evaluation.evaluate`, numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.analysis import plots
from moe_jax.analysis.plots import Panel, Rows, Series
from moe_jax.analysis.tables import markdown

Entries = Mapping[str, Mapping[str, Any]]


def table(entries: Entries, consensus: str, published: Mapping[str, Mapping[str, float]]) -> str:
    """Accuracy, length, format and language of each stage as Markdown, and columns of figures published elsewhere."""
    head = ["stage", "pass@1", consensus.replace("_at_", "@"), "length", "format", "worked", "language", "readable"]
    rows = [[*head, *published]]
    for name, entry in entries.items():
        accuracy = entry["pass_at_1"]
        cells = [f"{accuracy['mean']:.3f} ± {accuracy['high'] - accuracy['mean']:.3f}", f"{entry[consensus]:.3f}"]
        cells.append(f"{entry['mean_length']:.1f}")
        cells += [f"{entry[figure]:.2f}" for figure in ("format", "worked", "language", "readable")]
        cells += [f"{figures[name]:.1f}" if name in figures else "" for figures in published.values()]
        rows.append([entry["title"], *cells])
    return markdown(rows)


def plot_stages(path: Path, entries: Entries, consensus: str, language: str) -> None:
    """Writes one PNG: accuracy, language and length by stage."""

    def by_stage(label: str, figure: str, color: str) -> Series:
        values = [entry[figure] for entry in entries.values()]
        if figure != "pass_at_1":
            return Series(label, range(len(values)), values, color)
        means = [value["mean"] for value in values]
        lows, highs = [max(value["low"], 0.0) for value in values], [min(value["high"], 1.0) for value in values]
        return Series(label, range(len(values)), means, color, low=lows, high=highs)

    accuracy = [by_stage("single sample", "pass_at_1", plots.BLUE), by_stage("majority", consensus, plots.SKY)]
    if max(len(entry["per_seed"]) for entry in entries.values()) > 1:
        singles = [(place, one) for place, entry in enumerate(entries.values()) for one in entry["per_seed"]]
        accuracy.append(Series("each seed", *zip(*singles, strict=True), color=plots.GREY, marker="_"))
    words = by_stage("words in it", "language", plots.GREEN)
    whole = by_stage("samples wholly in it", "readable", plots.ORANGE)
    length = by_stage("length", "mean_length", plots.PURPLE)
    panels = [
        Panel("held-out accuracy", accuracy, share=True),
        Panel(f"language ({language})", [words, whole], share=True),
        Panel("length (tokens)", [length], from_zero=True),
    ]
    plots.plot_named(path, "The stages on held-out problems", list(entries), panels)


def plot_reinforcement(path: Path, phases: Mapping[str, Sequence[Rows]]) -> None:
    """Writes one PNG of what policies drew while they learned: accuracy, readability, length; means of the seeds.

    Args:
        phases: for each title the metrics of a phase, seed by seed.
    """
    colors = dict(zip(phases, (plots.ORANGE, plots.SKY, plots.BLUE, plots.GREEN, plots.PURPLE), strict=False))

    def curves(metric: str) -> list[Series]:
        means = {
            title: np.mean([[row[metric] for row in rows] for rows in seeds], axis=0) for title, seeds in phases.items()
        }
        return [Series(title, range(1, len(mean) + 1), mean.tolist(), colors[title]) for title, mean in means.items()]

    panels = [
        Panel("accuracy", curves("rewards/accuracy/mean"), share=True),
        Panel("readable", curves("rewards/readable/mean"), share=True),
        Panel("length (tokens)", curves("completions/mean_length"), from_zero=True),
    ]
    plots.plot_curves(path, "Samples that the RL stages learn from", panels)
