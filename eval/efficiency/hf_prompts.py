"""Prompts and pixels for the models of transformers, from a clip alone: their own processors need a checkpoint's files.

Sizes are those that the processors make: one square for models with a fixed size, whole tokens for those without.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from llava.serving import VideoTokens, video_tokens
from llava.token_compression import CompressionConfig

BEFORE_FRAME = {"qwen3_vl": 7, "qwen3_vl_moe": 7, "internvl": 6, "video_llama_3": 8, "smolvlm": 12}
"""Tokens before each frame of families that label them: its time or number, and what starts an image."""

LABELLED_IMAGES = ("internvl", "smolvlm")
"""Families to which a frame is an image."""


def frame_size(config: Any, height: int, width: int) -> tuple[int, int]:
    """Pixels of a frame for the model, of a clip of that size."""
    vision = config.vision_config
    patch = vision.patch_size
    if config.model_type.startswith("qwen"):
        side = patch * vision.spatial_merge_size
    elif config.model_type == "video_llama_3":
        side = patch * 2
    else:
        size = vision.image_size
        return (size, size) if isinstance(size, int) else tuple(size)
    return max(1, round(height / side)) * side, max(1, round(width / side)) * side


def layout(config: Any, frames: int, height: int, width: int) -> VideoTokens:
    """Tokens of a clip's video without compression."""
    return video_tokens(config, CompressionConfig(method="none"), frames, *frame_size(config, height, width))


def placeholder_of(config: Any) -> int:
    """The id of a video's placeholders."""
    return config.image_token_id if config.model_type in LABELLED_IMAGES else config.video_token_id


def prompt_ids(config: Any, video: VideoTokens, words: int, seed: int) -> Tensor:
    """(1, length) int64: `words` random text tokens with a video in their middle, labelled as its family does."""
    placeholder, qwen = placeholder_of(config), config.model_type.startswith("qwen")
    ordinary = min(placeholder, config.image_token_id)
    count = BEFORE_FRAME.get(config.model_type, 0)
    drawn = torch.randint(2, ordinary, (words + count,), generator=torch.Generator().manual_seed(seed)).tolist()
    text, label = drawn[:words], drawn[words:]
    start, end = ([config.vision_start_token_id], [config.vision_end_token_id]) if qwen else ([], [])
    if label:
        start, end = start or label[-1:], end or label[-1:]
        segment: list[int] = []
        for frame in range(video.frames):
            number = 2 + frame % (ordinary - 2)
            segment += [*label[:-2], number, *start, *[placeholder] * video.tokens_per_frame, *end]
    else:
        segment = [*start, *[placeholder] * video.source, *end]
    return torch.tensor([[*text[: words // 2], *segment, *text[words // 2 :]]])


def pixel_arguments(config: Any, frames: Tensor, rows: int) -> dict[str, Tensor]:
    """What `generate` gets of a video beside its prompt, in main memory.

    Args:
        frames: (frames, height, width, 3) uint8.
        rows: the batch, in which every prompt has this video.
    """
    size = frame_size(config, *frames.shape[1:3])
    pixels = interpolate(frames.permute(0, 3, 1, 2).float(), size, mode="bilinear", antialias=True) / 127.5 - 1
    vision, kind = config.vision_config, config.model_type
    if kind in LABELLED_IMAGES:
        return {"pixel_values": pixels.repeat(rows, 1, 1, 1) if kind == "internvl" else _repeated(pixels, rows)}
    if kind.startswith("llava"):
        return {"pixel_values_videos": _repeated(pixels, rows)}
    parts, merge = (1, 2) if kind == "video_llama_3" else (vision.temporal_patch_size, vision.spatial_merge_size)
    patches, grid = _patches(pixels, parts, vision.patch_size, merge)
    arguments = {"pixel_values_videos": patches.repeat(rows, 1), "video_grid_thw": torch.tensor([grid] * rows)}
    if kind == "video_llama_3":
        arguments["video_merge_sizes"] = torch.tensor([merge] * rows)
    return arguments


def token_types(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Kinds of tokens for the families whose positions need them, from transformers 5.3 on."""
    known = "mm_token_type_ids" in inspect.signature(model.base_model.forward).parameters
    if not (known and model.config.model_type.startswith("qwen")):
        return {}
    return {"mm_token_type_ids": 2 * (ids == placeholder_of(model.config)).long()}


def _repeated(pixels: Tensor, rows: int) -> Tensor:
    return pixels.expand(rows, *pixels.shape).contiguous()


def _patches(pixels: Tensor, parts: int, patch: int, merge: int) -> tuple[Tensor, list[int]]:
    """(frames, 3, height, width) -> patches of `parts` frames, those of a token one after the other, and their grid."""
    if missing := -len(pixels) % parts:
        pixels = torch.cat([pixels, pixels[-1:].expand(missing, -1, -1, -1)])
    groups = len(pixels) // parts
    rows, columns = pixels.shape[2] // patch, pixels.shape[3] // patch
    split = pixels.view(groups, parts, 3, rows // merge, merge, patch, columns // merge, merge, patch)
    return split.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(groups * rows * columns, -1), [groups, rows, columns]
