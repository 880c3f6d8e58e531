"""The suite: its answers are those that generation gives, its figures those of its answers, and nothing runs twice."""

import dataclasses
import json
import random
from importlib import metadata

import numpy as np
import pytest
import torch

from eval.suite.__main__ import main
from eval.suite.answers import answer
from eval.suite.config import label, load_suite
from eval.suite.features import Asked, prepare, questions_about, subject
from eval.suite.statistics import Questions, holm, p_value
from eval.tables.bootstrap import Estimate
from eval.tiny_data import HEAD, TURN
from eval.tiny_wordings import WORDINGS
from eval.videos import make_videos
from eval.world import Split
from llava.assets import tiny_model_path
from llava.cli_errors import run
from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import ConfigError
from llava.model.builder import load_pretrained_model
from llava.token_compression import CompressionConfig, compression

YAML = """
name: small
methods: [scissor, {method: uniform, merge: false}]
retention_ratios: [0.3, 0.1]
videos: 3
split: DEV
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("suite") / "small.yaml"
    path.write_text(YAML)
    return path


@pytest.fixture(scope="module")
def host():
    return load_pretrained_model(str(tiny_model_path()), None, "llava_qwen", device_map="cpu", torch_dtype="float32")


@pytest.fixture(scope="module")
def data(file, host, tmp_path_factory):
    _, model, processor, _ = host
    return prepare(load_suite(file), model, processor, "tiny", tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    "config",
    [
        CompressionConfig(method="none"),
        CompressionConfig(retention_ratio=0.2),
        CompressionConfig(retention_ratio=0.2, position_ids="source"),
        CompressionConfig(method="visionzip", retention_ratio=0.2),
    ],
    ids=lambda config: f"{config.method}-{config.position_ids}",
)
def test_answers_are_those_of_generation(config, host, data):
    tokenizer, model, processor, _ = host
    answers = answer(model, tokenizer, data, config, batch=2)
    assert set(answers.kept_tokens) == {config.budget(data.features[0].shape[:2].numel())}
    assert set(answers.chosen) <= set("ABCD")
    place = iter(zip(answers.said, answers.chosen, strict=True))
    for video, asked in zip(make_videos(Split.DEV, 3, 1), data.asked, strict=True):
        index = np.linspace(0, len(video.frames) - 1, model.config.mm_num_frames, dtype=int)
        pixels = processor.preprocess(video.frames[index], return_tensors="pt")["pixel_values"]
        for number, one in enumerate(asked):
            said, chosen = next(place)
            assert said == chosen or said not in "ABCD"
            if number == 0:
                after = f"\n{WORDINGS['videomme'].prompt(one.question())}{TURN}"
                ids = [*tokenizer(HEAD).input_ids, IMAGE_TOKEN_INDEX, *tokenizer(after).input_ids]
                with compression(model, config=config):
                    found = model.generate(
                        torch.tensor([ids]),
                        images=[pixels],
                        modalities=["video"],
                        do_sample=False,
                        max_new_tokens=1,
                    )
                assert tokenizer.decode(found[0]) == said


def test_what_is_finished_is_read_and_not_run_again(file, tmp_path, capsys, monkeypatch):
    arguments = [str(file), f"output_dir={tmp_path}"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out.rpartition("minutes")[0].rpartition("\n")[0]
    assert "| scissor | " in printed
    assert "| uniform-merge=False | " in printed
    monkeypatch.setattr("eval.suite.__main__.answer", lambda *_: pytest.fail("ran again"))
    assert main(arguments) == 0
    assert capsys.readouterr().out.rpartition("minutes")[0].rpartition("\n")[0] == printed
    assert printed.strip() in (tmp_path / "small" / "results.md").read_text()
    cell = json.loads((tmp_path / "small" / "tiny" / "r30.json").read_text())
    asked = (tmp_path / "small" / "tiny").glob("questions-*.jsonl")
    assert len(cell["said"]) == len(next(asked).read_text().splitlines())
    assert cell["environment"]["packages"]["torch"] == metadata.version("torch")


def test_figures_are_those_of_the_answers():
    asked = [Asked(video, kind, "", (), "A", None, None, 8) for video in range(40) for kind in ("x", "x", "y")]
    rng = random.Random(0)
    right = [rng.random() < 0.7 for _ in asked]
    questions = Questions(asked)
    own = questions.accuracy(right)
    by_kind = [np.mean([r for r, a in zip(right, asked, strict=True) if a.kind == kind]) for kind in ("x", "y")]
    assert own.value == pytest.approx(100 * np.mean(by_kind))
    assert own.interval[0] < own.value < own.interval[1]
    assert questions.accuracy(right, lambda one: one.kind == "z") is None
    assert np.ptp(own.minus(questions.accuracy(right)).draws) == 0  # paired
    assert p_value(own.minus(own)) == 1


def test_holm_takes_the_smallest_first():
    assert holm({"a": 0.01, "b": 0.02, "c": 0.5}) == {"a", "b"}
    assert holm({"a": 0.02, "b": 0.02, "c": 0.5}) == set()
    assert p_value(Estimate(2.0, np.random.default_rng(0).normal(2.0, 1.0, 10_000))) == pytest.approx(0.0455, abs=0.003)


def test_a_question_is_about_the_object_it_names():
    seen = 0
    for video in make_videos(Split.DEV, 12, 3, size=16):
        for asked in questions_about(video):
            row = subject(asked.question(), video)
            assert (row is None) == (asked.size is None) == (asked.moving is None)
            if asked.kind in ("count", "absent", "scene"):
                assert row is None
            if asked.kind == "small":
                assert asked.size == "small"
                seen += 1
            if asked.kind == "motion":
                assert asked.moving == (asked.options["ABCD".index(asked.letter)] != "still")
                seen += 1
    assert seen > 5


def test_labels_tell_settings_apart(file):
    suite = load_suite(file, ["methods=[scissor, {method: scissor, merge: false}, random]"])
    assert [label(config) for config in suite.compressions(0.1)] == ["scissor", "scissor-merge=False", "random"]
    assert (
        label(dataclasses.replace(suite.compressions(0.1)[0], position_ids="source")) == "scissor-position_ids=source"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("retention_ratios=[1.5]", "outside"),
        ("methods=[scisor]", "did you mean 'scissor'"),
        ("methods=[3]", "neither a name nor keys and values"),
        ("reference=random", "is none of the methods scissor, uniform-merge=False"),
        ("models=[tiny, elsewhere/tiny]", "folders must differ, got tiny, tiny"),
        ("videos=1", "videos: 1 must be at least 2"),
        ("vidoes=3", "did you mean 'videos'"),
        ("split=TRAIN", "did you mean|valid names|TRAIN"),
        ("videos", "write key=value"),
    ],
)
def test_mistakes_are_named(file, override, message):
    with pytest.raises(ConfigError, match=message):
        load_suite(file, [override])


def test_methods_that_need_more_are_refused(file, tmp_path, capsys):
    assert run(lambda: main([str(file), "methods=[scissor, fastvid]", f"output_dir={tmp_path}"])) == 2
    assert "error: Method 'fastvid' needs map_attn, map_embed" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named(file, tmp_path, capsys):
    (tmp_path / "taken").touch()
    assert run(lambda: main([str(file), f"output_dir={tmp_path / 'taken'}"])) == 2
    assert f"error: Cannot write results to {tmp_path / 'taken'}" in capsys.readouterr().err
