"""The model under measurement: a checkpoint, or random weights in a published shape; ours or one of transformers."""

import json
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PretrainedConfig
from transformers.utils import is_flash_attn_2_available

from eval.efficiency.config import Measurement, ModelSettings
from eval.efficiency.hf import HfModel
from eval.efficiency.hf_shapes import SHAPES as HF_SHAPES
from eval.efficiency.hf_shapes import hf_config
from eval.efficiency.subject import Subject
from eval.efficiency.tree import Tree
from llava.assets import tiny_model_path
from llava.config import ModelConfig
from llava.errors import CheckpointError, DeviceError
from llava.hf.families import FAMILIES
from llava.model.language_model.llava_qwen import LlavaQwenConfig, LlavaQwenForCausalLM
from llava.pipeline import VideoQA, resolve_device

ONEVISION: dict[str, Any] = {
    "rope_theta": 1000000.0,
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "mm_hidden_size": 1152,
    "mm_projector_type": "mlp2x_gelu",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_newline_position": "one_token",
    "mm_spatial_pool_mode": "bilinear",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
SHAPES: dict[str, dict[str, Any]] = {
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}
"""The decoders of lmms-lab/llava-onevision-qwen2-0.5b-ov and -7b-ov, Qwen2-0.5B and Qwen2-7B."""


def shape_config(shape: str) -> LlavaQwenConfig:
    """The configuration of a shape. No prompt is too long for it: what is measured beyond the context that the
    published weights were trained for is speed, not sense."""
    if shape == "tiny":
        fields = json.loads((tiny_model_path() / "config.json").read_text())
    else:
        fields = ONEVISION | SHAPES[shape]
    return LlavaQwenConfig.from_dict({**fields, "tokenizer_model_max_length": None, "max_position_embeddings": 2**22})


def best_attention(settings: ModelSettings, device: torch.device, dtype: torch.dtype) -> str:
    """The kernel asked for; for "auto" flash_attention_2 where package, device and dtype allow it, else sdpa.

    Raises:
        DeviceError: flash_attention_2 is asked for where it does not work.
    """
    flash = device.type == "cuda" and dtype != torch.float32 and is_flash_attn_2_available()
    if settings.attn_implementation == "auto":
        return "flash_attention_2" if flash else "sdpa"
    if settings.attn_implementation == "flash_attention_2" and not flash:
        raise DeviceError(
            "flash_attention_2 needs a CUDA GPU, a dtype of 16 bits and the package flash-attn; use "
            "model.attn_implementation=sdpa."
        )
    return settings.attn_implementation


def load_subject(settings: ModelSettings, measurement: Measurement) -> Subject:
    """The model in eval mode on its device, which never ends an answer before its last token.

    Random weights are drawn on the device and in the dtype that they are used in: nothing larger is ever allocated.

    Raises:
        UserError: no such checkpoint, device or kernel.
    """
    device = resolve_device(settings.device)
    name = settings.dtype if settings.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    dtype: torch.dtype = getattr(torch, name)
    attention: Any = best_attention(settings, device, dtype)
    options = {"dtype": dtype, "attn_implementation": attention}
    synthetic = settings.path is None
    of_transformers = settings.shape in HF_SHAPES or (settings.path is not None and _is_of_transformers(settings.path))
    if settings.path is None:
        assert settings.shape is not None
        torch.manual_seed(measurement.seed)
        with torch.device(device):
            if of_transformers:
                model: Any = AutoModelForImageTextToText.from_config(hf_config(settings.shape), **options).eval()
            else:
                model = LlavaQwenForCausalLM._from_config(shape_config(settings.shape), **options).eval()
    elif of_transformers:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(settings.path, **options)
        model = loaded.to(device).eval()
    else:
        model = VideoQA.from_config(
            ModelConfig(path=settings.path, device=str(device), dtype=name, attn_implementation=attention)  # type: ignore[arg-type]
        ).model
    model.generation_config.eos_token_id = None
    if of_transformers:
        return HfModel(model, synthetic, measurement)
    if model.get_vision_tower() is None:
        raise CheckpointError(f"{settings.path} has no vision tower, so there is no video to measure it on.")
    return Tree(model, synthetic)


def _is_of_transformers(path: str) -> bool:
    """Whether a checkpoint is of a family of `llava.hf`; what cannot be read is left to our own loader's messages."""
    try:
        fields, _ = PretrainedConfig.get_config_dict(path)
    except OSError:
        return False
    return any(fields.get("model_type") in family.model_types for family in FAMILIES)
