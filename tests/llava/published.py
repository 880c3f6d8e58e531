"""Folders with the files, tensor names and shapes of the published checkpoints, and no content: holes take no disk.

What is known, and from where:
- config.json of lmms-lab/llava-onevision-qwen2-7b-ov: copied from the hub, with its address, into the tests of
  PaddleMIX (`tests/models/test_llava.py`); among other things its model_type is "llava".
- The other language models: the published dimensions of Qwen2-0.5B, -7B and -72B and of Qwen2.5-0.5B and -7B
  (0.5B: 24 layers of 896, 14 heads, 2 key-value heads, vocabulary 151936, tied; 7B: 28 layers of 3584, 28 and 4 heads,
  152064; 72B: 80 layers of 8192, 64 and 8 heads, 152064). transformers' conversion script for LLaVA-OneVision names
  these as the base of the -ov, -si and -ov-chat checkpoints, takes SigLIP so400m without its last layer and its head
  from the checkpoint itself, and says that the tied head is not saved.
- LLaVA-Video-7B-Qwen2 puts a newline after each row of a frame ("grid"), and is evaluated with "average" pooling.
- The LLaVA-Scissor baselines are Qwen2.5 with a "flat" merge; mm_use_zip, mm_zip_tau 0.9 and mm_zip_epsilon 0.05 are
  in their config.json.
Assumed, as the files could not be seen: the remaining keys of the other configs; that LLaVA-Video's config says
"bilinear"; the class and model_type of the baselines (either spelling is taken) and that theirs name the tower by a
local path and hold its weights; an unused image_newline in them; bfloat16 everywhere; shards of 5 GB, as transformers
cuts them; the files beside the weights.
"""

import json
import math
from pathlib import Path

SIDES = [384 * n for n in range(1, 7)]
GENERATION_CONFIG = {
    "bos_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "pad_token_id": 151643,
    "repetition_penalty": 1.05,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
    "transformers_version": "4.40.0.dev0",
}
ONEVISION_7B = {
    "architectures": ["LlavaQwenForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "image_aspect_ratio": "anyres_max_9",
    "image_crop_resolution": None,
    "image_grid_pinpoints": [[width, height] for width in SIDES for height in SIDES],
    "image_split_resolution": None,
    "image_token_index": 151646,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "mm_hidden_size": 1152,
    "mm_newline_position": "one_token",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_lr": None,
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_spatial_pool_mode": "bilinear",
    "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "mm_vision_tower_lr": 2e-06,
    "model_type": "llava",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "pos_skipping_range": 4096,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "tokenizer_model_max_length": 32768,
    "tokenizer_padding_side": "right",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0",
    "use_cache": True,
    "use_mm_proj": True,
    "use_pos_skipping": False,
    "use_sliding_window": False,
    "vision_tower_pretrained": None,
    "vocab_size": 152064,
}
SMALL = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_window_layers": 24,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}
LARGE = {
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "max_window_layers": 80,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
}
SINGLE_IMAGE = {"mm_spatial_pool_mode": ..., "mm_newline_position": ...}  # ... leaves the key out
VIDEO = {
    "add_faster_video": False,
    "add_time_instruction": False,
    "force_sample": True,
    "mm_newline_position": "grid",
    "mm_spatial_pool_stride": 2,
    "model_type": "llava_qwen",
}
SCISSOR = {
    "architectures": ["LlavaQwenZipForCausalLM"],
    "mm_patch_merge_type": "flat",
    "mm_use_zip": True,
    "mm_vision_tower": "model_zoo/google/siglip-so400m-patch14-384",
    "mm_zip_epsilon": 0.05,
    "mm_zip_tau": 0.9,
    "model_type": "llava_qwen_zip",
}
CHECKPOINTS = {
    "lmms-lab/llava-onevision-qwen2-0.5b-ov": SMALL,
    "lmms-lab/llava-onevision-qwen2-0.5b-si": SMALL | SINGLE_IMAGE,
    "lmms-lab/llava-onevision-qwen2-7b-ov": {},
    "lmms-lab/llava-onevision-qwen2-7b-ov-chat": {},
    "lmms-lab/llava-onevision-qwen2-7b-si": SINGLE_IMAGE,
    "lmms-lab/llava-onevision-qwen2-72b-ov": LARGE,
    "lmms-lab/llava-onevision-qwen2-72b-ov-chat": LARGE,
    "lmms-lab/llava-onevision-qwen2-72b-si": LARGE | SINGLE_IMAGE,
    "lmms-lab/LLaVA-Video-7B-Qwen2": VIDEO,
    "BBBBCHAN/LLaVA-Scissor-baseline-0.5B": SMALL | SCISSOR,
    "BBBBCHAN/LLaVA-Scissor-baseline-7B": SCISSOR,
}
"""By hub name, what its config.json has in another way than that of llava-onevision-qwen2-7b-ov."""

SHARD_BYTES = 5_000_000_000


def config_of(name: str) -> dict:
    """The config.json of a published checkpoint."""
    fields = ONEVISION_7B | CHECKPOINTS[name] | {"_name_or_path": name}
    return {key: value for key, value in fields.items() if value is not ...}


def shapes_of(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint's tensors, spelled out and not asked of the model that is tested with them."""
    width, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    key_value = width // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.image_newline": (width,),
        "model.embed_tokens.weight": (vocabulary, width),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name, out in (("q_proj", width), ("k_proj", key_value), ("v_proj", key_value)):
            shapes[f"{layer}self_attn.{name}.weight"] = (out, width)
            shapes[f"{layer}self_attn.{name}.bias"] = (out,)
        shapes[f"{layer}self_attn.o_proj.weight"] = (width, width)
        shapes[f"{layer}mlp.gate_proj.weight"] = shapes[f"{layer}mlp.up_proj.weight"] = (inner, width)
        shapes[f"{layer}mlp.down_proj.weight"] = (width, inner)
        shapes[f"{layer}input_layernorm.weight"] = shapes[f"{layer}post_attention_layernorm.weight"] = (width,)
    shapes["model.norm.weight"] = (width,)
    tower = "model.vision_tower.vision_tower.vision_model."
    shapes[f"{tower}embeddings.patch_embedding.weight"] = (1152, 3, 14, 14)
    shapes[f"{tower}embeddings.patch_embedding.bias"] = (1152,)
    shapes[f"{tower}embeddings.position_embedding.weight"] = (729, 1152)
    for i in range(26):
        layer = f"{tower}encoder.layers.{i}."
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes[f"{layer}self_attn.{name}.weight"] = (1152, 1152)
            shapes[f"{layer}self_attn.{name}.bias"] = (1152,)
        shapes[f"{layer}mlp.fc1.weight"], shapes[f"{layer}mlp.fc1.bias"] = (4304, 1152), (4304,)
        shapes[f"{layer}mlp.fc2.weight"], shapes[f"{layer}mlp.fc2.bias"] = (1152, 4304), (1152,)
        for name in ("layer_norm1", "layer_norm2"):
            shapes[f"{layer}{name}.weight"] = shapes[f"{layer}{name}.bias"] = (1152,)
    shapes[f"{tower}post_layernorm.weight"] = shapes[f"{tower}post_layernorm.bias"] = (1152,)
    shapes["model.mm_projector.0.weight"], shapes["model.mm_projector.0.bias"] = (width, 1152), (width,)
    shapes["model.mm_projector.2.weight"], shapes["model.mm_projector.2.bias"] = (width, width), (width,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocabulary, width)
    return shapes


def write_checkpoint(folder: Path, name: str, tokenizer: Path, change=None) -> Path:
    """Write a published checkpoint with sparse weights.

    Args:
        tokenizer: a folder whose tokenizer files are copied.
        change: called with the shapes by name before the weights are written.
    """
    folder.mkdir()
    config = config_of(name)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION_CONFIG))
    for file in tokenizer.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (folder / "trainer_state.json").write_text("{}")
    (folder / "training_args.bin").write_bytes(b"a pickle that nobody reads")
    shapes = shapes_of(config)
    if change:
        change(shapes)
    write_weights(folder, shapes)
    return folder


def write_weights(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Sparse bfloat16 weights in one file or, above `SHARD_BYTES`, in shards with their index."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        if size and size + 2 * math.prod(shape) > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += 2 * math.prod(shape)
    if len(shards) == 1:
        write_sparse(folder / "model.safetensors", shapes)
        return
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        write_sparse(folder / file, shard)
    index = {
        "metadata": {"total_size": sum(2 * math.prod(shape) for shape in shapes.values())},
        "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_sparse(file: Path, shapes: dict[str, tuple[int, ...]], dtype: str = "BF16") -> None:
    """A valid safetensors file of 16-bit tensors that are all zeros, of which only the header takes place on disk."""
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + end)
