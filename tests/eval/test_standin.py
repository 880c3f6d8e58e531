import json
import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from standin_videos import make_videos

from eval.standin import read_kinds, write_home, write_video
from eval.standin_schemas import MLVU_DEV, MLVU_TEST, MVBENCH, SCHEMAS, VIDEOMMMU
from eval.videos import make_videos as world_videos
from eval.world import Split
from llava.errors import UserError
from llava.video import VideoConfig, load_video

FINGERPRINT = "0123456789abcdef" * 4
needs_datasets = pytest.mark.skipif(find_spec("datasets") is None, reason="needs the extra `eval`")


READ_BACK = """
import json
from datasets import load_dataset
from lmms_eval.tasks.videomme import utils
rows = load_dataset("lmms-eval/Video-MME")["test"]
out = []
for row in rows:
    (path,) = utils.videomme_doc_to_visual(row)
    prompt = utils.videomme_doc_to_text(row, {"post_prompt": "POST"})
    results = [utils.videomme_process_results(row, [letter])["videomme_perception_score"] for letter in "ABCD"]
    out.append({"row": row, "path": path, "prompt": prompt, "scores": [result["score"] for result in results]})
    aggregate = utils.videomme_aggregate_results(results)
    assert aggregate == 25, aggregate
print("OUTPUT" + json.dumps(out))
"""


@needs_datasets
def test_lmms_evals_own_task_reads_the_standin(tmp_path):
    """In a process of its own, offline, as HF_HOME is read when the libraries are imported."""
    home = tmp_path / "home"
    write_home(home, make_videos(2), FINGERPRINT)
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE"):
        environment.pop(name, None)
    command = [sys.executable, "-c", READ_BACK]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=100)
    assert process.returncode == 0, process.stderr
    samples = json.loads(process.stdout.partition("OUTPUT")[2])
    assert len(samples) == 6
    kinds = read_kinds(home)
    for number, sample in enumerate(samples):
        row, answer = sample["row"], number % 3
        assert row["options"] == ["A. red", "B. green", "C. blue", "D. yellow"]
        assert row["answer"] == "ABCD"[answer]
        assert sample["scores"] == [float(letter == answer) for letter in range(4)]
        assert f"Which color has object {answer}?\nA. red\nB. green\nC. blue\nD. yellow\nPOST" in sample["prompt"]
        assert kinds["videomme"][number] == ("color" if answer else "count")
        assert sample["path"].startswith(str(home))


def test_the_same_frames_are_the_same_bytes(tmp_path):
    (video,) = world_videos(Split.EVAL, 1)
    for number in range(12):
        write_video(tmp_path / f"{number}.mp4", video.frames, video.fps)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


@needs_datasets
def test_the_same_videos_are_the_same_bytes(tmp_path):
    for name in ("first", "second"):
        write_home(tmp_path / name, make_videos(1), FINGERPRINT)
    files = [path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*") if path.is_file()]
    videos = [file for file in files if file.suffix == ".mp4"]
    assert len(videos) == 1
    for file in videos:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


@pytest.mark.parametrize("name", SCHEMAS)
def test_each_part_of_a_benchmark_asks_its_kinds_of_questions(name):
    schema = SCHEMAS[name]
    videos = list(world_videos(Split.DEV, max(9, schema.videos), 5, schema.parts, schema.stretch, size=8))
    for video in videos:
        parts = schema.parts(video.index)
        assert len(video.questions) == len(parts)
        assert all(question.kind in part for question, part in zip(video.questions, parts, strict=True))
        assert 8 * schema.stretch <= len(video.frames) <= 64 * schema.stretch
    rows = [row for video in videos for row in schema.rows(video)]
    if name == "mvbench":
        assert [(config, kind) for config, _, kind in rows if config == "object_existence"] == [
            ("object_existence", "absent")
        ]
        assert {config for config, _, _ in rows} == set(MVBENCH)
    elif name.startswith("mlvu"):
        categories = {"mlvu_dev": MLVU_DEV, "mlvu_test": MLVU_TEST}[name]
        assert {columns["task_type"] for _, columns, _ in rows} == set(categories)
        assert all(kind in categories[columns["task_type"]] for _, columns, kind in rows)
    elif name == "videommmu":
        assert all(kind in VIDEOMMMU[track] for track, _, kind in rows)


def test_a_scene_that_cannot_be_asked_about_is_replaced():
    (first,) = world_videos(Split.DEV, 1, 5, lambda index: [["vanish"], ["order"]], size=8)
    assert [question.kind for question in first.questions] == ["vanish", "order"]
    with pytest.raises(RuntimeError, match="No scene"):
        list(world_videos(Split.DEV, 1, 5, lambda index: [["vanish"], ["vanish"]], size=8))


def test_written_frames_come_back(tmp_path):
    """Smooth frames, a different one each time, survive the encoder to within a few grey levels."""
    ramp = np.linspace(0, 120, 32)[:, None, None] + np.linspace(0, 80, 48)[None, :, None]
    frames = np.stack([(ramp + shift).repeat(3, axis=2) for shift in range(0, 50, 10)]).astype(np.uint8)
    write_video(tmp_path / "video.mp4", frames, fps=4.0)
    video = load_video(tmp_path / "video.mp4", VideoConfig(num_frames=5))
    assert video.total_frames == 5
    assert video.fps == pytest.approx(4.0)
    assert np.abs(video.frames.astype(int) - frames).max() <= 6


def test_an_interrupted_run_leaves_nothing_that_looks_finished(tmp_path):
    def interrupted():
        yield from make_videos(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_home(tmp_path / "home", interrupted(), FINGERPRINT)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match=r"taken.*evaluation\.data_dir"):
        write_home(tmp_path / "taken" / "home", make_videos(1), FINGERPRINT)
