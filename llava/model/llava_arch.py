"""What LLaVA adds to a language model: pixels -> vision tower -> projector -> 2x2 pooling -> compression -> prompt.

Videos are pooled; the crops of an image are merged instead (`image_merge.py`).
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import ConfigError, UserError
from llava.instrument import stage
from llava.model.image_merge import merge_crops
from llava.model.items import Images, VisualItem, visual_items
from llava.model.multimodal_encoder.siglip_encoder import SigLipVisionTower
from llava.model.multimodal_encoder.signals import PATCHES, PER_FRAME, UNPOOLED, as_input, needed_signals
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.newlines import SourceTokens, VisualTokens, insert_newlines, newline_period
from llava.model.pooling import pool_2x2
from llava.model.splice import PaddedBatch, items_per_row, pad_rows, splice_row
from llava.token_compression import CompressionConfig, compress
from llava.token_compression.inner import before_model, note_inner, refuse_inner

logger = logging.getLogger(__name__)

PATCHES_PER_CHUNK = 16384
"""Frames go through tower, projector and pooling in chunks of about this many patches (22 frames of 729), so that
the memory of the unpooled features does not grow with the length of the video."""

KEEP_ALL = CompressionConfig(method="none")
"""For what a compression leaves alone: its tokens are counted."""


def checkpoint_compression(config: Any) -> CompressionConfig | None:
    """The compression that a checkpoint's config.json asks for: the `mm_use_zip` keys of LLaVA-Scissor's baselines."""
    if not getattr(config, "mm_use_zip", False):
        return None
    return CompressionConfig(
        similarity_threshold=getattr(config, "mm_zip_tau", 0.95),
        error_tolerance=getattr(config, "mm_zip_epsilon", 0.05),
        images=True,
    )


def _is_compressed(item: VisualItem, config: CompressionConfig) -> bool:
    return item.modality == "video" or (item.modality == "image" and config.images)


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

    def encode_frames(
        self, frames: torch.Tensor, pool: bool = True, signals: dict[str, list[torch.Tensor]] | None = None
    ) -> torch.Tensor:
        """Vision tower, projector and 2x2 pooling, in chunks.

        Args:
            frames: (frames, 3, side, side) pixels, any device and float dtype.
            pool: videos are pooled, images are not.
            signals: by their name in `multimodal_encoder/signals.py`, lists to which the (frames, tokens, channels) or
                (frames, channels) of each chunk is added, pooled as the features are.

        Returns:
            (frames, tokens, hidden_size) on the model's device and in its dtype.

        Raises:
            ConfigError: `mm_spatial_pool_mode` is missing or unknown.
        """
        tower, projector = self.model.vision_tower, self.model.mm_projector
        weight = next(projector.parameters())
        mode = getattr(self.config, "mm_spatial_pool_mode", None)
        signals = signals or {}
        encoded = []
        for chunk in frames.split(max(1, PATCHES_PER_CHUNK // tower.num_patches)):
            with stage("vision_tower", tower.device):
                pixels = chunk.to(tower.device)
                features, layer_inputs = tower.observe(pixels, signals) if signals else (tower(pixels), None)
            with stage("projector", weight.device):
                projected = projector(features.to(weight))  # (chunk, patches, hidden)
                encoded.append(pool_2x2(projected, mode) if pool else projected)
            if PATCHES in signals:
                signals[PATCHES].append(projected)
            if layer_inputs is not None:  # what only a method needs counts as a part of its cost
                with stage("compression", tower.device):
                    for name, signal in tower.signals(signals, features, layer_inputs).items():
                        signal = signal.to(weight.device)
                        whole = not pool or name in (*PER_FRAME, *UNPOOLED)
                        signals[name].append(signal if whole else pool_2x2(signal, mode))
        return torch.cat(encoded)

    def encode_video(
        self, frames: torch.Tensor, compression: CompressionConfig
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """What `compress` takes of a video: `features, inputs = ...; compress(features, compression, **inputs)`.

        Args:
            frames: (frames, 3, side, side) pixels.
            compression: its method says which inputs are computed.

        Returns:
            What `encode_frames` returns, and the inputs by their names, as `llava/token_compression/inputs.py` states.

        Raises:
            ConfigError: the method needs an input that this model does not have.
        """
        refuse_inner(compression)
        item = VisualItem(frames, "video")
        ((features, signals),) = self._features([item], [compression])
        return features, self._inputs(item, self._source_tokens(item, features), signals)

    def encode_images(self, items: Sequence[VisualItem]) -> list[VisualTokens]:
        """Everything between pixels and prompt; the one place where tokens are compressed.

        Videos are compressed, images if `CompressionConfig.images` says so, an image of a 4-D tensor never.

        Returns:
            For each item its kept tokens with newlines.

        Raises:
            UserError: pixels of another shape, or crops that do not belong to the image's size.
        """
        for item in items:
            self.model.vision_tower.check_pixels(item.pixels)
        config = self.compression_config()
        before = None if config is None else before_model(config)
        configs = [before if config is None or _is_compressed(item, config) else KEEP_ALL for item in items]
        encoded = self._features(items, configs)
        return [self._kept_tokens(item, *encoded[index], configs[index]) for index, item in enumerate(items)]

    def _features(
        self, items: Sequence[VisualItem], configs: Sequence[CompressionConfig | None]
    ) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        """(frames or crops, tokens, hidden_size) of each item, and the signals that its method needs, in this layout.

        The tower takes all images together, which may be of one crop each, but videos one by one: their frames are
        enough to keep it busy, and need not be copied next to each other.
        """
        features: dict[int, tuple[torch.Tensor, dict[str, torch.Tensor]]] = {}
        images = [index for index, item in enumerate(items) if item.modality != "video"]
        groups = [[index] for index, item in enumerate(items) if item.modality == "video"]
        for chosen in [*groups, images] if images else groups:
            pixels = [items[index].pixels for index in chosen]
            lengths = [len(item) for item in pixels]
            needed = {index: needed_signals(configs[index]) for index in chosen}
            signals: dict[str, list[torch.Tensor]] = {name: [] for names in needed.values() for name in names}
            together = torch.cat(pixels) if len(pixels) > 1 else pixels[0]
            encoded = self.encode_frames(together, items[chosen[0]].modality == "video", signals)
            parts = {name: torch.cat(chunks).split(lengths) for name, chunks in signals.items()}
            for place, (index, own) in enumerate(zip(chosen, encoded.split(lengths), strict=True)):
                features[index] = own, {name: parts[name][place] for name in needed[index]}
        return [features[index] for index in range(len(items))]

    def _source_tokens(self, item: VisualItem, features: torch.Tensor) -> SourceTokens:
        """What the item would put into the prompt without compression."""
        if item.modality == "patches":
            return SourceTokens(features)
        if item.modality == "video":
            return SourceTokens(features, period=newline_period(self.config, features.shape[0], features.shape[1]))
        return merge_crops(features, self.config, item.size, self.model.vision_tower.config.image_size)

    def _inputs(
        self, item: VisualItem, source: SourceTokens, signals: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Signals in the layout of the item's source tokens.

        Raises:
            ConfigError: signals that only videos have.
        """
        unpooled = [name for name in signals if name in UNPOOLED]
        if unpooled and item.modality != "video":
            raise ConfigError(f"The method needs {unpooled[0]} of videos; leave images as they are: images=False.")
        if unpooled:
            return {name: as_input(name, signal) for name, signal in signals.items()}
        return {
            name: signal[: len(source.tokens)]  # the whole image comes before its crops
            if name in PER_FRAME
            else as_input(name, self._source_tokens(item, signal).tokens)
            for name, signal in signals.items()
        }

    def _kept_tokens(
        self,
        item: VisualItem,
        features: torch.Tensor,
        signals: dict[str, torch.Tensor],
        compression: CompressionConfig | None,
    ) -> VisualTokens:
        source = self._source_tokens(item, features)
        newline = getattr(self.model, "image_newline", None)
        if source.period is not None and newline is None:
            raise ConfigError(
                "The config asks for newline tokens, but the checkpoint has no image_newline; set mm_newline_position "
                'to "no_token" for videos, and mm_patch_merge_type to "spatial" for images.'
            )
        tokens = source.tokens.flatten(0, 1)
        positions = torch.arange(len(tokens), device=tokens.device)
        groups, config = None, self.compression_config()
        if compression is not None:
            result = compress(source.tokens, compression, **self._inputs(item, source, signals))
            tokens, positions, groups = result.tokens, result.positions, result.groups
        if config is not None and _is_compressed(item, config):
            note_inner(config, self.config.num_hidden_layers)
            groups = torch.zeros_like(positions) if groups is None else groups
        return insert_newlines(tokens, positions, source, newline, groups)

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
        """Replace every placeholder of a batch of prompts by the tokens of its image or video.

        Args:
            input_ids: (rows, length) int64 with IMAGE_TOKEN_INDEX where an image or video goes.
            position_ids, attention_mask, labels: (rows, length) or None. What is None comes back as None, except
                position_ids under `CompressionConfig(position_ids="source")`. Masked positions are removed first.
            past_key_values: returned as it is.
            images: see `llava.model.items.Images`. None, or a single text token per row, returns everything unchanged.
            modalities: "image" or "video" for each item, or one string for all of them.
            image_sizes: (width, height) in pixels of each item; only images with crops need it.

        Returns:
            input_ids (None once embedded), position_ids, attention_mask, past_key_values, inputs_embeds (rows,
            spliced length, hidden_size) and labels, padded with zero vectors on the side `tokenizer_padding_side`.

        Raises:
            UserError: the number of items, of modalities or of sizes, or the shape of an item does not fit.
        """
        batch = self.spliced(input_ids, attention_mask, past_key_values, labels, images, modalities, image_sizes)
        if batch is None:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        positions, mask, labels = self.as_given(batch, position_ids, attention_mask, labels)
        return None, positions, mask, past_key_values, batch.embeds, labels

    def as_given(
        self,
        batch: PaddedBatch,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Position ids, mask and labels of the spliced prompts where the prompts came with them, else None."""
        mask = None if attention_mask is None else batch.attention_mask.to(attention_mask.dtype)
        positions = None if position_ids is None and not self._source_positions() else batch.position_ids
        return positions, mask, None if labels is None else batch.labels

    def spliced(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Any,
        labels: torch.Tensor | None,
        images: Images | None,
        modalities: str | Sequence[str],
        image_sizes: Sequence[Sequence[int]] | None,
    ) -> PaddedBatch | None:
        """The prompts embedded; None where `prepare_inputs_labels_for_multimodal` returns everything unchanged."""
        if images is None and past_key_values is not None:  # a decoding step: new text only
            return None
        has_placeholder = bool((input_ids == IMAGE_TOKEN_INDEX).any())
        if not has_placeholder and (images is None or input_ids.shape[1] == 1):
            return None
        side = getattr(self.config, "tokenizer_padding_side", "right")
        return self.splice(input_ids, attention_mask, labels, images, modalities, image_sizes, side)

    def splice(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor | None,
        images: Images | None,
        modalities: str | Sequence[str],
        image_sizes: Sequence[Sequence[int]] | None,
        padding_side: str,
    ) -> PaddedBatch:
        """Encode the items, insert them into their rows and pad; see `prepare_inputs_labels_for_multimodal`."""
        kept = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        targets = torch.full_like(input_ids, IGNORE_INDEX) if labels is None else labels
        ids = [row[mask] for row, mask in zip(input_ids, kept, strict=True)]
        targets_per_row = [row[mask] for row, mask in zip(targets, kept, strict=True)]

        items = visual_items(images, modalities, image_sizes)
        assignment = items_per_row(ids, len(items))
        used = [index for row in assignment for index in row]
        for index in used:
            if items[index].modality == "text":
                raise UserError(f'images[{index}] stands for a placeholder, so its modality cannot be "text".')
        if used and self.get_vision_tower() is None:
            raise UserError("This checkpoint has no vision tower (mm_vision_tower), so it takes text only.")
        encoded = dict(zip(used, self.encode_images([items[index] for index in used]), strict=True))
        items_of_rows = [[encoded[index] for index in indices] for indices in assignment]
        return self.splice_encoded(ids, targets_per_row, items_of_rows, padding_side, self._source_positions())

    def splice_encoded(
        self,
        ids: Sequence[torch.Tensor],
        labels: Sequence[torch.Tensor],
        items: Sequence[Sequence[VisualTokens]],
        padding_side: str,
        source_positions: bool,
    ) -> PaddedBatch:
        """Insert encoded items into their rows and pad.

        Args:
            ids, labels: (length,) int64 of each row, without padding.
            items: what each row's placeholders stand for.
            source_positions: leave each kept token at the rotary position of its representative.
        """
        limit = getattr(self.config, "tokenizer_model_max_length", None)
        rows = []
        for row_ids, row_labels, row_items in zip(ids, labels, items, strict=True):
            row = splice_row(row_ids, row_labels, row_items, self.model.embed_tokens, source_positions)
            if limit is not None and len(row.embeds) > limit:
                logger.warning(
                    "A prompt of %d positions is cut to tokenizer_model_max_length = %d.", len(row.embeds), limit
                )
                row = row.truncated(limit)
            rows.append(row)
        return pad_rows(rows, padding_side)

    def compression_config(self) -> CompressionConfig | None:
        """What is set for this model, else what the checkpoint's config.json asks for."""
        return self.token_compression or checkpoint_compression(self.config)

    def _source_positions(self) -> bool:
        config = self.compression_config()
        return config is not None and config.position_ids == "source"
