"""Scaling laws: published values, coefficients recovered from synthetic runs, and what cannot be fitted refused."""

import dataclasses

import numpy as np
import pytest

from moe_jax.analysis.scaling_fit import (
    CHINCHILLA,
    COMPUTE_LAW,
    COMPUTE_POWER_LAW,
    FINE_GRAINED,
    JOINT,
    LEVERAGE,
    OPTIMAL_PARAMS,
    OPTIMAL_TOKENS,
    SPARSITY,
    FitError,
    efficiency_leverage,
    extrapolate,
    extrapolate_isoflop,
    fit,
    isoflop,
)
from moe_jax.analysis.scaling_law import PUBLISHED, Chinchilla, best_allocation

LAWS = {name: published.law for name, published in PUBLISHED.items()}
HOFFMANN, EPOCH = LAWS["chinchilla_hoffmann"], LAWS["chinchilla_epoch"]


# ---------------------------------------------------------------------------------------------------- published values


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (HOFFMANN.loss(1e9, 20e9), 2.5305),
        (EPOCH.loss(1e9, 20e9), 2.5301),
        (HOFFMANN.loss(70e9, 1.4e12), 1.9208),
        (EPOCH.loss(70e9, 1.4e12), 1.9739),
        (LAWS["fine_grained_dense"].loss(1e9, 20e9), 2.9803),
        (LAWS["joint_moe"].loss(1e9, 20e9, 1), 2.6141),
        (LAWS["joint_moe"].loss(1e9, 20e9, 8), 2.5132),
        (LAWS["joint_moe"].loss(1e9, 20e9, 32), 2.4513),
        (LAWS["sparsity"].loss(8e9, 20e9, 0), 2.3361),
        (LAWS["sparsity"].loss(8e9, 20e9, 0.9), 2.3925),
        (LAWS["sparsity"].loss(8e9, 20e9, 0.98), 2.5123),
        (LAWS["routed_s_base"].loss(1e9, 1), 2.2846),
        (LAWS["routed_s_base"].loss(1e9, 8), 2.1915),
        (LAWS["routed_s_base"].loss(1e9, 64), 2.0858),
        (LAWS["efficiency_leverage"].leverage(0.0625, 12, 1e22), 5.20),
        (LAWS["efficiency_leverage"].leverage(0.25, 12, 1e22), 2.36),
        (LAWS["efficiency_leverage"].leverage(1, 12, 1e22), 0.99),
        (LAWS["deepseek_llm"].learning_rate(1e20), 9.860e-4),
        (LAWS["deepseek_llm"].batch_tokens(1e20), 1.017e6),
        (LAWS["deepseek_llm"].flops_per_token(1e22), 5.873e10),
        (LAWS["deepseek_llm"].tokens(1e22), 1.703e11),
        (LAWS["ling_moe"].learning_rate(1e20), 1.013e-3),
        (LAWS["ling_moe"].batch_tokens(1e20), 1.347e6),
        (LAWS["ling_moe"].flops_per_token(1e20), 2.966e9),
        (LAWS["ling_moe"].tokens(1e20), 3.372e10),
    ],
)
def test_golden_values(value, expected):
    assert value == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("law", "flops", "params", "tokens"),
    [(EPOCH, 1e20, 8.535e8, 1.953e10), (EPOCH, 1e22, 9.045e9, 1.843e11), (HOFFMANN, 1e22, 6.336e9, 2.631e11)],
)
def test_golden_allocations(law, flops, params, tokens):
    best = law.optimum(flops)
    assert best.params == pytest.approx(params, rel=1e-3) and best.tokens == pytest.approx(tokens, rel=1e-3)
    searched = best_allocation(law.loss, flops)
    assert searched.params == pytest.approx(best.params, rel=1e-4)
    assert searched.loss == pytest.approx(best.loss, abs=1e-9)


def test_allocations_spend_the_budget():
    law, flops = LAWS["sparsity"], 1e21
    best = law.optimum(flops, 0.9, active_fraction=0.1)
    assert 6 * 0.1 * best.params * best.tokens == pytest.approx(flops)
    for factor in (0.9, 1.1):
        assert law.loss(best.params * factor, best.tokens / factor, 0.9) > best.loss


def test_what_the_papers_say_follows_from_their_coefficients():
    law = LAWS["efficiency_leverage"]
    assert 11 < law.best_granularity() < 12
    assert law.leverage(0.031, 12, 1e22) > 7, "Ling: more than 7 times at about 3 %"
    assert law.leverage(0.031, 12, 1e22) > law.leverage(0.031, 12, 1e20)
    # Krajewski: the losses predicted for 64 x 100M at G 8, and 64 x 1B at G 16, were 3.110 and 2.472.
    assert LAWS["fine_grained_moe"].loss(42.9e8, 4.37e9, 8) == pytest.approx(3.110, abs=2e-3)
    assert LAWS["fine_grained_moe"].loss(42.9e9, 28.94e9, 16) == pytest.approx(2.472, abs=2e-3)
    # Abnar: at equal FLOPs the best sparse model beats the best dense one.
    assert LAWS["sparsity"].optimum(1e20, 0.9, 0.1).loss < LAWS["sparsity"].optimum(1e20, 0, 1).loss


def test_every_published_law_says_where_it_is_from():
    for name, (_, reference, sourcing) in PUBLISHED.items():
        assert "arXiv:" in reference and sourcing, name
    assert "unverified" in PUBLISHED["joint_moe"].sourcing


# ---------------------------------------------------------------------------------------------------------------- fits


def synthetic(name: str, noise: float, runs: int = 150, seed: int = 0) -> dict[str, np.ndarray]:
    """Runs drawn from a published law: sizes and tokens per parameter log-uniform, the rest from a few values."""
    rng = np.random.default_rng(seed)
    params = 10 ** rng.uniform(7.5, 10.5, runs)
    tokens = params * 10 ** rng.uniform(0.3, 2.5, runs)
    columns, law = {"params": params, "tokens": tokens}, LAWS[name]
    if name == "efficiency_leverage":
        columns = {
            "activation_ratio": rng.choice([0.008, 0.016, 0.03, 0.06, 0.12, 0.25, 0.5], runs),
            "granularity": rng.choice([2.0, 4, 8, 12, 16, 32], runs),
            "flops": 10 ** rng.uniform(18, 22, runs),
        }
        columns["leverage"] = law.leverage(*columns.values()) * np.exp(noise * rng.normal(size=runs))
        return columns
    if name == "fine_grained_moe":
        columns["granularity"] = 2.0 ** rng.integers(0, 5, runs)
    elif name == "joint_moe":
        columns["experts"] = 2.0 ** rng.integers(0, 6, runs)
    elif name == "sparsity":
        columns["sparsity"] = rng.choice([0, 0.5, 0.75, 0.9, 0.95, 0.98], runs)
    rows = zip(*columns.values(), strict=True)
    columns["loss"] = np.array([float(law.loss(*row)) for row in rows]) * np.exp(noise * rng.normal(size=runs))
    return columns


# Interval widths allowed, relative to the value: irreducible loss and exponents; the other amplitudes follow them.
@pytest.mark.parametrize(
    ("form", "name", "widths"),
    [
        (CHINCHILLA, "chinchilla_epoch", {"E": 0.03, "alpha": 0.1, "beta": 0.1}),
        (CHINCHILLA, "chinchilla_hoffmann", {"E": 0.03, "alpha": 0.1, "beta": 0.1}),
        (FINE_GRAINED, "fine_grained_moe", {"c": 0.7, "alpha": 0.25, "beta": 0.15, "gamma": 0.5}),
        (JOINT, "joint_moe", {"c": 0.1, "alpha": 0.2, "beta": 0.2}),
        (LEVERAGE, "efficiency_leverage", {"a": 0.1, "d": 0.1, "A_start": 0.3}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_published_coefficients_are_recovered(form, name, widths):
    found = fit(form, synthetic(name, noise=0.003), bootstraps=60, confidence=0.99).coefficients
    for coefficient, interval in found.items():
        truth = getattr(LAWS[name], coefficient)
        assert interval.low <= truth <= interval.high, (coefficient, truth, interval)
        assert interval.low < interval.value < interval.high
    for coefficient, width in widths.items():
        interval = found[coefficient]
        assert (interval.high - interval.low) / abs(interval.value) < width, (coefficient, interval)


def test_sparsity_law_is_recovered_where_its_predictions_are():
    """Ten coefficients trade off against each other: the loss they predict is what runs determine."""
    runs = synthetic("sparsity", noise=0.001)
    found = fit(SPARSITY, runs, bootstraps=2)
    new = {name: column for name, column in synthetic("sparsity", noise=0, seed=1).items() if name != "loss"}
    assert np.allclose(found.predict(new).value, synthetic("sparsity", noise=0, seed=1)["loss"], rtol=3e-3)
    assert found.law.gamma == pytest.approx(LAWS["sparsity"].gamma, rel=0.2)
    assert found.law.delta == pytest.approx(LAWS["sparsity"].delta, rel=0.2)


def test_intervals_cover_as_often_as_they_say():
    covered = [
        interval.low <= getattr(EPOCH, name) <= interval.high
        for seed in range(8)
        for name, interval in fit(
            CHINCHILLA, synthetic("chinchilla_epoch", 0.003, runs=60, seed=seed), bootstraps=40, confidence=0.9
        ).coefficients.items()
    ]
    assert np.mean(covered) > 0.7


def test_exact_data_gives_exact_coefficients():
    found = fit(CHINCHILLA, synthetic("chinchilla_epoch", noise=0), bootstraps=2).law
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(EPOCH), rel=1e-3)


def test_gradients_are_those_of_the_values():
    for form, name in ((SPARSITY, "sparsity"), (LEVERAGE, "efficiency_leverage")):
        prepared = form.prepare({k: v for k, v in synthetic(name, 0, runs=5).items() if k in form.inputs})
        theta = np.linspace(0.1, 0.4, len(form.coefficients))
        _, jacobian = form.predict(theta, prepared)
        for p, step in enumerate(1e-6 * np.eye(len(theta))):
            difference = form.predict(theta + step, prepared)[0] - form.predict(theta - step, prepared)[0]
            assert np.allclose(jacobian[:, p], difference / 2e-6, atol=1e-6), form.coefficients[p]


def test_outliers_hardly_matter():
    runs = synthetic("chinchilla_epoch", noise=0.003)
    runs["loss"][:5] *= 1.5
    found = fit(CHINCHILLA, runs, bootstraps=2).law
    assert abs(found.E / EPOCH.E - 1) < 0.01 and abs(found.alpha / EPOCH.alpha - 1) < 0.1


def test_the_same_seed_gives_the_same_interval_and_progress_is_told():
    runs, told = synthetic("chinchilla_epoch", noise=0.003, runs=40), []
    first = fit(CHINCHILLA, runs, bootstraps=5, seed=3, progress=lambda done, total: told.append((done, total)))
    assert told == [(n, 5) for n in range(1, 6)]
    assert np.array_equal(fit(CHINCHILLA, runs, bootstraps=5, seed=3).samples, first.samples)
    assert not np.array_equal(fit(CHINCHILLA, runs, bootstraps=5, seed=4).samples, first.samples)


def test_strata_of_seeds_keep_every_configuration():
    """Two seeds of each configuration: the interval is that of the seeds' noise, about as wide as it should be."""
    rng, flops = np.random.default_rng(0), np.repeat(np.logspace(15, 19, 8), 2)
    noise = 0.01 * rng.normal(size=16)
    found = fit(
        COMPUTE_POWER_LAW, {"flops": flops, "loss": 50 * flops**-0.07 * np.exp(noise)}, strata=flops, bootstraps=300
    ).coefficients["alpha"]
    log = np.log(flops)
    expected = 2 * 1.96 * 0.01 / np.sqrt(((log - log.mean()) ** 2).sum())
    assert expected / 2 < found.high - found.low < 2 * expected
    with pytest.raises(FitError, match="every stratum has one run"):
        fit(COMPUTE_POWER_LAW, {"flops": flops, "loss": 50 * flops**-0.07}, strata=np.arange(16))


def test_the_published_table_of_optimal_sizes_gives_the_published_exponent():
    """Hoffmann et al., approach 1: N_opt ∝ C^0.50 and D_opt ∝ C^0.50."""
    table = {
        "params": [1e9, 10e9, 67e9, 175e9],
        "flops": [1.21e20, 1.23e22, 5.76e23, 3.85e24],
        "tokens": [20.2e9, 205.1e9, 1.5e12, 3.7e12],
    }
    for form in (OPTIMAL_PARAMS, OPTIMAL_TOKENS):
        exponent = fit(form, table, bootstraps=50, delta=10).coefficients["exponent"]
        assert exponent.value == pytest.approx(0.50, abs=0.01) and exponent.low <= 0.50 <= exponent.high


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda runs: {k: v[:4] for k, v in runs.items()}, "4 runs for the 5 coefficients"),
        (lambda runs: {**runs, "params": np.full(40, 1e8)}, "do not (determine|tell) .*A.*let params, tokens vary"),
        (lambda runs: {**runs, "params": runs["tokens"] / 20}, "do not (determine|tell) .*: let params, tokens vary"),
        (lambda runs: {k: v for k, v in runs.items() if k != "tokens"}, "no column tokens; they have params, loss"),
        (lambda runs: {**runs, "loss": np.where(np.arange(40) == 7, np.nan, 3)}, "loss of run 7 is nan"),
        (lambda runs: {**runs, "loss": runs["loss"][1:]}, r"differ in shape: .*loss \(39,\)"),
    ],
    ids=["few", "one_size", "one_ratio", "column", "diverged", "shape"],
)
def test_runs_that_determine_nothing_are_refused(change, message):
    runs = synthetic("chinchilla_epoch", noise=0.003, runs=40)
    with pytest.raises(FitError, match=message):
        fit(CHINCHILLA, change(runs), bootstraps=2)


# ------------------------------------------------------------------------------------------------- budgets and leverage


def ladder(law: Chinchilla, noise: float = 0.001, seeds: int = 3, steps=(-1.0, -0.5, 0.0, 0.5, 1.0), seed: int = 0):
    """Runs of five budgets, each with sizes around the law's best one."""
    rng = np.random.default_rng(seed)
    flops, step, _ = (x.ravel() for x in np.meshgrid(np.logspace(17, 21, 5), steps, range(seeds), indexing="ij"))
    params = law.optimum(flops).params * np.exp(step)
    tokens = flops / 6 / params
    loss = law.loss(params, tokens)
    return {
        "flops": flops,
        "params": params,
        "tokens": tokens,
        "loss": loss * np.exp(noise * rng.normal(size=len(loss))),
    }


def test_isoflop_finds_the_best_sizes_and_their_exponents():
    found = isoflop(ladder(EPOCH), bootstraps=100)
    assert not found.excluded and not found.failed
    for minimum in found.minima:
        best = EPOCH.optimum(minimum.flops)
        # A parabola is not the law's own curve: its vertex may be off by a little more than the noise.
        assert minimum.params.value == pytest.approx(best.params, rel=0.05)
        assert minimum.tokens.value == pytest.approx(best.tokens, rel=0.05)
        assert minimum.loss.value == pytest.approx(best.loss, rel=2e-3)
        assert minimum.params.low < minimum.params.value < minimum.params.high
        assert 6 * minimum.params.value * minimum.tokens.value == pytest.approx(minimum.flops, rel=0.01)
        a, b, _ = minimum.parabola
        assert np.exp(-b / (2 * a)) == pytest.approx(minimum.params.value, rel=1e-6)
    a = found.fit(OPTIMAL_PARAMS).coefficients["exponent"]
    b = found.fit(OPTIMAL_TOKENS).coefficients["exponent"]
    assert a.low <= EPOCH.beta / (EPOCH.alpha + EPOCH.beta) <= a.high and a.high - a.low < 0.03
    assert a.value + b.value == pytest.approx(1, abs=1e-3)
    loss = found.fit(COMPUTE_LAW).coefficients
    assert loss["alpha"].value == pytest.approx(EPOCH.alpha * EPOCH.beta / (EPOCH.alpha + EPOCH.beta), rel=0.1)


def test_isoflop_without_seeds_resamples_sizes():
    found = isoflop(ladder(EPOCH, seeds=1), bootstraps=50)
    assert all(m.params.low < m.params.value < m.params.high for m in found.minima)


def test_budgets_without_a_minimum_are_excluded_and_named():
    runs = ladder(EPOCH)
    largest = runs["flops"] == runs["flops"].max()
    shifted = {k: v.copy() for k, v in runs.items()}
    shifted["params"][largest] *= 20
    shifted["tokens"][largest] /= 20
    shifted["loss"][largest] = EPOCH.loss(shifted["params"][largest], shifted["tokens"][largest])
    found = isoflop(shifted, bootstraps=20)
    assert len(found.minima) == 4 and list(found.excluded) == [1e21]
    assert "add smaller models" in found.excluded[1e21]


def test_isoflop_refuses_too_few_sizes():
    for steps, seeds in (((-0.5, 0.5), 3), ((-0.5, 0.0, 0.5), 1)):
        with pytest.raises(FitError, match=r"a parabola with an interval needs 4, or 3 with two seeds each"):
            isoflop(ladder(EPOCH, steps=steps, seeds=seeds), bootstraps=5)
    two = {k: v[:30] for k, v in ladder(EPOCH).items()}
    with pytest.raises(FitError, match="2 budgets with a minimum for the 3 coefficients E, A, alpha: add budgets"):
        isoflop(two, bootstraps=5).fit(COMPUTE_LAW)


def test_leverage_between_two_families():
    """The sparse family behaves as a dense one with 3 times the compute, at every budget."""
    factor = 3.0
    sparse = ladder(EPOCH, seed=1)
    sparse["loss"] *= EPOCH.optimum(sparse["flops"] * factor).loss / EPOCH.optimum(sparse["flops"]).loss
    dense = isoflop(ladder(EPOCH), bootstraps=60).fit(COMPUTE_LAW)
    found = efficiency_leverage(dense, isoflop(sparse, bootstraps=60).fit(COMPUTE_LAW), np.logspace(17, 21, 5))
    assert np.allclose(found.leverage.value[1:4], factor, rtol=0.05)
    assert np.all((found.leverage.low < found.leverage.value) & (found.leverage.value < found.leverage.high))
    assert np.all(found.leverage.low[1:4] > 2.5) and np.all(found.leverage.high[1:4] < 3.6)
    assert found.extrapolated.tolist() == [False] * 4 + [True], "no dense run reached the largest sparse one's loss"
    with pytest.raises(FitError, match="compares laws of compute, not PowerLaw"):
        efficiency_leverage(isoflop(ladder(EPOCH), bootstraps=5).fit(OPTIMAL_PARAMS), dense, 1e18)


def test_leverage_is_infinite_below_the_dense_floor():
    def curve(floor: float):
        flops = np.logspace(17, 21, 12)
        noise = np.exp(1e-4 * np.random.default_rng(0).normal(size=12))
        return fit(COMPUTE_LAW, {"flops": flops, "loss": (floor + 500 * flops**-0.15) * noise}, bootstraps=20)

    found = efficiency_leverage(curve(2.0), curve(1.0), 1e30)
    assert np.isinf(found.leverage.value[0]) and found.extrapolated[0]


def test_extrapolation_says_what_was_predicted_and_seen():
    runs = ladder(EPOCH)
    found = extrapolate(CHINCHILLA, runs, bootstraps=40)
    assert len(found.seen.value) == 15 and found.fit.columns["params"].size == 60
    assert np.abs(found.relative_error).max() < 0.02 and found.covered.mean() > 0.8
    minimum = extrapolate_isoflop(OPTIMAL_PARAMS, runs, bootstraps=60)
    assert abs(minimum.relative_error[0]) < 0.1 and minimum.covered[0]
    assert extrapolate_isoflop(COMPUTE_POWER_LAW, runs, bootstraps=20).relative_error[0] < -0.02, (
        "a power law without a floor promises too much, and the report shows it"
    )


def test_extrapolation_needs_something_to_hold_out():
    one = {name: column[:15] for name, column in ladder(EPOCH).items()}
    with pytest.raises(FitError, match="15 of 15 runs are held out"):
        extrapolate(CHINCHILLA, one)
    with pytest.raises(FitError, match="there is one budget"):
        extrapolate_isoflop(COMPUTE_LAW, one)
