"""The command `llava-scissor check`: would a checkpoint load, what is in it, and what does it need?

The report is made of `facts`, which `--json` prints as they are. GB and MB are powers of ten.
"""

import dataclasses
import json
import math
from collections import Counter
from typing import Any

import torch
from accelerate.utils import get_max_memory

from llava.assets import checkpoint_path
from llava.model.device_map import RESERVE
from llava.model.inspection import Inspection, inspect
from llava.model.llava_arch import checkpoint_compression
from llava.model.memory import cache_bytes, parameter_counts, weight_bytes
from llava.model.video_layout import VideoLayout, longest_prompt

CACHE_RATIOS = (1.0, 0.1)
"""Retention ratios for which the key-value cache is computed."""


def check(name: str, num_frames: int | None = None, as_json: bool = False) -> int:
    """Print the report on a checkpoint, and return the exit status: 0 if it would load, 2 if not.

    Raises:
        CheckpointError: there is no checkpoint of that name.
    """
    found = inspect(checkpoint_path(name), num_frames)
    known = facts(found) | {"checkpoint": name}
    print(json.dumps(known, indent=2) if as_json else report(known))
    return 0 if known["loads"] else 2


def facts(found: Inspection) -> dict[str, Any]:
    """What is known of a checkpoint, ready for JSON; sizes are in bytes. Parts that cannot be known are None."""
    weights = found.weights
    return {
        "checkpoint": found.name,
        "loads": not found.problems,
        "problems": found.problems,
        "notes": found.notes,
        "files": {
            "names": weights.names,
            "bytes": sum(header.bytes for header in weights.tensors.values()),
            "dtypes": dict(
                Counter(str(h.dtype).removeprefix("torch.") for h in weights.tensors.values()).most_common()
            ),
        },
        "model": _model_facts(found),
        "video": _video_facts(found.video),
        "memory": _memory_facts(found),
    }


def _model_facts(found: Inspection) -> dict[str, Any] | None:
    config, model = found.config, found.model
    if config is None or model is None:
        return None
    tower, compression = model.get_vision_tower(), checkpoint_compression(config)
    counts = parameter_counts(model)
    return {
        "architecture": (config.architectures or [type(model).__name__])[0],
        "parameters": {**counts, "total": sum(counts.values())},
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "tied_embeddings": config.tie_word_embeddings,
        "context": longest_prompt(config),
        "vision_tower": tower
        and {
            "name": config.mm_vision_tower,
            "image_size": tower.config.image_size,
            "patches": tower.num_patches,
            "layers": len(tower.vision_tower.vision_model.encoder.layers),
        },
        "projector": tower and getattr(config, "mm_projector_type", "linear"),
        "compression": compression
        and {name: getattr(compression, name) for name in ("similarity_threshold", "error_tolerance", "images")},
    }


def _video_facts(video: VideoLayout | None) -> dict[str, int] | None:
    return None if video is None else {**dataclasses.asdict(video), "tokens": video.tokens}


def _memory_facts(found: Inspection) -> dict[str, Any] | None:
    if found.model is None:
        return None
    weights, caches = weight_bytes(found.model), {}
    if found.video is not None:
        for ratio in CACHE_RATIOS:
            tokens = max(1, round(ratio * found.video.tokens))
            caches[f"{100 * ratio:g} %"] = {"tokens": tokens, "bytes": cache_bytes(found.config, tokens)}
    cache = max((cache["bytes"] for cache in caches.values()), default=0)
    return {
        "weights": weights,
        "cache": caches,
        "devices": [
            {
                "name": name,
                "free": free,
                "fits": [kind for kind, size in weights.items() if size + cache <= RESERVE * free],
            }
            for name, free in _free_memory().items()
        ],
    }


def _free_memory() -> dict[str, int]:
    """Free bytes of each GPU, of all of them together if there are several, and of the main memory."""
    free = get_max_memory()
    gpus = {f"cuda:{i} ({torch.cuda.get_device_name(i)})": free[i] for i in free if isinstance(i, int)}
    together = {f"{len(gpus)} GPUs together": sum(gpus.values())} if len(gpus) > 1 else {}
    return gpus | together | {"cpu": free["cpu"]}


def report(known: dict[str, Any]) -> str:
    """The facts as text."""
    problems = known["problems"]
    would = f"would not load: {len(problems)} problem{'s' * (len(problems) > 1)}" if problems else "would load"
    sections = [[f"{known['checkpoint']} {would}."], [f"- {problem}" for problem in problems]]
    sections.append(_aligned(_model_rows(known)))
    if known["memory"]:
        sections.append(_aligned(_memory_rows(known["memory"])))
    sections.append([f"Note: {note}" for note in known["notes"]])
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _model_rows(known: dict[str, Any]) -> list[tuple[str, str]]:
    files, model, video = known["files"], known["model"], known["video"]
    rows = []
    if files["names"]:
        count = f"{len(files['names'])} files" if len(files["names"]) > 1 else files["names"][0]
        rows.append(("weights", f"{count}, {_size(files['bytes'])} of {', '.join(files['dtypes']) or 'nothing'}"))
    if model is None:
        return rows
    parameters, tower, zipped = model["parameters"], model["vision_tower"], model["compression"]
    rows = [("model", f"{model['architecture']}, {_count(parameters['total'])} parameters"), *rows]
    rows.append(
        (
            "language model",
            f"{_count(parameters['language model'])}: {model['layers']} layers of width {model['hidden_size']:,}, "
            f"{model['vocab_size']:,} tokens{', tied' * model['tied_embeddings']}; reads {model['context']:,} tokens",
        )
    )
    if tower:
        rows += [
            (
                "vision tower",
                f"{_count(parameters['vision tower'])}: {tower['name']}, {tower['layers']} layers; "
                f"{tower['image_size']} x {tower['image_size']} pixels are {tower['patches']:,} patches",
            ),
            ("projector", f"{_count(parameters['projector'])}: {model['projector']}"),
            (
                "video",
                f"{video['frames']} frames of {video['tokens_per_frame']} tokens: {video['tokens']:,} before "
                f"compression, and {video['newlines']:,} newline{'s' * (video['newlines'] != 1)}",
            ),
        ]
    rows.append(
        (
            "compression",
            f"similarity_threshold {zipped['similarity_threshold']:g}, error_tolerance {zipped['error_tolerance']:g}"
            if zipped
            else "none in the checkpoint",
        )
    )
    return rows


def _memory_rows(memory: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [(f"weights in {kind}", _size(size)) for kind, size in memory["weights"].items()]
    for ratio, cache in memory["cache"].items():
        rows.append((f"cache at {ratio}", f"{_size(cache['bytes'])} for {cache['tokens']:,} video tokens, in 16 bits"))
    for device in memory["devices"]:
        fits = ", ".join(device["fits"]) or "no weights of this model"
        rows.append((f"{device['name']}", f"{_size(device['free'])} free: room for {fits}"))
    return rows


def _aligned(rows: list[tuple[str, str]]) -> list[str]:
    width = max((len(label) for label, _ in rows), default=0)
    return [f"{label:<{width}}  {text}" for label, text in rows]


def _size(count: int) -> str:
    unit, name = (1e9, "GB") if count >= 1e8 else (1e6, "MB") if count >= 1e5 else (1e3, "kB")
    return f"{count / unit:,.1f} {name}"


def _count(parameters: int) -> str:
    unit, name = (1e9, "B") if parameters >= 1e9 else (1e6, "M")
    return f"{parameters / unit:.{max(0, 2 - int(math.log10(parameters / unit)))}f} {name}"
