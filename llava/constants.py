"""Token indices and placeholder strings shared with every LLaVA checkpoint and script."""

IGNORE_INDEX = -100
"""Label of a position that does not enter the loss."""

IMAGE_TOKEN_INDEX = -200
"""Stands in `input_ids` where the features of one image or video are inserted."""

DEFAULT_IMAGE_TOKEN = "<image>"
DEFAULT_IMAGE_PATCH_TOKEN = "<im_patch>"
DEFAULT_IM_START_TOKEN = "<im_start>"
DEFAULT_IM_END_TOKEN = "<im_end>"
IMAGE_PLACEHOLDER = "<image-placeholder>"
