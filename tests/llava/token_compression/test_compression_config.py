import json
from dataclasses import FrozenInstanceError, asdict

import numpy as np
import pytest

from llava.errors import ConfigError
from llava.token_compression import CompressionConfig, list_methods


def test_methods_are_listed():
    assert {"scissor", "none", "random", "uniform", "l2norm"} <= set(list_methods())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, ["exactly one", "none of them"]),
        ({"method": "random"}, ["exactly one"]),
        ({"retention_ratio": 0.1, "retained_tokens": 5}, ["exactly one", "retention_ratio and retained_tokens"]),
        ({"retention_ratio": 0.1, "similarity_threshold": 0.9}, ["exactly one"]),
        ({"method": "scisor", "retention_ratio": 0.1}, ["'scisor'", "did you mean 'scissor'", "uniform"]),
        ({"method": None, "retention_ratio": 0.1}, ["method", "None"]),
        ({"retention_ratio": 0}, ["retention_ratio", "above 0"]),
        ({"retention_ratio": 1.01}, ["retention_ratio", "1.01"]),
        ({"retention_ratio": 10}, ["retention_ratio", "0.1 keeps 10 %"]),
        ({"retention_ratio": -0.1}, ["retention_ratio"]),
        ({"retention_ratio": float("nan")}, ["retention_ratio", "nan"]),
        ({"retention_ratio": "0.1"}, ["retention_ratio", "a number", "'0.1'"]),
        ({"retention_ratio": True}, ["retention_ratio", "True"]),
        ({"similarity_threshold": 1.5}, ["similarity_threshold", "[-1, 1]"]),
        ({"similarity_threshold": float("nan")}, ["similarity_threshold", "nan"]),
        ({"retained_tokens": 0}, ["retained_tokens", "at least 1"]),
        ({"retained_tokens": 1.5}, ["retained_tokens", "whole number"]),
        ({"retained_tokens": True}, ["retained_tokens", "True"]),
        ({"retention_ratio": 0.1, "error_tolerance": -1}, ["error_tolerance"]),
        ({"retention_ratio": 0.1, "error_tolerance": float("inf")}, ["error_tolerance"]),
        ({"retention_ratio": 0.1, "error_tolerance": None}, ["error_tolerance"]),
        ({"retention_ratio": 0.1, "temporal": 1}, ["temporal", "true or false"]),
        ({"retention_ratio": 0.1, "merge": "yes"}, ["merge"]),
        ({"retention_ratio": 0.1, "images": None}, ["images"]),
        ({"retention_ratio": 0.1, "position_ids": "sourced"}, ["position_ids", "did you mean 'source'"]),
        ({"retention_ratio": 0.1, "seed": -1}, ["seed"]),
        ({"retention_ratio": 0.1, "seed": 0.5}, ["seed", "whole number"]),
        ({"method": "uniform", "similarity_threshold": 0.9}, ["'uniform'", "no similarity_threshold"]),
        ({"method": "none", "retention_ratio": 0.5}, ["none", "keeps every token", "retention_ratio"]),
        ({"method": "none", "similarity_threshold": 0.5}, ["none", "similarity_threshold"]),
    ],
)
def test_impossible_settings_are_refused_with_the_way_out(settings, words):
    with pytest.raises(ConfigError) as caught:
        CompressionConfig(**settings)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("settings", [{"method": "none"}, {"method": "none", "retention_ratio": 1}])
def test_none_needs_no_size(settings):
    assert CompressionConfig(**settings).budget(7) == 7


def test_it_is_frozen_hashable_and_holds_plain_python_numbers():
    config = CompressionConfig(retention_ratio=np.float32(0.5), seed=np.int64(3))
    assert config == CompressionConfig(retention_ratio=0.5, seed=3)
    assert hash(config) == hash(CompressionConfig(retention_ratio=0.5, seed=3))
    assert json.loads(json.dumps(asdict(config)))["retention_ratio"] == 0.5
    with pytest.raises(FrozenInstanceError):
        config.retention_ratio = 0.1


def test_budget_rounds_and_keeps_at_least_one():
    assert CompressionConfig(retention_ratio=0.1).budget(6272) == 627
    assert CompressionConfig(retention_ratio=0.001).budget(10) == 1
    assert CompressionConfig(retained_tokens=7).budget(7) == 7
    assert CompressionConfig(similarity_threshold=0.9).budget(7) is None
    with pytest.raises(ConfigError, match="only 6 tokens"):
        CompressionConfig(retained_tokens=7).budget(6)


def test_from_dict_names_the_nearest_key():
    assert CompressionConfig.from_dict({"retention_ratio": 1}).retention_ratio == 1.0
    with pytest.raises(
        ConfigError, match=r"compression: unknown key 'retention_ration'; did you mean 'retention_ratio'"
    ):
        CompressionConfig.from_dict({"retention_ration": 0.1})


def test_from_yaml_reads_a_section_or_a_whole_file(tmp_path):
    expected = CompressionConfig(method="uniform", retention_ratio=0.1)
    (tmp_path / "plain.yaml").write_text("method: uniform\nretention_ratio: 0.1\n")
    (tmp_path / "experiment.yaml").write_text("name: x\ncompression:\n  method: uniform\n  retention_ratio: 0.1\n")
    assert CompressionConfig.from_yaml(tmp_path / "plain.yaml") == expected
    assert CompressionConfig.from_yaml(tmp_path / "experiment.yaml") == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("compression:\n  thresold: 0.9\n", ["bad.yaml: compression", "'thresold'"]),
        ("retention_ratio: 2\n", ["bad.yaml", "retention_ratio", "at most 1"]),
        ("retention_ratio: 1e-1\n", ["bad.yaml: retention_ratio", "0.1"]),
        ("position_ids: sorce\nretention_ratio: 0.1\n", ["position_ids", "did you mean 'source'"]),
        ("compression:\n", ["compression", "nothing"]),
    ],
)
def test_from_yaml_names_the_file_and_key(tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        CompressionConfig.from_yaml(path)
    assert all(word in str(caught.value) for word in words), str(caught.value)
