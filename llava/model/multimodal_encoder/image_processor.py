"""Frames and images to the pixel tensor that SigLIP takes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BatchFeature

from llava.errors import UserError
from llava.images import as_pil_image


class SigLipImageProcessor:
    """Resize to a square with PIL's bicubic filter, scale to [0, 1], normalise, channels first.

    The aspect ratio is not kept: LLaVA stretches video frames to the tower's square.

    Attributes:
        size, crop_size: (side, side) and {"height": side, "width": side} in pixels.
        image_mean, image_std: per channel, in units of the [0, 1] range.
    """

    def __init__(self, side: int = 384) -> None:
        self.size = (side, side)
        self.crop_size = {"height": side, "width": side}
        self.image_mean = (0.5, 0.5, 0.5)
        self.image_std = (0.5, 0.5, 0.5)
        self.resample = Image.Resampling.BICUBIC
        self.rescale_factor = 1 / 255

    def preprocess(self, images: Any, return_tensors: str | None = "pt") -> BatchFeature:
        """Turn one image or several frames into pixel values.

        Args:
            images: a PIL image, a (height, width, 3) uint8 array, or a sequence of either; a (frames, height,
                width, 3) array is a sequence of frames.
            return_tensors: "pt" for a tensor, "np" for an array, None for a list of arrays.

        Returns:
            A mapping with "pixel_values": (frames, 3, side, side) float32.

        Raises:
            UserError: no image, or one that is neither a PIL image nor a (height, width, 3) array.
        """
        single = isinstance(images, Image.Image) or getattr(images, "ndim", None) == 3
        frames = [images] if single else list(images)
        if not frames:
            raise UserError("There is no frame to preprocess: the list of images is empty.")
        arrays = [self._pixels(frame) for frame in frames]
        return BatchFeature({"pixel_values": arrays}, tensor_type=return_tensors)

    def __call__(self, images: Any, return_tensors: str | None = "pt") -> BatchFeature:
        """Same as `preprocess`."""
        return self.preprocess(images, return_tensors)

    def _pixels(self, frame: "Image.Image | np.ndarray | torch.Tensor | Sequence") -> np.ndarray:
        resized = np.asarray(as_pil_image(frame).convert("RGB").resize(self.size, self.resample))
        scaled = (resized * self.rescale_factor).astype(np.float32)  # (side, side, 3)
        mean, std = np.array([self.image_mean, self.image_std], dtype=np.float32)
        return ((scaled - mean) / std).transpose(2, 0, 1)  # (3, side, side)
