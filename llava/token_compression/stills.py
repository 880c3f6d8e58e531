"""Places of a video that stay the same while a window of frames lasts, and are represented by their mean there."""

import torch
from torch import Tensor
from torch.nn import functional

from llava.token_compression.joining import mean_of_joined


def starts(window: Tensor) -> Tensor:
    """(frames,) bool: the first frame of each window, given the window (frames,) int64 of each frame."""
    return functional.pad(window.diff() > 0, (1, 0), value=True)


def free(static: Tensor, window: Tensor, scores: Tensor, budget: int) -> Tensor:
    """Let tokens stand alone that would be merged into the mean of their place, if a budget asks for more of them.

    Args:
        static: (frames, tokens) bool, the places that stay.
        window: (frames,) int64.
        scores: (frames, tokens), which tokens to free first, of equals those of lowest index. Those in the first frame
            of a window are not freed, so that each place keeps its mean.
        budget: how many tokens are wanted.

    Returns:
        What is left of `static`: with one token for each of its places in a window, there are at least `budget`.
    """
    repeated = static & ~starts(window).unsqueeze(1)
    spare = budget - static.numel() + int(repeated.sum())
    if spare <= 0:
        return static
    order = scores.masked_fill(~repeated, -torch.inf).view(-1).argsort(descending=True, stable=True)
    return static.reshape(-1).index_fill(0, order[:spare], False).view_as(static)


def means(features: Tensor, static: Tensor, window: Tensor) -> Tensor:
    """Mean (windows, tokens, dim) of each place that stays, 0 for the others.

    Args:
        features: (frames, tokens, dim) float32 or float64.
        static: (frames, tokens) bool.
        window: (frames,) int64.
    """
    tokens, dim = features.shape[1:]
    place = window.unsqueeze(1) * tokens + torch.arange(tokens, device=window.device)
    count = (int(window[-1]) + 1) * tokens
    mean, _ = mean_of_joined(features.flatten(0, 1), torch.where(static, place, -1).view(-1), count)
    return mean.view(-1, tokens, dim)
