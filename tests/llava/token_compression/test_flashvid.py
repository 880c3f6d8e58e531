"""FlashVID on hand-made cases, and its two choices against loops."""

import pytest
import torch
from torch.nn import functional

from llava.errors import ConfigError
from llava.token_compression import CompressionConfig, compress
from llava.token_compression.flashvid import diverse, links


def result(features, attention, count, **options):
    config = CompressionConfig(method="flashvid", retained_tokens=count, options=options)
    return compress(features, config, vision_attn=attention)


def random_case(frames, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(1, tokens, 8, generator=generator) + 0.7 * torch.randn(
        frames, tokens, 8, generator=generator
    )
    return features, torch.rand(frames, tokens, generator=generator)


@pytest.mark.parametrize("negative", [False, True])
def test_diverse_tokens_are_those_of_a_loop(negative):
    features, weights = random_case(4, 9)
    if negative:
        weights = weights - 0.4
    unit = functional.normalize(features, dim=-1)
    counts = torch.tensor([1, 4, 9, 0])
    found = diverse(unit, weights, counts)
    for frame, count in enumerate(counts.tolist()):
        apart = [[(1 - float(a @ b)) * float(w) if i != j else 0.0 for j, (b, w) in enumerate(zip(unit[frame], weights[frame], strict=True))] for i, a in enumerate(unit[frame])]  # fmt: skip # noqa: E501
        chosen: list[int] = []
        for _ in range(count):
            left = [j for j in range(9) if j not in chosen]
            columns = {j: [apart[i][j] for i in (chosen or range(9))] for j in left}
            closest = {j: min(column) if chosen else sorted(column)[1] for j, column in columns.items()}
            chosen.append(max(left, key=lambda j: (closest[j], -j)))
        assert found[frame].nonzero().flatten().tolist() == sorted(chosen)


def test_links_are_the_strongest_ones_that_there_is_room_for():
    features, scores = random_case(6, 10)
    unit, selected = functional.normalize(features, dim=-1), scores < 0.3
    segment, room = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([50, 3])
    parent = links(unit, selected, segment, room, 0.2).view(6, 10)
    found, possible = {}, {0: [], 1: []}
    for frame in range(6):
        for token in range(10):
            to = int(parent[frame, token])
            if to != frame * 10 + token:
                found[frame, token] = to
            if frame in (0, 3) or selected[frame, token]:
                continue
            cosines = [float(unit[frame, token] @ unit[frame - 1, k]) if not selected[frame - 1, k] else -1.0 for k in range(10)]  # fmt: skip # noqa: E501
            best = max(range(10), key=lambda k: (cosines[k], -k))
            if cosines[best] > 0.2:
                possible[int(segment[frame])].append((-cosines[best], frame, token, (frame - 1) * 10 + best))
    expected = {(f, t): to for own, most in ((0, 50), (1, 3)) for _, f, t, to in sorted(possible[own])[:most]}
    assert len(possible[1]) > 3
    assert found == expected


@pytest.mark.parametrize(("rule", "divisor"), [("exact", 3), ("released", 2)])
def test_a_chain_of_three(rule, divisor):
    """One place that turns slowly: each frame follows the one before, so the released rule divides by two."""
    features = torch.tensor([[[3.0, 0.0]], [[3.0, 0.1]], [[3.0, 0.2]]])
    found = result(features, torch.ones(3, 1), 1, selected_share=0.0, least_segments=1, tree_mean=rule)
    assert found.assignment.tolist() == [[-1], [-1], [0]] or found.assignment.tolist() == [[0], [0], [0]]
    torch.testing.assert_close(found.tokens, features.sum(0) / divisor)


def test_with_nothing_clustered_it_is_the_choice_of_diverse_tokens():
    features, attention = random_case(5, 16)
    found = result(features, attention, 20, selected_share=1.0, relevance=False)
    unit = functional.normalize(features, dim=-1)
    expected = diverse(unit, attention, torch.full((5,), 4)).view(-1).nonzero().view(-1)
    assert torch.equal(found.positions, expected)
    assert torch.equal(found.tokens, features.flatten(0, 1)[expected])


def test_selected_tokens_stay_and_every_other_one_is_in_one_tree():
    features, attention = random_case(6, 16)
    found = result(features, attention, 48, least_segments=1, tau=-1.0, tree_tau=0.5)
    assert (found.assignment >= 0).all()
    flat = features.flatten(0, 1)
    lone = torch.bincount(found.assignment.flatten()) == 1
    torch.testing.assert_close(found.tokens[lone], flat[found.positions][lone])
    assert torch.bincount(found.positions // 16, minlength=6).sum() == 48
    assert lone.sum() >= 6 * 6  # 0.7 of 8, rounded up


def test_options_out_of_range_are_refused():
    for options in ({"selected_share": 1.2}, {"least_segments": 0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            CompressionConfig(method="flashvid", retained_tokens=1, options=options)
