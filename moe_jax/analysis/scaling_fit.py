"""Fits of scaling laws to runs, each with an interval from a bootstrap over runs.

Runs are columns: a mapping from names ("params", "tokens", "flops", "loss", ...) to arrays of one value per run. Fits
minimise the Huber loss of residuals in log space from several starts, by L-BFGS with exact gradients, as Hoffmann et
al. (arXiv:2203.15556, appendix D.2) and its re-analysis (Besiroglu et al., arXiv:2404.10102) do: summed over runs and
run to convergence, since the mean of these tiny losses stops the optimizer early. What runs do not determine is an
error that says so, never a number without an interval.

Shapes: n runs, P parameters, T terms of a sum, Q exponents, R bootstrap resamples, B budgets.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import solve_triangular
from scipy.optimize import minimize, nnls

from moe_jax.analysis.scaling_law import Chinchilla, ComputeLaw, FineGrained, Joint, Leverage, PowerLaw, Sparsity

Array = NDArray[np.float64]
Columns = Mapping[str, Array]
Runs = Mapping[str, ArrayLike]
Progress = Callable[[int, int], None]
"""Called with (resamples done, resamples in all)."""

_CONFIDENCE = 0.95
_STARTS = 12  # of a form's starting points, the best by least squares are polished
_ROUNDS = 8  # L-BFGS is run anew, with a new scaling, until it gains nothing
# A singular value of the unit columns' Jacobian below which parameters cannot be told apart. Seen where the runs
# determine them: 2e-3 and more; where they had one mix of inputs: up to 4e-5, wherever in the valley a fit had ended.
_DEGENERATE = 2e-4


class FitError(ValueError):
    """Runs that do not determine what is asked of them: the message says what is missing."""


class Interval(NamedTuple):
    """A value and its interval (95 % unless asked otherwise), each a number or an array."""

    value: Any
    low: Any
    high: Any


# ------------------------------------------------------------------------------------------------------------- forms


class Form(Protocol):
    """A law to fit: log y as a function of unconstrained parameters θ, its gradient, and where to start."""

    @property
    def inputs(self) -> tuple[str, ...]: ...

    @property
    def target(self) -> str: ...

    @property
    def coefficients(self) -> tuple[str, ...]: ...

    def prepare(self, columns: Columns) -> Any:
        """What `predict` needs of the runs, computed once."""
        ...

    def rows(self, prepared: Any, index: NDArray[np.int64]) -> Any: ...

    def predict(self, theta: Array, prepared: Any) -> tuple[Array, Array]:
        """log y [n] and its Jacobian [n, P]."""
        ...

    def starts(self, prepared: Any, log_y: Array) -> list[Array]: ...

    def natural(self, theta: Array) -> Array:
        """[..., P] parameters as the papers print them."""
        ...

    def law(self, values: Mapping[str, float]) -> Any: ...


@dataclass(frozen=True)
class PowerSum:
    """y = Σ_t amplitude_t · exp(Σ_q exponent_q · feature_tq): every law here but efficiency leverage.

    θ is the amplitudes' logarithms and the exponents, and log y the log-sum-exp of terms that are linear in θ.
    """

    make: Callable[..., Any]
    """The law's class; its fields are the amplitudes and exponents."""
    inputs: tuple[str, ...]
    terms: dict[str, dict[str, Callable[[Columns], Array]]]
    """amplitude → exponent → feature of the runs."""
    grid: dict[str, tuple[float, ...]]
    """Exponent → values to start from; the amplitudes' starts follow by non-negative least squares."""
    target: str = "loss"

    @property
    def coefficients(self) -> tuple[str, ...]:
        return (*self.terms, *self.grid)

    def prepare(self, columns: Columns) -> Array:
        n = len(next(iter(columns.values())))
        x_nTQ = np.zeros((n, len(self.terms), len(self.grid)))
        for t, features in enumerate(self.terms.values()):
            for exponent, feature in features.items():
                x_nTQ[:, t, list(self.grid).index(exponent)] = feature(columns)
        return x_nTQ

    def rows(self, prepared: Array, index: NDArray[np.int64]) -> Array:
        return prepared[index]

    def predict(self, theta: Array, prepared: Array) -> tuple[Array, Array]:
        t = len(self.terms)
        logs_nT = prepared @ theta[t:] + theta[:t]
        top_n = logs_nT.max(axis=1)
        shares_nT = np.exp(logs_nT - top_n[:, None])
        total_n = shares_nT.sum(axis=1)
        shares_nT /= total_n[:, None]
        return top_n + np.log(total_n), np.hstack([shares_nT, np.einsum("nt,ntq->nq", shares_nT, prepared)])

    def starts(self, prepared: Array, log_y: Array) -> list[Array]:
        found = []
        for exponents in itertools.product(*self.grid.values()):
            # Terms relative to the target, each scaled to 1 at its largest: well-conditioned least squares.
            logs_nT = prepared @ np.array(exponents) - log_y[:, None]
            shift_T = logs_nT.max(axis=0)
            amplitudes_T, error = nnls(np.exp(logs_nT - shift_T), np.ones(len(log_y)))
            log_amplitudes_T = np.log(np.maximum(amplitudes_T, 1e-3)) - shift_T
            found.append((error, np.array([*log_amplitudes_T, *exponents])))
        found.sort(key=lambda start: start[0])
        return [theta for _, theta in found[:_STARTS]]

    def natural(self, theta: Array) -> Array:
        t = len(self.terms)
        return np.concatenate([np.exp(theta[..., :t]), theta[..., t:]], axis=-1)

    def law(self, values: Mapping[str, float]) -> Any:
        return self.make(**values)


@dataclass(frozen=True)
class LeverageForm:
    """Ling's efficiency leverage (see `scaling_law.Leverage`), fitted to measured leverages; θ holds log A_start."""

    inputs: tuple[str, ...] = ("activation_ratio", "granularity", "flops")
    target: str = "leverage"
    coefficients: tuple[str, ...] = ("a", "d", "gamma", "beta", "A_start")

    def prepare(self, columns: Columns) -> tuple[Array, Array]:
        log_g = np.log2(columns["granularity"])
        x_n4 = np.stack([np.ones_like(log_g), np.log10(columns["flops"]), log_g**2, log_g], axis=1)
        return columns["activation_ratio"], x_n4

    def rows(self, prepared: tuple[Array, Array], index: NDArray[np.int64]) -> tuple[Array, Array]:
        return prepared[0][index], prepared[1][index]

    def predict(self, theta: Array, prepared: tuple[Array, Array]) -> tuple[Array, Array]:
        ratio_n, x_n4 = prepared
        exponent_n, start = x_n4 @ theta[:4], np.exp(theta[4])
        log_ratio_n = np.log(ratio_n + start)
        jacobian = np.column_stack([log_ratio_n[:, None] * x_n4, exponent_n * start / (ratio_n + start)])
        return exponent_n * log_ratio_n, jacobian

    def starts(self, prepared: tuple[Array, Array], log_y: Array) -> list[Array]:
        ratio_n, x_n4 = prepared
        found = []
        for start in ratio_n.min() * np.array([0.03, 0.1, 0.3, 1.0, 3.0]):
            design = np.log(ratio_n + start)[:, None] * x_n4
            found.append(np.array([*np.linalg.lstsq(design, log_y, rcond=None)[0], np.log(start)]))
        return found

    def natural(self, theta: Array) -> Array:
        return np.concatenate([theta[..., :4], np.exp(theta[..., 4:])], axis=-1)

    def law(self, values: Mapping[str, float]) -> Leverage:
        return Leverage(**values)


def _log(name: str, sign: float = 1.0) -> Callable[[Columns], Array]:
    return lambda columns: sign * np.log(columns[name])


def _log_dense(columns: Columns) -> Array:
    return -np.log1p(-columns["sparsity"])


_EXPONENTS = (0.1, 0.2, 0.35, 0.6, 1.0)

COMPUTE_POWER_LAW = PowerSum(ComputeLaw, ("flops",), {"A": {"alpha": _log("flops", -1)}}, {"alpha": _EXPONENTS})
"""L = A / C^α."""

COMPUTE_LAW = PowerSum(
    ComputeLaw, ("flops",), {"E": {}, "A": {"alpha": _log("flops", -1)}}, {"alpha": (0.02, 0.05, *_EXPONENTS)}
)
"""L = E + A / C^α."""

CHINCHILLA = PowerSum(
    Chinchilla,
    ("params", "tokens"),
    {"E": {}, "A": {"alpha": _log("params", -1)}, "B": {"beta": _log("tokens", -1)}},
    {"alpha": _EXPONENTS, "beta": _EXPONENTS},
)

FINE_GRAINED = PowerSum(
    FineGrained,
    ("params", "tokens", "granularity"),
    {
        "c": {},
        "g": {"gamma": _log("granularity", -1), "alpha": _log("params", -1)},
        "a": {"alpha": _log("params", -1)},
        "b": {"beta": _log("tokens", -1)},
    },
    {"gamma": (0.3, 0.6, 1.0), "alpha": (0.07, *_EXPONENTS), "beta": (0.07, *_EXPONENTS)},
)

JOINT = PowerSum(
    Joint,
    ("params", "tokens", "experts"),
    {
        "a": {
            "delta": _log("experts"),
            "alpha": _log("params"),
            "gamma": lambda columns: np.log(columns["experts"]) * np.log(columns["params"]),
        },
        "b": {
            "omega": _log("experts"),
            "beta": _log("tokens"),
            "zeta": lambda columns: np.log(columns["experts"]) * np.log(columns["tokens"]),
        },
        "c": {},
    },
    {
        "delta": (-0.3, 0.0),
        "alpha": tuple(-x for x in _EXPONENTS),
        "gamma": (0.0,),
        "omega": (0.0, 0.5),
        "beta": tuple(-x for x in _EXPONENTS),
        "zeta": (-0.02, 0.0),
    },
)
"""`params` are the active ones, `experts` is Ê."""

SPARSITY = PowerSum(
    Sparsity,
    ("params", "tokens", "sparsity"),
    {
        "a": {"alpha": _log("params", -1)},
        "b": {"beta": _log("tokens", -1)},
        "c": {"lambda_": _log_dense},
        "d": {"delta": _log_dense, "gamma": _log("params", -1)},
        "e": {},
    },
    {
        "alpha": (0.3, 0.6, 1.0),
        "beta": (0.2, 0.4, 0.7),
        "lambda_": (-0.3, -0.1),
        "delta": (0.1, 0.3),
        "gamma": (0.1, 0.2, 0.35),
    },
)
"""`params` are all of them, routed experts included."""

LEVERAGE = LeverageForm()


# --------------------------------------------------------------------------------------------------------------- fit


@dataclass(frozen=True)
class Fit:
    """A law's coefficients, with those of the bootstrap's resamples."""

    form: Form
    theta: Array
    """[P]."""
    samples: Array
    """[R, P]."""
    residuals: Array
    """[n] log(seen / fitted)."""
    columns: dict[str, Array] = field(repr=False)
    """The runs' inputs."""
    confidence: float
    unconverged: int
    """Resamples left out, since their fit did not converge."""
    seed: int

    @property
    def coefficients(self) -> dict[str, Interval]:
        values, samples = self.form.natural(self.theta), self.form.natural(self.samples)
        low, high = _quantiles(samples, self.confidence)
        names = self.form.coefficients
        return {name: Interval(*map(float, row)) for name, *row in zip(names, values, low, high, strict=True)}

    @property
    def law(self) -> Any:
        """The fitted law, of the class in `scaling_law.py`."""
        return self.form.law({name: interval.value for name, interval in self.coefficients.items()})

    def laws(self) -> list[Any]:
        """One law per resample: the interval of any figure that follows from a law is that of its values here."""
        names = self.form.coefficients
        return [
            self.form.law(dict(zip(names, map(float, row), strict=True))) for row in self.form.natural(self.samples)
        ]

    def predict(self, columns: Runs, new_run: bool = False) -> Interval:
        """The law's values [m] at other inputs, and their intervals.

        Args:
            columns: the form's inputs, [m] each.
            new_run: the interval of one more run, which has noise of its own (the fit's residuals, resampled), and not
                of the law alone.
        """
        prepared = self.form.prepare(_columns(columns, self.form.inputs))
        logs_Rm = np.stack([self.form.predict(theta, prepared)[0] for theta in self.samples])
        if new_run:
            noise = np.random.default_rng([self.seed, 1]).choice(self.residuals, logs_Rm.shape)
            # A fit of P parameters leaves residuals smaller than the noise by √((n - P) / n).
            logs_Rm = logs_Rm + noise * np.sqrt(len(self.residuals) / max(len(self.residuals) - len(self.theta), 1))
        low, high = _quantiles(np.exp(logs_Rm), self.confidence)
        return Interval(np.exp(self.form.predict(self.theta, prepared)[0]), low, high)


def fit(
    form: Form,
    runs: Runs,
    *,
    strata: ArrayLike | None = None,
    bootstraps: int = 1000,
    seed: int = 0,
    delta: float = 1e-3,
    confidence: float = _CONFIDENCE,
    progress: Progress | None = None,
) -> Fit:
    """Fits a law and its interval.

    Args:
        form: the law, e.g. `CHINCHILLA`.
        runs: its inputs and its target, [n] each.
        strata: [n] labels; runs are resampled among those of the same label. Without labels all runs are one stratum.
            A stratum of runs that differ in their seed alone keeps its mean, and their spread is corrected for their
            number.
        bootstraps: resamples R.
        seed: of the resamples: the same seed gives the same interval.
        delta: where the Huber loss of log residuals turns from square to linear; 1e-3 as published.
        confidence: of the intervals.
        progress: told of every resample.

    Raises:
        FitError: columns that are missing, of unequal length or not positive; fewer runs than coefficients; runs that
            do not determine the coefficients; fits that do not converge.
    """
    columns = _columns(runs, (*form.inputs, form.target))
    inputs, log_y = {name: columns[name] for name in form.inputs}, np.log(columns[form.target])
    n, p = len(log_y), len(form.coefficients)
    if n < p:
        raise FitError(f"{n} runs for the {p} coefficients {', '.join(form.coefficients)}: add runs")
    prepared = form.prepare(inputs)
    theta = _best_fit(form, prepared, log_y, delta)

    draws = _Resampler(columns, form.inputs, log_y, strata, bootstraps, (seed, 0))
    samples, unconverged = [], 0
    for r in range(bootstraps):
        index, log_y_r = draws(r)
        sample, _, converged = _minimise(form, form.rows(prepared, index), log_y_r, theta, delta)
        if converged:
            samples.append(sample)
        unconverged += not converged
        if progress:
            progress(r + 1, bootstraps)
    return _finish(form, theta, samples, log_y, inputs, confidence, unconverged, seed)


def _finish(
    form: Form,
    theta: Array,
    samples: list[Array],
    log_y: Array,
    inputs: dict[str, Array],
    confidence: float,
    unconverged: int,
    seed: int,
) -> Fit:
    if unconverged > len(samples):
        raise FitError(f"{unconverged} of {unconverged + len(samples)} resamples did not converge: add runs")
    residuals = log_y - form.predict(theta, form.prepare(inputs))[0]
    return Fit(form, theta, np.stack(samples), residuals, inputs, confidence, unconverged, seed)


def _best_fit(form: Form, prepared: Any, log_y: Array, delta: float) -> Array:
    """The best of the form's starts, if the runs determine it."""
    found = [_minimise(form, prepared, log_y, start, delta) for start in form.starts(prepared, log_y)]
    theta, _, converged = min(found, key=lambda result: result[1])
    _check_identifiable(form, theta, prepared)
    if not converged:
        raise FitError(f"the fit of {', '.join(form.coefficients)} did not converge: add runs, or fit a smaller form")
    return theta


def _check_identifiable(form: Form, theta: Array, prepared: Any) -> None:
    """Names coefficients that leave the predictions as they are, alone or together."""
    _, jacobian = form.predict(theta, prepared)
    norms = np.linalg.norm(jacobian, axis=0)
    small = norms < _DEGENERATE * norms.max()
    names = np.array(form.coefficients)
    found = [f"determine {', '.join(names[small])}, which changes no prediction"] if small.any() else []
    # Both are looked at: which of several coefficients vanishes where the fit ended is chance.
    _, values, directions = np.linalg.svd(jacobian[:, ~small] / norms[~small])
    if len(values) < np.sum(~small) or values[-1] < _DEGENERATE:
        found.append(f"tell {', '.join(names[~small][np.abs(directions[-1]) > 0.1])} apart")
    if found:
        vary = f"let {', '.join(form.inputs)} vary more and independently, or fit a smaller form"
        raise FitError(f"the runs do not {', and do not '.join(found)}: {vary}")


def _minimise(form: Form, prepared: Any, log_y: Array, start: Array, delta: float) -> tuple[Array, float, bool]:
    """Huber loss by L-BFGS: (θ, mean loss / δ, whether it converged).

    Coefficients of power laws are nearly collinear (A grows as α does). In coordinates that make the Jacobian's columns
    orthonormal at the start, they are not.
    """
    n, p = len(log_y), len(start)

    def loss(theta: Array) -> tuple[float, Array]:
        prediction, jacobian = form.predict(theta, prepared)
        error = prediction - log_y
        clipped = np.clip(error, -delta, delta)
        return float(clipped @ (error - 0.5 * clipped)) / (n * delta), clipped @ jacobian / (n * delta)

    theta, value = start, loss(start)[0]
    for _ in range(_ROUNDS):
        _, jacobian = form.predict(theta, prepared)
        ridge = 1e-7 * np.linalg.norm(jacobian) * np.eye(p)
        whiten = solve_triangular(np.linalg.qr(np.vstack([jacobian, ridge]), mode="r"), np.eye(p)) * np.sqrt(n)
        origin = theta

        def objective(u: Array, whiten: Array = whiten, origin: Array = origin) -> tuple[float, Array]:
            value, gradient = loss(origin + whiten @ u)
            return value * 1e3, gradient @ whiten * 1e3

        with np.errstate(over="ignore", invalid="ignore"):
            options = {"maxiter": 500, "maxfun": 2000, "ftol": 1e-12, "gtol": 1e-8}
            found = minimize(objective, np.zeros(p), jac=True, method="L-BFGS-B", options=options)
        gain, theta, value = value - found.fun / 1e3, origin + whiten @ found.x, float(found.fun) / 1e3
        if not np.isfinite(value):
            return theta, np.inf, False
        if gain <= 1e-5 * value + 1e-12:
            return theta, value, True
    return theta, value, False


class _Resampler:
    """Resamples of runs, within strata: (indices [n], log targets [n])."""

    def __init__(
        self,
        columns: Columns,
        inputs: tuple[str, ...],
        log_y: Array,
        strata: ArrayLike | None,
        count: int,
        key: tuple[int, ...],
    ) -> None:
        labels = np.zeros(len(log_y), int) if strata is None else np.unique(np.asarray(strata), return_inverse=True)[1]
        if len(labels) != len(log_y):
            raise FitError(f"strata name {len(labels)} runs, there are {len(log_y)}")
        if count < 2:
            raise FitError(f"bootstraps = {count}: must be at least 2, or there is no interval")
        self.groups = [np.flatnonzero(labels == label) for label in range(labels.max() + 1)]
        if all(len(group) == 1 for group in self.groups):
            raise FitError("every stratum has one run, which says nothing of another: add seeds, or widen the strata")
        self.log_y, self.key = log_y, key
        # k runs that differ in their seed alone spread around their own mean by (k-1)/k of the variance around the
        # true one; the resampled deviations are widened by that much.
        self.replicates = [
            len(group) > 1 and all(np.ptp(columns[name][group]) == 0 for name in inputs) for group in self.groups
        ]

    def __call__(self, r: int) -> tuple[NDArray[np.int64], Array]:
        rng = np.random.default_rng([*self.key, r])
        index, log_y = [], []
        for group, replicates in zip(self.groups, self.replicates, strict=True):
            drawn = rng.choice(group, len(group))
            values = self.log_y[drawn]
            if replicates:
                mean = self.log_y[group].mean()
                values = mean + (values - mean) * np.sqrt(len(group) / (len(group) - 1))
            index.append(drawn)
            log_y.append(values)
        return np.concatenate(index), np.concatenate(log_y)


# ----------------------------------------------------------------------------------------------------------- isoFLOP

_POWER = {"scale": {"exponent": _log("flops")}}
_POWER_GRID = {"exponent": (0.3, 0.5, 0.7)}
OPTIMAL_PARAMS = PowerSum(PowerLaw, ("flops",), _POWER, _POWER_GRID, target="params")
"""N_opt = scale · C^exponent."""
OPTIMAL_TOKENS = PowerSum(PowerLaw, ("flops",), _POWER, _POWER_GRID, target="tokens")
"""D_opt = scale · C^exponent."""


class Minimum(NamedTuple):
    """The best size for one budget."""

    flops: float
    params: Interval
    tokens: Interval
    loss: Interval
    parabola: tuple[float, float, float]
    """(a, b, c): loss = a ln² N + b ln N + c."""
    runs: int


@dataclass(frozen=True)
class IsoFLOP:
    """Minima of parabolas, by budget (Hoffmann et al., approach 2)."""

    minima: tuple[Minimum, ...]
    excluded: dict[float, str]
    """Budgets without a minimum among the sizes tried, and why."""
    samples: dict[str, Array] = field(repr=False)
    """[R, B] "params", "tokens" and "loss" of the minima, by resample."""
    failed: int
    """Resamples left out, since some budget's parabola had no minimum near the sizes tried."""
    confidence: float
    seed: int

    def fit(self, form: Form) -> Fit:
        """A law of the minima over budgets; its interval is that of the runs under them.

        `OPTIMAL_PARAMS` and `OPTIMAL_TOKENS` give the allocation, `COMPUTE_LAW` and `COMPUTE_POWER_LAW` the loss.
        """
        flops = np.array([minimum.flops for minimum in self.minima])
        inputs, p = {"flops": flops}, len(form.coefficients)
        if len(flops) < p:
            raise FitError(
                f"{len(flops)} budgets with a minimum for the {p} coefficients {', '.join(form.coefficients)}: add"
                f" budgets{''.join(f'; {budget:.3g} FLOPs: {why}' for budget, why in self.excluded.items())}"
            )
        # Few points, already averages: least squares.
        delta = 10.0
        log_y = np.log([getattr(minimum, form.target).value for minimum in self.minima])
        prepared = form.prepare(inputs)
        theta = _best_fit(form, prepared, log_y, delta)
        fits = [_minimise(form, prepared, np.log(row), theta, delta) for row in self.samples[form.target]]
        samples = [sample for sample, _, converged in fits if converged]
        return _finish(form, theta, samples, log_y, inputs, self.confidence, len(fits) - len(samples), self.seed)


def isoflop(
    runs: Runs,
    *,
    bootstraps: int = 1000,
    seed: int = 0,
    confidence: float = _CONFIDENCE,
    progress: Progress | None = None,
) -> IsoFLOP:
    """The best size of each budget: a parabola of the loss in ln N, its minimum, and the tokens that go with it.

    Resamples are drawn within a budget: of the seeds of each size where every size has at least two, else of the runs.
    In simulations with five sizes, 95 % intervals held the minimum 88 to 93 % of the time with three seeds and about
    80 % with one. They are of the runs' noise alone: that the loss is no exact parabola is not in them.

    Args:
        runs: "flops" (the budget, the same number for all its runs), "params", "tokens" and "loss", [n] each.
        bootstraps: resamples R.
        seed: of the resamples.
        confidence: of the intervals.
        progress: told of every budget.

    Raises:
        FitError: a budget with fewer than three sizes, or with three that have one seed each; no budget with a minimum.
    """
    columns = _columns(runs, ("flops", "params", "tokens", "loss"))
    budgets = np.unique(columns["flops"])
    minima, samples, excluded = [], [], {}
    for b, budget in enumerate(budgets):
        of_budget = {name: column[columns["flops"] == budget] for name, column in columns.items()}
        index_Rn, loss_Rn = _isoflop_resamples(of_budget, float(budget), bootstraps, (seed, 2, b))
        x, log_tokens, loss = np.log(of_budget["params"]), np.log(of_budget["tokens"]), of_budget["loss"]
        value, curvature = _vertices(x[None], log_tokens[None], loss[None])
        low, high = x.min(), x.max()
        if curvature[0] <= 0:
            excluded[float(budget)] = "the loss has no minimum in size: add seeds and sizes"
        elif not low < value["params"][0] < high:
            side = "smaller" if value["params"][0] <= low else "larger"
            excluded[float(budget)] = f"the minimum lies outside the sizes tried: add {side} models"
        else:
            drawn, curvatures = _vertices(x[index_Rn], log_tokens[index_Rn], loss_Rn)
            near = (curvatures > 0) & (np.abs(drawn["params"] - (low + high) / 2) < high - low)
            drawn = {name: np.where(near, values, np.nan) for name, values in drawn.items()}
            samples.append(drawn)
            minima.append((float(budget), value, tuple(map(float, np.polyfit(x, loss, 2))), len(x)))
        if progress:
            progress(b + 1, len(budgets))
    if not minima:
        reasons = "; ".join(f"{budget:.3g} FLOPs: {why}" for budget, why in excluded.items())
        raise FitError(f"no budget has a minimum: {reasons}")

    stacked = {name: np.stack([drawn[name] for drawn in samples], axis=1) for name in ("params", "tokens", "loss")}
    good = np.isfinite(stacked["params"]).all(axis=1)
    failed = int((~good).sum())
    if failed > bootstraps / 2:
        worst = minima[int(np.isfinite(stacked["params"]).sum(axis=0).argmin())][0]
        raise FitError(f"{failed} of {bootstraps} resamples have no minimum, most at {worst:.3g} FLOPs: add seeds")
    stacked = {name: rows[good] if name == "loss" else np.exp(rows[good]) for name, rows in stacked.items()}
    bounds = {name: _quantiles(rows, confidence) for name, rows in stacked.items()}
    found = []
    for b, (budget, value, parabola, count) in enumerate(minima):
        intervals = {}
        for name, (low, high) in bounds.items():
            point = float(value[name][0]) if name == "loss" else float(np.exp(value[name][0]))
            intervals[name] = Interval(point, float(low[b]), float(high[b]))
        found.append(Minimum(flops=budget, parabola=parabola, runs=count, **intervals))
    return IsoFLOP(tuple(found), excluded, stacked, failed, confidence, seed)


def _isoflop_resamples(
    columns: Columns, budget: float, count: int, key: tuple[int, ...]
) -> tuple[NDArray[np.int64], Array]:
    """Indices and losses [R, n] of one budget's resamples, each of at least three sizes."""
    sizes, repeats = np.unique(columns["params"], return_counts=True)
    seeds = bool((repeats >= 2).all())
    if len(sizes) < 3 or (len(sizes) == 3 and not seeds):
        have = f"{len(sizes)} sizes in {len(columns['params'])} runs"
        raise FitError(f"{budget:.3g} FLOPs has {have}: a parabola with an interval needs 4, or 3 with two seeds each")
    draws = _Resampler(
        columns, ("params", "tokens"), np.log(columns["loss"]), columns["params"] if seeds else None, count, key
    )
    rows, attempt = [], 0
    while len(rows) < count:
        index, log_loss = draws(attempt)
        attempt += 1
        if len(np.unique(columns["params"][index])) >= 3:
            rows.append((index, np.exp(log_loss)))
    index, loss = zip(*rows, strict=True)
    return np.stack(index), np.stack(loss)


def _vertices(x_Rn: Array, log_tokens_Rn: Array, loss_Rn: Array) -> tuple[dict[str, Array], Array]:
    """Parabolas through each row: log size, log tokens and loss [R] at the vertex; the curvatures [R]."""
    center, half = (x_Rn.max() + x_Rn.min()) / 2, (x_Rn.max() - x_Rn.min()) / 2
    u_Rn = (x_Rn - center) / half
    inverse_R3n = np.linalg.pinv(np.stack([np.ones_like(u_Rn), u_Rn, u_Rn**2], axis=-1))
    c_R3 = np.einsum("rin,rn->ri", inverse_R3n, loss_Rn)
    t_R3 = np.einsum("rin,rn->ri", inverse_R3n, log_tokens_Rn)
    with np.errstate(divide="ignore", invalid="ignore"):
        u_R = -c_R3[:, 1] / (2 * c_R3[:, 2])
    vertex = {
        "params": center + half * u_R,
        "tokens": t_R3[:, 0] + t_R3[:, 1] * u_R + t_R3[:, 2] * u_R**2,
        "loss": c_R3[:, 0] + c_R3[:, 1] * u_R / 2,
    }
    return vertex, c_R3[:, 2]


# ------------------------------------------------------------------------------------------ leverage and extrapolation


class LeverageCurve(NamedTuple):
    """How many times the compute a dense model needs for a sparse model's loss, by the sparse model's budget."""

    flops: Array
    """[m] of the sparse model."""
    loss: Array
    """[m] that it reaches."""
    leverage: Interval
    """[m] C_dense / C_sparse; infinite where the dense law never gets there."""
    extrapolated: NDArray[np.bool_]
    """[m] whether either law is used outside of the budgets it was fitted to."""


def efficiency_leverage(dense: Fit, sparse: Fit, flops: ArrayLike) -> LeverageCurve:
    """C_dense / C_sparse at equal loss (arXiv:2507.17702, eq. 3), from two fitted curves of loss over compute.

    Args:
        dense: a fit of `COMPUTE_LAW` or `COMPUTE_POWER_LAW`, e.g. `isoflop(dense_runs).fit(COMPUTE_LAW)`.
        sparse: likewise; the two families' resamples are taken as independent.
        flops: [m] budgets of the sparse model.
    """
    for fitted in (dense, sparse):
        if not isinstance(fitted.law, ComputeLaw):
            raise FitError(f"efficiency leverage compares laws of compute, not {type(fitted.law).__name__}")
    flops = np.atleast_1d(np.asarray(flops, float))
    loss = sparse.law.loss(flops)
    needed = dense.law.flops(loss)
    pairs = zip(dense.laws(), sparse.laws(), strict=False)  # resamples that did not converge are missing
    low, high = _quantiles(np.stack([d.flops(s.loss(flops)) / flops for d, s in pairs]), dense.confidence)

    def outside(fitted: Fit, values: Array) -> NDArray[np.bool_]:
        seen = fitted.columns["flops"]
        return (values < seen.min() * (1 - 1e-9)) | (values > seen.max() * (1 + 1e-9))

    return LeverageCurve(
        flops, loss, Interval(needed / flops, low, high), outside(sparse, flops) | outside(dense, needed)
    )


class Extrapolation(NamedTuple):
    """What a law fitted to smaller budgets says of a larger one, and what was seen there."""

    fit: Fit
    predicted: Interval
    """[m]; of a run, with a run's noise, or of a minimum."""
    seen: Interval
    """[m]; where single runs are predicted, each is its own interval."""
    relative_error: Array
    """[m] predicted / seen - 1."""
    covered: NDArray[np.bool_]
    """[m] whether the two intervals meet."""


def extrapolate(form: Form, runs: Runs, held_out: ArrayLike | None = None, **options: Any) -> Extrapolation:
    """Fits a law without some runs and predicts them.

    Args:
        form: the law.
        runs: its inputs and target, and "flops" unless `held_out` is given.
        held_out: [n] true for the runs to predict; by default those of the largest budget.
        options: of `fit` ("strata" are labels of all runs).

    Raises:
        FitError: as `fit`; or nothing is held out, or everything.
    """
    if held_out is None:
        flops = _columns(runs, ("flops",))["flops"]
        held_out = flops >= flops.max() * (1 - 1e-9)
    mask = np.asarray(held_out, bool)
    if mask.all() or not mask.any():
        raise FitError(f"{mask.sum()} of {mask.size} runs are held out: some must be, and some not; add budgets")
    columns = _columns(runs, (*form.inputs, form.target))
    if options.get("strata") is not None:
        options = {**options, "strata": np.asarray(options["strata"])[~mask]}
    fitted = fit(form, {name: column[~mask] for name, column in columns.items()}, **options)
    predicted = fitted.predict({name: columns[name][mask] for name in form.inputs}, new_run=True)
    seen = columns[form.target][mask]
    return _compare(fitted, predicted, Interval(seen, seen, seen))


def extrapolate_isoflop(form: Form, runs: Runs, **options: Any) -> Extrapolation:
    """Predicts the largest budget's minimum from those of the smaller ones.

    Args:
        form: `COMPUTE_LAW` or `COMPUTE_POWER_LAW` for its loss, `OPTIMAL_PARAMS` or `OPTIMAL_TOKENS` for its size.
        runs: as for `isoflop`.
        options: of `isoflop`.
    """
    columns = _columns(runs, ("flops", "params", "tokens", "loss"))
    largest = columns["flops"] == columns["flops"].max()
    if largest.all():
        raise FitError("there is one budget: extrapolation needs smaller ones to start from")
    fitted = isoflop({name: column[~largest] for name, column in columns.items()}, **options).fit(form)
    (minimum,) = isoflop({name: column[largest] for name, column in columns.items()}, **options).minima
    seen = Interval(*(np.array([value]) for value in getattr(minimum, form.target)))
    return _compare(fitted, fitted.predict({"flops": [minimum.flops]}), seen)


def _compare(fitted: Fit, predicted: Interval, seen: Interval) -> Extrapolation:
    covered = (predicted.low <= seen.high) & (seen.low <= predicted.high)
    return Extrapolation(fitted, predicted, seen, predicted.value / seen.value - 1, covered)


def _columns(runs: Runs, names: tuple[str, ...]) -> dict[str, Array]:
    missing = [name for name in names if name not in runs]
    if missing:
        raise FitError(f"runs have no column {', '.join(missing)}; they have {', '.join(runs)}")
    columns = {name: np.atleast_1d(np.asarray(runs[name], dtype=np.float64)) for name in names}
    if len({column.shape for column in columns.values()}) > 1 or any(column.ndim != 1 for column in columns.values()):
        raise FitError(f"columns differ in shape: {', '.join(f'{k} {v.shape}' for k, v in columns.items())}")
    for name, column in columns.items():
        legal = (column >= 0) & (column < 1) if name == "sparsity" else np.isfinite(column) & (column > 0)
        if not legal.all():
            bad = int(np.flatnonzero(~legal)[0])
            raise FitError(f"{name} of run {bad} is {column[bad]}: leave runs that diverged or are empty out")
    return columns


def _quantiles(samples: Array, confidence: float) -> tuple[Array, Array]:
    """Percentile interval along the first axis; order statistics, so that infinite samples count as such."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(samples, [tail, 1 - tail], axis=0, method="inverted_cdf")
    return low, high
