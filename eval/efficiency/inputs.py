"""What a run starts from: a clip to decode, its pixels, a prompt, and features worth compressing."""

import contextlib
import functools
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from eval.bench_compress import synthetic_features
from eval.efficiency.config import Measurement
from eval.efficiency.timing import repeat, spread
from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.video_layout import video_layout
from llava.video import VideoConfig, load_video


def write_clip(path: Path, frames: int, width: int, height: int) -> None:
    """An H.264 clip of so many frames, 30 per second: a pattern that drifts, with a cut after each quarter."""
    rows, columns = np.mgrid[:height, :width]
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt, stream.time_base = width, height, "yuv420p", Fraction(1, 30)
        for number in range(frames):
            scene = 1 + 4 * number // frames
            waves = [np.sin((columns * scene + 3 * number) / 40), np.cos((rows + scene * 2 * number) / 30)]
            picture = np.stack([waves[0], waves[1], waves[0] * waves[1]], axis=-1)
            frame = av.VideoFrame.from_ndarray((127.5 * (picture + 1)).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def measure_inputs(
    clip: Path, frames: int, image_processor: Any, settings: Measurement
) -> tuple[dict[str, dict[str, float]], torch.Tensor]:
    """Decode all frames of a clip and turn them into pixels, on the CPU, as often as `settings` says.

    Returns:
        Milliseconds per video of "decode_video" and "preprocess", and (frames, 3, side, side) float32.
    """
    pixels = torch.empty(0)

    def run() -> tuple[float, float]:
        nonlocal pixels
        start = time.perf_counter()
        decoded = load_video(clip, VideoConfig(num_frames=frames)).frames
        middle = time.perf_counter()
        pixels = image_processor.preprocess(decoded, return_tensors="pt")["pixel_values"]
        return 1000 * (middle - start), 1000 * (time.perf_counter() - middle)

    decode, preprocess = zip(*repeat(run, settings), strict=True)
    return {"decode_video": spread(decode), "preprocess": spread(preprocess)}, pixels


def prompts(vocabulary: int, length: int, rows: int, seed: int, device: torch.device) -> torch.Tensor:
    """(rows, length + 1) int64: `length` random text tokens with the place of a video in their middle."""
    ids = torch.randint(vocabulary, (length + 1,), generator=torch.Generator().manual_seed(seed))
    ids[length // 2] = IMAGE_TOKEN_INDEX
    return ids.expand(rows, -1).to(device)


@functools.lru_cache(maxsize=1)  # cells of equal length follow each other
def _features(frames: int, tokens_per_frame: int, dim: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return synthetic_features(frames, tokens_per_frame, dim, seed).to(dtype)


@contextlib.contextmanager
def plausible_features(model: Any, frames: int, seed: int) -> Iterator[int]:
    """Let a model of random weights hand features like a video's to the compression.

    Towers of random weights give features that are all alike, on which a method does not do its normal work. Tower,
    projector and pooling run as always; what they give is overwritten in place by
    `eval.bench_compress.synthetic_features`, the same for each video of a batch.

    Yields:
        Bytes that the prepared features occupy on the model's device for the duration of the block.
    """
    layout = video_layout(model.config, frames)
    assert layout is not None
    features = _features(frames, layout.tokens_per_frame, model.config.hidden_size, seed, model.dtype)
    prepared = features.to(model.device)
    plain = model.encode_frames

    def encode_frames(pixels: torch.Tensor, *settings: Any) -> torch.Tensor:
        encoded = plain(pixels, *settings)
        encoded.view(-1, *prepared.shape).copy_(prepared)
        return encoded

    model.encode_frames = encode_frames
    try:
        yield prepared.nbytes
    finally:
        del model.encode_frames
