"""Helpers that LLaVA scripts import."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from llava import mm_utils
from llava.errors import UserError
from llava.mm_utils import KeywordsStoppingCriteria, get_model_name_from_path, tokenizer_image_token
from llava.model.multimodal_encoder.image_processor import SigLipImageProcessor


class Letters:
    """One token per character."""

    bos_token_id = None

    def __call__(self, text):
        return SimpleNamespace(input_ids=[ord(letter) for letter in text])

    def batch_decode(self, rows, **_):
        return ["".join(map(chr, row.tolist())) for row in rows]


def ids(*texts):
    return torch.tensor([[ord(letter) for letter in text] for text in texts])


def test_placeholders_become_the_given_index():
    assert tokenizer_image_token("a<image>b", Letters(), -7) == [97, -7, 98]
    with pytest.raises(UserError, match="'np'"):
        tokenizer_image_token("a", Letters(), return_tensors="np")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("lmms-lab/llava-onevision-qwen2-7b-ov", "llava-onevision-qwen2-7b-ov"),
        ("/data/run/checkpoint-100/", "run_checkpoint-100"),
        ("model", "model"),
        ("checkpoint-5", "checkpoint-5"),
    ],
)
def test_model_name(path, name):
    assert get_model_name_from_path(path) == name


def test_rows_stop_one_by_one():
    stop = KeywordsStoppingCriteria(["END"], Letters(), ids("prompt", "prompt"))
    assert stop(ids("xEND", "xxxx"), None).tolist() == [True, False]


def test_a_keyword_in_the_prompt_does_not_stop():
    prompt = ids("say END")
    stop = KeywordsStoppingCriteria(["END"], Letters(), prompt)
    assert stop(torch.cat([prompt, ids("no")], dim=1), None).tolist() == [False]
    assert stop(torch.cat([prompt, ids("END")], dim=1), None).tolist() == [True]


def test_a_keyword_is_found_in_new_tokens_longer_than_the_prompt():
    stop = KeywordsStoppingCriteria(["END"], Letters(), ids("ab"))
    assert stop(ids("some answer END"), None).tolist() == [True]


def test_all_image_types_give_the_same_pixels():
    array = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    processor = SigLipImageProcessor(16)
    expected = processor.preprocess(array)["pixel_values"]
    assert expected.shape == (1, 3, 16, 16)
    for images in (Image.fromarray(array), [array], array[None], [Image.fromarray(array)], torch.from_numpy(array)):
        assert torch.equal(processor(images)["pixel_values"], expected)
    assert processor.preprocess(array, return_tensors="np")["pixel_values"].shape == (1, 3, 16, 16)
    gray = Image.fromarray(array[..., 0])
    assert processor.preprocess(gray)["pixel_values"].shape == (1, 3, 16, 16)


def test_pixels_cover_minus_one_to_one():
    for value, pixel in ((0, -1.0), (255, 1.0)):
        array = np.full((4, 4, 3), value, dtype=np.uint8)
        assert SigLipImageProcessor(8).preprocess(array)["pixel_values"].unique().tolist() == [pixel]


@pytest.mark.parametrize("images", [[], np.zeros((4, 4, 3)), [np.zeros((4, 4), dtype=np.uint8)]])
def test_images_that_cannot_be_preprocessed(images):
    with pytest.raises(UserError):
        SigLipImageProcessor(8).preprocess(images)


def test_scripts_find_the_published_names_here():
    for name in (
        *("process_images", "process_anyres_image", "select_best_resolution", "resize_and_pad_image"),
        *("divide_to_patches", "get_anyres_image_grid_shape", "expand2square", "load_image_from_base64"),
    ):
        assert callable(getattr(mm_utils, name))
