"""The stages of a pipeline as a table and as plots."""

from moe_jax.analysis.stages import plot_reinforcement, plot_stages, table


def entry(title, mean):
    figures = {"cons_at_4": 0.9, "mean_length": 12.25, "format": 1.0, "worked": 0.5, "language": 0.52, "readable": 0.09}
    interval = {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}
    return {"title": title, "pass_at_1": interval, "per_seed": [mean, mean + 0.05], **figures}


ENTRIES = {"base": entry("the base", 0.3), "zero": entry("R1-Zero", 0.8)}


def test_the_table_has_published_figures_where_there_are_any():
    head, _, base, zero = table(ENTRIES, "cons_at_4", {"AIME": {"zero": 77.9}}).splitlines()
    assert [cell.strip() for cell in head.split("|")[1:4]] == ["stage", "pass@1", "cons@4"] and "AIME" in head
    cells = [cell.strip() for cell in zero.split("|")[1:-1]]
    assert cells == ["R1-Zero", "0.800 ± 0.100", "0.900", "12.2", "1.00", "0.50", "0.52", "0.09", "77.9"]
    assert base.split("|")[-2].strip() == ""


def test_plots_are_written(tmp_path):
    plot_stages(tmp_path / "stages.png", ENTRIES, "cons_at_4", "latin")
    metrics = ("rewards/accuracy/mean", "rewards/readable/mean", "completions/mean_length")
    rows = [{name: 0.1 * step for name in metrics} for step in range(12)]
    plot_reinforcement(tmp_path / "reinforcement.png", {"R1-Zero": [rows, rows], "R1": [rows]})
    assert all((tmp_path / f"{name}.png").stat().st_size > 1000 for name in ("stages", "reinforcement"))
