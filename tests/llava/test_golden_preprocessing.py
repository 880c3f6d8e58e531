"""Parity of prompts, prompt tokens, crops and pixels with LLaVA-NeXT (A7)."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from llava.anyres import get_anyres_image_grid_shape, select_best_resolution
from llava.conversation import conv_templates
from llava.errors import ConfigError
from llava.images import divide_to_patches, expand2square, process_anyres_image, process_images, resize_and_pad_image
from llava.mm_utils import tokenizer_image_token
from llava.model.image_merge import merge_crops, unpad_image
from llava.model.multimodal_encoder.image_processor import SigLipImageProcessor

GOLDEN = Path(__file__).parents[2] / ".." / "shared" / "golden"
if not (GOLDEN / "index.json").exists():
    pytest.skip("the recorded outputs (../shared/golden) are not here", allow_module_level=True)

INDEX = json.loads((GOLDEN / "index.json").read_text())["cases"]
IMAGES = INDEX["A7_images"]
SIDE, GRID = IMAGES["image_size"], IMAGES["grid"]
PIXELS = 1e-6


def array(name):
    """The recorded image or pixels of this name."""
    entry = IMAGES["arrays"][name]
    with np.load(GOLDEN / entry.get("stored_in", IMAGES["file"])) as arrays:
        return arrays[entry.get("stored_key", name)]


def recorded(name):
    return json.loads((GOLDEN / "a7" / f"{name}.json").read_text())


PROMPTS = recorded("A7_prompts")


def test_every_recorded_file_has_a_test():
    assert {name for name in INDEX if name.startswith("A7_")} == {
        *("A7_prompts", "A7_tokens", "A7_resolutions", "A7_unpad", "A7_images")
    }


WITH_EXAMPLE = {"default", "v0"}
"""Templates that begin with a written-out example dialogue. It is its authors' text, and no checkpoint that this tree
loads was trained with it: these two are left out."""


def test_every_recorded_template_exists():
    assert {name for name, fields in PROMPTS["templates"].items() if fields["n_preset_messages"]} == WITH_EXAMPLE
    assert set(conv_templates) == set(PROMPTS["templates"]) - WITH_EXAMPLE


PROMPT_ROWS = [row for row in PROMPTS["rows"] if row["template"] not in WITH_EXAMPLE]


@pytest.mark.parametrize("row", PROMPT_ROWS, ids=lambda row: f"{row['template']}-{row['script']}")
def test_prompts(row):
    conversation = conv_templates[row["template"]].copy()
    roles = dict(zip("ua", conversation.roles, strict=True))
    for role, message in row["messages"]:
        conversation.append_message(roles[role], tuple(message) if isinstance(message, list) else message)
    prompt = conversation.get_prompt()
    if row["error"] is None:
        assert prompt == row["prompt"]
    else:  # the published code fails: for a second separator that is missing, or for a tokenizer that a copy loses
        assert row["template"] in ("plain", "v0_plain", "llava_llama_3")
        for _, message in row["messages"]:
            text = message[0] if isinstance(message, list) else message or ""
            assert text.removeprefix("<image>\n") in prompt


@pytest.mark.parametrize("name", sorted(conv_templates))
def test_template_fields(name):
    expected = PROMPTS["templates"][name]
    template = conv_templates[name]
    assert len(template.messages) == expected["n_preset_messages"]
    assert template.sep_style.name == expected["sep_style"]
    for field in ("system", "sep", "sep2", "version", "offset", "stop_str", "stop_token_ids"):
        assert getattr(template, field) == expected[field], field
    assert list(template.roles) == expected["roles"]


@pytest.mark.parametrize(("name", "folder"), [("tok", "ckpt_a"), ("tok_bos", "tokenizer_bos")])
def test_prompt_tokens(name, folder):
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / folder, local_files_only=True)
    rows = [row for row in recorded("A7_tokens") if row["tokenizer"] == name]
    assert rows
    for row in rows:
        assert tokenizer_image_token(row["prompt"], tokenizer) == row["ids"], row["prompt"]
        tensor = tokenizer_image_token(row["prompt"], tokenizer, return_tensors="pt")
        assert tensor.dtype == torch.int64
        assert tensor.tolist() == row["ids"]


def test_grids():
    data = recorded("A7_resolutions")
    assert data["rows"]
    for row in data["rows"]:
        grid, side = data["grids"][row["grid"]], data["patch"][row["grid"]]
        assert list(get_anyres_image_grid_shape(row["size"], grid, side)) == row["grid_shape"], row
        if "best_resolution" in row:
            assert list(select_best_resolution(row["size"], grid)) == row["best_resolution"], row


def test_unpadded_windows():
    rows = recorded("A7_unpad")
    assert rows
    for row in rows:
        height, width = row["H"], row["W"]
        places = torch.arange(height * width).view(1, height, width)
        window = unpad_image(places, row["size"])[0]
        assert list(window.shape) == row["out"], row
        assert divmod(int(window[0, 0]), width) == (row["top"], row["left"]), row


@pytest.mark.parametrize("row", recorded("A7_unpad"), ids=lambda row: f"{row['size']}-{row['H']}x{row['W']}")
def test_token_counts_of_merged_maps(row):
    """Pinpoints with a single grid, so that every image gets it."""
    base = row["tokens_total"] - row["tokens_grid_plus_newline"]
    unit = math.isqrt(base)
    columns, rows = row["W"] // unit, row["H"] // unit
    config = SimpleNamespace(
        mm_patch_merge_type="spatial_unpad",
        image_aspect_ratio="anyres_max_9",
        image_grid_pinpoints=[[columns * SIDE, rows * SIDE]],
    )
    source = merge_crops(torch.zeros(1 + columns * rows, base, 1), config, tuple(row["size"]), SIDE)
    height, width = row["resized"] or row["out"]
    assert source.period == width
    assert source.base == base
    assert source.tokens.shape[1] + height == row["tokens_total"]


def processed(image, aspect_ratio):
    config = SimpleNamespace(image_aspect_ratio=aspect_ratio, image_grid_pinpoints=GRID)
    return process_images([image], SigLipImageProcessor(SIDE), config).flatten(0, -4).numpy()


def made(name):
    """The array of this name, made here."""
    source, _, step = name.partition("_")
    if source == "real":
        image = Image.fromarray(array("real_in"))
        processor = SigLipImageProcessor(384)
        if step == "384_preprocess":
            return processor.preprocess(image)["pixel_values"].numpy()
        assert step == "384_anyres_string"
        return process_anyres_image(image, processor, "(1x1),(1x2),(2x1),(2x2)")[:2].numpy()
    if source == "video":
        assert step == "pixel_values"
        return SigLipImageProcessor(SIDE).preprocess(array("video_in"))["pixel_values"].numpy()
    if source in ("gray", "rgba"):
        assert step == "anyres"
        return process_anyres_image(Image.fromarray(array(f"{source}_in")), SigLipImageProcessor(SIDE), GRID).numpy()
    image = Image.fromarray(array(source))
    if step in ("anyres_max_9", "pad", "square"):
        return processed(image, step)
    if step == "expand2square":
        return np.asarray(expand2square(image, (127, 127, 127)))
    letterboxed = resize_and_pad_image(image, select_best_resolution(image.size, GRID))
    if step == "resize_and_pad":
        return np.asarray(letterboxed)
    assert step == "patches"
    return np.stack([np.asarray(patch) for patch in divide_to_patches(letterboxed, SIDE)])


INPUTS = [name for name, entry in IMAGES["arrays"].items() if "input" in entry["what"] or name.endswith("_in")]


@pytest.mark.parametrize("name", [name for name in IMAGES["arrays"] if name not in INPUTS])
def test_images(name):
    if name in ("in1_square", "in1_anyres_max_9") and int(PIL.__version__.partition(".")[0]) < 13:
        pytest.skip("recorded with Pillow 13; older ones resize this image by up to 8 of 255 levels otherwise")
    expected, found = array(name), made(name)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    if expected.dtype == np.uint8:
        assert np.array_equal(found, expected)
    else:
        assert np.abs(found - expected).max() <= PIXELS


def test_images_are_stacked_where_their_grids_agree():
    images = [Image.fromarray(array(f"in{index}")) for index in range(4)]
    config = SimpleNamespace(image_aspect_ratio="anyres_max_9", image_grid_pinpoints=GRID)
    types = {
        "two_different_grids": process_images(images[:2], SigLipImageProcessor(SIDE), config),
        "same_grids": process_images(images[2:4], SigLipImageProcessor(SIDE), config),
    }
    assert {name: type(value).__name__ for name, value in types.items()} == IMAGES["return_types"]


def test_image_aspect_ratios_that_crash_the_published_code_are_square_or_named():
    modes = dict(IMAGES["errors_by_image_aspect_ratio"])
    image = Image.fromarray(array("in0"))
    assert np.abs(processed(image, None) - array("in0_square")).max() <= PIXELS
    del modes["None"]
    assert modes
    for mode in modes:
        with pytest.raises(ConfigError, match=mode):
            processed(image, mode)
