"""On a GPU the published algorithm waits for the device once per video: when it asks how many tokens are left."""

import warnings
from collections.abc import Callable

import pytest
import torch

from llava.token_compression import CompressionConfig, compress, compress_batch
from llava.token_compression.paths import has_kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not has_kernels(), reason="needs Triton 3.4 or newer (pip install 'llava-scissor[dev]')"),
]


def waits(call: Callable[[], object]) -> int:
    """How many operations PyTorch reports to wait for the device."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def video(frames: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    region = torch.randint(0, 12, (frames, 196), generator=generator)
    noise = torch.randn(frames, 196, 896, generator=generator)
    return (torch.randn(12, 896, generator=generator)[region] + 0.3 * noise).bfloat16().cuda()


def test_waiting_is_noticed():
    number = torch.ones(1, device="cuda")
    assert waits(lambda: number.item()) == 1
    assert waits(lambda: number + 1) == 0


@pytest.mark.parametrize("settings", [{}, {"temporal": False}, {"merge": False}])
@pytest.mark.parametrize("threshold", [0.6, 0.8, 0.95])
def test_a_threshold_waits_once_per_video(threshold, settings):
    config = CompressionConfig(similarity_threshold=threshold, **settings)
    videos = [video(frames, seed) for seed, frames in enumerate((32, 8, 17))]
    for features in videos:
        compress(features, config)  # compiles the kernels
    assert waits(lambda: compress(videos[0], config)) <= 1
    assert waits(lambda: compress_batch(videos, config)) <= len(videos)
