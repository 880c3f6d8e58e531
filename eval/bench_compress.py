"""Milliseconds of the compression step alone, as a Markdown table.

    python -m eval.bench_compress [--device cuda] [--dtype bfloat16] [--repeats 5]

Features are synthetic, because the step must be timed where no checkpoint is at hand, but structured like a video: see
`synthetic_features`. Counts and times on real features differ with their structure; the sizes are those of
LLaVA-OneVision with 32 frames (0.5B: 896 dimensions, 7B: 3584).
"""

import argparse
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.token_compression import CompressionConfig, CompressionStats, compress

SHAPES = ((32, 196, 896), (32, 196, 3584))
THRESHOLDS = (0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97)
RETENTION_RATIOS = (0.5, 0.25, 0.1, 0.05)


def synthetic_features(frames: int, tokens_per_frame: int, dim: int, seed: int = 0) -> Tensor:
    """Features (frames, tokens_per_frame, dim) float32 of an imaginary video of four scenes.

    Each scene has twelve regions that drift over a square grid. A token is a direction common to all tokens, plus its
    region's prototype, plus three deviations of the region's own strength (0.1 to 1.5 of the prototype's length, so
    that some regions are flat and some are busy): one attached to the region's place, one to the frame, one to the
    single token. Most tokens of a region are alike within a frame, more alike at the same place of the next frame,
    and not at all across a cut.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, dim, generator=generator) / dim**0.5

    side = round(tokens_per_frame**0.5)
    if side**2 != tokens_per_frame:
        raise ValueError(f"tokens_per_frame must be a square number, got {tokens_per_frame}.")
    grid = torch.cartesian_prod(torch.arange(side), torch.arange(side)) / side  # (tokens, 2)
    common = 0.7 * noise(1)
    video = []
    for scene in torch.arange(frames).chunk(min(4, frames)):
        prototypes, centres = noise(12), torch.rand(12, 2, generator=generator)
        strength = 0.1 * 15 ** torch.rand(12, 1, generator=generator)
        drift = 0.02 * torch.randn(12, 2, generator=generator)
        places = noise(tokens_per_frame)
        for time in range(len(scene)):
            region = torch.cdist(grid, centres + time * drift).argmin(dim=1)  # (tokens,)
            deviation = 0.7 * places + 0.3 * noise(12)[region] + 0.5 * noise(tokens_per_frame)
            video.append(common + prototypes[region] + strength[region] * deviation)
    return torch.stack(video)


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of `compress`, and the counts, which do not change from run to run."""

    milliseconds: float
    stats: CompressionStats


def time_compress(features: Tensor, config: CompressionConfig, repeats: int) -> Timing:
    """Time `compress` after one warm-up call."""
    compress(features, config)
    runs = [compress(features, config).stats for _ in range(repeats)]
    return Timing(statistics.median(run.milliseconds for run in runs), runs[0])


def table(shapes: tuple[tuple[int, int, int], ...], device: str, dtype: torch.dtype, repeats: int) -> str:
    """A Markdown table with one row per setting: thresholds first, then exact budgets."""
    configs = [CompressionConfig(similarity_threshold=tau) for tau in THRESHOLDS]
    configs += [CompressionConfig(retention_ratio=ratio) for ratio in RETENTION_RATIOS]
    lines = ["| features | setting | tokens after step 1 | tokens kept | threshold | ms |", "|---|---|--:|--:|--:|--:|"]
    for shape in shapes:
        features = synthetic_features(*shape).to(device, dtype)
        for config in configs:
            timing = time_compress(features, config, repeats)
            stats, ratio = timing.stats, config.retention_ratio
            setting = f"threshold {config.similarity_threshold}" if ratio is None else f"exactly {ratio:.0%}"
            lines.append(
                f"| {'x'.join(map(str, shape))} | {setting} | {stats.spatial_tokens} "
                f"| {stats.kept_tokens} ({stats.retention_ratio:.1%}) | {stats.similarity_threshold:.3f} "
                f"| {timing.milliseconds:.0f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the compression step on synthetic features.")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ... (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--repeats", type=int, default=5, help="timed calls per row (default: %(default)s)")
    arguments = parser.parse_args()
    print(f"{torch.get_num_threads()} CPU threads, {arguments.device}, {arguments.dtype}, torch {torch.__version__}\n")
    print(table(SHAPES, arguments.device, getattr(torch, arguments.dtype), arguments.repeats))


if __name__ == "__main__":
    main()
