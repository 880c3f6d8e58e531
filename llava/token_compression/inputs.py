"""What methods may need besides the features: names, shapes and meaning, checked in one place.

    vision_attn     (frames, tokens_per_frame) attention that each patch receives in the tower's last layer used, the
                    mean over heads and queries, pooled as the features are
    vision_keys     (frames, tokens_per_frame, any) keys of that layer, the mean over heads, pooled likewise

`encode_images` of the model tree computes these; see llava/model/multimodal_encoder/signals.py.
"""

import torch
from torch import Tensor

from llava.errors import UserError

TRAILING = {"vision_attn": 0, "vision_keys": 1}
"""How many dimensions follow (frames, tokens_per_frame)."""


def checked(name: str, value: object, features: Tensor) -> object:
    """An input in float32 (float64 if it is) on the device of the features; what is not listed above, as it is.

    Raises:
        UserError: no floating-point tensor, another shape, NaN or infinity.
    """
    if name not in TRAILING:
        return value
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise UserError(f"Input {name!r} must be a floating-point tensor, got {type(value).__name__}.")
    if value.shape[:2] != features.shape[:2] or value.dim() != 2 + TRAILING[name]:
        expected = (*features.shape[:2], *["any"] * TRAILING[name])
        raise UserError(
            f"Input {name!r} must have the shape ({', '.join(map(str, expected))}) for features "
            f"{tuple(features.shape)}, got {tuple(value.shape)}."
        )
    if not value.isfinite().all():
        raise UserError(f"Input {name!r} contains NaN or infinity.")
    return value.to(features.device, torch.promote_types(value.dtype, torch.float32))
