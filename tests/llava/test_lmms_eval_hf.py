"""lmms-eval's own models on transformers, with compression."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("lmms_eval", reason="needs the extra `eval`")

import yaml
from lmms_eval import models
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelRegistryV2
from test_hf_families import answer
from tiny_hf import TINY

from llava.errors import ConfigError, UserError
from llava.lmms_eval_hf import CompressedWrapper, manifest
from llava.token_compression import CompressionConfig, compression, remove

ROOT = Path(__file__).parents[2]


class Wrapper(lmms):
    """What lmms-eval's models have in common: arguments, `model`, `generate_until`."""

    is_simple = False

    def __init__(self, pretrained, device=None, batch_size=1):
        super().__init__()
        self.pretrained = pretrained
        self.model = TINY["qwen2_5_vl"].model()
        self.rows = [[4]]

    def generate_until(self, requests):
        return [answer(self.model, TINY["qwen2_5_vl"].prompts(self.rows)) for _ in requests]

    def loglikelihood(self, requests):
        raise NotImplementedError

    def generate_until_multi_round(self, requests):
        raise NotImplementedError


@pytest.fixture
def wrapped(monkeypatch):
    monkeypatch.setattr(models, "get_model", {"own": Wrapper}.__getitem__)
    return CompressedWrapper.create_from_arg_string("wrapper=own,pretrained=x/y,retained_tokens=4,method=uniform", {})


def test_wrapper_compresses(wrapped):
    assert isinstance(wrapped, Wrapper)
    assert wrapped.pretrained == "x/y"
    ((_, found),) = wrapped.generate_until([None])
    remove(wrapped.model)
    with compression(wrapped.model, method="uniform", retained_tokens=4):
        assert torch.equal(found, answer(wrapped.model, TINY["qwen2_5_vl"].prompts([[4]]))[1])


def test_answers_without_compression_are_an_error(wrapped):
    wrapped.rows = [[]]
    with pytest.raises(UserError, match="own answered 1 requests"):
        wrapped.generate_until([None])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("pretrained=x,retention_ratio=0.1", "wrapper=qwen2_5_vl"),
        ("wrapper=own,pretrained=x", "exactly one"),
        ("wrapper=own,pretrained=x,retention_ratio=2", "retention_ratio"),
    ],
)
def test_arguments(monkeypatch, arguments, message):
    monkeypatch.setattr(models, "get_model", {"own": Wrapper}.__getitem__)
    with pytest.raises(ConfigError, match=message):
        CompressedWrapper.create_from_arg_string(arguments)


def test_lmms_eval_finds_it():
    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    assert registry.get_model_class("llava_scissor_hf") is CompressedWrapper
    assert 'llava_scissor_hf = "llava.lmms_eval_hf:manifest"' in (ROOT / "pyproject.toml").read_text()


def test_configurations():
    """Every file is one that lmms-eval takes, for a wrapper that it has, with a compression that is valid."""
    configs = sorted((ROOT / "configs" / "hf").glob("*.yaml"))
    assert len(configs) >= 5
    for file in configs:
        fields = yaml.safe_load(file.read_text())
        assert set(fields) == {"model", "model_args", "tasks", "batch_size", "output_path", "log_samples"}, file
        arguments = dict(part.split("=") for part in fields["model_args"].split(","))
        assert models.MODEL_REGISTRY_V2.get_manifest(arguments["wrapper"]), file
        CompressionConfig(retention_ratio=float(arguments["retention_ratio"]))
