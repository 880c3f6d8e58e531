"""Check and read the files of a checkpoint, with one clear error for everything that can be wrong with them."""

import json
import logging
import warnings
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, GenerationConfig

from llava.errors import CheckpointError
from llava.model.completeness import differences, groups, meta_model
from llava.model.error_text import one_line, reason, sample
from llava.model.language_model.llava_qwen import LlavaQwenConfig, LlavaQwenForCausalLM
from llava.model.llava_arch import checkpoint_compression
from llava.model.video_layout import longest_prompt, video_layout
from llava.model.weight_files import WeightFiles, read_weight_files

logger = logging.getLogger(__name__)

MODEL_TYPES = ("llava_qwen", "llava_qwen_zip", "llava")
ARCHITECTURES = ("LlavaQwenForCausalLM", "LlavaQwenZipForCausalLM")


def read_config(folder: Path) -> LlavaQwenConfig:
    """Read config.json of an original LLaVA checkpoint built on Qwen2.

    Raises:
        CheckpointError: missing or invalid file, or another kind of model.
    """
    path = folder / "config.json"
    if not path.exists():
        raise CheckpointError(f"{folder} has no config.json, so it is not a checkpoint in the original LLaVA layout.")
    fields = read_json(path)
    model_type, architectures = fields.get("model_type"), fields.get("architectures") or [ARCHITECTURES[0]]
    if model_type not in MODEL_TYPES or not isinstance(architectures, list) or architectures[0] not in ARCHITECTURES:
        raise CheckpointError(
            f"{path} describes a {model_type!r} model ({architectures}). Supported are checkpoints in the original "
            "LLaVA layout on Qwen2 (LlavaQwenForCausalLM), not the converted ones of transformers."
        )
    if fields.pop("quantization_config", None) is not None:
        raise CheckpointError(
            f"{path} describes weights that were saved quantised; load the original checkpoint with load_8bit=True or "
            "load_4bit=True instead."
        )
    for key in ("attn_implementation", "_attn_implementation"):
        fields.pop(key, None)  # the kernel is this machine's affair, not that of the machine that trained
    try:
        return LlavaQwenConfig.from_dict(fields)
    except Exception as error:  # transformers passes on whatever impossible values lead to
        raise CheckpointError(f"{path} has an invalid value: {reason(error)}") from error


def check_supported(config: LlavaQwenConfig, where: str) -> LlavaQwenForCausalLM:
    """Refuse settings that this version does not follow, before anything large is read.

    Returns:
        The model that the config describes, on the meta device.

    Raises:
        CheckpointError: naming all of them.
    """
    problems = []
    if getattr(config, "mm_use_im_start_end", False):
        problems.append("mm_use_im_start_end wraps images in <im_start> and <im_end> tokens, which is not supported.")
    if getattr(config, "add_faster_video", False):
        problems.append("add_faster_video adds a second stream of video tokens, which is not supported.")
    results: list[Any] = []
    for part in (meta_model, video_layout, longest_prompt, checkpoint_compression):
        try:
            results.append(part(config))
        except Exception as error:  # also whatever values of another type lead to
            problems.append(reason(error))
    if problems:
        raise CheckpointError(f"{where}: {' '.join(dict.fromkeys(problems))}")
    return results[0]


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's tokenizer.

    Raises:
        CheckpointError: files missing or damaged.
    """
    if not (folder / "tokenizer_config.json").exists():
        raise CheckpointError(
            f"{folder} has no tokenizer (tokenizer_config.json); copy it from the original checkpoint."
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception for damaged files
        raise CheckpointError(f"The tokenizer in {folder} cannot be loaded: {one_line(error)}") from error


def load_weights(
    folder: Path,
    config: LlavaQwenConfig,
    dtype: torch.dtype,
    device_map: Any,
    attn_implementation: str,
    supplied: Collection[str] = (),
    **kwargs: Any,
) -> LlavaQwenForCausalLM:
    """Build the model and fill it with the checkpoint's weights, all of them and nothing else.

    Shapes and names are compared before anything large is read.

    Args:
        supplied: names of parameters that the caller fills afterwards; the checkpoint need not have them.
        **kwargs: passed to transformers' `from_pretrained`.

    Raises:
        CheckpointError: files missing or damaged, weights missing or of another shape.
    """
    weights = check_weights(folder, config, supplied)
    read_generation_config(folder)
    to_disk = isinstance(device_map, dict) and "disk" in device_map.values()
    if to_disk and weights.names[0].endswith(".bin") and not kwargs.get("offload_folder"):
        raise CheckpointError(
            f"{folder} holds .bin files, from which single layers cannot be fetched; pass offload_folder, where "
            "the layers that stay on disk are written again."
        )
    model: Any
    report: dict[str, Any]
    try:
        with warnings.catch_warnings():
            # accelerate does not know that a part in a device map can be a parameter (image_newline)
            warnings.filterwarnings("ignore", message="The following device_map keys do not match any submodules")
            model, report = LlavaQwenForCausalLM.from_pretrained(  # type: ignore[misc]  # a pair: output_loading_info
                folder,
                config=config,
                dtype=dtype,
                device_map=device_map,
                attn_implementation=attn_implementation,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # those of `supplied`; others have been refused
                weights_only=True,
                **kwargs,
            )
    except (TypeError, ValueError, ImportError, SafetensorError) as error:
        raise CheckpointError(f"The checkpoint in {folder} cannot be loaded: {one_line(error)}") from error
    missing = set(report["missing_keys"]) - {"lm_head.weight"} - set(supplied)
    if missing:  # a name that transformers reads differently: better no model than one with random weights
        raise CheckpointError(f"{folder}: transformers did not fill {sample(missing)}.")
    return model


def check_weights(folder: Path, config: LlavaQwenConfig, supplied: Collection[str] = ()) -> WeightFiles:
    """Check from the headers of the weight files that they are complete and fit the config; return the headers.

    Raises:
        CheckpointError: naming the file or the tensors.
    """
    weights = read_weight_files(folder)
    if weights.problems:
        raise CheckpointError(weights.problems[0])
    found = {name: header for name, header in weights.tensors.items() if name not in supplied}
    differ = differences(found, meta_model(config))
    differ = replace(differ, missing=tuple(name for name in differ.missing if name not in supplied))
    if problems := differ.problems(str(folder), limit=4):
        raise CheckpointError(problems[0])
    if differ.unexpected:
        logger.warning("%s holds weights that the model does not use: %s", folder, sample(groups(differ.unexpected)))
    return weights


def read_generation_config(folder: Path) -> None:
    """Check generation_config.json if there is one. transformers would silently ignore a damaged file, and complain
    of an impossible value only after it has read all weights.

    Raises:
        CheckpointError: not a JSON object, or an impossible value.
    """
    path = folder / "generation_config.json"
    if not path.exists():
        return
    fields = read_json(path)
    try:
        GenerationConfig.from_dict(fields)
    except Exception as error:  # transformers passes on whatever impossible values lead to
        raise CheckpointError(f"{path} has an invalid value: {reason(error)}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: unreadable, not valid JSON, or something else than an object.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it again.") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} must hold a JSON object; download it again.")
    return fields
