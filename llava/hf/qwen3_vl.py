"""Qwen3-VL, dense and mixture of experts.

Every t-th part of a video is a group of h*w / m^2 tokens between a start and an end token, after its time as text; the
grid still is one (t, h, w) for the video. Positions are triples, as in Qwen2-VL. Besides the embeddings, the language
model gets features of the tower's inner layers ("deepstack") for every visual token: for a kept token it gets the
mean of those of the tokens that went into it, which are its own where tokens are only selected.
"""

from llava.hf.qwen2_vl import Qwen2VL


class Qwen3VL(Qwen2VL):
    """See the module."""

    name = "Qwen3-VL"
    model_types = ("qwen3_vl", "qwen3_vl_moe")
