"""The command `check`: what it reports is what the loaded model has, and how it ends."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.check import facts
from llava.cli import main
from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.builder import load_pretrained_model
from llava.model.completeness import groups, meta_model
from llava.model.inspection import inspect
from llava.model.memory import cache_bytes
from llava.model.video_layout import video_layout
from llava.token_compression import compression


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    """A checkpoint that may be damaged."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "model")


def rewrite_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def run(capsys, *arguments):
    status = main(["check", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_bundled_model(capsys):
    status, output, errors = run(capsys, "tiny")
    assert (status, errors) == (0, "")
    assert output.startswith("tiny would load.\n")
    for words in ("LlavaQwenForCausalLM, 1.22 M parameters", "8 frames of 25 tokens: 200", "none in the checkpoint"):
        assert words in output


def test_json_is_the_same_report_for_machines(capsys, folder):
    status, output, _ = run(capsys, folder, "--json", "--num-frames", "6")
    known = json.loads(output)
    assert (status, known["loads"]) == (0, True)
    assert known["video"] == {"frames": 6, "tokens_per_frame": 4, "tokens": 24, "newlines": 1}
    (folder / "tokenizer.json").unlink()
    (folder / "model.safetensors").unlink()
    status, output, _ = run(capsys, folder, "--json")
    known = json.loads(output)
    assert (status, known["loads"]) == (2, False)
    assert len(known["problems"]) == 2
    assert known["model"]["parameters"]["total"] > 0


def test_problems_are_listed_and_the_status_is_2(capsys, folder):
    (folder / "generation_config.json").write_text("{")
    weights = load_file(folder / "model.safetensors")
    del weights["model.image_newline"]
    save_file(weights, folder / "model.safetensors")
    status, output, errors = run(capsys, folder)
    assert (status, errors) == (2, "")
    assert "would not load: 2 problems.\n" in output
    listed = [line for line in output.splitlines() if line.startswith("- ")]
    assert len(listed) == 2
    assert "generation_config.json is not valid JSON" in listed[0]
    assert "lacks 1 of the model's weights: model.image_newline." in listed[1]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "nowhere", "not a folder with a checkpoint"),
        (lambda folder: folder / "config.json", "not a folder with a checkpoint"),
        (lambda folder: "name-without-owner", "hub name like owner/name"),
        (lambda folder: folder.parent, "neither a config.json nor weights"),
    ],
)
def test_what_is_no_checkpoint_is_one_error(capsys, folder, make, words):
    status, output, errors = run(capsys, make(folder))
    assert (status, output) == (2, "")
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert words in errors


@pytest.mark.parametrize("arguments", [[], ["tiny", "--num-frames", "0"], ["tiny", "--frobnicate"], ["tiny", "extra"]])
def test_wrong_usage_is_one_error(capsys, arguments):
    status, output, errors = run(capsys, *arguments)
    assert (status, output, errors.count("\n")) == (2, "", 1)


def test_weights_alone_and_config_alone(capsys, folder):
    (folder / "config.json").rename(folder / "away.json")
    status, output, _ = run(capsys, folder)
    assert status == 2
    assert "no config.json" in output
    assert "model.safetensors" in output
    (folder / "away.json").rename(folder / "config.json")
    (folder / "model.safetensors").unlink()
    status, output, _ = run(capsys, folder)
    assert status == 2
    assert "has no weights" in output
    assert "2 layers of width 32" in output


def test_a_partial_checkpoint_needs_its_base(capsys, folder):
    for path in folder.iterdir():
        path.unlink()
    torch.save({"model.mm_projector.0.bias": torch.zeros(32)}, folder / "mm_projector.bin")
    status, output, _ = run(capsys, folder)
    assert status == 2
    assert "1 problem." in output
    assert "model_base" in output


def test_pickled_and_sharded_weights(folder, llava):
    (folder / "model.safetensors").unlink()
    torch.save(llava.state_dict(), folder / "pytorch_model.bin")
    assert inspect(str(folder)).problems == []
    (folder / "pytorch_model.bin").unlink()
    llava.save_pretrained(folder, max_shard_size="20KB")
    known = facts(inspect(str(folder)))
    assert known["loads"]
    assert len(known["files"]["names"]) > 1
    assert known["files"]["bytes"] == sum(tensor.nbytes for tensor in llava.state_dict().values())


def test_a_text_only_checkpoint(capsys, folder):
    rewrite_config(folder, mm_vision_tower=None)
    status, output, _ = run(capsys, folder)
    assert status == 0
    assert "vision tower" not in output
    assert "Note: The model does not use model.image_newline" in output


def test_the_compression_of_the_checkpoint_is_told(capsys, folder):
    rewrite_config(folder, mm_use_zip=True, mm_zip_tau=0.85, mm_zip_epsilon=0.1)
    output = run(capsys, folder)[1]
    assert "similarity_threshold 0.85, error_tolerance 0.1" in output
    assert "0 newlines" in output


def test_a_tokenizer_with_more_tokens_than_the_model_is_noted(folder):
    rewrite_config(folder, vocab_size=8)
    weights = load_file(folder / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        weights[name] = weights[name][:8].clone()
    save_file(weights, folder / "model.safetensors")
    found = inspect(str(folder))
    assert found.problems == []
    assert "The tokenizer has 9 tokens, but the model embeds 8" in found.notes[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_that_of_the_loaded_model(folder, dtype):
    model = load_pretrained_model(str(folder), device_map="cpu", torch_dtype=dtype)[1]
    weights = facts(inspect(str(folder)))["memory"]["weights"]
    assert weights[dtype] == sum(parameter.nbytes for parameter in model.parameters())


def test_cache_memory_is_that_of_a_prompt(make_llava):
    model = make_llava().to(torch.bfloat16)
    cache = model(torch.arange(24).view(1, 24)).past_key_values
    measured = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes(model.config, 24) == measured


@pytest.mark.parametrize("pool_mode", ["bilinear", "average", "max"])
@pytest.mark.parametrize(
    "fields",
    [
        *({"mm_newline_position": position} for position in ("one_token", "frame", "grid", "no_token")),
        {"mm_patch_merge_type": "flat"},
        {"mm_patch_merge_type": "spatial"},
        {"mm_use_zip": True},
    ],
    ids=str,
)
def test_tokens_of_a_video_are_those_the_model_makes(make_llava, make_video, fields, pool_mode):
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 6}  # 5 x 5 patches, which average and bilinear pooling round differently
    model = make_llava(vision_config=vision, mm_spatial_pool_mode=pool_mode, **fields)
    layout = video_layout(model.config, 3)
    assert layout.tokens_per_frame == (9 if pool_mode == "bilinear" else 4)
    prompt = torch.tensor([[2, IMAGE_TOKEN_INDEX]])
    with compression(model, method="none"):
        embeds = model.prepare_inputs_labels_for_multimodal(prompt, None, None, None, None, [make_video(3)], ["video"])[
            4
        ]
    assert 1 + layout.tokens + layout.newlines == embeds.shape[1]


def test_the_meta_model_takes_no_memory_and_leaves_the_config_alone(llava):
    before = llava.config.to_dict()
    model = meta_model(llava.config)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert llava.config.to_dict() == before


def test_groups_join_layers_in_a_row_with_the_same_tensors():
    names = [f"m.layers.{i}.{name}" for i in (0, 1, 2, 9, 10, 11) for name in ("a.weight", "b.weight")]
    assert groups([*names, "m.layers.3.a.weight", "m.layers.12.b.weight", "head.weight", "m.norm.weight", "lone"]) == [
        "lone",
        "head.weight",
        "m.layers.0 to 2 (6 tensors)",
        "m.layers.3.a.weight",
        "m.layers.9 to 11 (6 tensors)",
        "m.layers.12.b.weight",
        "m.norm.weight",
    ]
    assert groups([]) == []
    assert groups({"a.x": "", "a.y": ""}, {"a.x": "is odd", "a.y": "is even"}) == ["a (2 tensors, such as a.x is odd)"]
