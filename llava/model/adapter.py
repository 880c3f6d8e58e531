"""Checkpoints that hold only what was trained: a projector, or LoRA weights. They need the model they started from.

A projector-only folder holds `mm_projector.bin`; a LoRA folder `adapter_config.json` with the adapter's weights, and
`non_lora_trainables.bin` for whatever else was trained. Both carry their own config.json.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils import is_peft_available

from llava.errors import CheckpointError, DeviceError
from llava.model.error_text import one_line, sample
from llava.model.weight_files import load_pickled, read_header

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
TRAINED_PARTS = ("mm_projector.bin", "non_lora_trainables.bin")


def is_partial(folder: Path) -> bool:
    """Whether a folder holds a projector or LoRA weights."""
    return any((folder / name).exists() for name in (ADAPTER_CONFIG, *TRAINED_PARTS))


def has_lora(folder: Path) -> bool:
    """Whether a folder holds LoRA weights."""
    return (folder / ADAPTER_CONFIG).exists()


def read_trained_parts(folder: Path) -> dict[str, torch.Tensor]:
    """The full tensors of a partial checkpoint, on the CPU, under the names that they have in the model.

    Raises:
        CheckpointError: the folder is no partial checkpoint, or its file is damaged.
    """
    if not is_partial(folder):
        raise CheckpointError(
            f"model_base is for checkpoints with only a projector ({TRAINED_PARTS[0]}) or LoRA weights "
            f"({ADAPTER_CONFIG}), and {folder} holds neither; leave model_base out."
        )
    parts: dict[str, torch.Tensor] = {}
    for file in (folder / name for name in TRAINED_PARTS):
        if file.exists():
            parts |= {_model_name(name): tensor for name, tensor in load_pickled(file, "cpu").items()}
    return parts


def insert(parts: Mapping[str, torch.Tensor], model: Any, folder: Path) -> None:
    """Overwrite parameters of a loaded model.

    Raises:
        CheckpointError: a name or a shape that the model does not have.
        DeviceError: a parameter is offloaded.
    """
    parameters = dict(model.named_parameters())
    unknown = [name for name in parts if name not in parameters]
    if unknown:
        raise CheckpointError(f"{folder} holds weights that its model_base does not have: {sample(unknown)}.")
    wrong = [
        f"{name} is {tuple(tensor.shape)} instead of {tuple(parameters[name].shape)}"
        for name, tensor in parts.items()
        if tensor.shape != parameters[name].shape
    ]
    if wrong:
        raise CheckpointError(f"Weights in {folder} do not fit its config.json: {sample(wrong)}.")
    for name, tensor in parts.items():
        if parameters[name].is_meta:
            raise DeviceError(f"device_map offloads {name}, which {folder} replaces; keep it on a device.")
        parameters[name].data.copy_(tensor)


def merge_lora(model: Any, folder: Path) -> Any:
    """The model with the LoRA weights of a folder added to its own; the model itself where there are none.

    Raises:
        CheckpointError: the adapter is damaged, fits another model, or peft is not installed.
    """
    if not has_lora(folder):
        return model
    if not is_peft_available():
        raise CheckpointError(f"{folder} holds LoRA weights, which are read by peft: pip install peft.")
    from peft import PeftModel

    _check_lora_layers(model, folder)
    try:
        with_adapter = PeftModel.from_pretrained(model, str(folder), local_files_only=True)
    except Exception as error:  # peft passes on whatever a damaged adapter_config.json leads to
        raise CheckpointError(f"The LoRA weights in {folder} cannot be added: {one_line(error)}") from error
    return with_adapter.merge_and_unload(safe_merge=True)


def _check_lora_layers(model: Any, folder: Path) -> None:
    """peft ignores weights of layers that the model does not have; here they are an error, as is an absent file."""
    file = next((folder / name for name in ADAPTER_WEIGHTS if (folder / name).exists()), None)
    if file is None:
        raise CheckpointError(f"{folder} has an {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS[0]}; download it again.")
    layers = {_model_name(name.partition(".lora_")[0]) for name in read_header(file) if ".lora_" in name}
    unknown = layers - {name for name, _ in model.named_modules()}
    if unknown or not layers:
        raise CheckpointError(f"{file} does not fit its model_base: it is for {sample(unknown) or 'no layer'}.")


def _model_name(name: str) -> str:
    """Without the prefixes of the wrappers that training puts around the model."""
    name = name.removeprefix("base_model.model.")
    return name.removeprefix("model.") if name.startswith("model.model.") else name
