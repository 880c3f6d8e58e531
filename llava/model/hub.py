"""Checkpoints on the Hugging Face hub: whole ones, or only what describes them."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

from llava.errors import CheckpointError, UserError
from llava.model.error_text import one_line
from llava.model.weight_files import DTYPES, WEIGHT_FILES, TensorHeader, WeightFiles, collect_headers, read_weight_files

DESCRIPTION = ("*.json", "*.txt")
"""Everything of a checkpoint but its weights: config, index of the weights, tokenizer."""


def resolve_folder(model_path: str) -> Path:
    """The local folder of a checkpoint, downloaded from the Hugging Face hub if `model_path` is not a folder.

    Raises:
        CheckpointError: neither a folder nor a hub name that can be reached.
    """
    if Path(model_path).expanduser().is_dir():
        return Path(model_path).expanduser()
    local = _download(model_path, [*DESCRIPTION, "*.safetensors"])
    if not any((local / name).exists() for name in WEIGHT_FILES):
        local = _download(model_path, [*DESCRIPTION, "*.bin"])
    return local


def describe(name: str) -> tuple[Path, WeightFiles]:
    """A local folder with everything but the weights of a checkpoint on the hub, and the headers of its weights.

    Of the weights only the headers are fetched, and nothing where all of them are in the local cache.

    Raises:
        CheckpointError: not a hub name, or one that cannot be reached.
        UserError: pickled weights, whose shapes are all over the file.
    """
    folder = _download(name, DESCRIPTION)
    weights = read_weight_files(folder)
    if not weights.problems:
        return folder, weights
    hub = HfApi()
    try:
        files = set(hub.list_repo_files(name, revision=folder.name))
        return folder, collect_headers(folder, files.__contains__, lambda file: _header(hub, name, file, folder.name))
    except UserError:
        raise
    except Exception as error:  # those of the HTTP library, which the hub's own do not all cover
        raise _unreachable(name, error) from error


def _header(hub: HfApi, name: str, file: str, revision: str) -> dict[str, TensorHeader]:
    if not file.endswith(".safetensors"):
        raise UserError(
            f"{name} holds pickled weights ({file}), whose shapes cannot be read without all of them; download it "
            f"(hf download {name}) and check the folder."
        )
    try:
        tensors = hub.parse_safetensors_file_metadata(name, file, revision=revision).tensors
    except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise CheckpointError(f"{file} of {name} on the hub is damaged: {one_line(error)}") from error
    return {
        tensor: TensorHeader(tuple(header.shape), DTYPES.get(header.dtype, header.dtype))
        for tensor, header in tensors.items()
    }


def _download(name: str, files: Sequence[str]) -> Path:
    if Path(name).expanduser().exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CheckpointError(f"{name} is not a folder with a checkpoint, nor a hub name like owner/name.")
    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except (OSError, ValueError) as error:  # hub errors are OSErrors (network, cache) or ValueErrors (bad names)
        raise _unreachable(name, error) from error


def _unreachable(name: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{name} is not a local folder and could not be fetched from the Hugging Face hub ({one_line(error)}). "
        "Check the name and the network, or pass the folder of a downloaded copy."
    )
