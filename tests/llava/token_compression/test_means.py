"""Sums over groups: the two ways to add up, one of which serves the devices that add in an arbitrary order."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from llava.token_compression.cosine import Stored
from llava.token_compression.means import add_groups, group_means


class Elsewhere(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = property(lambda self: torch.device("cuda"))


@given(st.data())
def test_sums_and_means_are_those_of_a_loop_on_any_device(data):
    count = data.draw(st.integers(1, 6), label="groups, some of them empty")
    groups = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=30), label="group of each vector")
    vectors = torch.arange(3.0 * len(groups)).view(-1, 3)  # whole numbers: sums are exact in any order
    expected = torch.ones(count, 3)
    for vector, group in zip(vectors, groups, strict=True):
        expected[group] += vector
    for start in (torch.ones(count, 3), torch.ones(count, 3).as_subclass(Elsewhere)):
        sums = add_groups(start, Stored(vectors), torch.tensor(groups))
        assert torch.equal(sums.as_subclass(torch.Tensor), expected)
    if set(groups) == set(range(count)):
        sizes = torch.tensor([groups.count(group) for group in range(count)]).unsqueeze(1)
        assert torch.equal(group_means(Stored(vectors), torch.tensor(groups), count), (expected - 1) / sizes)
