"""Qwen2-VL and Qwen2.5-VL.

A video is t*h*w / m^2 tokens between one start and one end token, where the grid (t, h, w) counts patches, two frames
each, and m is the spatial merge. Positions are triples of frame, row and column; a kept token keeps that of its
representative. Features arrive in raster order also where Qwen2.5's tower works in windows.
"""

import math
from collections.abc import Mapping
from typing import Any

from llava.hf.family import Family, VideoShape, grid_shapes, patches


class Qwen2VL(Family):
    """See the module."""

    name = "Qwen2-VL, Qwen2.5-VL"
    model_types = ("qwen2_vl", "qwen2_5_vl")
    rotary_axes = True

    def shapes(self, config: Any, arguments: Mapping[str, Any], output: Any) -> list[VideoShape]:
        return grid_shapes(arguments["video_grid_thw"], config.vision_config.spatial_merge_size)

    def shape_of(self, config: Any, frames: int, height: int, width: int) -> VideoShape:
        vision = config.vision_config
        parts = math.ceil(frames / vision.temporal_patch_size)  # the last frame fills up the last part
        return VideoShape(parts, patches(height, width, vision.patch_size, vision.spatial_merge_size))
