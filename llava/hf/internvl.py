"""InternVL 3 and 3.5 in the layout of transformers (OpenGVLab/InternVL3-*-hf).

A frame is "Frame1: ", a start token, 256 image placeholders and an end token. Positions are plain numbers.
"""

from collections.abc import Mapping
from typing import Any

from llava.hf.family import VideoShape
from llava.hf.labelled_frames import LabelledFrames
from llava.hf.llava_onevision import features_of


class InternVL(LabelledFrames):
    """See the module and `labelled_frames`."""

    name = "InternVL3, InternVL3.5"
    model_types = ("internvl",)

    def shapes(self, config: Any, arguments: Mapping[str, Any], output: Any) -> list[VideoShape]:
        frames, tokens = features_of(output).shape[:2]
        return [VideoShape(1, tokens)] * frames

    def shape_of(self, config: Any, frames: int, height: int, width: int) -> VideoShape:
        return VideoShape(frames, config.image_seq_length)
