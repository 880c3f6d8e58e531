"""Invariants of `compress` that hold for every method and size."""

import math
from dataclasses import asdict, dataclass, fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.config import setting_name
from llava.errors import ConfigError, UserError
from llava.instrument import record
from llava.token_compression import CompressionConfig, compress, compress_batch, list_methods, register
from llava.token_compression.registry import _methods, get_method
from llava.token_compression.selection import select

SIZED = [
    name
    for name in list_methods()
    if name != "none" and not get_method(name).inputs and get_method(name).before is None
]
"""Every method that needs nothing but features and a size."""


def setting(method: str, tokens_per_frame: int, **size: object) -> CompressionConfig:
    """A configuration that fits to frames of any number of tokens: methods that need rows are told of some."""
    kind = get_method(method).options
    if kind is None or "rows" not in {field.name for field in fields(kind)}:
        return CompressionConfig(method=method, **size)
    side = math.isqrt(tokens_per_frame)
    rows = next(rows for rows in range(side, 0, -1) if tokens_per_frame % rows == 0)
    return CompressionConfig(method=method, options={"rows": rows}, **size)


def video(frames: int, tokens: int, dim: int = 8, seed: int = 0, kind: str = "noise") -> torch.Tensor:
    """Features of several kinds: clustered as in a video, plain noise, few distinct vectors, constant, with zeros."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(frames, tokens, dim, generator=generator)
    if kind == "clustered":
        prototypes = torch.randn(5, dim, generator=generator)
        group = torch.randint(0, 5, (frames, tokens), generator=generator)
        features = prototypes[group] + 0.2 * features
    elif kind == "duplicates":
        features = features.view(-1, dim)[
            torch.randint(0, 3, (frames, tokens), generator=generator) % (frames * tokens)
        ]
    elif kind == "constant":
        features = features[:1, :1].expand(frames, tokens, dim).clone()
    elif kind == "zeros":
        features[torch.rand(frames, tokens, generator=generator) < 0.4] = 0
    return features


KINDS = st.sampled_from(["clustered", "noise", "duplicates", "constant", "zeros"])


def check(features: torch.Tensor, config: CompressionConfig):
    """Compress, check what holds for every result, and return it."""
    frames, tokens_per_frame, dim = features.shape
    result = compress(features, config)
    kept = len(result.tokens)
    assert result.tokens.shape == (kept, dim)
    assert result.tokens.dtype == features.dtype
    assert result.tokens.device == result.positions.device == result.assignment.device == features.device
    assert result.tokens.isfinite().all()
    assert result.positions.dtype == result.assignment.dtype == torch.int64
    assert result.positions.shape == (kept,)
    assert (result.positions.diff() > 0).all()
    assert result.positions[0] >= 0
    assert result.positions[-1] < frames * tokens_per_frame
    assert result.assignment.shape == (frames, tokens_per_frame)
    assert result.assignment.min() >= -1
    assert result.assignment.max() < kept
    if not config.merge:  # after the merge a kept token may be nobody's nearest
        assert torch.equal(result.assignment.view(-1)[result.positions].cpu(), torch.arange(kept))
    assert result.stats.source_tokens == frames * tokens_per_frame
    assert result.stats.kept_tokens == kept
    assert result.stats.retention_ratio == kept / (frames * tokens_per_frame)
    assert result.stats.milliseconds > 0
    return result


@pytest.mark.parametrize("method", SIZED)
@settings(max_examples=40, deadline=None)
@given(KINDS, st.integers(1, 6), st.integers(1, 12), st.floats(0.001, 1.0), st.booleans())
def test_budgets_are_exact(method, kind, frames, tokens, ratio, merge):
    features = video(frames, tokens, kind=kind, seed=frames * tokens)
    config = setting(method, tokens, retention_ratio=ratio, merge=merge)
    result = check(features, config)
    assert len(result.tokens) == max(1, round(ratio * frames * tokens))
    if merge:
        assert (result.assignment >= 0).all()
    again = compress(features, config)
    assert torch.equal(again.tokens, result.tokens)
    assert torch.equal(again.assignment, result.assignment)


@pytest.mark.parametrize("method", SIZED)
@pytest.mark.parametrize("merge", [False, True])
def test_every_budget_there_is(method, merge):
    for kind in ("clustered", "noise", "duplicates", "constant", "zeros"):
        for shape in ((1, 1), (1, 9), (5, 1), (5, 4)):
            features = video(*shape, kind=kind)
            for budget in range(1, shape[0] * shape[1] + 1):
                config = setting(method, shape[1], retained_tokens=budget, merge=merge)
                assert len(check(features, config).tokens) == budget


@settings(max_examples=100, deadline=None)
@given(KINDS, st.integers(1, 6), st.integers(1, 12), st.floats(0.001, 1.0), st.booleans(), st.sampled_from([0.0, 0.6]))
def test_budgets_of_ablations_are_exact(kind, frames, tokens, ratio, temporal, error_tolerance):
    features = video(frames, tokens, kind=kind, seed=frames * tokens)
    config = CompressionConfig(retention_ratio=ratio, temporal=temporal, error_tolerance=error_tolerance)
    expected = max(1, round(ratio * frames * tokens))
    if not temporal and expected < frames:
        with pytest.raises(ConfigError, match=f"at least {frames} tokens"):
            compress(features, config)
    else:
        assert len(check(features, config).tokens) == expected


@settings(max_examples=60, deadline=None)
@given(KINDS, st.integers(1, 5), st.integers(1, 12), st.floats(-1, 1), st.booleans(), st.sampled_from([0.0, 0.6]))
def test_thresholds_work_on_every_kind_of_input(kind, frames, tokens, threshold, merge, error_tolerance):
    features = video(frames, tokens, kind=kind, seed=frames * tokens)
    config = CompressionConfig(similarity_threshold=threshold, merge=merge, error_tolerance=error_tolerance)
    result = check(features, config)
    assert (result.assignment >= 0).all()
    assert result.stats.similarity_threshold == threshold
    assert result.stats.spatial_tokens >= len(result.tokens)


@pytest.mark.parametrize("method", SIZED)
@pytest.mark.parametrize("kind", ["clustered", "duplicates", "zeros"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("merge", [False, True])
def test_everything_kept_is_the_input_bit_for_bit(method, kind, dtype, merge):
    features = video(3, 7, kind=kind).to(dtype)
    result = check(features, setting(method, 7, retention_ratio=1.0, merge=merge))
    assert torch.equal(result.tokens, features.flatten(0, 1))
    assert torch.equal(result.assignment.view(-1), torch.arange(21))
    assert torch.equal(result.positions, torch.arange(21))


def test_none_keeps_everything():
    features = video(2, 5)
    assert torch.equal(check(features, CompressionConfig(method="none")).tokens, features.flatten(0, 1))


@pytest.mark.parametrize("method", ["none", *SIZED])
def test_a_method_itself_keeps_everything_in_order_when_asked_to(method):
    """`compress` does not call a method for everything; code that does must get the same."""
    features = video(3, 5)
    config = setting(method, 5, retention_ratio=1.0)
    kept = get_method(method).keep(features, config, 15)
    assert torch.equal(kept.tokens, features.flatten(0, 1))
    assert torch.equal(kept.positions, torch.arange(15))
    assert torch.equal(kept.membership, torch.arange(15))


@pytest.mark.parametrize(
    "config",
    [setting(method, 12, retention_ratio=0.3, merge=True) for method in SIZED]
    + [CompressionConfig(similarity_threshold=0.5), CompressionConfig(similarity_threshold=0.9, error_tolerance=0.7)],
)
@pytest.mark.parametrize("kind", ["clustered", "noise"])
def test_tokens_are_the_merge_of_their_assignment_in_float64(config, kind):
    """Eq. 7 and 8 by hand: nearest kept token by cosine, then (sum of joined + kept) / (count + 1)."""
    features = video(4, 12, kind=kind)
    settings_without_merge = {**config.__dict__, "merge": False}
    kept = compress(features, CompressionConfig(**settings_without_merge)).tokens.double()
    source = features.flatten(0, 1).double()
    nearest = torch.cosine_similarity(source[:, None], kept[None], dim=-1).argmax(1)
    expected = torch.stack(
        [(source[nearest == j].sum(0) + kept[j]) / ((nearest == j).sum() + 1) for j in range(len(kept))]
    )
    result = compress(features, config)
    assert torch.equal(result.assignment.view(-1), nearest)
    torch.testing.assert_close(result.tokens.double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", SIZED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_differ_from_float32_only_by_rounding(method, dtype):
    features = video(4, 9, kind="clustered").to(dtype)
    config = setting(method, 9, retention_ratio=0.25)
    result, reference = check(features, config), compress(features.float(), config)
    assert torch.equal(result.positions, reference.positions)
    torch.testing.assert_close(result.tokens, reference.tokens.to(dtype), atol=1e-6, rtol=0)


def test_large_half_precision_groups_do_not_overflow():
    features = torch.full((4, 100, 4), 40_000.0, dtype=torch.float16)
    result = check(features, CompressionConfig(similarity_threshold=0.9))
    assert torch.equal(result.tokens, features[0, :1])


def test_autocast_and_gradients_change_nothing():
    features = video(4, 16, kind="clustered")
    config = CompressionConfig(retention_ratio=0.2)
    expected = compress(features, config).tokens
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compress(features, config).tokens, expected)
    with_gradient = compress(features.clone().requires_grad_(), config).tokens
    assert torch.equal(with_gradient, expected)
    assert not with_gradient.requires_grad
    with torch.inference_mode():
        assert torch.equal(compress(features.clone(), config).tokens, expected)


@pytest.mark.parametrize("method", SIZED)
def test_input_is_left_alone_and_may_be_a_view(method):
    features = video(4, 16, kind="clustered")
    before = features.clone()
    for config in (setting(method, 16, retention_ratio=ratio) for ratio in (0.02, 0.2, 0.7)):
        expected = compress(features, config)
        assert torch.equal(features, before)
        for order in ((0, 1, 2), (1, 0, 2), (2, 0, 1), (2, 1, 0)):
            back = torch.tensor(order).argsort().tolist()
            permuted = features.permute(order).contiguous().permute(back)
            for view in (permuted, torch.stack([permuted, permuted], dim=-1)[..., 0]):
                result = compress(view, config)
                assert torch.equal(result.positions, expected.positions)
                torch.testing.assert_close(result.tokens, expected.tokens, atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", SIZED)
def test_global_random_state_is_neither_read_nor_changed(method):
    features = video(3, 8)
    config = setting(method, 8, retention_ratio=0.4, error_tolerance=0.8)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = compress(features, config).tokens
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(compress(features, config).tokens, first)


@pytest.mark.parametrize("method", SIZED)
def test_a_batch_is_compressed_as_its_videos_alone(method):
    videos = [video(3, 9), video(5, 4, kind="clustered"), video(3, 9, seed=1)]
    config = setting(method, 1, retained_tokens=7)
    for features, result in zip(videos, compress_batch(videos, config), strict=True):
        alone = compress(features, config)
        assert torch.equal(result.tokens, alone.tokens)
        assert torch.equal(result.positions, alone.positions)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", SIZED)
def test_a_gpu_chooses_the_same(method):
    features = video(4, 16, kind="clustered")
    config = setting(method, 16, retention_ratio=0.3)
    result, reference = check(features.cuda(), config), compress(features, config)
    assert torch.equal(result.positions.cpu(), reference.positions)
    torch.testing.assert_close(result.tokens.cpu(), reference.tokens, atol=1e-5, rtol=0)


PERMUTABLE = {
    "divprune": "all",
    "l2norm": "all",
    "scissor": "within frames",
    "vcast": "within frames",
    "vidcom2": "within frames",
}
"""Methods whose choice does not depend on the order of the tokens, of those without ties."""


@pytest.mark.parametrize("method", PERMUTABLE)
def test_order_does_not_matter_where_it_should_not(method):
    features = video(4, 9)
    generator = torch.Generator().manual_seed(0)
    if PERMUTABLE[method] == "all":
        shuffled = features.view(36, -1)[torch.randperm(36, generator=generator)].view_as(features)
    else:
        shuffled = torch.stack([frame[torch.randperm(9, generator=generator)] for frame in features])
    config = setting(method, 9, retention_ratio=0.3)
    tokens, others = compress(features, config).tokens, compress(shuffled, config).tokens
    torch.testing.assert_close(tokens[tokens[:, 0].argsort()], others[others[:, 0].argsort()], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("features", "words"),
    [
        (torch.zeros(4, 5), "shape"),
        (torch.zeros(0, 5, 3), "none of them 0"),
        (torch.zeros(2, 0, 3), "none of them 0"),
        (torch.zeros(2, 5, 3, dtype=torch.int64), "floating-point.*int64"),
        ([[1.0]], "floating-point.*list"),
        (torch.zeros(3, 5, 3).index_fill_(0, torch.tensor(2), torch.nan), "frame 2 .*NaN"),
        (torch.zeros(3, 5, 3).index_fill_(0, torch.tensor(1), torch.inf), "frame 1 .*infinity"),
    ],
)
def test_bad_features_are_refused(features, words):
    with pytest.raises(UserError, match=words):
        compress(features, CompressionConfig(similarity_threshold=0.9))


def test_more_tokens_than_there_are_is_refused():
    with pytest.raises(ConfigError, match="only 10 tokens"):
        compress(video(2, 5), CompressionConfig(retained_tokens=11))


def test_stats_reach_the_recorder_and_time_is_counted():
    with record() as recorder:
        results = [compress(video(2, 5), CompressionConfig(retained_tokens=count)) for count in (3, 4)]
    assert recorder.compressions == [result.stats for result in results]
    assert recorder.milliseconds["compression"] > 0


@pytest.fixture
def first_tokens():
    """A method as a user would write it: a function, a decorator, and an input that it needs."""

    @register("first", inputs=("scores",))
    def first(features, config, budget, scores):
        assert scores == "given"
        return select(features, torch.arange(budget))

    yield CompressionConfig(method="first", retained_tokens=2, merge=False)
    del _methods["first"]


@dataclass(frozen=True)
class PickOptions:
    """Options of a method as a user would write it."""

    last: bool = False
    weights: tuple[float, ...] = (1.0,)


@pytest.fixture
def pick():
    """A method with options, published without the final merge."""

    @register("pick", options=PickOptions, merge=False)
    def pick(features, config, budget):
        total = features.shape[0] * features.shape[1]
        return select(features, torch.arange(budget) + (total - budget if config.options.last else 0))

    yield
    del _methods["pick"]


def test_a_method_has_options_and_a_merge_of_its_own(pick):
    features = video(2, 5)
    config = CompressionConfig.from_dict({"method": "pick", "retained_tokens": 2, "options": {"last": True}})
    assert config.options == PickOptions(last=True)
    assert config.merge is False
    assert torch.equal(compress(features, config).tokens, features[1, 3:])
    assert CompressionConfig(**asdict(config)) == config
    assert setting_name(config) == "pick-k2-last=True"
    merged = CompressionConfig(method="pick", retained_tokens=2, merge=True)
    assert setting_name(merged) == "pick-k2-merge=True"
    assert not torch.equal(compress(features, merged).tokens, features[0, :2])
    with pytest.raises(ConfigError, match=r"options of method 'pick': unknown key 'lst'; did you mean 'last'"):
        CompressionConfig(method="pick", retained_tokens=2, options={"lst": True})
    with pytest.raises(ConfigError, match="last: expected true or false, got 1"):
        CompressionConfig(method="pick", retained_tokens=2, options={"last": 1})
    with pytest.raises(ConfigError, match="'scissor' has no options"):
        CompressionConfig(retention_ratio=0.5, options={"last": True})


def test_a_registered_method_is_a_method_like_any_other(first_tokens):
    assert "first" in list_methods()
    features = video(2, 5)
    assert torch.equal(compress(features, first_tokens, scores="given").tokens, features[0, :2])
    with pytest.raises(ConfigError, match="needs the input 'scores'"):
        compress(features, first_tokens)
    with pytest.raises(ConfigError, match=r"takes no input 'score'.*did you mean 'scores'"):
        compress(features, first_tokens, scores="given", score=1)
    with pytest.raises(ConfigError, match="no similarity_threshold"):
        CompressionConfig(method="first", similarity_threshold=0.5)
    with pytest.raises(ValueError, match="exists already"):
        register("scissor")(lambda: None)
