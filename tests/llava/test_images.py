"""Grids, crops and files of images, and what cannot be used."""

import base64
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from llava.anyres import get_anyres_image_grid_shape, grid_resolutions, is_anyres, select_best_resolution
from llava.errors import ConfigError, ImageError, UserError
from llava.images import (
    divide_to_patches,
    expand2square,
    is_image_file,
    load_image,
    load_image_from_base64,
    process_images,
    resize_and_pad_image,
)
from llava.model.image_merge import unpad_image
from llava.model.multimodal_encoder.image_processor import SigLipImageProcessor

SIDE = 16
SQUARES = [[SIDE * columns, SIDE * rows] for columns in range(1, 4) for rows in range(1, 4)]
SIZES = st.tuples(st.integers(1, 300), st.integers(1, 300))


def picture(width, height, mode="RGB"):
    """Random pixels."""
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(image).convert(mode)


def process(images, **config):
    return process_images(images, SigLipImageProcessor(SIDE), SimpleNamespace(**config))


def test_three_spellings_of_a_grid():
    listed = grid_resolutions(SQUARES, SIDE)
    assert grid_resolutions(str(SQUARES), SIDE) == listed
    assert grid_resolutions("(1x1),(7x7),(3x3)", SIDE) == listed
    assert grid_resolutions("(1x1),...,(3x3)", SIDE) == listed


@pytest.mark.parametrize(
    "pinpoints",
    [None, [], "", "nonsense", "(3x3),(1x1)", "(0x1)", [[SIDE]], [[SIDE, 20]], [[0, SIDE]], 7, [["a", "b"]]],
)
def test_pinpoints_that_make_no_grid_name_the_key(pinpoints):
    """The published code falls back to a grid of 2 x 2."""
    with pytest.raises(ConfigError, match="image_grid_pinpoints"):
        get_anyres_image_grid_shape((30, 40), pinpoints, SIDE)


@given(SIZES)
def test_no_resolution_shows_more_of_an_image_than_the_chosen_one(size):
    def shown(resolution):
        scale = min(resolution[0] / size[0], resolution[1] / size[1])
        return min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])

    best = select_best_resolution(size, SQUARES)
    assert shown(best) == max(map(shown, SQUARES))
    assert all(best[0] * best[1] <= w * h for w, h in SQUARES if shown((w, h)) == shown(best))


@given(SIZES)
def test_crops_cover_the_letterboxed_image_row_by_row(size):
    columns, rows = get_anyres_image_grid_shape(size, SQUARES, SIDE)
    boxed = resize_and_pad_image(Image.new("RGB", size, (255, 255, 255)), (SIDE * columns, SIDE * rows))
    crops = divide_to_patches(boxed, SIDE)
    assert len(crops) == columns * rows
    again = np.block(
        [[[np.asarray(crops[columns * row + column])] for column in range(columns)] for row in range(rows)]
    )
    assert np.array_equal(again, np.asarray(boxed))


@given(SIZES)
def test_unpadding_keeps_all_of_the_image_and_little_else(size):
    """A map of one patch per pixel: what is cut off is black, and of what stays at most a row or column too many is."""
    resolution = select_best_resolution(size, SQUARES)
    boxed = torch.from_numpy(
        np.asarray(resize_and_pad_image(Image.new("RGB", size, (255, 255, 255)), resolution)).copy()
    )
    image = boxed.permute(2, 0, 1)[:1] > 0
    window = unpad_image(image, size)
    assert window.numel() > 0
    lost = int(image.sum() - window.sum())
    assert lost <= max(window.shape[1:])  # the image is rounded up and the window down
    assert (~window).sum() <= 2 * max(window.shape[1:])


def test_a_map_is_never_cut_down_to_nothing():
    assert unpad_image(torch.zeros(1, 4, 24), (10_000, 1)).shape == (1, 2, 24)
    assert unpad_image(torch.zeros(1, 24, 4), (1, 10_000)).shape == (1, 24, 2)


def test_modes_give_the_published_shapes():
    images = [picture(40, 20), picture(20, 40)]
    assert process(images).shape == (2, 3, SIDE, SIDE)
    assert process(images, image_aspect_ratio="square").shape == (2, 3, SIDE, SIDE)
    assert process(images, image_aspect_ratio="pad").shape == (2, 3, SIDE, SIDE)
    for mode in ("anyres", "anyres_max_9"):
        crops = process(images, image_aspect_ratio=mode, image_grid_pinpoints=SQUARES)
        assert [item.shape for item in crops] == [(7, 3, SIDE, SIDE), (7, 3, SIDE, SIDE)]
    mixed = process([picture(40, 20), picture(16, 16)], image_aspect_ratio="anyres", image_grid_pinpoints=SQUARES)
    assert [len(item) for item in mixed] == [7, 2]
    assert isinstance(mixed, list)


@pytest.mark.parametrize("kind", ["L", "RGBA"])
@pytest.mark.parametrize("mode", ["pad", "square", "anyres"])
def test_images_of_any_color_mode(kind, mode):
    """Padding a grayscale image fails in the published code."""
    pixels = process([picture(40, 20, kind)], image_aspect_ratio=mode, image_grid_pinpoints=SQUARES)
    assert pixels.shape[-3:] == (3, SIDE, SIDE)


def test_padding_is_of_the_processors_mean_color():
    pixels = process([Image.new("RGB", (40, 10))], image_aspect_ratio="pad")
    assert pixels[0, :, 0, 0].tolist() == pytest.approx([2 * 127 / 255 - 1] * 3)
    assert pixels[0, :, SIDE // 2, SIDE // 2].tolist() == [-1.0] * 3
    assert expand2square(Image.new("L", (4, 2), 9), 1).getpixel((0, 0)) == 1


@pytest.mark.parametrize("mode", ["highres", "crop_split", "anyres_maximum", "padd"])
def test_other_aspect_ratios_are_named(mode):
    assert not is_anyres(mode)
    with pytest.raises(ConfigError, match=mode):
        process([picture(4, 4)], image_aspect_ratio=mode, image_grid_pinpoints=SQUARES)


def test_no_image_and_no_picture_are_user_errors():
    with pytest.raises(UserError, match="no image"):
        process([])
    with pytest.raises(UserError, match="PIL image"):
        process([np.zeros((4, 4, 3))], image_aspect_ratio="pad")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp"])
def test_files_are_read_as_rgb(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    picture(6, 4).save(path)
    assert is_image_file(path)
    assert is_image_file(str(path).upper())
    image = load_image(path)
    assert (image.size, image.mode) == ((6, 4), "RGB")


def test_a_photo_is_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture(6, 4).save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").size == (4, 6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "There is no file"),
        (b"", "is empty"),
        (b"not an image", "cannot be read as an image"),
        ("cut", "read as"),
    ],
)
def test_unusable_files_are_named(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)  # lmms-eval sets it for the whole process
    path = tmp_path / "a.png"
    if content == "cut":
        picture(60, 40).save(path)
        content = path.read_bytes()[:500]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ImageError, match=message) as caught:
        load_image(path)
    assert "a.png" in str(caught.value)


def test_images_in_base64():
    buffer = io.BytesIO()
    picture(6, 4).save(buffer, "PNG")
    image = load_image_from_base64(base64.b64encode(buffer.getvalue()).decode())
    assert np.array_equal(np.asarray(image), np.asarray(picture(6, 4)))
    for text in ("abc", base64.b64encode(b"no image").decode()):
        with pytest.raises(ImageError, match="base64"):
            load_image_from_base64(text)
