"""V-CAST gives frames at which the video turns, because the mean token changes direction, more tokens. In a frame it
keeps those that are least like its mean and long.

Source: V-CAST, arXiv 2603.27650, as released.
Cost: O(T D + T log N) operations, O(T D) memory.

What is changed: with fewer tokens than frames some frames keep none; the released code would keep one of each. It does
not compress single frames; here they are. It is made for models whose rotary positions are triples, where kept tokens
stay at their own: `position_ids="source"`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.errors import ConfigError
from llava.token_compression.apportion import apportion
from llava.token_compression.components import normalised
from llava.token_compression.config import CompressionConfig
from llava.token_compression.ranking import best_per_frame
from llava.token_compression.registry import Kept, register
from llava.token_compression.selection import select


@dataclass(frozen=True)
class VCastOptions:
    """Options of "vcast".

    Attributes:
        temperature: of the softmax over frames; the smaller, the more sharp turns are favoured.
        leftovers_to_one: as released, what rounding leaves of the budget goes to the frame with the largest remainder
            alone, until it is whole, then to the next; if not, one token each to the largest remainders.
    """

    temperature: float = 0.7
    leftovers_to_one: bool = True

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ConfigError(f"temperature must be above 0, got {self.temperature!r}.")


@register("vcast", options=VCastOptions, merge=False)
def vcast(features: Tensor, config: CompressionConfig, budget: int) -> Kept:
    """Frame shares by curvature, then the tokens that are unlike their frame and long."""
    frames, tokens, _ = features.shape
    centres = normalised(features.mean(dim=1))
    weights = (curvature(centres) / config.options.temperature).softmax(dim=0)
    least = min(1, budget // frames)
    counts = (_leftovers_to_one if config.options.leftovers_to_one else apportion)(weights, budget, least, tokens)
    unlike = 1 - (normalised(features) * centres.unsqueeze(1)).sum(dim=-1)
    lengths = features.norm(dim=-1)
    low, high = lengths.aminmax(dim=1, keepdim=True)
    return select(features, best_per_frame(unlike + (lengths - low) / (high - low).clamp_min(1e-6), counts))


def curvature(centres: Tensor) -> Tensor:
    """How sharply a path (frames, dim) turns at each point: 0 straight on, 2 straight back, 1 at both ends."""
    steps = normalised(centres.diff(dim=0))
    turns = torch.ones_like(centres[:, 0])
    turns[1:-1] = 1 - (steps[1:] * steps[:-1]).sum(dim=-1)
    return turns


def _leftovers_to_one(weights: Tensor, total: int, lower: int, upper: int) -> Tensor:
    """Shares (n,) int64 of a total as `apportion` has them, but for the leftovers."""
    ideal = weights.double() / weights.double().sum() * (total - lower * len(weights))
    shares = (lower + ideal.floor().long()).clamp_max(upper)
    order = (ideal - ideal.floor()).argsort(descending=True, stable=True)
    room = upper - shares[order]
    shares[order] += (total - shares.sum() - (room.cumsum(0) - room)).clamp_min(0).minimum(room)
    return shares
