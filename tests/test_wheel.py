"""The wheel holds the package and the tiny model, and works where nothing of the checkout can be seen."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy, so that a build leaves nothing in the checkout and nothing stale gets into the wheel.
    source = folder / "source"
    source.mkdir()
    files = subprocess.run(
        ["git", "ls-files", "llava", "pyproject.toml", "README.md", "LICENSE"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    for name in files:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    run = [sys.executable, "-m", "pip", "-q"]
    build = [*run, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("llava_scissor-*.whl")
    target = folder / "site"
    subprocess.run([*run, "install", "--no-deps", "--target", str(target), str(wheel)], check=True)
    return wheel, target


def test_wheel_holds_every_module_the_tiny_model_and_the_licence(installed):
    wheel, _ = installed
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(["git", "ls-files", "llava"], cwd=ROOT, check=True, capture_output=True, text=True)
    assert set(tracked.stdout.split()) <= names
    assert "llava/assets/tiny/model.safetensors" in names
    assert any(name.endswith("LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("eval/", "tests/"))]
    assert wheel.stat().st_size < 20e6


def test_installed_command_answers_a_question(installed, tmp_path):
    _, target = installed
    environment = {**os.environ, "PYTHONPATH": str(target), "HF_HUB_OFFLINE": "1"}
    video = tmp_path / "clip.mp4"
    make = (
        "import av, numpy as np\n"
        f"with av.open({str(video)!r}, 'w') as c:\n"
        "    s = c.add_stream('mpeg4', rate=8); s.width = s.height = 80; s.pix_fmt = 'yuv420p'\n"
        "    for i in range(16):\n"
        "        c.mux(s.encode(av.VideoFrame.from_ndarray(np.full((80, 80, 3), 9 * i, 'uint8'), format='rgb24')))\n"
        "    c.mux(s.encode(None))\n"
    )
    subprocess.run([sys.executable, "-c", make], check=True)
    command = [
        sys.executable,
        "-m",
        "llava.cli",
        "ask",
        str(video),
        "What is the background?",
        "--retention-ratio",
        "0.1",
    ]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "tokens before compression" in result.stdout
    assert "200" in result.stdout
    where = subprocess.run(
        [sys.executable, "-c", "import llava; print(llava.__file__)"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert str(target) in where
