"""Everything that the pictures of one compressed video show."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from llava.errors import ConfigError, UserError
from llava.images import is_image_file
from llava.pipeline import Answer, VideoQA
from llava.token_compression import CompressionConfig, CompressionResult, compress
from llava.video import Video

RETENTION_RATIOS = (1.0, 0.5, 0.25, 0.1, 0.05)
"""At which a question is answered."""


@dataclass(frozen=True)
class Look:
    """One video and what a compression makes of it.

    Attributes:
        video: the frames that the model saw, in their own size.
        compression: the setting.
        result: what `compress` returned for the video's tokens.
        question: what was asked, None if nothing was.
        answers: the answer at each retention ratio, the rest of the setting unchanged.
    """

    video: Video
    compression: CompressionConfig
    result: CompressionResult
    question: str | None = None
    answers: tuple[tuple[float, Answer], ...] = ()

    @property
    def side(self) -> int:
        """Tokens in a row of a frame's square grid."""
        return math.isqrt(self.result.assignment.shape[1])

    @property
    def labels(self) -> np.ndarray:
        """(frames, side, side) int64: the kept token that each source token went into, -1 if dropped."""
        return self.result.assignment.view(-1, self.side, self.side).cpu().numpy()

    @property
    def representatives(self) -> np.ndarray:
        """(kept, 3) int64: frame, row and column of each kept token's representative."""
        positions = self.result.positions.cpu().numpy()
        frame, token = np.divmod(positions, self.side**2)
        return np.stack([frame, *np.divmod(token, self.side)], axis=1)

    def kept_per_frame(self) -> list[int]:
        """How many kept tokens have their representative in each frame."""
        return np.bincount(self.representatives[:, 0], minlength=len(self.labels)).tolist()

    def shown_per_frame(self) -> list[int]:
        """How many kept tokens hold something of each frame."""
        return [len(np.unique(frame[frame >= 0])) for frame in self.labels]


@torch.inference_mode()
def look(
    qa: VideoQA,
    path: str | Path,
    compression: CompressionConfig,
    question: str | None = None,
    retention_ratios: Sequence[float] = RETENTION_RATIOS,
) -> Look:
    """Compress the tokens of one video, and answer a question about it at several retention ratios.

    Args:
        qa: the model, and how it reads videos.
        path: a video file.
        compression: the setting; `question` is answered with its method and options at each of `retention_ratios`.

    Raises:
        UserError: the file is an image, or the tokens of a frame are no square grid.
        VideoError: the video cannot be read. ConfigError: the compression is impossible for it.
    """
    if is_image_file(path):
        raise UserError(f"{path} is an image; a compression is shown for a video.")
    if compression.method == "none":
        raise ConfigError('Method "none" keeps every token, so that there is nothing to show; choose another method.')
    video, pixels = qa.read_video(path)
    features, inputs = qa.model.encode_video(pixels, compression)  # (frames, tokens, hidden)
    if math.isqrt(features.shape[1]) ** 2 != features.shape[1]:
        raise UserError(f"The {features.shape[1]} tokens of a frame are no square grid, so they cannot be drawn.")
    result = compress(features, compression, **inputs)
    answers = []
    for ratio in retention_ratios if question is not None else ():
        sized = dataclasses.replace(compression, similarity_threshold=None, retained_tokens=None, retention_ratio=ratio)
        answers.append((ratio, qa.ask(path, question or "", compression=sized)))
    return Look(video, compression, result, question, tuple(answers))
