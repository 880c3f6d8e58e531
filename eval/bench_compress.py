"""Milliseconds of the compression step alone, as a Markdown table, beside those of the matrix products in it.

    python -m eval.bench_compress [--device cuda] [--dtype bfloat16] [--repeats 5]
    python -m eval.bench_compress --frames 64 256 1024 [--device cuda] [--dtype bfloat16]

The second form times long videos of 196 x 3584 instead, once each, with the memory that is needed beside the input.

The products are those that a computation of all similarities cannot avoid: of the tokens of each frame, of the tokens
that the spatial step leaves (each pair once), and of the kept tokens with every source token that might move in the
final merge. They are timed in turn with the compression, so that both see the same machine, and compared by their
fastest runs; below 1, the compression has got away without some of them.

Features are synthetic, because the step must be timed where no checkpoint is at hand, but structured like a video: see
`synthetic_features`. Counts and times on real features differ with their structure; the sizes are those of
LLaVA-OneVision with 32 frames (0.5B: 896 dimensions, 7B: 3584).
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llava.token_compression import CompressionConfig, CompressionStats, compress

SHAPES = ((32, 196, 896), (32, 196, 3584))
THRESHOLDS = (0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97)
RETENTION_RATIOS = (0.5, 0.25, 0.1, 0.05)
LONG_VIDEO = (196, 3584)
LONG_CONFIGS = (
    CompressionConfig(similarity_threshold=0.6),
    CompressionConfig(similarity_threshold=0.9),
    CompressionConfig(retention_ratio=0.1),
)


def synthetic_features(
    frames: int, tokens_per_frame: int, dim: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Features (frames, tokens_per_frame, dim) of an imaginary video of four scenes.

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
    video = torch.empty(frames, tokens_per_frame, dim, dtype=dtype)
    for scene in torch.arange(frames).chunk(min(4, frames)):
        prototypes, centres = noise(12), torch.rand(12, 2, generator=generator)
        strength = 0.1 * 15 ** torch.rand(12, 1, generator=generator)
        drift = 0.02 * torch.randn(12, 2, generator=generator)
        places = noise(tokens_per_frame)
        for step, frame in enumerate(scene):
            region = torch.cdist(grid, centres + step * drift).argmin(dim=1)  # (tokens,)
            deviation = 0.7 * places + 0.3 * noise(12)[region] + 0.5 * noise(tokens_per_frame)
            video[frame] = common + prototypes[region] + strength[region] * deviation
    return video


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of `compress` and of the products; the counts, which do not change from run to run.

    Attributes:
        ratio: the fastest `compress` over the fastest products.
    """

    milliseconds: float
    products: float
    ratio: float
    stats: CompressionStats


def dense_products(features: Tensor, spatial: int, kept: int, moving: int) -> None:
    """The unavoidable products, of vectors of the given numbers; which vectors these are does not matter for the time.

    Args:
        features: (frames, tokens_per_frame, dim).
        spatial: tokens after the spatial step.
        kept: tokens kept.
        moving: source tokens that are not a kept token by themselves.
    """
    vectors = features.flatten(0, 1)
    for frames in features.split(32):
        frames @ frames.mT
    for start in range(0, spatial, 256):
        vectors[start : min(start + 256, spatial)] @ vectors[start:spatial].mT
    for rows in vectors[:moving].split(1024):
        rows @ vectors[:kept].mT


def _milliseconds(call: Callable[[], object], device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - start)


def time_compress(features: Tensor, config: CompressionConfig, repeats: int) -> Timing:
    """Time `compress` and its products in turn, after one warm-up call each."""
    assignment = compress(features, dataclasses.replace(config, merge=False)).assignment.view(-1)
    stats = compress(features, config).stats
    assert stats.spatial_tokens is not None
    moving = int((torch.bincount(assignment)[assignment] > 1).sum())
    counts = stats.spatial_tokens, stats.kept_tokens, moving
    dense_products(features, *counts)
    runs, products = [], []
    for _ in range(repeats):
        products.append(_milliseconds(lambda: dense_products(features, *counts), str(features.device)))
        runs.append(compress(features, config).stats.milliseconds)
    return Timing(statistics.median(runs), statistics.median(products), min(runs) / min(products), stats)


def _setting(config: CompressionConfig) -> str:
    ratio = config.retention_ratio
    return f"threshold {config.similarity_threshold}" if ratio is None else f"exactly {ratio:.0%}"


def table(shapes: tuple[tuple[int, int, int], ...], device: str, dtype: torch.dtype, repeats: int) -> str:
    """A Markdown table with one row per setting: thresholds first, then exact budgets."""
    configs = [CompressionConfig(similarity_threshold=tau) for tau in THRESHOLDS]
    configs += [CompressionConfig(retention_ratio=ratio) for ratio in RETENTION_RATIOS]
    lines = [
        "| features | setting | tokens after step 1 | tokens kept | threshold | ms | products ms | ratio |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for shape in shapes:
        features = synthetic_features(*shape, dtype=dtype).to(device)
        for config in configs:
            timing = time_compress(features, config, repeats)
            stats = timing.stats
            lines.append(
                f"| {'x'.join(map(str, shape))} | {_setting(config)} | {stats.spatial_tokens} "
                f"| {stats.kept_tokens} ({stats.retention_ratio:.1%}) | {stats.similarity_threshold:.3f} "
                f"| {timing.milliseconds:.1f} | {timing.products:.1f} | {timing.ratio:.2f} |"
            )
    return "\n".join(lines)


def memory_of_compress(features: Tensor, config: CompressionConfig) -> tuple[CompressionStats, float]:
    """Counts and time, and most MiB beyond those before: resident in the process, or allocated by PyTorch on CUDA."""
    if features.is_cuda:
        torch.cuda.reset_peak_memory_stats(features.device)
        before = torch.cuda.memory_allocated(features.device)
        stats = compress(features, config).stats
        return stats, (torch.cuda.max_memory_allocated(features.device) - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    resident = _resident_mebibytes("VmRSS")
    stats = compress(features, config).stats
    return stats, _resident_mebibytes("VmHWM") - resident


def _resident_mebibytes(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def long_table(frames: list[int], device: str, dtype: torch.dtype) -> str:
    """A Markdown table of time per frame and memory of videos of `LONG_VIDEO`; on the CPU, Linux only."""
    lines = [
        "| frames | setting | tokens after step 1 | tokens kept | ms | ms per frame | MiB beside the input |",
        "|--:|---|--:|--:|--:|--:|--:|",
    ]
    for count in frames:
        features = synthetic_features(count, *LONG_VIDEO, dtype=dtype).to(device)
        for config in LONG_CONFIGS:
            compress(features[:8], config)
            stats, extra = memory_of_compress(features, config)
            lines.append(
                f"| {count} | {_setting(config)} | {stats.spatial_tokens} | {stats.kept_tokens} "
                f"| {stats.milliseconds:.1f} | {stats.milliseconds / count:.2f} | {extra:.0f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the compression step on synthetic features.")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ... (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--repeats", type=int, default=5, help="timed calls per row (default: %(default)s)")
    parser.add_argument("--frames", type=int, nargs="+", help="time long videos of so many frames instead")
    arguments = parser.parse_args()
    print(f"{torch.get_num_threads()} CPU threads, {arguments.device}, {arguments.dtype}, torch {torch.__version__}\n")
    dtype = getattr(torch, arguments.dtype)
    if arguments.frames:
        print(long_table(arguments.frames, arguments.device, dtype))
    else:
        print(table(SHAPES, arguments.device, dtype, arguments.repeats))


if __name__ == "__main__":
    main()
