"""Published shapes of models of transformers, and a tiny one of each, for random weights.

Sizes are those of the checkpoints' config.json; `tests/eval/test_efficiency_hf.py` holds their numbers of parameters.
"""

from typing import Any

from transformers import AutoConfig

ANY_LENGTH = 2**22
"""Positions of a shape: what is measured beyond the context that weights were trained for is speed, not sense."""


def _text(
    hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": ANY_LENGTH,
        **more,
    }


def _tower(hidden: int, mlp: int, layers: int, heads: int, image: int, patch: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": image,
        "patch_size": patch,
        **more,
    }


def _rotary(theta: float, *sections: int) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, "mrope_section": list(sections)}


def _qwen_tower(depth: int, heads: int, patch: int, **more: Any) -> dict[str, Any]:
    return {"depth": depth, "num_heads": heads, "patch_size": patch, **more}


def _experts(number: int, chosen: int, size: int) -> dict[str, Any]:
    return {"num_experts": number, "num_experts_per_tok": chosen, "moe_intermediate_size": size}


def _windows(size: int, *full: int) -> dict[str, Any]:
    return {"window_size": size, "fullatt_block_indexes": list(full), "tokens_per_second": 2}


def _deepstack(positions: int, *layers: int) -> dict[str, Any]:
    return {"num_position_embeddings": positions, "deepstack_visual_indexes": list(layers)}


QWEN2_ROTARY: dict[str, Any] = {"rope_parameters": _rotary(1e6, 16, 24, 24)}
QWEN3_ROTARY: dict[str, Any] = {
    "rope_parameters": {**_rotary(5e6, 24, 20, 20), "mrope_interleaved": True},
    "head_dim": 128,
}
TINY_ROTARY = {"rope_parameters": _rotary(1e4, 1, 1, 2)}

QWEN2_05B = _text(896, 4864, 24, 14, 2, 152000, model_type="qwen2")
QWEN2_7B = _text(3584, 18944, 28, 28, 4, 152128, model_type="qwen2")
SIGLIP = _tower(1152, 4304, 26, 16, 384, 14, model_type="siglip_vision_model", vision_use_head=False)
CLIP = _tower(1024, 4096, 24, 16, 336, 14, model_type="clip_vision_model")
QWEN2_TOWER = _qwen_tower(32, 16, 14, embed_dim=1280, mlp_ratio=4)
QWEN25_TOWER = _qwen_tower(32, 16, 14, hidden_size=1280, intermediate_size=3420) | _windows(112, 7, 15, 23, 31)
QWEN3_TOWER_S = _qwen_tower(24, 16, 16, hidden_size=1024, intermediate_size=4096) | _deepstack(2304, 5, 11, 17)
QWEN3_TOWER = _qwen_tower(27, 16, 16, hidden_size=1152, intermediate_size=4304) | _deepstack(2304, 8, 16, 24)

TINY_TEXT = _text(32, 64, 3, 4, 2, 128)
TINY_TOWER = _tower(32, 64, 2, 4, 16, 4)
TINY_QWEN_TOWER = _qwen_tower(2, 4, 4, hidden_size=32)
TINY_IDS = {"image_token_id": 120, "video_token_id": 121}
TINY_QWEN_IDS = {**TINY_IDS, "vision_start_token_id": 122, "vision_end_token_id": 123}
TINY_LARGER = {"intermediate_size": 64, "out_hidden_size": 32}
TINY_DEEPSTACK = {**TINY_QWEN_TOWER, **TINY_LARGER, "depth": 3} | _deepstack(16, 0, 1)
TINY_INDEXES = {"image_token_index": 120, "video_token_index": 121}

SHAPES: dict[str, dict[str, Any]] = {
    "llava_onevision-0.5b": {"text_config": QWEN2_05B, "vision_config": SIGLIP, "tie_word_embeddings": True},
    "llava_onevision-7b": {"text_config": QWEN2_7B, "vision_config": SIGLIP},
    "llava_onevision-tiny": {
        "text_config": {**TINY_TEXT, "model_type": "qwen2"},
        "vision_config": {**TINY_TOWER, "model_type": "siglip_vision_model", "vision_use_head": False},
        **TINY_INDEXES,
    },
    "llava_next_video-7b": {
        "text_config": _text(4096, 11008, 32, 32, 32, 32064, model_type="llama"),
        "vision_config": CLIP,
    },
    "llava_next_video-tiny": {
        "text_config": {**TINY_TEXT, "model_type": "llama"},
        "vision_config": {**TINY_TOWER, "model_type": "clip_vision_model"},
        **TINY_INDEXES,
    },
    "qwen2_vl-2b": {
        "text_config": _text(1536, 8960, 28, 12, 2, 151936, **QWEN2_ROTARY),
        "vision_config": {**QWEN2_TOWER, "hidden_size": 1536},
        "tie_word_embeddings": True,
    },
    "qwen2_vl-7b": {
        "text_config": _text(3584, 18944, 28, 28, 4, 152064, **QWEN2_ROTARY),
        "vision_config": {**QWEN2_TOWER, "hidden_size": 3584},
    },
    "qwen2_vl-tiny": {
        "text_config": {**TINY_TEXT, **TINY_ROTARY},
        "vision_config": {**TINY_QWEN_TOWER, "embed_dim": 32, "mlp_ratio": 2},
        **TINY_QWEN_IDS,
    },
    "qwen2_5_vl-3b": {
        "text_config": _text(2048, 11008, 36, 16, 2, 151936, **QWEN2_ROTARY),
        "vision_config": {**QWEN25_TOWER, "out_hidden_size": 2048},
        "tie_word_embeddings": True,
    },
    "qwen2_5_vl-7b": {
        "text_config": _text(3584, 18944, 28, 28, 4, 152064, **QWEN2_ROTARY),
        "vision_config": {**QWEN25_TOWER, "out_hidden_size": 3584},
    },
    "qwen2_5_vl-tiny": {
        "text_config": {**TINY_TEXT, **TINY_ROTARY},
        "vision_config": TINY_QWEN_TOWER | TINY_LARGER | _windows(16, 1),
        **TINY_QWEN_IDS,
    },
    "qwen3_vl-2b": {
        "text_config": _text(2048, 6144, 28, 16, 8, 151936, **QWEN3_ROTARY),
        "vision_config": {**QWEN3_TOWER_S, "out_hidden_size": 2048},
        "tie_word_embeddings": True,
    },
    "qwen3_vl-8b": {
        "text_config": _text(4096, 12288, 36, 32, 8, 151936, **QWEN3_ROTARY),
        "vision_config": {**QWEN3_TOWER, "out_hidden_size": 4096},
    },
    "qwen3_vl-tiny": {
        "text_config": {**TINY_TEXT, **TINY_ROTARY, "head_dim": 8},
        "vision_config": TINY_DEEPSTACK,
        **TINY_QWEN_IDS,
    },
    "qwen3_vl_moe-30b": {
        "text_config": _text(2048, 6144, 48, 32, 4, 151936, **QWEN3_ROTARY) | _experts(128, 8, 768),
        "vision_config": {**QWEN3_TOWER, "out_hidden_size": 2048},
    },
    "qwen3_vl_moe-tiny": {
        "text_config": {**TINY_TEXT, **TINY_ROTARY, "head_dim": 8} | _experts(4, 2, 16),
        "vision_config": TINY_DEEPSTACK,
        **TINY_QWEN_IDS,
    },
    "internvl-1b": {
        "text_config": _text(896, 4864, 24, 14, 2, 151674, model_type="qwen2"),
        "vision_config": _tower(1024, 4096, 24, 16, 448, 14),
    },
    "internvl-8b": {
        "text_config": _text(3584, 18944, 28, 28, 4, 151674, model_type="qwen2"),
        "vision_config": _tower(1024, 4096, 24, 16, 448, 14),
    },
    "internvl-tiny": {
        "text_config": {**TINY_TEXT, "model_type": "qwen2"},
        "vision_config": {**TINY_TOWER, "image_size": [16, 16], "patch_size": [4, 4]},
        "image_token_id": 120,
        "image_seq_length": 4,
    },
    "video_llama_3-2b": {
        "text_config": _text(1536, 8960, 28, 12, 2, 151936, model_type="qwen2"),
        "vision_config": {**SIGLIP, "num_hidden_layers": 27, "model_type": "video_llama_3_vision"},
        "tie_word_embeddings": True,
    },
    "video_llama_3-tiny": {
        "text_config": {**TINY_TEXT, "model_type": "qwen2"},
        "vision_config": {**TINY_TOWER, "model_type": "video_llama_3_vision"},
        **TINY_IDS,
    },
    "smolvlm-2.2b": {
        "text_config": _text(2048, 8192, 24, 32, 32, 49280, model_type="llama"),
        "vision_config": _tower(1152, 4304, 27, 16, 384, 14),
        "scale_factor": 3,
        "image_token_id": 49190,
    },
    "smolvlm-tiny": {
        "text_config": {**TINY_TEXT, "model_type": "llama"},
        "vision_config": TINY_TOWER,
        "scale_factor": 2,
        "image_token_id": 120,
    },
}


def hf_config(shape: str) -> Any:
    """The configuration of a shape; the part of its name before the "-" is its model_type."""
    return AutoConfig.for_model(shape.partition("-")[0], **({"tie_word_embeddings": False} | SHAPES[shape]))
