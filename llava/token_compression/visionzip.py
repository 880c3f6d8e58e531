"""Each frame keeps the tokens that its patches look at most (dominant), and merges the others by the similarity of
their keys into evenly spaced ones among them (contextual).

Source: VisionZip, arXiv 2412.04467; after pooling and per frame, as in its port to LLaVA-OneVision in HoliTom.
Cost: O(K N D + T D) operations, O(K N + T D) memory, where D of the first is the width of a key (72); K / F tokens of a
frame, of which 0.16 are contextual, are compared with N.

What differs: the budget is met exactly, spread evenly over the frames, where the port truncates per
frame. Tokens leave in source order, where published ones leave dominant before contextual, frame by frame.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llava.errors import ConfigError
from llava.token_compression.anchors import slots, source_indices, without
from llava.token_compression.apportion import equal_shares
from llava.token_compression.components import normalised
from llava.token_compression.config import CompressionConfig
from llava.token_compression.joining import mean_of_joined
from llava.token_compression.registry import Kept, register


@dataclass(frozen=True)
class VisionZipOptions:
    """Settings of VisionZip.

    Attributes:
        dominant_share: of a frame's tokens in (0, 1], 54 of 64 as published; at 1 it is a choice by attention alone.
        contextual: "sum" adds the mean of the tokens merged into a contextual one to it, as published, which makes it
            up to twice as long; "mean" is the mean of it and them.
    """

    dominant_share: float = 54 / 64
    contextual: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        if not 0 < self.dominant_share <= 1:
            raise ConfigError(f"dominant_share must be above 0 and at most 1, got {self.dominant_share!r}.")


@register("visionzip", inputs=("vision_attn", "vision_keys"), options=VisionZipOptions, merge=False)
def visionzip(
    features: Tensor, config: CompressionConfig, budget: int, vision_attn: Tensor, vision_keys: Tensor
) -> Kept:
    """See the module."""
    source = source_indices(features)
    anchor = torch.full_like(source, -1)
    shares = equal_shares(budget, len(features)).to(features.device)
    for count in shares.unique().tolist():  # one number, or two
        some = (shares == count).nonzero().view(-1)
        if count > 0:
            local = _anchors(vision_attn[some], vision_keys[some], count, config.options.dominant_share)
            anchor[some] = torch.where(local >= 0, source[some, :1] + local, -1)
    positions, membership = slots(anchor.view(-1))
    flat = features.flatten(0, 1)
    mean, joined = mean_of_joined(flat, without(membership, positions), budget)
    kept = flat[positions]
    kept = kept + mean if config.options.contextual == "sum" else (kept + joined * mean) / (1 + joined)
    return Kept(kept, positions, membership)


def _anchors(attention: Tensor, keys: Tensor, count: int, share: float) -> Tensor:
    """For frames that keep `count` tokens each, the anchor (frames, n) of each token within its frame, or -1."""
    contextual = 0 if share == 1 else min(count - 1, max(1, round(count * (1 - share))))
    frames, tokens = attention.shape
    order = attention.argsort(dim=1, descending=True, stable=True)
    dominant, rest = order[:, : count - contextual], order[:, count - contextual :].sort().values
    anchor = torch.full((frames, tokens), -1, device=attention.device).scatter_(1, dominant, dominant)
    if contextual == 0:
        return anchor
    step = rest.shape[1] // contextual
    targets = rest[:, ::step][:, :contextual]
    unit = normalised(keys)
    sources, goals = (unit.gather(1, index.unsqueeze(2).expand(-1, -1, keys.shape[2])) for index in (rest, targets))
    chosen = (sources @ goals.mT).argmax(dim=2)
    anchor.scatter_(1, rest, targets.gather(1, chosen))
    return anchor.scatter_(1, targets, targets)
