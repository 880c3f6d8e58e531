"""Frames with their components drawn in: the same color and the same number wherever a kept token is found."""

import colorsys

import numpy as np
from PIL import Image, ImageDraw

MIN_CELL = 24
"""A token is drawn at least so many pixels wide and high, if that does not take more than `MAX_SIDE`."""

MIN_SIDE = 320
"""The shorter side of a picture has at least so many pixels."""

MAX_SIDE = 1024
"""The longer side of a picture has at most so many pixels."""

TINT = 0.38
"""Share of a component's color in its fill."""

GOLDEN_RATIO = 0.618034


def colors(count: int) -> np.ndarray:
    """(count, 3) uint8 RGB colors of which consecutive ones are easy to tell apart, the same for any count."""
    hues = [(index * GOLDEN_RATIO) % 1 for index in range(count)]
    values = [colorsys.hsv_to_rgb(hue, (0.85, 0.6)[index // 7 % 2], 1.0) for index, hue in enumerate(hues)]
    return (255 * np.array(values).reshape(-1, 3)).round().astype(np.uint8)


def picture_size(width: int, height: int, side: int) -> tuple[int, int]:
    """(width, height), both even, in which a frame with a grid of `side` x `side` tokens is drawn."""
    scale = max(max(MIN_SIDE, MIN_CELL * side) / min(width, height), 1.0)
    scale = min(scale, MAX_SIDE / max(width, height))
    return max(2, 2 * round(width * scale / 2)), max(2, 2 * round(height * scale / 2))


def draw(frame: np.ndarray, labels: np.ndarray, kept: np.ndarray, palette: np.ndarray) -> Image.Image:
    """One frame with its components.

    A component is filled and outlined in its color; what was dropped is darkened. A ring marks the tokens that
    represent a kept one.

    Args:
        frame: (height, width, 3) uint8 RGB.
        labels: (side, side) int64, kept token of each source token, -1 if dropped.
        kept: (n, 2) int64, row and column of the representatives in this frame.
        palette: (kept tokens, 3) uint8.
    """
    side = len(labels)
    width, height = picture_size(frame.shape[1], frame.shape[0], side)
    image = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC)).astype(np.float32)
    rows, columns = np.arange(height) * side // height, np.arange(width) * side // width
    cells = labels[rows[:, None], columns]  # (height, width): the component of each pixel
    fill = np.where((cells >= 0)[..., None], palette[cells.clip(0)], 0).astype(np.float32)
    strength = np.where(cells >= 0, TINT, 0.6)[..., None]
    drawn = Image.fromarray(((1 - strength) * image + strength * fill).round().astype(np.uint8))
    canvas = ImageDraw.Draw(drawn)
    edges_x, edges_y = (np.ceil(np.arange(side + 1) * length / side).astype(int) for length in (width, height))
    for row in range(side):
        for column in range(side):
            _outline(canvas, labels, row, column, edges_x, edges_y, palette)
    radius = max(2, min(width, height) // side // 6)
    for row, column in kept:
        x = (edges_x[column] + edges_x[column + 1]) // 2
        y = (edges_y[row] + edges_y[row + 1]) // 2
        box = (x - radius, y - radius, x + radius, y + radius)
        canvas.ellipse(box, fill="white", outline="black", width=max(1, radius // 3))
    return drawn


def _outline(
    canvas: ImageDraw.ImageDraw,
    labels: np.ndarray,
    row: int,
    column: int,
    edges_x: np.ndarray,
    edges_y: np.ndarray,
    palette: np.ndarray,
) -> None:
    """Draw those sides of one token, inside of it, across which another component or the frame's edge lies."""
    own = labels[row, column]
    if own < 0:
        return
    color = tuple(int(value) for value in palette[own])
    left, right = int(edges_x[column]), int(edges_x[column + 1]) - 1
    top, bottom = int(edges_y[row]), int(edges_y[row + 1]) - 1
    padded = np.pad(labels, 1, constant_values=-2)
    sides = (
        (padded[row, column + 1], (left, top, right, top + 1)),
        (padded[row + 2, column + 1], (left, bottom - 1, right, bottom)),
        (padded[row + 1, column], (left, top, left + 1, bottom)),
        (padded[row + 1, column + 2], (right - 1, top, right, bottom)),
    )
    for neighbour, box in sides:
        if neighbour != own:
            canvas.rectangle(box, fill=color)
