"""2x2 pooling of a frame's patch grid, applied to projected video features."""

import math

import torch
from torch.nn import functional

from llava.errors import ConfigError

STRIDE = 2
"""LLaVA-OneVision pools by two whatever `mm_spatial_pool_stride` says; so does this model."""


def pool_2x2(features: torch.Tensor, mode: str | None) -> torch.Tensor:
    """Halve both sides of every frame's square token grid.

    Args:
        features: (frames, side * side, dim), row-major.
        mode: "bilinear" rounds the new side up (27 -> 14) and samples without antialiasing; "average" and "max"
            round it down (27 -> 13) and drop an odd last row and column.

    Returns:
        (frames, new_side * new_side, dim).

    Raises:
        ConfigError: unknown mode, or none.
    """
    frames, tokens, dim = features.shape
    side = math.isqrt(tokens)
    grid = features.transpose(1, 2).reshape(frames, dim, side, side)
    if mode == "bilinear":
        half = math.ceil(side / STRIDE)
        pooled = functional.interpolate(grid, size=(half, half), mode="bilinear", align_corners=False)
    elif mode == "average":
        pooled = functional.avg_pool2d(grid, STRIDE)
    elif mode == "max":
        pooled = functional.max_pool2d(grid, STRIDE)
    else:
        raise ConfigError(f'mm_spatial_pool_mode is {mode!r}; use "bilinear", "average" or "max".')
    return pooled.flatten(2).transpose(1, 2).contiguous()  # (frames, new_side^2, dim)
