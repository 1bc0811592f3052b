"""What the distillation experiment shows: a table of students, accuracy against compute, accuracy of their samples.

S seeds, T steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.analysis import plots
from moe_jax.analysis.plots import Level, Panel, Point, Series
from moe_jax.analysis.tables import markdown

TITLES = {
    "base": "student's base",
    "supervised": "more of the base's text",
    "logits": "distilled by logits",
    "sequences": "distilled by sequences",
    "on_policy": "distilled on-policy",
    "rl": "RL alone",
}


def table(summary: Mapping[str, Any]) -> str:
    """Each student's accuracy, its difference to RL alone within a seed, and what was spent, as Markdown."""

    def cell(interval: Mapping[str, float] | None, sign: str = "") -> str:
        if interval is None:
            return ""
        half = interval["high"] - interval["mean"]
        return f"{interval['mean']:{sign}.3f}" + (f" ± {half:.3f}" if math.isfinite(half) else "")

    rows = [["model", "pass@1", "− RL alone", "worked", "length", "student's TFLOPs", "teacher's TFLOPs for it"]]
    for name, entry in summary["students"].items():
        difference = "" if name == "rl" else cell(entry["against_rl"], "+")
        figures = [f"{entry['worked']:.2f}", f"{entry['mean_length']:.1f}"]
        spent = [f"{entry[f'{model}_flops'] / 1e12:.2f}" for model in ("student", "teacher")]
        rows.append([entry["title"], cell(entry["pass_at_1"]), difference, *figures, *spent])
    if (teacher := summary["teacher"]) is not None:
        known = teacher["training_flops"]
        training = "not known" if known is None else f"{known / 1e12:.2f}"
        rows.append(["teacher", f"{teacher['pass_at_1']['mean']:.3f}", "", "", "", "", f"{training} (its training)"])
    return markdown(rows)


def plot(folder: Path, summary: Mapping[str, Any], accuracies: Mapping[str, np.ndarray]) -> list[Path]:
    """Accuracy against compute, and the accuracy of the samples that the students draw while they learn.

    Args:
        folder: where the files go.
        summary: of the experiment.
        accuracies: [seeds, steps] of those samples, by the method's name.
    """

    colors = {
        "base": plots.GREY,
        "supervised": plots.ORANGE,
        "logits": plots.SKY,
        "sequences": plots.GREEN,
        "on_policy": plots.BLUE,
        "rl": plots.PURPLE,
    }
    files = [folder / f"{name}.png" for name in ("accuracy_and_compute", "accuracy_of_samples")]
    teacher = summary["teacher"]
    points = []
    for name, entry in summary["students"].items():
        spent = (entry["student_flops"] + entry["teacher_flops"]) / 1e12
        exactly = {"mean": spent, "low": math.nan, "high": math.nan}
        singles = entry["per_seed"]
        points.append(Point(entry["title"], exactly, entry["pass_at_1"], [spent] * len(singles), singles, colors[name]))
    plots.plot_points(
        files[0],
        "Students: means, 95 % intervals, single seeds",
        points,
        "TFLOPs of the student, and of the teacher for it (without the teacher's training)",
        "held-out pass@1",
    )
    curves = []
    for name, accuracy_ST in accuracies.items():
        band = [bound.tolist() for bound in (accuracy_ST.min(axis=0), accuracy_ST.max(axis=0))]
        steps, mean = range(1, accuracy_ST.shape[1] + 1), accuracy_ST.mean(axis=0).tolist()
        curves.append(Series(TITLES[name], steps, mean, colors[name], "-", *band))
    levels = []
    if teacher is not None:
        p = teacher["pass_at_1"]
        levels.append(Level(f"teacher: {100 * p['mean']:.1f} %", p["mean"], p["low"], p["high"], "black"))
    panel = Panel("accuracy", curves, levels, "samples of the student", "held-out pass@1", share=True)
    written = plots.plot_curves(files[1], "Samples that students learn from: mean and range of the seeds", [panel])
    return files if written else files[:1]
