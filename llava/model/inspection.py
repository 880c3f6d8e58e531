"""Everything that can be known of a checkpoint without loading it: would it load, and if not, all reasons why.

Each step is the very function that `load_pretrained_model` calls; only that one stops at the first problem.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from llava.errors import CheckpointError, UserError
from llava.model.adapter import is_partial
from llava.model.builder import base_folder
from llava.model.checkpoint import check_supported, load_tokenizer, read_config, read_generation_config
from llava.model.completeness import differences, groups
from llava.model.hub import describe
from llava.model.language_model.llava_qwen import LlavaQwenConfig, LlavaQwenForCausalLM
from llava.model.video_layout import VideoLayout, longest_prompt, video_layout
from llava.model.weight_files import WeightFiles, read_weight_files

T = TypeVar("T")


@dataclass
class Inspection:
    """A checkpoint that was looked at and not loaded.

    Attributes:
        name: as the user gave it.
        problems: one sentence for everything that `load_pretrained_model` refuses; empty if it would load.
        notes: what is odd but does not keep it from loading.
        weights: headers of the weight files.
        config, model: None where config.json cannot be used; the model has shapes but no storage.
        video: tokens of a video before compression; None for a text-only model or without a usable config.
    """

    name: str
    weights: WeightFiles
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    config: LlavaQwenConfig | None = None
    model: LlavaQwenForCausalLM | None = None
    video: VideoLayout | None = None


def inspect(name: str, num_frames: int | None = None) -> Inspection:
    """Look at the checkpoint in a folder or on the hub, reading no more of its weights than their headers.

    Args:
        name: as `load_pretrained_model` takes it.
        num_frames: frames of the video whose tokens are counted; None: the checkpoint's own number, 32 if it has none.

    Raises:
        CheckpointError: there is nothing to look at.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        weights = read_weight_files(folder)
    else:
        folder, weights = describe(name)
    if not weights.names and not is_partial(folder) and not (folder / "config.json").exists():
        raise CheckpointError(f"{name} is no checkpoint: it has neither a config.json nor weights.")
    found = Inspection(name, weights)
    _attempt(found, base_folder, folder)
    if not weights.names and is_partial(folder):
        return found  # what else it lacks is in its base
    found.config = _attempt(found, read_config, folder)
    tokenizer = _attempt(found, load_tokenizer, folder)
    _attempt(found, read_generation_config, folder)
    found.problems += weights.problems
    if found.config is not None:
        found.model = _attempt(found, check_supported, found.config, name)
    if found.model is not None:
        found.video = video_layout(found.config, num_frames)
        if weights.tensors or not weights.problems:
            _compare_tensors(found)
        _compare_lengths(found, tokenizer)
    return found


def _attempt(found: Inspection, step: Callable[..., T], *arguments: Any) -> T | None:
    """The result of a step of loading, or None where it was refused."""
    try:
        return step(*arguments)
    except UserError as error:
        found.problems.append(str(error))
        return None


def _compare_tensors(found: Inspection) -> None:
    """Names and shapes of the tensors in the files that could be read against those of the model."""
    assert found.model is not None
    differ = differences(found.weights.tensors, found.model)
    differ = replace(differ, missing=tuple(name for name in differ.missing if name not in found.weights.lost))
    found.problems += differ.problems(found.name)
    if differ.unexpected:
        found.notes.append(f"The model does not use {', '.join(groups(differ.unexpected))}.")


def _compare_lengths(found: Inspection, tokenizer: Any) -> None:
    """Numbers in different files that should fit each other."""
    config, video = found.config, found.video
    assert config is not None
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        found.notes.append(
            f"The tokenizer has {len(tokenizer)} tokens, but the model embeds {config.vocab_size}: the last ones fail."
        )
    limit = longest_prompt(config)
    if video is not None and video.tokens + video.newlines > limit:
        found.notes.append(
            f"{video.frames} frames are {video.tokens + video.newlines} tokens, but the model reads {limit}: without "
            "compression they do not fit."
        )
