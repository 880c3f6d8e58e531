"""Properties of Semantic Connected Components beyond parity with the published outputs."""

import math

import pytest
import torch

from llava.token_compression import CompressionConfig, compress
from llava.token_compression.scissor import TOLERANCE, sample_vertices


def clustered(frames: int = 6, tokens: int = 20, dim: int = 16, noise: float = 0.25, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    prototypes = torch.randn(8, dim, generator=generator)
    group = torch.randint(0, 8, (frames, tokens), generator=generator)
    return prototypes[group] + noise * torch.randn(frames, tokens, dim, generator=generator)


def test_three_tokens_by_hand():
    """cos(a, b) = 0.8, c orthogonal: a and b join above 0.7 and not at 0.8, where strictness decides."""
    frame = torch.tensor([[[1.0, 0, 0], [0.8, 0.6, 0], [0, 0, 2.0]]])
    joined = compress(frame, CompressionConfig(similarity_threshold=0.7, merge=False))
    torch.testing.assert_close(joined.tokens, torch.tensor([[0.9, 0.3, 0], [0, 0, 2.0]]))
    assert joined.positions.tolist() == [0, 2]
    assert joined.assignment.tolist() == [[0, 0, 1]]
    merged = compress(frame, CompressionConfig(similarity_threshold=0.7))
    torch.testing.assert_close(
        merged.tokens, torch.tensor([[0.9, 0.3, 0], [0, 0, 2.0]])
    )  # (a + b + mean) / 3, (c + c) / 2


def test_the_threshold_is_strict():
    frame = torch.tensor([[[1.0, 1, 0, 0], [1, 0, 1, 0]]])  # cosine exactly 0.5
    frame = torch.cat([frame, torch.tensor([[[2.0, 0, 0, 0], [1, 1, 1, 1]]])])  # cosine exactly 0.5, exact in floats
    config = CompressionConfig(similarity_threshold=0.5, temporal=False, merge=False)
    assert compress(frame[1:], config).stats.kept_tokens == 2
    below = CompressionConfig(similarity_threshold=0.49, temporal=False, merge=False)
    assert compress(frame[1:], below).stats.kept_tokens == 1


def test_the_representative_is_the_vertex_of_highest_degree():
    """A path a - b - c: b has two neighbours, so the component stands where b is, after d, which comes before it."""
    angle = torch.tensor([0.0, 90, 25, 50]).deg2rad()  # a, d, b, c
    frame = torch.stack([angle.cos(), angle.sin()], dim=1).unsqueeze(0)
    result = compress(frame, CompressionConfig(similarity_threshold=math.cos(math.radians(30)), merge=False))
    assert result.positions.tolist() == [1, 2]
    assert result.assignment.tolist() == [[1, 0, 1, 1]]


def test_chains_lose_no_token():
    """Every token resembles only its neighbours in a shuffled order: the published function drops some of them."""
    order = torch.randperm(600, generator=torch.Generator().manual_seed(0))
    angle = (order * 0.25).deg2rad()  # 600 tokens over 150 degrees
    frame = torch.stack([angle.cos(), angle.sin()], dim=1).unsqueeze(0)
    result = compress(frame, CompressionConfig(similarity_threshold=math.cos(math.radians(0.3)), merge=False))
    assert result.stats.kept_tokens == 1
    torch.testing.assert_close(result.tokens[0], frame[0].mean(0))


def test_equal_tokens_do_not_join_at_threshold_one():
    features = torch.ones(2, 5, 3)
    assert compress(features, CompressionConfig(similarity_threshold=1.0)).stats.kept_tokens == 10
    assert compress(features, CompressionConfig(similarity_threshold=0.9999)).stats.kept_tokens == 1


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.5, 0.9])
def test_zero_vectors_are_similar_to_nothing(threshold):
    features = clustered()
    expected = compress(features, CompressionConfig(similarity_threshold=threshold))
    padded = torch.cat([features, torch.zeros(2, 20, 16)])
    result = compress(padded, CompressionConfig(similarity_threshold=threshold))
    assert torch.equal(result.tokens[:-40], expected.tokens)
    assert not result.tokens[-40:].any()
    assert torch.equal(result.positions[-40:], torch.arange(120, 160))
    assert torch.equal(result.assignment[:6], expected.assignment)


def test_zero_vectors_merge_last_under_a_budget():
    features = torch.cat([clustered(frames=2), torch.zeros(1, 20, 16)])
    result = compress(features, CompressionConfig(retained_tokens=21))
    assert result.assignment[2].unique().numel() == 20
    assert compress(torch.zeros(3, 4, 5), CompressionConfig(retained_tokens=2)).tokens.shape == (2, 5)


def test_constant_frames_collapse_to_one_token_each():
    frames = torch.eye(4).unsqueeze(1).expand(4, 9, 4)
    result = compress(frames, CompressionConfig(retained_tokens=4))
    torch.testing.assert_close(result.tokens, torch.eye(4))
    assert torch.equal(result.assignment, torch.arange(4).unsqueeze(1).expand(4, 9))


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9])
def test_permuting_tokens_within_frames_permutes_the_result(threshold):
    features = clustered().double()
    order = torch.stack([torch.randperm(20, generator=torch.Generator().manual_seed(frame)) for frame in range(6)])
    permuted = torch.gather(features, 1, order.unsqueeze(-1).expand(-1, -1, 16))
    config = CompressionConfig(similarity_threshold=threshold)
    result, moved = compress(features, config), compress(permuted, config)
    assert moved.stats.kept_tokens == result.stats.kept_tokens
    same = torch.cdist(moved.tokens, result.tokens).argmin(dim=1)  # token of the result that each moved one equals
    torch.testing.assert_close(moved.tokens, result.tokens[same], atol=1e-9, rtol=0)
    assert torch.equal(same[moved.assignment], torch.gather(result.assignment, 1, order))


def test_scaling_a_token_does_not_change_its_neighbours():
    features = clustered()
    scale = torch.rand(6, 20, 1, generator=torch.Generator().manual_seed(1)) + 0.5
    config = CompressionConfig(similarity_threshold=0.8, temporal=False, merge=False)
    assert torch.equal(compress(features * scale, config).assignment, compress(features, config).assignment)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [6, 20, 60, 119])
def test_a_spatial_budget_is_the_threshold_that_it_reports(seed, count):
    features = clustered(seed=seed)
    exact = compress(features, CompressionConfig(retained_tokens=count, temporal=False))
    settings = {"similarity_threshold": exact.stats.similarity_threshold, "temporal": False}
    by_threshold = compress(features, CompressionConfig(**settings))
    if count > 6:  # at 6 no edge is left over to name a threshold
        assert torch.equal(exact.positions, by_threshold.positions)
        assert torch.equal(exact.tokens, by_threshold.tokens)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("threshold", [0.7, 0.8, 0.85, 0.9])
def test_a_budget_shares_one_threshold_between_both_steps(seed, threshold):
    """Asked for the count that tau leaves, the budget ends with the thresholds of both steps nearly equal.

    Applied to the input, the reported threshold then leaves about as many tokens after each step.
    """
    features = clustered(frames=8, tokens=49, noise=0.4, seed=seed)
    count = compress(features, CompressionConfig(similarity_threshold=threshold)).stats.kept_tokens
    exact = compress(features, CompressionConfig(retained_tokens=count)).stats
    around = [
        compress(features, CompressionConfig(similarity_threshold=exact.similarity_threshold + shift)).stats
        for shift in (-TOLERANCE, TOLERANCE)
    ]
    assert around[0].spatial_tokens <= exact.spatial_tokens <= around[1].spatial_tokens
    slack = 1 + count // 10  # after both steps the count may fall as the threshold rises, by a little
    assert around[0].kept_tokens - slack <= count <= around[1].kept_tokens + slack


def test_unrelated_frames_leave_nothing_to_the_temporal_step():
    """Frames live in orthogonal subspaces: no threshold joins two frames, so the spatial step meets the budget."""
    features = torch.zeros(4, 10, 32)
    for frame in range(4):
        features[frame, :, 8 * frame : 8 * frame + 8] = clustered(1, 10, 8, seed=frame)[0].abs()
    stats = compress(features, CompressionConfig(retained_tokens=8)).stats
    assert stats.kept_tokens == 8
    frame_of_token = compress(features, CompressionConfig(retained_tokens=8)).positions // 10
    assert len(frame_of_token.unique()) == 4


@pytest.mark.parametrize(
    ("n", "epsilon", "size"),
    [
        *[(1, 0.5, None), (10, 0.5, None), (196, 0.05, None), (3233, 0.05, None), (50, 0.0, None), (50, 1e-200, None)],
        *[(3300, 0.05, 3241), (196, 0.2, 132), (196, 0.5, 22), (10, 100.0, 1)],
    ],
)
def test_sample_size_is_that_of_equation_2(n, epsilon, size):
    sampled = sample_vertices((3, n), epsilon, torch.Generator().manual_seed(0))
    if size is None:
        assert sampled is None
    else:
        assert sampled.sum(1).tolist() == [size] * 3


def test_sampling_depends_on_the_seed_and_only_ever_splits():
    features = clustered(tokens=60, noise=0.5)
    exact = compress(features, CompressionConfig(similarity_threshold=0.6, temporal=False, merge=False))

    def sampled(seed):
        config = CompressionConfig(
            similarity_threshold=0.6, temporal=False, merge=False, error_tolerance=0.6, seed=seed
        )
        return compress(features, config)

    assert torch.equal(sampled(0).tokens, sampled(0).tokens)
    assert len({tuple(sampled(seed).positions.tolist()) for seed in range(5)}) > 1
    for seed in range(5):
        result = sampled(seed)
        assert result.stats.kept_tokens > exact.stats.kept_tokens
        pairs = torch.stack([result.assignment.view(-1), exact.assignment.view(-1)], dim=1).unique(dim=0)
        assert len(pairs) == result.stats.kept_tokens  # each sampled component lies within one exact component


def test_selection_rules_keep_what_they_promise():
    features = clustered()
    flat = features.flatten(0, 1)
    config = {"retained_tokens": 30, "merge": False}
    largest = compress(features, CompressionConfig(method="l2norm", **config))
    threshold = flat.norm(dim=1).sort(descending=True).values[29]
    assert (flat[largest.positions].norm(dim=1) >= threshold).all()
    assert torch.equal(largest.tokens, flat[largest.positions])
    gaps = compress(features, CompressionConfig(method="uniform", **config)).positions
    assert gaps[0] == 0
    assert gaps[-1] == 119
    assert gaps.diff().max() - gaps.diff().min() <= 1
    draws = [
        compress(features, CompressionConfig(method="random", seed=seed, **config)).positions for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    ties = compress(torch.ones(2, 3, 4), CompressionConfig(method="l2norm", retained_tokens=2, merge=False))
    assert ties.positions.tolist() == [0, 1]
    assert ties.assignment.tolist() == [[0, 1, -1], [-1, -1, -1]]
