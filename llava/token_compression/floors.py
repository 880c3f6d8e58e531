"""Sanity floors: choices that do not look at the tokens, which every method has to beat."""

import torch
from torch import Tensor

from llava.token_compression.apportion import equal_shares, starts
from llava.token_compression.config import CompressionConfig
from llava.token_compression.grid import GridOptions
from llava.token_compression.ranking import best_per_frame
from llava.token_compression.registry import Kept, register
from llava.token_compression.selection import select


@register("uniform_frames", any_dtype=True, merge=False)
def uniform_frames(features: Tensor, config: CompressionConfig, budget: int) -> Kept:
    """Fewer frames are watched: whole ones at equal distances, the last of them thinned to what is left of the budget.

    Source: the plainest baseline, a video sampled at a lower rate.
    Cost: O(T + K D) operations, O(T + K D) memory.
    """
    frames, tokens, _ = features.shape
    watched = -(-budget // tokens)
    rest = budget - (watched - 1) * tokens
    first = starts(frames, watched).unsqueeze(1) * tokens
    positions = torch.cat([(first[:-1] + torch.arange(tokens)).view(-1), first[-1] + starts(tokens, rest)])
    return select(features, positions.to(features.device))


@register("random_per_frame", any_dtype=True, merge=False)
def random_per_frame(features: Tensor, config: CompressionConfig, budget: int) -> Kept:
    """Tokens are drawn without replacement, equally many in every frame. The draw depends on `config.seed` alone.

    Source: a baseline of token compression's literature, for example of VisionZip's ablations, arXiv 2412.04467.
    Cost: O(T log N + K D) operations, O(T + K D) memory.
    """
    scores = torch.rand(features.shape[:2], generator=torch.Generator().manual_seed(config.seed), dtype=torch.float64)
    return select(features, best_per_frame(scores, equal_shares(budget, len(features))).to(features.device))


@register("grid_spatial", any_dtype=True, options=GridOptions, merge=False)
def grid_spatial(features: Tensor, config: CompressionConfig, budget: int) -> Kept:
    """Every frame is cut into equal blocks, and the first token of each block is kept. What a budget has beyond a whole
    number of blocks is spread over the other tokens of the frame.

    Source: the spatial grid of SimpleCluster's comparison, arXiv 2609.35394; exact counts are added here.
    Cost: O(T + K D) operations, O(T + K D) memory.
    """
    frames, tokens, _ = features.shape
    shape = config.options.shape(tokens)
    shares = equal_shares(budget, frames)
    mask = torch.zeros(frames, tokens, dtype=torch.bool)
    for count in shares.unique().tolist():
        mask[shares == count] = _filled(_lattice((1, *shape), (1, *_sides(shape, count))), count)
    return select(features, mask.view(-1).nonzero().view(-1).to(features.device))


@register("grid_spatiotemporal", any_dtype=True, options=GridOptions, merge=False)
def grid_spatiotemporal(features: Tensor, config: CompressionConfig, budget: int) -> Kept:
    """The video is cut into equal blocks of frames, rows and columns, and the first token of each block is kept. What a
    budget has beyond a whole number of blocks is spread over the other tokens.

    Source: the spatio-temporal grid of SimpleCluster's comparison, arXiv 2609.35394; exact counts are added here.
    Cost: O(T + K D) operations, O(T + K D) memory.
    """
    frames, tokens, _ = features.shape
    shape = config.options.shape(tokens)
    times = blocks_in_time(frames, tokens, budget)
    mask = _lattice((frames, *shape), (times, *_sides(shape, budget // times)))
    return select(features, _filled(mask, budget).nonzero().view(-1).to(features.device))


def blocks_in_time(frames: int, tokens_per_frame: int, budget: int) -> int:
    """How many blocks of frames there are where a budget makes equally many steps, relative to length, on all axes."""
    share = (budget / (frames * tokens_per_frame)) ** (1 / 3)
    return min(max(1, round(frames * share)), budget)


def _sides(shape: tuple[int, int], count: int) -> tuple[int, int]:
    """Rows and columns of blocks, at most `count` of them, as nearly of the frame's proportions as that allows."""
    if count == 0:
        return 0, 0
    rows = min(max(1, round((count * shape[0] / shape[1]) ** 0.5)), *(shape[0], count))
    return rows, min(shape[1], count // rows)


def _lattice(shape: tuple[int, int, int], blocks: tuple[int, int, int]) -> Tensor:
    """A mask (frames * rows * columns,) of the first token of each block."""
    mask = torch.zeros(shape, dtype=torch.bool)
    axes = [starts(length, count) for length, count in zip(shape, blocks, strict=True)]
    mask[torch.meshgrid(*axes, indexing="ij")] = True
    return mask.view(-1)


def _filled(mask: Tensor, count: int) -> Tensor:
    """The mask with further tokens, at equal distances among the others, up to `count`."""
    others = (~mask).nonzero().view(-1)
    mask[others[starts(len(others), count - int(mask.sum()))]] = True
    return mask
