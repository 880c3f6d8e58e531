"""LLaVA-OneVision in the layouts of this package and of transformers: the same weights, the same answers."""

import math

import pytest
import torch
from conftest import video
from transformers import LlavaOnevisionForConditionalGeneration

from llava.anyres import get_anyres_image_grid_shape
from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import UserError
from llava.hf.convert import from_transformers, to_transformers
from llava.model.language_model.llava_qwen import LlavaQwenForCausalLM
from llava.token_compression import compression

IMAGE, VIDEO = 62, 63
BEFORE, AFTER = [5, 6], [7, 8, 9]


def both(llava):
    return llava, to_transformers(llava, IMAGE, VIDEO)


def own_inputs(frames):
    ids = torch.tensor([[*BEFORE, IMAGE_TOKEN_INDEX, *AFTER]])
    return {"input_ids": ids, "images": [video(frames)], "modalities": ["video"]}


def their_inputs(frames):
    ids = torch.tensor([[*BEFORE, *[VIDEO] * (4 * frames + 1), *AFTER]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": video(frames)[None]}


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "none"},
        {"retention_ratio": 0.4},
        {"retention_ratio": 0.4, "position_ids": "source"},
        {"similarity_threshold": 0.3},
        {"method": "random", "retained_tokens": 2},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_same_logits_and_answers(llava, frames, settings):
    own, theirs = both(llava)
    with torch.no_grad(), compression(own, **settings), compression(theirs, **settings):
        expected, found = own(**own_inputs(frames)).logits, theirs(**their_inputs(frames)).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        options = {"max_new_tokens": 6, "do_sample": False}
        inputs = own_inputs(frames)
        answer = own.generate(inputs.pop("input_ids"), **inputs, **options)
        ids = theirs.generate(**their_inputs(frames), **options, eos_token_id=1, pad_token_id=0)
    assert torch.equal(ids[:, their_inputs(frames)["input_ids"].shape[1] :], answer)


@pytest.mark.parametrize("size", [(60, 30), (20, 64), (64, 64)])
@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("positions", ["contiguous", "source"])
def test_images_with_crops(make_llava, size, images, positions):
    """A base image and crops, with black borders and newlines, compressed or not."""
    pinpoints = [[64, 32], [32, 64], [64, 64]]
    own = make_llava(image_aspect_ratio="anyres_max_9", image_grid_pinpoints=pinpoints)
    theirs = to_transformers(own, IMAGE, VIDEO)
    crops = 1 + math.prod(get_anyres_image_grid_shape(size, pinpoints, 32))
    pixels = video(crops, seed=3)
    ids = torch.tensor([[*BEFORE, IMAGE_TOKEN_INDEX, *AFTER]])
    own_image = {"images": [pixels], "modalities": ["image"], "image_sizes": [size]}
    with torch.no_grad():
        count = own(ids, **own_image).logits.shape[1] - len(BEFORE) - len(AFTER)
        their_ids = torch.tensor([[*BEFORE, *[IMAGE] * count, *AFTER]])
        their_image = {"pixel_values": pixels[None], "image_sizes": torch.tensor([size[::-1]])}
        settings = {"retention_ratio": 0.3, "images": images, "position_ids": positions}
        with compression(own, **settings), compression(theirs, **settings):
            expected, found = own(ids, **own_image).logits, theirs(their_ids, **their_image).logits
    assert (expected.shape[1] < count) == images
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_there_and_back(llava):
    back = from_transformers(to_transformers(llava, IMAGE, VIDEO))
    before, after = llava.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = to_transformers(back, IMAGE, VIDEO)
    with torch.no_grad():
        found = again(**their_inputs(2)).logits
        assert torch.equal(found, to_transformers(llava, IMAGE, VIDEO)(**their_inputs(2)).logits)


def test_saved_in_either_layout(llava, tmp_path):
    """Both are checkpoints that the other programs read."""
    to_transformers(llava, IMAGE, VIDEO).save_pretrained(tmp_path / "theirs")
    theirs = LlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path / "theirs").eval()
    from_transformers(theirs).save_pretrained(tmp_path / "own")
    own = LlavaQwenForCausalLM.from_pretrained(tmp_path / "own").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(**their_inputs(2)).logits, own(**own_inputs(2)).logits)
        torch.testing.assert_close(own(**own_inputs(2)).logits, llava(**own_inputs(2)).logits)


def test_dtype_and_mode_stay(llava):
    converted = to_transformers(llava.to(torch.bfloat16), IMAGE, VIDEO)
    assert converted.dtype == torch.bfloat16
    assert not converted.training
    assert from_transformers(converted).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "fields",
    [{"mm_newline_position": "grid"}, {"mm_spatial_pool_mode": "average"}, {"mm_projector_type": "mlp3x_gelu"}],
    ids=str,
)
def test_models_that_transformers_does_not_have(make_llava, fields):
    with pytest.raises(UserError, match=next(iter(fields))):
        to_transformers(make_llava(**fields), IMAGE, VIDEO)


def test_placeholders_outside_of_the_vocabulary(llava):
    with pytest.raises(UserError, match="151646"):
        to_transformers(llava)
