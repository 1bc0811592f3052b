"""Plots of what a router does with a text, as PNG files: `python -m moe_jax inspect-routing`.

L layers, E experts, X rows of a heat map. Of many layers a few are shown, evenly spread; the tables have all.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike

from moe_jax.analysis.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, Level, Panel, Series, plot_curves

_MOST_LAYERS = 6


def plot_load(path: Path, share_LE: ArrayLike, notes: Sequence[str]) -> None:
    """Each expert's share of the assignments, a histogram per layer; `notes` says more of each layer."""
    share_LE = np.asarray(share_LE, float)
    E = share_LE.shape[1]
    shown = shown_layers(len(share_LE))
    figure, axes = _grid("Load of the experts", len(shown), 1, 8.5, 1.9)
    for ax, layer in zip(axes[:, 0], shown, strict=True):
        ax.bar(np.arange(E), share_LE[layer], color=BLUE, width=0.8)
        ax.axhline(1 / E, color="black", linewidth=1, linestyle=(0, (5, 3)), label="even share")
        if len(dead := np.flatnonzero(share_LE[layer] == 0)):
            ax.plot(dead, np.zeros(len(dead)), "x", color=ORANGE, clip_on=False, label="no token")
        ax.set_title(f"sparse layer {layer + 1}: {notes[layer]}", loc="left", fontsize=9)
        ax.set_ylabel("share")
        ax.set_xlim(-0.6, E - 0.4)
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0 if E <= 32 else 1, symbol=" %"))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(axis="y", color="#E4E4E4", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    handles = {handle.get_label(): handle for ax in axes[:, 0] for handle in ax.get_legend_handles_labels()[0]}
    figure.legend(handles=list(handles.values()), loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    axes[-1, 0].set_xlabel("expert")
    _save(figure, path)


def plot_coactivation(
    path: Path, title: str, share_LEE: ArrayLike, ratio_LEE: ArrayLike, labels: Sequence[tuple[str, str]]
) -> None:
    """Two heat maps a layer: the share of expert i's tokens that also use expert j, and its ratio to chance.

    Args:
        share_LEE: `routing.coactivation`.
        ratio_LEE: observed over expected counts of pairs. Not-a-number is left blank, in both.
        labels: for each layer what the rows and what the columns are.
    """
    share_LEE, ratio_LEE = np.asarray(share_LEE, float), np.asarray(ratio_LEE, float)
    shown = shown_layers(len(share_LEE))
    figure, axes = _grid(title, len(shown), 2, 8.5, 3.6)
    largest = float(np.nanmax(share_LEE[shown], initial=0)) or 1.0
    for row, layer in zip(axes, shown, strict=True):
        shares = row[0].imshow(share_LEE[layer], cmap="viridis", vmin=0, vmax=largest, interpolation="nearest")
        ratios = row[1].imshow(_log_ratio(ratio_LEE[layer]), cmap="PuOr_r", vmin=-2, vmax=2, interpolation="nearest")
        for ax in row:
            ax.set_facecolor("#DDDDDD")
            ax.set_ylabel(labels[layer][0])
            ax.set_xlabel(labels[layer][1])
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
            ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        bar = figure.colorbar(shares, ax=row[0], shrink=0.9)
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        _ratio_bar(figure, ratios, row[1])
    axes[0, 0].set_title("share of i's tokens that also use j", loc="left", fontsize=9)
    axes[0, 1].set_title("relative to independent choice", loc="left", fontsize=9)
    _save(figure, path)


def plot_vocabulary(
    path: Path,
    share_LXE: ArrayLike,
    tokens: Sequence[str],
    num_experts_per_token: int,
) -> None:
    """Which experts frequent tokens use, a heat map per layer, the tokens ordered by the expert that they use most.

    Args:
        share_LXE: share of token x's routings that go to expert e (`routing.specialisation`).
        tokens: their texts, [X].
        num_experts_per_token: K: no share exceeds 1/K, which is shown as 100 % of the token's occurrences.
    """
    used_LXE = np.asarray(share_LXE, float) * num_experts_per_token
    shown = shown_layers(len(used_LXE))
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = _grid("Experts of the most frequent tokens", rows, columns, 8.5, 0.9 + 0.15 * len(tokens))
    image = None
    for ax, layer in zip(axes.ravel(), shown, strict=False):
        used_XE = used_LXE[layer]
        order = np.lexsort((-np.max(used_XE, axis=1), np.argmax(used_XE, axis=1)))
        image = ax.imshow(used_XE[order], cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        ax.set_yticks(range(len(order)), [tokens[index] for index in order], fontsize=7, family="monospace")
        for label in ax.get_yticklabels():
            label.set_parse_math(False)  # a token may hold dollar signs
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlabel("expert")
        ax.set_title(f"sparse layer {layer + 1}", loc="left", fontsize=9)
    for ax in axes.ravel()[len(shown) :]:
        ax.set_visible(False)
    if image is not None:
        bar = figure.colorbar(
            image, ax=axes, label="share of the token's occurrences\nthat use the expert", aspect=30 * rows
        )
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    _save(figure, path)


def plot_texts(path: Path, ratio_LXE: ArrayLike, names: Sequence[str]) -> None:
    """How often each text uses each expert, relative to the mean of the texts: a heat map per layer.

    Not-a-number is left blank.
    """
    ratio_LXE = np.asarray(ratio_LXE, float)
    shown = shown_layers(len(ratio_LXE))
    figure, axes = _grid(
        "Experts of each text (1 = as in the mean of the texts)", len(shown), 1, 8.5, max(1.2, 0.6 + 0.3 * len(names))
    )
    image = None
    for ax, layer in zip(axes[:, 0], shown, strict=True):
        image = ax.imshow(
            _log_ratio(ratio_LXE[layer]), cmap="PuOr_r", vmin=-2, vmax=2, aspect="auto", interpolation="nearest"
        )
        ax.set_facecolor("#DDDDDD")
        ax.set_yticks(range(len(names)), names, fontsize=8)
        for label in ax.get_yticklabels():
            label.set_parse_math(False)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_title(f"sparse layer {layer + 1}", loc="left", fontsize=9)
    axes[-1, 0].set_xlabel("expert")
    _ratio_bar(figure, image, axes[:, 0].tolist())
    _save(figure, path)


def plot_specialisation(
    path: Path, information_L: ArrayLike, max_share_L: ArrayLike, chance_L: ArrayLike, limit: float
) -> None:
    """How much a token's id says of its experts, by layer; `limit` is the largest share there can be, 1/K."""
    layers = np.arange(1, len(np.asarray(information_L)) + 1).tolist()
    information = [float(value) for value in np.asarray(information_L)]
    share, chance = ([float(value) for value in np.asarray(x)] for x in (max_share_L, chance_L))
    panels = [
        Panel(
            "mutual information of token\nand expert (nats)", [Series("", layers, information, BLUE)], from_zero=True
        ),
        Panel(
            "largest share of a token's\nroutings to one expert",
            [Series("measured", layers, share, BLUE), Series("shuffled tokens (chance)", layers, chance, GREY)],
            [Level(f"one expert every time: {100 * limit:.3g} %", limit, limit, limit, ORANGE)],
            share=True,
        ),
    ]
    plot_curves(path, "Specialisation by token", panels, xlabel="sparse layer")


def plot_saturation(path: Path, steps: Sequence[int], share_LN: ArrayLike, chance_N: ArrayLike) -> None:
    """Share of the experts chosen at each of N checkpoints that the newest checkpoint also chooses, per layer."""
    share_LN = np.asarray(share_LN, float)
    colors = [BLUE, ORANGE, GREEN, PURPLE, SKY, "black"]
    curves = [
        Series(f"sparse layer {layer + 1}", steps, share_LN[layer].tolist(), color, style)
        for layer, color, style in zip(shown_layers(len(share_LN)), colors, ["-", "--"] * 3, strict=False)
    ]
    chance = Series("chance (mean of layers)", steps, np.asarray(chance_N, float).tolist(), GREY, ":")
    panel = Panel("experts also chosen by\nthe newest checkpoint", [*curves, chance], share=True)
    plot_curves(path, f"Router saturation: routing at each checkpoint against step {steps[-1]}", [panel])


def shown_layers(count: int) -> list[int]:
    """At most `_MOST_LAYERS` of `count` layers, counted from 0, the first and the last among them."""
    return sorted({round(x) for x in np.linspace(0, count - 1, min(count, _MOST_LAYERS)).tolist()})


def _log_ratio(ratio: np.ndarray) -> np.ndarray:
    # Logarithmic: half and twice the expectation are equally far from it.
    return np.log2(np.maximum(ratio, 0.25))


def _ratio_bar(figure: Figure, image: object, ax: Axes | list[Axes]) -> None:
    panels = len(ax) if isinstance(ax, list) else 1
    bar = figure.colorbar(image, ax=ax, shrink=0.9, aspect=20 * panels)  # pyright: ignore[reportArgumentType]
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["≤ ¼", "½", "1", "2", "≥ 4"])


def _grid(title: str, rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width, 0.8 + height * rows), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
