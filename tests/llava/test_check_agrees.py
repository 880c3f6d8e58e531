"""`inspect` says that a checkpoint would load exactly if `load_pretrained_model` loads it, however it is damaged, and
what keeps it from loading is one clear error, among those that `inspect` names."""

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from llava.errors import UserError
from llava.model.builder import load_pretrained_model
from llava.model.inspection import inspect

CONFIG_VALUES = {
    "architectures": [None, [], "LlavaQwenForCausalLM", 3, ["LlavaLlamaForCausalLM"]],
    "model_type": ["llava", "llava_qwen_zip", "qwen2", ["llava"], ...],
    "quantization_config": [{}, None],
    "vocab_size": [65, 0, -1, None, "many", ...],
    "hidden_size": [31, 64, "wide", ...],
    "num_hidden_layers": [0, 1, 3],
    "num_attention_heads": [0, 5, 8],
    "num_key_value_heads": [None, 1, 3],
    "head_dim": [4, None],
    "hidden_act": ["magic", "gelu"],
    "rms_norm_eps": ["small", 1e-5],
    "tie_word_embeddings": [True, "yes", ...],
    "rope_parameters": [None, [1], {"rope_type": "magic"}, {"rope_type": "linear"}, {"rope_theta": "x"}],
    "layer_types": [["full_attention"], ["magic", "magic"], ...],
    "pad_token_id": [999, None, -1],
    "dtype": ["magic", None, "bfloat16"],
    "attn_implementation": ["magic"],
    "_attn_implementation": ["flash_attention_2"],
    "max_position_embeddings": [None, 0, "long", ...],
    "tokenizer_model_max_length": [2048, "long", -1],
    "mm_vision_tower": [None, 3, "unknown"],
    "vision_config": [None, {}, [1], "small", {"hidden_size": "wide"}, {"hidden_size": 16, "patch_size": 0}],
    "mm_hidden_size": [17, "16", ...],
    "mm_projector_type": [None, "linear", "mlp3x_gelu", "magic", ...],
    "mm_patch_merge_type": [None, 3, ["unpad"], "flat", "spatial", "magic", ...],
    "mm_newline_position": ["grid", "magic", 3, ...],
    "mm_spatial_pool_mode": ["average", "magic", None, ...],
    "mm_num_frames": [16, "many", -1],
    "mm_use_zip": [True],
    "mm_use_im_start_end": [True],
    "mm_zip_tau": [5, "high"],
}
"""By key of config.json, what it is set to; ... removes it."""

TENSORS = [
    "lm_head.weight",
    "model.embed_tokens.weight",
    "model.image_newline",
    "model.layers.1.self_attn.q_proj.bias",
    "model.mm_projector.2.weight",
    "model.vision_tower.vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight",
    "model.vision_tower.vision_tower.vision_model.post_layernorm.bias",
]
JSON_FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
OTHER_FILES = {
    "generation_config.json": ['{"max_new_tokens": -3}', '{"temperature": -1}', '{"watermarking_config": 3}', "{}"],
    "tokenizer_config.json": ['{"tokenizer_class": "Magic"}'],
    "special_tokens_map.json": ["{"],
    "added_tokens.json": ["{", "{}"],
    "chat_template.jinja": ["{%"],
    "preprocessor_config.json": ["{"],
    "model.safetensors.index.json": ["{"],
    "training_args.bin": ["x"],
    "mm_projector.bin": ["x"],
    "adapter_config.json": ["{}"],
}


def set_config(key, value):
    def damage(folder):
        path = folder / "config.json"
        if path.is_file():
            text = path.read_text()
            fields = json.loads(text) if text.startswith("{") and len(text) > 9 else {}
            path.write_text(json.dumps({k: v for k, v in {**fields, key: value}.items() if v is not ...}))

    return damage


def write_file(name, text):
    def damage(folder):
        if not (folder / name).is_dir():
            (folder / name).write_text(text)

    return damage


def replace_by_folder(name):
    def damage(folder):
        if not (folder / name).is_dir():
            (folder / name).unlink(missing_ok=True)
            (folder / name).mkdir()

    return damage


def remove(name):
    def damage(folder):
        if not (folder / name).is_dir():
            (folder / name).unlink(missing_ok=True)

    return damage


def change_tensor(name, change):
    def damage(folder):
        file = folder / "model.safetensors"
        if file.is_file():
            try:
                weights = load_file(file)
            except SafetensorError:
                return  # damaged before
            if name in weights:
                save_file(change(weights, name), file)

    return damage


def without(weights, name):
    return {key: value for key, value in weights.items() if key != name}


def cropped(weights, name):
    return weights | {name: weights[name][:-1].clone()}


def renamed(weights, name):
    return without(weights, name) | {f"{name}_old": weights[name]}


def as_dtype(dtype):
    return lambda weights, name: weights | {name: weights[name].to(dtype)}


def truncate(keep):
    def damage(folder):
        file = folder / "model.safetensors"
        if file.is_file():
            file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])

    return damage


def damages():
    """Every damage by name."""
    named = {f"config {key}={value}": set_config(key, value) for key, of in CONFIG_VALUES.items() for value in of}
    named |= {f"{name}={text}": write_file(name, text) for name, texts in OTHER_FILES.items() for text in texts}
    named |= {f"{name}={text}": write_file(name, text) for name in JSON_FILES for text in ("", "{", "[]", "3")}
    for name in [*JSON_FILES, "model.safetensors"]:
        named |= {f"no {name}": remove(name), f"folder {name}": replace_by_folder(name)}
    for tensor in TENSORS:
        for change in (without, cropped, renamed):
            named[f"{change.__name__} {tensor}"] = change_tensor(tensor, change)
    for dtype in (torch.int64, torch.bool, torch.float8_e4m3fn, torch.float64):
        named[f"{dtype} model.norm.weight"] = change_tensor("model.norm.weight", as_dtype(dtype))
    return named | {f"truncated to {keep}": truncate(keep) for keep in (0, 0.01, 0.7, 0.9999)}


DAMAGES = damages()


def refusal(folder):
    """The error of loading, which must be a UserError, or None."""
    try:
        load_pretrained_model(str(folder), device_map="cpu")
    except UserError as error:
        return str(error)
    return None


def assert_agreement(folder):
    error = refusal(folder)
    try:
        problems = inspect(str(folder)).problems
    except UserError as nothing_to_inspect:
        problems = [str(nothing_to_inspect)]
    assert bool(problems) == (error is not None), (problems, error)
    if error is not None and "no checkpoint" not in problems[0]:
        # A loader names some groups of tensors, `inspect` all of them.
        assert any(error.split(": ")[0] == problem.split(": ")[0] for problem in problems), (problems, error)


@pytest.fixture(scope="module")
def copies(tiny_checkpoint, tmp_path_factory):
    """Makes copies of a checkpoint that may be damaged."""
    folder = tmp_path_factory.mktemp("damaged") / "model"

    def copy():
        shutil.rmtree(folder, ignore_errors=True)
        return shutil.copytree(tiny_checkpoint, folder)

    return copy


@pytest.mark.parametrize("name", [None, *DAMAGES])
def test_one_damage(copies, name):
    folder = copies()
    if name:
        DAMAGES[name](folder)
    assert_agreement(folder)


@settings(max_examples=40)
@given(st.lists(st.sampled_from(sorted(DAMAGES)), min_size=2, max_size=4))
def test_several_damages(copies, names):
    folder = copies()
    for name in names:
        DAMAGES[name](folder)
    assert_agreement(folder)


@settings(max_examples=40)
@given(st.data())
def test_overwritten_bytes(copies, data):
    folder = copies()
    file = folder / data.draw(st.sampled_from([*JSON_FILES, "model.safetensors"]))
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, min(len(content), 9000) - 1))
        content[position] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    assert_agreement(folder)
