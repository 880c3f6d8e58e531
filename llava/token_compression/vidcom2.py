"""VidCom2 keeps the tokens that are least like the mean token of the video and of their own frame. Frames that differ
most from the rest of the video keep more of them.

Source: VidCom2, arXiv 2505.14454, as released (the branch for LLaVA).
Cost: O(T D + T log N) operations, O(T D) memory.

What is changed: the shares of frames are rounded to exactly K tokens by largest remainders. The released code rounds
each one by itself, and always keeps one token of a frame; here, with fewer tokens than frames, some frames have none.
All is computed in float32, of whatever dtype the features are.
"""

from dataclasses import dataclass
from typing import Literal

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
class VidCom2Options:
    """Options of "vidcom2".

    Attributes:
        score: how like a mean a token is. "gauss_lowvar", as released: a sum of Gaussians of the distance, in the half
            of the channels that vary least. "cosine", as the paper has it: with the mean of the tokens as they are.
        temperature: of the softmax over frames; the smaller, the more the most different frame is favoured.
    """

    score: Literal["gauss_lowvar", "cosine"] = "gauss_lowvar"
    temperature: float = 0.01

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ConfigError(f"temperature must be above 0, got {self.temperature!r}.")


@register("vidcom2", options=VidCom2Options, merge=False)
def vidcom2(features: Tensor, config: CompressionConfig, budget: int) -> Kept:
    """Frame shares by how unlike the video a frame is, then the tokens that are least like both means."""
    frames, tokens, _ = features.shape
    closeness = _gauss_lowvar if config.options.score == "gauss_lowvar" else _cosine
    to_video, to_frame = closeness(features)
    unlike = -to_video.mean(dim=1) / config.options.temperature
    favour = (unlike - unlike.max()).softmax(dim=0)
    ratios = (budget / (frames * tokens) * (1 + favour - favour.mean())).clamp_max(1)
    counts = apportion(ratios, budget, min(1, budget // frames), tokens)
    return select(features, best_per_frame(-(to_video + to_frame), counts))


def _gauss_lowvar(features: Tensor) -> tuple[Tensor, Tensor]:
    """Closeness (frames, tokens_per_frame) of every token to the mean of the video, and to that of its frame."""
    channels = features.var(dim=(0, 1), correction=0).argsort(stable=True)[: max(1, features.shape[2] // 2)]
    unit = normalised(features[..., channels.sort().values])
    centres = unit.mean(dim=(0, 1)), unit.mean(dim=1, keepdim=True)
    return _gauss(unit, centres[0]), _gauss(unit, centres[1])


def _gauss(unit: Tensor, centre: Tensor) -> Tensor:
    squares = (unit - centre).square().sum(dim=-1)
    return torch.stack([(-squares / (2 * width)).exp() for width in (1 / 8, 1 / 4, 1 / 2, 1, 2)]).sum(dim=0)


def _cosine(features: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines (frames, tokens_per_frame) of every token with the mean of the video, and with that of its frame."""
    unit = normalised(features)
    video, frame = normalised(features.mean(dim=(0, 1))), normalised(features.mean(dim=1, keepdim=True))
    return (unit * video).sum(dim=-1), (unit * frame).sum(dim=-1)
