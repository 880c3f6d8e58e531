"""Does a checkpoint hold the tensors that its config.json asks for? Answered on the meta device, without memory."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from llava.model.language_model.llava_qwen import LlavaQwenConfig, LlavaQwenForCausalLM
from llava.model.weight_files import TensorHeader

HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Differences:
    """How a checkpoint's tensors differ from a model's.

    Attributes:
        missing: names of tensors that the model needs.
        misshaped: one "name is (5,) instead of (32,)" for each tensor of another shape.
        unexpected: names of tensors that the model does not use.
    """

    missing: tuple[str, ...]
    misshaped: tuple[str, ...]
    unexpected: tuple[str, ...]


def meta_model(config: LlavaQwenConfig) -> LlavaQwenForCausalLM:
    """The model of a config with shapes but no storage, in float32. The config is not changed.

    Raises:
        UserError: the config asks for a part that this version does not know.
        TypeError, ValueError: values of the config that fit no model.
    """
    with torch.device("meta"):
        return LlavaQwenForCausalLM(copy.deepcopy(config))


def differences(found: Mapping[str, TensorHeader], model: LlavaQwenForCausalLM) -> Differences:
    """Compare tensor headers with a model. Tied embeddings need no head of their own."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = wanted.keys() - found.keys()
    if model.config.tie_word_embeddings:
        missing -= {HEAD}
    return Differences(
        missing=tuple(sorted(missing)),
        misshaped=tuple(
            f"{name} is {found[name].shape} instead of {wanted[name]}"
            for name in sorted(wanted.keys() & found.keys())
            if found[name].shape != wanted[name]
        ),
        unexpected=tuple(sorted(found.keys() - wanted.keys())),
    )


def explain_missing(missing: tuple[str, ...]) -> str:
    """What to do about missing tensors, where the names tell; otherwise empty."""
    if missing == (HEAD,):
        return (
            " If the model was trained with tied embeddings, set tie_word_embeddings to true in config.json "
            '(or overwrite_config={"tie_word_embeddings": True}).'
        )
    return ""
