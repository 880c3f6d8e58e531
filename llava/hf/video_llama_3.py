"""VideoLLaMA3.

Every frame is a group of tokens after its time as text. The processor leaves out tokens that changed little since the
frame before (`video_compression_mask`), after the tower and before the prompt: the tokens that a compression starts
from, and that its ratio refers to, are those left in the prompt. Where frames hold unequal numbers of them, the video
is one frame to the method. Positions are plain numbers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from llava.hf.family import Family, VideoShape, patches

MERGE = 2
"""Patches on a side of a token, of videos as the processor prepares them."""


class VideoLlama3(Family):
    """See the module."""

    name = "VideoLLaMA3"
    model_types = ("video_llama_3",)

    def shapes(self, config: Any, arguments: Mapping[str, Any], output: Any) -> list[VideoShape]:
        videos = zip(arguments["video_grid_thw"].tolist(), arguments["video_merge_sizes"].tolist(), strict=True)
        return [VideoShape(frames, rows * columns // merge**2) for (frames, rows, columns), merge in videos]

    def shape_of(self, config: Any, frames: int, height: int, width: int) -> VideoShape:
        """With `use_token_compression=False` in the processor; what that leaves depends on what the video shows."""
        return VideoShape(frames, patches(height, width, config.vision_config.patch_size, MERGE))

    def in_prompt(self, shapes: Sequence[VideoShape], arguments: Mapping[str, Any]) -> list[VideoShape]:
        mask = arguments.get("video_compression_mask")
        if mask is None:
            return list(shapes)
        left = []
        for shape, video in zip(shapes, mask.split([shape.placeholders for shape in shapes]), strict=True):
            counts = set(video.view(shape.frames, -1).sum(1).tolist())
            left.append(VideoShape(shape.frames, counts.pop()) if len(counts) == 1 else VideoShape(1, int(video.sum())))
        return left
