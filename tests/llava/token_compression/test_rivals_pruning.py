"""Published methods that drop tokens, on cases where it is plain what they keep, and against plain references."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.errors import ConfigError
from llava.token_compression import CompressionConfig, compress
from llava.token_compression.vcast import curvature


def noise(frames: int, tokens: int, dim: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(frames, tokens, dim, generator=torch.Generator().manual_seed(seed))


def positions(features: torch.Tensor, method: str, budget: int, **options) -> list[int]:
    config = CompressionConfig(method=method, retained_tokens=budget, options=options or None)
    return compress(features, config).positions.tolist()


def counts(features: torch.Tensor, method: str, budget: int, **options) -> list[int]:
    frames = torch.tensor(positions(features, method, budget, **options)) // features.shape[1]
    return torch.bincount(frames, minlength=len(features)).tolist()


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.cosine_similarity(a.double(), b.double(), dim=0))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(0, 20), st.data())
def test_divprune_is_a_search_over_all_tokens(frames, tokens, seed, data):
    features = noise(frames, tokens, seed=seed)
    flat, total = features.flatten(0, 1), frames * tokens
    budget = data.draw(st.integers(1, max(1, total - 1)))

    def nearest(i, others):
        return min((1 - cosine(flat[i], flat[j]) for j in others if j != i), default=math.inf)

    picks = [max(range(total), key=lambda i: nearest(i, range(total)))]
    while len(picks) < budget:
        picks.append(max((i for i in range(total) if i not in picks), key=lambda i: nearest(i, picks)))
    assert positions(features, "divprune", budget) == sorted(picks)


def test_divprune_keeps_one_of_each_kind_first():
    kinds = noise(1, 4)[0]
    assert sorted(
        torch.tensor([0, 0, 1, 2, 1, 3, 3, 2])[positions(kinds[[0, 0, 1, 2, 1, 3, 3, 2]][None], "divprune", 4)].tolist()
    ) == [0, 1, 2, 3]


def test_vidcom2_gives_like_frames_like_shares_and_an_unlike_one_more():
    features = (noise(1, 16) + 2).expand(6, 16, 8).clone()
    assert counts(features, "vidcom2", 24) == [4] * 6
    features[4] *= -1
    for score in ("gauss_lowvar", "cosine"):
        shares = counts(features, "vidcom2", 24, score=score)
        assert shares[4] == max(shares) > sorted(shares)[-2]


@pytest.mark.parametrize("score", ["gauss_lowvar", "cosine"])
def test_vidcom2_keeps_what_is_least_like_both_means_in_float64(score):
    features = noise(4, 9).double() + 1
    quiet = features.var(dim=(0, 1)).argsort()[:4].sort().values
    some = features[..., quiet] if score == "gauss_lowvar" else features
    unit = some / some.norm(dim=-1, keepdim=True)

    def likeness(x, tokens, raw):
        if score == "cosine":
            return cosine(x, raw.mean(0))
        square = float((x - tokens.mean(0)).square().sum())
        return sum(math.exp(-square / (2 * a)) for a in (0.125, 0.25, 0.5, 1, 2))

    expected, shares = [], counts(features, "vidcom2", 13, score=score)
    for frame, share in enumerate(shares):
        scores = [
            likeness(x, unit.view(36, -1), some.view(36, -1)) + likeness(x, unit[frame], some[frame])
            for x in unit[frame]
        ]
        expected += [9 * frame + token for token in sorted(sorted(range(9), key=scores.__getitem__)[:share])]
    assert positions(features, "vidcom2", 13, score=score) == expected


@pytest.mark.parametrize("score", ["gauss_lowvar", "cosine"])
def test_vidcom2_follows_frames_wherever_they_are(score):
    features, order = noise(5, 16), torch.tensor([3, 0, 4, 1, 2])
    expected = torch.tensor(counts(features, "vidcom2", 31, score=score))[order]
    assert counts(features[order], "vidcom2", 31, score=score) == expected.tolist()


def test_vidcom2_by_cosine_does_not_see_the_length_of_directions_that_balance():
    """Tokens of a frame in one direction but for one: that one is kept."""
    features = torch.zeros(1, 8, 4)
    features[..., 0] = 1
    features[0, 5, 1] = 3
    for score in ("gauss_lowvar", "cosine"):
        assert positions(features, "vidcom2", 1, score=score) == ([5] if score == "cosine" else [0])


def test_vidcom2_looks_at_the_channels_that_vary_least():
    features = torch.zeros(1, 8, 4)
    features[..., :2] = torch.tensor([1.0, 0.0])
    features[0, 3, :2] = torch.tensor([0.8, 0.6])  # unlike the others in the quiet channels
    features[..., 2] = 100 * noise(1, 8)[..., 0]
    features[..., 3] = 100 * noise(1, 8)[..., 1]
    assert positions(features, "vidcom2", 1) == [3]


def test_evs_keeps_the_first_frame_and_what_changed():
    features = noise(1, 6).expand(4, 6, 8).clone()
    features[2:, 4] = noise(1, 1, seed=1)[0]  # changes once, in frame 2
    assert positions(features, "evs", 7) == [0, 1, 2, 3, 4, 5, 16]
    assert positions(noise(1, 6).expand(4, 6, 8), "evs", 6) == [0, 1, 2, 3, 4, 5]
    assert max(positions(features, "evs", 3)) < 6


@given(st.integers(1, 5), st.integers(1, 6))
@settings(deadline=None, max_examples=30)
def test_evs_budgets_are_nested(frames, tokens):
    features, before = noise(frames, tokens), set()
    for budget in range(1, frames * tokens + 1):
        now = set(positions(features, "evs", budget))
        assert before < now
        before = now


def test_dycoke_counts_are_the_published_ones():
    """F = 32, N = 196, int(0.3 * 196) = 58 tokens of each thinned frame: 3098 tokens, 9 frames whole."""
    features = noise(32, 196, dim=2)
    assert counts(features, "dycoke_ttm", 3098) == [196 if frame % 4 == 0 or frame == 30 else 58 for frame in range(32)]
    later = counts(noise(33, 196, dim=2), "dycoke_ttm", 9 * 196 + 24 * 58)  # the loop reaches frame 30 of 33
    assert later == [196 if frame % 4 == 0 else 58 for frame in range(33)]
    without = counts(features, "dycoke_ttm", 8 * 196 + 24 * 58, tail_bug=False)
    assert without == [196 if frame % 4 == 0 else 58 for frame in range(32)]


def test_dycoke_keeps_what_changed_since_the_frame_that_it_compares_with():
    features = noise(1, 5).expand(8, 5, 8).clone()
    features[1:4, 2] *= -1  # frames 1 and 2 are unlike frame 0 here, and frame 3 is like frame 2
    features[1, 0, 0] += 1  # the only place where frame 2 is unlike frame 1
    features[3, 4] *= -1
    kept = positions(features, "dycoke_ttm", 10 + 6, tail_bug=False)
    assert {5 + 2, 10 + 2, 15 + 4} <= set(kept)
    assert counts(features, "dycoke_ttm", 16, tail_bug=False) == [5, 1, 1, 1, 5, 1, 1, 1]


def test_dycoke_below_a_quarter_thins_the_whole_frames():
    features = noise(12, 4)
    assert counts(features, "dycoke_ttm", 8, tail_bug=False) == [4, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0]
    assert counts(features, "dycoke_ttm", 3) == [3, *[0] * 11]


def test_curvature_of_a_path():
    straight = torch.tensor([0.0, 1, 2, 3])[:, None] * torch.tensor([1.0, 2])
    torch.testing.assert_close(curvature(straight), torch.tensor([1.0, 0, 0, 1]))
    back = torch.tensor([[0.0, 0], [1, 0], [0, 0], [0, 1]])
    torch.testing.assert_close(curvature(back), torch.tensor([1.0, 2, 1, 1]))
    assert curvature(back[:1]).tolist() == [1]


def test_vcast_favours_turns_and_its_leftovers_go_to_one_frame_or_to_several():
    angle = torch.tensor([0.0, 0.3, 0.6, 0.3, 0.6, 0.9])  # turns back at frames 2 and 3
    features = torch.stack([angle.cos(), angle.sin()], dim=1)[:, None].expand(6, 40, 2)
    shares = counts(features, "vcast", 60)
    assert min(shares[2:4]) > max(shares[i] for i in (0, 1, 4, 5))
    still = noise(1, 40).expand(7, 40, 8)  # every weight the same: the remainders too
    assert counts(still, "vcast", 7 * 5 + 3) == [8, 5, 5, 5, 5, 5, 5]
    assert counts(still, "vcast", 7 * 5 + 3, leftovers_to_one=False) == [6, 6, 6, 5, 5, 5, 5]


def test_vcast_keeps_long_tokens_and_those_unlike_their_frame():
    features = torch.tensor([1.0, 0, 0]).expand(1, 9, 3).clone()
    features[0, 4] *= 3
    features[0, 7] = torch.tensor([0.0, 1, 0])
    assert positions(features, "vcast", 2) == [4, 7]


@pytest.mark.parametrize("method", ["vidcom2", "vcast"])
def test_temperatures_are_positive(method):
    with pytest.raises(ConfigError, match=r"temperature must be above 0, got 0\.0"):
        CompressionConfig(method=method, retained_tokens=1, options={"temperature": 0})
