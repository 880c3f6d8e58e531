"""Compressed video in vLLM, as one of its out-of-tree plugins: Qwen2.5-VL.

vLLM finds `register` through the entry point group `vllm.general_plugins` once this package is installed beside it:

    vllm serve Qwen/Qwen2.5-VL-7B-Instruct --video-pruning-rate 0.9 --hf-overrides '{
        "architectures": ["LlavaScissorQwen2_5_VL"], "llava_scissor": {"method": "scissor"}}'

`llava_scissor` holds fields of `CompressionConfig`. Where it has none that gives a size, the retention ratio is what
`--video-pruning-rate` leaves; that option must be above 0 in any case, as it makes vLLM ask the model for positions.
Prompts are scheduled with exactly as many placeholders as tokens are kept. Without the architecture's name in
`--hf-overrides` nothing changes.

What is relied on, in vLLM 0.33: `ModelRegistry.register_model`; `MULTIMODAL_REGISTRY.register_processor` and
`_get_prompt_updates` of its multimodal processors; `embed_multimodal` of models with `SupportsMultiModalPruning`, whose
embeddings of Qwen2.5-VL carry four columns of positions; and that its own pruning at rate 0 keeps every token.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llava.errors import ConfigError
from llava.serving import compress_video
from llava.token_compression import CompressionConfig
from llava.token_compression.registry import get_method

ARCHITECTURE = "LlavaScissorQwen2_5_VL"
POSITIONS = 4
"""Columns after the features of vLLM's Qwen2.5-VL: frame, row, column, and how far the text after the video is."""


def register() -> None:
    """Tell vLLM of the architecture; it may be called several times, in every process, and imports no model."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(ARCHITECTURE, f"llava.vllm.qwen2_5_vl:{ARCHITECTURE}")


def compression_of(hf_config: Any, pruning_rate: float | None) -> CompressionConfig:
    """What a model's `llava_scissor` and vLLM's `--video-pruning-rate` ask for.

    Raises:
        ConfigError: pruning that is not on, an unknown field, or a size that is not known before the video is seen.
    """
    if not pruning_rate:
        raise ConfigError("vLLM prunes only with --video-pruning-rate above 0, for example 0.9 to keep a tenth.")
    given: Mapping[str, Any] = getattr(hf_config, "llava_scissor", None) or {}
    sizes = ("retention_ratio", "retained_tokens", "similarity_threshold")
    size = {} if any(name in given for name in sizes) else {"retention_ratio": round(1 - pruning_rate, 9)}
    config = CompressionConfig.from_dict({**given, **size}, "hf_overrides (llava_scissor)")
    needed = get_method(config.method).needed(config.options)
    if needed:
        raise ConfigError(
            f"hf_overrides (llava_scissor): method {config.method!r} needs {', '.join(needed)}, which vLLM does not "
            "give; choose one that needs no inputs."
        )
    if config.similarity_threshold is not None:
        raise ConfigError(
            "hf_overrides (llava_scissor): with a similarity_threshold the number of tokens depends on the video, and "
            "vLLM must know it before; give retention_ratio or retained_tokens."
        )
    return config


def tokens_of(grid: Sequence[int], merge: int, config: CompressionConfig) -> int:
    """Placeholders of a video of so many parts, rows and columns of patches, `merge` squared of them a token."""
    parts, rows, columns = grid
    return config.budget(parts * rows * columns // merge**2) or 0


def shortened(embeds: Tensor, grid: Sequence[int], config: CompressionConfig) -> Tensor:
    """Compress a video.

    Args:
        embeds: (tokens, dim + 4), every token's features and positions from the video's first token on.
        grid: its parts, and rows and columns of patches.
        config: what to do; `position_ids="contiguous"` numbers the kept tokens one after the other, otherwise each
            keeps its representative's position, and the text that follows the one it would have had.

    Returns:
        (kept, dim + 4), of the dtype of `embeds`.
    """
    features, positions = embeds[:, :-POSITIONS], embeds[:, -POSITIONS:].clone()
    found = compress_video(features.view(grid[0], -1, features.shape[1]), config)
    positions[:, 3] = positions[:, :3].max() + 1
    positions = positions[found.source]
    if config.position_ids == "contiguous":
        count = len(positions)
        positions[:, :3] = torch.arange(count, device=positions.device, dtype=positions.dtype)[:, None]
        positions[:, 3] = count
    return torch.cat([found.embeds, positions], dim=1)


def shortened_items(
    items: Sequence[Tensor], arguments: Mapping[str, Any], config: CompressionConfig
) -> tuple[Tensor, ...]:
    """Compress the videos among what `embed_multimodal` returned for its keyword arguments; images stay."""
    grids: list[list[int] | None] = []
    for name in arguments:
        if name in ("pixel_values", "image_embeds"):
            grids += [None] * len(arguments["image_grid_thw"])
        elif name in ("pixel_values_videos", "video_embeds"):
            grids += torch.as_tensor(arguments["video_grid_thw"]).tolist()
    return tuple(
        item if grid is None else shortened(item, grid, config) for item, grid in zip(items, grids, strict=True)
    )
