"""The blocks that methods are made of, against references that are plain to see."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.errors import ConfigError
from llava.token_compression.apportion import apportion, equal_shares, starts
from llava.token_compression.components import normalised
from llava.token_compression.grid import GridOptions
from llava.token_compression.joining import mean_of_joined, most_similar
from llava.token_compression.max_min import max_min, most_isolated
from llava.token_compression.ranking import best, best_per_frame

WEIGHTS = st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), min_size=1, max_size=12)


@settings(deadline=None)
@given(WEIGHTS, st.integers(0, 5), st.integers(0, 20), st.floats(0, 1))
def test_shares_add_up_within_bounds_and_follow_the_weights(weights, lower, room, filling):
    upper, count = lower + room, len(weights)
    total = count * lower + round(filling * count * room)
    shares = apportion(torch.tensor(weights), total, lower, upper).tolist()
    assert sum(shares) == total
    assert all(lower <= share <= upper for share in shares)
    for a, share in zip(weights, shares, strict=True):
        for b, other in zip(weights, shares, strict=True):
            assert share >= other - (a == b) or a < b  # a larger weight has no smaller share; equal ones differ by one


@settings(deadline=None)
@given(WEIGHTS.filter(any), st.integers(0, 300))
def test_unbounded_shares_are_within_one_of_the_quota(weights, total):
    values = torch.tensor(weights)
    quota = values.double() / values.double().sum() * total
    assert ((apportion(values, total) - quota).abs() < 1 + 1e-5).all()


@pytest.mark.parametrize(
    ("weights", "total", "bounds", "shares"),
    [
        ([1, 1, 1, 1], 6, {}, [2, 2, 1, 1]),
        ([0, 0, 0], 4, {}, [2, 1, 1]),
        ([0.1, 0.2, 0.7], 10, {}, [1, 2, 7]),
        ([5, 3, 1], 4, {}, [2, 1, 1]),  # quotas 2.22, 1.33, 0.44: the last unit goes to the largest remainder
        ([8, 1, 1], 9, {"upper": 5}, [5, 2, 2]),
        ([0, 0, 1], 10, {"upper": 6}, [2, 2, 6]),
        ([0, 1, 1], 9, {"lower": 1}, [1, 4, 4]),
        ([5, 5, 1], 9, {"upper": torch.tensor([2, 6, 9])}, [2, 6, 1]),
        ([1, 0, 0], 9, {"upper": torch.tensor([2, 3, 4])}, [2, 3, 4]),
    ],
)
def test_shares_by_hand(weights, total, bounds, shares):
    assert apportion(torch.tensor(weights), total, **bounds).tolist() == shares


def test_impossible_totals_are_refused():
    for total in (1, 7):
        with pytest.raises(ValueError, match="cannot be divided into 2 shares from 1 to 3"):
            apportion(torch.ones(2), total, 1, 3)


def test_grids():
    assert GridOptions().shape(196) == (14, 14)
    assert GridOptions(rows=2).shape(10) == (2, 5)
    for options, words in ((GridOptions(), "not square; give their rows"), (GridOptions(rows=3), "do not have 3 rows")):
        with pytest.raises(ConfigError, match=words):
            options.shape(10)
    with pytest.raises(ConfigError, match="rows must be at least 1"):
        GridOptions(rows=0)


def directions(count, dim=6, seed=0):
    return normalised(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


@settings(deadline=None)
@given(st.integers(1, 14), st.integers(0, 50), st.data())
def test_max_min_is_that_of_a_search_over_all(count, seed, data):
    unit = directions(count, seed=seed)
    wanted = data.draw(st.integers(1, count))
    cosines = unit @ unit.T
    if count > 1:
        others = cosines.clone().fill_diagonal_(-math.inf)
        assert most_isolated(unit) == others.max(dim=1).values.argmin()
    picks = [int(most_isolated(unit))]
    while len(picks) < wanted:
        rest = [index for index in range(count) if index not in picks]
        picks.append(min(rest, key=lambda index: float(cosines[index, picks].max())))
    assert max_min(unit, wanted, most_isolated(unit)).tolist() == picks


def test_max_min_is_at_least_half_as_spread_as_the_best_choice():
    """What farthest-point choice guarantees in a metric; on unit vectors its order is that of Euclidean distance."""
    from itertools import combinations

    unit = directions(9, dim=3)
    distances = torch.cdist(unit, unit)

    def spread(choice):
        return min(float(distances[i, j]) for i, j in combinations(choice, 2))

    for first in range(9):
        found = spread(max_min(unit, 4, first).tolist())
        assert found >= max(map(spread, combinations(range(9), 4))) / 2


def test_max_min_takes_distinct_ones_of_duplicates_and_zeros():
    unit = torch.cat([directions(1).expand(4, 6), torch.zeros(3, 6)])
    assert sorted(max_min(unit, 7, 2).tolist()) == list(range(7))
    assert max_min(unit, 2, 2).tolist() == [2, 4]


def test_best_are_the_highest_and_equal_ones_the_first():
    assert best(torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0]), 3).tolist() == [1, 2, 3]
    scores = torch.tensor([[0.0, 1.0, 1.0], [5.0, 4.0, 9.0], [7.0, 7.0, 7.0]])
    assert best_per_frame(scores, torch.tensor([1, 2, 0])).tolist() == [1, 3, 5]
    assert best_per_frame(scores, torch.tensor([3, 0, 2])).tolist() == [0, 1, 2, 6, 7]


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(0, 50), st.data())
def test_every_vector_joins_the_most_similar_anchor(count, seed, data):
    unit = directions(count, seed=seed)
    anchors = torch.tensor(data.draw(st.lists(st.integers(0, count - 1), min_size=1, unique=True)))
    assert torch.equal(most_similar(unit, anchors), (unit @ unit[anchors].T).argmax(dim=1))


def test_an_anchor_joins_itself_though_another_is_the_same():
    unit = directions(1).expand(5, 6).clone()
    assert most_similar(unit, torch.tensor([3, 1])).tolist() == [0, 1, 0, 0, 0]


def test_means_of_joined():
    vectors = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    means, sizes = mean_of_joined(vectors, torch.tensor([2, -1, 0, 2]), 3)
    assert means.tolist() == [[5, 6], [0, 0], [4, 5]]
    assert sizes.tolist() == [[1], [0], [2]]


@given(st.integers(0, 200), st.integers(1, 40))
def test_equal_shares_and_starts(total, count):
    shares = equal_shares(total, count)
    assert shares.sum() == total
    assert shares.max() - shares.min() <= 1
    if count <= total:
        assert torch.equal(starts(total, count), shares.cumsum(0) - shares)
        assert (starts(total, count).diff() > 0).all()
    assert equal_shares(3, 9).tolist() == [0, 0, 1] * 3
