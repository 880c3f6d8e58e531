"""What methods may need besides the features: names, shapes and meaning, checked in one place.

    vision_attn     (frames, tokens_per_frame) attention that each patch receives in the tower's last layer used, the
                    mean over heads and queries, pooled as the features are
    vision_keys     (frames, tokens_per_frame, any) keys of that layer, the mean over heads, pooled likewise
    vision_attn_wide, vision_keys_wide
                    the same as if that layer had a single head
    map_attn        (frames, tokens_per_frame) attention of SigLIP's pooling head, the mean over heads, pooled likewise
    map_embed       (frames, any) the embedding that this head makes of a frame
    patches         (frames, patches, any) a video's projected patches, before they are pooled to the features
    vision_attn_shallow, vision_attn_deep
                    (frames, patches) attention that each of these patches receives in an early layer, and in the one
                    before the last

`encode_images` of the model tree computes these; see llava/model/multimodal_encoder/signals.py.
"""

import torch
from torch import Tensor

from llava.errors import UserError

SHAPES = {
    "vision_attn": ("frames", "tokens"),
    "vision_keys": ("frames", "tokens", "any"),
    "vision_attn_wide": ("frames", "tokens"),
    "vision_keys_wide": ("frames", "tokens", "any"),
    "map_attn": ("frames", "tokens"),
    "map_embed": ("frames", "any"),
    "patches": ("frames", "patches", "any"),
    "vision_attn_shallow": ("frames", "patches"),
    "vision_attn_deep": ("frames", "patches"),
}


def checked(name: str, value: object, features: Tensor) -> object:
    """An input in float32 (float64 if it is) on the device of the features; what is not listed above, as it is.

    Raises:
        UserError: no floating-point tensor, another shape, NaN or infinity.
    """
    if name not in SHAPES:
        return value
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise UserError(f"Input {name!r} must be a floating-point tensor, got {type(value).__name__}.")
    sizes: dict[str, object] = {"frames": features.shape[0], "tokens": features.shape[1]}
    expected = [sizes.get(what, what) for what in SHAPES[name]]
    if value.dim() != len(expected) or any(
        size not in (own, "any", "patches") for own, size in zip(value.shape, expected, strict=True)
    ):
        raise UserError(
            f"Input {name!r} must have the shape ({', '.join(map(str, expected))}) for features "
            f"{tuple(features.shape)}, got {tuple(value.shape)}."
        )
    if not value.isfinite().all():
        raise UserError(f"Input {name!r} contains NaN or infinity.")
    return value.to(features.device, torch.promote_types(value.dtype, torch.float32)).contiguous()
