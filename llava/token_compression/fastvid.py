"""The video is cut into segments; every frame keeps its salient tokens, and the other tokens of a segment are merged
into dense ones of every fourth of its frames, counted from its end.

Source: FastVID, arXiv 2503.11187.
Cost: O(F N^2 D + T K D) operations, O(T D + 4 F N^2) memory; T K falls with the length of segments, as a token is only
compared with the anchors of its own.

What differs: the budget is met exactly. It is spread evenly over frames, and what a segment has for merged tokens over
its anchor frames, where published code cuts off fractions; what the anchor frames cannot hold becomes salient tokens of
the others. Published code leaves each token at its place in the source: `position_ids="source"`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llava.errors import ConfigError
from llava.token_compression.anchors import slots, source_indices
from llava.token_compression.apportion import apportion, equal_shares
from llava.token_compression.components import normalised
from llava.token_compression.config import CompressionConfig
from llava.token_compression.dpc_knn import density_peaks, distances, first_of
from llava.token_compression.joining import mean_of_joined
from llava.token_compression.ranking import best_per_frame
from llava.token_compression.registry import Kept, register
from llava.token_compression.segments import segments

NEIGHBOURS = 4


@dataclass(frozen=True)
class FastVidOptions:
    """Settings of FastVID.

    Attributes:
        signals: "head" takes salience and segments from SigLIP's pooling head, as published; "vision_attn" takes
            salience from the attention that patches receive in the tower's last layer used, and segments from the
            frames' mean tokens, for towers without that head.
        least_segments: so many segments at least.
        tau: a cosine of neighbouring frames below it starts a segment.
        merged_share: of the tokens of a frame, those that are made by merging.
        period: of so many frames of a segment, one is an anchor frame.
        beta: weight of an anchor beside the mean of its members.
        sources: what is merged into the anchors of a frame: "all" tokens of the segment that are not salient, as
            published for LLaVA-OneVision, or those that are "not anchors" of that frame, as for LLaVA-Video.
    """

    signals: Literal["head", "vision_attn"] = "head"
    least_segments: int = 8
    tau: float = 0.9
    merged_share: float = 0.4
    period: int = 4
    beta: float = 0.6
    sources: Literal["all", "not anchors"] = "all"

    def __post_init__(self) -> None:
        for name in ("merged_share", "beta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie in [0, 1], got {getattr(self, name)!r}.")
        for name in ("least_segments", "period"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)!r}.")

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs that these settings need."""
        return ("map_attn", "map_embed") if self.signals == "head" else ("vision_attn",)


@register("fastvid", inputs=("map_attn", "map_embed"), options=FastVidOptions, merge=False)
def fastvid(
    features: Tensor,
    config: CompressionConfig,
    budget: int,
    map_attn: Tensor | None = None,
    map_embed: Tensor | None = None,
    vision_attn: Tensor | None = None,
) -> Kept:
    """See the module."""
    options, tokens = config.options, features.shape[1]
    embeds = features.mean(dim=1) if map_embed is None else map_embed
    segment = segments(embeds, options.tau, options.least_segments)
    salient_counts, anchor_counts = shares(torch.bincount(segment).tolist(), tokens, budget, options)

    salience = map_attn if map_attn is not None else vision_attn
    assert salience is not None
    source, flat = source_indices(features), features.flatten(0, 1)
    salient = torch.zeros_like(source, dtype=torch.bool)
    salient.view(-1)[best_per_frame(salience, salient_counts.to(flat.device))] = True
    anchors = torch.zeros_like(salient)
    chosen = anchor_counts.nonzero().view(-1).to(flat.device)
    if len(chosen) > 0:
        order = density_peaks(distances(features[chosen]), NEIGHBOURS, ~salient[chosen])
        anchors[chosen] = first_of(order, anchor_counts[chosen.cpu()])

    own = torch.where(salient | anchors, source, -1)
    positions, slot = slots(own.view(-1))
    kept, unit = flat[positions], normalised(flat)
    highest = torch.full_like(flat[:, 0], -torch.inf)
    membership = slot.clone()
    for frame in chosen.tolist():
        at = anchors[frame].nonzero().view(-1) + frame * tokens
        merged = (segment == segment[frame]).unsqueeze(1) & ~salient
        if options.sources == "not anchors":
            merged[frame] &= ~anchors[frame]
        rows = merged.view(-1).nonzero().view(-1)
        similarity, nearest = (unit[rows] @ unit[at].mT).max(dim=1)
        local = torch.full_like(slot, -1)
        local[rows] = nearest
        if options.sources == "all":
            local[at] = torch.arange(len(at), device=at.device)
        mean, count = mean_of_joined(flat[rows], local[rows], len(at))
        weight = (1 / (count + 1)).clamp_min(options.beta)
        kept[slot[at]] = torch.where(count > 0, weight * flat[at] + (1 - weight) * mean, flat[at])
        closer = (similarity > highest[rows]) & (slot[rows] < 0)
        highest[rows] = torch.where(closer, similarity, highest[rows])
        membership[rows[closer]] = slot[at][nearest[closer]]
    return Kept(kept, positions, membership, single_is_own=False)


def shares(lengths: list[int], tokens: int, budget: int, options: FastVidOptions) -> tuple[Tensor, Tensor]:
    """How many tokens each frame keeps as salient ones, and as anchors of merged ones.

    Args:
        lengths: frames of each segment.
        tokens: of a frame.

    Returns:
        Two (frames,) int64 tensors on the CPU that add up to the budget.
    """
    frames = sum(lengths)
    total = equal_shares(budget, frames)
    merged = (total * options.merged_share).long()
    salient, anchors = total - merged, torch.zeros(frames, dtype=torch.int64)
    start = 0
    for length in lengths:
        own = slice(start, start + length)
        is_anchor = (length - 1 - torch.arange(length)) % options.period == 0
        room = tokens - salient[own]
        wanted = int(merged[own].sum())
        held = min(wanted, int(room[is_anchor].sum()))
        anchors[own][is_anchor] = apportion(is_anchor[is_anchor], held, upper=room[is_anchor])
        if wanted > held:
            others = room[~is_anchor]
            salient[own][~is_anchor] += apportion(torch.ones(len(others)), wanted - held, upper=others)
        start += length
    return salient, anchors
