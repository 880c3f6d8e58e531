"""SigLIP as LLaVA uses it: without the last encoder layer, the final layer norm and the pooling head."""

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import (
    SiglipEncoder,
    SiglipMultiheadAttentionPoolingHead,
    SiglipPreTrainedModel,
    SiglipVisionEmbeddings,
)

from llava.errors import CheckpointError, UserError
from llava.model.error_text import one_line
from llava.model.multimodal_encoder.image_processor import SigLipImageProcessor
from llava.model.multimodal_encoder.signals import HEAD, LAYER, check_head, input_of, layer_of, pooled_signals

PUBLISHED_TOWERS: dict[str, dict[str, Any]] = {
    "google/siglip-so400m-patch14-384": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
}
"""Towers that checkpoints name without carrying their configuration."""


def vision_config_of(config: Any) -> SiglipVisionConfig:
    """The tower's configuration: the checkpoint's `vision_config`, or else the published one of the named tower.

    A tower may be named by a local path, as by the training scripts; its last component tells which one it is.

    Raises:
        CheckpointError: an invalid `vision_config`, or none, and `mm_vision_tower` is not a tower this version knows.
    """
    fields = getattr(config, "vision_config", None)
    if fields is None:
        name = config.mm_vision_tower
        published = {known.rpartition("/")[2]: PUBLISHED_TOWERS[known] for known in PUBLISHED_TOWERS}
        fields = published.get(str(name).rstrip("/").rpartition("/")[2])
        if fields is None:
            raise CheckpointError(
                f"The checkpoint names the vision tower {name!r}, which this version does not know "
                f"({', '.join(PUBLISHED_TOWERS)}); add its SigLIP configuration to config.json as vision_config."
            )
    try:
        return SiglipVisionConfig(**{key: value for key, value in fields.items() if key != "model_type"})
    except Exception as error:  # transformers passes on whatever impossible values lead to
        raise CheckpointError(f"The vision_config in config.json is invalid: {one_line(error)}") from error


class _VisionModel(nn.Module):
    """Embeddings and all encoder layers but the last. `post_layernorm` is in every checkpoint and is not used."""

    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__()
        self.embeddings = SiglipVisionEmbeddings(config)
        self.encoder = SiglipEncoder(config)  # type: ignore[arg-type]  # takes either part's configuration
        del self.encoder.layers[-1]
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class CutSiglipVisionModel(SiglipPreTrainedModel):
    """SigLIP's vision model without its last layer and its head, under the original parameter names."""

    config_class = SiglipVisionConfig

    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__(config)
        self.vision_model = _VisionModel(config)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(frames, 3, side, side) -> (frames, patches, hidden): the output of the last kept layer."""
        hidden = self.vision_model.embeddings(pixel_values)
        return self.vision_model.encoder(inputs_embeds=hidden).last_hidden_state


class SigLipVisionTower(nn.Module):
    """The vision tower of a LLaVA model, with the image processor that belongs to it.

    Attributes:
        is_loaded: always true; scripts written for LLaVA-NeXT load a tower that is not.
        image_processor: turns frames into this tower's pixel tensor.
        pooling_head: SigLIP's own head, once it has been loaded.
        num_patches_per_side, num_patches: patch grid of one frame.
        hidden_size: width of the features.
    """

    is_loaded = True

    def __init__(self, config: Any, attn_implementation: str | None = None) -> None:
        super().__init__()
        vision_config: Any = vision_config_of(config)
        vision_config._attn_implementation = attn_implementation
        self.config = vision_config
        self.vision_tower = CutSiglipVisionModel(vision_config)
        self.image_processor = SigLipImageProcessor(vision_config.image_size)
        self.hidden_size = vision_config.hidden_size
        self.num_patches_per_side = vision_config.image_size // vision_config.patch_size
        self.num_patches = self.num_patches_per_side**2
        self.pooling_head: SiglipMultiheadAttentionPoolingHead | None = None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Encode a batch of frames.

        Args:
            images: (frames, 3, image_size, image_size), any float dtype and device.

        Returns:
            (frames, num_patches, hidden_size) in the dtype of `images`, on the tower's device.

        Raises:
            UserError: frames of another size.
        """
        self.check_pixels(images)
        return self.vision_tower(images.to(device=self.device, dtype=self.dtype)).to(images.dtype)

    def observe(
        self, images: torch.Tensor, names: Iterable[str] = ("vision_attn",)
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Encode a batch of frames, and keep what `signals` needs.

        Args:
            images: as `forward` takes them.
            names: of signals.

        Returns:
            What `forward` returns, and the inputs of the layers that the signals belong to, by their index: of the
            same shape in the dtype of the weights.
        """
        layers = self.vision_tower.vision_model.encoder.layers
        needed = {layer_of(name, len(layers)) for name in names if name in LAYER}
        with contextlib.ExitStack() as stack:
            inputs = {index: stack.enter_context(input_of(layers[index])) for index in needed}
            features = self(images)
        return features, {index: given[0] for index, given in inputs.items()}

    def signals(
        self, names: Iterable[str], features: torch.Tensor, layer_inputs: Mapping[int, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """What the tower knows about patches besides their features.

        Args:
            names: of signals.py.
            features, layer_inputs: what `observe` returns for them.

        Returns:
            Each signal by its name, float32 on the tower's device.

        Raises:
            ConfigError: signals of the pooling head, and the tower has none.
        """
        check_head(self, names)
        vision_model = self.vision_tower.vision_model
        layers, seen = vision_model.encoder.layers, {}
        for name in names:
            if name in LAYER:
                index = layer_of(name, len(layers))
                seen[name] = LAYER[name](layers[index], layer_inputs[index])
        if any(name in HEAD for name in names):
            pooled = pooled_signals(vision_model, self.pooling_head, features)
            seen |= {name: pooled[name] for name in names if name in HEAD}
        return seen

    def load_pooling_head(self, folder: str | Path) -> None:
        """Give the tower the head that SigLIP has and LLaVA drops, for methods that need `map_attn` or `map_embed`.

        Args:
            folder: of a SigLIP checkpoint of this size (model.safetensors).

        Raises:
            CheckpointError: the file is missing or damaged, or does not hold this tower's head.
        """
        path, prefix = Path(folder) / "model.safetensors", "vision_model.head."
        try:
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if prefix in name]  # noqa: SIM118 - it is no mapping
                weights = {name.partition(prefix)[2]: file.get_tensor(name) for name in names}
            head = SiglipMultiheadAttentionPoolingHead(self.config)
            head.load_state_dict(weights)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise CheckpointError(
                f"{path} does not hold the pooling head of this vision tower ({prefix}*, width {self.hidden_size}): "
                f"{one_line(error)}"
            ) from error
        self.pooling_head = head.to(self.device, self.dtype).eval()

    def check_pixels(self, images: torch.Tensor) -> None:
        """Refuse anything but (frames, 3, image_size, image_size) of floating dtype with a UserError."""
        side = self.config.image_size
        if (
            images.ndim != 4
            or images.shape[1:] != (3, side, side)
            or 0 in images.shape
            or not images.is_floating_point()
        ):
            raise UserError(
                f"The vision tower takes floating-point pixels (frames, 3, {side}, {side}), not {images.dtype} "
                f"{tuple(images.shape)}; use the image processor that load_pretrained_model returns."
            )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the tower's weights."""
        return self.vision_tower.dtype

    @property
    def device(self) -> torch.device:
        """Device of the tower's weights."""
        return self.vision_tower.device
