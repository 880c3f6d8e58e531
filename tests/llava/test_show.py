"""The command `show`: what it draws is what `compress` returns."""

import json
import re

import av
import numpy as np
import pytest
import torch
from PIL import Image

from llava.assets import tiny_model_path
from llava.cli import main
from llava.pipeline import VideoQA
from llava.show import look
from llava.show.picture import MIN_SIDE, TINT, colors, draw, picture_size
from llava.token_compression import CompressionConfig, compress

DEMO = tiny_model_path().parent / "demo.mp4"
CONFIG = CompressionConfig(retention_ratio=0.1)


def test_it_shows_methods_that_need_more_than_tokens():
    config = CompressionConfig(method="visionzip", retention_ratio=0.1)
    shown = look(VideoQA.from_pretrained(), DEMO, config, "What color is the circle?", (0.2,))
    assert sum(shown.kept_per_frame()) == 20
    assert shown.answers[0][1].kept_tokens == 40


def test_without_a_size_a_method_keeps_a_tenth(tmp_path, capsys):
    assert main(["show", str(DEMO), "--method", "divprune", "--out", str(tmp_path)]) == 0
    assert "20 of 200 tokens are kept (10.0 %)" in capsys.readouterr().out


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder that a run of the command leaves."""
    folder = tmp_path_factory.mktemp("show") / "made" / "by the command"
    assert main(["show", str(DEMO), "--out", str(folder), "--question", "What color is the <b>?"]) == 0
    return folder


def test_it_shows_what_compress_returns():
    qa = VideoQA.from_pretrained()
    shown = look(qa, DEMO, CONFIG)
    _, pixels = qa.read_video(DEMO)
    with torch.inference_mode():
        expected = compress(qa.model.encode_frames(pixels), CONFIG)
    assert torch.equal(shown.result.assignment, expected.assignment)
    assert shown.labels.reshape(8, 25).tolist() == expected.assignment.tolist()
    frame, row, column = shown.representatives.T
    assert (frame * 25 + row * 5 + column).tolist() == expected.positions.tolist()
    assert sum(shown.kept_per_frame()) == 20
    assert shown.shown_per_frame() == [len(set(frame)) for frame in expected.assignment.tolist()]
    assert shown.answers == ()


def test_what_the_command_writes(written, capsys):
    assert sorted(path.name for path in written.iterdir()) == [
        "components.mp4",
        *(f"frame_{index:03}.png" for index in range(8)),
        "index.html",
        "merge_map.json",
    ]
    merge_map = json.loads((written / "merge_map.json").read_text())
    assert merge_map["stats"]["kept_tokens"] == len(merge_map["representatives"]) == 20
    for kept, (frame, row, column) in enumerate(merge_map["representatives"]):
        assert 0 <= merge_map["assignment"][frame][row][column] < 20, kept
    with av.open(str(written / "components.mp4")) as movie:
        frames = [frame.to_ndarray(format="rgb24") for frame in movie.decode(video=0)]
    first = np.asarray(Image.open(written / "frame_000.png"))
    assert frames[0].shape == first.shape
    assert np.abs(frames[0].astype(int) - first).mean() < 6  # the codec loses a little
    assert len({frame.tobytes() for frame in frames}) >= 8


def test_the_page_needs_nothing_but_itself(written):
    page = (written / "index.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert page.count("<img ") == 8
    assert page.count("<rect ") == 200
    assert "What color is the &lt;b&gt;?" in page
    for share in ("100 %", "50 %", "25 %", "10 %", "5 %"):
        assert f">{share}<" in page


def test_a_component_has_one_color_and_a_border():
    labels = np.array([[0, 0], [1, -1]])
    gray = np.full((400, 400, 3), 128, dtype=np.uint8)
    palette = colors(2)
    picture = np.asarray(draw(gray, labels, np.array([[0, 0]]), palette)).astype(int)
    assert picture.shape == (400, 400, 3)
    fill = (1 - TINT) * 128 + TINT * palette[:2].astype(float)
    assert np.abs(picture[100, 190] - fill[0]).max() <= 1
    assert np.abs(picture[100, 210] - fill[0]).max() <= 1  # no line between two tokens of one component
    assert np.array_equal(picture[199, 100], palette[0])
    assert np.array_equal(picture[200, 100], palette[1])
    assert picture[300, 300].max() < 60  # dropped
    assert picture[100, 100].min() == 255  # a representative
    assert picture[100, 300].min() < 255


def test_colors_do_not_depend_on_how_many_there_are():
    assert np.array_equal(colors(50)[:7], colors(7))
    assert len(np.unique(colors(50), axis=0)) == 50


@pytest.mark.parametrize("size", [(160, 160, 5), (1920, 1080, 14), (64, 36, 14), (4000, 10, 14)])
def test_pictures_have_even_sides_and_the_shape_of_the_frame(size):
    width, height = picture_size(*size)
    assert width % 2 == height % 2 == 0
    assert max(width, height) <= 1024
    assert min(width, height) >= MIN_SIDE or max(width, height) == 1024
    assert abs(width / height / (size[0] / size[1]) - 1) < 0.02 or height == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["clip.mp4"], ["--out", "show --help"]),
        (["clip.mp4", "--out", "x"], ["no file clip.mp4"]),
        (["picture.png", "--out", "x"], ["picture.png", "image"]),
        (["VIDEO", "--out", "x", "--method", "none"], ["none", "another method"]),
        (["VIDEO", "--out", "picture.png"], ["picture.png", "--out"]),
        (["VIDEO", "--out", "x", "compresion.merge=false"], ["compresion", "compression"]),
        (["VIDEO", "--out", "x", "--retention-ratio", "3"], ["retention_ratio", "3"]),
    ],
)
def test_mistakes_are_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("picture.png")
    assert main(["show", *(str(DEMO) if word == "VIDEO" else word for word in arguments)]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert all(word in errors for word in words), errors
