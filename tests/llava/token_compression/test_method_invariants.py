"""What holds for every method that reads the vision tower or is published without a final merge."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from input_cases import inputs_for
from test_compress import KINDS, video

from llava.errors import ConfigError, UserError
from llava.token_compression import (
    CompressionConfig,
    StreamingCompressor,
    compress,
    compress_batch,
)
from llava.token_compression.registry import get_method

CASES: dict[str, dict[str, object]] = {
    "ustc": {},
    "ustc by similarity": {"order": "raster", "cluster_share": 0.5, "neighbours": 3},
    "visionzip": {},
    "holitom": {},
    "holitom clustered": {"clustered_share": 0.5, "tau": 0.3},
    "fastvid": {"least_segments": 2, "tau": 0.5},
    "fastvid as for LLaVA-Video": {"sources": "not anchors"},
    "flashvid": {},
    "flashvid by its paper": {"tree_mean": "exact", "lone_frames": "others", "tree_tau": 0.3, "least_segments": 1},
    "flashvid clusters alone": {"selected_share": 0.0, "relevance": False, "tree_tau": -1.0, "least_segments": 2},
    "prumerge": {},
    "prumerge without plus": {"spaced": False, "rest": False},
    "prumerge with even samples": {"even": True},
    "prunevid": {},
    "prunevid with few still places": {"tau": 0.0, "segment_share": 0.5},
    "fastvid without the head": {"signals": "vision_attn", "least_segments": 1},
}
"""Options of methods; what follows a method's name tells them apart."""


def configured(case: str, **size: object) -> CompressionConfig:
    """The configuration of one of `CASES`."""
    return CompressionConfig(method=case.split()[0], options=CASES[case], **size)


def check(features: torch.Tensor, config: CompressionConfig, seed: int = 0):
    """Compress with random inputs, check the contract, and return the result."""
    frames, tokens, dim = features.shape
    result = compress(features, config, **inputs_for(config, frames, tokens, seed))
    expected = config.budget(frames * tokens)
    assert result.tokens.shape == (expected, dim)
    assert result.tokens.dtype == features.dtype
    assert result.tokens.isfinite().all()
    assert (result.positions.diff() > 0).all()
    assert result.positions.shape == (expected,)
    assert result.positions[0] >= 0
    assert result.positions[-1] < frames * tokens
    assignment = result.assignment.view(-1)
    assert assignment.shape == (frames * tokens,)
    assert assignment.min() >= -1
    assert assignment.max() < expected
    # the representative of a kept token is part of it, so that every kept token has a member
    assert torch.equal(assignment[result.positions], torch.arange(expected))
    return result


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(sorted(CASES)),
    KINDS,
    st.integers(1, 9),
    st.integers(1, 17),
    st.floats(0.001, 1.0),
    st.integers(0, 9),
)
def test_budgets_are_exact_and_results_repeat(case, kind, frames, tokens, ratio, seed):
    features = video(frames, tokens, kind=kind, seed=seed)
    config = configured(case, retention_ratio=ratio)
    result, again = check(features, config, seed), check(features, config, seed)
    assert torch.equal(result.tokens, again.tokens)
    assert torch.equal(result.assignment, again.assignment)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 1), (4, 9), (3, 25)])
@pytest.mark.parametrize("kind", ["clustered", "constant"])
def test_every_budget_can_be_had(case, shape, kind):
    features = video(*shape, kind=kind)
    for count in range(1, shape[0] * shape[1] + 1):
        check(features, configured(case, retained_tokens=count))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["clustered", "zeros"])
def test_dtypes_differ_from_float32_only_by_rounding(case, dtype, kind):
    features = video(5, 16, kind=kind).to(dtype)
    config = configured(case, retention_ratio=0.3)
    result, reference = check(features, config), check(features.float(), config)
    assert torch.equal(result.positions, reference.positions)
    assert torch.equal(result.assignment, reference.assignment)
    torch.testing.assert_close(result.tokens, reference.tokens.to(dtype), atol=1e-5, rtol=1e-2)


@pytest.mark.parametrize("case", CASES)
def test_a_method_itself_keeps_everything_in_order_when_asked_to(case):
    features = video(3, 16)
    config = configured(case, retention_ratio=1.0)
    kept = get_method(config.method).keep(features, config, 48, **inputs_for(config, 3, 16))
    torch.testing.assert_close(kept.tokens, features.flatten(0, 1))
    assert torch.equal(kept.positions, torch.arange(48))
    assert torch.equal(kept.membership, torch.arange(48))


@pytest.mark.parametrize("case", CASES)
def test_a_kept_token_with_one_member_is_that_member(case):
    """Or the method says that it is not so, and the final merge looks where each token belongs."""
    features = video(4, 16, kind="clustered")
    config = configured(case, retention_ratio=0.25)
    kept = get_method(config.method).keep(features, config, 16, **inputs_for(config, 4, 16))
    lone = torch.bincount(kept.membership[kept.membership >= 0], minlength=16) == 1
    if kept.single_is_own:
        torch.testing.assert_close(kept.tokens[lone], features.flatten(0, 1)[kept.positions][lone])
    merged = compress(features, replace(config, merge=True), **inputs_for(config, 4, 16))
    assert merged.tokens.shape == (16, 8)
    assert merged.tokens.isfinite().all()
    assert (merged.assignment >= 0).all()


@pytest.mark.parametrize("case", CASES)
def test_input_is_left_alone_and_neither_autocast_nor_random_state_matters(case):
    features = video(4, 16, kind="zeros")
    config = configured(case, retention_ratio=0.2)
    inputs = inputs_for(config, 4, 16)
    before = {name: value.clone() for name, value in {"features": features, **inputs}.items()}
    state = torch.get_rng_state()
    expected = compress(features, config, **inputs)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        again = compress(features, config, **inputs)
    assert torch.equal(again.tokens, expected.tokens)
    for name, value in {"features": features, **inputs}.items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("case", CASES)
def test_a_batch_gives_what_single_calls_give(case):
    videos = [video(frames, 16, kind="clustered", seed=frames) for frames in (2, 5)]
    config = configured(case, retention_ratio=0.2)
    inputs = [inputs_for(config, len(features), 16) for features in videos]
    single = [compress(features, config, **own) for features, own in zip(videos, inputs, strict=True)]
    batch = compress_batch(videos, config, **{name: [own[name] for own in inputs] for name in inputs[0]})
    for one, other in zip(single, batch, strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.assignment, other.assignment)


@pytest.mark.parametrize("case", CASES)
def test_missing_and_wrong_inputs_are_named(case):
    features = video(2, 9)
    config = configured(case, retention_ratio=0.3)
    inputs, method = inputs_for(config, 2, 9), config.method
    if not inputs:
        pytest.skip("needs no inputs")
    for name, value in inputs.items():
        with pytest.raises(ConfigError, match=f"{method!r} needs the input {name!r}"):
            compress(features, config, **{other: inputs[other] for other in inputs if other != name})
        with pytest.raises(UserError, match=rf"{name!r} must have the shape \(2.*got \(1"):
            compress(features, config, **{**inputs, name: value[:1]})
        with pytest.raises(UserError, match=f"{name!r} contains NaN"):
            compress(features, config, **{**inputs, name: value.clone().fill_(torch.nan)})
        with pytest.raises(UserError, match=f"{name!r} must be a floating-point tensor"):
            compress(features, config, **{**inputs, name: value.long()})
    with pytest.raises(ConfigError, match=f"{method!r} needs the input '{next(iter(inputs))}'.*stream"):
        StreamingCompressor(config)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scale", [1e-4, 1e3])
def test_small_and_large_features_stay_finite_and_keep_their_scale(case, scale):
    features = video(5, 16, kind="clustered").clamp(-2, 2)
    config = configured(case, retention_ratio=0.3)
    result = check((features * scale).half(), config)
    assert 0.05 * scale < result.tokens.float().norm(dim=1).max() < 50 * scale
