"""Which grid of crops an image is cut into ("anyres"). Arithmetic only; sizes are (width, height) in pixels.

`select_best_resolution` and `get_anyres_image_grid_shape` have LLaVA-NeXT's names, arguments and results.
"""

import ast
import re
from collections.abc import Sequence
from typing import Any

from llava.errors import ConfigError

Size = tuple[int, int]

ANYRES = re.compile(r"anyres(?:_max_(\d+))?")
"""`image_aspect_ratio` of a base image with crops; the number bounds the size of their merged map of patches."""


def is_anyres(aspect_ratio: str | None) -> bool:
    """Whether images are given as a base image with crops."""
    return aspect_ratio is not None and ANYRES.fullmatch(aspect_ratio) is not None


def get_anyres_image_grid_shape(image_size: Size, grid_pinpoints: Any, patch_size: int) -> Size:
    """Columns and rows of the crops that an image of this size is cut into.

    Raises:
        ConfigError: pinpoints that make no grid.
    """
    width, height = select_best_resolution(image_size, grid_resolutions(grid_pinpoints, patch_size))
    return width // patch_size, height // patch_size


def grid_resolutions(grid_pinpoints: Any, side: int) -> list[Size]:
    """The resolutions (width, height) that images may be fitted into.

    Args:
        grid_pinpoints: pairs of pixels; such a list as text; or "(1x1),...,(6x6)", every grid from the first to the
            last pair in crops, whatever stands between them.
        side: width and height of a crop in pixels.

    Raises:
        ConfigError: none of these, or pixels that are no multiple of `side`.
    """
    resolutions = _parse(grid_pinpoints, side)
    if not resolutions or any(pixels < side or pixels % side for size in resolutions for pixels in size):
        raise ConfigError(
            f"image_grid_pinpoints is {grid_pinpoints!r}; image_aspect_ratio anyres needs pairs of multiples of "
            f"{side} pixels, such as [[{side}, {2 * side}], [{2 * side}, {side}]], or (1x1),...,(6x6)."
        )
    return resolutions


def _parse(grid_pinpoints: Any, side: int) -> list[Size]:
    """Pairs of pixels, none where this is no list of pairs."""
    if isinstance(grid_pinpoints, str) and (pairs := re.findall(r"(\d+)x(\d+)", grid_pinpoints)):
        (left, top), (right, bottom) = [(int(columns), int(rows)) for columns, rows in (pairs[0], pairs[-1])]
        return [(side * i, side * j) for i in range(left, right + 1) for j in range(top, bottom + 1)]
    try:
        listed = ast.literal_eval(grid_pinpoints) if isinstance(grid_pinpoints, str) else grid_pinpoints
        return [(int(width), int(height)) for width, height in listed]
    except (TypeError, ValueError, SyntaxError):
        return []


def select_best_resolution(original_size: Size, possible_resolutions: Sequence[Size]) -> Size:
    """The resolution that shows most of an image's own pixels; of equal ones the smallest, then the first."""
    original_width, original_height = original_size

    def shown_and_spare(resolution: Size) -> tuple[int, int]:
        width, height = resolution
        scale = min(width / original_width, height / original_height)
        shown = min(int(original_width * scale) * int(original_height * scale), original_width * original_height)
        return shown, shown - width * height

    width, height = max(possible_resolutions, key=shown_and_spare)
    return width, height
