"""A preset is short for the keys it stands for, wherever a compression is written down."""

import pytest
import torch

from llava.config import build_experiment
from llava.errors import ConfigError
from llava.token_compression import CompressionConfig, compress
from llava.token_compression.presets import PRESETS

SHORT = {"preset": "recommended", "retention_ratio": 0.2}


def test_the_recommended_preset_is_the_method_that_places_tokens_and_keeps_their_positions():
    config = CompressionConfig.from_dict(SHORT)
    assert config == CompressionConfig(method="scissor_placed", position_ids="source", retention_ratio=0.2)
    assert CompressionConfig.from_dict({"preset": None, "retention_ratio": 0.2}) == CompressionConfig(
        retention_ratio=0.2
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_keeps_the_exact_budget(preset):
    config = CompressionConfig.from_dict({"preset": preset, "retained_tokens": 7})
    assert len(compress(torch.randn(4, 9, 8), config).tokens) == 7


def test_other_keys_override_those_of_the_preset():
    config = CompressionConfig.from_dict(SHORT | {"method": "uniform"})
    assert config == CompressionConfig(method="uniform", position_ids="source", retention_ratio=0.2)


def test_a_file_and_the_command_line_know_presets():
    expected = CompressionConfig.from_dict(SHORT)
    assert build_experiment({"name": "x", "compression": SHORT}, [], "x").compressions == (expected,)
    overrides = [f"compression.{key}={value}" for key, value in reversed(SHORT.items())]
    assert build_experiment({"name": "x"}, overrides, "x").compressions == (expected,)
    sweep = {"name": "x", "compression": {"preset": "recommended"}, "evaluation": {"retention_ratios": [0.2, 0.1]}}
    assert build_experiment(sweep, [], "x").compressions[0] == expected


def test_lmms_evals_arguments_know_presets():
    pytest.importorskip("lmms_eval", reason="needs the extra `eval`")
    from llava.lmms_eval_model import _split

    assert _split(dict(SHORT))[2] == CompressionConfig.from_dict(SHORT)


@pytest.mark.parametrize("value", ["recomended", 3, ["recommended"]])
def test_an_unknown_preset_is_named_with_those_that_there_are(value):
    with pytest.raises(ConfigError, match=r"unknown preset .*recommended"):
        CompressionConfig.from_dict({"preset": value, "retention_ratio": 0.2})
