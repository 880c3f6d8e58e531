"""Loading and saving checkpoints, and what each damaged one is answered with."""

import json
import logging
import shutil
import socket

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.errors import CheckpointError, ConfigError, DeviceError
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import read_config
from llava.model.language_model.llava_qwen import LlavaQwenForCausalLM
from llava.model.multimodal_encoder.siglip_encoder import vision_config_of


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    """A checkpoint that may be damaged."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "model")


def load(path, **kwargs):
    return load_pretrained_model(str(path), None, "llava_qwen", **{"device_map": "cpu", **kwargs})


def rewrite_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def rewrite_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_what_is_saved_is_loaded(folder, llava):
    tokenizer, model, processor, max_length = load(folder)
    assert tokenizer("red ball").input_ids == [7, 8]
    assert processor.crop_size == {"height": 32, "width": 32}
    assert max_length == model.config.max_position_embeddings
    assert not model.training
    saved, loaded = llava.state_dict(), model.state_dict()
    assert saved.keys() == loaded.keys()
    for key, value in saved.items():
        assert torch.equal(value, loaded[key]), key


def test_the_saved_layout_is_the_original_one(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llava_qwen"
    assert config["architectures"] == ["LlavaQwenForCausalLM"]
    assert config["rope_theta"] == 10000.0
    assert config["torch_dtype"] == "float32"
    keys = load_file(folder / "model.safetensors").keys()
    assert {"lm_head.weight", "model.image_newline", "model.mm_projector.2.bias"} <= keys
    tower = "model.vision_tower.vision_tower.vision_model."
    assert tower + "embeddings.position_embedding.weight" in keys
    assert tower + "encoder.layers.1.mlp.fc1.weight" in keys
    assert tower + "post_layernorm.weight" in keys
    assert not any("layers.2" in key or ".head." in key for key in keys if key.startswith(tower))


def test_original_config_keys_are_read(folder):
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    del fields["rope_parameters"], fields["dtype"]
    path.write_text(json.dumps({**fields, "rope_theta": 5e5, "rope_scaling": None, "torch_dtype": "bfloat16"}))
    model = load(folder)[1]
    assert model.config.rope_parameters["rope_theta"] == 5e5
    assert model.dtype == torch.float32  # on the CPU, unless asked otherwise
    expected = 5e5 ** (-torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", torch.bfloat16])
def test_dtypes(folder, dtype):
    model = load(folder, torch_dtype=dtype)[1]
    assert str(model.dtype).endswith(str(dtype).removeprefix("torch."))
    assert model.get_vision_tower().dtype == model.dtype


@pytest.mark.parametrize("attention", ["sdpa", "eager", None])
def test_the_attention_kernel_reaches_the_tower(folder, attention):
    """LLaVA-NeXT's tutorial passes None where flash-attn is not installed."""
    model = load(folder, attn_implementation=attention)[1]
    assert model.config._attn_implementation == (attention or "sdpa")
    assert model.get_vision_tower().vision_tower.config._attn_implementation == (attention or "sdpa")


def test_llava_next_arguments_are_taken(folder):
    model = load_pretrained_model(
        str(folder),
        None,
        "llava_qwen",
        device_map="auto",
        multimodal=True,
        overwrite_config={"mm_newline_position": "grid"},
    )[1]
    assert model.config.mm_newline_position == "grid"


def test_sharded_weights(folder, llava):
    (folder / "model.safetensors").unlink()
    llava.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert torch.equal(load(folder)[1].lm_head.weight, llava.lm_head.weight)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        load(folder)


def test_pickled_weights(folder, llava):
    (folder / "model.safetensors").unlink()
    torch.save(llava.state_dict(), folder / "pytorch_model.bin")
    assert torch.equal(load(folder)[1].lm_head.weight, llava.lm_head.weight)


def test_tied_embeddings_need_no_head(folder):
    rewrite_weights(folder, lambda weights: weights.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight.*set tie_word_embeddings"):
        load(folder)
    assert load(folder, overwrite_config={"tie_word_embeddings": True})[1].config.tie_word_embeddings
    rewrite_config(folder, tie_word_embeddings=True)
    model = load(folder)[1]
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.0.mlp.up_proj.weight",
        "model.mm_projector.0.weight",
        "model.image_newline",
        "model.vision_tower.vision_tower.vision_model.embeddings.position_embedding.weight",
    ],
)
def test_a_missing_weight_is_named(folder, key):
    rewrite_weights(folder, lambda weights: weights.pop(key))
    with pytest.raises(CheckpointError, match=key.replace(".", r"\.")):
        load(folder)


def test_a_weight_of_another_shape_is_named(folder):
    rewrite_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(5)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is \(5,\) instead of \(32,\)"):
        load(folder)


def test_a_weight_too_many_is_reported(folder, caplog):
    rewrite_weights(folder, lambda weights: weights.update({"model.surprise": torch.ones(5)}))
    with caplog.at_level(logging.WARNING, logger="llava"):
        load(folder)
    assert "model.surprise" in caplog.text


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.7])
def test_truncated_weights(folder, keep):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(folder)


def test_nothing_large_is_read_before_names_and_shapes_fit(folder, monkeypatch):
    rewrite_weights(folder, lambda weights: weights.pop("model.norm.weight"))
    monkeypatch.setattr("llava.model.checkpoint.LlavaQwenForCausalLM.from_pretrained", None)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        load(folder)


@pytest.mark.parametrize("name", ["siglip-so400m-patch14-384", "/data/towers/siglip-so400m-patch14-384/"])
def test_a_tower_named_by_its_local_path_is_the_published_one(folder, name):
    rewrite_config(folder, mm_vision_tower=name, vision_config=None)
    assert vision_config_of(read_config(folder)).hidden_size == 1152


def test_damaged_pickled_weights(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not a pickle")
    with pytest.raises(CheckpointError, match="damaged"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", r"no config\.json"),
        ("model.safetensors", "no weights"),
        ("tokenizer_config.json", "no tokenizer"),
    ],
)
def test_missing_files(folder, name, message):
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", "not valid JSON"),
        ("config.json", "[]", "JSON object"),
        ("generation_config.json", "{", "not valid JSON"),
        ("tokenizer.json", "{", "tokenizer"),
        ("model.safetensors.index.json", "{}", "weight index"),
    ],
)
def test_damaged_files(folder, name, content, message):
    if name.endswith(".index.json"):
        (folder / "model.safetensors").unlink()
    (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "llava_onevision"}, "llava_onevision"),
        ({"architectures": ["LlavaLlamaForCausalLM"]}, "LlavaLlamaForCausalLM"),
        ({"hidden_size": "wide"}, "str"),
        ({"mm_use_im_start_end": True}, "im_start"),
        ({"add_faster_video": True}, "add_faster_video"),
        ({"quantization_config": {"load_in_4bit": True, "quant_method": "bitsandbytes"}}, "load_4bit=True"),
        ({"num_attention_heads": 0}, r"config\.json"),
    ],
)
def test_configs_that_are_not_supported(folder, fields, message):
    rewrite_config(folder, **fields)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_an_unknown_tower_without_its_configuration(folder):
    rewrite_config(folder, vision_config=None)
    with pytest.raises(CheckpointError, match="vision_config"):
        load(folder)


def test_the_published_towers_configuration():
    config = vision_config_of(type("Config", (), {"mm_vision_tower": "google/siglip-so400m-patch14-384"}))
    assert (config.hidden_size, config.num_hidden_layers, config.image_size // config.patch_size) == (1152, 27, 27)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"load_8bit": True, "load_4bit": True}, ConfigError, "exclude"),
        ({"torch_dtype": "int8"}, ConfigError, "int8"),
        ({"attn_implementation": "magic"}, ConfigError, "magic"),
        ({"attn_implementation": "flash_attention_2"}, DeviceError, "sdpa"),
    ],
)
def test_arguments_that_are_refused(tiny_checkpoint, arguments, error, message):
    with pytest.raises(error, match=message):
        load_pretrained_model(str(tiny_checkpoint), **{"device_map": "cpu", "model_base": None, **arguments})


def test_flash_attention_does_not_compute_in_float32(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr("llava.model.builder.is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr("llava.model.builder.uses_gpu", lambda device_map: True)
    with pytest.raises(DeviceError, match=r'float32; use torch_dtype="bfloat16"'):
        load(tiny_checkpoint, torch_dtype="float32", attn_implementation="flash_attention_2")


def test_an_argument_that_transformers_does_not_know(tiny_checkpoint):
    with pytest.raises(CheckpointError, match=r"cannot be loaded: .*no_such_argument"):
        load(tiny_checkpoint, no_such_argument=1)


def test_a_weight_that_transformers_passes_over_is_no_random_weight(tiny_checkpoint, monkeypatch):
    """As where transformers reads a name differently, which the headers alone cannot tell."""
    name = "model.layers.1.mlp.up_proj.weight"
    original = LlavaQwenForCausalLM.from_pretrained

    def passing_over(*args, **kwargs):
        model, report = original(*args, **kwargs)
        return model, {**report, "missing_keys": {*report["missing_keys"], name}}

    monkeypatch.setattr(LlavaQwenForCausalLM, "from_pretrained", passing_over)
    with pytest.raises(CheckpointError, match=f"did not fill {name}"):
        load(tiny_checkpoint)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("device_map", ["cuda", "cuda:0", {"": 0}])
def test_a_gpu_that_is_not_there(tiny_checkpoint, device_map):
    with pytest.raises(DeviceError, match='device_map="cpu"'):
        load(tiny_checkpoint, device_map=device_map)


@pytest.mark.parametrize("path", ["/no/such/folder", "./missing", "name-without-owner"])
def test_a_path_that_does_not_exist(path):
    with pytest.raises(CheckpointError, match="not a folder"):
        load(path)


def test_a_hub_name_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="could not be fetched"):
        load("nobody/no-such-model")


def test_a_folder_is_loaded_without_the_network(folder, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    load(folder)
