"""The command `llava-scissor calibrate`: which threshold keeps a given share of the tokens, on average over videos?

This is how the paper works: one threshold for a benchmark, tuned until the mean retention is what the table says, while
each video keeps as many tokens as it happens to have components. `compression.retention_ratio` gives every video its
exact share instead and needs no calibration.

Each video goes through the vision tower once. Thresholds are then tried on its features, by bisection: the mean count
is not strictly monotone in the threshold (the representatives of the first step move with it), so the nearest of all
that were tried is taken.
"""

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llava.errors import ConfigError
from llava.token_compression import CompressionConfig, compress

if TYPE_CHECKING:
    from llava.pipeline import VideoQA

STEPS = 20
"""Bisections of [-1, 1]; the last one is 2e-6 wide."""


@dataclass(frozen=True)
class Calibration:
    """What a threshold does to the videos that it was found on.

    Attributes:
        threshold: tau. wanted: the mean retention asked for.
        ratios: what each video keeps at it. tokens: how many it has.
    """

    threshold: float
    wanted: float
    ratios: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.ratios)

    @property
    def deviation(self) -> float:
        """Standard deviation over the videos."""
        return statistics.pstdev(self.ratios)


def calibrate(features: Sequence[Tensor], config: CompressionConfig, ratio: float) -> Calibration:
    """The threshold at which videos keep this share of their tokens on average.

    Args:
        features: (frames, tokens_per_frame, dim) of each video.
        config: the method and its settings; its size is not used.
        ratio: above 0 and at most 1.

    Raises:
        ConfigError: a method without a threshold, or a share that no threshold reaches.
    """
    if not features:
        raise ConfigError("Calibration needs at least one video.")
    if not 0 < ratio <= 1:
        raise ConfigError(f"The retention ratio must be above 0 and at most 1 (0.1 keeps 10 %), got {ratio!r}.")
    tried: dict[float, Calibration] = {}

    def at(threshold: float) -> Calibration:
        setting = dataclasses.replace(
            config, similarity_threshold=threshold, retention_ratio=None, retained_tokens=None, merge=False
        )
        stats = [compress(video, setting).stats for video in features]
        tried[threshold] = Calibration(
            threshold, ratio, tuple(s.retention_ratio for s in stats), tuple(s.source_tokens for s in stats)
        )
        return tried[threshold]

    low, high = -1.0, 1.0
    least, most = at(low).mean, at(high).mean
    if not least <= ratio <= most:
        raise ConfigError(
            f"No threshold keeps {100 * ratio:g} % of these videos on average: it is {100 * least:.3g} % at -1, where "
            f"all that are not zero are one component{'' if config.temporal else ' of each frame'}, and "
            f"{100 * most:.3g} % at 1."
        )
    for _ in range(STEPS):
        middle = (low + high) / 2
        if at(middle).mean > ratio:
            high = middle
        else:
            low = middle
    return min(tried.values(), key=lambda found: abs(found.mean - ratio))


@torch.inference_mode()
def video_features(qa: "VideoQA", path: str) -> Tensor:
    """What is compressed of a video: (frames, tokens_per_frame, dim), after projector and pooling.

    Raises:
        VideoError: the file cannot be read.
        ConfigError: it is an image.
    """
    item = qa.prepare("", path).items[0]
    if item.modality != "video":
        raise ConfigError(f"{path} is an image; calibrate on videos.")
    return qa.model.encode_frames(item.pixels)


def report(found: Calibration, paths: Sequence[str], as_json: bool = False) -> str:
    """The threshold, the spread over the videos, and each video's share; or all of it as JSON."""
    if as_json:
        facts = dataclasses.asdict(found) | {"mean": found.mean, "deviation": found.deviation, "videos": list(paths)}
        return json.dumps(facts, indent=2)
    rows = [
        ("threshold", f"{found.threshold:.6f}"),
        ("wanted", f"{100 * found.wanted:.2f} %"),
        ("mean", f"{100 * found.mean:.2f} %"),
        ("standard deviation", f"{100 * found.deviation:.2f} %"),
        ("minimum", f"{100 * min(found.ratios):.2f} %"),
        ("maximum", f"{100 * max(found.ratios):.2f} %"),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    lines.append("")
    for path, ratio, tokens in zip(paths, found.ratios, found.tokens, strict=True):
        lines.append(f"{100 * ratio:6.2f} %  {round(ratio * tokens)} of {tokens} tokens  {path}")
    return "\n".join(lines)
