"""Images to pixels: a square, or a base image with the crops of a grid ("anyres").

The functions have LLaVA-NeXT's names and arguments and can be imported from `llava.mm_utils` as well.
"""

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from llava.anyres import Size, grid_resolutions, is_anyres, select_best_resolution
from llava.errors import ConfigError, ImageError, UserError
from llava.files import check_file

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
"""Files with these endings are read as images, all others as videos."""


def is_image_file(path: str | Path) -> bool:
    """Whether the ending of a file's name says that it is an image."""
    return Path(path).suffix.lower() in IMAGE_SUFFIXES


def load_image(path: str | Path) -> Image.Image:
    """Read an image file: RGB, upright (as its EXIF data say), of an animation the first picture.

    Raises:
        ImageError: the file is missing, empty, damaged or not an image.
    """
    check_file(Path(path), ImageError)
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # PIL raises them all
        raise ImageError(
            f"{path} cannot be read as an image ({error}): it is damaged or another kind of file. Download it again, "
            "or save it as PNG."
        ) from error


def as_pil_image(image: "Image.Image | np.ndarray | torch.Tensor | Sequence") -> Image.Image:
    """A PIL image as it is; a (height, width, 3) uint8 array as an RGB image.

    Raises:
        UserError: anything else.
    """
    if isinstance(image, Image.Image):
        return image
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise UserError(
            f"An image must be a PIL image or a (height, width, 3) uint8 array, not {array.dtype} of {array.shape}."
        )
    return Image.fromarray(array)


def load_image_from_base64(image: str | bytes) -> Image.Image:
    """Decode an image file's bytes from base64, in the file's own color mode.

    Raises:
        ImageError: this is not the base64 text of an image.
    """
    try:
        return Image.open(io.BytesIO(base64.b64decode(image)))
    except (OSError, ValueError) as error:
        raise ImageError(f"This text is not an image in base64: {error}.") from error


def process_images(images: Sequence[Any], image_processor: Any, model_cfg: Any) -> "torch.Tensor | list[torch.Tensor]":
    """Pixels of images as the model's config asks for.

    Args:
        images: PIL images or (height, width, 3) uint8 arrays.
        image_processor: as returned by `load_pretrained_model`.
        model_cfg: the model's config, of which `image_aspect_ratio` and, for crops, `image_grid_pinpoints` count.

    Returns:
        For "anyres" and "anyres_max_N" one (1 + crops, 3, side, side) float32 tensor per image, stacked to five
        dimensions if all shapes agree, else a list. For "pad" (to a square), "square" (stretched) and None, which is
        "square", one (images, 3, side, side) tensor.

        A model treats one 4-D tensor otherwise than a list of its images: see `llava.model.items.Images`.

    Raises:
        ConfigError: another `image_aspect_ratio`, or pinpoints that make no grid.
        UserError: no image, or something else than images.
    """
    mode = getattr(model_cfg, "image_aspect_ratio", None)
    pinpoints = getattr(model_cfg, "image_grid_pinpoints", None)
    if len(images) == 0:
        raise UserError("There is no image to process: the list of images is empty.")
    pixels = [process_image(image, image_processor, mode, pinpoints) for image in images]
    if not is_anyres(mode):
        return torch.cat(pixels)
    return torch.stack(pixels) if len({item.shape for item in pixels}) == 1 else pixels


def process_image(image: Any, processor: Any, aspect_ratio: str | None, grid_pinpoints: Any) -> torch.Tensor:
    """(1 or 1 + crops, 3, side, side) float32 pixels of one image; see `process_images`."""
    image = as_pil_image(image)
    if is_anyres(aspect_ratio):
        return process_anyres_image(image, processor, grid_pinpoints)
    if aspect_ratio == "pad":
        image = expand2square(image.convert("RGB"), tuple(int(255 * mean) for mean in processor.image_mean))
    elif aspect_ratio not in (None, "square"):
        raise ConfigError(
            f"image_aspect_ratio is {aspect_ratio!r}; use anyres, anyres_max_9 (or another number), pad or square."
        )
    return processor.preprocess(image, return_tensors="pt")["pixel_values"]


def process_anyres_image(image: Image.Image, processor: Any, grid_pinpoints: Any) -> torch.Tensor:
    """The whole image stretched to a square, then its crops row by row: (1 + crops, 3, side, side) float32.

    Args:
        grid_pinpoints: see `llava.anyres.grid_resolutions`.

    Raises:
        ConfigError: pinpoints that make no grid.
    """
    side = processor.crop_size["height"]
    resolution = select_best_resolution(image.size, grid_resolutions(grid_pinpoints, side))
    crops = divide_to_patches(resize_and_pad_image(image, resolution), side)
    return processor.preprocess([image.resize((side, side)), *crops], return_tensors="pt")["pixel_values"]


def resize_and_pad_image(image: Image.Image, target_resolution: Size) -> Image.Image:
    """The image as large as fits, its aspect ratio kept, in the middle of black."""
    width, height = target_resolution
    horizontal, vertical = width / image.width, height / image.height
    if horizontal < vertical:
        fitted = width, min(math.ceil(image.height * horizontal), height)
    else:
        fitted = min(math.ceil(image.width * vertical), width), height
    canvas = Image.new("RGB", (width, height), (0, 0, 0))
    canvas.paste(image.resize(fitted), ((width - fitted[0]) // 2, (height - fitted[1]) // 2))
    return canvas


def divide_to_patches(image: Image.Image, patch_size: int) -> list[Image.Image]:
    """Square crops of `patch_size` pixels, row by row."""
    return [
        image.crop((left, top, left + patch_size, top + patch_size))
        for top in range(0, image.height, patch_size)
        for left in range(0, image.width, patch_size)
    ]


def expand2square(pil_img: Image.Image, background_color: Any) -> Image.Image:
    """The image in the middle of a square of its longer side."""
    width, height = pil_img.size
    side = max(width, height)
    square = Image.new(pil_img.mode, (side, side), background_color)
    square.paste(pil_img, ((side - width) // 2, (side - height) // 2))
    return square
