"""LLaVA-OneVision (llava-hf/llava-onevision-qwen2-*-hf).

A video is F frames of ceil(side / 2)^2 pooled tokens in row-major order, contiguous, then one learned newline, which
is no part of the content and always kept. Positions are plain numbers.
"""

import math
from collections.abc import Mapping
from typing import Any

from llava.hf.family import Family, VideoShape


class LlavaOnevision(Family):
    """See the module."""

    name = "LLaVA-OneVision"
    model_types = ("llava_onevision",)

    def shapes(self, config: Any, arguments: Mapping[str, Any], output: Any) -> list[VideoShape]:
        videos, frames, _, height, width = pixels_of(arguments).shape
        return [self.shape_of(config, frames, height, width)] * videos

    def shape_of(self, config: Any, frames: int, height: int, width: int) -> VideoShape:
        side = config.vision_config.image_size // config.vision_config.patch_size
        return VideoShape(frames, math.ceil(side / 2) ** 2, always_kept=1)


def pixels_of(arguments: Mapping[str, Any]) -> Any:
    """(videos, frames, 3, side, side) pixels, under their name or that of old."""
    return arguments["pixel_values_videos" if "pixel_values_videos" in arguments else "pixel_values"]


def features_of(output: Any) -> Any:
    """The features that a call returned, whether in an output object or bare."""
    return getattr(output, "pooler_output", output)
