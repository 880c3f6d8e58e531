"""LLaVA-NeXT-Video (llava-hf/LLaVA-NeXT-Video-*-hf).

A video is F frames of pooled tokens (24x24 patches become 144), contiguous, without newlines. Positions are
plain numbers.
"""

from collections.abc import Mapping
from typing import Any

from llava.hf.family import Family, VideoShape
from llava.hf.llava_onevision import features_of, pixels_of


class LlavaNextVideo(Family):
    """See the module."""

    name = "LLaVA-NeXT-Video"
    model_types = ("llava_next_video",)

    def shapes(self, config: Any, arguments: Mapping[str, Any], output: Any) -> list[VideoShape]:
        frames = pixels_of(arguments).shape[1]
        features = [video.flatten(0, -2) for video in features_of(output)]
        return [VideoShape(frames, len(video) // frames) for video in features]

    def shape_of(self, config: Any, frames: int, height: int, width: int) -> VideoShape:
        side = config.vision_config.image_size // config.vision_config.patch_size
        return VideoShape(frames, (side // config.spatial_pool_stride) ** 2)
