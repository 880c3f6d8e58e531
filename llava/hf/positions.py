"""Rotary positions of the tokens that are kept."""

import torch
from torch import Tensor

from llava.hf.family import runs


def close_gaps(positions: Tensor, video: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Number the kept tokens of every run of video tokens one after the other, and move up what follows.

    Everything else, images included, keeps its positions relative to its neighbours.

    Args:
        positions: (batch, length) int64, or (axes, batch, length).
        video: (batch, length) bool, the tokens of videos.
        keep: (batch, length) bool; a token of no video that is not kept is padding.

    Returns:
        Positions in the same shape, meaningful where `keep` is true, and (batch,) int64 how far the end moved up.
    """
    dropped = video & ~keep
    if positions.ndim == 2:  # every token takes one number
        before = dropped.cumsum(1)
        return positions - before, before[:, -1]
    moved = positions.clone()
    shifts = torch.zeros(len(video), dtype=torch.int64, device=positions.device)
    for row in range(len(video)):
        shift = 0
        done = 0
        for run in runs(video[row].nonzero()[:, 0]):
            first, end = int(run[0]), int(run[-1]) + 1
            moved[:, row, done:first] -= shift
            start = int(positions[:, row, first].min()) - shift
            kept = keep[row, first:end]
            moved[:, row, first:end] = start + kept.cumsum(0) - 1
            after = positions[:, row, end].min() if end < len(video[row]) else positions[:, row, first:end].max() + 1
            shift = int(after) - start - int(kept.sum())
            done = end
        moved[:, row, done:] -= shift
        shifts[row] = shift
    return moved, shifts
