"""From a video file to the frames that a model sees.

    video = load_video("clip.mp4", VideoConfig(num_frames=8))
    video.frames      # (8, height, width, 3) uint8
    video.timestamps  # seconds of each frame

Sampling is arithmetic on the frame index (`video_index.py`); only the sampled frames are decoded and kept
(`video_decoders.py`), so an hour of video costs no more memory than a second of it.
"""

import logging
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llava.errors import ConfigError, VideoError
from llava.instrument import stage
from llava.video_decoders import DECODERS
from llava.video_index import FrameIndex, index_frames

logger = logging.getLogger(__name__)

DEFAULT_NUM_FRAMES = 32
"""Frames per video where neither the user nor the checkpoint names a number; the paper's."""


@dataclass(frozen=True)
class VideoConfig:
    """Which frames of a video a model sees.

    Attributes:
        num_frames: frames per video, the most in the case of `fps`. None: the checkpoint's own number
            (`mm_num_frames` in its config.json), 32 if it names none.
        fps: None samples `num_frames` uniformly over the time span. A number takes the frame on screen every
            `1 / fps` seconds instead, thinned uniformly to `num_frames` when there are more.
        start, end: the time span in seconds since the first frame; None is the beginning and the end.
        decoder: "auto" (decord, and whichever of torchcodec and PyAV works where decord does not), "decord",
            "torchcodec" or "pyav". A named decoder is never replaced by another.

    Raises:
        ConfigError: a value out of its range.
    """

    num_frames: int | None = None
    fps: float | None = None
    start: float | None = None
    end: float | None = None
    decoder: str = "auto"

    def __post_init__(self) -> None:
        if self.num_frames is not None and self.num_frames < 1:
            raise ConfigError(f"video.num_frames is {self.num_frames}: give a whole number of at least 1.")
        if self.fps is not None and not (math.isfinite(self.fps) and self.fps > 0):
            raise ConfigError(f"video.fps is {self.fps}: give a number of frames per second above 0, or leave it out.")
        if self.start is not None and not (math.isfinite(self.start) and self.start >= 0):
            raise ConfigError(f"video.start is {self.start}: give seconds since the first frame, 0 or more.")
        if self.end is not None and not self.end > (self.start or 0):
            raise ConfigError(f"video.end is {self.end}: give seconds after video.start ({self.start or 0}).")
        if self.decoder not in ("auto", *DECODERS):
            raise ConfigError(f"video.decoder is {self.decoder!r}: choose one of auto, {', '.join(DECODERS)}.")


@dataclass(frozen=True)
class Video:
    """Sampled frames of one video.

    Attributes:
        frames: (F, height, width, 3) uint8 RGB, upright.
        frame_indices: (F,) int64, position of each frame in the video; repeats where the video is shorter than asked.
        timestamps: (F,) float64, seconds of each frame since the first frame of the video.
        fps: frames per second of the video, averaged.
        duration: seconds of the whole video.
        total_frames: frames of the whole video.
        decoder: the decoder that was used.
        path: where the video came from.
    """

    frames: np.ndarray
    frame_indices: np.ndarray
    timestamps: np.ndarray
    fps: float
    duration: float
    total_frames: int
    decoder: str
    path: Path


def load_video(path: str | Path, config: VideoConfig | None = None) -> Video:
    """Decode the frames of a video that `config` asks for.

    Raises:
        VideoError: no such file, not a video, damaged or cut off within the time span, no frames in the span, or no
            decoder for it.
    """
    config = config or VideoConfig()
    path = Path(path)
    with stage("decode_video"):
        index = index_frames(path)
        _check_span(path, index, config)
        chosen = sample_frames(index.timestamps, index.duration, config)
        wanted, order = np.unique(chosen, return_inverse=True)
        frames, decoder = _decode(path, index, wanted, config.decoder)
    return Video(
        frames=frames if len(wanted) == len(chosen) else frames[order],
        frame_indices=chosen,
        timestamps=index.timestamps[chosen],
        fps=index.fps,
        duration=index.duration,
        total_frames=len(index.pts),
        decoder=decoder,
        path=path,
    )


def sample_frames(timestamps: np.ndarray, duration: float, config: VideoConfig) -> np.ndarray:
    """Indices of the frames to decode.

    Uniform sampling is `linspace` from the first to the last frame of the span, rounded down, as in LLaVA-OneVision:
    both ends are taken, and a video with fewer frames than asked repeats some of them so that the model always sees
    `num_frames`. With `fps` nothing repeats.

    Args:
        timestamps: (N,) seconds of every frame since the first, ascending.
        duration: seconds from the first frame to the end of the last.

    Returns:
        (F,) int64, ascending; F = num_frames without `fps`, 1 <= F <= num_frames with it.
    """
    count = config.num_frames or DEFAULT_NUM_FRAMES
    start = config.start or 0.0
    end = duration if config.end is None else min(config.end, duration)
    first = int(np.searchsorted(timestamps, start, side="right")) - 1  # on screen at `start`
    last = max(first, int(np.searchsorted(timestamps, end, side="left")) - 1)  # on screen just before `end`
    if config.fps is None:
        return np.linspace(first, last, count, dtype=np.int64)
    # A frame is taken when one of the times start, start + 1/fps, ... falls between its appearance and the next one's.
    appears = np.append(np.maximum(timestamps[first : last + 1], start), end)
    ticks = np.ceil((appears - start) * config.fps - 1e-6)
    ticks[0] = -1  # the frame on screen at `start` is always taken
    taken = first + np.flatnonzero(np.diff(ticks) > 0)
    return taken if len(taken) <= count else taken[np.linspace(0, len(taken) - 1, count, dtype=np.int64)]


def _check_span(path: Path, index: FrameIndex, config: VideoConfig) -> None:
    if config.start is not None and config.start >= index.duration:
        raise VideoError(f"video.start is {config.start:g} s, but {path} lasts {index.duration:.2f} s: start earlier.")
    if index.truncated and (config.end is None or config.end > index.duration):
        raise VideoError(
            f"{path} stops after {index.duration:.2f} s of {index.announced:.2f} s: it is cut off. Download it again, "
            f"or use what there is with video.end={math.floor(index.timestamps[-1] * 100) / 100:g}."
        )


def _decode(path: Path, index: FrameIndex, wanted: np.ndarray, choice: str) -> tuple[np.ndarray, str]:
    """(n, height, width, 3) frames at the index positions `wanted`, and the name of the decoder that gave them."""
    failed: dict[str, str] = {}
    missing: list[str] = []
    for name in DECODERS if choice == "auto" else [choice]:
        try:
            frames = _collect(DECODERS[name](path, index, wanted), len(wanted))
        except ImportError:
            missing.append(name)
        except MemoryError:
            raise
        except Exception as error:  # decoders raise RuntimeError, OSError and errors of their own
            failed[name] = _reason(error)
        else:
            if failed:
                logger.warning("%s: decoded with %s instead: %s", path, name, _sentence(failed))
            return frames, name
    if not failed:
        raise VideoError(
            f"No video decoder: install {' or '.join(missing)} (`pip install {missing[-1].replace('pyav', 'av')}`)."
        )
    way_out = "repair it" if choice == "auto" else "set video.decoder=auto, or convert it"
    raise VideoError(
        f"{path} cannot be decoded ({_sentence(failed)}): download it again, or {way_out} with "
        f"`ffmpeg -i {path.name} fixed.mp4`."
    )


def _collect(frames: Iterator[np.ndarray], count: int) -> np.ndarray:
    """Stack `count` frames of equal shape without holding them twice."""
    first = next(frames)
    stacked = np.empty((count, *first.shape), dtype=np.uint8)
    stacked[0] = first
    for position, frame in enumerate(frames, start=1):
        stacked[position] = frame
    return stacked


def _reason(error: Exception) -> str:
    """First line of an error, without decord's clock and source file in front of it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^(\[[\d:]+\] \S+:\d+: )+", "", lines[0])[:200]


def _sentence(reasons: dict[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
