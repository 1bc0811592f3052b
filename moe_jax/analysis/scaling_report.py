"""What a ladder's runs say: scaling laws by family, the leverage of one over another, as Markdown, CSV and pictures.

No figure stands without an interval: what the runs do not determine is named, with what is missing. Losses are bits per
byte of the held-out text; sizes are active parameters without embeddings unless said otherwise.
"""

from __future__ import annotations

import csv
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.analysis.ladder import Planned
from moe_jax.analysis.scaling_fit import (
    CHINCHILLA,
    COMPUTE_LAW,
    COMPUTE_POWER_LAW,
    OPTIMAL_PARAMS,
    OPTIMAL_TOKENS,
    SPARSITY,
    Extrapolation,
    Fit,
    FitError,
    Form,
    Interval,
    IsoFLOP,
    LeverageCurve,
    Progress,
    efficiency_leverage,
    extrapolate,
    extrapolate_isoflop,
    fit,
    isoflop,
)
from moe_jax.analysis.seed_statistics import SeedInterval, mean_over_seeds
from moe_jax.analysis.tables import markdown

_BOOTSTRAPS = 500
_OF_ALL_RUNS = 0.4  # laws fitted to every run, not to minima alone, take this share of the resamples


@dataclass(frozen=True)
class Finished:
    """A run and its result: "bits_per_byte" and "seconds", or "diverged" with the reason."""

    run: Planned
    result: Mapping[str, Any]

    @property
    def loss(self) -> float:
        return self.result["bits_per_byte"]


@dataclass(frozen=True)
class FamilyAnalysis:
    """One family; a field is None where the runs do not determine it, and `reasons` says what is missing."""

    name: str
    runs: list[Finished]
    """Those that count: not diverged, and with the best learning rate and batch where these are swept."""
    minima: IsoFLOP | None = None
    compute: Fit | None = None
    best_params: Fit | None = None
    best_tokens: Fit | None = None
    chinchilla: Fit | None = None
    held_out_loss: Extrapolation | None = None
    held_out_params: Extrapolation | None = None
    held_out_runs: Extrapolation | None = None
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """A family against the reference."""

    name: str
    leverage: LeverageCurve | None
    paired: dict[float, SeedInterval]
    """By budget: difference in bits per byte at the same size and seed, mean over sizes, interval over seeds."""
    best: dict[float, Interval]
    """By budget: difference between the two families' best sizes."""
    reason: str = ""
    """Why there is no leverage."""


@dataclass(frozen=True)
class Analysis:
    families: list[FamilyAnalysis]
    comparisons: list[Comparison]
    diverged: list[Finished]
    swept: list[Finished]
    """Runs with a learning rate or batch that was not the best."""
    missing: list[str]
    sparsity: Fit | None
    reasons: dict[str, str]


def analyse(
    runs: Sequence[Finished],
    reference: str,
    missing: Sequence[str] = (),
    *,
    bootstraps: int = _BOOTSTRAPS,
    progress: Progress = lambda done, total: None,
) -> Analysis:
    """Fits everything to the runs.

    Args:
        runs: finished ones, diverged ones among them.
        reference: the family that the others are compared with.
        missing: names of runs that are planned and not finished.
        bootstraps: resamples that the minima's intervals come from.
        progress: called with (parts done, parts in all).
    """
    diverged = [run for run in runs if "diverged" in run.result]
    counted, swept = _best_of_sweep([run for run in runs if "diverged" not in run.result])
    names = list(dict.fromkeys(run.run.family for run in runs))
    groups = {name: [run for run in counted if run.run.family == name] for name in names}

    minima: dict[str, tuple[IsoFLOP | None, str]] = {}
    for name, members in groups.items():
        minima[name] = _try(functools.partial(isoflop, columns(members), bootstraps=bootstraps))
        progress(len(minima), 2 * len(names))
    laws, form = _compute_laws({name: found for name, (found, _) in minima.items()})
    families: list[FamilyAnalysis] = []
    fewer = round(_OF_ALL_RUNS * bootstraps)
    for name in names:
        law = laws.get(name, (None, "there are no minima to fit it to"))
        families.append(_family(name, groups[name], minima[name], law, form, fewer))
        progress(len(names) + len(families), 2 * len(names))
    by_name = {family.name: family for family in families}
    comparisons = [
        _compare(by_name[reference], family) for family in families if reference in by_name and family.name != reference
    ]
    sparsity, reason = _sparsity(counted, fewer // 2)
    reasons = {"sparsity": reason} if reason else {}
    return Analysis(families, comparisons, diverged, swept, list(missing), sparsity, reasons)


def columns(runs: Sequence[Finished], params: str = "active_non_embedding") -> dict[str, np.ndarray]:
    """Runs as columns for `scaling_fit`; `flops` is the budget, the same number for all runs of it."""
    return {
        "flops": np.array([run.run.budget for run in runs]),
        "params": np.array([float(getattr(run.run.counts, params)) for run in runs]),
        "tokens": np.array([float(run.run.tokens) for run in runs]),
        "loss": np.array([run.loss for run in runs]),
    }


def _best_of_sweep(runs: Sequence[Finished]) -> tuple[list[Finished], list[Finished]]:
    """Runs of the best learning rate and batch of each configuration, by the mean over seeds; and the others."""
    groups: dict[tuple, dict[tuple, list[Finished]]] = {}
    for run in runs:
        configuration = (run.run.budget, run.run.family, run.run.size)
        factors = (run.run.learning_rate_factor, run.run.batch_factor)
        groups.setdefault(configuration, {}).setdefault(factors, []).append(run)
    best, others = [], []
    for variants in groups.values():
        most = max(len(members) for members in variants.values())  # a variant that lost seeds is no candidate
        candidates = [members for members in variants.values() if len(members) == most]
        chosen = min(candidates, key=lambda members: np.mean([run.loss for run in members]))
        for members in variants.values():
            (best if members is chosen else others).extend(members)
    return best, others


def _try(find: Callable[[], Any]) -> tuple[Any, str]:
    """(result, "") or (None, why there is none)."""
    try:
        return find(), ""
    except FitError as error:
        return None, str(error)


def _compute_laws(minima: Mapping[str, IsoFLOP | None]) -> tuple[dict[str, tuple[Fit | None, str]], Form]:
    """Every family's law of compute in one form, for they are compared: with an irreducible loss, if the minima of all
    determine it, else the plain power law."""
    found = {name: value for name, value in minima.items() if value is not None}
    full = {name: _try(lambda value=value: value.fit(COMPUTE_LAW)) for name, value in found.items()}
    if full and all(law is not None and _determined(law) for law, _ in full.values()):
        return full, COMPUTE_LAW
    return {name: _try(lambda value=value: value.fit(COMPUTE_POWER_LAW)) for name, value in found.items()}, (
        COMPUTE_POWER_LAW
    )


def _determined(law: Fit) -> bool:
    """Whether the irreducible loss has an interval that is narrower than the loss itself."""
    irreducible = law.coefficients["E"]
    return irreducible.low > 0.05 * irreducible.value and irreducible.high < 2 * irreducible.value


def _family(
    name: str,
    runs: list[Finished],
    minima: tuple[IsoFLOP | None, str],
    compute: tuple[Fit | None, str],
    form: Form,
    bootstraps: int,
) -> FamilyAnalysis:
    if not runs:
        return FamilyAnalysis(name, runs, reasons={"runs": "all of its runs diverged or are missing"})
    data = columns(runs)
    strata = [f"{run.run.budget} {run.run.size}" for run in runs]
    best, no_best = minima

    def of_minima(law: Form) -> tuple[Fit | None, str]:
        return (None, no_best) if best is None else _try(functools.partial(best.fit, law))

    found: dict[str, tuple[Any, str]] = {
        "minima": minima,
        "compute": compute if best else (None, no_best),
        "best_params": of_minima(OPTIMAL_PARAMS),
        "best_tokens": of_minima(OPTIMAL_TOKENS),
        "chinchilla": _try(lambda: fit(CHINCHILLA, data, strata=strata, bootstraps=bootstraps)),
        "held_out_loss": _try(lambda: extrapolate_isoflop(form, data, bootstraps=bootstraps)),
        "held_out_params": _try(lambda: extrapolate_isoflop(OPTIMAL_PARAMS, data, bootstraps=bootstraps)),
        "held_out_runs": _try(lambda: extrapolate(CHINCHILLA, data, strata=strata, bootstraps=bootstraps)),
    }
    reasons = {what: why for what, (_, why) in found.items() if why}
    return FamilyAnalysis(name, runs, reasons=reasons, **{what: value for what, (value, _) in found.items()})


def _compare(reference: FamilyAnalysis, other: FamilyAnalysis) -> Comparison:
    paired, best = {}, {}
    losses = {(run.run.budget, run.run.size, run.run.seed): run.loss for run in reference.runs}
    differences: dict[float, dict[int, list[float]]] = {}
    for run in other.runs:
        key = (run.run.budget, run.run.size, run.run.seed)
        if key in losses:
            differences.setdefault(key[0], {}).setdefault(key[2], []).append(run.loss - losses[key])
    for budget, seeds in differences.items():
        most = max(map(len, seeds.values()))  # seeds that lack a size would shift the mean over sizes
        paired[budget] = mean_over_seeds([float(np.mean(values)) for values in seeds.values() if len(values) == most])
    if reference.minima and other.minima:
        ours, theirs = (
            {m.flops: (i, m) for i, m in enumerate(minima.minima)} for minima in (other.minima, reference.minima)
        )
        for budget in sorted(ours.keys() & theirs.keys()):
            (i, mine), (j, its) = ours[budget], theirs[budget]
            mine_R, its_R = other.minima.samples["loss"][:, i], reference.minima.samples["loss"][:, j]
            count = min(len(mine_R), len(its_R))
            low, high = np.quantile(mine_R[:count] - its_R[:count], [0.025, 0.975])
            best[budget] = Interval(mine.loss.value - its.loss.value, float(low), float(high))
    if reference.compute is None or other.compute is None:
        lacking = reference if reference.compute is None else other
        return Comparison(other.name, None, paired, best, f"{lacking.name}: {lacking.reasons.get('compute', '')}")
    budgets = [minimum.flops for minimum in other.minima.minima] if other.minima else []
    return Comparison(other.name, efficiency_leverage(reference.compute, other.compute, budgets), paired, best)


def _sparsity(runs: Sequence[Finished], bootstraps: int) -> tuple[Fit | None, str]:
    """Abnar's law of total parameters, tokens and sparsity, over the families that differ in sparsity."""
    ratios = sorted({round(run.run.activation_ratio, 4) for run in runs})
    if len(ratios) < 3:
        return None, (
            f"the families have {len(ratios)} activation ratios ({', '.join(f'{ratio:.3g}' for ratio in ratios)}), and"
            " the dependence on sparsity needs 3: add families such as sparse:activation_ratio=1/16"
        )
    data = columns(runs, "total") | {"sparsity": np.array([1 - run.run.activation_ratio for run in runs])}
    strata = [f"{run.run.budget} {run.run.size} {run.run.family}" for run in runs]
    return _try(lambda: fit(SPARSITY, data, strata=strata, bootstraps=bootstraps))


# ------------------------------------------------------------------------------------------------------------- report


def report(
    folder: Path,
    runs: Sequence[tuple[Planned, Mapping[str, Any]]],
    *,
    reference: str,
    missing: Sequence[str] = (),
    data: str = "",
    bootstraps: int = _BOOTSTRAPS,
    progress: Progress = lambda done, total: None,
) -> str:
    """Writes runs.csv, summary.json, plots/*.png and report.md, and returns the report's text."""
    from moe_jax.analysis.scaling_plots import draw

    finished = [Finished(run, result) for run, result in runs]
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "runs.csv", finished)
    analysis = analyse(finished, reference, missing, bootstraps=bootstraps, progress=progress)
    (folder / "summary.json").write_text(json.dumps(summary(analysis), indent=2) + "\n", encoding="utf-8")
    pictures = draw(folder / "plots", analysis)
    text = render(analysis, finished, reference, data)
    links = "\n\n".join(f"![{title}](plots/{path.name})" for path, title in pictures.items())
    (folder / "report.md").write_text(f"{text}\n\n## Pictures\n\n{links}\n", encoding="utf-8")
    return text


_CSV = {
    "family": lambda f: f.run.family,
    "size": lambda f: f.run.size,
    "budget": lambda f: f.run.budget,
    "seed": lambda f: f.run.seed,
    "bits_per_byte": lambda f: f.result.get("bits_per_byte", ""),
    "loss_nats_per_token": lambda f: f.result.get("loss", ""),
    "diverged": lambda f: f.result.get("diverged", ""),
    "flops": lambda f: f.run.flops,
    "flops_per_token": lambda f: f.run.flops_per_token,
    "tokens": lambda f: f.run.tokens,
    "parameters_total": lambda f: f.run.counts.total,
    "parameters_active": lambda f: f.run.counts.active,
    "parameters_active_non_embedding": lambda f: f.run.counts.active_non_embedding,
    "activation_ratio": lambda f: f.run.activation_ratio,
    "granularity": lambda f: f.run.granularity,
    "match_error_flops": lambda f: f.run.match_error["flops"],
    "match_error_active": lambda f: f.run.match_error["active"],
    "match_error_total": lambda f: f.run.match_error["total"],
    "learning_rate": lambda f: f.run.train.optimizer.learning_rate,
    "learning_rate_factor": lambda f: f.run.learning_rate_factor,
    "batch_size": lambda f: f.run.train.batch_size,
    "batch_factor": lambda f: f.run.batch_factor,
    "sequence_length": lambda f: f.run.train.sequence_length,
    "steps": lambda f: f.run.train.steps,
    "train_loss": lambda f: f.result.get("train_loss", ""),
    "max_violation": lambda f: f.result.get("moe/max_violation", ""),
    "seconds": lambda f: f.result.get("seconds", ""),
}


def write_csv(path: Path, runs: Sequence[Finished]) -> None:
    """A line for every run, diverged ones included."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_CSV)
        writer.writerows([value(run) for value in _CSV.values()] for run in runs)


def summary(analysis: Analysis) -> dict[str, Any]:
    """The report's figures for other programs: intervals as [value, low, high], None where one is not finite."""

    def numbers(interval: Any) -> list[Any]:
        values = np.stack([np.atleast_1d(np.asarray(x, float)) for x in interval], axis=-1)
        rows = [[float(x) if math.isfinite(x) else None for x in row] for row in values]
        return rows[0] if len(rows) == 1 else rows

    def law(found: Fit | None) -> dict[str, Any] | None:
        return None if found is None else {name: numbers(value) for name, value in found.coefficients.items()}

    def held_out(found: Extrapolation | None) -> dict[str, Any] | None:
        if found is None:
            return None
        return {
            "predicted": numbers(found.predicted),
            "seen": numbers(found.seen),
            "relative_error": found.relative_error.tolist(),
            "covered": found.covered.tolist(),
        }

    return {
        "families": {
            family.name: {
                "runs": len(family.runs),
                "minima": [
                    {"flops": m.flops, **{name: numbers(getattr(m, name)) for name in ("params", "tokens", "loss")}}
                    for m in (family.minima.minima if family.minima else ())
                ],
                **{
                    name: law(getattr(family, name)) for name in ("compute", "best_params", "best_tokens", "chinchilla")
                },
                **{
                    name: held_out(getattr(family, name))
                    for name in ("held_out_loss", "held_out_params", "held_out_runs")
                },
                "not_determined": family.reasons,
            }
            for family in analysis.families
        },
        "against_reference": {
            comparison.name: {
                "leverage": None
                if comparison.leverage is None
                else {
                    "flops": comparison.leverage.flops.tolist(),
                    "leverage": numbers(comparison.leverage.leverage),
                    "extrapolated": comparison.leverage.extrapolated.tolist(),
                },
                "bits_per_byte_same_size": {f"{b:.3g}": _jsonable(v) for b, v in comparison.paired.items()},
                "bits_per_byte_best_size": {f"{b:.3g}": numbers(v) for b, v in comparison.best.items()},
            }
            for comparison in analysis.comparisons
        },
        "sparsity": law(analysis.sparsity),
        "diverged": {run.run.name: run.result["diverged"] for run in analysis.diverged},
        "missing": analysis.missing,
    }


def _jsonable(interval: SeedInterval) -> dict[str, Any]:
    numbers = {"mean": interval["mean"], "low": interval["low"], "high": interval["high"]}
    finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    return {**finite, "seeds": interval["seeds"]}


def render(analysis: Analysis, runs: Sequence[Finished], reference: str, data: str) -> str:
    """The report as Markdown, without pictures."""
    parts = ["# Scaling curves", _overview(analysis, runs, data)]
    if analysis.comparisons:
        parts.append(f"## Against {reference}, at equal compute")
        parts += [_comparison(comparison, reference) for comparison in analysis.comparisons]
    else:
        parts.append("There is one family, and nothing to compare it with: add one to --plan.families.")
    parts.append("## The best size of each budget")
    parts += [_minima(analysis.families)]
    parts += ["## Laws, fitted to bits per byte", _laws(analysis)]
    parts += ["## The largest budget, predicted from the smaller ones", _held_out(analysis.families)]
    if unknown := _unknown(analysis):
        parts += ["## Not determined", unknown]
    return "\n\n".join(part for part in parts if part)


def _overview(analysis: Analysis, runs: Sequence[Finished], data: str) -> str:
    if not runs:
        return "No run is finished."
    budgets = sorted({run.run.budget for run in runs})
    seeds = sorted({run.run.seed for run in runs})
    by, worst = runs[0].run.match_by, max(abs(run.run.match_error[run.run.match_by]) for run in runs)
    hours = sum(run.result.get("seconds", 0.0) for run in runs) / 3600
    lines = [
        f"{len(runs)} runs, {len(budgets)} budgets from {budgets[0]:.3g} to {budgets[-1]:.3g} FLOPs, seeds"
        f" {', '.join(map(str, seeds))}, {hours:.2f} hours of training, trained on {data}. Losses are bits per byte of"
        " held-out text; intervals are of 95 %. Families are matched to the dense model of each size by"
        f" {by}, to within {worst:.1%}.",
    ]
    if analysis.swept:
        lines.append(f"{len(analysis.swept)} runs with other learning rates or batches were worse and are left out.")
        lines += _edges(runs, analysis)
    if analysis.diverged:
        lines.append(f"{len(analysis.diverged)} runs diverged and are left out:")
        lines.append("\n".join(f"- {run.run.name}: {run.result['diverged']}" for run in analysis.diverged))
    if analysis.missing:
        named = ", ".join(analysis.missing[:5]) + (" …" if len(analysis.missing) > 5 else "")
        lines.append(f"{len(analysis.missing)} planned runs are not finished and not in here: {named}.")
    return "\n\n".join(lines)


def _edges(runs: Sequence[Finished], analysis: Analysis) -> list[str]:
    """Says where the best of a sweep lies at its end."""
    lines = []
    for name, title in (("learning_rate_factor", "learning rate"), ("batch_factor", "batch")):
        tried = sorted({getattr(run.run, name) for run in runs})
        if len(tried) < 2:
            continue
        best = [getattr(run.run, name) for family in analysis.families for run in family.runs]
        ends = sum(factor in (tried[0], tried[-1]) for factor in best)
        lines.append(f"The best {title} lies at an end of the sweep in {ends} of {len(best)} runs that count.")
    return lines


def _comparison(comparison: Comparison, reference: str) -> str:
    name = comparison.name
    head = ["budget", "same size and seed", f"best {name} − best {reference}", "efficiency leverage", ""]
    rows = [[*head]]
    curve = comparison.leverage
    places = {} if curve is None else {float(flops): i for i, flops in enumerate(curve.flops)}
    for budget in sorted(comparison.paired.keys() | comparison.best.keys() | places.keys()):
        paired, best = comparison.paired.get(budget), comparison.best.get(budget)
        i = places.get(budget)
        rows.append(
            [
                f"{budget:.3g}",
                _seeds(paired) if paired else "–",
                _interval(best, "+.3f") if best else "–",
                "–" if curve is None or i is None else _interval(Interval(*(x[i] for x in curve.leverage)), ".2f"),
                "extrapolated" if curve is not None and i is not None and curve.extrapolated[i] else "",
            ]
        )
    text = f"### {name}\n\nDifferences in bits per byte, below 0 {name} is better; the leverage is the compute that"
    text += f" {reference} needs for the same loss over that of {name}.\n\n{markdown(rows)}"
    return (
        text
        + (f"\n\nNo efficiency leverage: {comparison.reason}" if comparison.reason else "")
        + _verdict(comparison, reference)
    )


def _verdict(comparison: Comparison, reference: str) -> str:
    """One sentence on the largest budget that has a paired difference with an interval."""
    known = {b: i for b, i in comparison.paired.items() if math.isfinite(i["low"])}
    if not known:
        return "\n\nWith one seed nothing can be said of the difference at equal size: add seeds."
    budget = max(known)
    found = known[budget]
    if found["high"] < 0:
        word = "is better"
    elif found["low"] > 0:
        word = "is worse"
    else:
        word = "is not told apart"
    than = f"from {reference}" if word == "is not told apart" else f"than {reference}"
    return (
        f"\n\nAt {budget:.3g} FLOPs, same sizes, {comparison.name} {word} {than}: {_seeds(found)} bits per byte over"
        f" {found['seeds']} seeds."
    )


def _minima(families: Sequence[FamilyAnalysis]) -> str:
    rows = [["family", "budget", "best active params", "tokens", "tokens per param", "bits per byte"]]
    for family in families:
        for m in family.minima.minima if family.minima else ():
            ratio = m.tokens.value / m.params.value
            rows.append(
                [
                    family.name,
                    f"{m.flops:.3g}",
                    _interval(m.params, "short"),
                    _interval(m.tokens, "short"),
                    f"about {ratio:.2g}",
                    _interval(m.loss, ".4f"),
                ]
            )
    if len(rows) == 1:
        return "No budget has a minimum among the sizes tried; see below."
    noise = "Intervals are of the runs' noise alone, not of how far the loss is from a parabola in ln N."
    return f"{markdown(rows)}\n\n{noise}"


_LAW_TITLES = {
    "compute": "best loss of a budget",
    "best_params": "best size, N = scale · C^exponent",
    "best_tokens": "best tokens, D = scale · C^exponent",
    "chinchilla": "L = E + A / N^alpha + B / D^beta",
}


def _laws(analysis: Analysis) -> str:
    rows = [["family", "law", "coefficients"]]
    for family in analysis.families:
        for what, title in _LAW_TITLES.items():
            if found := getattr(family, what):
                if what == "compute":
                    title += ", L = E + A / C^alpha" if "E" in found.coefficients else ", L = A / C^alpha"
                rows.append([family.name, title, _coefficients(found)])
    if analysis.sparsity:
        rows.append(["all", "Abnar's law of total params, tokens, sparsity", _coefficients(analysis.sparsity)])
    return markdown(rows) if len(rows) > 1 else "None is determined; see below."


def _coefficients(found: Fit) -> str:
    return ", ".join(f"{name} {_interval(value, '.3g')}" for name, value in found.coefficients.items())


def _held_out(families: Sequence[FamilyAnalysis]) -> str:
    rows = [["family", "what", "predicted", "seen", "error", "intervals meet"]]
    for family in families:
        for found, what, style in (
            (family.held_out_loss, "loss of the best size", ".4f"),
            (family.held_out_params, "best size", "short"),
        ):
            if found:
                predicted, seen = (Interval(*(np.ravel(x)[0] for x in y)) for y in (found.predicted, found.seen))
                error, met = f"{found.relative_error[0]:+.1%}", "yes" if found.covered[0] else "no"
                rows.append([family.name, what, _interval(predicted, style), _interval(seen, style), error, met])
        if found := family.held_out_runs:
            low, high = found.relative_error.min(), found.relative_error.max()
            seen = np.asarray(found.seen.value)
            rows.append(
                [
                    family.name,
                    f"its {len(seen)} runs, by the law of N and D",
                    f"{np.min(found.predicted.value):.3f} to {np.max(found.predicted.value):.3f}",
                    f"{seen.min():.3f} to {seen.max():.3f}",
                    f"{low:+.1%} to {high:+.1%}",
                    f"{found.covered.sum()} of {len(seen)}",
                ]
            )
    return markdown(rows) if len(rows) > 1 else "Not possible with these runs; see below."


def _unknown(analysis: Analysis) -> str:
    titles = _LAW_TITLES | {
        "runs": "runs",
        "minima": "IsoFLOP minima",
        "held_out_loss": "prediction of the largest budget's loss",
        "held_out_params": "prediction of the largest budget's best size",
        "held_out_runs": "prediction of the largest budget's runs",
    }
    lines: list[str] = []
    for family in analysis.families:
        lines += [f"- {family.name}, {titles[what]}: {why}" for what, why in family.reasons.items()]
        excluded = family.minima.excluded if family.minima else {}
        lines += [f"- {family.name}, {budget:.3g} FLOPs: {why}" for budget, why in excluded.items()]
        if family.compute is not None and family.compute.form is COMPUTE_POWER_LAW:
            lines.append(
                f"- {family.name}, irreducible loss: these budgets do not determine it for all families; the law of"
                " compute has none, and must not be used far beyond them"
            )
    return "\n".join(lines + [f"- {what}: {why}" for what, why in analysis.reasons.items()])


def _interval(interval: Any, style: str) -> str:
    show = short if style == "short" else (lambda x: "∞" if math.isinf(x) else format(x, style))
    value, low, high = (float(x) for x in interval)
    return f"{show(value)} [{show(low)}, {show(high)}]"


def _seeds(interval: SeedInterval) -> str:
    if not math.isfinite(interval["low"]):
        return "one seed"
    return f"{interval['mean']:+.3f} [{interval['low']:+.3f}, {interval['high']:+.3f}]"


def short(number: float) -> str:
    """1.23 M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size * 0.9995:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"
