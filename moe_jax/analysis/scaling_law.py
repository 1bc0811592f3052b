"""Scaling laws with published coefficients: loss from size, data and sparsity, and what a budget is best spent on.

Symbols are the papers': N parameters, D training tokens, C training FLOPs, G granularity, E experts, S sparsity. Losses
are in nats per token *of the paper's tokenizer and data*: never put two papers on one axis. `PUBLISHED` holds the
fitted laws, each with its reference and with how well its coefficients are sourced. `scaling_fit.py` fits these forms
to runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar


class Allocation(NamedTuple):
    """The best use of a budget of training FLOPs."""

    params: Any
    """N."""
    tokens: Any
    """D."""
    loss: Any


@dataclass(frozen=True)
class Chinchilla:
    """L(N, D) = E + A / N^α + B / D^β (Hoffmann et al., arXiv:2203.15556, eq. 2)."""

    E: float
    """Irreducible loss."""
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, params: ArrayLike, tokens: ArrayLike) -> Any:
        return self.E + self.A * _power(params, -self.alpha) + self.B * _power(tokens, -self.beta)

    def optimum(self, flops: ArrayLike, flops_per_parameter: float = 6.0) -> Allocation:
        """N_opt = G (C/6)^(β/(α+β)), D_opt = (C/6)^(α/(α+β)) / G, G = (αA / βB)^(1/(α+β)) (eq. 4).

        Args:
            flops: C, any shape.
            flops_per_parameter: of one token; 6 where N counts what a token uses, less where it counts more.
        """
        total = self.alpha + self.beta
        ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / total)
        pairs = np.asarray(flops, float) / flops_per_parameter
        params, tokens = ratio * _power(pairs, self.beta / total), _power(pairs, self.alpha / total) / ratio
        return Allocation(params, tokens, self.loss(params, tokens))


@dataclass(frozen=True)
class PowerLaw:
    """y = scale · C^exponent."""

    scale: float
    exponent: float

    def __call__(self, flops: ArrayLike) -> Any:
        return self.scale * _power(flops, self.exponent)


@dataclass(frozen=True)
class ComputeLaw:
    """L(C) = E + A / C^α: the best loss that a budget buys; E = 0 is a plain power law."""

    A: float
    alpha: float
    E: float = 0.0

    def loss(self, flops: ArrayLike) -> Any:
        return self.E + self.A * _power(flops, -self.alpha)

    def flops(self, loss: ArrayLike) -> Any:
        """The budget whose best loss this is; infinite where the law never gets there."""
        above = np.asarray(loss, float) - self.E
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(above > 0, (self.A / above) ** (1 / self.alpha), np.inf)


@dataclass(frozen=True)
class FineGrained:
    """L(N, D, G) = c + (g / G^γ + a) / N^α + b / D^β (Krajewski et al., arXiv:2402.07871, eq. 9).

    G is the dense feed-forward's width over an expert's, at an expansion of 64. N behaves as the parameters of the
    expanded model, all experts included; this reading was inferred from losses that the paper predicts.
    """

    a: float
    alpha: float
    b: float
    beta: float
    g: float
    gamma: float
    c: float

    def loss(self, params: ArrayLike, tokens: ArrayLike, granularity: float) -> Any:
        return self.at(granularity).loss(params, tokens)

    def at(self, granularity: float) -> Chinchilla:
        """The law at one granularity, which has Chinchilla's form."""
        return Chinchilla(self.c, self.g * granularity**-self.gamma + self.a, self.b, self.alpha, self.beta)


@dataclass(frozen=True)
class Joint:
    """L = a Ê^δ N^(α + γ ln Ê) + b Ê^ω D^(β + ζ ln Ê) + c (Ludziejewski et al., arXiv:2502.05172).

    N counts active parameters, and Ê is the paper's transformed number of experts (1 for a dense model).
    """

    a: float
    delta: float
    alpha: float
    gamma: float
    b: float
    omega: float
    beta: float
    zeta: float
    c: float

    def loss(self, active_params: ArrayLike, tokens: ArrayLike, experts: float) -> Any:
        return self.at(experts).loss(active_params, tokens)

    def at(self, experts: float) -> Chinchilla:
        """The law at one number of experts, which has Chinchilla's form in active parameters and tokens."""
        log = np.log(experts)
        return Chinchilla(
            E=self.c,
            A=self.a * experts**self.delta,
            B=self.b * experts**self.omega,
            alpha=-(self.alpha + self.gamma * log),
            beta=-(self.beta + self.zeta * log),
        )


@dataclass(frozen=True)
class Sparsity:
    """L = a / N^α + b / D^β + c / (1-S)^λ + d / ((1-S)^δ N^γ) + e (Abnar et al., arXiv:2501.12370, eq. 6).

    N counts all parameters, S is the share of experts that a token does not use. The paper reports R² = 0.99 where it
    fitted and 0.68 on the sparsity it held out (0.98).
    """

    a: float
    alpha: float
    b: float
    beta: float
    c: float
    lambda_: float
    d: float
    delta: float
    gamma: float
    e: float

    def loss(self, total_params: ArrayLike, tokens: ArrayLike, sparsity: ArrayLike) -> Any:
        dense = 1 - np.asarray(sparsity, float)
        capacity = self.a * _power(total_params, -self.alpha)
        capacity = capacity + self.d * _power(dense, -self.delta) * _power(total_params, -self.gamma)
        return capacity + self.b * _power(tokens, -self.beta) + self.c * _power(dense, -self.lambda_) + self.e

    def optimum(self, flops: float, sparsity: float, active_fraction: float) -> Allocation:
        """The best total size at one sparsity, where a token uses `active_fraction` of the parameters: C = 6·f·N·D."""
        return best_allocation(lambda n, d: self.loss(n, d, sparsity), flops, 6 * active_fraction)


@dataclass(frozen=True)
class Routed:
    """log10 L = a log10 N + b log10 Ê + c log10 N log10 Ê + d (Clark et al., arXiv:2202.01169, eq. 1).

    N counts the parameters of the dense base. D was 130B tokens throughout, to which later work traces the prediction
    that experts stop helping large models.
    """

    a: float
    b: float
    c: float
    d: float
    E_start: float
    E_max: float

    def loss(self, params: ArrayLike, experts: ArrayLike) -> Any:
        log_n, log_e = np.log10(params), np.log10(_saturated(experts, -1, self.E_start, self.E_max))
        return 10 ** (self.a * log_n + self.b * log_e + self.c * log_n * log_e + self.d)


@dataclass(frozen=True)
class Leverage:
    """Efficiency leverage, C_dense / C_moe at equal loss: Â^(a + d log10 C + γ log2² G + β log2 G)
    (Ling, arXiv:2507.17702).

    Â is the saturated activation ratio (active + shared) / (all + shared) experts, and G = 2 · hidden / expert width.
    The paper does not state its logarithms' bases: these reproduce its best G, about 12, and its > 7 at 3 % and 1e22.
    """

    a: float
    d: float
    gamma: float
    beta: float
    A_start: float
    A_max: float = 5.28e16
    """Its upper saturation, far beyond any ratio: it plays no part."""

    def leverage(self, activation_ratio: ArrayLike, granularity: ArrayLike, flops: ArrayLike) -> Any:
        log_g = np.log2(granularity)
        exponent = self.a + self.d * np.log10(flops) + self.gamma * log_g**2 + self.beta * log_g
        return _saturated(activation_ratio, 0, self.A_start, self.A_max) ** exponent

    def best_granularity(self) -> float:
        """Where log2 G = -β / 2γ: the exponent is lowest, and Â < 1."""
        return 2 ** (-self.beta / (2 * self.gamma))


@dataclass(frozen=True)
class Recipe:
    """Power laws in C of a model's hyper-parameters; what a paper does not state is absent."""

    flops_per_token: PowerLaw
    """M: FLOPs per token without the embedding and the head; C = M · D."""
    tokens: PowerLaw
    """D."""
    learning_rate: PowerLaw | None = None
    """Peak."""
    batch_tokens: PowerLaw | None = None
    """Tokens a step."""


def best_allocation(
    loss: Callable[[float, float], float], flops: float, flops_per_parameter: float = 6.0
) -> Allocation:
    """Minimises any loss(N, D) with C = flops_per_parameter · N · D, by search over log N between 1 and C."""

    def of_log_n(log_n: float) -> float:
        return float(loss(np.exp(log_n), flops / flops_per_parameter / np.exp(log_n)))

    grid = np.linspace(0.0, np.log(flops / flops_per_parameter), 400)
    best = int(np.clip(np.argmin([of_log_n(x) for x in grid]), 1, len(grid) - 2))
    found = minimize_scalar(
        of_log_n, bounds=(grid[best - 1], grid[best + 1]), method="bounded", options={"xatol": 1e-9}
    )
    params = float(np.exp(found.x))
    return Allocation(params, flops / flops_per_parameter / params, float(found.fun))


class Published(NamedTuple):
    law: Any
    reference: str
    sourcing: str
    """How well the coefficients are sourced: read in the paper; from copies of its table that agree; or inferred."""


PUBLISHED: dict[str, Published] = {
    "chinchilla_hoffmann": Published(
        Chinchilla(E=1.6934, A=406.4, B=410.7, alpha=0.3392, beta=0.2849),
        "Hoffmann et al. 2022, arXiv:2203.15556, approach 3",
        "paper: printed as 1.69, .34, .28; these digits stand in its TeX source",
    ),
    "chinchilla_epoch": Published(
        Chinchilla(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658),
        "Besiroglu et al. 2024 (Epoch AI), arXiv:2404.10102",
        "paper: standard errors .03, 124.58, 1293.23, .02, .02; a refit of points read off Hoffmann's figure 4",
    ),
    "fine_grained_moe": Published(
        FineGrained(a=18.1, alpha=0.115, b=30.8, beta=0.147, g=2.1, gamma=0.58, c=0.47),
        "Krajewski et al. 2024, arXiv:2402.07871, table 1, MoE",
        "copies",
    ),
    "fine_grained_dense": Published(
        Chinchilla(E=0.47, A=16.3, B=26.7, alpha=0.126, beta=0.127),
        "Krajewski et al. 2024, arXiv:2402.07871, table 1, dense",
        "copies",
    ),
    "joint_moe": Published(
        Joint(
            a=35.91,
            delta=-0.2285,
            alpha=-0.1889,
            gamma=0.0098,
            b=35.98,
            omega=0.5529,
            beta=-0.1775,
            zeta=-0.0259,
            c=1.3637,
        ),
        "Ludziejewski et al. 2025, arXiv:2502.05172",
        "unverified: the magnitudes are from copies that lost the signs; the signs are reconstructed so that the loss"
        " falls with N, D and E, and agree with a copy that keeps the relative ones",
    ),
    "sparsity": Published(
        Sparsity(
            a=16612.50,
            alpha=0.5962,
            b=5455.67,
            beta=0.3954,
            c=0.4598,
            lambda_=-0.1666,
            d=17.26,
            delta=0.1603,
            gamma=0.1595,
            e=0.94,
        ),
        "Abnar et al. 2025, arXiv:2501.12370, table 3",
        "copies",
    ),
    "routed_s_base": Published(
        Routed(a=-0.082, b=-0.108, c=0.009, d=1.104, E_start=1.847, E_max=314.478),
        "Clark et al. 2022, arXiv:2202.01169, table 3, S-BASE",
        "copies",
    ),
    "routed_rl_r": Published(
        Routed(a=-0.083, b=-0.126, c=0.012, d=1.111, E_start=1.880, E_max=469.982),
        "Clark et al. 2022, arXiv:2202.01169, table 3, RL-R",
        "copies",
    ),
    "routed_hash": Published(
        Routed(a=-0.087, b=-0.136, c=0.012, d=1.157, E_start=4.175, E_max=477.741),
        "Clark et al. 2022, arXiv:2202.01169, table 3, HASH",
        "copies",
    ),
    "efficiency_leverage": Published(
        Leverage(a=1.23, d=-7.61e-2, gamma=1.67e-2, beta=-1.17e-1, A_start=1.63e-2),
        "Ling team 2025, arXiv:2507.17702",
        "paper; the logarithms' bases are inferred",
    ),
    "deepseek_llm": Published(
        Recipe(
            flops_per_token=PowerLaw(0.1715, 0.5243),
            tokens=PowerLaw(5.8316, 0.4757),
            learning_rate=PowerLaw(0.3118, -0.1250),
            batch_tokens=PowerLaw(0.2920, 0.3271),
        ),
        "DeepSeek LLM 2024, arXiv:2401.02954",
        "paper: learning rate and batch fitted at 1e17 to 2e19 FLOPs, the rest at 1e17 to 3e20",
    ),
    "ling_dense": Published(
        Recipe(flops_per_token=PowerLaw(0.0655, 0.5422), tokens=PowerLaw(15.2582, 0.4578)),
        "Ling team 2025, arXiv:2507.17702",
        "paper",
    ),
    "ling_moe": Published(
        Recipe(
            flops_per_token=PowerLaw(0.1915, 0.5095),
            tokens=PowerLaw(5.2232, 0.4905),
            learning_rate=PowerLaw(1.1576, -0.1529),
            batch_tokens=PowerLaw(0.0694, 0.3644),
        ),
        "Ling team 2025, arXiv:2507.17702",
        "paper",
    ),
}


def _power(x: ArrayLike, exponent: float) -> Any:
    return np.asarray(x, float) ** exponent


def _saturated(x: ArrayLike, offset: float, start: float, maximum: float) -> Any:
    """1 / (1 / (x + offset + (1/start - 1/maximum)⁻¹) + 1/maximum): from `start` (at x = -offset) up to `maximum`."""
    return 1 / (1 / (np.asarray(x, float) + offset + 1 / (1 / start - 1 / maximum)) + 1 / maximum)
