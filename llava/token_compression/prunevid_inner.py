"""PruneVid with the part inside the language model: of the still places of a segment, and of what moves in a frame,
those tokens are left that any word of the question attends to most in any head.

Source: PruneVid, arXiv 2412.16117, both parts.
Cost: O(T log T) operations, O(T) memory.
Prunes: before the language model as "prunevid", to the size of the configuration; then between two layers of it
(`layer`, 11 of 28: by the attention of layer 10), to `inner_share` of that.

What is changed: the share is met exactly for the whole video, and divided among its parts in proportion to what they
hold, where the released code rounds each one down. The caches of the layers before keep all tokens, where it cuts them
too. As released, that attention is computed without rotary positions and causal mask; only the rows of the text are.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from llava.token_compression.apportion import apportion
from llava.token_compression.inner import InnerShareOptions, InnerVideo, Survivors
from llava.token_compression.prunevid import PruneVidOptions
from llava.token_compression.ranking import best_per_group
from llava.token_compression.registry import register


@dataclass(frozen=True)
class PruneVidInnerOptions(PruneVidOptions, InnerShareOptions):
    """Settings of PruneVid with its part inside the language model, besides those of "prunevid"."""

    inner_share: float = 0.4

    published = (11, 28)
    looking: ClassVar[Literal["last", "text", "text without order"]] = "text without order"

    def __post_init__(self) -> None:
        PruneVidOptions.__post_init__(self)
        InnerShareOptions.__post_init__(self)


@register("prunevid_inner", options=PruneVidInnerOptions, merge=False, before="prunevid")
def prunevid_inner(video: InnerVideo, count: int) -> Survivors:
    """See the module."""
    _, groups = video.groups.unique(return_inverse=True)
    sizes = torch.bincount(groups)
    return Survivors(best_per_group(video.attention.amax(dim=(0, 1)), groups, apportion(sizes, count, 0, sizes)))
