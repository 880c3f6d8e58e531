"""lmms-eval's own command with its own model `llava_onevision`, task `videomme` and nothing of ours but `llava`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lmms_eval", reason="needs the extra `eval`")

from datasets import Dataset

from eval.standin import standin_home, write_standin
from llava.assets import tiny_model_path
from llava.config import EvaluationConfig
from llava.pipeline import VideoQA
from llava.video import VideoConfig

CHECKOUT = Path(__file__).parents[2]


@pytest.mark.slow
def test_llava_onevision_on_videomme_answers_as_videoqa_does(tmp_path):
    """Without a GPU, `device_map=auto` and `device=cpu` keep the model from asking for "cuda:0"."""
    evaluation = EvaluationConfig(benchmark="videomme", data="standin", videos=4, data_dir=str(tmp_path))
    write_standin(evaluation)
    home = standin_home(evaluation)
    device = "" if torch.cuda.is_available() else ",device_map=auto,device=cpu"
    command = ["--model", "llava_onevision", "--tasks", "videomme", "--batch_size", "1", "--log_samples"]
    command += ["--model_args", f"pretrained={tiny_model_path()},max_frames_num=8{device}"]
    command += ["--output_path", str(tmp_path / "out")]
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(CHECKOUT)}
    if device:
        environment["ACCELERATE_USE_CPU"] = "true"
    ran = subprocess.run([sys.executable, "-m", "lmms_eval", *command], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    (file,) = (tmp_path / "out").rglob("*samples_videomme.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    qa = VideoQA.from_pretrained(dtype="float16" if torch.cuda.is_available() else "float32")
    (table,) = home.rglob("video-mme-test.arrow")
    documents = Dataset.from_file(str(table))
    for sample in samples:
        video = home / "videomme" / "data" / f"{documents[sample['doc_id']]['videoID']}.mp4"
        answer = qa.ask(video, sample["input"], video=VideoConfig(num_frames=8), max_new_tokens=16)
        assert sample["filtered_resps"] in (answer.text, [answer.text])
    correct = sum(sample["target"] in sample["filtered_resps"] for sample in samples)
    assert len(samples) == 16
    assert correct > 12  # four options: chance is 4
