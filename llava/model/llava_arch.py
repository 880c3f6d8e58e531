"""What LLaVA adds to a language model: frames -> vision tower -> projector -> 2x2 pooling -> compression -> prompt."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import ConfigError, UserError
from llava.instrument import stage
from llava.model.multimodal_encoder.siglip_encoder import SigLipVisionTower
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.newlines import VisualTokens, insert_newlines, newline_period
from llava.model.pooling import pool_2x2
from llava.model.splice import PaddedBatch, items_per_row, pad_rows, splice_row
from llava.token_compression import CompressionConfig, compress

logger = logging.getLogger(__name__)

PATCHES_PER_CHUNK = 16384
"""Frames go through tower, projector and pooling in chunks of about this many patches (22 frames of 729), so that
the memory of the unpooled features does not grow with the length of the video."""

Images = torch.Tensor | Sequence[torch.Tensor]
"""One (frames, 3, side, side) tensor per video, or a 5-D tensor of videos of equal length."""


def checkpoint_compression(config: Any) -> CompressionConfig | None:
    """The compression that a checkpoint's config.json asks for: the `mm_use_zip` keys of LLaVA-Scissor's baselines."""
    if not getattr(config, "mm_use_zip", False):
        return None
    return CompressionConfig(
        similarity_threshold=getattr(config, "mm_zip_tau", 0.95),
        error_tolerance=getattr(config, "mm_zip_epsilon", 0.05),
        images=True,
    )


class LlavaMetaModel:
    """Mixin for the decoder: owns the vision tower, the projector and the newline embedding."""

    config: Any

    def build_multimodal(self) -> None:
        """Create the modules that the config asks for; a config without `mm_vision_tower` is a text-only model."""
        config = self.config
        if getattr(config, "mm_vision_tower", None) is None:
            return
        self.vision_tower = SigLipVisionTower(config, attn_implementation=config._attn_implementation)
        if config.mm_hidden_size != self.vision_tower.hidden_size:
            raise ConfigError(
                f"mm_hidden_size is {config.mm_hidden_size!r} but the vision tower's features have "
                f"{self.vision_tower.hidden_size} dimensions."
            )
        self.mm_projector = build_vision_projector(config)
        if "unpad" in getattr(config, "mm_patch_merge_type", "flat") and not getattr(config, "mm_use_zip", False):
            self.image_newline = nn.Parameter(torch.empty(config.hidden_size).normal_(std=config.hidden_size**-0.5))

    def get_vision_tower(self) -> SigLipVisionTower | None:
        """The vision tower, or None for a text-only model."""
        return getattr(self, "vision_tower", None)


class LlavaMetaForCausalLM:
    """Mixin for the language model with its head: turns prompts with images or videos into embeddings.

    Attributes:
        token_compression: compression of this model instance; None follows the checkpoint's config.json.
    """

    config: Any
    model: Any
    device: torch.device
    token_compression: CompressionConfig | None = None

    def get_model(self) -> Any:
        """The decoder, which owns the multimodal modules."""
        return self.model

    def get_vision_tower(self) -> SigLipVisionTower | None:
        """The vision tower, or None for a text-only model."""
        return self.model.get_vision_tower()

    def encode_frames(self, frames: torch.Tensor) -> torch.Tensor:
        """Vision tower, projector and 2x2 pooling, in chunks.

        Args:
            frames: (frames, 3, side, side) pixels, any device and float dtype.

        Returns:
            (frames, pooled tokens, hidden_size) on the model's device and in its dtype.
        """
        tower, projector = self.model.vision_tower, self.model.mm_projector
        weight = next(projector.parameters())
        pooled = []
        for chunk in frames.split(max(1, PATCHES_PER_CHUNK // tower.num_patches)):
            with stage("vision_tower", tower.device):
                features = tower(chunk.to(tower.device))
            with stage("projector", weight.device):
                projected = projector(features.to(weight))  # (chunk, patches, hidden)
                pooled.append(pool_2x2(projected, self.config.mm_spatial_pool_mode))
        return torch.cat(pooled)

    def encode_images(self, images: Sequence[torch.Tensor]) -> list[VisualTokens]:
        """Everything between pixels and prompt; the one place where tokens are compressed.

        Args:
            images: one (frames, 3, side, side) tensor per video.

        Returns:
            For each video its kept tokens with newlines.
        """
        if not images:
            return []
        for item in images:
            self.model.vision_tower.check_pixels(item)
        config = self.token_compression or checkpoint_compression(self.config)
        features = self.encode_frames(torch.cat(list(images)) if len(images) > 1 else images[0])
        return [self._visual_tokens(video, config) for video in features.split([len(item) for item in images])]

    def _visual_tokens(self, features: torch.Tensor, compression: CompressionConfig | None) -> VisualTokens:
        frames, per_frame, dim = features.shape
        period = newline_period(self.config, frames, per_frame)
        newline = getattr(self.model, "image_newline", None)
        if period is not None and newline is None:
            raise ConfigError(
                "The config asks for newline tokens, but the checkpoint has no image_newline; "
                'set mm_newline_position to "no_token".'
            )
        if compression is None:
            tokens, positions = features.reshape(-1, dim), torch.arange(frames * per_frame, device=features.device)
        else:
            result = compress(features, compression)
            tokens, positions = result.tokens, result.positions
        return insert_newlines(tokens, positions, frames * per_frame, newline, period)

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        past_key_values: Any,
        labels: torch.Tensor | None,
        images: Images | None,
        modalities: str | Sequence[str] = "image",
        image_sizes: Sequence[Sequence[int]] | None = None,
    ) -> tuple[Any, torch.Tensor | None, torch.Tensor | None, Any, torch.Tensor | None, torch.Tensor | None]:
        """Replace every placeholder of a batch of prompts by the tokens of its video.

        Args:
            input_ids: (rows, length) int64 with IMAGE_TOKEN_INDEX where a video goes.
            position_ids, attention_mask, labels: (rows, length) or None. What is None comes back as None, except
                position_ids under `CompressionConfig(position_ids="source")`. Masked positions are removed first.
            past_key_values: returned as it is.
            images: see `Images`. None, or a single text token per row, returns everything unchanged.
            modalities: "video" for each item, or one string for all of them.
            image_sizes: (width, height) of each item; videos do not need it.

        Returns:
            input_ids (None once embedded), position_ids, attention_mask, past_key_values, inputs_embeds (rows,
            spliced length, hidden_size) and labels, padded with zero vectors on the side `tokenizer_padding_side`.

        Raises:
            UserError: the number of items, of modalities or the shape of an item does not fit the prompts.
        """
        if images is None and past_key_values is not None:  # a decoding step: new text only
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        has_placeholder = bool((input_ids == IMAGE_TOKEN_INDEX).any())
        if not has_placeholder and (images is None or input_ids.shape[1] == 1):
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        side = getattr(self.config, "tokenizer_padding_side", "right")
        batch = self.splice(input_ids, attention_mask, labels, images, modalities, side)
        mask = None if attention_mask is None else batch.attention_mask.to(attention_mask.dtype)
        positions = None if position_ids is None and not self._source_positions() else batch.position_ids
        return None, positions, mask, past_key_values, batch.embeds, None if labels is None else batch.labels

    def splice(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor | None,
        images: Images | None,
        modalities: str | Sequence[str],
        padding_side: str,
    ) -> PaddedBatch:
        """Encode the items, insert them into their rows and pad; see `prepare_inputs_labels_for_multimodal`."""
        kept = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        targets = torch.full_like(input_ids, IGNORE_INDEX) if labels is None else labels
        ids = [row[mask] for row, mask in zip(input_ids, kept, strict=True)]
        targets_per_row = [row[mask] for row, mask in zip(targets, kept, strict=True)]

        items = _as_items(images)
        assignment = items_per_row(ids, len(items))
        used = [index for row in assignment for index in row]
        _check_modalities(modalities, len(items), used)
        if used and self.get_vision_tower() is None:
            raise UserError("This checkpoint has no vision tower (mm_vision_tower), so it takes text only.")
        encoded = dict(zip(used, self.encode_images([items[index] for index in used]), strict=True))

        limit = getattr(self.config, "tokenizer_model_max_length", None)
        rows = []
        for row_ids, row_labels, indices in zip(ids, targets_per_row, assignment, strict=True):
            row_items = [encoded[index] for index in indices]
            row = splice_row(row_ids, row_labels, row_items, self.model.embed_tokens, self._source_positions())
            if limit is not None and len(row.embeds) > limit:
                logger.warning(
                    "A prompt of %d positions is cut to tokenizer_model_max_length = %d.", len(row.embeds), limit
                )
                row = row.truncated(limit)
            rows.append(row)
        return pad_rows(rows, padding_side)

    def _source_positions(self) -> bool:
        config = self.token_compression or checkpoint_compression(self.config)
        return config is not None and config.position_ids == "source"


def _as_items(images: Images | None) -> list[torch.Tensor]:
    """One (frames, 3, height, width) tensor per item; none for None. A (3, height, width) item is a single frame.

    Raises:
        UserError: a 4-D tensor, which could be one video or a batch of images.
    """
    if images is None:
        return []
    if isinstance(images, torch.Tensor) and images.ndim != 5:
        raise UserError(
            f"images is a tensor of shape {tuple(images.shape)}; "
            "pass a list with one (frames, 3, height, width) tensor per video."
        )
    return [item.unsqueeze(0) if item.ndim == 3 else item for item in images]


def _check_modalities(modalities: str | Sequence[str], items: int, used: Sequence[int]) -> None:
    """Every used item must be a video. A single string stands for all items.

    Raises:
        UserError: fewer or more modalities than items, or an item that is not a video.
    """
    per_item = [modalities] * items if isinstance(modalities, str) else list(modalities)
    if items == 0:
        return
    if len(per_item) != items:
        raise UserError(
            f"{len(per_item)} modalities were given for {items} images or videos; give one per item, "
            'as in modalities=["video", "video"].'
        )
    for index in used:
        if per_item[index] != "video":
            raise UserError(
                f"images[{index}] has modality {per_item[index]!r}. This version takes videos only: "
                'pass modalities="video".'
            )
