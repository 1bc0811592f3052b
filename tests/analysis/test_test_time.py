"""Votes, the best of k, and budgets, of samples that were drawn."""

import json

import numpy as np
import pytest

from moe_jax.analysis.test_time import (
    Drawn,
    consensus_at_k,
    cut,
    errors_removed,
    from_rows,
    powers_of_two,
    spent,
    to_rows,
)

# Of two problems, four samples each: the second's right answer 7 is given twice, in two forms, and late.
DRAWN = Drawn(
    [["5", "5", "6", None], ["8", None, "7", "7.0"]],
    np.array([[1, 1, 0, 0], [0, 0, 1, 1]], bool),
    np.array([[3, 5, 3, 9], [2, 9, 4, 6]]),
)


def test_the_majority_of_each_group_of_k_counts():
    assert consensus_at_k(DRAWN, 1).tolist() == [0.5, 0.5]
    assert consensus_at_k(DRAWN, 2).tolist() == [0.5, 0.5]  # 5 of (5, 5), 6 of (6, none); 8 of (8, none), 7 of both
    assert consensus_at_k(DRAWN, 3).tolist() == [1.0, 0.0]  # of 8, none, 7 the first one that was given
    assert consensus_at_k(DRAWN, 4).tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="k = 5"):
        consensus_at_k(DRAWN, 5)
    with pytest.raises(ValueError, match="k = 0"):
        consensus_at_k(DRAWN, 0)


def test_what_a_budget_cuts_off_is_wrong_and_costs_the_budget():
    within = cut(DRAWN, 4)
    assert within.answers_PG == [["5", None, "6", None], ["8", None, "7", None]]
    assert within.right_PG.tolist() == [[True, False, False, False], [False, False, True, False]]
    assert within.tokens_PG.tolist() == [[3, 4, 3, 4], [2, 4, 4, 4]]
    point = spent(DRAWN, 4, 4)
    assert point.tokens == 14.0 and point.cut_off == 0.5
    assert point.consensus["mean"] == 0.5  # 5 before 6, 8 before 7
    assert point.best["mean"] == 1.0
    assert cut(DRAWN, 9)[0] == DRAWN.answers_PG and (cut(DRAWN, 9).right_PG == DRAWN.right_PG).all()


def test_one_sample_is_pass_at_1_and_the_best_of_k_is_never_below_the_vote():
    rng = np.random.default_rng(0)
    answers_PG = rng.integers(4, size=(20, 8))
    drawn = Drawn([[str(a) for a in row] for row in answers_PG], answers_PG == 0, rng.integers(1, 9, (20, 8)))
    one = spent(drawn, 1, 8)
    assert one.consensus == one.best and one.consensus["mean"] == pytest.approx(np.mean(answers_PG == 0))
    points = [spent(drawn, k, 8) for k in powers_of_two(8)]
    assert [point.k for point in points] == [1, 2, 4, 8]
    assert all(point.best["mean"] >= point.consensus["mean"] for point in points)
    assert [point.tokens for point in points] == pytest.approx([k * one.tokens for k in (1, 2, 4, 8)])
    assert points[1].consensus["mean"] == np.mean(drawn.right_PG[:, ::2])  # of two the first one wins


def test_records_bring_the_samples_back():
    again = from_rows(json.loads(json.dumps(to_rows(["2+3", "3+4"], DRAWN))))
    assert again.answers_PG == DRAWN.answers_PG
    assert (again.right_PG == DRAWN.right_PG).all() and (again.tokens_PG == DRAWN.tokens_PG).all()


def test_errors_removed():
    assert errors_removed(0.710, 0.867) == pytest.approx(0.541, abs=1e-3)
    assert np.isnan(errors_removed(1.0, 1.0))
