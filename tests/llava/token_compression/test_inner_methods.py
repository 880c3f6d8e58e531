"""What the methods choose that prune inside the language model, on attention and hidden states made up for it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava.errors import ConfigError
from llava.token_compression import CompressionConfig
from llava.token_compression.holitom_inner import merged
from llava.token_compression.inner import DecodingStep, InnerVideo, before_model
from llava.token_compression.ranking import best_per_group
from llava.token_compression.registry import get_method


def chosen(method, attention, hidden, count, groups=None, text=None, **options):
    """`attention` is (heads, tokens) of one token that looks, or (heads, looking, tokens)."""
    config = CompressionConfig(method=method, retention_ratio=0.5, options=options)
    attention = attention.unsqueeze(1) if attention.dim() == 2 else attention
    groups = torch.zeros(len(hidden), dtype=torch.int64) if groups is None else groups
    text = hidden[:1] if text is None else text
    return get_method(method).keep(InnerVideo(attention, hidden, groups, text, config.options), count)


@pytest.mark.parametrize("method", ["fastv", "flashvid_inner", "holitom_inner"])
def test_the_tokens_with_most_attention_of_all_heads_are_kept_in_order(method):
    attention = torch.tensor([[0.5, 0.0, 0.1, 0.2, 0.2], [0.0, 0.3, 0.3, 0.2, 0.2]])
    survivors = chosen(method, attention, torch.randn(5, 4), 3)
    assert survivors.kept.tolist() == [0, 2, 3]  # of equal ones the first


@pytest.mark.parametrize("method", ["fastv", "flashvid_inner"])
def test_pruning_changes_no_hidden_states(method):
    assert chosen(method, torch.rand(2, 5), torch.randn(5, 4), 3).hidden is None


def test_mergers_one_after_the_other_are_a_weighted_sum():
    generator = torch.Generator().manual_seed(0)
    anchors, others = torch.randn(3, 4, generator=generator), torch.randn(40, 4, generator=generator)
    goal = torch.randint(0, 2, (40,), generator=generator)  # nothing is merged into the last one
    halved, summed = anchors.clone(), anchors.clone()
    for token, place in zip(others, goal.tolist(), strict=True):
        halved[place] = (halved[place] + token) / 2
        summed[place] += token
    torch.testing.assert_close(merged(anchors, others, goal, halving=True), halved)
    sizes = torch.bincount(goal, minlength=3).unsqueeze(1)
    torch.testing.assert_close(merged(anchors, others, goal, halving=False), summed / (1 + sizes))


def test_holitom_merges_what_it_drops_into_the_most_similar_token():
    hidden = torch.tensor([[1.0, 0.0], [0.0, 2.0], [4.0, 0.4], [0.0, 8.0]]).half()
    attention = torch.tensor([[0.4, 0.3, 0.1, 0.2]])
    survivors = chosen("holitom_inner", attention, hidden, 2)
    assert survivors.kept.tolist() == [0, 1]
    torch.testing.assert_close(survivors.hidden, torch.tensor([[2.5, 0.2], [0.0, 5.0]]), atol=1e-3, rtol=0)


def test_prunevid_divides_what_is_left_among_its_parts():
    attention = torch.zeros(2, 3, 8)
    attention[0, 0], attention[1, 2] = torch.arange(8) / 8, torch.tensor([0.0, 0.9, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    groups = torch.tensor([5, 5, 5, 5, 9, 9, 7, 7])
    survivors = chosen("prunevid_inner", attention, torch.randn(8, 4), 4, groups)
    assert survivors.kept.tolist() == [1, 3, 5, 7]  # half of each; token 1 for another head and word than the rest
    assert survivors.hidden is None


def test_ustc_goes_by_attention_and_by_likeness_to_the_text():
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [-1.0, -0.1]])
    attention = torch.tensor([[[0.1, 0.1, 0.1, 0.4]]])
    text = torch.tensor([[0.0, 3.0]])
    by_attention = chosen("ustc_inner", attention, hidden, 1, text=text, likeness=0.0)
    by_likeness = chosen("ustc_inner", attention, hidden, 1, text=text, likeness=1.0)
    assert (by_attention.kept.tolist(), by_likeness.kept.tolist()) == ([3], [1])
    torch.testing.assert_close(by_likeness.hidden, hidden.mean(dim=0, keepdim=True))
    both = chosen("ustc_inner", attention, hidden, 2, text=text)
    assert both.kept.tolist() == [1, 3]
    torch.testing.assert_close(both.hidden, torch.tensor([[0.5, 0.5], [-0.5, -0.55]]))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=30), st.data())
def test_the_best_of_each_group(tokens, data):
    groups, scores = (torch.tensor(part) for part in zip(*tokens, strict=True))
    counts = torch.tensor([data.draw(st.integers(0, int((groups == group).sum()))) for group in range(4)])
    expected = []
    for group in range(4):
        own = [index for index in range(len(groups)) if groups[index] == group]
        expected += sorted(own, key=lambda index: (-scores[index], index))[: counts[group]]
    assert best_per_group(scores, groups, counts).tolist() == sorted(expected)


@pytest.mark.parametrize(
    ("method", "layer"),
    [
        ("holitom_inner", 18),
        ("flashvid_inner", 20),
        ("prunevid_inner", 11),
        ("ustc_inner", 18),
        ("fastv", 2),
        ("dycoke", 3),
    ],
)
def test_layers_are_the_published_ones_at_their_depth(method, layer):
    options = CompressionConfig(method=method, retention_ratio=0.5).options
    assert options.layer_of(28) == layer
    if options.layer is None:
        assert options.layer_of(56) == 2 * layer
        assert options.layer_of(2) == 1


def test_the_average_over_the_layers_of_flashvid_is_its_size():
    config = CompressionConfig(method="flashvid_inner", retained_tokens=80)
    entered = before_model(config).retained_tokens
    assert entered == 100
    assert (20 * entered + 8 * config.options.left(config, entered)) / 28 == 80
    assert before_model(CompressionConfig(method="flashvid_inner", retention_ratio=0.9)).retention_ratio == 1.0


def test_what_runs_before_the_language_model_has_its_own_options():
    config = CompressionConfig(method="holitom_inner", retention_ratio=0.3, seed=3, options={"tau": 0.7, "layer": 5})
    before = before_model(config)
    assert (before.method, before.retention_ratio, before.seed, before.options.tau) == ("holitom", 0.3, 3, 0.7)
    assert before_model(before) is before
    assert before_model(CompressionConfig(method="fastv", retained_tokens=3)).method == "none"


def step(attention, previous=None, seen=None, **options):
    config = CompressionConfig(method="dycoke", retention_ratio=0.5, options=options)
    videos = torch.tensor([[False, True, True, True, True]]).expand(len(attention), -1)
    counts = torch.tensor([config.options.left(config, 4)] * len(attention))
    return get_method("dycoke").keep(DecodingStep(attention, previous, videos, counts, seen, config.options))


def test_dycoke_sees_what_it_attends_to_most_as_long_as_that_changes():
    first = torch.tensor([[0.9, 0.1, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.1, 0.0]])
    seen = step(first, pruned_share=0.75)
    assert seen.tolist() == [[False, True, False, False, False], [False, False, False, True, False]]
    then = torch.tensor([[0.0, 0.0, 0.1, 0.0, 0.0], [0.9, 0.0, 0.0, 0.1, 0.01]])  # the second one changes in the text
    for unchanged, expected in (("all", [False, True, True, True, True]), ("last", [False, False, False, True, False])):
        again = step(then, first, seen, pruned_share=0.75, unchanged=unchanged)
        assert again.tolist() == [[False, False, True, False, False], expected]


def test_shares_are_exact():
    config = CompressionConfig(method="dycoke", retention_ratio=0.5, options={"pruned_share": 0.8})
    assert config.options.left(config, 100) == 20  # 1 - 0.8 is a little less than a fifth
    assert int(100 * (1 - 0.8)) == 19


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("dycoke", {"pruned_share": 1.5}, "pruned_share"),
        ("dycoke", {"layer": 0}, "layer must be at least 1"),
        ("holitom_inner", {"inner_share": 0.0}, "inner_share"),
        ("holitom_inner", {"beta": 2.0}, "beta"),
        ("flashvid_inner", {"expansion": 0.5}, "expansion"),
        ("prunevid_inner", {"segment_share": 2.0}, "segment_share"),
        ("ustc_inner", {"likeness": 2.0}, "likeness"),
        ("ustc_inner", {"neighbours": 0}, "neighbours"),
        ("flashvid_inner", {"least_segments": 0}, "least_segments"),
    ],
)
def test_options_out_of_range_are_refused(method, options, message):
    with pytest.raises(ConfigError, match=message):
        CompressionConfig(method=method, retention_ratio=0.5, options=options)
