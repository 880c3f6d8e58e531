"""STTM's quadtrees and USTC's covers, on cases where it is plain what they keep, and against plain references."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.errors import ConfigError
from llava.token_compression import CompressionConfig, CompressionResult, compress
from llava.token_compression.components import normalised
from llava.token_compression.dpc_knn import density_peaks, distances, first_of, to_centres
from llava.token_compression.sttm import components, covered, pyramid
from llava.token_compression.ustc import cover, density_clusters


def noise(frames: int, tokens: int, dim: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(frames, tokens, dim, generator=torch.Generator().manual_seed(seed))


def run(features: torch.Tensor, method: str, budget: int, **options) -> CompressionResult:
    return compress(features, CompressionConfig(method=method, retained_tokens=budget, options=options or None))


def test_a_still_video_becomes_the_coarsest_squares_of_its_first_frame():
    """14 rows are 7 of two, these 4, of which the first one has a row for itself."""
    result = run(noise(1, 1).expand(3, 196, 8), "sttm", 16)
    starts = [0, 2, 6, 10]
    assert result.positions.tolist() == [14 * row + column for row in starts for column in starts]
    assert torch.equal(result.assignment[0].view(14, 14)[2:6, 6:10], torch.full((4, 4), 6))
    assert torch.equal(result.assignment[1], result.assignment[0])


def test_only_the_square_that_is_not_uniform_is_split():
    features = noise(1, 1).expand(1, 64, 8).clone()
    features[0, 9] *= -1  # row 1, column 1
    levels = pyramid(features, (8, 8), True)
    assert [level.shape for level in levels] == [(8, 8), (4, 4)]
    first, depth = covered(levels, 0.85)
    expected = {2 * row * 8 + 2 * column for row in range(4) for column in range(4)} | {0, 1, 8, 9}
    assert set(first.view(-1).tolist()) == expected
    assert torch.equal(depth[0].view(8, 8)[:2, :2], torch.zeros(2, 2, dtype=torch.int64))
    assert run(features, "sttm", 19).positions.tolist() == sorted(expected)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 11), st.integers(1, 11), st.floats(-1, 1), st.booleans())
def test_nodes_are_rectangles_with_their_first_token_as_name_and_their_mean(frames, rows, columns, tau, border):
    features = noise(frames, rows * columns)
    levels = pyramid(features, (rows, columns), border)
    first, depth = covered(levels, tau)
    for name in first.unique().tolist():
        frame, token = divmod(name, rows * columns)
        inside = (first[frame] == name).view(rows, columns)
        height, width = int(inside.any(dim=1).sum()), int(inside.any(dim=0).sum())
        row, column = divmod(token, columns)
        assert inside[row : row + height, column : column + width].all()
        assert inside.sum() == height * width
        level = levels[depth[frame, token]]
        if rows in (4, 8) and columns in (4, 8):  # elsewhere a mean of means weighs a border more
            mean = features[frame][inside.view(-1)].mean(0)
            torch.testing.assert_close(level.vectors[frame, level.square[token]], mean)


def test_as_released_border_squares_are_split_more_often():
    features = noise(2, 49) + 3
    features[:, 0] = -features[:, 0]  # the first token of a frame is like no other
    counts = [
        int((covered(pyramid(features, (7, 7), border), 0.5)[0].view(-1) == torch.arange(98)).sum())
        for border in (False, True)
    ]
    assert counts[0] < counts[1]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 20), st.data())
def test_components_are_those_of_single_linkage(frames, tokens, seed, data):
    """Join pairs at the same place in neighbouring frames, most similar first, one by one."""
    vectors = noise(frames, tokens, seed=seed).flatten(0, 1)
    node = torch.arange(frames * tokens).view(frames, tokens)
    most = data.draw(st.integers(tokens, frames * tokens))
    unit = normalised(vectors)
    edges = [(float(unit[u] @ unit[u + tokens]), u, u + tokens) for u in range((frames - 1) * tokens)]
    labels = list(range(frames * tokens))
    for _, u, v in sorted(edges, reverse=True):
        if len(set(labels)) <= most:
            break
        low, high = sorted((labels[u], labels[v]))
        labels = [low if label == high else label for label in labels]
    assert components(vectors, node, most).tolist() == labels


def test_fewer_tokens_than_components_join_the_largest():
    features = torch.eye(8)[:, None].expand(8, 1, 8)[[0, 0, 0, 1]].expand(4, 4, 8).clone()
    features[:, 3] = torch.eye(8)[2]
    result = run(features, "sttm", 2)
    assert (result.assignment >= 0).all()
    assert result.stats.spatial_tokens == 16


def cover_by_hand(unit: torch.Tensor, tau: float, most: int) -> list[int]:
    kept: list[int] = []
    for index, vector in enumerate(unit):
        if len(kept) < most and all(float(vector @ unit[other]) < tau for other in kept):
            kept.append(index)
    return kept


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([1, 7, 255, 256, 257, 600]), st.floats(-0.5, 0.95), st.integers(0, 9), st.integers(1, 600))
def test_a_cover_is_the_greedy_one(count, tau, seed, most):
    unit = normalised(noise(1, count, dim=4, seed=seed)[0])
    assert cover(unit, tau, most).tolist() == cover_by_hand(unit, tau, most)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(0, 20), st.integers(1, 8), st.data())
def test_clusters_of_one_large_set_are_those_of_density_peaks(count, seed, neighbours, data):
    vectors = noise(1, count, seed=seed)
    wanted = data.draw(st.integers(1, count))
    apart = distances(vectors)
    chosen = first_of(density_peaks(apart, neighbours), torch.tensor([wanted]))
    nearest = to_centres(apart, chosen)
    centres, slots = density_clusters(vectors[0], wanted, neighbours)
    assert torch.equal(centres, chosen[0].nonzero().view(-1))
    assert torch.equal(centres[slots], nearest[0])


def test_the_pool_takes_what_is_unlike_and_the_clusters_the_rest():
    kinds = 3 * torch.eye(8)[:5]
    features = (kinds.repeat_interleave(8, dim=0) + 0.01 * noise(1, 40)[0]).view(4, 10, 8)
    result = run(features, "ustc", 7, order="raster")
    firsts = {0, 8, 16, 24, 32}  # 0.7 * 7 = 5 of them
    assert firsts <= set(result.positions.tolist())
    alone = torch.bincount(result.assignment.view(-1), minlength=7) == 1
    kept = [index for index, position in enumerate(result.positions.tolist()) if position in firsts]
    assert alone[kept].all()
    assert torch.equal(result.tokens[kept], features.flatten(0, 1)[sorted(firsts)])


def test_copies_enter_the_pool_once_and_the_most_looked_at_comes_first():
    features = noise(1, 1).expand(2, 6, 8).clone()
    attention = torch.arange(12.0).view(2, 6)
    config = CompressionConfig(method="ustc", retained_tokens=1)
    assert compress(features, config, vision_attn=attention).positions.tolist() == [11]
    only_pool = CompressionConfig(method="ustc", retained_tokens=3, options={"cluster_share": 0.0})
    assert compress(noise(2, 6), only_pool, vision_attn=attention).positions.max() == 11
    assert len(cover(normalised(features.flatten(0, 1)), 0.7, 12)) == 1


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("ustc", {"cluster_share": 1.5}, r"cluster_share must be from 0 to 1, got 1\.5"),
        ("ustc", {"neighbours": 0}, "neighbours must be at least 1, got 0"),
        ("sttm", {"tau_s": 2.0}, r"tau_s is a cosine.*got 2\.0"),
    ],
)
def test_options_out_of_range_are_refused(method, options, words):
    with pytest.raises(ConfigError, match=words):
        CompressionConfig(method=method, retained_tokens=1, options=options)
