"""From the features of an image's crops to the tokens that it puts into the prompt ("anyres" and plain images).

The base image comes first. The crops are laid out as one map of patches, from which the rows or columns that only
show the black border are cut away ("unpad"), and which is shrunk where it is larger than `anyres_max_N` allows.
"""

import math
from typing import Any

import torch
from torch.nn import functional

from llava.anyres import ANYRES, Size, get_anyres_image_grid_shape
from llava.errors import UserError
from llava.model.newlines import SourceTokens, merge_type

SHRINK_FROM = 1.1
"""A map is shrunk only if its sides are more than so many times too long."""


def merge_crops(features: torch.Tensor, config: Any, size: Size | None, side: int) -> SourceTokens:
    """The tokens of one image under the config's `mm_patch_merge_type`, newlines not yet inserted.

        flat                    all crops one after the other
        spatial                 the base image, then the map row by row
        spatial_maxpool2x2      the same with the map's sides halved
        spatial_unpad           the base image, then the unpadded map with a newline after every row
        ..._nobase              the same without the base image

    An image without crops is its patches, followed by a newline if the type unpads. Where newlines are inserted, or a
    map is built, all tokens form a single frame, so that compression sees the tokens that the prompt would hold.

    Args:
        features: (1 or 1 + crops, patches, dim).
        size: (width, height) of the original image in pixels; needed if there are crops and the type is not flat.
        side: width and height of a crop in pixels.

    Raises:
        UserError: the size is missing, or another number of crops belongs to it.
        ConfigError: an impossible merge type, or pinpoints that make no grid.
    """
    merge = merge_type(config)
    if merge == "flat":
        return SourceTokens(features)
    if len(features) == 1:
        return SourceTokens(features, period=features.shape[1] if "unpad" in merge else None)
    if size is None:
        raise UserError(
            f"An image with {len(features) - 1} crops needs its size: pass image_sizes=[(width, height), ...], one per "
            "image or video, as image.size gives it."
        )
    base = features[0, :0] if "nobase" in merge else features[0]
    grid = _crop_map(features[1:], config, size, side)
    period = None
    if "maxpool2x2" in merge:
        grid = functional.max_pool2d(grid, 2)
    elif "unpad" in merge:
        grid = _shrunk(unpad_image(grid, size), features.shape[1], getattr(config, "image_aspect_ratio", None))
        period = grid.shape[2]
    tokens = torch.cat([base, grid.flatten(1).T])
    return SourceTokens(tokens.unsqueeze(0), base=len(base), period=period)


def unpad_image(tensor: torch.Tensor, original_size: Size) -> torch.Tensor:
    """Cut the rows or columns off a map (dim, height, width) that `resize_and_pad_image` has added to the image."""
    height, width = tensor.shape[1:]
    original_width, original_height = original_size
    if original_width / original_height > width / height:
        kept = max(1, int(original_height * (width / original_width)))
        border = (height - kept) // 2
        return tensor[:, border : height - border]
    kept = max(1, int(original_width * (height / original_height)))
    border = (width - kept) // 2
    return tensor[:, :, border : width - border]


def _crop_map(crops: torch.Tensor, config: Any, size: Size, side: int) -> torch.Tensor:
    """Crops (n, patches, dim), row by row, as one map (dim, height, width) of patches."""
    count, patches, dim = crops.shape
    columns, rows = get_anyres_image_grid_shape(size, getattr(config, "image_grid_pinpoints", None), side)
    if count != columns * rows:
        raise UserError(
            f"An image of {size[0]} x {size[1]} pixels has {columns} x {rows} crops besides the base image, but "
            f"{count} were given; use process_images with the model's own config, and image_sizes as image.size "
            "gives them."
        )
    length = math.isqrt(patches)
    grid = crops.view(rows, columns, length, length, dim).permute(4, 0, 2, 1, 3)
    return grid.reshape(dim, rows * length, columns * length)


def _shrunk(grid: torch.Tensor, patches: int, aspect_ratio: str | None) -> torch.Tensor:
    """A map (dim, height, width), shrunk to about N * patches if `aspect_ratio` is anyres_max_N and it is larger."""
    match = ANYRES.fullmatch(aspect_ratio or "")
    if match is None or match[1] is None:
        return grid
    height, width = grid.shape[1:]
    times = math.sqrt(height * width / (int(match[1]) * patches))
    if times <= SHRINK_FROM:
        return grid
    size = (int(height // times), int(width // times))
    return functional.interpolate(grid.unsqueeze(0), size=size, mode="bilinear")[0]
