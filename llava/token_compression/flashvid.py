"""Every frame keeps tokens that are diverse and receive attention; each other token follows its most similar one in the
frame before, and the roots of the trees that this makes are clustered (the part before the language model).

Source: FlashVID, arXiv 2602.08024.
Cost: O(F N^2 D + K N) operations, O(T D + 4 F N^2) memory.

What differs: the budget is met exactly, spread evenly over the frames. What a segment has for clusters is divided among
its frames in proportion to their roots, one at least as long as there are enough, where published code rounds each
up. The published enlargement by 1.25, which a later pruning inside the language model takes back, is left out.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from llava.errors import ConfigError
from llava.token_compression.anchors import slots, source_indices
from llava.token_compression.apportion import apportion, equal_shares
from llava.token_compression.components import normalised
from llava.token_compression.config import CompressionConfig
from llava.token_compression.dpc_knn import density_peaks, distances, first_of, to_centres
from llava.token_compression.joining import mean_of_joined
from llava.token_compression.registry import Kept, register
from llava.token_compression.segments import segments

NEIGHBOURS = 7
UNRELATED = -1.0


@dataclass(frozen=True)
class FlashVidOptions:
    """Settings of FlashVID.

    Attributes:
        least_segments: so many segments at least.
        tau: a cosine of neighbouring frames' mean tokens below it starts a segment.
        selected_share: of the tokens of a frame, those that are kept as they are.
        relevance: weigh diversity by the product with the segment's mean token besides attention, as published for
            LLaVA-OneVision ("attn_div_v2"); not so for Qwen2.5-VL and Qwen3-VL.
        tree_tau: a token follows one whose cosine to it is above this.
        tree_mean: "released" divides a tree's sum by one more than the tokens that follow its root directly, as the
            published code does; "exact" is the mean of the tree, as the paper has it.
        lone_frames: in a segment of one frame, cluster "all" of its tokens, as the published code does, or the
            "others", without those that are kept as they are.
    """

    least_segments: int = 8
    tau: float = 0.9
    selected_share: float = 0.7
    relevance: bool = True
    tree_tau: float = 0.8
    tree_mean: Literal["released", "exact"] = "released"
    lone_frames: Literal["all", "others"] = "all"

    def __post_init__(self) -> None:
        if not 0 <= self.selected_share <= 1:
            raise ConfigError(f"selected_share must lie in [0, 1], got {self.selected_share!r}.")
        if self.least_segments < 1:
            raise ConfigError(f"least_segments must be at least 1, got {self.least_segments!r}.")


@register("flashvid", inputs=("vision_attn",), options=FlashVidOptions, merge=False)
def flashvid(features: Tensor, config: CompressionConfig, budget: int, vision_attn: Tensor) -> Kept:
    """See the module."""
    options, (frames, tokens, _) = config.options, features.shape
    segment = segments(features.mean(dim=1), options.tau, options.least_segments)
    shares = equal_shares(budget, frames)
    selected_counts = (shares * options.selected_share).ceil().long().minimum(shares)
    unit = normalised(features)
    selected = diverse(unit, _weights(features, segment, vision_attn, options.relevance), selected_counts)

    flat, source = features.flatten(0, 1), source_indices(features)
    lengths = torch.bincount(segment)
    room = (lengths * tokens).index_add_(0, segment, -shares.to(flat.device))
    parent = links(unit, selected, segment, room, options.tree_tau)
    follows = parent != source.view(-1)
    direct = torch.bincount(parent[follows], minlength=len(flat)).unsqueeze(1)
    root = parent
    for _ in range(frames.bit_length()):
        root = root[root]
    means, sizes = mean_of_joined(flat, root, len(flat))
    values = means * sizes / (1 + direct) if options.tree_mean == "released" else means

    roots = ~follows.view(frames, tokens) & ~selected
    available = roots.sum(dim=1)
    counts = _cluster_counts(available.cpu(), segment.cpu(), shares - selected_counts).to(flat.device)
    entered = roots
    if options.lone_frames == "all":
        entered = roots | (selected & ((lengths[segment] == 1) & (counts < available)).unsqueeze(1))
    apart = distances(values.view_as(features))
    order = density_peaks(apart, counts.clamp(1, NEIGHBOURS), entered)
    taken = selected.gather(1, order)
    centres = first_of(order.gather(1, taken.long().argsort(dim=1, stable=True)), counts)
    clustered = entered & (counts > 0).unsqueeze(1)
    centre = torch.where(clustered, to_centres(apart, centres) + source[:, :1], -1).view(-1)

    anchor = torch.where(selected.view(-1), source.view(-1), centre[root])
    positions, membership = slots(anchor)
    kept = flat[positions]
    of_centre = torch.where(centre >= 0, membership[centre], -1)
    mean, count = mean_of_joined(values, of_centre, budget)
    return Kept(torch.where(count > 0, mean, kept), positions, membership, single_is_own=options.lone_frames != "all")


def diverse(unit: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """Choose tokens of each frame that are far from each other, greedily, by weighted distance.

    Args:
        unit: (frames, tokens, dim) vectors of length 1, or 0.
        weights: (frames, tokens), what the distance (1 - cosine) of a token to every other one is multiplied by.
        counts: (frames,) int64, how many to choose of each.

    Returns:
        (frames, tokens) bool.
    """
    apart = (1 - unit @ unit.mT).clamp_min_(0)
    apart.diagonal(dim1=1, dim2=2).zero_()
    apart *= weights.unsqueeze(1)  # [frame, from, to]
    frames, tokens, _ = unit.shape
    rows, counts = torch.arange(frames, device=unit.device), counts.to(unit.device)
    chosen = torch.zeros(frames, tokens, dtype=torch.bool, device=unit.device)
    closest = apart.kthvalue(min(2, tokens), dim=1).values  # the closest other one, as each is at 0 from itself
    for done in range(int(counts.max())):
        pick = closest.masked_fill(chosen, -torch.inf).argmax(dim=1)
        chosen[rows, pick] |= counts > done
        own = apart[rows, pick]
        closest = own if done == 0 else torch.minimum(closest, own)
    return chosen


def links(unit: Tensor, selected: Tensor, segment: Tensor, room: Tensor, threshold: float) -> Tensor:
    """Let tokens follow their most similar ones in the frame before.

    Args:
        unit: (frames, tokens, dim) vectors of length 1, or 0.
        selected: (frames, tokens) bool, tokens that neither follow nor are followed.
        segment: (frames,) int64; nothing follows across segments.
        room: (segments,) int64, how many may follow in each; the most similar ones do, of equals the first.
        threshold: a cosine that must be exceeded.

    Returns:
        (frames * tokens,) int64, the source index of what each token follows; its own for one that does not.
    """
    frames, tokens, _ = unit.shape
    parent = torch.arange(frames * tokens, device=unit.device)
    if frames == 1:
        return parent
    cosines = (unit[1:] @ unit[:-1].mT).masked_fill_(selected[:-1].unsqueeze(1), UNRELATED)
    similarity, best = cosines.max(dim=2)
    similarity = similarity.masked_fill(selected[1:] | (segment[1:] != segment[:-1]).unsqueeze(1), UNRELATED)
    follows = similarity > max(threshold, UNRELATED)
    strongest = similarity.masked_fill(~follows, -torch.inf).view(-1).argsort(descending=True, stable=True)
    order = strongest[segment[1:].repeat_interleave(tokens)[strongest].argsort(stable=True)]  # segment by segment
    own = segment[1:].repeat_interleave(tokens)[order]
    sizes = torch.bincount(own, minlength=len(room))
    rank = torch.arange(len(order), device=unit.device) - (sizes.cumsum(0) - sizes)[own]
    follows.view(-1)[order[rank >= room[own]]] = False
    before = torch.arange(frames - 1, device=unit.device).unsqueeze(1) * tokens + best
    parent[tokens:] = torch.where(follows, before, parent[tokens:].view(frames - 1, tokens)).view(-1)
    return parent


def _weights(features: Tensor, segment: Tensor, attention: Tensor, relevance: bool) -> Tensor:
    """(frames, tokens): attention, times the product of each token with the mean token of its segment."""
    if not relevance:
        return attention
    of_segment, _ = mean_of_joined(features.mean(dim=1), segment, int(segment[-1]) + 1)
    return attention * (features @ of_segment[segment].unsqueeze(2)).squeeze(2)


def _cluster_counts(roots: Tensor, segment: Tensor, wanted: Tensor) -> Tensor:
    """Divide what a segment has for clusters among its frames: (frames,) int64, all arguments (frames,) on the CPU."""
    counts = torch.zeros_like(roots)
    for in_segment in functional.one_hot(segment).bool().T:
        own, total = in_segment & (roots > 0), int(wanted[in_segment].sum())
        counts[own] = apportion(roots[own], total, int(total >= own.sum()), roots[own])
    return counts
