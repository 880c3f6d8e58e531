"""AOT: anchors, plans, exact counts, and what reaches it from the model."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.errors import ConfigError, UserError
from llava.model.pooling import pool_2x2
from llava.token_compression import CompressionConfig, compress
from llava.token_compression.aot import chosen, pooled, transport


def case(frames, half, dim=8, seed=0, side=None, alike=False):
    """Features and inputs of a video whose grids have this side after pooling."""
    generator = torch.Generator().manual_seed(seed)
    side = side or 2 * half
    patches = torch.randn(frames, side**2, dim, generator=generator)
    if alike:
        patches = patches[:1, :1].expand_as(patches).clone()
    shallow, deep = (torch.rand(frames, side**2, generator=generator) for _ in range(2))
    inputs = {"patches": patches, "vision_attn_shallow": shallow, "vision_attn_deep": deep}
    return pooled(patches, half**2), inputs


def check(features, config, inputs):
    frames, tokens, _ = features.shape
    result, kept = compress(features, config, **inputs), config.budget(frames * tokens)
    assert len(result.tokens) == len(result.positions) == kept
    assert (result.positions.diff() > 0).all()
    assert result.tokens.isfinite().all()
    assert result.assignment.max() < kept
    assert torch.equal(result.assignment.view(-1)[result.positions], torch.arange(kept))
    return result


@pytest.mark.parametrize(("side", "mode"), [(27, "bilinear"), (27, "average"), (10, "bilinear"), (10, "average")])
def test_pooling_is_that_of_the_model(side, mode):
    grid = torch.randn(2, side**2, 3)
    expected = pool_2x2(grid, mode)
    torch.testing.assert_close(pooled(grid, expected.shape[1]), expected)


@pytest.mark.parametrize(("patches", "tokens"), [(25, 4), (26, 9), (25, 8), (49, 4)])
def test_other_grids_are_refused(patches, tokens):
    if (patches, tokens) == (25, 4):  # half the side, rounded down
        assert pooled(torch.ones(1, patches, 2), tokens).shape == (1, 4, 2)
        return
    with pytest.raises(UserError, match="grids of patches"):
        pooled(torch.ones(1, patches, 2), tokens)


def test_anchors_are_the_published_ones():
    """126 of 729: seven in each of nine windows by the shallow layer, 63 others by the deep one."""
    generator = torch.Generator().manual_seed(0)
    shallow, deep = (torch.rand(2, 729, generator=generator) for _ in range(2))
    anchor = chosen(shallow, deep, 126, 0.5)
    assert anchor.sum(dim=1).tolist() == [126, 126]
    for frame in range(2):
        local = torch.zeros(729, dtype=torch.bool)
        for row in range(0, 27, 9):
            for column in range(0, 27, 9):
                window = torch.arange(729).view(27, 27)[row : row + 9, column : column + 9].flatten()
                local[window[shallow[frame, window].topk(7).indices]] = True
        others = deep[frame].masked_fill(local, -1).topk(63).indices
        assert torch.equal(anchor[frame], local.index_fill(0, others, True))


def test_plans_have_uniform_marginals():
    plan = transport(torch.rand(30, 7, generator=torch.Generator().manual_seed(0)), 0.1)
    torch.testing.assert_close(plan.sum(dim=0), torch.full((7,), 1 / 7))
    assert (plan.sum(dim=1) - 1 / 30).abs().max() < 1e-2
    assert (plan > 0).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 10), st.integers(1, 4), st.booleans(), st.floats(0.001, 1.0), st.integers(0, 9))
def test_budgets_are_exact_and_outputs_lie_between_inputs(frames, half, odd, ratio, seed):
    features, inputs = case(frames, half, seed=seed, side=2 * half - odd)
    config = CompressionConfig(method="aot", retention_ratio=ratio)
    result = check(features, config, inputs)
    assert torch.equal(result.tokens, compress(features, config, **inputs).tokens)
    low, high = inputs["patches"].amin(dim=(0, 1)), inputs["patches"].amax(dim=(0, 1))
    assert (result.tokens >= low - 1e-4).all()
    assert (result.tokens <= high + 1e-4).all()


@pytest.mark.parametrize(
    "options", [{"clip": 3}, {"anchors": 1}, {"transported": 1.0, "place": 0.0}, {"local_share": 0.0}]
)
def test_every_budget_can_be_had(options):
    features, inputs = case(5, 3)
    for count in range(1, 45):
        check(features, CompressionConfig(method="aot", retained_tokens=count, options=options), inputs)


def test_equal_patches_stay_as_they_are():
    features, inputs = case(6, 3, alike=True)
    result = check(features, CompressionConfig(method="aot", retained_tokens=12), inputs)
    torch.testing.assert_close(result.tokens, features[0, :1].expand(12, -1))


def test_anchors_of_later_frames_join_those_of_the_first():
    """All but the asked-for number of the least alike, in each clip by itself."""
    features, inputs = case(8, 3)
    config = CompressionConfig(method="aot", retained_tokens=24, options={"anchors": 12})
    result = check(features, config, inputs)
    frame_of_kept = result.positions // 9
    for frame in range(8):
        clip = frame_of_kept[result.assignment[frame][result.assignment[frame] >= 0]]
        assert set(clip.tolist()) <= {frame, frame // 4 * 4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anchors": 0}, "anchors"),
        ({"clip": 0}, "clip"),
        ({"local_share": 2.0}, "local_share"),
        ({"smoothness": 0.0}, "smoothness"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        CompressionConfig(method="aot", retention_ratio=0.5, options=options)
