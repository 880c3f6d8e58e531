"""Frames are clustered into segments; places that stay the same in one become their mean, and these means, like the
other tokens of every frame, are clustered (the part before the language model).

Source: PruneVid, arXiv 2412.16117.
Cost: O(F N^2 D + F^2 D) operations, O(4 F N^2 + T D + F^2) memory.

What differs: the paper's count is an outcome of its threshold, half of each group; here the budget is divided among the
groups in proportion to their sizes, one token at least as long as there are enough. Where it is larger than what the
segments leave, the tokens that are least like the mean of their place are kept out of it. Published code leaves groups
of up to 14 tokens whole, and lists clusters by their score, where tokens leave in source order here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from llava.errors import ConfigError
from llava.token_compression import stills
from llava.token_compression.anchors import slots, source_indices
from llava.token_compression.apportion import apportion
from llava.token_compression.components import normalised
from llava.token_compression.config import CompressionConfig
from llava.token_compression.dpc_knn import density_peaks, distances, first_of, to_centres
from llava.token_compression.joining import mean_of_joined
from llava.token_compression.registry import Kept, register

NEIGHBOURS = 7


@dataclass(frozen=True)
class PruneVidOptions:
    """Settings of PruneVid.

    Attributes:
        tau: a place stays the same if the mean cosine of its tokens in two frames of a segment is above it.
        segment_share: so many clusters of frames for each frame, rounded down.
    """

    tau: float = 0.8
    segment_share: float = 0.25

    def __post_init__(self) -> None:
        if not 0 <= self.segment_share <= 1:
            raise ConfigError(f"segment_share must lie in [0, 1], got {self.segment_share!r}.")


@register("prunevid", options=PruneVidOptions, merge=False)
def prunevid(features: Tensor, config: CompressionConfig, budget: int) -> Kept:
    """See the module."""
    options, frames = config.options, len(features)
    window = refined(_frame_clusters(features.mean(dim=1), max(1, int(frames * options.segment_share))))
    window = window.to(features.device)
    unit = normalised(features)
    static = _similarity(unit, window)[window] > options.tau
    means = stills.means(features, static, window)
    unlike = -(unit * normalised(means)[window]).sum(dim=2)
    freed = stills.free(static, window, unlike, budget)
    if freed is not static:
        static, means = freed, stills.means(features, freed, window)

    start = stills.starts(window)
    valid = torch.cat([~static, static[start]])  # (frames + segments, tokens): what is clustered together
    values = torch.cat([features, means])
    first = torch.cat([source_indices(features), source_indices(features)[start]])[:, :1]
    sizes = valid.sum(dim=1)
    some = sizes > 0
    counts = torch.zeros_like(sizes)
    counts[some] = apportion(sizes[some], budget, int(budget >= some.sum()), sizes[some])
    apart = distances(values)
    centres = first_of(density_peaks(apart, NEIGHBOURS, valid), counts)
    goal = torch.where(valid & (counts > 0).unsqueeze(1), to_centres(apart, centres) + first, -1)

    anchor = torch.where(static, goal[frames:][window], goal[:frames])
    positions, membership = slots(anchor.view(-1))
    slot = torch.where(goal >= 0, membership[goal], -1).view(-1)
    mean, _ = mean_of_joined(values.flatten(0, 1), slot, budget)
    segment = torch.where(static, frames + window.unsqueeze(1), source_indices(features) // features.shape[1])
    return Kept(mean, positions, membership, groups=segment.view(-1)[positions])


def refined(labels: Tensor) -> Tensor:
    """Make segments of clusters: each cluster keeps its longest runs, and what lies between goes to a neighbour.

    Args:
        labels: (frames,) int64, the cluster of each frame.

    Returns:
        (frames,) int64 on the CPU, the segment of each frame, from 0 on. A cluster keeps its runs of greatest length,
        if that is more than one frame. The frames between kept runs go to the longer one, the left one of equals; if
        no run is kept, all frames are one segment.
    """
    values, lengths = (item.tolist() for item in labels.cpu().unique_consecutive(return_counts=True))
    longest: dict[int, int] = {}
    for label, length in zip(values, lengths, strict=True):
        longest[label] = max(length, longest.get(label, 2))
    runs: list[list[int]] = []  # [label or -1, length]
    for label, length in zip(values, lengths, strict=True):
        kept = label if length == longest[label] else -1
        if runs and runs[-1][0] == kept == -1:
            runs[-1][1] += length
        else:
            runs.append([kept, length])
    given = []
    for index, (label, length) in enumerate(runs):
        sides = [runs[other] for other in (index - 1, index + 1) if 0 <= other < len(runs)]
        if label == -1:
            label = max(sides, key=lambda run: run[1])[0] if sides else 0
        given += [label] * length
    return functional.pad(torch.tensor(given).diff() != 0, (1, 0)).cumsum(0)


def _frame_clusters(frames: Tensor, count: int) -> Tensor:
    """(frames,) int64: the cluster centre of each frame, given a vector (frames, dim) of each."""
    apart = distances(frames.unsqueeze(0))
    return to_centres(apart, first_of(density_peaks(apart, NEIGHBOURS), torch.tensor([count])))[0]


def _similarity(unit: Tensor, window: Tensor) -> Tensor:
    """(segments, tokens): mean cosine of a place's tokens in two frames of a segment; -inf in one of a single frame.

    Args:
        unit: (frames, tokens, dim) vectors of length 1, or 0.
        window: (frames,) int64.
    """
    sizes = torch.bincount(window).unsqueeze(1)
    sums = stills.means(unit, torch.ones_like(unit[:, :, 0], dtype=torch.bool), window) * sizes.unsqueeze(2)
    pairs = sizes * (sizes - 1)
    return ((sums.square().sum(dim=2) - sizes) / pairs.clamp_min(1)).masked_fill(pairs == 0, -torch.inf)
