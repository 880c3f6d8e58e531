from pathlib import Path

import pytest
from published import CHECKPOINTS, config_of

from llava.assets import BUNDLED
from llava.config import load_experiment, setting_name
from llava.conversation import conv_templates
from llava.errors import ConfigError
from llava.model.language_model.llava_qwen import LlavaQwenConfig
from llava.model.video_layout import video_layout
from llava.token_compression import CompressionConfig

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))

EXAMPLE = """\
name: example
video: {num_frames: 16}
compression: {method: scissor, temporal: false}
evaluation: {data: standin, retention_ratios: [1.0, 0.5, 0.1]}
"""
SWEEP = "evaluation: {retention_ratios: [1.0, 0.1]}\n"


@pytest.fixture
def example(tmp_path):
    path = tmp_path / "example.yaml"
    path.write_text(EXAMPLE)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load_and_say_how_to_run_them(path):
    experiment = load_experiment(path)
    assert experiment.name == path.stem or path.stem.startswith(experiment.name)
    assert experiment.model.conv_template in conv_templates
    assert len({setting_name(config) for config in experiment.compressions}) == len(experiment.compressions)
    if experiment.evaluation.data == "hub":
        assert experiment.model.dtype == "bfloat16"
        assert f"# bash scripts/eval_videomme.sh configs/{path.name}" in path.read_text()
    assert load_experiment(path, ["compression.retention_ratio=0.1"]).compressions == (
        CompressionConfig(retention_ratio=0.1),
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_listed_with_their_checkpoint(path):
    checkpoint = load_experiment(path).model.path
    assert f"| `{path.name}` | `{checkpoint}` |" in (path.parent / "README.md").read_text()


def test_there_is_a_config_for_every_published_checkpoint():
    paths = [load_experiment(path).model.path for path in CONFIGS]
    assert sorted(path for path in paths if path not in BUNDLED) == sorted(CHECKPOINTS)


@pytest.mark.parametrize(
    ("stem", "frames", "tokens", "newlines"),
    [("onevision_7b", 32, 6272, 1), ("llava_video_7b", 64, 64 * 169, 64 * 13), ("scissor_baseline_7b", 32, 6272, 0)],
)
def test_tokens_of_a_video_are_those_of_the_published_evaluations(stem, frames, tokens, newlines):
    experiment = load_experiment(CONFIGS[0].with_name(f"{stem}.yaml"))
    config = LlavaQwenConfig.from_dict(config_of(experiment.model.path))
    for key, value in experiment.model.overwrite_config.items():
        setattr(config, key, value)
    assert experiment.video.num_frames == frames
    layout = video_layout(config, frames)
    assert (layout.tokens, layout.newlines) == (tokens, newlines)


@pytest.mark.parametrize(
    ("content", "overrides"),
    [
        ("name: a\n", []),
        ("name: a\ncompression: {method: checkpoint}\n", []),
        ("name: a\ncompression: {method: checkpoint, retention_ratio: null}\n", []),
        ("name: a\ncompression: {method: scissor}\n" + SWEEP, ["compression.method=checkpoint"]),
    ],
)
def test_without_a_budget_the_checkpoint_decides(tmp_path, content, overrides):
    path = tmp_path / "one.yaml"
    path.write_text(content)
    assert load_experiment(path, overrides).compressions == (None,)
    assert setting_name(None) == "checkpoint"
    tenth = [*overrides, "compression.retention_ratio=0.1"]
    assert load_experiment(path, tenth).compressions == (CompressionConfig(retention_ratio=0.1),)


def test_a_sweep_can_be_asked_for_where_the_checkpoint_would_decide(tmp_path):
    path = tmp_path / "one.yaml"
    path.write_text("name: a\n")
    experiment = load_experiment(path, ["evaluation.retention_ratios=[1.0, 0.1]"])
    assert [setting_name(config) for config in experiment.compressions] == ["r100", "r10"]


def test_the_checkpoints_settings_are_not_mixed_with_others(tmp_path):
    path = tmp_path / "one.yaml"
    path.write_text("name: a\ncompression: {method: checkpoint, merge: false}\n")
    with pytest.raises(ConfigError, match="leave out merge"):
        load_experiment(path)


def test_sweep_has_one_setting_per_ratio_and_keeps_the_options(example):
    full, half, tenth = load_experiment(example).compressions
    assert full == CompressionConfig(method="none")
    assert half == CompressionConfig(retention_ratio=0.5, temporal=False)
    assert tenth == CompressionConfig(retention_ratio=0.1, temporal=False)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("compression.retention_ratio=0.10", CompressionConfig(retention_ratio=0.1, temporal=False)),
        ("compression.similarity_threshold=0.9", CompressionConfig(similarity_threshold=0.9, temporal=False)),
        ("compression.retained_tokens=64", CompressionConfig(retained_tokens=64, temporal=False)),
    ],
)
def test_a_budget_on_the_command_line_replaces_the_sweep(example, override, expected):
    assert load_experiment(example, [override]).compressions == (expected,)


@pytest.mark.parametrize("written", ["{similarity_threshold: 0.9}", "{retained_tokens: 3}", "{method: none}"])
def test_a_budget_on_the_command_line_replaces_the_one_in_the_file(tmp_path, written):
    path = tmp_path / "one.yaml"
    path.write_text(f"name: one\ncompression: {written}\n")
    overrides = ["compression.retained_tokens=5", "compression.retention_ratio=0.1"]
    assert load_experiment(path, overrides).compressions == (CompressionConfig(retention_ratio=0.1),)


def test_overrides_reach_every_section_and_the_last_one_counts(example):
    overrides = ["name=other", "model.path=some/model", "video.num_frames=4", "video.num_frames=8", "video.start=null"]
    experiment = load_experiment(example, [*overrides, "evaluation.retention_ratios=[0.25]", "model.dtype=float32"])
    assert (experiment.name, experiment.model.path, experiment.model.dtype) == ("other", "some/model", "float32")
    assert (experiment.video.num_frames, experiment.video.start) == (8, None)
    assert [config.retention_ratio for config in experiment.compressions] == [0.25]


def test_an_override_reaches_a_section_in_a_section_and_keeps_its_other_values(example):
    overrides = ["evaluation.judge.model=local", "evaluation.judge.base_url=http://127.0.0.1:8000/v1"]
    judge = load_experiment(example, overrides).evaluation.judge
    assert (judge.model, judge.base_url) == ("local", "http://127.0.0.1:8000/v1")
    assert load_experiment(example, overrides[:1]).evaluation.judge.base_url == "https://api.openai.com/v1"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("compression.retention_ratoi=0.1", ["retention_ratoi", "did you mean 'retention_ratio'"]),
        ("compresion.retention_ratio=0.1", ["compresion", "did you mean 'compression'"]),
        ("compression.retention_ratio=1.5", ["retention_ratio", "1.5"]),
        ("compression.retention_ratio=ten", ["retention_ratio", "a number", "ten"]),
        ("compression.retention_ratio=1e-1", ["retention_ratio", "0.1"]),
        ("compression.method=scisor", ["scisor", "scissor"]),
        ("video.num_frames=0", ["num_frames", "0"]),
        ("video.num_frames=eight", ["num_frames", "eight"]),
        ("model.dtype=float8", ["dtype", "float8", "bfloat16"]),
        ("evaluation.limit=0", ["limit", "0"]),
        ("evaluation.retention_ratios=[0.5,2]", ["retention_ratios", "2"]),
        ("evaluation.data=cloud", ["data", "cloud", "standin"]),
        ("evaluation.judge.modle=x", ["modle", "did you mean 'model'"]),
        ("evaluation.judge.base_url=localhost:8000", ["base_url", "http://"]),
        ("evaluation.judge.base_url=https://me:secret@host/v1", ["base_url", "leave user name and password out"]),
        ("evaluation.limit.x=1", ["limit", "a whole number"]),
        ("evaluation.limit", ["section.key=value"]),
        ("video=3", ["key of the section"]),
        ("video.num_frames=[1", ["not valid YAML"]),
    ],
)
def test_a_wrong_override_names_itself_and_the_way_out(example, override, words):
    with pytest.raises(ConfigError) as error:
        load_experiment(example, [override])
    message = str(error.value)
    assert message.startswith(f"command line ({override})")
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("name: a\nvidoe: {}\n", ["vidoe", "did you mean 'video'"]),
        ("model: {}\n", ["'name'", "missing"]),
        ("name: a\nmodel: {device: 1}\n", ["device", "text"]),
        ("name: a\ncompression: {retention_ratio: 0.1, similarity_threshold: 0.9}\n", ["exactly one"]),
        ("name: a\nevaluation:\n", ["evaluation", "nothing"]),
        ("name: [a\n", ["not valid YAML"]),
        ("- a\n", ["keys and values"]),
    ],
)
def test_a_wrong_file_is_named(tmp_path, content, words):
    path = tmp_path / "wrong.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as error:
        load_experiment(path, ["video.num_frames=4"])
    assert str(path) in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_experiment(tmp_path / "nowhere.yaml")


def test_setting_names_tell_settings_apart():
    configs = [
        CompressionConfig(method="none"),
        CompressionConfig(retention_ratio=0.1),
        None,
        CompressionConfig(retention_ratio=0.15),
        CompressionConfig(retention_ratio=0.1, temporal=False),
        CompressionConfig(retention_ratio=0.1, merge=False),
        CompressionConfig(retention_ratio=0.1, seed=3),
        CompressionConfig(similarity_threshold=0.1),
        CompressionConfig(similarity_threshold=0.1, error_tolerance=0.05),
        CompressionConfig(retained_tokens=10),
        CompressionConfig(method="uniform", retention_ratio=0.1),
    ]
    names = [setting_name(config) for config in configs]
    assert len(set(names)) == len(names)
    assert names[:2] == ["r100", "r10"]
    assert not any("/" in name or " " in name for name in names)
