"""A threshold for a mean retention."""

import json
import re

import pytest
import torch

from llava.assets import tiny_model_path
from llava.calibrate import calibrate
from llava.cli import main
from llava.errors import ConfigError
from llava.token_compression import CompressionConfig, compress

DEMO = str(tiny_model_path().parent / "demo.mp4")
THRESHOLD = CompressionConfig(similarity_threshold=0.0)


def videos(count=4, frames=4):
    """Videos whose tokens differ the more, the higher their number."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1, 1, 16, generator=generator)
    return [base + 0.2 * (i + 1) * torch.randn(frames, 25, 16, generator=generator) for i in range(count)]


@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.8, 1.0])
def test_the_threshold_keeps_the_share_on_average(ratio):
    features = videos()
    found = calibrate(features, THRESHOLD, ratio)
    assert found.mean == pytest.approx(ratio, abs=1 / 100)  # one token of one of four videos is 0.25 %
    setting = CompressionConfig(similarity_threshold=found.threshold)
    assert found.ratios == tuple(compress(video, setting).stats.retention_ratio for video in features)
    assert found.tokens == (100,) * 4


def test_one_threshold_spreads_over_different_videos():
    found = calibrate(videos(), THRESHOLD, 0.5)
    assert found.deviation > 0.1
    assert found.ratios[0] < found.ratios[-1]


def test_no_other_threshold_is_nearer():
    features = videos(count=2)
    found = calibrate(features, THRESHOLD, 0.37)
    for threshold in torch.linspace(-1, 1, 81).tolist():
        setting = CompressionConfig(similarity_threshold=threshold)
        mean = sum(compress(video, setting).stats.retention_ratio for video in features) / 2
        assert abs(mean - 0.37) >= abs(found.mean - 0.37) - 1e-9


def test_a_share_below_what_every_frame_keeps_is_refused():
    with pytest.raises(ConfigError, match=r"keeps 1 % of these videos on average: it is 4 % at -1.*of each frame"):
        calibrate(videos(), CompressionConfig(similarity_threshold=0.0, temporal=False), 0.01)


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.1, float("nan")])
def test_an_impossible_share_is_refused(ratio):
    with pytest.raises(ConfigError, match="must be above 0 and at most 1"):
        calibrate(videos(), THRESHOLD, ratio)


def test_no_video_is_refused():
    with pytest.raises(ConfigError, match="at least one video"):
        calibrate([], THRESHOLD, 0.1)


def test_the_command_gives_what_asking_with_that_threshold_keeps(capsys):
    assert main(["calibrate", "--retention-ratio", "0.25", DEMO, "--json", "video.num_frames=4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["mean"] == pytest.approx(0.25, abs=0.03)
    assert found["tokens"] == [100]
    arguments = ["ask", DEMO, "What color is the square?", "--threshold", str(found["threshold"]), "--num-frames", "4"]
    assert main(arguments) == 0
    assert re.search(rf"tokens after compression +{round(found['mean'] * 100)} ", capsys.readouterr().out)


def test_the_report_has_the_spread(capsys):
    assert main(["calibrate", "--retention-ratio", "0.5", DEMO, DEMO, "--num-frames", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[:6]] == [
        *("threshold", "wanted", "mean", "standard deviation", "minimum", "maximum")
    ]
    assert "standard deviation  0.00 %" in lines
    assert sum(line.endswith(DEMO) for line in lines) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--retention-ratio", "0.1"], "the following arguments are required: VIDEO"),
        ([DEMO], "the following arguments are required: --retention-ratio"),
        (["--retention-ratio", "few", DEMO], "--retention-ratio is few: give a number such as 0.1"),
        (["--retention-ratio", "0.1", "missing.mp4"], "There is no file missing.mp4"),
        (["--retention-ratio", "0.1", DEMO, "--method", "uniform"], "has no similarity_threshold"),
        (["--retention-ratio", "0.1", DEMO, "compression.tempral=false"], "unknown key 'tempral'"),
        (["--retention-ratio", "0.1", "compression.temporal=false"], "at least one video"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys):
    assert main(["calibrate", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
