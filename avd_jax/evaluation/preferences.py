"""What people prefer: votes on pairs of methods as wins, ties and losses with intervals, and how far voters agree.

A vote on an item says that the first of two methods is better (1), the second (-1), or that they are comparable (0).
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

WIN, TIE, LOSS = 1, 0, -1
OUTCOMES = (WIN, TIE, LOSS)
RESAMPLES = 2000  # of the bootstrap
_NORMAL_95 = 1.959964  # of both tails


@dataclass(frozen=True)
class Vote:
    """What one person said of one item.

    Attributes:
      item: what both methods show.
      methods: the first and the second.
      outcome: WIN if the first is better, LOSS if the second is, else TIE.
    """

    item: str
    methods: tuple[str, str]
    outcome: int


@dataclass(frozen=True)
class Share:
    """A share with its interval of 95 %."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """How the first method stands to the second.

    Attributes:
      items: that have a vote.
      votes: in all.
      by_majority: WIN, TIE, LOSS -> share of the items, each of which counts as its majority.
      by_vote: the same of the votes.
      agreement: Krippendorff's alpha, see there.
    """

    items: int
    votes: int
    by_majority: dict[int, Share]
    by_vote: dict[int, Share]
    agreement: float | None


def compare(votes: Iterable[Vote], methods: Sequence[str]) -> dict[tuple[str, str], Comparison]:
    """Return each pair of methods that has a vote -> how the first stands to the second, in the methods' order."""
    units = units_of(votes, methods)
    return {pair: _comparison(list(units[pair].values())) for pair in combinations(methods, 2) if pair in units}


def units_of(votes: Iterable[Vote], methods: Sequence[str]) -> Mapping[tuple[str, str], Mapping[str, list[int]]]:
    """Return pair of methods -> item -> its votes; pairs are in the methods' order, whatever that of a vote."""
    place = {method: i for i, method in enumerate(methods)}
    units: dict[tuple[str, str], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for vote in votes:
        first, second = vote.methods
        turned = place[first] > place[second]
        pair = (second, first) if turned else (first, second)
        units[pair][vote.item].append(-vote.outcome if turned else vote.outcome)
    return units


def majority(votes: Sequence[int]) -> int:
    """Return what most said; answers that are equally frequent count as a tie."""
    (first, most), *others = Counter(votes).most_common()
    return TIE if others and others[0][1] == most else first


def wilson(count: int, total: int) -> Share:
    """Return a share of independent items with Wilson's score interval (1927), which is sound for few items too."""
    share, z2 = count / total, _NORMAL_95**2
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _NORMAL_95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    return Share(share, max(0.0, middle - half), min(1.0, middle + half))


def krippendorff_alpha(units: Iterable[Sequence[int]]) -> float | None:
    """Return Krippendorff's alpha for nominal answers: 1 if voters always agree, 0 if no more than by chance.

    It allows any number of votes an item; those with one vote say nothing about agreement and are left out. With the
    same number everywhere it is Fleiss' kappa but for a correction of small samples.

    Args:
      units: the votes of each item.

    Returns:
      alpha, or None if no item has two votes, or all votes are the same, when chance is not to be told from agreement.

    Source: Krippendorff, Content Analysis, 4th edition, section 12.3.1: 1 - (n - 1) sum_u (m_u^2 - sum_c n_uc^2) /
    (m_u - 1) / (n^2 - sum_c n_c^2).
    """
    counted = [Counter(votes) for votes in units if len(votes) > 1]
    totals = sum(counted, Counter())
    n = totals.total()
    expected = n**2 - sum(count**2 for count in totals.values())
    if not expected:
        return None
    observed = sum(
        (unit.total() ** 2 - sum(count**2 for count in unit.values())) / (unit.total() - 1) for unit in counted
    )
    return 1 - (n - 1) * observed / expected


def _comparison(units: Sequence[Sequence[int]]) -> Comparison:
    decided = Counter(majority(votes) for votes in units)
    return Comparison(
        items=len(units),
        votes=sum(map(len, units)),
        by_majority={outcome: wilson(decided[outcome], len(units)) for outcome in OUTCOMES},
        by_vote=_shares_of_votes(units),
        agreement=krippendorff_alpha(units),
    )


def _shares_of_votes(units: Sequence[Sequence[int]]) -> dict[int, Share]:
    """Return the shares of the votes; items are drawn again, since the votes on one are not independent."""
    counts = np.array([[list(votes).count(outcome) for outcome in OUTCOMES] for votes in units], float)
    drawn = np.random.default_rng(0).multinomial(len(units), np.full(len(units), 1 / len(units)), RESAMPLES) @ counts
    low, high = np.quantile(drawn / drawn.sum(1, keepdims=True), (0.025, 0.975), axis=0)
    shares = counts.sum(0) / counts.sum()
    return {outcome: Share(*map(float, three)) for outcome, *three in zip(OUTCOMES, shares, low, high, strict=True)}
