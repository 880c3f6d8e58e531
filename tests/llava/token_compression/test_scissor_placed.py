"""Clusters compared by their means and places: against a plain loop, and what they are for."""

import math

import pytest
import torch

from llava.errors import ConfigError
from llava.token_compression import CompressionConfig, compress
from llava.token_compression.components import normalised
from llava.token_compression.scissor_placed import joined


def joined_one_by_one(vectors, count):
    """The same rounds on lists of members, every similarity computed from them anew."""
    clusters = [[[i] for i in range(vectors.shape[1])] for _ in vectors]
    while sum(map(len, clusters)) > count:
        pairs = []
        for graph, groups in enumerate(clusters):
            sums = torch.stack([vectors[graph, members].sum(dim=0) for members in groups])
            cosines = normalised(sums) @ normalised(sums).mT
            cosines.fill_diagonal_(-math.inf)
            nearest = cosines.argmax(dim=1).tolist()
            for i, j in enumerate(nearest):
                if i < j and nearest[j] == i and len(groups) > 1:
                    pairs.append((-float(cosines[i, j]), graph, i, j))
        pairs.sort()
        for _, graph, i, j in pairs[: min(sum(map(len, clusters)) - count, math.ceil(len(pairs) / 2))]:
            clusters[graph][i] = sorted(clusters[graph][i] + clusters[graph][j])
            clusters[graph][j] = []
        clusters = [sorted(group for group in groups if group) for groups in clusters]
    labels = torch.empty(vectors.shape[:2], dtype=torch.int64)
    for graph, groups in enumerate(clusters):
        for members in groups:
            labels[graph, members] = members[0]
    return labels


@pytest.mark.parametrize("seed", range(5))
def test_pairs_are_joined_as_one_by_one(seed):
    generator = torch.Generator().manual_seed(seed)
    vectors = normalised(torch.randn(3, 12 + seed, 4, generator=generator, dtype=torch.float64))
    for count in (3, 10, 20, 35):
        assert torch.equal(joined(vectors @ vectors.mT, count), joined_one_by_one(vectors, count))


def test_no_chain_of_likeness_joins_what_is_unlike():
    angle = torch.linspace(0, math.pi, 64, dtype=torch.float64)
    arc = torch.stack([angle.cos(), angle.sin()], dim=1).view(1, 64, 2)
    widest = {}
    for method, options in (("scissor", None), ("scissor_placed", {"time": 0, "space": 0})):
        config = CompressionConfig(method=method, retained_tokens=4, merge=False, options=options)
        members = compress(arc, config).assignment[0]
        widest[method] = max(int((members == token).sum()) for token in range(4))
    assert widest["scissor_placed"] <= 32 < widest["scissor"]


def test_what_never_changes_is_kept_once_in_each_part_of_the_video():
    still = torch.ones(8, 1, 5)
    result = compress(still, CompressionConfig(method="scissor_placed", retained_tokens=2, options={"space": 0}))
    first = int((result.assignment == 0).sum())
    assert result.assignment.view(-1).tolist() == [0] * first + [1] * (8 - first)
    assert 2 <= first <= 6
    positions = result.positions.tolist()
    assert 0 < positions[0] < first <= positions[1] < 7  # in the middle, not at an end


def test_no_token_stands_for_two_windows():
    features = torch.randn(10, 9, 6, generator=torch.Generator().manual_seed(0))
    config = CompressionConfig(method="scissor_placed", retained_tokens=20, options={"window": 4})
    assignment = compress(features, config).assignment
    parts = [set(part.unique().tolist()) for part in assignment.split(4)]
    assert set.union(*parts) == set(range(20))
    assert sum(map(len, parts)) == 20


@pytest.mark.parametrize("options", [{"time": -1}, {"space": -0.5}, {"window": 0}, {"rows": 0}])
def test_impossible_options_are_named(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        CompressionConfig(method="scissor_placed", retained_tokens=2, options=options)
