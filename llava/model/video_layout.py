"""How many tokens a checkpoint's config makes of a video, known before any weight is read."""

from dataclasses import dataclass
from typing import Any

import torch

from llava.errors import ConfigError
from llava.model.multimodal_encoder.siglip_encoder import vision_config_of
from llava.model.newlines import newline_period
from llava.model.pooling import pool_2x2
from llava.video import DEFAULT_NUM_FRAMES


@dataclass(frozen=True)
class VideoLayout:
    """Tokens of a video before compression.

    Attributes:
        frames: frames of the video.
        tokens_per_frame: after pooling, newlines not counted.
        newlines: newline tokens of the whole video.
    """

    frames: int
    tokens_per_frame: int
    newlines: int

    @property
    def tokens(self) -> int:
        """Tokens of the whole video, newlines not counted."""
        return self.frames * self.tokens_per_frame


def default_frames(config: Any) -> int:
    """Frames of a video where nobody asks for another number: the checkpoint's `mm_num_frames`, 32 if it has none.

    Raises:
        ConfigError: `mm_num_frames` is no number of frames.
    """
    frames = getattr(config, "mm_num_frames", None) or DEFAULT_NUM_FRAMES
    if not isinstance(frames, int) or frames < 1:
        raise ConfigError(f"mm_num_frames is {frames!r}; it must be a whole number of at least 1.")
    return frames


def longest_prompt(config: Any) -> int:
    """Positions that a prompt may have; it is cut to so many.

    Raises:
        ConfigError: `tokenizer_model_max_length` or `max_position_embeddings` is no number of positions.
    """
    limit = getattr(config, "tokenizer_model_max_length", None) or config.max_position_embeddings
    if not isinstance(limit, int) or limit < 1:
        raise ConfigError(
            f"A prompt may have {limit!r} positions (tokenizer_model_max_length, else max_position_embeddings); "
            "it must be a whole number of at least 1."
        )
    return limit


def video_layout(config: Any, frames: int | None = None) -> VideoLayout | None:
    """The layout of a video of so many frames (None: `default_frames`); None for a text-only model.

    Raises:
        UserError: the config's tower, pooling, merge type or newline position is none that this version knows.
    """
    if getattr(config, "mm_vision_tower", None) is None:
        return None
    frames = frames or default_frames(config)
    vision: Any = vision_config_of(config)
    patches = torch.empty(1, (vision.image_size // vision.patch_size) ** 2, 1, device="meta")
    per_frame = pool_2x2(patches, config.mm_spatial_pool_mode).shape[1]
    period = newline_period(config, frames, per_frame)
    if period is not None and "unpad" not in config.mm_patch_merge_type:
        raise ConfigError(
            f"mm_newline_position {config.mm_newline_position!r} asks for newline tokens, which a checkpoint with "
            f'mm_patch_merge_type {config.mm_patch_merge_type!r} does not have; set it to "no_token".'
        )
    return VideoLayout(frames, per_frame, 0 if period is None else frames * per_frame // period)
