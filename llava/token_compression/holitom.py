"""A video is cut into windows in which many places do not change, so that one mean per place saves most tokens; what
moves is kept by the attention that it receives, and the means are clustered (the part before the language model).

Source: HoliTom, arXiv 2505.21334.
Cost: O(F N^2 D + F^2) operations, O(T D + F N^2 + F^2) memory.

What differs: the budget is met exactly. Every frame's moving tokens and every window's means get their share of it in
proportion to their number, where published code rounds each one up or to nearest. Where the budget is larger than what
the windows leave, the tokens that receive most attention are kept out of the means. Tokens leave in source order, a
mean at its place in the first frame of its window.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from llava.errors import ConfigError
from llava.token_compression import stills
from llava.token_compression.anchors import slots, source_indices, without
from llava.token_compression.apportion import apportion
from llava.token_compression.config import CompressionConfig
from llava.token_compression.dpc_knn import density_peaks, distances, first_of, to_centres
from llava.token_compression.joining import mean_of_joined
from llava.token_compression.registry import Kept, register

NEIGHBOURS = 7
LONGEST_WINDOW = 1024


@dataclass(frozen=True)
class HoliTomOptions:
    """Settings of HoliTom.

    Attributes:
        tau: places whose cosine to the next frame is above it do not change; None is what was published, 0.65 where no
            more than a tenth is kept and 0.8 otherwise.
        clustered_share: of a frame's moving tokens, those that are made by clustering what receives less attention.
        beta: weight of a cluster's centre beside the mean of its other members.
    """

    tau: float | None = None
    clustered_share: float = 0.0
    beta: float = 0.6

    def __post_init__(self) -> None:
        for name in ("clustered_share", "beta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie in [0, 1], got {getattr(self, name)!r}.")


@register("holitom", inputs=("vision_attn",), options=HoliTomOptions, merge=False)
def holitom(features: Tensor, config: CompressionConfig, budget: int, vision_attn: Tensor) -> Kept:
    """See the module."""
    options, (frames, tokens, _) = config.options, features.shape
    tau = (0.65 if budget <= 0.1 * frames * tokens else 0.8) if options.tau is None else options.tau
    stays = functional.cosine_similarity(features[:-1], features[1:], dim=-1) > tau
    window = windows(stays)  # (frames,)
    static = _static(stays, window)  # (frames, tokens)
    static = stills.free(static, window, vision_attn, budget)
    starts = stills.starts(window)
    represented = static[starts]  # (windows, tokens)

    sizes = torch.cat([(~static).sum(dim=1), represented.sum(dim=1)])
    shares = apportion(sizes, budget, upper=sizes)
    source = source_indices(features)
    anchor = torch.full_like(source, -1)
    _keep_moving(anchor, features, vision_attn, ~static, shares[:frames], options.clustered_share)

    means = stills.means(features, static, window)
    apart = distances(means)
    counts = shares[frames:]
    centres = first_of(density_peaks(apart, counts.clamp(1, NEIGHBOURS), represented), counts)
    centre = to_centres(apart, centres).masked_fill_(~represented | (counts == 0).unsqueeze(1), -1)
    goal = torch.where(centre >= 0, source[starts][:, :1] + centre, -1)  # (windows, tokens)
    anchor = torch.where(static, goal[window], anchor).view(-1)

    flat, means = features.flatten(0, 1), means.flatten(0, 1)
    positions, membership = slots(anchor)
    joined = without(membership, positions).masked_fill_(static.view(-1), -1)
    kept = _blend(flat[positions], *mean_of_joined(flat, joined, budget), options.beta)
    own = static.view(-1)[positions]  # the clusters of means, each of which counts once
    if own.any():
        of_mean = torch.where(goal >= 0, membership[goal], -1).view(-1)
        where = centres.view(-1).nonzero().view(-1)
        mean, count = mean_of_joined(means, without(of_mean, where), budget)
        kept[own] = _blend(means[where], mean[own], count[own], options.beta)
    return Kept(kept, positions, membership)


def windows(stays: Tensor) -> Tensor:
    """Cut a video into the windows that save most tokens if each place that stays the same in one is kept once.

    Args:
        stays: (frames - 1, tokens) bool, whether a place is the same in the next frame.

    Returns:
        (frames,) int64, the window of each frame, from 0 on. Of windows that save equally much the shortest are taken.
    """
    frames = len(stays) + 1
    run = torch.zeros(frames, stays.shape[1], dtype=torch.int64, device=stays.device)  # how long each place stays
    for frame in range(frames - 2, -1, -1):
        run[frame] = (run[frame + 1] + 1) * stays[frame]
    places = torch.zeros(frames, frames, dtype=torch.int64, device=stays.device)
    places.scatter_add_(1, run, torch.ones_like(run))
    places = places.flip(1).cumsum(1).flip(1)  # [first, steps]: the places that stay for so many steps
    saved = (places * torch.arange(frames, device=stays.device)).cpu()

    best, first = torch.zeros(frames + 1, dtype=torch.int64), list(range(frames))  # best[i]: of the first i frames
    for last in range(frames):
        steps = torch.arange(min(last + 1, LONGEST_WINDOW))
        total = best[last - steps] + saved[last - steps, steps]
        longest = int(total.argmax())
        best[last + 1], first[last] = total[longest], last - longest
    starts = torch.zeros(frames, dtype=torch.int64)
    last = frames - 1
    while last >= 0:
        starts[first[last]] = 1
        last = first[last] - 1
    return (starts.cumsum(0) - 1).to(stays.device)


def _static(stays: Tensor, window: Tensor) -> Tensor:
    """(frames, tokens) bool: the places that stay the same in the whole of a window of more than one frame."""
    count = int(window[-1]) + 1
    inside = window[:-1] == window[1:]
    changes = torch.zeros(count, stays.shape[1], dtype=torch.int64, device=stays.device)
    changes.index_add_(0, window[:-1], (~stays & inside.unsqueeze(1)).long())
    long = torch.bincount(window, minlength=count) > 1
    return ((changes == 0) & long.unsqueeze(1))[window]


def _keep_moving(
    anchor: Tensor, features: Tensor, attention: Tensor, moving: Tensor, counts: Tensor, clustered_share: float
) -> None:
    """Write the anchors of moving tokens: those with most attention, and cluster centres among the others."""
    frames, tokens = moving.shape
    start = torch.arange(frames, device=anchor.device).unsqueeze(1) * tokens
    order = attention.masked_fill(~moving, -torch.inf).argsort(dim=1, descending=True, stable=True)
    dominant = first_of(order, (counts * (1 - clustered_share)).round().long())
    if clustered_share > 0:
        rest, centres = moving & ~dominant, counts - dominant.sum(dim=1)
        apart = distances(features)
        chosen = first_of(density_peaks(apart, centres.clamp(1, NEIGHBOURS), rest), centres)
        goal = to_centres(apart, chosen)
        written = rest & (centres > 0).unsqueeze(1)
        anchor[written] = (goal + start)[written]
    own = torch.arange(tokens, device=anchor.device) + start
    anchor[dominant] = own[dominant]


def _blend(centre: Tensor, mean: Tensor, count: Tensor, beta: float) -> Tensor:
    """Each centre with the mean of those that joined it, if any did."""
    return torch.where(count > 0, beta * centre + (1 - beta) * mean, centre)
