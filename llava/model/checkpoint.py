"""Find, check and read the files of a checkpoint, with one clear error for everything that can be wrong with them."""

import json
import logging
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoTokenizer

from llava.errors import CheckpointError, UserError
from llava.model.completeness import differences, explain_missing, meta_model
from llava.model.error_text import one_line, sample
from llava.model.language_model.llava_qwen import LlavaQwenConfig, LlavaQwenForCausalLM
from llava.model.multimodal_encoder.siglip_encoder import PUBLISHED_TOWERS
from llava.model.weight_files import WEIGHT_FILES, WeightFiles, read_weight_files

logger = logging.getLogger(__name__)

MODEL_TYPES = ("llava_qwen", "llava_qwen_zip", "llava")
ARCHITECTURES = ("LlavaQwenForCausalLM", "LlavaQwenZipForCausalLM")


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
            f"({one_line(error)}). Check the name and the network, or pass the folder of a downloaded copy."
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
    fields = read_json(path)
    architecture = (fields.get("architectures") or [ARCHITECTURES[0]])[0]
    model_type = fields.get("model_type")
    if architecture not in ARCHITECTURES or model_type not in MODEL_TYPES:
        raise CheckpointError(
            f"{path} describes a {model_type!r} model ({architecture}). Supported are checkpoints in the original "
            "LLaVA layout on Qwen2 (LlavaQwenForCausalLM), not the converted ones of transformers."
        )
    if fields.get("quantization_config") is not None:
        raise CheckpointError(
            f"{path} describes weights that were saved quantised; load the original checkpoint with load_8bit=True or "
            "load_4bit=True instead."
        )
    try:
        config = LlavaQwenConfig.from_dict(fields)
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} has an invalid value: {one_line(error)}") from error
    check_supported(config, str(path))
    return config


def check_supported(config: LlavaQwenConfig, where: str) -> None:
    """Refuse settings that this version does not follow; a tower named by a local path gets its published name.

    Raises:
        CheckpointError: naming the setting.
    """
    if getattr(config, "mm_use_im_start_end", False):
        raise CheckpointError(f"{where} wraps images in <im_start> and <im_end> tokens, which is not supported.")
    if getattr(config, "add_faster_video", False):
        raise CheckpointError(f"{where} adds a second stream of video tokens (add_faster_video): not supported.")
    tower = getattr(config, "mm_vision_tower", None)
    published = {name.rpartition("/")[2]: name for name in PUBLISHED_TOWERS}
    if isinstance(tower, str):
        config.mm_vision_tower = published.get(tower.rstrip("/").rpartition("/")[2], tower)


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
    except UserError:
        raise
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
    try:
        model = meta_model(config)
    except UserError:
        raise
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise CheckpointError(f"The config.json in {folder} fits no model: {one_line(error)}") from error
    found = {name: header for name, header in weights.tensors.items() if name not in supplied}
    differ = differences(found, model)
    missing = tuple(name for name in differ.missing if name not in supplied)
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the model's weights: {sample(missing)}.{explain_missing(missing)}"
        )
    if differ.misshaped:
        raise CheckpointError(f"Weights in {folder} do not fit its config.json: {sample(differ.misshaped)}.")
    if differ.unexpected:
        logger.warning("%s holds weights that the model does not use: %s", folder, sample(differ.unexpected))
    return weights


def read_generation_config(folder: Path) -> None:
    """Check generation_config.json if there is one: transformers would silently ignore a damaged file.

    Raises:
        CheckpointError: not a JSON object.
    """
    if (folder / "generation_config.json").exists():
        read_json(folder / "generation_config.json")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: not valid JSON, or something else than an object.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it again.") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} must hold a JSON object; download it again.")
    return fields
