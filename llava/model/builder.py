"""Load a checkpoint in the original LLaVA layout: tokenizer, model, image processor and context length."""

from typing import Any

import torch
from transformers.utils import is_flash_attn_2_available

from llava.errors import CheckpointError, ConfigError, DeviceError, UserError
from llava.model.checkpoint import load_tokenizer, load_weights, read_config, resolve_folder
from llava.model.language_model.llava_qwen import LlavaQwenConfig, LlavaQwenForCausalLM
from llava.model.multimodal_encoder.image_processor import SigLipImageProcessor

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ATTENTION = ("sdpa", "eager", "flash_attention_2")


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
    multimodal: bool = True,
    **kwargs: Any,
) -> tuple[Any, LlavaQwenForCausalLM, SigLipImageProcessor | None, int]:
    """Load a model for inference.

    Args:
        model_path: a folder, or a hub name such as "lmms-lab/llava-onevision-qwen2-7b-ov".
        model_base, load_8bit, load_4bit: LLaVA-NeXT's arguments; adapters and quantised loading are refused.
        model_name, multimodal: LLaVA-NeXT's arguments, not needed: the config says what the checkpoint is.
        device_map: "auto" (all GPUs, or the CPU where there is none), a device such as "cpu" or "cuda:1", or a
            map from module names to devices.
        torch_dtype: "float32", "float16", "bfloat16" or a torch dtype; by default float16 on a GPU as in
            LLaVA-NeXT, float32 on the CPU.
        attn_implementation: "sdpa", "eager" or "flash_attention_2".
        customized_config: used instead of the checkpoint's config.json.
        overwrite_config: single config keys to replace.
        **kwargs: passed to transformers' `from_pretrained`.

    Returns:
        tokenizer, model in eval mode, image processor (None for a text-only model), and the context length in tokens.
        Embeddings keep the checkpoint's vocabulary size.

    Raises:
        CheckpointError: the checkpoint is missing, incomplete, damaged or of another kind.
        DeviceError: this machine lacks the device or the attention kernel asked for.
        ConfigError: unknown dtype or attention implementation.
        UserError: adapters or quantised loading were asked for.
    """
    if load_8bit or load_4bit:
        raise UserError('8-bit and 4-bit loading are not supported in this version; use torch_dtype="bfloat16".')
    if model_base is not None:
        raise UserError(
            "model_base (adapters and projector-only checkpoints) is not supported; pass a full checkpoint."
        )
    device_map, on_gpu = _devices(device_map)
    dtype = _dtype(torch_dtype, on_gpu)
    _check_attention(attn_implementation, dtype, on_gpu)

    folder = resolve_folder(model_path)
    config = customized_config or read_config(folder)
    for key, value in (overwrite_config or {}).items():
        setattr(config, key, value)
    if getattr(config, "mm_use_im_start_end", False):
        raise CheckpointError(f"{model_path} wraps images in <im_start> and <im_end> tokens, which is not supported.")
    tokenizer = load_tokenizer(folder)
    model = load_weights(folder, config, dtype, device_map, attn_implementation, **kwargs)
    tower = model.get_vision_tower()
    return tokenizer, model.eval(), None if tower is None else tower.image_processor, _context_length(config)


def _devices(device_map: Any) -> tuple[Any, bool]:
    """The device map for transformers, and whether any part of the model goes to a GPU."""
    if device_map in ("auto", None):
        return ("auto", True) if torch.cuda.is_available() else ("cpu", False)
    wanted = [str(value) for value in (device_map.values() if isinstance(device_map, dict) else [device_map])]
    on_gpu = any(name.isdigit() or not name.startswith(("cpu", "disk", "mps")) for name in wanted)
    if on_gpu and not torch.cuda.is_available():
        raise DeviceError(f'device_map={device_map!r} needs a CUDA GPU, and there is none; use device_map="cpu".')
    return device_map, on_gpu


def _dtype(torch_dtype: str | torch.dtype | None, on_gpu: bool) -> torch.dtype:
    if torch_dtype is None:
        return torch.float16 if on_gpu else torch.float32
    dtype = DTYPES.get(torch_dtype.removeprefix("torch.")) if isinstance(torch_dtype, str) else torch_dtype
    if dtype is None or dtype not in DTYPES.values():
        raise ConfigError(f"torch_dtype is {torch_dtype!r}; use one of {', '.join(DTYPES)}.")
    return dtype


def _check_attention(name: str, dtype: torch.dtype, on_gpu: bool) -> None:
    if name not in ATTENTION:
        raise ConfigError(f"attn_implementation is {name!r}; use one of {', '.join(ATTENTION)}.")
    if name != "flash_attention_2":
        return
    if not on_gpu or not is_flash_attn_2_available():
        raise DeviceError(
            "flash_attention_2 needs a CUDA GPU and the package flash-attn (pip install 'llava-scissor[flash-attn]'); "
            'use attn_implementation="sdpa" instead.'
        )
    if dtype == torch.float32:
        raise DeviceError('flash_attention_2 does not compute in float32; use torch_dtype="bfloat16" or "float16".')


def _context_length(config: LlavaQwenConfig) -> int:
    return getattr(config, "max_sequence_length", None) or config.max_position_embeddings
