"""FastVID on hand-made cases."""

import pytest
import torch

from llava.errors import ConfigError
from llava.token_compression import CompressionConfig, compress
from llava.token_compression.fastvid import FastVidOptions, shares


def result(features, salience, embeds, count, **options):
    config = CompressionConfig(method="fastvid", retained_tokens=count, options=options)
    return compress(features, config, map_attn=salience, map_embed=embeds)


def test_anchors_are_every_fourth_frame_from_a_segments_end():
    salient, anchors = shares([1, 6, 4], 30, 11 * 10, FastVidOptions())
    assert salient.tolist() == [6] * 11  # 10 per frame, of which 4 are merged ones
    assert anchors.tolist() == [4, 0, 12, 0, 0, 0, 12, 0, 0, 0, 16]
    salient, anchors = shares([4], 20, 40, FastVidOptions())  # one frame has no room for 16 anchors
    assert salient.tolist() == [7, 7, 6, 6]
    assert anchors.tolist() == [0, 0, 0, 14]


@pytest.mark.parametrize("budget", [1, 5, 11, 37, 120, 200, 219, 220])
@pytest.mark.parametrize("lengths", [[11], [1] * 11, [3, 8], [1, 6, 4]])
def test_shares_fit_into_frames_and_add_up(budget, lengths):
    salient, anchors = shares(lengths, 20, budget, FastVidOptions())
    assert int(salient.sum() + anchors.sum()) == budget
    assert (salient >= 0).all()
    assert (anchors >= 0).all()
    assert (salient + anchors <= 20).all()


@pytest.mark.parametrize("sources", ["all", "not anchors"])
def test_a_segment_by_hand(sources):
    """One segment of two frames: token 0 of each is salient, token 1 of the second is the anchor of the rest."""
    features = torch.tensor([[[9.0, 0], [0, 1], [0, 3]], [[9.0, 1], [0, 2], [0, 2.5]]])
    salience = torch.tensor([[0.8, 0.1, 0.1], [0.8, 0.1, 0.1]])
    found = result(
        features, salience, torch.ones(2, 4), 3, sources=sources, least_segments=1, merged_share=0.5, beta=0.7
    )
    anchor = int(found.positions[2])
    assert anchor in (4, 5)
    assert found.assignment.tolist() == [[0, 2, 2], [1, 2, 2]]
    others = [features.view(-1, 2)[index] for index in (1, 2, 4, 5) if sources == "all" or index != anchor]
    own = features.view(-1, 2)[anchor]
    torch.testing.assert_close(found.tokens[2], 0.7 * own + 0.3 * torch.stack(others).mean(0))
    assert torch.equal(found.tokens[:2], features[:, 0])


def test_with_beta_1_tokens_are_copies():
    generator = torch.Generator().manual_seed(0)
    features, salience = torch.randn(6, 25, 8, generator=generator), torch.rand(6, 25, generator=generator)
    found = result(features, salience, torch.ones(6, 4), 40, beta=1.0, least_segments=2)
    torch.testing.assert_close(found.tokens, features.flatten(0, 1)[found.positions])
    assert (found.assignment >= 0).all()


def test_nothing_is_merged_across_segments():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(6, 25, 8, generator=generator)
    embeds = torch.eye(2).repeat_interleave(3, dim=0)
    found = result(features, torch.rand(6, 25, generator=generator), embeds, 40, least_segments=2)
    frame_of = (found.positions // 25)[found.assignment]
    assert (frame_of[:3] < 3).all()
    assert (frame_of[3:] >= 3).all()


@pytest.mark.parametrize("options", [{"beta": -0.1}, {"merged_share": 2.0}, {"period": 0}, {"least_segments": 0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        CompressionConfig(method="fastvid", retained_tokens=1, options=options)
