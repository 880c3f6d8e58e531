"""Average pooling to an exact number of tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.errors import ConfigError
from llava.token_compression.apportion import equal_shares
from llava.token_compression.config import CompressionConfig
from llava.token_compression.floors import blocks_in_time
from llava.token_compression.grid import GridOptions
from llava.token_compression.joining import first_members
from llava.token_compression.registry import Kept, register


@dataclass(frozen=True)
class PllavaOptions(GridOptions):
    """Options of "pllava".

    Attributes:
        frames: to how many the frames are pooled, if there are more; None leaves time as it is, as PLLaVA does for
            every number of frames that it was not trained with.
    """

    frames: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frames is not None and self.frames < 1:
            raise ConfigError(f"frames must be at least 1, got {self.frames}.")


@register("avgpool_spatial", options=GridOptions, merge=False)
def avgpool_spatial(features: Tensor, config: CompressionConfig, budget: int) -> Kept:
    """Every frame is averaged in equal windows. With fewer tokens than frames, frames at equal distances are, whole.

    Source: the spatial average of SimpleCluster's comparison, arXiv 2609.35394; exact counts are added here.
    Cost: O(T D) operations, O(T D) memory.
    """
    return pooled(features, config.options.shape(features.shape[1]), len(features), budget)


@register("avgpool_spatiotemporal", options=GridOptions, merge=False)
def avgpool_spatiotemporal(features: Tensor, config: CompressionConfig, budget: int) -> Kept:
    """The video is averaged in equal windows of frames, rows and columns.

    Source: the spatio-temporal average of SimpleCluster's comparison, arXiv 2609.35394; exact counts are added here.
    Cost: O(T D) operations, O(T D) memory.
    """
    frames, tokens, _ = features.shape
    return pooled(features, config.options.shape(tokens), blocks_in_time(frames, tokens, budget), budget)


@register("pllava", options=PllavaOptions, merge=False)
def pllava(features: Tensor, config: CompressionConfig, budget: int) -> Kept:
    """Adaptive average pooling over frames, rows and columns to a fixed shape; by default time is left as it is. Only
    with fewer tokens than frames are frames averaged, as many as are needed.

    Source: PLLaVA, arXiv 2404.16994, which pools to 16 x 12 x 12 tokens; exact counts are added here.
    Cost: O(T D) operations, O(T D) memory.
    """
    frames, tokens, _ = features.shape
    return pooled(features, config.options.shape(tokens), min(config.options.frames or frames, frames, budget), budget)


def pooled(features: Tensor, shape: tuple[int, int], times: int, budget: int) -> Kept:
    """Average in windows of frames, rows and columns.

    Window i of n over a length L is that of adaptive average pooling, from floor(i L / n) to ceil((i + 1) L / n), so
    that windows overlap where n does not divide L; a token is a member of the one whose middle is nearest, the first
    one on ties. Of every block of frames equally many tokens are kept; where these are no whole number of columns for
    each row of windows, some rows have one window more than the others.

    Args:
        features: (frames, tokens_per_frame, dim) float32 or float64.
        shape: rows and columns of a frame.
        times: blocks of frames, at most `frames`.
        budget: tokens in all.
    """
    frames, tokens, dim = features.shape
    device = features.device
    blocks = averaged(features.view(frames, *shape, dim), 0, times)
    kept = features.new_empty(budget, dim)
    slots = torch.full((times, tokens), -1)
    shares = equal_shares(budget, times)
    first = shares.cumsum(0) - shares
    for count in shares[shares > 0].unique().tolist():
        alike = (shares == count).nonzero().view(-1)
        columns = equal_shares(count, _rows(shape, count)).tolist()
        bands = averaged(blocks[alike.to(device)], 1, len(columns))
        windows = torch.cat([averaged(bands[:, band], 1, number) for band, number in enumerate(columns)], dim=1)
        kept[(first[alike].unsqueeze(1) + torch.arange(count)).to(device)] = windows
        slots[alike] = first[alike].unsqueeze(1) + _window_of_token(shape, columns)
    membership = slots[members(frames, times)].view(-1).to(device)
    return Kept(kept, first_members(membership, budget), membership, single_is_own=False)


def averaged(values: Tensor, axis: int, count: int) -> Tensor:
    """Means of `count` windows along an axis: the values themselves if there are as many."""
    length = values.shape[axis]
    first, end = _windows(length, count)
    shape = [-1 if index == axis else 1 for index in range(values.dim())]
    sums = values.index_select(axis, first.to(values.device))
    for offset in range(1, int((end - first).max())):
        index = first + offset
        inside = (index < end).view(shape).to(values)
        sums += values.index_select(axis, index.clamp_max(length - 1).to(values.device)) * inside
    return sums / (end - first).view(shape).to(values)


def members(length: int, count: int) -> Tensor:
    """The window (length,) int64 whose middle is nearest to each element."""
    first, end = _windows(length, count)
    return (2 * torch.arange(length).unsqueeze(1) - (first + end - 1)).abs().argmin(dim=1)


def _window_of_token(shape: tuple[int, int], columns: list[int]) -> Tensor:
    """The window (tokens_per_frame,) int64 of each token of a frame whose rows of windows have so many columns."""
    starts = [sum(columns[:band]) for band in range(len(columns))]
    rows = torch.stack([start + members(shape[1], number) for start, number in zip(starts, columns, strict=True)])
    return rows[members(shape[0], len(columns))].view(-1)


def _windows(length: int, count: int) -> tuple[Tensor, Tensor]:
    index = torch.arange(count)
    return index * length // count, -(-(index + 1) * length // count)


def _rows(shape: tuple[int, int], count: int) -> int:
    """Rows of windows for `count` of them, as nearly of the frame's proportions as the lengths of rows allow."""
    return min(max(round((count * shape[0] / shape[1]) ** 0.5), -(-count // shape[1])), shape[0], count)
