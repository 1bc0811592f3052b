"""Plots: which files a run's metrics lead to, and what the pictures show."""

import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from moe_jax.analysis.plots import (
    Level,
    Panel,
    Point,
    Series,
    plot_curves,
    plot_expert_load,
    plot_grpo,
    plot_named,
    plot_points,
    series,
    smooth,
)

PNG = b"\x89PNG\r\n\x1a\n"
EVALUATION = {"mean": 0.4, "low": 0.35, "high": 0.45}


@pytest.fixture
def figures(monkeypatch):
    """The figures as they were written, by file name; nothing is rendered."""
    written: dict[str, Figure] = {}
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: written.update({path.name: figure}))
    return written


def run_rows(beta: float = 0.0, steps: int = 6) -> list[dict]:
    rows = []
    for step in range(1, steps + 1):
        load = [[1.5, 0.5, 1.0], [1.0, 1.0, 1.0], [0.2, 2.6, 0.2]]
        moe = {"moe/expert_load": load, "moe/max_violation": 0.7}
        rows.append({"phase": "base", "step": step, "loss_main": 3 / step, "loss_mtp_1": 4 / step, **moe})
    for phase in ("grpo", "random_reward"):
        for step in range(1, steps + 1):
            row = {
                "phase": phase,
                "step": step,
                "reward": 0.1 * step,
                "entropy": 1 / step,
                "sampling/sampling_logp_difference/mean": 1e-6,
            }
            row |= {"rewards/accuracy/mean": 0.1 * step, "rewards/worked/mean": 0.5, "completions/mean_length": 9.0}
            row |= {"moe/expert_load": load[:2], "moe/max_violation": 0.3} | ({"kl": 0.01} if beta else {})
            rows.append(row)
    return rows + [{"phase": "control", "step": step, "loss": 1.0} for step in range(1, steps + 1)]


def labels(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if isinstance(text, Text)]


def test_writes_pngs(tmp_path):
    files = plot_grpo(run_rows(), tmp_path / "plots", {"before": EVALUATION, "after": EVALUATION})
    names = {"reward", "accuracy", "response_length", "entropy", "kl", "pretraining", "expert_load"}
    assert {file.name for file in files} == {f"{name}.png" for name in names}
    assert all(file.read_bytes().startswith(PNG) for file in files)


def test_what_was_not_logged_is_skipped(tmp_path, figures):
    assert plot_grpo([], tmp_path) == []
    assert [file.name for file in plot_grpo([{"phase": "base", "step": 1, "loss": 2.0}], tmp_path)] == [
        "pretraining.png"
    ]
    dense = [{k: v for k, v in row.items() if not k.startswith("moe/")} for row in run_rows() if row["phase"] == "grpo"]
    names = {file.name for file in plot_grpo(dense, tmp_path)}
    assert names == {"reward.png", "accuracy.png", "response_length.png", "entropy.png", "kl.png"}
    only_nan = [{"phase": "grpo", "step": 1, "reward": math.nan, "entropy": None}]
    assert plot_grpo(only_nan, tmp_path) == []


def test_accuracy_shows_controls_and_held_out_intervals(tmp_path, figures):
    plot_grpo(run_rows(), tmp_path, {"before": EVALUATION, "after": EVALUATION | {"mean": 0.81}, "control": EVALUATION})
    texts = labels(figures["accuracy.png"])
    expected = [
        "GRPO",
        "random reward",
        "before RL: 40.0 %",
        "after RL: 81.0 %",
        "after more supervised training: 40.0 %",
    ]
    assert set(expected) <= set(texts)
    assert not any("after random reward" in text for text in texts)
    assert figures["accuracy.png"].axes[0].get_ylim() == (0, 1)


def test_kl_or_a_word_on_why_there_is_none(tmp_path, figures):
    plot_grpo(run_rows(beta=0.04), tmp_path)
    assert figures["kl.png"].axes[0].get_ylabel() == "KL, k3 estimate (nats per token)"
    plot_grpo(run_rows(), tmp_path)
    assert any(text.startswith("No KL: beta = 0") for text in labels(figures["kl.png"]))
    assert "log-probability" in figures["kl.png"].axes[0].get_ylabel()


def test_expert_load_is_a_map_per_layer_with_blanks_where_a_layer_was_not_run(tmp_path, figures):
    assert plot_expert_load(run_rows(), tmp_path / "load.png")
    maps = [np.ma.filled(ax.collections[0].get_array(), np.nan) for ax in figures["load.png"].axes[:3]]
    assert [colors.shape for colors in maps] == [(3, 12)] * 3  # experts, steps of both phases; no controls
    np.testing.assert_allclose(2 ** maps[0][:, 0], [1.5, 0.5, 1.0])
    np.testing.assert_allclose(2 ** maps[2][:, 0], [0.25, 2.6, 0.25])  # cut off at a quarter
    assert np.isnan(maps[2][:, 6:]).all() and not np.isnan(maps[2][:, :6]).any()
    texts = labels(figures["load.png"])
    assert "pre-training" in texts and "GRPO" in texts and "random reward" not in texts


def test_deep_models_show_eight_layers_with_the_first_and_the_last(tmp_path, figures):
    rows = [{"phase": "base", "step": step, "moe/expert_load": [[1.0, 1.0]] * 58} for step in (10, 20)]
    assert plot_expert_load(rows, tmp_path / "load.png")
    names = [ax.get_ylabel() for ax in figures["load.png"].axes if "sparse layer" in ax.get_ylabel()]
    assert len(names) == 8
    assert names[0].startswith("sparse layer 1\n") and names[-1].startswith("sparse layer 58\n")


def test_curves_draws_points_lines_and_levels(tmp_path, figures):
    values = [1.0, math.nan, 2.0, 4.0]
    panel = Panel(
        "loss (nats)",
        [Series("a", range(4), values, "#000000"), Series("b", [0], [1.0], "#0072B2")],
        [Level("goal", 0.5, 0.4, 0.6, "#009E73")],
    )
    assert plot_curves(tmp_path / "x.png", "Title", [panel, Panel("nothing", [])], xlabel="tokens")
    axes = figures["x.png"].axes
    assert [(ax.get_xlabel(), ax.get_ylabel()) for ax in axes] == [("tokens", "loss (nats)")]
    assert {"a", "b", "goal"} <= set(labels(figures["x.png"]))
    assert not plot_curves(tmp_path / "y.png", "Title", [Panel("nothing", [])])
    assert "y.png" not in figures


def test_series_takes_one_phase_and_keeps_gaps():
    rows = [{"phase": "grpo", "step": 1, "kl": 0.1}, {"phase": "base", "step": 1, "kl": 9.0}]
    rows += [{"phase": "grpo", "step": 2}, {"phase": "grpo", "step": 3, "kl": math.nan}]
    (curve,) = series(rows, "kl", "grpo")
    assert list(curve.steps) == [1, 3] and curve.values[0] == 0.1 and math.isnan(curve.values[1])
    assert series(rows, "kl", "control") == []


def test_smoothing_keeps_lines_and_averages_noise():
    line = np.arange(40) * 0.5
    np.testing.assert_allclose(smooth(line), line, atol=1e-9)  # ends included: no lag, no hook
    noise = np.random.default_rng(0).normal(size=300)
    assert np.std(smooth(noise)) < 0.4
    gap = line.copy()
    gap[[3, 20]] = math.nan
    np.testing.assert_allclose(smooth(gap), line, atol=1e-9)
    assert np.isnan(smooth([1.0, math.nan])).all()


def test_a_band_lies_around_its_curve(tmp_path, figures):
    values = np.sin(np.arange(30.0))
    band = Series("a", range(30), values.tolist(), "#000000", low=(values - 1).tolist(), high=(values + 1).tolist())
    assert plot_curves(tmp_path / "x.png", "Title", [Panel("loss", [band], joined=True)])
    (ax,) = figures["x.png"].axes
    (line,) = ax.lines
    np.testing.assert_array_equal(line.get_ydata(), values)  # joined: not smoothed
    corners = ax.collections[1].get_paths()[0].vertices
    assert corners[:, 1].min() == values.min() - 1 and corners[:, 1].max() == values.max() + 1


def test_points_show_intervals_that_are_finite(tmp_path, figures):
    known, unknown = EVALUATION, {"mean": 0.2, "low": math.nan, "high": math.nan}
    points = [
        Point("a", known, known, [0.3, 0.5], [0.3, 0.5], "#000000"),
        Point("b", unknown, known, [], [], "#0072B2"),
    ]
    plot_points(tmp_path / "x.png", "Title", points, "violation", "loss")
    (ax,) = figures["x.png"].axes
    assert {"a", "b", "violation", "loss"} <= set(labels(figures["x.png"]))
    assert [(container.has_xerr, container.has_yerr) for container in ax.containers] == [(True, True), (False, True)]


def test_named_values_stand_over_their_names(tmp_path, figures):
    curves = [Series("a", range(2), [0.2, 0.4], "#000000", low=[0.1, 0.3], high=[0.3, 0.6])]
    curves.append(Series("b", range(2), [0.3, 0.5], "#0072B2"))
    plot_named(tmp_path / "x.png", "Title", ["zero", "dev1"], [Panel("share", curves, share=True)])
    (ax,) = figures["x.png"].axes
    assert [label.get_text() for label in ax.get_xticklabels()] == ["zero", "dev1"]
    assert [container.has_yerr for container in ax.containers] == [True, False]
    np.testing.assert_allclose([c.lines[0].get_xdata().mean() for c in ax.containers], [0.42, 0.58])
