"""Plots of a run, as PNG files, from the rows of its metrics.jsonl.

Each figure answers one question at a glance: raw values are pale points, lines are smoothed over a few steps. What a
run did not log is left out. Files are written with matplotlib's Agg canvas and without its global state, so plotting
is safe in any thread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter
from numpy.typing import ArrayLike

Rows = Sequence[Mapping[str, Any]]

# Okabe and Ito's palette: distinct for colour-blind readers, and each of another lightness.
BLUE, ORANGE, GREEN, PURPLE, SKY, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#6E6E6E"

_PHASES = {
    "base": ("pre-training", BLUE),
    "grpo": ("GRPO", BLUE),
    "control": ("more supervised training", ORANGE),
    "random_reward": ("random reward", GREY),
}
_EVALUATIONS = {
    "before": ("before RL", GREEN),
    "after": ("after RL", BLUE),
    "control": ("after more supervised training", ORANGE),
    "random_reward": ("after random reward", GREY),
}


@dataclass(frozen=True)
class Series:
    """One curve."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    """Not-a-number where there is no value."""
    color: str
    style: str = "-"
    low: Sequence[float] = ()
    """With `high`: borders of a band around the line, or of bars at one or two values."""
    high: Sequence[float] = ()
    marker: str = "o"
    """Of one or two values, which are no line."""


@dataclass(frozen=True)
class Point:
    """One cross in a plane: a mean with its interval in both directions, and the single results it is made of."""

    label: str
    x: Mapping[str, float]
    """With "mean", "low" and "high"; an interval that is not finite is left out."""
    y: Mapping[str, float]
    xs: Sequence[float]
    ys: Sequence[float]
    color: str
    marker: str = "o"


@dataclass(frozen=True)
class Level:
    """A horizontal line with the band of its interval."""

    label: str
    mean: float
    low: float
    high: float
    color: str


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    ylabel: str
    """What is shown, with its unit."""
    series: Sequence[Series]
    levels: Sequence[Level] = ()
    series_title: str = ""
    levels_title: str = ""
    share: bool = False
    """The values are shares: shown in percent, on an axis from 0 to 100 %."""
    from_zero: bool = False
    joined: bool = False
    """The values are joined as they are, not smoothed."""
    note: str = ""
    """A remark above the axes."""


def series(rows: Rows, metric: str, phase: str, label: str = "", color: str = "", style: str = "-") -> list[Series]:
    """The curve of a phase's metric, in a list of its own; an empty list if it was never logged."""
    found = [(row["step"], row[metric]) for row in rows if row["phase"] == phase and row.get(metric) is not None]
    if not any(math.isfinite(value) for _, value in found):
        return []
    steps, values = zip(*found, strict=True)
    name, own_color = _PHASES.get(phase, (phase, PURPLE))
    return [Series(label or name, steps, values, color or own_color, style)]


def plot_curves(path: Path, title: str, panels: Sequence[Panel], xlabel: str = "step", log_x: bool = False) -> bool:
    """Writes one PNG with the panels one above another, on one x axis. Panels without a curve are left out.

    Returns whether there was anything to plot; if not, no file is written.
    """
    panels = [panel for panel in panels if panel.series]
    if not panels:
        return False
    figure, axes = _figure(title, len(panels))
    for ax, panel in zip(axes, panels, strict=True):
        _draw(ax, panel)
    axes[-1].set_xlabel(xlabel)
    if log_x:
        axes[-1].set_xscale("log")
        axes[-1].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes[-1].xaxis.set_minor_formatter(NullFormatter())
    _save(figure, path)
    return True


def plot_grpo(rows: Rows, folder: Path, evaluations: Mapping[str, Mapping[str, float]] | None = None) -> list[Path]:
    """All plots of a GRPO run, its pre-training and its controls; what was not logged is left out.

    Args:
        rows: the lines of metrics.jsonl, with phases "base", "grpo", "control" (supervised training instead of RL) and
            "random_reward".
        folder: where the files go; it is created.
        evaluations: held-out pass@1, each with "mean", "low" and "high", under "before", "after", "control" and
            "random_reward".

    Returns:
        The files that were written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    policies = ["grpo", "random_reward"]
    levels = [
        Level(f"{label}: {100 * found['mean']:.1f} %", found["mean"], found["low"], found["high"], color)
        for name, (label, color) in _EVALUATIONS.items()
        if (found := (evaluations or {}).get(name))
    ]
    accuracy = _of_phases(rows, "rewards/accuracy/mean", ["grpo", "control", "random_reward"])
    worked = series(rows, "rewards/worked/mean", "grpo", "samples that show working", ORANGE)
    correct = series(rows, "rewards/accuracy/mean", "grpo", "samples that are right", BLUE)
    reward = [
        *series(rows, "reward", "grpo"),
        *series(rows, "reward", "random_reward", "random reward (a coin)"),
    ]
    kl = series(rows, "kl", "grpo")
    drift = _of_phases(rows, "sampling/sampling_logp_difference/mean", policies)
    base_losses = [
        *series(rows, "loss_main", "base", "next token", BLUE),
        *series(rows, "loss_mtp_1", "base", "one further ahead (MTP)", ORANGE),
    ] or series(rows, "loss", "base", "loss", BLUE)

    figures = {
        "reward": ("Reward of the samples drawn in training", [Panel("mean reward", reward, from_zero=True)]),
        "accuracy": (
            "Accuracy in training and on held-out problems",
            [Panel("accuracy", accuracy, levels, "drawn in training", "held-out pass@1, 95 % band", share=True)],
        ),
        "response_length": (
            "Response length, working and accuracy under GRPO",
            [
                Panel(
                    "response length (tokens)",
                    series(rows, "completions/mean_length", "grpo", "mean length", GREEN),
                    from_zero=True,
                ),
                Panel("share of samples", [*worked, *correct], share=True),
            ],
        ),
        "entropy": (
            "Entropy of the policy",
            [Panel("entropy (nats per token)", _of_phases(rows, "entropy", policies), from_zero=True)],
        ),
        "kl": (
            "Distance from the reference policy",
            [Panel("KL, k3 estimate (nats per token)", kl, from_zero=True)],
        )
        if kl
        else (
            "Sampler and trainer",
            [
                Panel(
                    "|Δ log-probability| per token (nats)",
                    drift,
                    from_zero=True,
                    note="No KL: beta = 0, so there is no reference policy. Shown instead: how far the trainer's\n"
                    "log-probabilities are from those that the sampler drew from (rounding, updates within a step).",
                )
            ],
        ),
        "pretraining": (
            "Pre-training",
            [Panel("loss (nats per token)", base_losses)],
        ),
    }
    written = [
        folder / f"{name}.png"
        for name, (title, panels) in figures.items()
        if plot_curves(folder / f"{name}.png", title, panels)
    ]
    if plot_expert_load(rows, folder / "expert_load.png"):
        written.append(folder / "expert_load.png")
    return written


def plot_expert_load(rows: Rows, path: Path) -> bool:
    """Heat maps of each expert's load over the steps, one per sparse layer, and the worst expert's excess over them.

    Reads `moe/expert_load` ([layers][experts] per row, 1 is an even share) and `moe/max_violation` (mean over layers of
    the largest load minus 1), phases one after another in their order, controls left out. A multi-token prediction
    module's layer comes last, and is blank where it was not run. Of more than 8 layers 8 are shown, evenly spread.

    Returns whether there was anything to plot.
    """
    rows = [row for row in rows if row["phase"] not in ("control", "random_reward")]
    loaded = [row for row in rows if row.get("moe/expert_load") is not None]
    violation = any(series(rows, "moe/max_violation", phase) for phase in {row["phase"] for row in rows})
    if not loaded and not violation:
        return False
    starts = _phase_starts(rows)
    count = max((len(row["moe/expert_load"]) for row in loaded), default=0)
    layers = np.unique(np.linspace(0, count - 1, min(count, 8)).round().astype(int)) if count else np.array([], int)
    figure, axes = _figure("Load of the experts (1 = an even share)", len(layers) + violation, height=2.0)

    mesh = None
    for ax, layer in zip(axes, layers, strict=False):
        blank = [math.nan] * max(len(load) for row in loaded for load in row["moe/expert_load"])
        load_TE = [row["moe/expert_load"][layer] if layer < len(row["moe/expert_load"]) else blank for row in loaded]
        # Logarithmic: half and twice the share are equally far from even.
        colors_ET = np.log2(np.maximum(np.array(load_TE, float).T, 0.25))
        edges_T = _edges([starts[row["phase"]] + row["step"] for row in loaded])
        edges_E = np.arange(len(colors_ET) + 1) - 0.5
        mesh = ax.pcolormesh(edges_T, edges_E, colors_ET, cmap="PuOr_r", vmin=-2, vmax=2)
        ax.set_ylabel(f"sparse layer {layer + 1}\nexpert")
        ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        ax.grid(False)
    if mesh is not None:
        bar = figure.colorbar(mesh, ax=axes[: len(layers)], label="load", aspect=12 * len(layers), pad=0.02)
        bar.set_ticks([-2, -1, 0, 1, 2], labels=["≤ ¼", "½", "1", "2", "≥ 4"])
    if violation:
        curves = [
            replace(curve, steps=[start + step for step in curve.steps])
            for phase, start in starts.items()
            for curve in series(rows, "moe/max_violation", phase, color=BLUE)
        ]
        _draw(axes[-1], Panel("largest load − 1\n(mean of layers)", curves, from_zero=True))
        if (legend := axes[-1].get_legend()) is not None:
            legend.remove()  # the phases stand above the first axes
    if len(starts) > 1:
        for phase, start in starts.items():
            name = _PHASES.get(phase, (phase, ""))[0]
            axes[0].text(start + 1, 1.02, name, transform=axes[0].get_xaxis_transform(), fontsize=9)
            for ax in axes:
                if start:
                    ax.axvline(start + 0.5, color="black", linewidth=1)
    axes[-1].set_xlabel("step, counted over the phases" if len(starts) > 1 else "step")
    _save(figure, path)
    return True


def plot_points(path: Path, title: str, points: Sequence[Point], xlabel: str, ylabel: str) -> None:
    """Writes one PNG of means with their intervals in a plane, over pale single results."""
    figure, (ax,) = _figure(title, 1)
    for point in points:
        ax.scatter(point.xs, point.ys, s=12, color=point.color, marker=point.marker, alpha=0.35, linewidths=0)
        errors = [
            [[value["mean"] - value["low"]], [value["high"] - value["mean"]]] if math.isfinite(value["low"]) else None
            for value in (point.x, point.y)
        ]
        ax.errorbar(
            point.x["mean"],
            point.y["mean"],
            xerr=errors[0],
            yerr=errors[1],
            fmt=point.marker,
            color=point.color,
            capsize=3,
            label=point.label,
        )
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(MaxNLocator())
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, alignment="left")
    _save(figure, path)


def plot_named(path: Path, title: str, names: Sequence[str], panels: Sequence[Panel]) -> None:
    """Writes one PNG of values that belong to names, not to steps: markers, with their intervals as bars.

    `steps` of the panels' series are places in `names`, from 0; levels are not drawn.
    """
    figure, axes = _figure(title, len(panels))
    for ax, panel in zip(axes, panels, strict=True):
        for number, curve in enumerate(panel.series):
            values = np.array(curve.values, float)
            bars = np.array([values - curve.low, curve.high - values]) if len(curve.low) else None
            shift = 0.16 * (number - (len(panel.series) - 1) / 2)
            places = np.array(curve.steps, float) + shift
            ax.errorbar(places, values, yerr=bars, fmt=curve.marker, color=curve.color, capsize=3, label=curve.label)
        ax.set_ylabel(panel.ylabel)
        if panel.share:
            ax.set_ylim(0, 1.03)
            ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        elif panel.from_zero:
            ax.set_ylim(bottom=0)
        _legends(ax, panel)
    axes[-1].set_xticks(range(len(names)), names, rotation=20)
    _save(figure, path)


_FEWEST_TO_SMOOTH = 10
"""Fewer values are joined as they are."""


def smooth(values: ArrayLike) -> np.ndarray:
    """Local linear regression with a tricube kernel over a sixth of the values (LOWESS, one pass).

    A line rather than a mean, so that the ends neither lag behind a trend nor hang on the last value. Values that are
    not finite have no weight; where fewer than two others are near the result is not-a-number.
    """
    y = np.asarray(values, float)
    x = np.arange(len(y), dtype=float)
    reach = max(3.0, len(y) / 12)
    smoothed = np.full(len(y), np.nan)
    for index in range(len(y)):
        near = slice(max(0, math.ceil(index - 2 * reach)), index + math.floor(2 * reach) + 1)
        # At the ends the window keeps its size, on one side.
        width = reach + max(0.0, reach - index, reach - (len(y) - 1 - index))
        weight = np.maximum(1 - np.abs((x[near] - index) / width) ** 3, 0) ** 3 * np.isfinite(y[near])
        if np.count_nonzero(weight) < 3:
            continue
        mean_x, mean_y = np.average(x[near], weights=weight), np.average(np.nan_to_num(y[near]), weights=weight)
        spread = weight * (x[near] - mean_x)
        slope = np.sum(spread * np.nan_to_num(y[near] - mean_y)) / np.sum(spread * (x[near] - mean_x))
        smoothed[index] = mean_y + slope * (index - mean_x)
    return smoothed


def _of_phases(rows: Rows, metric: str, phases: Sequence[str]) -> list[Series]:
    return [curve for phase in phases for curve in series(rows, metric, phase)]


def _figure(title: str, panels: int, height: float = 2.9) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(8.5, 0.9 + height * max(panels, 1.2)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0].tolist()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#E4E4E4", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _draw(ax: Axes, panel: Panel) -> None:
    for level in panel.levels:
        ax.axhspan(level.low, level.high, color=level.color, alpha=0.15, linewidth=0)
        ax.axhline(level.mean, color=level.color, linewidth=1.2, linestyle=(0, (5, 3)), label=level.label)
    size = 9 if max(len(curve.values) for curve in panel.series) <= 200 else 3
    for curve in panel.series:
        values = np.array(curve.values, float)
        if len(values) < 3:
            bars = np.array([values - curve.low, curve.high - values]) if len(curve.low) else None
            style = {"fmt": f"{curve.marker}-", "color": curve.color, "capsize": 3}
            ax.errorbar(curve.steps, values, yerr=bars, label=curve.label, **style)
            continue
        ax.scatter(curve.steps, values, s=size, color=curve.color, alpha=0.3, linewidths=0)
        smoothed = len(values) >= _FEWEST_TO_SMOOTH and not panel.joined
        line, low, high = (smooth(y) if smoothed else y for y in (values, curve.low, curve.high))
        if len(curve.low):
            ax.fill_between(curve.steps, low, high, color=curve.color, alpha=0.15, linewidth=0)
        ax.plot(curve.steps, line, curve.style, color=curve.color, linewidth=2, label=curve.label)
    ax.set_ylabel(panel.ylabel)
    if panel.share:
        ax.set_ylim(0, 1)
        ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    elif panel.from_zero:
        ax.set_ylim(bottom=0)
    if panel.note:
        ax.set_title(panel.note, loc="left", fontsize=9, color="#444444")
    _legends(ax, panel)


def _legends(ax: Axes, panel: Panel) -> None:
    """Beside the data: the curves, if there are several, and under them the levels."""
    handles = {handle.get_label(): handle for handle in ax.get_legend_handles_labels()[0]}
    curves = [handles[curve.label] for curve in panel.series if curve.label]
    levels = [handles[level.label] for level in panel.levels]
    if len(curves) + len(levels) < 2:
        return
    style = {"loc": "upper left", "frameon": False, "alignment": "left", "title_fontproperties": {"weight": "bold"}}
    legend = ax.legend(handles=curves, bbox_to_anchor=(1.01, 1), title=panel.series_title or None, **style)
    if levels:
        ax.add_artist(legend).set_clip_on(False)  # what is clipped to the axes gets no room in the layout
        below = 1 - 0.075 * (len(curves) + 2)
        ax.legend(handles=levels, bbox_to_anchor=(1.01, below), title=panel.levels_title or None, **style)


def _edges(positions: Sequence[int]) -> np.ndarray:
    """Borders of cells whose centres are `positions`."""
    if len(positions) == 1:
        return np.array([positions[0] - 0.5, positions[0] + 0.5])
    centres = np.array(positions, float)
    middles = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middles[0]], middles, [2 * centres[-1] - middles[-1]]])


def _phase_starts(rows: Rows) -> dict[str, int]:
    """Steps done in all phases before each phase, in the order in which the phases were logged."""
    last: dict[str, int] = {}
    for row in rows:
        last[row["phase"]] = max(last.get(row["phase"], 0), row["step"])
    ends = np.cumsum([0, *last.values()]).tolist()
    return dict(zip(last, ends, strict=False))


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
