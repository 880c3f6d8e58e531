"""The command line: an answer with its figures, and one line with status 2 for every mistake."""

import errno
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from video_files import write_video

from llava import __version__
from llava.cli import main
from llava.cli_errors import run
from llava.errors import UserError
from llava.token_compression import list_methods


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(write_video(tmp_path_factory.mktemp("clips") / "clip.mp4"))


@pytest.fixture
def ask(clip, tiny_checkpoint):
    """Ask about the clip with the tiny random model on the CPU; returns the exit status."""

    def ask(*arguments, video=clip):
        defaults = ["--model", str(tiny_checkpoint), "--device", "cpu", "--max-new-tokens", "2"]
        return main(["ask", str(video), "what is shown ?", *defaults, *arguments])

    return ask


@pytest.fixture(autouse=True)
def _levels():
    """The command sets the level of this package's messages for the process; put it back."""
    logger = logging.getLogger("llava")
    level = logger.level
    yield
    logger.setLevel(level)


def figures(output: str) -> dict[str, float]:
    """The numbers of the report below the answer."""
    return {
        label.strip(): float(value) for label, value in re.findall(r"^([a-z ,]+?)  +([\d.]+)", output, re.MULTILINE)
    }


def test_ask_prints_the_answer_tokens_and_milliseconds(ask, capsys):
    assert ask("--num-frames", "6", "--retention-ratio", "0.25") == 0
    output = capsys.readouterr().out
    numbers = figures(output)
    assert numbers["frames"] == 6
    assert numbers["tokens before compression"] == 24
    assert numbers["tokens after compression"] == 6
    assert "(25.0 %)" in output
    stages = [value for label, value in numbers.items() if label.endswith(", ms") and label != "total, ms"]
    assert len(stages) == 7
    assert numbers["total, ms"] == pytest.approx(sum(stages), abs=0.5)


def test_a_streamed_answer_is_the_same(ask, capsys):
    arguments = ["--model", "tiny", "--max-new-tokens", "9"]  # what a random model says depends on the versions
    assert ask(*arguments) == 0
    plain = capsys.readouterr().out.partition("\n\nframes")
    assert ask(*arguments, "--stream") == 0
    assert capsys.readouterr().out.partition("\n\nframes")[:2] == plain[:2]
    assert plain[0].strip()


def test_ask_takes_an_image(ask, capsys, tmp_path):
    Image.new("RGB", (60, 30)).save(tmp_path / "photo.jpg")
    assert ask("--retention-ratio", "0.25", "compression.images=true", video=tmp_path / "photo.jpg") == 0
    numbers = figures(capsys.readouterr().out)
    assert (numbers["tokens before compression"], numbers["tokens after compression"]) == (16, 4)


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ([], 24),
        (["--threshold", "-1"], 1),
        (["--method", "uniform", "--retention-ratio", "0.5"], 12),
        (["compression.retained_tokens=7"], 7),
        (["--retention-ratio", "0.5", "compression.merge=false"], 12),
        (["--config", "file.yaml"], 5),
        (["--config", "file.yaml", "--retention-ratio", "0.5"], 12),
        (["--config", "file.yaml", "compression.similarity_threshold=-1"], 1),
    ],
)
def test_settings_come_from_flags_overrides_and_files(ask, capsys, tmp_path, monkeypatch, arguments, kept):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.yaml").write_text("name: test\ncompression: {retained_tokens: 5}\n")
    assert ask("--num-frames", "6", *arguments) == 0
    assert figures(capsys.readouterr().out)["tokens after compression"] == kept


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--retention-ratio", "0"], ["retention_ratio", "above 0"]),
        (["--retention-ratio", "1.5"], ["retention_ratio", "at most 1"]),
        (["--retention-ratio", "nan"], ["retention_ratio", "expected a number"]),
        (["--retention-ratio", ".nan"], ["retention_ratio", "nan"]),
        (["--retention-ratio", "abc"], ["retention_ratio", "expected a number", "abc"]),
        (["--threshold", "2"], ["similarity_threshold", "[-1, 1]"]),
        (["--retention-ratio", "0.1", "--threshold", "0.9"], ["either --retention-ratio or --threshold"]),
        (["--method", "scisor", "--retention-ratio", "0.1"], ["did you mean 'scissor'"]),
        (["compression.retention_ration=0.1"], ["did you mean 'retention_ratio'"]),
        (["compresion.retention_ratio=0.1"], ["did you mean 'compression'"]),
        (["nonsense"], ["section.key=value"]),
        (["--num-frames", "0"], ["num_frames", "at least 1"]),
        (["--num-frames", "many"], ["num_frames", "whole number"]),
        (["--max-new-tokens", "0"], ["--max-new-tokens", "at least 1"]),
        (["video.decoder=opencv"], ["video.decoder", "decord"]),
        (["video.start=99"], ["video.start", "start earlier"]),
        (["--dtype", "float8"], ["dtype", "bfloat16"]),
        (["--device", "gpu"], ["Unknown device 'gpu'"]),
        (["--device", "cuda:99"], ["cuda:99", "--device cpu"]),
        (["--model", "no/such/folder"], ["no/such/folder"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--config", "broken.yaml"], ["broken.yaml", "not valid YAML"]),
        (["--config", "unknown.yaml"], ["unknown.yaml", "did you mean 'video'"]),
        (["--frobnicate"], ["unknown argument --frobnicate", "--help"]),
    ],
)
def test_each_mistake_is_one_line_and_status_2(ask, capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.yaml").write_text("name: [1\n")
    (tmp_path / "unknown.yaml").write_text("name: a\nvidoe: {num_frames: 2}\n")
    assert ask(*arguments) == 2
    assert_one_line(capsys, words)


def test_an_unusable_image_is_one_line_and_status_2(ask, capsys, tmp_path):
    (tmp_path / "photo.png").write_text("not an image")
    assert ask(video=tmp_path / "photo.png") == 2
    assert_one_line(capsys, ["photo.png cannot be read as an image"])


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", ["There is no file", "clip.mp4"]),
        ("empty", ["clip.mp4 is empty"]),
        ("text", ["clip.mp4 cannot be read as a video"]),
        ("folder", ["clip.mp4 is a folder"]),
    ],
)
def test_each_unusable_file_is_one_line_and_status_2(ask, capsys, tmp_path, kind, words):
    path = tmp_path / "clip.mp4"
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_text("" if kind == "empty" else "not a video\n" * 99)
    assert ask(video=path) == 2
    assert_one_line(capsys, words)


@pytest.mark.parametrize(
    "arguments", [["ask"], ["ask", "clip.mp4"], ["aks", "clip.mp4", "what?"], ["methods", "extra"]]
)
def test_wrong_usage_points_to_help(capsys, arguments):
    assert main(arguments) == 2
    assert_one_line(capsys, ["--help"])


def assert_one_line(capsys, words):
    captured = capsys.readouterr()
    assert captured.out == ""
    line, newline = captured.err[:-1], captured.err[-1:]
    assert line.startswith("error: ")
    assert newline == "\n"
    assert "\n" not in line
    for word in words:
        assert word in line


def test_verbose_shows_where_an_error_comes_from(ask, tmp_path, caplog):
    with caplog.at_level(logging.DEBUG, logger="llava"):
        assert ask("--verbose", video=tmp_path / "nowhere.mp4") == 2
    assert "VideoError" in caplog.text or any(record.exc_info for record in caplog.records)


def test_methods_and_version(capsys):
    assert main(["methods"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert [line.split()[0] for line in lines] == list_methods()
    assert all(len(line.split()) > 3 for line in lines)
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert __version__ in capsys.readouterr().out
    assert main([]) == 0
    assert "COMMAND" in capsys.readouterr().out


def test_help_needs_neither_torch_nor_transformers():
    heavy = "{'torch', 'transformers', 'numpy'}"
    program = f"import sys, llava.cli; llava.cli.main([]); sys.exit(bool({heavy} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


def raising(error: BaseException):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (UserError("a\nb"), 2, "error: a b\n"),
        (KeyboardInterrupt(), 130, "Interrupted"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory."), 1, "video.num_frames"),
        (MemoryError(), 1, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "out of memory"),
        (OSError(errno.ENOSPC, "No space left on device", "results/result.json"), 1, "results/result.json"),
    ],
)
def test_expected_errors_become_one_line(capsys, error, status, words):
    assert run(raising(error)) == status
    written = capsys.readouterr().err
    assert words in written
    assert written.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("a defect"), OSError(errno.EIO, "Input/output error"), RuntimeError("x")])
def test_a_defect_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        run(raising(error))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_and_a_closed_pipe_leave_no_traceback():
    command = [sys.executable, "-m", "llava.cli", "methods"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert "No space is left" in done.stderr
    assert "Traceback" not in done.stderr

    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 1
    assert done.stderr == ""


def test_an_interrupt_ends_with_one_line():
    program = (
        "import sys, time; from llava.cli_errors import run; "
        "print('ready', flush=True); sys.exit(run(lambda: time.sleep(60)))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, written = process.communicate(timeout=30)
    assert process.returncode == 130
    assert written == "Interrupted.\n"
