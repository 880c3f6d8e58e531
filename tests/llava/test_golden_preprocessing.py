"""Parity of prompts, prompt tokens and frame pixels with LLaVA-NeXT (A7)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from llava.conversation import conv_templates
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.multimodal_encoder.image_processor import SigLipImageProcessor

GOLDEN = Path(__file__).parents[2] / ".." / "shared" / "golden"
pytestmark = pytest.mark.skipif(not GOLDEN.exists(), reason="the recorded outputs (../shared/golden) are not here")


def recorded(name):
    return json.loads((GOLDEN / "a7" / name).read_text())


@pytest.mark.parametrize("name", conv_templates)
def test_prompts(name):
    rows = [row for row in recorded("A7_prompts.json")["rows"] if row["template"] == name and row["error"] is None]
    assert rows
    for row in rows:
        conversation = conv_templates[name].copy()
        roles = dict(zip("ua", conversation.roles, strict=True))
        for role, message in row["messages"]:
            conversation.append_message(roles[role], tuple(message) if isinstance(message, list) else message)
        assert conversation.get_prompt() == row["prompt"], row["script"]


@pytest.mark.parametrize("name", conv_templates)
def test_template_fields(name):
    expected = recorded("A7_prompts.json")["templates"][name]
    template = conv_templates[name]
    assert template.messages == []
    assert template.sep_style.name == expected["sep_style"]
    for field in ("system", "sep", "sep2", "version", "offset", "stop_str", "stop_token_ids"):
        assert getattr(template, field) == expected[field], field
    assert list(template.roles) == expected["roles"]


@pytest.mark.parametrize(("name", "folder"), [("tok", "ckpt_a"), ("tok_bos", "tokenizer_bos")])
def test_prompt_tokens(name, folder):
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / folder, local_files_only=True)
    rows = [row for row in recorded("A7_tokens.json") if row["tokenizer"] == name]
    assert rows
    for row in rows:
        assert tokenizer_image_token(row["prompt"], tokenizer) == row["ids"], row["prompt"]
        tensor = tokenizer_image_token(row["prompt"], tokenizer, return_tensors="pt")
        assert tensor.dtype == torch.int64
        assert tensor.tolist() == row["ids"]


@pytest.mark.parametrize(
    ("side", "source", "target"),
    [(126, "video_in", "video_pixel_values"), (384, "real_in", "real_384_preprocess"), (126, "in0", "in0_square")],
)
def test_pixels(side, source, target):
    with np.load(GOLDEN / "a7" / "A7_images.npz") as arrays:
        frames, expected = arrays[source], arrays[target]
    pixels = SigLipImageProcessor(side).preprocess(frames, return_tensors="pt")["pixel_values"]
    assert pixels.dtype == torch.float32
    assert np.abs(pixels.numpy() - expected).max() <= 1e-6


def test_process_images_without_an_aspect_ratio_mode():
    with np.load(GOLDEN / "a7" / "A7_images.npz") as arrays:
        image, expected = arrays["in1"], arrays["in1_square"]
    config = type("Config", (), {"image_aspect_ratio": "square"})
    assert np.abs(process_images([image], SigLipImageProcessor(126), config).numpy() - expected).max() <= 1e-6
