"""Does a checkpoint hold the tensors that its config.json asks for? Answered on the meta device, without memory."""

import copy
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from llava.errors import CheckpointError, UserError
from llava.model.error_text import reason, sample
from llava.model.language_model.llava_qwen import LlavaQwenConfig, LlavaQwenForCausalLM
from llava.model.weight_files import TensorHeader

HEAD = "lm_head.weight"

_LAYER = re.compile(r"(.*\blayers)\.(\d+)\.(.*)")


@dataclass(frozen=True)
class Differences:
    """How a checkpoint's tensors differ from a model's.

    Attributes:
        missing: names of tensors that the model needs.
        misshaped: for the name of each tensor of another shape, "is (5,) instead of (32,)".
        unexpected: names of tensors that the model does not use.
    """

    missing: tuple[str, ...]
    misshaped: dict[str, str]
    unexpected: tuple[str, ...]

    def problems(self, where: str, limit: int | None = None) -> list[str]:
        """A sentence about what is missing and one about what is misshaped, with at most `limit` groups each."""
        problems = []
        if self.missing:
            names = sample(groups(self.missing), limit)
            problems.append(
                f"{where} lacks {len(self.missing)} of the model's weights: {names}.{_explain_missing(self.missing)}"
            )
        if self.misshaped:
            names = sample(groups(self.misshaped, self.misshaped), limit)
            problems.append(f"Weights in {where} do not fit its config.json: {names}.")
        return problems


def meta_model(config: LlavaQwenConfig) -> LlavaQwenForCausalLM:
    """The model of a config with shapes but no storage, in float32. The config is not changed.

    Raises:
        UserError: the config asks for a part that this version does not know, or its values fit no model.
    """
    try:
        with torch.device("meta"):
            return LlavaQwenForCausalLM(copy.deepcopy(config))
    except UserError:
        raise
    except Exception as error:  # transformers passes on whatever impossible values lead to
        raise CheckpointError(f"config.json fits no model: {reason(error)}") from error


def differences(found: Mapping[str, TensorHeader], model: LlavaQwenForCausalLM) -> Differences:
    """Compare tensor headers with a model. Tied embeddings need no head of their own."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = wanted.keys() - found.keys()
    if model.config.tie_word_embeddings:
        missing -= {HEAD}
    return Differences(
        missing=tuple(sorted(missing)),
        misshaped={
            name: f"is {found[name].shape} instead of {wanted[name]}"
            for name in sorted(wanted.keys() & found.keys())
            if found[name].shape != wanted[name]
        },
        unexpected=tuple(sorted(found.keys() - wanted.keys())),
    )


def groups(names: Iterable[str], remarks: Mapping[str, str] | None = None) -> list[str]:
    """Names of tensors, shortened to one entry per module, and to one for layers in a row with the same tensors.

    Args:
        remarks: what to say of each tensor; of a group, that of its first tensor is given.
    """
    modules: dict[tuple[str, int], list[str]] = defaultdict(list)  # by module and number of the layer, -1 for none
    for name in sorted(names):
        layer = _LAYER.fullmatch(name)
        if layer:
            modules[layer[1], int(layer[2])].append(layer[3])
        else:
            module, _, tensor = name.rpartition(".")
            modules[module, -1].append(tensor)

    runs: list[tuple[str, int, int, list[str]]] = []  # module, first and last layer, tensors in each
    for (module, number), tensors in sorted(modules.items()):
        if number > 0 and runs and (runs[-1][0], runs[-1][2], runs[-1][3]) == (module, number - 1, tensors):
            runs[-1] = (module, runs[-1][1], number, tensors)
        else:
            runs.append((module, number, number, tensors))
    return [_entry(*run, remarks or {}) for run in runs]


def _entry(module: str, first: int, last: int, tensors: list[str], remarks: Mapping[str, str]) -> str:
    path = module if first < 0 else f"{module}.{first}"
    example = f"{path}.{tensors[0]}".lstrip(".")
    described = f"{example} {remarks[example]}" if remarks else example
    count = len(tensors) * (last - first + 1)
    if count == 1:
        return described
    span = path if first == last else f"{path} to {last}"
    return f"{span} ({count} tensors{f', such as {described}' if remarks else ''})"


def _explain_missing(missing: tuple[str, ...]) -> str:
    """What to do about missing tensors, where the names tell; otherwise empty."""
    if missing == (HEAD,):
        return (
            " If the model was trained with tied embeddings, set tie_word_embeddings to true in config.json "
            '(or overwrite_config={"tie_word_embeddings": True}).'
        )
    return ""
