"""SmolVLM2.

A frame is "Frame from 00:01:", two tokens that start an image, its placeholders and one that ends it. Positions are
plain numbers. The decoder is called `text_model`.
"""

from collections.abc import Mapping
from typing import Any

from llava.hf.family import VideoShape
from llava.hf.labelled_frames import LabelledFrames
from llava.hf.llava_onevision import features_of


class SmolVLM(LabelledFrames):
    """See the module and `labelled_frames`."""

    name = "SmolVLM2"
    model_types = ("smolvlm",)
    language_model = "text_model"

    def shapes(self, config: Any, arguments: Mapping[str, Any], output: Any) -> list[VideoShape]:
        tokens = self.shape_of(config, 1, 0, 0).tokens_per_frame
        total = sum(features.shape[:-1].numel() for features in features_of(output))
        return [VideoShape(1, tokens)] * (total // tokens)

    def shape_of(self, config: Any, frames: int, height: int, width: int) -> VideoShape:
        vision = config.vision_config
        return VideoShape(frames, (vision.image_size // vision.patch_size // config.scale_factor) ** 2)
