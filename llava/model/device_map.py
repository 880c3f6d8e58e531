"""Where the parts of a model go: one device, a map given by the user, or spread over what the machine has."""

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate.utils import get_max_memory

from llava.errors import DeviceError
from llava.model.completeness import meta_model
from llava.model.language_model.llava_qwen import LlavaQwenConfig
from llava.model.memory import parameter_bytes

AUTOMATIC = ("auto", "balanced", "sequential")
"""`device_map`s that leave the choice to the machine: "auto" is "balanced"."""

OFFLOADED = ("cpu", "disk")

VISUAL = ("model.vision_tower", "model.mm_projector", "model.image_newline")
"""Parts that turn frames into embeddings: they stay together, on a device that computes."""

RESERVE = 0.9
"""Share of a device's free memory that weights may take; the rest is for activations and the key-value cache."""


def uses_gpu(device_map: Any) -> bool:
    """Whether any part of the model goes to a GPU.

    Raises:
        DeviceError: a GPU is asked for and there is none, or a name is no device.
    """
    if device_map is None or device_map in AUTOMATIC:
        return torch.cuda.is_available()
    wanted = list(device_map.values()) if isinstance(device_map, dict) else [device_map]
    kinds = {_device_type(value) for value in wanted if value != "disk"}
    if "cuda" in kinds and not torch.cuda.is_available():
        raise DeviceError(f'device_map={device_map!r} needs a CUDA GPU, and there is none; use device_map="cpu".')
    return "cuda" in kinds


def place(
    device_map: Any,
    config: LlavaQwenConfig,
    dtype: torch.dtype,
    bits: int | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
) -> Any:
    """The device map for transformers.

    Args:
        device_map: as `load_pretrained_model` takes it.
        dtype, bits: of the weights, to know their size; bits is None, 8 or 4.
        max_memory: bytes, or text such as "20GiB", per GPU index, "cpu" and "disk"; what is free where None.

    Raises:
        DeviceError: a map that leaves parts out, names unknown ones, or offloads what cannot be offloaded.
    """
    if isinstance(device_map, dict):
        model = meta_model(config)
        check_map(device_map, [name for name, _ in model.named_parameters()], bits)
        return device_map
    if device_map is not None and device_map not in AUTOMATIC:
        return device_map
    if not torch.cuda.is_available():
        return "cpu"
    memory = get_max_memory(dict(max_memory) if max_memory else None)
    gpus = {key: int(size * (1 if max_memory else RESERVE)) for key, size in memory.items() if isinstance(key, int)}
    sizes = parameter_bytes(meta_model(config), dtype.itemsize, bits)
    chosen = spread(sizes, gpus, int(memory.get("cpu", 0) * RESERVE), balanced=device_map != "sequential")
    if bits and not set(OFFLOADED).isdisjoint(chosen.values()):
        raise DeviceError(
            f"The {bits}-bit model needs {sum(sizes.values()) / 2**30:.1f} GiB of GPU memory, and "
            f"{sum(gpus.values()) / 2**30:.1f} GiB are free for weights. Quantised weights are not offloaded: free "
            "some memory or use more GPUs."
        )
    return chosen


def spread(sizes: Mapping[str, int], gpus: Mapping[int, int], cpu: int, balanced: bool) -> dict[str, int | str]:
    """Distribute a model over GPUs in the order of its layers, and offload to CPU and disk what does not fit.

    The visual parts and the token embeddings, which meet in the prompt, are on the first GPU. A tied head, which is
    not in `sizes`, stays with the embeddings.

    Args:
        sizes: bytes of each parameter by name.
        gpus: bytes that weights may take on each GPU, by its index; cpu: the same in main memory.
        balanced: give each GPU about the same share; otherwise fill one after the other.

    Returns:
        A device (GPU index, "cpu" or "disk") for each part of the model.
    """
    parts: dict[str, int] = {}
    for name, size in sizes.items():
        part = _part_of(name)
        parts[part] = parts.get(part, 0) + size
    first, last = min(gpus), max(gpus)
    together = [part for part in (*VISUAL, "model.embed_tokens") if part in parts]
    chosen: dict[str, int | str] = dict.fromkeys(together, first)
    chosen["model.rotary_emb"] = first
    if "lm_head" not in parts:
        chosen["lm_head"] = first
    share = math.ceil(sum(parts.values()) / len(gpus)) if balanced else sum(parts.values())
    devices: list[int | str] = [*sorted(gpus), "cpu", "disk"]
    room: dict[int | str, int] = {"cpu": cpu}
    for index, size in gpus.items():
        room[index] = size
    used: dict[int | str, int] = dict.fromkeys(devices, 0)
    used[first] = sum(parts[part] for part in together)

    current = 0
    for part, size in parts.items():
        if part in chosen:
            continue
        while (device := devices[current]) != "disk":
            full = device in gpus and device != last and used[device] >= share
            if not full and used[device] + size <= room[device]:
                break
            current += 1
        chosen[part] = device
        used[device] += size
    return chosen


def check_map(device_map: Mapping[str, Any], parameters: Iterable[str], bits: int | None) -> None:
    """Check a user's map against the model's parameters.

    Raises:
        DeviceError: naming the entry and what to write instead.
    """
    parameters = list(parameters)
    modules = {name.rpartition(".")[0] for name in parameters}
    known = {"", *parameters, "model.rotary_emb"}
    for module in modules:
        pieces = module.split(".")
        known |= {".".join(pieces[: end + 1]) for end in range(len(pieces))}
    for name in device_map:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            guess = f"; did you mean {near[0]!r}?" if near else ", as in model.layers.0, model.vision_tower or lm_head."
            raise DeviceError(f"device_map: the model has no part {name!r}{guess}")
        inside = next((other for other in device_map if other != name and _is_inside(other, name)), None)
        if inside is not None:
            raise DeviceError(f"device_map: {inside!r} is a part of {name!r}; name each part once.")
    homeless = [name for name in parameters if not any(_is_inside(name, part) for part in device_map)]
    if homeless:
        raise DeviceError(f"device_map: there is no device for {homeless[0]}; name every part of the model.")
    devices = set(map(str, device_map.values()))
    offloaded = {"disk"} if devices <= set(OFFLOADED) else set(OFFLOADED)  # without a GPU the CPU computes
    for part, device in device_map.items():
        if str(device) not in offloaded:
            continue
        if bits:
            raise DeviceError(f"device_map: {bits}-bit weights are not offloaded, and {part!r} goes to {device}.")
        if any(_is_inside(visual, part) or _is_inside(part, visual) for visual in VISUAL):
            raise DeviceError(
                f"device_map: {part!r} goes to {device}, from where only layers of the language model are fetched; "
                f"put {', '.join(VISUAL)} on a device that computes."
            )


def _device_type(value: Any) -> str:
    """ "cpu", "cuda" ...; a whole number is a GPU."""
    if isinstance(value, int) or str(value).isdecimal():
        return "cuda"
    try:
        return torch.device(value).type
    except (RuntimeError, TypeError) as error:
        raise DeviceError(
            f'device_map: {value!r} is no device; use "auto", "cpu", "cuda:0" or a map from parts to devices.'
        ) from error


def _part_of(parameter: str) -> str:
    """The part of the model that is placed as a whole: a decoder layer, or a child of the model."""
    pieces = parameter.split(".")
    return ".".join(pieces[: 1 if pieces[0] == "lm_head" else 3 if pieces[1] == "layers" else 2])


def _is_inside(name: str, part: str) -> bool:
    return part == "" or name == part or name.startswith(f"{part}.")
