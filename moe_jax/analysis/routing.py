"""What a router's choices show: co-activation, specialisation, saturation. Pure functions of NumPy arrays.

The measures are those of OLMoE's analysis (arXiv:2409.02060 §5), each beside what chance alone would give: few tokens
make any routing look special. Padding and special tokens are left out by whoever calls.

T tokens, L layers, E experts, K experts per token (all different), X token ids or any other kinds of tokens.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer]
Floats = NDArray[np.float64]

_TOKENS_AT_A_TIME = 8192


def expert_counts(experts_TK: Ints, num_experts: int) -> Ints:
    """How many tokens use each expert: int64 [E]. The sum is T·K."""
    return np.bincount(experts_TK.ravel(), minlength=num_experts)


def pair_counts(experts_TK: Ints, num_experts: int, others_TK: Ints | None = None) -> Ints:
    """SᵀS over all pairs of experts, with S [T, E] the 0/1 matrix of the chosen experts: int64 [E, E].

    Entry (i, j) is the number of tokens that use both i and j; the diagonal is each expert's load. With `others_TK`,
    the choices of the same tokens in another layer, it is S₁ᵀS₂: the tokens that use i in the first and j in the
    second layer.
    """
    pairs_EE = np.zeros((num_experts, num_experts), np.int64)
    for start in range(0, len(experts_TK), _TOKENS_AT_A_TIME):
        part = slice(start, start + _TOKENS_AT_A_TIME)
        first_TE = _chosen(experts_TK[part], num_experts)
        second_TE = first_TE if others_TK is None else _chosen(others_TK[part], num_experts)
        # Counts of this many tokens are exact in float32, whose products are fast.
        pairs_EE += (first_TE.T @ second_TE).astype(np.int64)
    return pairs_EE


def coactivation(pairs_EE: Ints, counts_E: Ints) -> Floats:
    """Share of expert i's tokens that also use expert j: N_ij / N_i (OLMoE §5.2), float64 [E, E].

    Args:
        pairs_EE: N_ij (`pair_counts`), within a layer or from one layer to another.
        counts_E: N_i, the load of the experts of the first layer. The row of an expert without tokens is 0.
    """
    return pairs_EE / np.maximum(counts_E, 1)[:, None]


def independent_pairs(counts_E: Ints, num_experts_per_token: int) -> Floats:
    """N_ij as it would be if a token's K experts were independent but for the loads: float64 [E, E].

    The K experts of a token differ, so the product of two loads is too much: evenly loaded experts that are chosen at
    random meet in K (K-1) / (E (E-1)) of the tokens, not in (K/E)². This is the model of quasi-independence (Goodman
    1968), N_ij = a_i a_j for i ≠ j with row sums (K-1) N_i, as the observed counts have them; a limit on groups is not
    in it, and shows as co-activation inside of groups. The diagonal is N_i.
    """
    sums_E = (num_experts_per_token - 1) * np.asarray(counts_E, np.float64)
    total = np.sum(sums_E)
    expected_EE = np.zeros((len(counts_E), len(counts_E)))
    if total:
        a_E = sums_E / np.sqrt(total)
        for _ in range(1000):
            others_E = np.maximum(np.sum(a_E) - a_E, np.finfo(float).tiny)
            # The geometric mean of the old and the new value: the plain iteration may swing for ever.
            a_new_E = np.sqrt(a_E * sums_E / others_E)
            converged = np.allclose(a_new_E, a_E, rtol=1e-10, atol=0)
            a_E = a_new_E
            if converged:
                break
        expected_EE = np.outer(a_E, a_E)
    np.fill_diagonal(expected_EE, counts_E)
    return expected_EE


def independent_layers(first_counts_E: Ints, second_counts_E: Ints, num_tokens: int) -> Floats:
    """N_ij of experts of two layers if their choices were independent: N_i N_j / T, float64 [E, E]."""
    return np.outer(first_counts_E, second_counts_E) / max(num_tokens, 1)


def kind_counts(kinds_T: Ints, experts_TK: Ints, num_kinds: int, num_experts: int) -> Ints:
    """How often tokens of each kind (token id, domain) use each expert: int64 [X, E]; memory grows with X·E."""
    pairs_TK = kinds_T[:, None].astype(np.int64) * num_experts + experts_TK
    return np.bincount(pairs_TK.ravel(), minlength=num_kinds * num_experts).reshape(num_kinds, num_experts)


def specialisation(counts_XE: Ints) -> Floats:
    """Share of the routings of kind x that go to expert e: N_xe / Σ_e N_xe (OLMoE §5.3 and §5.4), float64 [X, E].

    Rows add up to 1, so no entry exceeds 1/K: an expert that every token of this kind uses has 1/K. The row of a kind
    without tokens is 0.
    """
    return counts_XE / np.maximum(np.sum(counts_XE, axis=1, keepdims=True), 1)


def mean_max_specialisation(counts_XE: Ints) -> float:
    """The largest share of each kind's routings that goes to one expert, averaged over the tokens of the text.

    Between 1/E and 1/K. Kinds that are seen a few times have a large share by chance: compare with the value of
    shuffled tokens.
    """
    total = np.sum(counts_XE)
    return float(np.sum(np.max(counts_XE, axis=1)) / total) if total else 0.0


def mutual_information(counts_XE: Ints) -> float:
    """I(X; E) = Σ p(x, e) ln(p(x, e) / (p(x) p(e))) of the kind of a token and its expert, nats.

    p is the share of assignments, as observed. At most ln(E/K). From a finite text it is too large, by about
    (X-1)(E-1) / 2TK (Miller 1955) where no kind is rare: subtract the value of shuffled tokens, which has the same
    numbers of tokens of each kind, the same loads and sets of experts, and no dependence.
    """
    joint_XE = np.asarray(counts_XE, np.float64)
    total = np.sum(joint_XE)
    if not total:
        return 0.0
    joint_XE = joint_XE / total
    independent_XE = np.outer(np.sum(joint_XE, axis=1), np.sum(joint_XE, axis=0))
    seen_XE = joint_XE > 0
    return float(np.sum(joint_XE[seen_XE] * np.log(joint_XE[seen_XE] / independent_XE[seen_XE])))


def shuffled(kinds_T: Ints, seed: int = 0) -> Ints:
    """The same kinds in random order: what is left of a measure with these is chance."""
    return np.random.default_rng(seed).permutation(kinds_T)


def saturation(experts_LTK: Ints, final_experts_LTK: Ints) -> Floats:
    """Router saturation: share of a token's K experts that are also among its experts in the end, float64 [L].

    1/T Σ_t |E_t ∩ E_t'| / K (OLMoE §5.1), on the same tokens. Identical routing gives 1; for what chance gives see
    `chance_saturation`.
    """
    same_LTK = np.zeros(experts_LTK.shape, bool)
    for k in range(final_experts_LTK.shape[-1]):  # one at a time: [L, T, K, K] would be large
        same_LTK |= experts_LTK == final_experts_LTK[..., k : k + 1]
    return np.sum(same_LTK, axis=(1, 2)) / max(same_LTK[0].size, 1)


def chance_saturation(counts_LE: Ints, final_counts_LE: Ints, num_experts_per_token: int) -> Floats:
    """`saturation` of two routings with these loads that know nothing of each other: K Σ_e q_e q_e', float64 [L].

    q is an expert's share of the assignments. Even loads give K/E.
    """
    share_LE, final_LE = specialisation(counts_LE), specialisation(final_counts_LE)
    return num_experts_per_token * np.einsum("LE,LE->L", share_LE, final_LE)


def _chosen(experts_TK: Ints, num_experts: int) -> NDArray[np.float32]:
    chosen_TE = np.zeros((len(experts_TK), num_experts), np.float32)
    chosen_TE[np.arange(len(experts_TK))[:, None], experts_TK] = 1
    return chosen_TE
