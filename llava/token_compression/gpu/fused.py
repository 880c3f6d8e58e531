"""The published algorithm from features to merged tokens without waiting for the device before its end.

How many tokens a step leaves is known to the device alone, so every buffer has room for all of them, and the kernels
are told where that number is. At the end, the numbers are read: the only time that this waits.
"""

import torch
from torch import Tensor

from llava.token_compression.clusters import arranged
from llava.token_compression.components import on_grid
from llava.token_compression.config import CompressionConfig
from llava.token_compression.gpu import launch
from llava.token_compression.registry import Kept

ENTRIES = 2**26
"""Entries of features up to which there is room for all tokens in every step: 256 MB of float32 each."""


def fits(features: Tensor, config: CompressionConfig) -> bool:
    """Whether `compressed` can compress these features: by a threshold, all vertices looked at, and not too many."""
    return (
        config.method == "scissor"
        and config.similarity_threshold is not None
        and config.error_tolerance == 0
        and features.dtype != torch.float64
        and features.numel() <= ENTRIES
    )


def compressed(features: Tensor, config: CompressionConfig) -> tuple[Kept, Tensor] | None:
    """What is kept, merged if the configuration says so, and the assignment (n,) of all source tokens.

    None if the features need the general path: entries that are not finite, or too large or small for products in
    float32, or more decisions to be made exactly than there is room for.
    """
    assert config.similarity_threshold is not None
    values = features.flatten(0, 1).contiguous()
    inverse, wrong = launch.inverse_lengths(values)
    there = torch.full((1,), len(values), dtype=torch.int32, device=values.device)
    spatial = _Step(values, inverse, len(features), there, config.similarity_threshold)
    last, membership, representatives, wrong = (
        spatial,
        spatial.membership,
        spatial.representatives,
        wrong | spatial.wrong,
    )
    if config.temporal:
        inverse_of_means, unusual = launch.inverse_lengths(spatial.means)
        last = _Step(spatial.means, inverse_of_means, 1, spatial.number.int(), config.similarity_threshold)
        membership = last.membership[membership]
        representatives = representatives[last.representatives]
        wrong = wrong | unusual | last.wrong
    assignment = membership
    if config.merge:
        assignment, unusual = _merged(values, inverse, last.means, membership, last.number)
        wrong = wrong | unusual
    kept, spatial_tokens, failed = torch.cat([last.number, spatial.number, wrong.long().view(1)]).tolist()
    if failed:
        return None
    tokens = last.means[:kept].clone()  # lets the rest of the buffer go
    tau = config.similarity_threshold
    return Kept(tokens, representatives[:kept], membership, spatial_tokens, tau), assignment


class _Step:
    """One step's clusters of values (n, dim), of which `there` (1,) exist: padded to n, with their number (1,)."""

    def __init__(self, values: Tensor, inverse: Tensor, graphs: int, there: Tensor, threshold: float):
        labels, degrees, self.wrong = launch.unite(values, inverse, graphs, there, on_grid(threshold), None)
        self.membership, self.representatives, self.number = arranged(labels, degrees, there)
        means = torch.zeros(values.shape, device=values.device)
        self.means = launch.add_segments(means, values, self.membership, self.number, means=True)


def _merged(values: Tensor, inverse: Tensor, kept: Tensor, membership: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """Merge all values into the first `number` rows of `kept`, in place; the assignment, and whether it is wrong."""
    n = len(values)
    members = torch.zeros(n, dtype=torch.int64, device=values.device)
    moves = members.scatter_add_(0, membership, torch.ones_like(membership))[membership] > 1
    rows = moves.logical_not().argsort(stable=True)  # those that move come first
    best, wrong = launch.nearest(values, inverse, rows, moves.sum().view(1), kept, number)
    moved = torch.where(moves[rows] & (inverse[rows] > 0), best, membership[rows])
    assignment = torch.zeros_like(membership).scatter_(0, rows, moved)
    launch.add_segments(kept, values, assignment, number, means=False)
    return assignment, wrong
