"""Videos in batches and in pieces give what they give alone, bit for bit."""

import pytest
import torch

from llava.errors import ConfigError, UserError
from llava.token_compression import CompressionConfig, StreamingCompressor, compress, compress_batch, register
from llava.token_compression.registry import _methods
from llava.token_compression.selection import select

CONFIGS = [
    CompressionConfig(similarity_threshold=0.8),
    CompressionConfig(retention_ratio=0.2),
    CompressionConfig(retained_tokens=9, error_tolerance=0.6, seed=3),
    CompressionConfig(method="uniform", retained_tokens=5),
]


def video(frames: int, seed: int = 0, tokens: int = 36, dim: int = 300) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(0, 9, (frames, tokens), generator=generator)
    prototypes = torch.randn(9, dim, generator=generator)
    return prototypes[group] + 0.4 * torch.randn(frames, tokens, dim, generator=generator)


def assert_same(result, expected):
    assert torch.equal(result.tokens, expected.tokens)
    assert torch.equal(result.positions, expected.positions)
    assert torch.equal(result.assignment, expected.assignment)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_video_of_a_batch_gets_the_result_it_gets_alone(config, dtype):
    together = torch.cat([video(frames, seed) for seed, frames in enumerate((7, 1, 16, 40))]).to(dtype)
    videos = together.split([7, 1, 16, 40])  # as they come from the vision tower: parts of one tensor
    results = compress_batch(videos, config)
    assert len(results) == 4
    for result, alone in zip(results, videos, strict=True):
        assert_same(result, compress(alone.clone(), config))


def test_results_do_not_depend_on_where_in_memory_a_video_lies_or_on_the_number_of_threads():
    features, threads = video(20), torch.get_num_threads()
    for config in CONFIGS:
        expected = compress(features, config)
        for offset in (1, 3, 8):
            shifted = torch.cat([torch.zeros(offset), features.flatten()])[offset:].view(features.shape)
            assert_same(compress(shifted, config), expected)
        try:
            torch.set_num_threads(1)
            assert_same(compress(features, config), expected)
        finally:
            torch.set_num_threads(threads)


def test_inputs_of_a_batch_are_one_for_each_video():
    @register("scored", inputs=("scores",))
    def scored(features, config, budget, scores):
        return select(features, scores.argsort(descending=True)[:budget].sort().values)

    try:
        config = CompressionConfig(method="scored", retained_tokens=3, merge=False)
        scores = [torch.rand(72), torch.rand(144)]
        videos = [video(2), video(4)]
        for result, expected in zip(compress_batch(videos, config, scores=scores), scores, strict=True):
            assert torch.equal(result.positions, expected.topk(3).indices.sort().values)
        with pytest.raises(ConfigError, match="'scores' has 1 entries for 2 videos"):
            compress_batch(videos, config, scores=scores[:1])
        with pytest.raises(ConfigError, match="needs the input 'scores'"):
            StreamingCompressor(config)
    finally:
        del _methods["scored"]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("pushes", [[21], [1] * 21, [5, 0, 7, 9], [8, 8, 5]])
def test_a_stream_gives_the_offline_result_of_each_window(config, pushes):
    features = video(21)
    stream = StreamingCompressor(config, window=8)
    windows = [window for frames in features.split(pushes) if len(frames) for window in stream.push(frames)]
    assert [window.first_frame for window in windows] == [0, 8]
    windows.append(stream.finish())
    for window, frames in zip(windows, features.split(8), strict=True):
        assert_same(window.result, compress(frames, config))


def test_a_stream_holds_one_window_of_frames_whatever_comes():
    stream = StreamingCompressor(CompressionConfig(retained_tokens=4), window=4)
    frames = video(3)
    for _ in range(50):
        stream.push(frames)
        assert stream._frames.shape == (4, 36, 300)
        assert stream._held < 4
    frames.zero_()  # the caller's memory is not held
    assert stream.finish().result.tokens.any()


def test_a_finished_or_empty_stream():
    stream = StreamingCompressor(CompressionConfig(retained_tokens=4))
    assert stream.finish() is None
    with pytest.raises(UserError, match="finished"):
        stream.push(video(1))


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="window=0"):
        StreamingCompressor(CompressionConfig(retained_tokens=4), window=0)
    stream = StreamingCompressor(CompressionConfig(retained_tokens=4))
    stream.push(video(1))
    with pytest.raises(UserError, match="36 tokens of 200 dimensions in float32 on cpu after 36 tokens of 300"):
        stream.push(video(1, dim=200))
    with pytest.raises(UserError, match="float16"):
        stream.push(video(1).half())
    with pytest.raises(UserError, match="shape"):
        stream.push(torch.zeros(3, 4))
