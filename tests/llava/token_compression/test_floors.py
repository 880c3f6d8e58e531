"""Floors on cases where it is plain what they keep, and pooling against PyTorch's own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import adaptive_avg_pool2d, adaptive_avg_pool3d

from llava.errors import ConfigError
from llava.token_compression import CompressionConfig, compress


def video(frames: int, tokens: int, dim: int = 3) -> torch.Tensor:
    return torch.randn(frames, tokens, dim, generator=torch.Generator().manual_seed(0))


def positions(method: str, frames: int, tokens: int, budget: int, **settings) -> list[int]:
    config = CompressionConfig(method=method, retained_tokens=budget, **settings)
    return compress(video(frames, tokens), config).positions.tolist()


def test_fewer_frames():
    assert positions("uniform_frames", 4, 3, 6) == [0, 1, 2, 6, 7, 8]
    assert positions("uniform_frames", 4, 3, 5) == [0, 1, 2, 6, 7]
    assert positions("uniform_frames", 4, 3, 1) == [0]


@pytest.mark.parametrize("method", ["random", "random_per_frame"])
def test_a_draw_depends_on_the_seed_alone(method):
    config = CompressionConfig(method=method, retained_tokens=40)
    first = compress(video(10, 25), config).positions
    assert torch.equal(compress(-video(10, 25, dim=7).half(), config).positions, first)
    other = CompressionConfig(method=method, retained_tokens=40, seed=1)
    assert not torch.equal(compress(video(10, 25), other).positions, first)


@given(st.integers(1, 60))
def test_frames_share_a_draw_equally(budget):
    chosen = torch.tensor(positions("random_per_frame", 6, 10, budget)) // 10
    counts = torch.bincount(chosen, minlength=6)
    assert counts.max() - counts.min() <= 1


def test_grids():
    assert positions("grid_spatial", 2, 16, 8) == [0, 2, 8, 10, 16, 18, 24, 26]
    assert positions("grid_spatial", 1, 16, 5) == [0, 1, 2, 8, 10]
    assert positions("grid_spatial", 1, 16, 4, options={"rows": 2}) == [0, 2, 4, 6]
    every_other = [f * 64 + r * 8 + c for f in range(0, 8, 2) for r in range(0, 8, 2) for c in range(0, 8, 2)]
    assert positions("grid_spatiotemporal", 8, 64, 64) == every_other


def test_frames_that_are_not_square_need_their_rows():
    with pytest.raises(ConfigError, match="12 tokens are not square"):
        positions("grid_spatial", 2, 12, 8)
    assert positions("grid_spatial", 1, 12, 2, options={"rows": 3}) == [0, 2]


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 7), st.data())
def test_spatial_average_is_adaptive_pooling(frames, side, data):
    """Wherever the counts make a square."""
    out = data.draw(st.integers(1, side))
    features = video(frames, side * side)
    config = CompressionConfig(method="avgpool_spatial", retained_tokens=frames * out * out)
    expected = adaptive_avg_pool2d(features.mT.reshape(frames, -1, side, side), out).flatten(2).mT
    torch.testing.assert_close(compress(features, config).tokens, expected.flatten(0, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("count", "shape"), [(49, (7, 7)), (30, (5, 6)), (20, (4, 5)), (9, (3, 3)), (196, (14, 14))])
def test_pllava_pools_to_the_shapes_that_are_near_its_own(count, shape):
    features = video(2, 196)
    config = CompressionConfig(method="pllava", retained_tokens=2 * count)
    expected = adaptive_avg_pool2d(features.mT.reshape(2, -1, 14, 14), shape).flatten(2).mT.flatten(0, 1)
    torch.testing.assert_close(compress(features, config).tokens, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("frames", [3, 4, 7])
def test_pooling_in_time(frames):
    features = video(7, 16)
    config = CompressionConfig(method="pllava", retained_tokens=frames * 4, options={"frames": frames})
    expected = adaptive_avg_pool3d(features.permute(2, 0, 1).view(1, 3, 7, 4, 4), (frames, 2, 2))
    torch.testing.assert_close(
        compress(features, config).tokens, expected.view(3, frames, -1).permute(1, 2, 0).flatten(0, 1)
    )


def test_an_eighth_of_the_tokens_is_half_of_every_axis():
    tokens = compress(video(4, 16), CompressionConfig(method="avgpool_spatiotemporal", retained_tokens=8)).tokens
    expected = adaptive_avg_pool3d(video(4, 16).permute(2, 0, 1).view(1, 3, 4, 4, 4), 2)
    torch.testing.assert_close(tokens, expected.view(3, -1).mT)


@settings(deadline=None)
@given(st.sampled_from(["avgpool_spatial", "avgpool_spatiotemporal", "pllava"]), st.integers(1, 80))
def test_averages_lie_within_what_they_average_and_a_constant_stays(method, budget):
    config = CompressionConfig(method=method, retained_tokens=budget)
    features = video(5, 16)
    tokens = compress(features, config).tokens
    assert (tokens <= features.amax((0, 1)) + 1e-6).all()
    assert (tokens >= features.amin((0, 1)) - 1e-6).all()
    constant = features[:1, :1].expand(5, 16, 3)
    torch.testing.assert_close(compress(constant, config).tokens, constant[0, :1].expand(budget, 3))


def test_a_mean_is_kept_where_windows_do_not_overlap():
    features = video(4, 36)
    for method, budget in (("avgpool_spatial", 4 * 9), ("pllava", 4 * 4), ("pllava", 2)):
        result = compress(features, CompressionConfig(method=method, retained_tokens=budget))
        torch.testing.assert_close(result.tokens.mean(0), features.mean((0, 1)))


def test_pooling_to_no_frame_is_refused():
    with pytest.raises(ConfigError, match="frames must be at least 1, got 0"):
        CompressionConfig(method="pllava", retained_tokens=1, options={"frames": 0})
