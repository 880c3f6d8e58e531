"""The published checkpoints, with the tensors and shapes that `published` says: they would load, and what is wrong with
a damaged copy is named. Their weights are holes in sparse files, so 146 GB of them are looked at in a blink."""

import json
import math

import pytest
from published import CHECKPOINTS, config_of, shapes_of, write_checkpoint, write_sparse

from llava.assets import tiny_model_path
from llava.check import facts, report
from llava.model.builder import load_pretrained_model
from llava.model.inspection import inspect

SEVEN = "lmms-lab/llava-onevision-qwen2-7b-ov"
PARAMETERS = {"0.5b": 0.894e9, "7b": 8.03e9, "72b": 73.2e9}


def size_of(name: str) -> str:
    return next(size for size in PARAMETERS if f"-{size}" in name.lower())


@pytest.fixture
def write(tmp_path):
    """Write a published checkpoint, whose shapes may be changed, and look at it."""

    def write(name=SEVEN, change=None):
        return write_checkpoint(tmp_path / "model", name, tiny_model_path(), change)

    return write


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_published_checkpoint_would_load(write, name):
    folder = write(name)
    assert sum(path.stat().st_blocks * 512 for path in folder.iterdir()) < 2e6, "the weights must take no disk"
    known = facts(inspect(str(folder)))
    assert known["problems"] == []
    config, shapes = config_of(name), shapes_of(config_of(name))
    zipped = config.get("mm_use_zip", False)
    assert known["notes"] == (["The model does not use model.image_newline."] if zipped else [])

    model, unused = known["model"], config["hidden_size"] if zipped else 0
    assert model["parameters"]["total"] == sum(map(math.prod, shapes.values())) - unused
    assert model["parameters"]["total"] == pytest.approx(PARAMETERS[size_of(name)], rel=0.001)
    assert (model["layers"], model["vocab_size"]) == (config["num_hidden_layers"], config["vocab_size"])
    assert (model["vision_tower"]["layers"], model["vision_tower"]["patches"]) == (26, 729)
    assert model["compression"] == (
        {"similarity_threshold": 0.9, "error_tolerance": 0.05, "images": True} if zipped else None
    )
    newlines = 0 if zipped else 32 * 14 if "Video" in name else 1
    assert known["video"] == {"frames": 32, "tokens_per_frame": 196, "tokens": 6272, "newlines": newlines}


@pytest.mark.parametrize(
    ("name", "gigabytes", "cache"),
    [
        # weights in float32, bfloat16, 8 and 4 bits; 2 (keys, values) x layers x key-value heads x head width x 2 bytes
        ("lmms-lab/llava-onevision-qwen2-0.5b-ov", (3.6, 1.8, 1.4, 1.3), 2 * 24 * 2 * 64 * 2),
        (SEVEN, (32.1, 16.1, 9.5, 6.4), 2 * 28 * 4 * 128 * 2),
        ("lmms-lab/llava-onevision-qwen2-72b-ov", (292.7, 146.4, 76.2, 42.2), 2 * 80 * 8 * 128 * 2),
    ],
)
def test_memory(write, name, gigabytes, cache):
    memory = facts(inspect(str(write(name))))["memory"]
    assert tuple(round(size / 1e9, 1) for size in memory["weights"].values()) == gigabytes
    assert memory["cache"] == {
        "100 %": {"tokens": 6272, "bytes": 6272 * cache},
        "10 %": {"tokens": 627, "bytes": 627 * cache},
    }


def test_a_longer_video_has_more_tokens(write):
    found = inspect(str(write("lmms-lab/LLaVA-Video-7B-Qwen2")), num_frames=64)
    assert (found.video.tokens, found.video.newlines) == (64 * 196, 64 * 14)
    assert not found.notes
    assert "200 frames are 42000 tokens, but the model reads 32768" in " ".join(inspect(found.name, 200).notes)


def test_missing_and_damaged_shards_are_all_named_and_their_tensors_are_not_blamed(write):
    folder = write()
    shards = sorted(folder.glob("*.safetensors"))
    shards[0].unlink()
    with shards[2].open("r+b") as file:
        file.truncate(shards[2].stat().st_size - 1)
    problems = inspect(str(folder)).problems
    assert len(problems) == 2
    assert shards[0].name in problems[0]
    assert "missing" in problems[0]
    assert shards[2].name in problems[1]
    assert "incomplete" in problems[1]


def test_missing_misshaped_and_unused_tensors_are_grouped(write):
    def change(shapes):
        for name in list(shapes):
            if name.startswith(("model.layers.3.", "model.layers.4.")) or "mm_projector.2." in name:
                del shapes[name]
        del shapes["model.layers.9.mlp.up_proj.weight"]
        shapes["model.embed_tokens.weight"] = (151936, 3584)
        for i in range(26):
            shapes[f"model.vision_tower.vision_tower.vision_model.encoder.layers.{i}.mlp.fc1.bias"] = (4305,)
            shapes[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = (64,)

    found = inspect(str(write(change=change)))
    missing, misshaped = found.problems
    assert "lacks 27 of the model's weights" in missing
    for group in (
        "model.layers.3 to 4 (24 tensors)",
        "model.layers.9.mlp.up_proj.weight",
        "model.mm_projector.2 (2 tensors)",
    ):
        assert group in missing
    assert "model.embed_tokens.weight is (151936, 3584) instead of (152064, 3584)" in misshaped
    assert "encoder.layers.0 to 25 (26 tensors, such as " in misshaped
    assert "encoder.layers.0.mlp.fc1.bias is (4305,) instead of (4304,))" in misshaped
    assert found.notes == ["The model does not use model.layers.0 to 25 (26 tensors)."]


def test_problems_of_all_files_are_reported_at_once(write):
    folder = write(change=lambda shapes: shapes.pop("model.norm.weight"))
    (folder / "tokenizer.json").write_text("{")
    (folder / "generation_config.json").write_text('{"max_new_tokens": -1}')
    config = config_of(SEVEN) | {"mm_newline_position": "column", "mm_use_im_start_end": True}
    (folder / "config.json").write_text(json.dumps(config))
    found = inspect(str(folder))
    tokenizer, generation, settings = found.problems
    assert "The tokenizer" in tokenizer
    assert "generation_config.json has an invalid value" in generation
    assert "mm_use_im_start_end" in settings
    assert "mm_newline_position is 'column'" in settings
    assert "would not load: 3 problems" in report(facts(found))

    (folder / "config.json").write_text(json.dumps(config_of(SEVEN)))
    assert "model.norm.weight" in inspect(str(folder)).problems[2]


def test_weights_of_a_larger_model_are_reported_in_a_few_groups(write):
    folder = write()
    (folder / "config.json").write_text(json.dumps(config_of("lmms-lab/llava-onevision-qwen2-0.5b-ov")))
    (problem,) = inspect(str(folder)).problems
    assert "do not fit its config.json" in problem
    assert len(problem) < 2000


def test_a_head_that_is_not_there_may_be_tied(write):
    (problem,) = inspect(str(write(change=lambda shapes: shapes.pop("lm_head.weight")))).problems
    assert "set tie_word_embeddings to true" in problem


def test_float16_shards_and_files_that_nobody_reads(write):
    folder = write()
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    shapes = shapes_of(config_of(SEVEN))
    write_sparse(folder / "model.safetensors", shapes, "F16")
    (folder / "model.safetensors.index.json").write_text("{")
    (folder / "pytorch_model.bin").write_bytes(b"")
    known = facts(inspect(str(folder)))
    assert known["loads"]
    assert known["files"]["dtypes"] == {"float16": len(shapes)}


def test_an_index_that_names_tensors_in_the_wrong_shard_is_tolerated(write):
    """Every file that the index names is read as a whole, here as by transformers."""
    folder = write()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"] = {name: files[i % len(files)] for i, name in enumerate(index["weight_map"])}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert inspect(str(folder)).problems == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lmms-lab/llava-onevision-qwen2-0.5b-ov", "BBBBCHAN/LLaVA-Scissor-baseline-0.5B"])
def test_a_published_layout_loads(write, name):
    """At full size, in bfloat16 and 2.4 GB of memory."""
    folder = write(name)
    _, model, processor, length = load_pretrained_model(str(folder), device_map="cpu", torch_dtype="bfloat16")
    bytes_loaded = sum(parameter.nbytes for parameter in model.parameters())
    assert bytes_loaded == facts(inspect(str(folder)))["memory"]["weights"]["bfloat16"]
    assert processor.crop_size == {"height": 384, "width": 384}
    assert length == 32768


def test_what_fits_where(write, monkeypatch):
    free = {0: 24_000_000_000, 1: 24_000_000_000, "cpu": 12_000_000_000}
    monkeypatch.setattr("llava.check.get_max_memory", lambda: free)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "Card")
    devices = facts(inspect(str(write())))["memory"]["devices"]
    assert {device["name"]: device["fits"] for device in devices} == {
        "cuda:0 (Card)": ["bfloat16", "8-bit", "4-bit"],
        "cuda:1 (Card)": ["bfloat16", "8-bit", "4-bit"],
        "2 GPUs together": ["float32", "bfloat16", "8-bit", "4-bit"],
        "cpu": ["8-bit", "4-bit"],
    }
