"""8- and 4-bit weights through bitsandbytes: which layers get them, and what they need.

Only the linear layers of the decoder are quantised. The vision tower, the projector and the head are a small share of
a large model and their errors reach every word, so they keep their dtype, as do embeddings, norms and biases.
"""

import importlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from llava.errors import ConfigError, DeviceError
from llava.model.error_text import one_line
from llava.model.language_model.llava_qwen import LlavaQwenConfig, LlavaQwenForCausalLM

KEPT = ("lm_head", "model.vision_tower", "model.mm_projector")
"""Parts whose linear layers are not quantised."""

BLOCK = 64
"""Weights that share a scale in 4-bit quantisation."""


def quantization_config(bits: int, config: LlavaQwenConfig, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What transformers is asked for: LLM.int8() for 8 bits, NF4 with double quantisation for 4, as in LLaVA-NeXT.

    Args:
        bits: 8 or 4.
        dtype: of all other weights and of the computation.

    Raises:
        DeviceError: bitsandbytes is not installed, too old, or does not run on this machine.
        ConfigError: the model's layers do not divide into blocks of 4-bit weights.
    """
    if not is_bitsandbytes_available():
        raise DeviceError(
            f"{bits}-bit loading needs bitsandbytes 0.46.1 or newer (pip install 'bitsandbytes>=0.46.1') and an "
            'NVIDIA, AMD or Intel GPU or an x86-64 CPU; use torch_dtype="bfloat16" without it.'
        )
    try:
        importlib.import_module("bitsandbytes")
    except Exception as error:  # a library that does not fit the machine fails in many ways
        raise DeviceError(
            f"bitsandbytes is installed but does not start here: {one_line(error)}. {bits}-bit loading needs it."
        ) from error
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(KEPT))
    if config.hidden_size % BLOCK or config.intermediate_size % BLOCK:
        raise ConfigError(
            f"4-bit weights come in blocks of {BLOCK}, into which hidden_size {config.hidden_size} or "
            f"intermediate_size {config.intermediate_size} does not divide; use load_8bit=True."
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(KEPT),
    )


def quantized_layers(model: LlavaQwenForCausalLM) -> Iterator[tuple[str, nn.Linear]]:
    """Name and module of each linear layer that quantised loading replaces."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.startswith(KEPT):
            yield name, module
