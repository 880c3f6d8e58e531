"""VisionZip on hand-made cases."""

import pytest
import torch

from llava.errors import ConfigError
from llava.token_compression import CompressionConfig, compress


def result(features, attention, keys, count, **options):
    config = CompressionConfig(method="visionzip", retained_tokens=count, options=options)
    return compress(features, config, vision_attn=attention, vision_keys=keys)


@pytest.mark.parametrize(("rule", "factor"), [("sum", 1.0), ("mean", 1 / 3)])
def test_one_frame_by_hand(rule, factor):
    """Tokens 4 and 1 are dominant; of 0, 2, 3, 5 every second one is a contextual token: 0 and 3."""
    features = torch.eye(6).unsqueeze(0)
    attention = torch.tensor([[0.1, 0.3, 0.1, 0.1, 0.4, 0.0]])
    keys = torch.tensor([[[1.0, 0], [0, 0], [2.0, 1], [0, 1], [0, 0], [9.0, 0]]])  # 2 and 5 are nearer to 0 than to 3
    found = result(features, attention, keys, 4, contextual=rule, dominant_share=0.5)
    assert found.positions.tolist() == [0, 1, 3, 4]
    assert found.assignment.tolist() == [[0, 1, 0, 2, 3, 0]]
    merged = features[0, 0] + (features[0, 2] + features[0, 5]) / 2 if rule == "sum" else features[0, [0, 2, 5]].mean(0)
    torch.testing.assert_close(found.tokens, torch.stack([merged, *features[0, [1, 3, 4]]]))


def test_without_contextual_tokens_it_is_a_choice_by_attention():
    generator = torch.Generator().manual_seed(0)
    features, attention = torch.randn(3, 20, 4, generator=generator), torch.rand(3, 20, generator=generator)
    found = result(features, attention, torch.zeros(3, 20, 2), 15, dominant_share=1.0)
    expected = attention.topk(5).indices.sort().values + torch.arange(0, 60, 20)[:, None]
    assert torch.equal(found.positions, expected.flatten())
    assert torch.equal(found.tokens, features.flatten(0, 1)[found.positions])


def test_equal_keys_all_join_the_first_contextual_token():
    features = torch.randn(1, 64, 4, generator=torch.Generator().manual_seed(0))
    attention = torch.arange(64.0).softmax(-1).view(1, 64)
    found = result(features, attention, torch.ones(1, 64, 3), 32)
    sizes = torch.bincount(found.assignment.flatten(), minlength=32)
    assert sizes.tolist() == [1 + 32, *[1] * 31]
    assert (found.positions < 37).sum() == 5  # 5.4 : 1 of 32 is 27 dominant tokens, the last ones


def test_the_budget_is_spread_evenly_and_a_share_out_of_range_is_refused():
    features, attention = torch.randn(5, 9, 4), torch.rand(5, 9)
    found = result(features, attention, torch.randn(5, 9, 2), 17)
    assert torch.bincount(found.positions // 9).tolist() == [3, 3, 4, 3, 4]
    with pytest.raises(ConfigError, match="dominant_share must be above 0"):
        CompressionConfig(method="visionzip", retained_tokens=1, options={"dominant_share": 1.5})
