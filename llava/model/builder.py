"""Load a checkpoint in the original LLaVA layout."""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from llava.errors import CheckpointError, UserError
from llava.model.language_model.llava_qwen import LlavaQwenConfig, LlavaQwenForCausalLM

logger = logging.getLogger(__name__)


def load_pretrained_model(
    model_path: str,
    model_base: str | None = None,
    model_name: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: Any = "auto",
    torch_dtype: str | torch.dtype | None = None,
    attn_implementation: str = "sdpa",
    customized_config: LlavaQwenConfig | None = None,
    overwrite_config: dict[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[Any, LlavaQwenForCausalLM, Any, int]:
    """Load tokenizer, model, image processor and context length."""
    if load_8bit or load_4bit:
        raise UserError("8-bit and 4-bit loading are not supported in this version.")
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    config = customized_config or LlavaQwenConfig.from_pretrained(model_path)
    for key, value in (overwrite_config or {}).items():
        setattr(config, key, value)
    model = LlavaQwenForCausalLM.from_pretrained(model_path, config=config, attn_implementation=attn_implementation)
    return tokenizer, model.eval(), model.get_vision_tower().image_processor, config.max_position_embeddings
