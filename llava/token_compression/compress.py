"""The one entry point of all methods: check the input, run the method, merge, record."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llava.errors import ConfigError, UserError
from llava.instrument import active, stage
from llava.token_compression.config import CompressionConfig
from llava.token_compression.cosine import Stored
from llava.token_compression.inner import refuse_inner
from llava.token_compression.inputs import checked
from llava.token_compression.merge import merge
from llava.token_compression.paths import has_kernels
from llava.token_compression.registry import Kept, get_method
from llava.token_compression.selection import select
from llava.yaml_schema import did_you_mean


@dataclass(frozen=True)
class CompressionStats:
    """Figures of one call of `compress`.

    Attributes:
        source_tokens: frames * tokens_per_frame.
        spatial_tokens: tokens left by the step within frames, None for methods without one.
        kept_tokens: tokens returned.
        retention_ratio: kept_tokens / source_tokens.
        similarity_threshold: the threshold applied; under an exact budget that of the last cut, None for methods
            without one.
        milliseconds: wall-clock time of the call; on CUDA that from when the device gets to it until it is done.
        layer: the language model's first layer that sees fewer tokens than `kept_tokens`; None if all see as many.
        final_tokens: tokens that its last layer sees of a prompt.
        average_tokens: tokens that a layer of the language model sees of a prompt, on average over the layers.
    """

    source_tokens: int
    spatial_tokens: int | None
    kept_tokens: int
    retention_ratio: float
    similarity_threshold: float | None
    milliseconds: float
    layer: int | None
    final_tokens: int
    average_tokens: float


@dataclass(frozen=True)
class CompressionResult:
    """What `compress` returns.

    Attributes:
        tokens: (kept, dim), dtype and device of the features.
        positions: (kept,) int64, strictly increasing: the flat source index `frame * tokens_per_frame + token` of
            each kept token's representative.
        assignment: (frames, tokens_per_frame) int64, the kept token each source token went into, -1 if dropped.
        stats: counts and milliseconds.
        groups: as in `Kept`.
    """

    tokens: Tensor
    positions: Tensor
    assignment: Tensor
    stats: CompressionStats
    groups: Tensor | None = None


@torch.no_grad()
def compress(features: Tensor, config: CompressionConfig, **inputs: object) -> CompressionResult:
    """Compress the tokens of one video (or of the crops of one image).

    All arithmetic is in float32 (float64 for float64 features), whatever the dtype of the features and outside of
    any autocast; the same input gives the same bits on every run.

    Args:
        features: (frames, tokens_per_frame, dim), floating, finite, on any device.
        config: method and size.
        inputs: what the method declares that it needs.

    Raises:
        UserError: features or inputs of another shape or kind, or with NaN or infinity in them.
        ConfigError: a size that these features cannot have; an input that is missing or that the method does not know;
            a method that prunes inside the language model.
    """
    check_shape(features)
    refuse_inner(config)
    inputs = _checked_inputs(features, config, inputs)
    start = _now(features.device)
    with (
        stage("compression", features.device),
        torch.autocast(features.device.type, enabled=False),
        torch.cuda.device_of(features),  # Triton launches on the current device
    ):
        frames, tokens_per_frame, _ = features.shape
        kept, assignment = _keep(features, config, inputs)
        tokens = kept.tokens.to(features.dtype)
        milliseconds = _milliseconds_since(start, features.device)
    stats = CompressionStats(
        source_tokens=frames * tokens_per_frame,
        spatial_tokens=kept.spatial_tokens,
        kept_tokens=len(tokens),
        retention_ratio=len(tokens) / (frames * tokens_per_frame),
        similarity_threshold=kept.similarity_threshold,
        milliseconds=milliseconds,
        layer=None,
        final_tokens=len(tokens),
        average_tokens=float(len(tokens)),
    )
    recorder = active()
    if recorder is not None:
        recorder.compressions.append(stats)
    return CompressionResult(tokens, kept.positions, assignment.view(frames, tokens_per_frame), stats, kept.groups)


def compress_batch(
    videos: Sequence[Tensor], config: CompressionConfig, **inputs: Sequence[object]
) -> list[CompressionResult]:
    """Compress several videos, of any lengths, each as `compress` does alone, bit for bit.

    Args:
        videos: (frames, tokens_per_frame, dim) each.
        config: method and size of every one.
        inputs: what the method declares that it needs, one for each video.

    Raises:
        UserError, ConfigError: as `compress` does; not as many inputs as videos.
    """
    for name, values in inputs.items():
        if len(values) != len(videos):
            raise ConfigError(f"Input {name!r} has {len(values)} entries for {len(videos)} videos; give one for each.")
    return [
        compress(video, config, **{name: values[index] for name, values in inputs.items()})
        for index, video in enumerate(videos)
    ]


def _keep(features: Tensor, config: CompressionConfig, inputs: dict[str, object]) -> tuple[Kept, Tensor]:
    if features.is_cuda and has_kernels():
        from llava.token_compression.gpu import fused

        result = fused.compressed(features, config) if fused.fits(features, config) else None
        if result is not None:
            return result
    tokens = Stored(features.flatten(0, 1))
    _check_finite(features, tokens)
    budget = config.budget(tokens.count)
    if budget == tokens.count:
        everything = select(features, torch.arange(tokens.count, device=features.device))
        return everything, everything.membership
    method, precise = get_method(config.method), torch.promote_types(features.dtype, torch.float32)
    if method.takes_tokens:
        inputs = {**inputs, "tokens": tokens}
    kept = method.keep(features if method.any_dtype else features.to(precise).contiguous(), config, budget, **inputs)
    if not config.merge:
        return kept, kept.membership
    merged, assignment = merge(tokens, kept.tokens.to(precise), kept.membership, kept.single_is_own)
    return replace(kept, tokens=merged), assignment


def check_shape(features: Tensor) -> None:
    """Refuse features that are not (frames, tokens_per_frame, dim), floating, with a UserError."""
    if not isinstance(features, Tensor) or not features.is_floating_point():
        kind = features.dtype if isinstance(features, Tensor) else type(features).__name__
        raise UserError(f"Features must be a floating-point tensor, got {kind}.")
    if features.dim() != 3 or features.numel() == 0:
        raise UserError(
            "Features must have the shape (frames, tokens_per_frame, dim), none of them 0; "
            f"got {tuple(features.shape)}."
        )


def _check_finite(features: Tensor, tokens: Stored) -> None:
    if tokens.lengths.isfinite().all():
        return
    for frame, vectors in enumerate(features):
        if not vectors.isfinite().all():
            raise UserError(
                f"The features of frame {frame} contain NaN or infinity; check the model's dtype and weights."
            )


def _checked_inputs(features: Tensor, config: CompressionConfig, inputs: dict[str, object]) -> dict[str, object]:
    needed = get_method(config.method).needed(config.options)
    for name in needed:
        if inputs.get(name) is None:
            raise ConfigError(
                f"Method {config.method!r} needs the input {name!r}: compress(features, config, {name}=...)."
            )
    for name in inputs:
        if name not in needed:
            raise ConfigError(f"Method {config.method!r} takes no input {name!r}{did_you_mean(name, needed)}.")
    return {name: checked(name, value, features) for name, value in inputs.items()}


def _now(device: torch.device) -> Any:
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event
    return time.perf_counter()


def _milliseconds_since(start: Any, device: torch.device) -> float:
    """Wall-clock time; on CUDA that between two points of the stream, of which the second one is waited for."""
    now = _now(device)
    if device.type == "cuda":
        now.synchronize()
        return start.elapsed_time(now)
    return 1000 * (now - start)
