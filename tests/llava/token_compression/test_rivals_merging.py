"""Published methods that average tokens, on cases where it is plain what they keep, and against plain references."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.errors import ConfigError
from llava.token_compression import CompressionConfig, CompressionResult, compress
from llava.token_compression.apportion import bounded_shares
from llava.token_compression.kitoke import KiTokeOptions, crowd, frame_changes, parts, pivotal
from llava.token_compression.simplecluster import rotated, without_empty


def noise(frames: int, tokens: int, dim: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(frames, tokens, dim, generator=torch.Generator().manual_seed(seed))


def run(features: torch.Tensor, method: str, budget: int, **options) -> CompressionResult:
    return compress(features, CompressionConfig(method=method, retained_tokens=budget, options=options or None))


def sizes(result: CompressionResult) -> torch.Tensor:
    return torch.bincount(result.assignment[result.assignment >= 0], minlength=len(result.tokens))


def assert_means(features: torch.Tensor, result: CompressionResult) -> None:
    flat, slots = features.flatten(0, 1), result.assignment.view(-1)
    expected = torch.stack([flat[slots == slot].mean(0) for slot in range(len(result.tokens))])
    torch.testing.assert_close(result.tokens, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["framefusion", "simplecluster", "tome"])
@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.sampled_from([1, 4, 9]), st.integers(0, 9), st.data())
def test_every_token_is_the_mean_of_those_that_went_into_it(method, frames, tokens, seed, data):
    features = noise(frames, tokens, seed=seed)
    assert_means(features, run(features, method, data.draw(st.integers(1, frames * tokens))))


def tome_by_hand(features: torch.Tensor, budget: int, raster: bool) -> list[tuple[int, list[int]]]:
    """(anchor, members) of every token."""
    flat = features.flatten(0, 1).double()
    groups = [(index, [index]) for index in range(len(flat))]
    while len(groups) > budget:
        vectors = [flat[own].mean(0) for _, own in groups]
        even, odd = range(0, len(groups), 2), range(1, len(groups), 2)
        pairs = []
        for i in even:
            cosines = [float(torch.cosine_similarity(vectors[i], vectors[j], dim=0)) for j in odd]
            pairs.append((max(cosines), i, odd[max(range(len(odd)), key=cosines.__getitem__)]))
        pairs.sort(key=lambda pair: -pair[0])
        merged = pairs[: min(len(groups) - budget, len(odd))]
        joined = {j: list(groups[j][1]) for j in odd}
        for _, i, j in merged:
            joined[j] += groups[i][1]
        groups = [groups[i] for _, i, _ in pairs[len(merged) :]] + [(groups[j][0], joined[j]) for j in odd]
        if raster:
            groups.sort()
    return sorted((anchor, sorted(own)) for anchor, own in groups)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 9), st.booleans(), st.data())
def test_tome_is_bipartite_matching_by_hand(frames, tokens, seed, raster, data):
    features = noise(frames, tokens, seed=seed)
    budget = data.draw(st.integers(1, frames * tokens))
    result = run(features, "tome", budget, order="raster" if raster else "released")
    members = [(result.assignment.view(-1) == slot).nonzero().view(-1).tolist() for slot in range(budget)]
    assert list(zip(result.positions.tolist(), members, strict=True)) == tome_by_hand(features, budget, raster)


def test_tome_keeps_the_weighted_mean_and_merges_copies_first():
    features = noise(4, 8)
    result = run(features, "tome", 5)
    weighted = (result.tokens * sizes(result).unsqueeze(1)).sum(0) / 32
    torch.testing.assert_close(weighted, features.mean((0, 1)))
    pairs = noise(1, 6)[0].repeat_interleave(2, dim=0)[None]
    torch.testing.assert_close(run(pairs, "tome", 6).tokens, pairs[0, ::2])


def test_framefusion_merges_runs_that_stay():
    features = noise(1, 3).expand(4, 3, 8).clone()
    features[2:, 1] = noise(1, 1, seed=1)[0]
    result = run(features, "framefusion", 4)
    assert result.positions.tolist() == [0, 1, 2, 7]
    assert result.assignment.tolist() == [[0, 1, 2], [0, 1, 2], [0, 3, 2], [0, 3, 2]]
    assert run(features, "framefusion", 3).assignment.tolist() == [[0, 1, 2]] * 4


def test_framefusion_compares_with_the_predecessor_not_with_the_first():
    """A slow turn is one run, though its ends have nothing in common."""
    angle = torch.linspace(0, math.pi, 9)
    turn = torch.stack([angle.cos(), angle.sin()], dim=1)
    jump = torch.eye(2)[[0, 0, 0, 0, 1, 1, 1, 1, 1]]
    result = run(torch.stack([turn, jump], dim=1), "framefusion", 3)
    assert result.positions.tolist() == [0, 1, 9]


def test_framefusion_drops_only_below_one_frame():
    features = noise(5, 6)
    assert (run(features, "framefusion", 6).assignment >= 0).all()
    assert len(run(features, "framefusion", 2).assignment[0].unique()) == 3  # two slots, and dropped


def test_clusters_that_are_plain_to_see_are_found():
    kinds = torch.eye(8)[:5] * 3
    label = torch.randint(0, 5, (4, 9), generator=torch.Generator().manual_seed(0))
    features = kinds[label] + 0.05 * noise(4, 9)
    result = run(features, "simplecluster", 5, positions=False)
    first = [int((label.view(-1) == kind).nonzero()[0]) for kind in range(5)]
    assert result.positions.tolist() == sorted(first)
    assert torch.equal(label.view(-1)[result.positions][result.assignment], label)


@pytest.mark.parametrize("method", ["simplecluster"])
def test_clusters_are_numbered_by_their_first_members(method):
    result = run(noise(4, 9), method, 7)
    firsts = [int((result.assignment.view(-1) == slot).nonzero()[0]) for slot in range(7)]
    assert result.positions.tolist() == firsts == sorted(firsts)


def test_iterations_do_not_make_clusters_looser():
    features = noise(6, 16, dim=12)

    def looseness(iterations):
        result = run(features, "simplecluster", 9, iterations=iterations, positions=False)
        unit = torch.nn.functional.normalize(features.flatten(0, 1), dim=1)
        slots = result.assignment.view(-1)
        sums = torch.zeros(9, 12).index_add(0, slots, unit)
        return 96 - float(sums.norm(dim=1).sum())  # sum of 1 - cosine to the direction of the cluster

    values = [looseness(iterations) for iterations in range(1, 8)]
    assert all(after <= before + 1e-4 for before, after in pairwise(values))
    assert values[-1] < values[0]


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 20))
@settings(deadline=None, max_examples=40)
def test_rotation_keeps_lengths_and_turns_by_position(frames, rows, columns, dim):
    features = noise(frames, rows * columns, dim).double().view(frames, rows, columns, dim)
    turned = rotated(features)
    torch.testing.assert_close(turned.norm(dim=-1), features.norm(dim=-1))
    assert torch.equal(turned[0, 0, 0], features[0, 0, 0])
    third = dim // 3
    start = {0: 0, 1: dim - 2 * third, 2: dim - third}
    width = {0: dim - 2 * third, 1: third, 2: third}
    for axis, size in enumerate((frames, rows, columns)):
        pairs = width[axis] // 2
        for j in range(pairs):
            channel = start[axis] + 2 * j
            place = [0, 0, 0]
            place[axis] = size - 1
            x, y = features[tuple(place)][channel : channel + 2].tolist()
            angle = (size - 1) * 10000 ** (-j / pairs)
            expected = [x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)]
            torch.testing.assert_close(turned[tuple(place)][channel : channel + 2].tolist(), expected)


def test_empty_clusters_get_the_tokens_that_fit_least():
    similarity, slots = torch.tensor([0.9, 0.1, 0.5, 0.8, 0.05]), torch.tensor([0, 0, 0, 2, 2])
    assert without_empty(similarity, slots, 4).tolist() == [0, 3, 0, 2, 1]
    assert without_empty(torch.tensor([0.1, 0.2]), torch.tensor([1, 1]), 2).tolist() == [0, 1]


def test_a_negative_number_of_iterations_is_refused():
    with pytest.raises(ConfigError, match="iterations must be at least 0, got -1"):
        CompressionConfig(method="simplecluster", retained_tokens=1, options={"iterations": -1})


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=12), st.integers(0, 200))
@settings(deadline=None)
def test_a_draw_has_the_size_of_its_chances(weights, seed):
    for total in range(1, len(weights) + 1):
        chances = bounded_shares(torch.tensor(weights, dtype=torch.float64), total, 0, torch.ones(len(weights)))
        assert pivotal(chances, seed).sum() == total


def test_units_are_drawn_as_often_as_their_chances_say():
    chances = torch.tensor([0.1, 0.9, 0.5, 1.0, 0.25, 0.25, 0.6, 0.4], dtype=torch.float64)
    share = torch.stack([pivotal(chances, seed) for seed in range(3000)]).double().mean(dim=0)
    deviation = (chances * (1 - chances) / 3000).sqrt()
    assert ((share - chances).abs() <= 4.5 * deviation).all()


def test_kitoke_counts_copies_as_one_and_weighs_them_less():
    singles = 10 * torch.eye(8)[:5]
    features = torch.cat([singles, singles[:1].expand(7, 8)])[None]  # 5 kinds, one of them 8 times
    result = [
        compress(features, CompressionConfig(method="kitoke", retained_tokens=5, seed=seed)) for seed in range(30)
    ]
    copies = [int(((one.positions == 0) | (one.positions > 4)).sum()) for one in result]
    assert set(copies) == {1}
    assert_means(features[:, :5], run(features[:, :5], "kitoke", 5))
    assert len({tuple(one.positions.tolist()) for one in result}) > 1


def test_kitoke_averages_by_the_inverse_of_the_crowd():
    features = noise(2, 6)
    result = run(features, "kitoke", 3, large=1e9)
    weights = 1 / crowd(features, None)
    for slot in range(3):
        own = result.assignment.view(-1) == slot
        expected = (features.flatten(0, 1)[own] * weights[own, None]).sum(0) / weights[own].sum()
        torch.testing.assert_close(result.tokens[slot], expected)


def test_kitoke_does_not_merge_across_cuts_and_keeps_a_token_of_every_part():
    scenes = noise(3, 6) * 5
    features = scenes[[0, 0, 0, 1, 1, 1, 1, 2]] + 0.1 * noise(8, 6, seed=1)
    expected = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2])
    assert torch.equal(parts(features, KiTokeOptions(), 48), expected)
    for budget in (3, 5, 17):
        result = run(features, "kitoke", budget)
        assert torch.equal(expected[result.positions // 6][result.assignment], expected[:, None].expand(8, 6))
    assert parts(features, KiTokeOptions(), 2).max() == 1
    assert parts(features, KiTokeOptions(large=1e9, jump=1e9), 48).max() == 0


def test_changes_of_frames_by_hand():
    features = noise(3, 4)
    for frame in (1, 2):
        before, after = features[frame - 1], features[frame]
        apart = torch.cdist(before, after)
        expected = apart.diagonal().mean() + apart.min(dim=1).values.mean()
        torch.testing.assert_close(frame_changes(features)[frame - 1], expected)


def test_alpha_is_positive():
    with pytest.raises(ConfigError, match=r"alpha must be above 0, got -1\.0"):
        CompressionConfig(method="kitoke", retained_tokens=1, options={"alpha": -1})
