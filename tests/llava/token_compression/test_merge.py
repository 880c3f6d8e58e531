"""Sums over groups: the two ways to add up, one of which serves the devices that add in an arbitrary order."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from llava.token_compression.merge import group_sums


class Elsewhere(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = property(lambda self: torch.device("cuda"))


@given(st.data())
def test_sums_and_sizes_are_those_of_a_loop_on_any_device(data):
    count = data.draw(st.integers(1, 6), label="groups, some of them empty")
    groups = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=30), label="group of each vector")
    vectors = torch.arange(3.0 * len(groups)).view(-1, 3)  # whole numbers: sums are exact in any order
    expected = torch.zeros(count, 3)
    for vector, group in zip(vectors, groups, strict=True):
        expected[group] += vector
    for given_vectors in (vectors, vectors.as_subclass(Elsewhere)):
        sums, sizes = group_sums(given_vectors, torch.tensor(groups), count)
        assert torch.equal(sums.as_subclass(torch.Tensor), expected)
        assert sizes.view(-1).tolist() == [groups.count(group) for group in range(count)]
