"""HoliTom on hand-made cases."""

import itertools

import pytest
import torch

from llava.errors import ConfigError
from llava.token_compression import CompressionConfig, compress
from llava.token_compression.holitom import windows


def result(features, attention, count, **options):
    config = CompressionConfig(method="holitom", retained_tokens=count, options=options)
    return compress(features, config, vision_attn=attention)


def saved(stays: torch.Tensor, window: list[int]) -> int:
    total = 0
    for number in set(window):
        frames = [frame for frame, own in enumerate(window) if own == number]
        total += int(stays[frames[0] : frames[-1]].all(dim=0).sum()) * (len(frames) - 1)
    return total


@pytest.mark.parametrize("seed", range(12))
def test_windows_save_most_of_all_segmentations(seed):
    frames = 2 + seed % 6
    stays = torch.rand(frames - 1, 9, generator=torch.Generator().manual_seed(seed)) < 0.8
    found = windows(stays).tolist()
    cuts = itertools.product([0, 1], repeat=frames - 1)
    assert saved(stays, found) == max(saved(stays, [0, *itertools.accumulate(cut)]) for cut in cuts)
    assert found == sorted(found)


def test_windows_of_stills_of_changes_and_of_one_frame():
    assert windows(torch.ones(4, 3, dtype=torch.bool)).tolist() == [0] * 5
    assert windows(torch.zeros(4, 3, dtype=torch.bool)).tolist() == [0, 1, 2, 3, 4]
    assert windows(torch.ones(0, 3, dtype=torch.bool)).tolist() == [0]
    both = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 1, 1]], dtype=torch.bool)
    assert windows(both).tolist() == [0, 0, 1, 1]


def test_frames_that_differ_keep_the_tokens_with_most_attention():
    generator = torch.Generator().manual_seed(0)
    features, attention = torch.randn(4, 20, 16, generator=generator), torch.rand(4, 20, generator=generator)
    found = result(features, attention, 16, tau=0.99)
    expected = attention.topk(4).indices.sort().values + torch.arange(0, 80, 20)[:, None]
    assert torch.equal(found.positions, expected.flatten())
    assert torch.equal(found.tokens, features.flatten(0, 1)[found.positions])


def test_a_still_is_kept_once():
    features = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(0)).expand(5, 12, 16)
    found = result(features, torch.rand(5, 12), 12)
    assert found.positions.tolist() == list(range(12))
    assert torch.equal(found.assignment, torch.arange(12).expand(5, 12))
    torch.testing.assert_close(found.tokens, features[0])


def test_a_place_that_stays_is_its_mean_and_a_place_that_moves_is_chosen_by_attention():
    features = torch.tensor([[[1.0, 0], [0, 1], [1, 1]], [[3.0, 0], [0, -1], [-1, 1]]])
    attention = torch.tensor([[0.0, 0.1, 0.9], [0.0, 0.8, 0.1]])
    found = result(features, attention, 3)
    assert found.positions.tolist() == [0, 2, 4]
    assert found.assignment.tolist() == [[0, -1, 1], [0, 2, -1]]
    torch.testing.assert_close(found.tokens, torch.tensor([[2.0, 0], [1, 1], [0, -1]]))


def test_means_are_clustered_and_blended():
    """Three places that stay; the two near each other become one: 0.6 of the centre, 0.4 of the other."""
    features = torch.tensor([[1.0, 0.0], [1.1, 0.0], [0.0, 1.5]]).expand(3, 3, 2)
    found = result(features, torch.rand(3, 3), 2)
    first = found.tokens[found.assignment[0, 0]]
    assert torch.equal(found.assignment[0], found.assignment[2])
    assert found.assignment[0, 0] == found.assignment[0, 1] != found.assignment[0, 2]
    assert first[0].item() in (pytest.approx(0.6 + 0.44), pytest.approx(0.66 + 0.4))
    plain = result(features, torch.rand(3, 3), 2, beta=1.0)
    assert plain.tokens[plain.assignment[0, 0], 0].item() in (1.0, pytest.approx(1.1))


def test_more_than_the_windows_leave_is_taken_from_the_means_by_attention():
    features = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0)).repeat(3, 1, 1)
    attention = torch.arange(12.0).view(3, 4).softmax(1)
    attention[1, 2] = 5.0
    found = result(features, attention, 5)
    assert found.positions.tolist() == [0, 1, 2, 3, 6]
    assert found.assignment.tolist() == [[0, 1, 2, 3], [0, 1, 4, 3], [0, 1, 2, 3]]


def test_moving_tokens_may_be_clustered():
    features = torch.tensor([[[1.0, 0], [1, 0.1], [0, 5], [0, 5.2], [-3, 0]]])
    attention = torch.tensor([[0.1, 0.2, 0.1, 0.2, 0.9]])
    found = result(features, attention, 3, clustered_share=0.6)
    slots = found.assignment[0].tolist()
    assert slots[0] == slots[1] != slots[2] == slots[3]
    assert torch.equal(found.tokens[slots[4]], features[0, 4])


def test_threshold_follows_what_was_published():
    """Cosine 0.7 between the frames: the same at a tenth (0.65), not at a fifth (0.8)."""
    first = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    other = torch.randn(10, 64, generator=torch.Generator().manual_seed(1))
    other -= first * (first * other).sum(1, keepdim=True) / (first * first).sum(1, keepdim=True)
    other *= first.norm(dim=1, keepdim=True) / other.norm(dim=1, keepdim=True)
    features = torch.stack([first, 0.7 * first + 0.51**0.5 * other])
    assert (result(features, torch.rand(2, 10), 2).assignment[1] >= 0).all()
    assert (result(features, torch.rand(2, 10), 4).assignment[1] >= 0).sum() == 2
    with pytest.raises(ConfigError, match="beta must lie in"):
        CompressionConfig(method="holitom", retained_tokens=1, options={"beta": 2.0})
