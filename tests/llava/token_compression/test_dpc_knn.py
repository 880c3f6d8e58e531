"""Density peaks against a loop that follows the definition, and segments on hand-made similarities."""

import math

import pytest
import torch

from llava.token_compression.dpc_knn import density_peaks, distances, first_of, to_centres
from llava.token_compression.segments import segments


def naive_order(vectors: torch.Tensor, k: int) -> list[int]:
    count = len(vectors)
    apart = torch.tensor([[(a - b).double().norm() / math.sqrt(vectors.shape[1]) for b in vectors] for a in vectors])
    density = [math.exp(-sum(d * d for d in sorted(row.tolist())[:k]) / min(k, count)) for row in apart]
    scores = []
    for i in range(count):
        denser = [j for j in range(count) if density[j] > density[i] or (density[j] == density[i] and j < i)]
        delta = min((float(apart[i, j]) for j in denser), default=float(apart.max()))
        scores.append(density[i] * delta)
    return sorted(range(count), key=lambda i: (-scores[i], i))


@pytest.mark.parametrize("k", [1, 3, 7, 50])
def test_order_is_that_of_the_definition(k):
    vectors = torch.randn(4, 13, 5, generator=torch.Generator().manual_seed(k))
    found = density_peaks(distances(vectors), k)
    assert found.tolist() == [naive_order(own, k) for own in vectors]


def test_sets_of_several_sizes_are_looked_at_one_by_one():
    generator = torch.Generator().manual_seed(0)
    vectors, valid = torch.randn(5, 12, 4, generator=generator), torch.rand(5, 12, generator=generator) < 0.6
    neighbours = torch.tensor([1, 2, 3, 7, 50])
    found = density_peaks(distances(vectors), neighbours, valid)
    for own, places, k, order in zip(vectors, valid, neighbours.tolist(), found, strict=True):
        there = places.nonzero().view(-1)
        alone = density_peaks(distances(own[there][None]), k)[0]
        assert torch.equal(order[: len(there)], there[alone])


def test_of_copies_one_is_a_centre_before_any_other():
    vectors = torch.tensor([[0.0, 0], [5, 0], [0, 0], [5, 0], [9, 9], [0, 0]])[None]
    order = density_peaks(distances(vectors), 2)[0].tolist()
    assert sorted(order[:3]) == [0, 1, 4]
    assert order[3:] == [2, 3, 5]


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e3])
def test_neither_scale_nor_a_constant_breaks_it(scale):
    vectors = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(1)) * scale + 7
    assert sorted(density_peaks(distances(vectors), 3)[0].tolist()) == list(range(9))


def test_others_go_to_the_nearest_centre_and_centres_stay():
    vectors = torch.tensor([[0.0], [1], [2.1], [3], [3]])[None]
    centres = first_of(torch.tensor([[3, 0, 1, 2, 4]]), torch.tensor([2]))
    assert centres.tolist() == [[True, False, False, True, False]]
    assert to_centres(distances(vectors), centres).tolist() == [[0, 0, 3, 3, 3]]
    both = torch.tensor([[False, False, False, True, True]])
    assert to_centres(distances(vectors), both).tolist() == [[3, 3, 3, 3, 4]]


def turned(*degrees: float) -> torch.Tensor:
    angles = torch.tensor(degrees).deg2rad().cumsum(0)
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_segments_are_cut_below_the_threshold_and_often_enough():
    frames = turned(0, 10, 60, 5, 20, 80, 1)
    assert segments(frames, 0.9, 1).tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert segments(frames, 0.9, 4).tolist() == [0, 0, 1, 1, 2, 3, 3]
    assert segments(frames, -1.0, 1).tolist() == [0] * 7
    assert segments(frames, 0.9, 50).tolist() == list(range(7))
    assert segments(frames[:1], 0.9, 8).tolist() == [0]
    assert segments(torch.ones(4, 3), 0.9, 3).tolist() == [0, 1, 2, 2]
