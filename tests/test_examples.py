"""The scripts in examples/ run as they are, and answer what VideoQA answers."""

import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

from llava.assets import tiny_model_path
from llava.errors import UserError
from llava.pipeline import VideoQA
from llava.token_compression import CompressionConfig
from llava.video import VideoConfig, load_video

EXAMPLES = Path(__file__).parents[1] / "examples"
GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "ckpt_a"
DEMO = tiny_model_path().parent / "demo.mp4"
QUESTION = "What shape is red?"


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs an example with arguments and returns what it prints."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def qa():
    return VideoQA.from_pretrained()


@pytest.fixture
def pictures(tmp_path):
    """Two files, one of them with transparency."""
    files = []
    for frame, mode in zip(load_video(DEMO, VideoConfig(num_frames=3)).frames[1:], ("RGB", "RGBA"), strict=True):
        files.append(tmp_path / f"{mode}.png")
        Image.fromarray(frame).resize((200, 120)).convert(mode).save(files[-1])
    return files


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_every_example_runs_without_arguments(run, name):
    assert "orange" in run(name)


def test_image(run, qa, pictures):
    assert run("image.py", "--image", pictures[1], "--question", QUESTION).strip() == qa.ask(pictures[1], QUESTION).text


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs the recorded checkpoint ../shared/golden/ckpt_a")
def test_image_in_crops(run, pictures):
    expected = VideoQA.from_pretrained(GOLDEN).ask(pictures[0], QUESTION).text
    assert run("image.py", "--image", pictures[0], "--question", QUESTION, "--model", GOLDEN).strip() == expected


def test_interleaved(run, qa, pictures):
    question = f"<image> is first, <image> is second. {QUESTION}"
    printed = run("interleaved.py", "--images", *pictures, "--question", question)
    assert printed.strip() == qa.ask(pictures, question).text
    with pytest.raises(UserError, match="2 <image> placeholders but 1"):
        run("interleaved.py", "--images", pictures[0])


@pytest.mark.parametrize("ratio", [1.0, 0.1])
def test_video(run, qa, ratio):
    expected = qa.ask(DEMO, QUESTION, compression=CompressionConfig(retention_ratio=ratio)).text
    assert run("video.py", "--video", DEMO, "--question", QUESTION, "--retention-ratio", ratio).strip() == expected


def test_conversation(run, qa):
    """The second prompt holds the first answer."""
    first, second = "What color is the square?", QUESTION
    answers = run("conversation.py", DEMO, first, second).splitlines()
    assert answers[0::2] == [f"> {first}", f"> {second}"]
    turns = "{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n<|im_start|>user\n{}"
    prompt = turns.format(first, answers[1], second)
    assert answers[3] == qa.ask(DEMO, prompt, compression=CompressionConfig(retention_ratio=0.25)).text
