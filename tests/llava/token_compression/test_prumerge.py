"""PruMerge on hand-made cases, and against a loop over kept tokens."""

import pytest
import torch
from torch.nn import functional

from llava.token_compression import CompressionConfig, compress
from llava.token_compression.prumerge import PruMergeOptions, chosen, outlier_count


def result(features, attention, keys, count, **options):
    config = CompressionConfig(method="prumerge", retained_tokens=count, options=options)
    return compress(features, config, vision_attn_wide=attention, vision_keys_wide=keys)


def random_case(frames, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(frames, tokens, 8, generator=generator),
        torch.randn(frames, tokens, generator=generator).mul(2).softmax(dim=1),
        torch.randn(frames, tokens, 5, generator=generator),
    )


def test_what_stands_out_is_above_the_fence():
    attention = torch.tensor([[1.0, 2, 3, 4, 9], [1, 2, 3, 4, 5]])
    assert outlier_count(attention) == 0  # one of ten tokens is half a token per frame
    assert outlier_count(attention[:1]) == 1
    assert outlier_count(torch.full((2, 7), 1 / 7)) == 0


def test_spaced_tokens_fill_up_from_the_top_unless_they_are_even():
    attention = torch.tensor([[0.0, 0, 9, 0, 0, 0, 8, 0, 0, 0, 0, 0]])
    assert chosen(attention, 5, 2, PruMergeOptions()).tolist() == [[0, 2, 4, 6, 8]]  # every second, 2 and 6 taken
    assert chosen(attention, 5, 0, PruMergeOptions(even=True)).tolist() == [[0, 2, 4, 6, 8]]
    assert chosen(attention, 8, 2, PruMergeOptions()).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert chosen(attention, 8, 2, PruMergeOptions(even=True)).tolist() == [[0, 1, 2, 4, 6, 7, 8, 10]]
    assert chosen(attention, 2, 2, PruMergeOptions()).tolist() == [[2, 6]]
    assert chosen(attention, 3, 0, PruMergeOptions(spaced=False)).tolist() == [[0, 2, 6]]


@pytest.mark.parametrize("rest", [True, False])
def test_tokens_are_those_of_a_loop(rest):
    features, attention, keys = random_case(2, 60)
    found = result(features, attention, keys, 16, spaced=False, rest=rest)
    unit = functional.normalize(keys, dim=-1)
    for frame in range(2):
        own = attention[frame].topk(7 if rest else 8).indices.sort().values.tolist()
        dropped = [token for token in range(60) if token not in own]
        expected = {}
        for token in own:
            similarity = (unit[frame] @ unit[frame, token]).tolist()
            others = sorted((j for j in range(60) if j != token), key=similarity.__getitem__, reverse=True)
            expected[token] = features[frame, token] + sum(
                attention[frame, j] * features[frame, j] for j in others[:32]
            )
        if rest:
            place = max(dropped, key=lambda j: float(attention[frame, j]))
            expected[place] = sum(attention[frame, j] * features[frame, j] for j in dropped)
        here = found.positions // 60 == frame
        assert (found.positions[here] % 60).tolist() == sorted(expected)
        torch.testing.assert_close(found.tokens[here], torch.stack([expected[token] for token in sorted(expected)]))
    assert (found.assignment >= 0).all() or not rest


def test_uniform_attention_has_no_outliers_and_keeps_spaced_tokens():
    features, _, keys = random_case(1, 20)
    found = result(features, torch.full((1, 20), 0.05), keys, 5, rest=False)
    assert found.positions.tolist() == [0, 4, 8, 12, 16]
