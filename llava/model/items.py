"""The images and videos of a call, as its arguments `images`, `modalities` and `image_sizes` describe them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llava.anyres import Size
from llava.errors import UserError
from llava.yaml_schema import did_you_mean

Images = torch.Tensor | Sequence[torch.Tensor]
"""One tensor per image or video: (frames, 3, side, side) of a video, (1 + crops, 3, side, side) of an image, or
(3, side, side) of an image without crops; as a list, or as a 5-D tensor of items of equal length.

A 4-D tensor is a batch of images, as LLaVA-NeXT takes it: each becomes its patches and nothing else, without newline
and never compressed. To have the images treated as a list of them is, pass `list(tensor)`. With one modality that
is "video" it is the frames of one video. (LLaVA-NeXT then sees the first frame and drops the others.)
"""

MODALITIES = ("image", "video", "text")


@dataclass(frozen=True)
class VisualItem:
    """What stands for one placeholder.

    Attributes:
        pixels: (frames or crops, 3, side, side).
        modality: "video", "image", "patches" (an image of which the patches alone are wanted), or "text" (a dummy
            that a text-only row brings with it and no placeholder takes).
        size: (width, height) of the original image in pixels, where it is known.
    """

    pixels: torch.Tensor
    modality: str
    size: Size | None = None


def visual_items(
    images: Images | None, modalities: str | Sequence[str], image_sizes: Sequence[Sequence[int]] | None
) -> list[VisualItem]:
    """The items of a call; none for None.

    Args:
        images: see `Images`.
        modalities: "image" or "video" for each item, "text" for a dummy; one string stands for all items.
        image_sizes: (width, height) in pixels for each item. Those of videos are not read: scripts pass one for each
            frame, or something else.

    Raises:
        UserError: fewer or more modalities or sizes than items, an unknown modality, an impossible size, or a tensor
            of another shape.
    """
    if images is None:
        return []
    if isinstance(images, torch.Tensor) and images.ndim == 4 and modalities in ("video", ["video"], ("video",)):
        return [VisualItem(images, "video")]
    count = len(images)
    per_item = [modalities] * count if isinstance(modalities, str) else list(modalities)
    if isinstance(images, torch.Tensor) and images.ndim != 5:
        if images.ndim != 4 or "video" in per_item:
            raise UserError(
                f"images is a tensor of shape {tuple(images.shape)}, which is a batch of images if it is 4-D; "
                "pass a list with one (frames, 3, height, width) tensor per video."
            )
        return [VisualItem(image.unsqueeze(0), "patches") for image in images]
    if count == 0:
        return []
    _check_modalities(per_item, count)
    sizes: list[Any] = [None] * count
    if image_sizes is not None and "image" in per_item:
        if len(image_sizes) != count:
            raise UserError(
                f"{len(image_sizes)} image_sizes were given for {count} images or videos; give (width, height) of each."
            )
        sizes = list(image_sizes)
    return [
        VisualItem(_pixels(index, item), modality, _size(index, size) if modality == "image" else None)
        for index, (item, modality, size) in enumerate(zip(images, per_item, sizes, strict=True))
    ]


def _check_modalities(modalities: list[str], count: int) -> None:
    if len(modalities) != count:
        raise UserError(
            f"{len(modalities)} modalities were given for {count} images or videos; give one per item, "
            'as in modalities=["image", "video"].'
        )
    for modality in modalities:
        if modality not in MODALITIES:
            raise UserError(f'Unknown modality {modality!r}{did_you_mean(modality, MODALITIES)}; use "image", "video".')


def _size(index: int, size: Any) -> Size | None:
    if size is None:
        return None
    try:
        width, height = map(int, size)
    except (TypeError, ValueError):
        width = height = 0
    if min(width, height) < 1:
        raise UserError(f"image_sizes[{index}] is {size}; give (width, height) in pixels, as image.size gives it.")
    return width, height


def _pixels(index: int, item: torch.Tensor) -> torch.Tensor:
    """The item with four dimensions."""
    if not isinstance(item, torch.Tensor):
        raise UserError(
            f"images[{index}] is a {type(item).__name__}, not a tensor of pixels: use llava.mm_utils.process_images, "
            "or for a video's frames the image processor that load_pretrained_model returns."
        )
    return item.unsqueeze(0) if item.ndim == 3 else item
