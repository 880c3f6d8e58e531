"""Settings of every method that prunes inside the language model, for its tests."""

import torch

from llava.constants import IMAGE_TOKEN_INDEX as IMAGE
from llava.token_compression import CompressionConfig, list_methods
from llava.token_compression.registry import get_method

LAYERS = 4
PROMPT = torch.tensor([[5, 6, IMAGE, 7, 8, 9]])
GREEDY = {"modalities": "video", "do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
OUTPUT = {"return_dict_in_generate": True, "output_logits": True}
METHODS = [name for name in list_methods() if get_method(name).before is not None]
VARIANTS = [
    ("dycoke", {"layer": 1, "similar": 2.0}),
    ("dycoke", {"layer": 3, "similar": 0.5, "unchanged": "last"}),
    ("holitom_inner", {"layer": 3, "halving": False}),
]
SETTINGS = [
    CompressionConfig(method=name, retention_ratio=0.4, options=options)
    for name, options in [*((name, None) for name in METHODS), *VARIANTS]
]
SOURCE = [CompressionConfig(method=name, retention_ratio=0.4, position_ids="source") for name in METHODS]


def name_of(config):
    """What tells settings apart in the names of tests."""
    changed = [
        f"{key}={value}"
        for name, options in VARIANTS
        if name == config.method
        for key, value in options.items()
        if getattr(config.options, key) == value
    ]
    return "-".join([config.method, config.position_ids or "contiguous", *changed])


def logits_of(output):
    """(rows, new tokens, vocabulary) of what `generate` returned."""
    return torch.stack(output.logits, dim=1)


def lengths(cache):
    """How many tokens each layer holds."""
    return [layer.get_seq_length() for layer in cache.layers]
