"""What an inference engine needs to schedule compressed videos.

Before a video is seen, how many tokens it takes, from the model's config and the video's size alone:

    count = video_tokens(model.config, CompressionConfig(retention_ratio=0.1), frames=32, height=448, width=448)
    count.prompt          # reserve so many positions in the cache

and afterwards, from features, which of its placeholders stay and what they become:

    merge_map = compress_video(features, config, always_kept=count.always_kept)
    merge_map.embeds      # (kept, dim) put these
    merge_map.keep        # (placeholders,) bool, at these of the placeholders, and drop the others

`len(merge_map.embeds) + always_kept == count.prompt`, whatever the video shows. Nothing here needs a model or a GPU.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava.errors import ConfigError, UserError
from llava.hf.families import FAMILIES
from llava.hf.family import VideoShape
from llava.token_compression import CompressionConfig, compress
from llava.token_compression.inner import refuse_inner


@dataclass(frozen=True)
class VideoTokens:
    """How many tokens a video takes.

    Attributes:
        frames: frames that the method sees: of the Qwen-VL models, parts of two frames.
        tokens_per_frame: tokens of each before compression.
        kept: tokens of content after compression.
        always_kept: newlines, which are not compressed.
    """

    frames: int
    tokens_per_frame: int
    kept: int
    always_kept: int

    @property
    def source(self) -> int:
        """Placeholders without compression."""
        return self.frames * self.tokens_per_frame + self.always_kept

    @property
    def prompt(self) -> int:
        """Positions with compression. Text between frames, such as times, comes on top of both."""
        return self.kept + self.always_kept


@dataclass(frozen=True)
class MergeMap:
    """What became of one video.

    Attributes:
        embeds: (kept, dim), for the places of the representatives in ascending order.
        keep: (placeholders,) bool, which of the video's placeholders stay.
        source: (kept,) int64, the placeholder of each kept token's representative, whose position it may keep.
        assignment: (placeholders,) int64, the kept token that each one went into; -1 if dropped or always kept.
    """

    embeds: Tensor
    keep: Tensor
    source: Tensor
    assignment: Tensor


def video_tokens(
    config: Any, compression: CompressionConfig, frames: int, height: int = 0, width: int = 0
) -> VideoTokens:
    """How many tokens a video takes, exactly.

    Args:
        config: of a model of transformers that `llava.hf` supports, or of one of this package.
        compression: with a retention_ratio or retained_tokens, or method "none".
        frames: that the processor gives to the model.
        height, width: pixels of a frame as the processor resizes it; models with a fixed size ignore them.

    Raises:
        UserError: an unsupported model, no such size, or newlines whose number depends on what is kept.
        ConfigError: a similarity_threshold, which keeps as many tokens as the video asks for; more tokens than it has;
            a method that prunes inside the language model.
    """
    refuse_inner(compression)
    if frames < 1:
        raise UserError(f"A video has at least one frame, got {frames}.")
    shape = _shape(config, frames, height, width)
    kept = compression.budget(shape.frames * shape.tokens_per_frame)
    if kept is None:
        raise ConfigError(
            "With a similarity_threshold the number of tokens depends on the video; give retention_ratio or "
            "retained_tokens."
        )
    return VideoTokens(shape.frames, shape.tokens_per_frame, kept, shape.always_kept)


def compress_video(features: Tensor, config: CompressionConfig, always_kept: int = 0) -> MergeMap:
    """Compress one video.

    Args:
        features: (frames, tokens_per_frame, dim), as the language model would get them.
        config: what to do.
        always_kept: placeholders of the video after them.

    Raises:
        UserError, ConfigError: as `compress` does.
    """
    result = compress(features, config)
    content = features.shape[0] * features.shape[1]
    keep = torch.zeros(content + always_kept, dtype=torch.bool, device=features.device)
    keep[result.positions] = True
    keep[content:] = True
    assignment = torch.full_like(keep, -1, dtype=torch.int64)
    assignment[:content] = result.assignment.flatten()
    return MergeMap(result.tokens, keep, result.positions, assignment)


def _shape(config: Any, frames: int, height: int, width: int) -> VideoShape:
    model_type = getattr(config, "model_type", None)
    for family in FAMILIES:
        if model_type in family.model_types:
            return family.shape_of(config, frames, height, width)
    if not hasattr(config, "mm_vision_tower"):
        supported = [name for family in FAMILIES for name in family.model_types]
        raise UserError(
            f"Video tokens of model_type {model_type!r} are not known; known are {', '.join(supported)} and the models "
            "of this package."
        )
    from llava.model.video_layout import video_layout  # imports models, which an engine may not need

    layout = video_layout(config, frames)
    if layout is None:
        raise UserError("The config has no mm_vision_tower, so the model takes no video.")
    if layout.newlines > 1:
        raise UserError(
            f"mm_newline_position {config.mm_newline_position!r} puts a newline after every row or frame of which a "
            "token is kept, so their number depends on the video."
        )
    return VideoShape(layout.frames, layout.tokens_per_frame, layout.newlines)
