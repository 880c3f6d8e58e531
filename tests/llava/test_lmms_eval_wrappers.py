"""lmms-eval's own models, with transformers' own processors, on checkpoints of tiny random models: videos shrink.

lmms-eval loads the checkpoint from disk, reads the video, fills the chat template and generates. Its Qwen models need
qwen-vl-utils. A CPU and fewer frames are all that is asked for otherwise than in configs/hf.
"""

from pathlib import Path

import pytest

pytest.importorskip("lmms_eval", reason="needs the extra `eval`")
pytest.importorskip("decord", reason="lmms-eval reads videos with decord")
pytest.importorskip("torchvision", reason="transformers' processors of videos need torchvision")

import yaml
from hf_checkpoints import decode_with_pyav, write_checkpoint
from lmms_eval.api.instance import Instance
from lmms_eval.models.model_utils.gen_metrics import reset_logged_metrics, summarize_logged_metrics

from llava.assets import tiny_model_path
from llava.lmms_eval_hf import CompressedWrapper

CONFIGS = Path(__file__).parents[2] / "configs" / "hf"
DEMO = str(tiny_model_path().parent / "demo.mp4")
CPU = {
    "llava_hf": "device=cpu,device_map=cpu,max_frames_num=8",
    "internvl_hf": "device=cpu,device_map=cpu,num_frames=8",
}
QWEN = "device=cpu,device_map=cpu,max_num_frames=8,min_pixels=3136,max_pixels=6272"


def wrapper_of(kind):
    fields = yaml.safe_load((CONFIGS / f"{kind}.yaml").read_text())
    return dict(part.split("=") for part in fields["model_args"].split(","))["wrapper"]


@pytest.fixture(autouse=True)
def _decoder(monkeypatch):
    decode_with_pyav(monkeypatch)


@pytest.mark.parametrize("kind", [file.stem for file in sorted(CONFIGS.glob("*.yaml"))])
def test_wrapper_compresses(kind, tmp_path):
    wrapper = wrapper_of(kind)
    if wrapper.startswith("qwen"):
        pytest.importorskip("qwen_vl_utils", reason="lmms-eval's Qwen models need qwen-vl-utils")
    if kind == "smolvlm":
        pytest.importorskip("num2words", reason="SmolVLM's processor needs num2words")
    arguments = {"huggingface": "device=cpu,device_map=cpu"}.get(wrapper, CPU.get(wrapper, QWEN))
    checkpoint = write_checkpoint(kind, tmp_path)
    counts = {}
    for ratio in (1.0, 0.25):
        client = CompressedWrapper.create_from_arg_string(
            f"wrapper={wrapper},pretrained={checkpoint},{arguments},retention_ratio={ratio}", {"batch_size": 1}
        )
        reset_logged_metrics()
        answers = client.generate_until(requests(client))
        assert len(answers) == 2
        counts[ratio] = summarize_logged_metrics()
    source = counts[1.0]["avg_video_tokens"]
    assert counts[1.0]["avg_video_tokens_kept"] == counts[0.25]["avg_video_tokens"] == source > 4
    assert counts[0.25]["avg_video_tokens_kept"] == round(source / 4)


def requests(client):
    """As lmms-eval's tasks make them: messages for models that take them, else the question and its video."""
    client.task_dict = {"task": {"test": ["Which?", "How many?"]}}
    options = {"max_new_tokens": 4, "temperature": 0, "do_sample": False}

    def messages(question):
        content = [{"type": "video", "url": DEMO}, {"type": "text", "text": question}]
        return [{"role": "user", "content": content}]

    def arguments(number):
        if client.is_simple:
            return "Which?", dict(options), lambda question: [DEMO], number, "task", "test"
        return "Which?", messages, dict(options), number, "task", "test"

    return [
        Instance(
            "generate_until",
            arguments(number),
            0,
            metadata={"task": "task", "doc_id": number, "repeats": 1},
        )
        for number in range(2)
    ]
