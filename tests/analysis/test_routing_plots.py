"""Plots of routing: every shape of model leads to a picture, and unusual values break none."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from moe_jax.analysis.routing_plots import (
    plot_coactivation,
    plot_load,
    plot_saturation,
    plot_specialisation,
    plot_texts,
    plot_vocabulary,
    shown_layers,
)


def plot_all(folder, L: int, E: int) -> None:
    share_LE = np.full((L, E), 1 / E)
    share_LE[0] = np.eye(E)[0]  # all others are dead
    plot_load(folder / "load.png", share_LE, ["note"] * L)
    blank_LEE = np.full((L, E, E), np.nan)
    plot_coactivation(folder / "pairs.png", "Pairs", blank_LEE, blank_LEE, [("i", "j")] * L)
    tokens = ["'$'", "'$x$'", r"'\xe9'", "'\\n'"]
    plot_vocabulary(folder / "vocabulary.png", np.ones((L, 4, E)) / E, tokens, 2)
    plot_texts(folder / "texts.png", np.zeros((L, 2, E)), ["a$b$.txt", "b"])
    plot_specialisation(folder / "specialisation.png", np.ones(L), np.ones(L) / 2, np.ones(L) / 4, 0.5)
    plot_saturation(folder / "saturation.png", [5, 10], np.ones((L, 2)), [0.2, 0.3])


@pytest.mark.filterwarnings("error")
def test_unusual_values_break_no_picture(tmp_path):
    plot_all(tmp_path, 1, 4)
    assert len(list(tmp_path.glob("*.png"))) == 6


def test_of_many_layers_a_few_are_shown(tmp_path, monkeypatch):
    figures: dict[str, Figure] = {}
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.update({path.name: figure}))
    plot_all(tmp_path, 9, 8)
    titles = [ax.get_title(loc="left") for ax in figures["load.png"].axes]
    assert titles[0] == "sparse layer 1: note" and titles[-1] == "sparse layer 9: note" and len(titles) == 6
    assert len(figures) == 6


def test_colours_of_pairs_are_relative_to_chance(tmp_path, monkeypatch):
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    ratio_LEE = np.array([[[np.nan, 2.0], [0.0, 1.0]]])
    plot_coactivation(tmp_path / "pairs.png", "Pairs", np.zeros((1, 2, 2)), ratio_LEE, [("i", "j")])
    image = figures[0].axes[1].images[0].get_array()
    assert image is not None and image.mask.tolist() == [[True, False], [False, False]]
    assert image[0, 1] == 1 and image[1, 0] == -2 and image[1, 1] == 0  # log2; 0 is shown as a quarter


def test_shown_layers_have_both_ends():
    assert shown_layers(1) == [0] and shown_layers(3) == [0, 1, 2]
    assert len(shown_layers(58)) == 6 and {0, 57} <= set(shown_layers(58))
