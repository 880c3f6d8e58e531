"""Find, check and read the files of a checkpoint, with one clear error for everything that can be wrong with them."""

import json
import logging
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer

from llava.errors import CheckpointError, UserError
from llava.model.language_model.llava_qwen import LlavaQwenConfig, LlavaQwenForCausalLM

logger = logging.getLogger(__name__)

MODEL_TYPES = ("llava_qwen", "llava_qwen_zip", "llava")
ARCHITECTURES = ("LlavaQwenForCausalLM", "LlavaQwenZipForCausalLM")
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def resolve_folder(model_path: str) -> Path:
    """The local folder of a checkpoint, downloaded from the Hugging Face hub if `model_path` is not a folder.

    Raises:
        CheckpointError: neither a folder nor a hub name that can be reached.
    """
    folder = Path(model_path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or model_path.startswith((".", "/", "~")) or model_path.count("/") != 1:
        raise CheckpointError(f"{model_path} is not a folder with a checkpoint, nor a hub name like owner/name.")
    try:
        files = ["*.json", "*.txt", "*.safetensors"]
        local = Path(snapshot_download(model_path, allow_patterns=files))
        if not any((local / name).exists() for name in WEIGHT_FILES):
            local = Path(snapshot_download(model_path, allow_patterns=[*files, "*.bin"]))
    except (OSError, ValueError) as error:  # hub errors are OSErrors (network, cache) or ValueErrors (bad names)
        raise CheckpointError(
            f"{model_path} is not a local folder and could not be fetched from the Hugging Face hub "
            f"({_summary(error)}). Check the name and the network, or pass the folder of a downloaded copy."
        ) from error
    return local


def read_config(folder: Path) -> LlavaQwenConfig:
    """Read config.json of an original LLaVA checkpoint built on Qwen2.

    Raises:
        CheckpointError: missing or invalid file, or another kind of model.
    """
    path = folder / "config.json"
    if not path.exists():
        raise CheckpointError(f"{folder} has no config.json, so it is not a checkpoint in the original LLaVA layout.")
    fields = _read_json(path)
    architecture = (fields.get("architectures") or [ARCHITECTURES[0]])[0]
    model_type = fields.get("model_type")
    if architecture not in ARCHITECTURES or model_type not in MODEL_TYPES:
        raise CheckpointError(
            f"{path} describes a {model_type!r} model ({architecture}). Supported are checkpoints in the original "
            "LLaVA layout on Qwen2 (LlavaQwenForCausalLM), not the converted ones of transformers."
        )
    try:
        return LlavaQwenConfig.from_dict(fields)
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} has an invalid value: {_summary(error)}") from error


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
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception for damaged files
        raise CheckpointError(f"The tokenizer in {folder} cannot be loaded: {_summary(error)}") from error


def load_weights(
    folder: Path, config: LlavaQwenConfig, dtype: torch.dtype, device_map: Any, attn_implementation: str, **kwargs: Any
) -> LlavaQwenForCausalLM:
    """Build the model and fill it with the checkpoint's weights, all of them and nothing else.

    Raises:
        CheckpointError: files missing or damaged, weights missing or of another shape.
    """
    check_weight_files(folder)
    if (folder / "generation_config.json").exists():
        _read_json(folder / "generation_config.json")  # transformers would silently ignore a damaged one
    model: Any
    report: dict[str, Any]
    try:
        model, report = LlavaQwenForCausalLM.from_pretrained(  # type: ignore[misc]  # a pair, because of output_loading_info
            folder,
            config=config,
            dtype=dtype,
            device_map=device_map,
            attn_implementation=attn_implementation,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # collected in the report, and refused below
            **kwargs,
        )
    except UserError:
        raise
    except (TypeError, ValueError) as error:  # values of config.json that fit no model
        raise CheckpointError(f"The checkpoint in {folder} cannot be loaded: {_summary(error)}") from error
    except (SafetensorError, pickle.UnpicklingError, EOFError) as error:
        raise CheckpointError(
            f"A weight file in {folder} is damaged ({_summary(error)}); download it again."
        ) from error
    missing = [key for key in report["missing_keys"] if not (config.tie_word_embeddings and key == "lm_head.weight")]
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} of the model's weights: {_sample(missing)}.")
    if report["mismatched_keys"]:
        wrong = [f"{key} is {tuple(found)} instead of {tuple(due)}" for key, found, due in report["mismatched_keys"]]
        raise CheckpointError(f"Weights in {folder} do not fit its config.json: {_sample(wrong)}.")
    if report["unexpected_keys"]:
        logger.warning("%s holds weights that the model does not use: %s", folder, _sample(report["unexpected_keys"]))
    return model


def check_weight_files(folder: Path) -> None:
    """Check that all weight files exist and that every safetensors file is complete.

    Raises:
        CheckpointError: naming the file.
    """
    found = next((folder / name for name in WEIGHT_FILES if (folder / name).exists()), None)
    if found is None:
        raise CheckpointError(f"{folder} has no weights: expected model.safetensors or model.safetensors.index.json.")
    files = [found]
    if found.name.endswith(".index.json"):
        try:
            names = sorted(set(json.loads(found.read_text(encoding="utf-8"))["weight_map"].values()))
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{found} is not a valid weight index; download it again.") from error
        files = [folder / name for name in names]
    for file in files:
        if not file.exists():
            raise CheckpointError(f"{found} names {file.name}, which is missing; download the checkpoint again.")
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, "pt"):
                    pass
            except SafetensorError as error:
                raise CheckpointError(f"{file} is damaged or incomplete ({error}); download it again.") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it again.") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} must hold a JSON object; download it again.")
    return fields


def _sample(names: Iterable[str], limit: int = 4) -> str:
    ordered = sorted(names)
    rest = len(ordered) - limit
    return ", ".join(ordered[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _summary(error: BaseException) -> str:
    """The message of another library's error on one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "\u2026"
