"""How many tokens go to which expert: prescribed routings that the benchmark of sparse layers is timed under.

T tokens, E experts, K experts per token, L layers.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Literal

import numpy as np

from moe_jax.rng import random_generator

RoutingName = Literal["balanced", "measured", "worst"]

LOAD_SIGMA = 0.4
"""Of the logarithm of experts' popularity, where no run says what routing is like: MaxVio 1.4 at 64 experts."""
_MIXING_SWEEPS = 8


def load_profile(counts_LE: np.ndarray) -> tuple[float, ...]:
    """A run's loads, ascending, 1 being an even share: the mean over its layers of their sorted loads."""
    load_LE = counts_LE / np.mean(counts_LE, axis=1, keepdims=True)
    return tuple(np.mean(np.sort(load_LE, axis=1), axis=0).tolist())


def expert_loads(
    routing: RoutingName, num_experts: int, experts_per_token: int, profile: tuple[float, ...] | None, seed: int
) -> np.ndarray:
    """How popular each expert is, [E], in any unit. Popular ones stand anywhere; of "worst" they are the first K.

    The measured routing's loads are `profile` (`load_profile`); without one they are log-normal, `LOAD_SIGMA`.
    """
    E = num_experts
    if routing == "balanced":
        return np.ones(E)
    if routing == "worst":
        return (np.arange(E) < experts_per_token).astype(float)
    quantiles_E = (np.arange(E) + 0.5) / E
    if profile is None:
        load_E = np.exp([LOAD_SIGMA * NormalDist().inv_cdf(q) for q in quantiles_E])
    else:
        load_E = np.interp(quantiles_E, (np.arange(len(profile)) + 0.5) / len(profile), profile)
        load_E = np.maximum(load_E, 1e-6)  # a collapsed run may have used fewer experts than K
    return random_generator(seed, "popularity", E).permutation(load_E)


def expert_counts(load_E: np.ndarray, num_tokens: int, experts_per_token: int) -> np.ndarray:
    """T·K assignments in proportion to the loads: int64 [E]. No expert gets more than T; the others take the rest."""
    T, K = num_tokens, experts_per_token
    full_E = np.zeros(len(load_E), bool)
    while True:
        left = T * (K - np.count_nonzero(full_E))
        if left == 0:
            return np.where(full_E, T, 0)
        share_E = load_E * (left / np.sum(load_E[~full_E]))
        over_E = ~full_E & (share_E > T)
        if not np.any(over_E):
            break
        full_E |= over_E
    share_E = np.where(full_E, T, share_E)
    counts_E = np.floor(share_E).astype(np.int64)
    rest = T * K - np.sum(counts_E)
    counts_E[np.argsort(counts_E - share_E, kind="stable")[:rest]] += 1
    return counts_E


def assign(counts_E: np.ndarray, num_tokens: int, rng: np.random.Generator) -> np.ndarray:
    """K different experts for each token, int32 [T, K], with exactly these counts and otherwise at random."""
    T = num_tokens
    # An expert's assignments follow each other, at most T of them, so that no token gets one twice.
    experts_TK = np.repeat(np.arange(len(counts_E), dtype=np.int32), counts_E).reshape(-1, T).T.copy()
    K = experts_TK.shape[1]
    for _ in range(_MIXING_SWEEPS * K):  # pairs of tokens exchange an expert, where neither then has one twice
        first, second = rng.permutation(T)[: T // 2 * 2].reshape(2, -1)
        i, j = rng.integers(K, size=(2, T // 2))
        x, y = experts_TK[first, i], experts_TK[second, j]
        legal = ~np.any(experts_TK[first] == y[:, None], axis=1) & ~np.any(experts_TK[second] == x[:, None], axis=1)
        experts_TK[first[legal], i[legal]], experts_TK[second[legal], j[legal]] = y[legal], x[legal]
    return experts_TK[rng.permutation(T)]


def max_violation(counts_E: np.ndarray) -> float:
    return float(np.max(counts_E) / np.mean(counts_E) - 1)
