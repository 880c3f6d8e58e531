"""Load a checkpoint in the original LLaVA layout: tokenizer, model, image processor and context length."""

from pathlib import Path
from typing import Any

import torch
from transformers.utils import is_flash_attn_2_available

from llava.errors import CheckpointError, ConfigError, DeviceError
from llava.model import adapter
from llava.model.checkpoint import check_supported, load_tokenizer, load_weights, read_config
from llava.model.device_map import place, uses_gpu
from llava.model.hub import resolve_folder
from llava.model.language_model.llava_qwen import LlavaQwenConfig, LlavaQwenForCausalLM
from llava.model.multimodal_encoder.image_processor import SigLipImageProcessor
from llava.model.quantized import quantization_config
from llava.model.weight_files import WEIGHT_FILES

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
    attn_implementation: str | None = "sdpa",
    customized_config: LlavaQwenConfig | None = None,
    overwrite_config: dict[str, Any] | None = None,
    multimodal: bool = True,
    **kwargs: Any,
) -> tuple[Any, LlavaQwenForCausalLM, SigLipImageProcessor | None, int]:
    """Load a model for inference.

    Args:
        model_path: a folder, or a hub name such as "lmms-lab/llava-onevision-qwen2-7b-ov".
        model_base: the complete checkpoint that `model_path` was trained from, if `model_path` holds only a projector
            (`mm_projector.bin`) or LoRA weights; these are merged into the model, which needs peft.
        load_8bit, load_4bit: quantise the decoder's linear layers through bitsandbytes; see `llava.model.quantized`.
            transformers' names for them, load_in_8bit and load_in_4bit, do the same.
        model_name, multimodal: LLaVA-NeXT's arguments, not needed: the config says what the checkpoint is.
        device_map: "auto" (spread evenly over all GPUs, with main memory and disk for what does not fit; the CPU
            where there is no GPU), "sequential" (fill one GPU after the other), a device such as "cpu" or "cuda:1",
            or a map from parts of the model to devices, "cpu" and "disk".
        torch_dtype: "float32", "float16", "bfloat16" or a torch dtype; by default float16 on a GPU as in
            LLaVA-NeXT, float32 on the CPU.
        attn_implementation: "sdpa", "eager" or "flash_attention_2"; None is "sdpa".
        customized_config: used instead of the checkpoint's config.json.
        overwrite_config: single config keys to replace.
        **kwargs: `max_memory`, such as {0: "20GiB", "cpu": "60GiB"}, bounds what "auto" uses; everything else is
            passed to transformers' `from_pretrained`, such as `offload_folder`, which `.bin` weights on disk need.

    Returns:
        tokenizer, model in eval mode, image processor (None for a text-only model), and the context length in tokens.
        Embeddings keep the checkpoint's vocabulary size.

    Raises:
        CheckpointError: the checkpoint is missing, incomplete, damaged or of another kind.
        DeviceError: this machine lacks the device, the memory, the attention kernel or bitsandbytes.
        ConfigError: unknown dtype or attention implementation, or arguments that exclude each other.
    """
    on_gpu = uses_gpu(device_map)
    dtype = _dtype(torch_dtype, on_gpu)
    attn_implementation = attn_implementation or "sdpa"
    _check_attention(attn_implementation, dtype, on_gpu)
    bits = _bits(kwargs.pop("load_in_8bit", load_8bit), kwargs.pop("load_in_4bit", load_4bit))

    folder = resolve_folder(model_path)
    base = base_folder(folder, model_base)
    config = customized_config or read_config(folder)
    for key, value in (overwrite_config or {}).items():
        setattr(config, key, value)
    check_supported(config, model_path)
    tokenizer = load_tokenizer(base)

    trained = adapter.read_trained_parts(folder) if model_base is not None else {}
    if bits is not None:
        if model_base is not None and adapter.has_lora(folder):
            raise ConfigError("LoRA weights are merged into the model's, which quantised weights do not allow.")
        kwargs["quantization_config"] = quantization_config(bits, config, dtype)
    device_map = place(device_map, config, dtype, bits, kwargs.pop("max_memory", None))
    model: Any = load_weights(base, config, dtype, device_map, attn_implementation, supplied=trained.keys(), **kwargs)
    if model_base is not None:
        adapter.insert(trained, model, folder)
        model = adapter.merge_lora(model, folder)
    tower = model.get_vision_tower()
    return tokenizer, model.eval(), None if tower is None else tower.image_processor, _context_length(config)


def base_folder(folder: Path, model_base: str | None = None) -> Path:
    """The folder of the weights and the tokenizer of the checkpoint in `folder`.

    Raises:
        CheckpointError: a partial checkpoint without its base, or one that holds both.
    """
    base = folder if model_base is None else resolve_folder(model_base)
    complete = any((base / name).exists() for name in WEIGHT_FILES)
    if model_base is None and adapter.is_partial(folder) and not complete:
        raise CheckpointError(
            f"{folder} holds only a projector or LoRA weights; name the complete checkpoint that it was trained from "
            "as model_base."
        )
    if complete and adapter.has_lora(base):  # transformers would load the model that the adapter names instead
        raise CheckpointError(
            f"{base} holds complete weights and a LoRA adapter; move {adapter.ADAPTER_CONFIG} away to load the "
            "complete weights, or the weights to load the adapter on a model_base."
        )
    return base


def _bits(load_8bit: bool, load_4bit: bool) -> int | None:
    if load_8bit and load_4bit:
        raise ConfigError("load_8bit and load_4bit exclude each other; choose one.")
    return 8 if load_8bit else 4 if load_4bit else None


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
