"""What a checkpoint's weight files hold, read from their headers: no tensor is loaded, no pickled code is run."""

import json
import math
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import check_torch_load_is_safe

from llava.errors import CheckpointError
from llava.model.error_text import one_line, sample

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Where weights can be, in the order in which they are looked for; an index names the shards."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names of dtypes in a safetensors header, as far as checkpoints use them."""


@dataclass(frozen=True)
class TensorHeader:
    """Shape and dtype of a stored tensor; `dtype` is a torch dtype, or the header's own name of one that is not."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str

    @property
    def bytes(self) -> int:
        """Bytes of the tensor in the file; 0 for a dtype that torch does not have."""
        return math.prod(self.shape) * self.dtype.itemsize if isinstance(self.dtype, torch.dtype) else 0


@dataclass
class WeightFiles:
    """The weight files of one checkpoint.

    Attributes:
        names: file names, as the index names them.
        tensors: header of every tensor in the files that could be read.
        problems: one sentence for each file that is missing or cannot be read.
        lost: names of the tensors that the index places in such files.
    """

    names: list[str] = field(default_factory=list)
    tensors: dict[str, TensorHeader] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    lost: set[str] = field(default_factory=set)


def read_weight_files(folder: Path) -> WeightFiles:
    """Read the headers of all weight files of a checkpoint; what is wrong with them is collected, not raised."""
    return collect_headers(folder, lambda name: (folder / name).exists(), lambda name: read_header(folder / name))


def collect_headers(
    folder: Path, exists: Callable[[str], bool], read: Callable[[str], dict[str, TensorHeader]]
) -> WeightFiles:
    """What `read_weight_files` does, for weight files that need not be in the folder itself.

    Args:
        folder: where the index is, if there is one.
        exists: whether the checkpoint has a file of this name.
        read: the headers in a file of this name; a file that it refuses with a CheckpointError is a problem.
    """
    found = next(filter(exists, WEIGHT_FILES), None)
    if found is None:
        return WeightFiles(
            problems=[f"{folder} has no weights: expected model.safetensors or model.safetensors.index.json."]
        )
    weights = WeightFiles(names=[found])
    file_of: dict[str, str] = {}  # by tensor
    try:
        if found.endswith(".index.json"):
            file_of = read_index(folder / found)
            weights.names = sorted(set(file_of.values()))
    except CheckpointError as error:
        weights.problems.append(str(error))
        return weights
    for name in weights.names:
        try:
            if not exists(name):
                raise CheckpointError(
                    f"{folder / found} names {name}, which is missing; download the checkpoint again."
                )
            weights.tensors |= read(name)
        except CheckpointError as error:
            weights.problems.append(str(error))
            weights.lost |= {tensor for tensor, file in file_of.items() if file == name}
    return weights


def read_index(index: Path) -> dict[str, str]:
    """The file of each tensor in an index.

    Raises:
        CheckpointError: not an index, or one that names files outside its folder.
    """
    try:
        file_of = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"].items())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a valid weight index; download it again.") from error
    outside = [name for name in file_of.values() if not isinstance(name, str) or Path(name).name != name]
    if outside or not file_of:
        raise CheckpointError(
            f"{index} is not a valid weight index: it names {sample(map(str, outside)) or 'no file'}."
        )
    return file_of


def read_header(file: Path) -> dict[str, TensorHeader]:
    """The tensors of one weight file by name.

    Raises:
        CheckpointError: damaged or incomplete file, or a pickle that holds more than tensors.
    """
    if file.suffix == ".safetensors":
        return _safetensors_header(file)
    return {name: TensorHeader(tuple(tensor.shape), tensor.dtype) for name, tensor in load_pickled(file).items()}


def _safetensors_header(file: Path) -> dict[str, TensorHeader]:
    headers = {}
    try:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # not a mapping
                part = opened.get_slice(name)
                dtype = part.get_dtype()
                headers[name] = TensorHeader(tuple(part.get_shape()), DTYPES.get(dtype, dtype))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or incomplete ({error}); download it again.") from error
    return headers


def load_pickled(file: Path, device: str = "meta") -> dict[str, torch.Tensor]:
    """The tensors of a `.bin` file, without running any code that is pickled in it.

    Args:
        file: written by `torch.save`.
        device: where the tensors go; "meta" reads shapes and dtypes only.

    Raises:
        CheckpointError: damaged file, content other than named tensors, or a torch older than 2.6, whose
            `weights_only` can be deceived (CVE-2025-32434).
    """
    try:
        check_torch_load_is_safe()
        content = torch.load(file, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code is None:
            raise CheckpointError(f"{file} is damaged or was not written by torch.save; download it again.") from error
        raise CheckpointError(
            f"{file} holds more than tensors: loading it would run {code[1]}, and nothing pickled is run here. Get the "
            "checkpoint as safetensors, or convert the file to safetensors where you trust its origin."
        ) from error
    except Exception as error:  # whatever damaged bytes lead to, and an old torch
        raise CheckpointError(f"{file} cannot be read ({one_line(error)}); download it again.") from error
    if not isinstance(content, Mapping) or not all(map(_is_named_tensor, content.items())):
        raise CheckpointError(f"{file} does not hold tensors by name, so it is no weight file of a checkpoint.")
    return dict(content)


def _is_named_tensor(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], torch.Tensor)
