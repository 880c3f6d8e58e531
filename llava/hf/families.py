"""Which family a model belongs to."""

from typing import Any

from llava.errors import UserError
from llava.hf.family import Family
from llava.hf.internvl import InternVL
from llava.hf.llava_next_video import LlavaNextVideo
from llava.hf.llava_onevision import LlavaOnevision
from llava.hf.qwen2_vl import Qwen2VL
from llava.hf.qwen3_vl import Qwen3VL
from llava.hf.smolvlm import SmolVLM
from llava.hf.video_llama_3 import VideoLlama3

FAMILIES: tuple[Family, ...] = (
    LlavaOnevision(),
    LlavaNextVideo(),
    Qwen2VL(),
    Qwen3VL(),
    InternVL(),
    VideoLlama3(),
    SmolVLM(),
)


def family_of(model: Any) -> Family:
    """The family of a model of transformers.

    Raises:
        UserError: none, with the supported ones and what this model lacks.
    """
    model_type: Any = getattr(getattr(model, "config", None), "model_type", None)
    by_type = {name: family for family in FAMILIES for name in family.model_types}
    family = by_type.get(model_type)
    missing = _missing(model, family or Family())
    if family is not None and not missing:
        return family
    if missing:
        reason = f"it has no {' and no '.join(missing)}"
    else:
        reason = f"where its video tokens are in the prompt is not known for model_type {model_type!r}"
    raise UserError(
        f"{type(model).__name__} does not support token compression: {reason}. Supported are the models of "
        f"llava.model.builder.load_pretrained_model and, of transformers, those with model_type "
        f"{', '.join(by_type)}; pass the model itself, without a wrapper or pipeline around it."
    )


def _missing(model: Any, family: Family) -> list[str]:
    """Parts that the mechanism needs and that a model does not have."""
    base = getattr(model, "base_model", None)
    missing = []
    if not hasattr(model, "prepare_inputs_for_generation"):
        missing.append("generate")
    if base is None or base is model:
        return [*missing, "inner model (base_model)"]
    if not hasattr(base, family.language_model):
        missing.append(f"base_model.{family.language_model}")
    if not hasattr(base, family.features):
        missing.append(f"base_model.{family.features}")
    if getattr(getattr(model, "config", None), family.placeholder, None) is None:
        missing.append(f"config.{family.placeholder}")
    return missing
