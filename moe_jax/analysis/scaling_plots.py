"""Pictures of a ladder, as PNG files: loss over compute, IsoFLOP parabolas, efficiency leverage, loss over parameters.

Each run is a pale point. What has an interval shows it; where a law is drawn beyond the budgets it was fitted to, its
line is dashed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from moe_jax.analysis.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY

if TYPE_CHECKING:
    from moe_jax.analysis.scaling_report import Analysis, FamilyAnalysis, Finished

_COLORS = (BLUE, ORANGE, GREEN, PURPLE, SKY, GREY)
_MARKERS = ("o", "s", "^", "D", "v", "P")
_BPB = "bits per byte of held-out text"


def draw(folder: Path, analysis: Analysis) -> dict[Path, str]:
    """Writes the pictures that the analysis has something for, and returns them with their titles."""
    folder.mkdir(parents=True, exist_ok=True)
    families = [family for family in analysis.families if family.runs]
    if not families:
        return {}
    colors = {family.name: _COLORS[i % len(_COLORS)] for i, family in enumerate(families)}
    pictures = {
        "loss_over_compute": (_loss_over_compute(families, colors), "Loss over compute"),
        "isoflop": (_isoflop(families), "The best size of each budget"),
        "loss_over_parameters": (_loss_over_parameters(families, colors), "Loss over total and over active parameters"),
    }
    if any(comparison.leverage is not None for comparison in analysis.comparisons):
        pictures["efficiency_leverage"] = (_leverage(analysis, colors), "Efficiency leverage")
    written = {}
    for name, (figure, title) in pictures.items():
        path = folder / f"{name}.png"
        figure.savefig(path)
        written[path] = title
    return written


def _loss_over_compute(families: Sequence[FamilyAnalysis], colors: Mapping[str, str]) -> Figure:
    figure, (ax,) = _figure("Loss over training compute: every run, each budget's best size, and the law", 1, 5.2)
    for number, family in enumerate(families):
        color, shift = colors[family.name], 1.06 ** (number - (len(families) - 1) / 2)  # side by side
        flops = np.array([run.run.budget for run in family.runs]) * shift
        ax.scatter(flops, [run.loss for run in family.runs], s=12, color=color, alpha=0.3, linewidths=0)
        if family.minima:
            at = [minimum.flops * shift for minimum in family.minima.minima]
            loss, low, high = zip(*(minimum.loss for minimum in family.minima.minima), strict=True)
            error = [np.subtract(loss, low), np.subtract(high, loss)]
            style = {"fmt": _MARKERS[number % len(_MARKERS)], "color": color, "capsize": 3, "markersize": 5}
            ax.errorbar(at, loss, yerr=error, label=f"{family.name}: best size, 95 %", **style)
        if family.compute:
            seen = family.compute.columns["flops"]
            budgets = np.array([run.run.budget for run in family.runs])
            _law(ax, family, np.geomspace(budgets.min(), budgets.max(), 80), (seen.min(), seen.max()), color)
    ax.set_xlabel("training FLOPs")
    ax.set_ylabel(_BPB)
    _log_axes(ax)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False)
    return figure


def _law(ax: Axes, family: FamilyAnalysis, grid: np.ndarray, seen: tuple[float, float], color: str) -> None:
    assert family.compute is not None
    line = family.compute.predict({"flops": grid})
    inside = (grid >= seen[0] * 0.999) & (grid <= seen[1] * 1.001)
    ax.plot(grid, line.value, ":", color=color, linewidth=1.2)
    ax.plot(grid[inside], line.value[inside], "-", color=color, linewidth=1.8, label=f"{family.name}: law")
    ax.fill_between(grid, line.low, line.high, color=color, alpha=0.13, linewidth=0)


def _isoflop(families: Sequence[FamilyAnalysis]) -> Figure:
    title = "IsoFLOP parabolas: loss over size at each budget, with the best size's interval"
    figure, axes = _figure(title, len(families), 4.2)
    budgets = sorted({run.run.budget for family in families for run in family.runs})
    shades = dict(zip(budgets, colormaps["viridis"](np.linspace(0, 0.88, len(budgets))), strict=True))
    for ax, family in zip(axes, families, strict=True):
        found = {minimum.flops: minimum for minimum in (family.minima.minima if family.minima else ())}
        for budget in budgets:
            runs = [run for run in family.runs if run.run.budget == budget]
            if not runs:
                continue
            sizes = np.array([run.run.counts.active_non_embedding for run in runs], float)
            losses, color = np.array([run.loss for run in runs]), shades[budget]
            ax.scatter(sizes, losses, s=10, color=color, alpha=0.45, linewidths=0)
            means = [losses[sizes == size].mean() for size in np.unique(sizes)]
            ax.plot(np.unique(sizes), means, "o", color=color, markersize=4, label=f"{budget:.2g} FLOPs")
            if minimum := found.get(budget):
                grid = np.linspace(np.log(sizes.min()), np.log(sizes.max()), 100)
                ax.plot(np.exp(grid), np.polyval(minimum.parabola, grid), "-", color=color, linewidth=1.4)
                value, low, high = minimum.params
                error = [[value - low], [high - value]]
                ax.errorbar([value], [minimum.loss.value], xerr=error, fmt="*", color=color, markersize=11, capsize=3)
        ax.set_title(family.name, loc="left", fontsize=11)
        ax.set_ylabel(_BPB)
        _log_axes(ax)
        ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    axes[-1].set_xlabel("active parameters without embeddings")
    return figure


def _leverage(analysis: Analysis, colors: Mapping[str, str]) -> Figure:
    title = "Efficiency leverage: the reference's compute for the same loss, over the family's own"
    figure, (ax,) = _figure(title, 1, 4.4)
    for number, comparison in enumerate(analysis.comparisons):
        if comparison.leverage is None:
            continue
        flops, _, leverage, extrapolated = comparison.leverage
        value, low, high = (np.asarray(x, float) for x in leverage)
        top = np.nanmax(np.where(np.isfinite(value), value, np.nan)) if np.isfinite(value).any() else 1.0
        high = np.where(np.isfinite(high), high, 10 * top)  # an arrow off the picture
        color, marker = colors[comparison.name], _MARKERS[number % len(_MARKERS)]
        at = flops * 1.05**number
        ax.errorbar(at, value, yerr=[value - low, high - value], fmt="-", color=color, capsize=3, linewidth=1.4)
        for outside, face in ((False, color), (True, "white")):
            chosen = extrapolated == outside
            label = comparison.name + (" (extrapolated law)" if outside else "")
            if chosen.any():
                ax.plot(at[chosen], value[chosen], marker, color=color, markerfacecolor=face, label=label)
    ax.axhline(1, color="black", linewidth=1, linestyle=(0, (5, 3)))
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(10, subs=(1, 1.5, 2, 3, 5, 7)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("training FLOPs of the family")
    ax.set_ylabel("leverage (1: none), 95 % interval")
    ax.legend(frameon=False)
    return figure


def _loss_over_parameters(families: Sequence[FamilyAnalysis], colors: Mapping[str, str]) -> Figure:
    figure, axes = _figure("Loss over parameters: a line for each budget, darker for larger ones", 2, 4.2)
    budgets = sorted({run.run.budget for family in families for run in family.runs})
    titles = {"total": "all parameters", "active_non_embedding": "active parameters without embeddings"}
    for ax, (count, title) in zip(axes, titles.items(), strict=True):
        for number, family in enumerate(families):
            for place, budget in enumerate(budgets):
                sizes, means = _by_size([run for run in family.runs if run.run.budget == budget], count)
                style = {"color": colors[family.name], "alpha": 0.3 + 0.7 * (place + 1) / len(budgets)}
                label = family.name if budget == budgets[-1] else None
                ax.plot(sizes, means, marker=_MARKERS[number % len(_MARKERS)], markersize=4, label=label, **style)
        ax.set_xlabel(title)
        ax.set_ylabel(_BPB)
        _log_axes(ax)
    axes[0].legend(frameon=False)
    return figure


def _by_size(runs: Sequence[Finished], count: str) -> tuple[list[int], list[float]]:
    sizes = sorted({getattr(run.run.counts, count) for run in runs})
    means = [float(np.mean([run.loss for run in runs if getattr(run.run.counts, count) == size])) for size in sizes]
    return sizes, means


def _log_axes(ax: Axes) -> None:
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(10, subs=np.arange(1, 10, 0.5).tolist()))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _figure(title: str, panels: int, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(8.5, 0.7 + height * panels), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    axes = figure.subplots(panels, 1, squeeze=False)[:, 0].tolist()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#E4E4E4", linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, axes
