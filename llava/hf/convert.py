"""LLaVA-OneVision between this package's layout, which is the original one, and that of transformers.

    model = to_transformers(own)      # LlavaQwenForCausalLM -> LlavaOnevisionForConditionalGeneration
    own = from_transformers(model)    # and back

Both hold the same weights, copied, and give the same logits for videos: for images too, where their crops are merged
the same way ("spatial_unpad" with an `anyres_max_9` aspect ratio).
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, Qwen2Config, SiglipVisionConfig

from llava.anyres import grid_resolutions
from llava.errors import UserError
from llava.model.language_model.llava_qwen import LlavaQwenConfig, LlavaQwenForCausalLM
from llava.model.multimodal_encoder.siglip_encoder import vision_config_of

NAMES = (
    ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    ("model.image_newline", "model.image_newline"),
    ("lm_head.", "lm_head."),
    ("model.", "model.language_model."),
)
"""Beginnings of parameter names here and in transformers; the first that fits counts."""

TEXT_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters"),
    *("use_sliding_window", "sliding_window", "max_window_layers", "attention_dropout", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range"),
)
VISION_FIELDS = (
    *("hidden_size", "intermediate_size", "num_attention_heads"),
    *("image_size", "patch_size", "hidden_act", "layer_norm_eps"),
)
ASPECT_RATIO = "anyres_max_9"
TOWER = "model.vision_tower."
TOWER_OF_OLD = "model.vision_tower.vision_model."
"""In transformers 5.0, where SigLIP has one level more."""


def to_transformers(
    model: LlavaQwenForCausalLM, image_token: int = 151646, video_token: int = 151647
) -> LlavaOnevisionForConditionalGeneration:
    """The model in the layout of transformers.

    Args:
        model: of this package.
        image_token, video_token: ids of the placeholders, which the original layout does not have; the defaults are
            those of llava-hf's checkpoints. The vocabulary must reach as far.

    Raises:
        UserError: transformers has no such model: another projector, pooling or newline, or no such ids.
    """
    config: Any = model.config
    expected = {
        "mm_projector_type": "mlp2x_gelu",
        "mm_spatial_pool_mode": "bilinear",
        "mm_newline_position": "one_token",
        "mm_use_zip": False,
    }
    defaults = {"mm_newline_position": "one_token", "mm_use_zip": False}
    for name, value in expected.items():
        found = getattr(config, name, defaults.get(name))
        if found != value:
            raise UserError(f"{name} is {found!r}, and LLaVA-OneVision in transformers has {value!r} alone.")
    if max(image_token, video_token) >= config.vocab_size:
        raise UserError(
            f"The placeholders {image_token} and {video_token} are outside of the vocabulary of {config.vocab_size}; "
            "choose ids inside of it that no text uses."
        )
    vision: Any = vision_config_of(config)
    converted = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            **_fields(vision, VISION_FIELDS),
            num_hidden_layers=vision.num_hidden_layers - 1,  # the last layer is not used
            vision_use_head=False,
        ),
        text_config=Qwen2Config(**_fields(config, TEXT_FIELDS)),
        image_token_index=image_token,
        video_token_index=video_token,
        image_grid_pinpoints=_pinpoints(config, vision.image_size),
        vision_aspect_ratio=ASPECT_RATIO,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=config.tie_word_embeddings,
    )
    return _filled(LlavaOnevisionForConditionalGeneration(converted), model, dict(NAMES))


def from_transformers(model: LlavaOnevisionForConditionalGeneration) -> LlavaQwenForCausalLM:
    """The model in the layout of this package.

    Raises:
        UserError: it has another language model than Qwen2, another tower than SigLIP, or uses other layers of it.
    """
    config: Any = model.config
    text, vision = config.text_config, config.vision_config
    if text.model_type != "qwen2" or vision.model_type != "siglip_vision_model" or config.vision_feature_layer != -1:
        raise UserError(
            f"This package has LLaVA-OneVision with Qwen2 on the last layer of SigLIP, not with {text.model_type} on "
            f"layer {config.vision_feature_layer} of {vision.model_type}."
        )
    fields = {
        **_fields(text, TEXT_FIELDS),
        "tie_word_embeddings": config.tie_word_embeddings,
        "vision_config": {**_fields(vision, VISION_FIELDS), "num_hidden_layers": vision.num_hidden_layers + 1},
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "mm_hidden_size": vision.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_newline_position": "one_token",
        "mm_spatial_pool_mode": "bilinear",
        "image_aspect_ratio": ASPECT_RATIO,
        "image_grid_pinpoints": [[width, height] for height, width in config.image_grid_pinpoints],
    }
    return _filled(LlavaQwenForCausalLM(LlavaQwenConfig(**fields)), model, {theirs: own for own, theirs in NAMES})


def _fields(config: Any, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


def _pinpoints(config: Any, side: int) -> list[list[int]]:
    """Sizes as (height, width), where the original layout has (width, height)."""
    sizes = getattr(config, "image_grid_pinpoints", None) or [[side, side]]
    return [[height, width] for width, height in grid_resolutions(sizes, side)]


def _filled(target: Any, source: Any, names: dict[str, str]) -> Any:
    """`target` with the weights of `source`, in its dtype, on its device, and in the same mode."""
    weights: dict[str, Tensor] = {}
    for name, tensor in source.state_dict().items():
        name = name.replace(TOWER_OF_OLD, TOWER)
        start = next(start for start in names if name.startswith(start))
        weights[names[start] + name.removeprefix(start)] = tensor
    target = target.to(next(source.parameters()).dtype)
    if any(name.startswith(TOWER_OF_OLD) for name in target.state_dict()):
        weights = {name.replace(TOWER, TOWER_OF_OLD): tensor for name, tensor in weights.items()}
    target.load_state_dict(weights)
    return target.to(source.device).train(source.training)
