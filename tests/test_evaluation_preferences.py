"""Votes as wins, ties and losses: known answers, worked by hand or by definition."""

import math
from itertools import permutations

import numpy as np
import pytest

from avd_jax.evaluation.preferences import LOSS, TIE, WIN, Vote, compare, krippendorff_alpha, majority, wilson


def test_majority():
    assert majority([WIN, WIN, LOSS]) == WIN
    assert majority([LOSS, TIE, LOSS]) == LOSS
    assert majority([WIN, LOSS]) == TIE
    assert majority([WIN, WIN, TIE, TIE, LOSS]) == TIE
    assert majority([TIE]) == TIE


def test_wilson_interval():
    # Newcombe 1998, Table I: 81 of 263 and 1 of 29.
    for count, total, low, high in ((81, 263, 0.2553, 0.3662), (1, 29, 0.0061, 0.1718), (0, 20, 0.0, 0.1611)):
        share = wilson(count, total)
        assert (share.low, share.value, share.high) == pytest.approx((low, count / total, high), abs=1e-4)


def test_krippendorffs_own_example():
    """Krippendorff's example of nominal data with missing values, "Computing Krippendorff's alpha", part C: 0.743."""
    a = [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None]
    b = [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3]
    c = [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None]
    d = [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None]
    units = [[vote for vote in unit if vote is not None] for unit in zip(a, b, c, d, strict=True)]
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)


def test_agreement_at_its_ends():
    assert krippendorff_alpha([[WIN, WIN, WIN], [LOSS, LOSS], [TIE, TIE]]) == 1
    assert krippendorff_alpha([[WIN], [LOSS]]) is None, "nobody can agree with himself"
    assert krippendorff_alpha([[WIN, WIN], [WIN, WIN]]) is None
    drawn = np.random.default_rng(0).integers(-1, 2, (4000, 3)).tolist()
    assert krippendorff_alpha(drawn) == pytest.approx(0, abs=0.03)


def test_a_pair_of_methods_whatever_the_order_in_votes():
    votes = [
        Vote("x", ("A", "B"), WIN),
        Vote("x", ("B", "A"), LOSS),  # A again
        Vote("x", ("A", "B"), TIE),
        Vote("y", ("B", "A"), WIN),
        Vote("z", ("A", "C"), TIE),
    ]
    for order in permutations(votes):
        found = compare(order, ("A", "B", "C"))
        assert list(found) == [("A", "B"), ("A", "C")]
        ours = found["A", "B"]
        assert (ours.items, ours.votes) == (2, 4)
        assert {k: v.value for k, v in ours.by_majority.items()} == {WIN: 0.5, TIE: 0.0, LOSS: 0.5}
        assert {k: v.value for k, v in ours.by_vote.items()} == {WIN: 0.5, TIE: 0.25, LOSS: 0.25}
        assert found["A", "C"].by_majority[TIE].value == 1


def test_intervals_narrow_with_more_pairs_and_not_with_more_votes_on_one():
    def width(items, people):
        votes = [Vote(str(i), ("A", "B"), WIN if i % 2 else LOSS) for i in range(items) for _ in range(people)]
        share = compare(votes, ("A", "B"))["A", "B"].by_vote[WIN]
        assert 0 <= share.low <= share.value <= share.high <= 1
        return share.high - share.low

    assert width(100, 2) == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 100), rel=0.15)
    assert width(100, 2) == pytest.approx(width(100, 20))
