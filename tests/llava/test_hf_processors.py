"""Checkpoints loaded from disk as users do, with transformers' own processors, chat templates and pipelines."""

import numpy as np
import pytest
import transformers

pytest.importorskip("torchvision", reason="transformers' processors of videos need torchvision")

from hf_checkpoints import CHECKPOINTS, decode_with_pyav, write_checkpoint

from llava.assets import tiny_model_path
from llava.instrument import record
from llava.serving import video_tokens
from llava.token_compression import CompressionConfig, compression

DEMO = str(tiny_model_path().parent / "demo.mp4")


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request, tmp_path_factory):
    if request.param == "smolvlm":
        pytest.importorskip("num2words", reason="SmolVLM's processor needs num2words")
    return write_checkpoint(request.param, tmp_path_factory.mktemp(request.param))


def conversation(videos=1):
    content = [{"type": "video"}] * videos + [{"type": "text", "text": "What happens?"}]
    return [{"role": "user", "content": content}]


def prepared(processor, videos):
    """Inputs for one prompt with videos of eight frames, a quarter of a second apart."""
    text = processor.apply_chat_template(conversation(len(videos)), add_generation_prompt=True, tokenize=False)
    about = {"fps": 4.0, "total_num_frames": 8, "frames_indices": list(range(8)), "duration": 2.0}
    return processor(
        text=[text],
        videos=videos,
        video_metadata=[about] * len(videos),
        do_sample_frames=False,
        return_tensors="pt",
    )


def clip(seed):
    """Noise, so that no processor leaves out what repeats."""
    return np.random.default_rng(seed).integers(0, 256, (8, 64, 96, 3), dtype=np.uint8)


@pytest.mark.parametrize("videos", [1, 2])
def test_chat_template_and_processor(checkpoint, videos):
    """A quarter of each video, as many as are known before; ids and answer keep their lengths."""
    processor = transformers.AutoProcessor.from_pretrained(checkpoint)
    model = transformers.AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    inputs = prepared(processor, [clip(seed) for seed in range(videos)])
    config = CompressionConfig(retention_ratio=0.25)
    with record() as recorder, compression(model, config):
        found = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert found.shape[1] == inputs["input_ids"].shape[1] + 3
    assert len(recorder.compressions) == videos
    for stats in recorder.compressions:
        assert stats.kept_tokens == config.budget(stats.source_tokens)
    if "video_grid_thw" in inputs and model.config.model_type.startswith("qwen"):
        vision, (_, rows, columns) = model.config.vision_config, inputs["video_grid_thw"][0].tolist()
        size = (rows * vision.patch_size, columns * vision.patch_size)
        assert video_tokens(model.config, config, 8, *size).kept == recorder.compressions[0].kept_tokens


def test_pipeline(checkpoint, monkeypatch):
    """`compression(pipe.model, ...)` around the pipeline of transformers that reads videos."""
    decode_with_pyav(monkeypatch)
    pipe = transformers.pipeline("any-to-any", model=str(checkpoint), device="cpu")
    content = [{"type": "video", "video": DEMO}, {"type": "text", "text": "What happens?"}]
    with record() as recorder, compression(pipe.model, retention_ratio=0.25):
        answers = pipe(text=[{"role": "user", "content": content}], max_new_tokens=3, return_full_text=False)
    assert isinstance(answers[0]["generated_text"], str)
    (stats,) = recorder.compressions
    assert stats.kept_tokens == round(stats.source_tokens / 4)
