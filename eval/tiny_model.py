"""The tiny Video-LLM: LLaVA-OneVision's shape at a millionth of its cost, built from the shipped model tree."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedTokenizerBase

from eval.world import COLORS, LABEL_GROUPS, LABEL_WIDTH
from llava.model.language_model.llava_qwen import LlavaQwenConfig, LlavaQwenForCausalLM

PATCH_SIZE = 8


@dataclass(frozen=True)
class TinySize:
    """What tells the tiny models apart.

    Attributes:
        width: of the language model, in heads of 32.
        frames: per video.
        grid: patches per side of a frame, before 2 x 2 pooling. Frames are `PATCH_SIZE` times that in pixels.
    """

    width: int = 128
    frames: int = 16
    grid: int = 12

    @property
    def tokens(self) -> int:
        """Per frame, after pooling."""
        return (self.grid // 2) ** 2

    @property
    def image_size(self) -> int:
        return PATCH_SIZE * self.grid


SIZES = {"tiny": TinySize(), "tiny-wide": TinySize(width=160)}
"""By the names of the checkpoints."""
MASK_SAMPLES = 4
"""Points per side of a patch at which the tower learns to tell objects from background."""
ATTENTION_BLOCK = 208


def blocked_causal_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **_: object
) -> tuple[Tensor, None]:
    """Attention under a mask (B, 1, L, L) that hides the future: each block of queries skips the keys after it."""
    outputs = []
    for start in range(0, query.shape[2], ATTENTION_BLOCK):
        rows, end = slice(start, start + ATTENTION_BLOCK), start + ATTENTION_BLOCK
        attend = nn.functional.scaled_dot_product_attention
        keys, values, seen = key[:, :, :end], value[:, :, :end], mask[:, :, rows, :end]
        outputs.append(attend(query[:, :, rows], keys, values, attn_mask=seen, scale=scaling))
    return torch.cat(outputs, 2).transpose(1, 2), None  # (B, L, heads, head width)


AttentionInterface.register("blocked_causal", blocked_causal_attention)


def tiny_config(tokenizer: PreTrainedTokenizerBase, size: TinySize) -> LlavaQwenConfig:
    """The configuration of a tiny model."""
    fields: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": size.width,
        "intermediate_size": 2 * size.width,
        "num_hidden_layers": 5,
        "num_attention_heads": size.width // 32,
        "num_key_value_heads": size.width // 32,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 96,
            "intermediate_size": 288,
            "num_hidden_layers": 4,  # LLaVA drops the last one
            "num_attention_heads": 4,
            "image_size": size.image_size,
            "patch_size": PATCH_SIZE,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
        },
        "mm_vision_tower": f"tiny-siglip-patch{PATCH_SIZE}-{size.image_size}",
        "mm_hidden_size": 96,
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_newline_position": "one_token",
        "mm_spatial_pool_mode": "bilinear",
        "mm_spatial_pool_stride": 2,
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_num_frames": size.frames,
        "image_aspect_ratio": "pad",
        "tokenizer_model_max_length": 2048,
        "tokenizer_padding_side": "right",
        "use_mm_proj": True,
    }
    return LlavaQwenConfig(**fields)


def build_model(tokenizer: PreTrainedTokenizerBase, seed: int, size: TinySize) -> LlavaQwenForCausalLM:
    """The untrained model: linear layers start with fan-in variance, residual outputs at half of it."""
    torch.manual_seed(seed)
    model = LlavaQwenForCausalLM(tiny_config(tokenizer, size))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not model.lm_head:
            gain = 0.5 if name.endswith(("o_proj", "down_proj", "out_proj", "fc2")) else 1.0
            nn.init.normal_(module.weight, std=gain / math.sqrt(module.in_features))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    tower = model.get_vision_tower()
    assert tower is not None
    embeddings = tower.vision_tower.vision_model.embeddings
    embeddings.position_embedding.weight.data = grid_positions(size.grid, embeddings.position_embedding.embedding_dim)
    return model


def grid_positions(grid: int, width: int) -> torch.Tensor:
    """(grid * grid, width): sines and cosines of row and column, so that near patches start with near positions."""
    angles = torch.arange(grid)[:, None] / 20.0 ** torch.linspace(0, 1, width // 4)  # (grid, width / 4)
    axis = torch.cat([angles.sin(), angles.cos()], -1)
    rows = axis[:, None].expand(grid, grid, -1)
    columns = axis[None].expand(grid, grid, -1)
    return torch.cat([rows, columns], -1).flatten(0, 1).clone()


class DenseHeads(nn.Module):
    """Training only: linear read-outs of what each patch shows and where it lies, from the tower's features."""

    def __init__(self, width: int, grid: int):
        super().__init__()
        self.grid = grid
        self.color = nn.Linear(width, LABEL_GROUPS["color"] + 1)
        self.shape = nn.Linear(width, LABEL_GROUPS["shape"] + 1)
        self.background = nn.Linear(width, LABEL_GROUPS["background"])
        self.small = nn.Linear(width, 1)
        self.mask = nn.Linear(width, MASK_SAMPLES**2)
        self.row = nn.Linear(width, grid)
        self.column = nn.Linear(width, grid)

    def forward(
        self, features: torch.Tensor, labels: torch.Tensor, masks: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Loss of features (F, P, width) of P = grid * grid patches, and accuracies.

        labels: (F, P, LABEL_WIDTH); masks: (F, P, MASK_SAMPLES**2). The masks are what makes the
        shapes learnable: they ask for outlines whatever the colors.
        """
        color, shape, pattern, small = labels.split(list(LABEL_GROUPS.values()), -1)
        free = 1 - color.sum(-1, keepdim=True)
        weight = torch.where(free[..., 0] < 0.99, 1.0, 0.15)
        cross_entropy = nn.functional.cross_entropy

        def soft(logits: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            loss = cross_entropy(logits.flatten(0, 1), target.flatten(0, 1), reduction="none")
            return (loss * weights.flatten()).sum() / weights.sum()

        color_logits, shape_logits = self.color(features), self.shape(features)
        color_target, shape_target = torch.cat([color, free], -1), torch.cat([shape, free], -1)
        pattern_logits = self.background(features)
        where = torch.arange(self.grid**2, device=features.device).expand(features.shape[:2])
        loss = (
            soft(color_logits, color_target, weight)
            + soft(shape_logits, shape_target, weight)
            + 0.5 * soft(pattern_logits, pattern / free.clamp(min=1e-6), free[..., 0])
            + nn.functional.binary_cross_entropy_with_logits(self.small(features), small, weight=weight[..., None])
            + 0.1 * cross_entropy(self.row(features).flatten(0, 1), where.flatten() // self.grid)
            + 0.1 * cross_entropy(self.column(features).flatten(0, 1), where.flatten() % self.grid)
        )
        busy = color_target[..., :-1].amax(-1) > 0.5
        clear = free[..., 0] > 0.99
        accuracies = {
            "color": (color_logits.argmax(-1) == color_target.argmax(-1))[busy].float().mean().item(),
            "shape": (shape_logits.argmax(-1) == shape_target.argmax(-1))[busy].float().mean().item(),
            "background": (pattern_logits.argmax(-1) == pattern.argmax(-1))[clear].float().mean().item(),
        }
        return loss, accuracies


class Oracle(nn.Module):
    """Training only: embeds what a patch shows, so that the language model can learn before it has eyes."""

    position: torch.Tensor
    scale: torch.Tensor

    def __init__(self, width: int, grid: int):
        super().__init__()
        self.embed = nn.Linear(LABEL_WIDTH + 2 * grid + 1, width, bias=False)
        nn.init.normal_(self.embed.weight, std=0.05)
        where = torch.arange(grid * grid)
        one_hot = nn.functional.one_hot
        position = torch.cat([one_hot(where // grid, grid), one_hot(where % grid, grid)], -1).float()
        self.register_buffer("position", torch.cat([position, torch.ones(grid * grid, 1)], -1))
        scale = torch.full((LABEL_WIDTH,), 2.0)
        scale[len(COLORS) + LABEL_GROUPS["shape"] : -1] = 1.0  # the background is everywhere: half as loud
        self.register_buffer("scale", scale)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        """(F, grid * grid, LABEL_WIDTH) -> (F, grid * grid, width)."""
        position = self.position.expand(len(labels), -1, -1)
        return self.embed(torch.cat([labels * self.scale, position], -1))
