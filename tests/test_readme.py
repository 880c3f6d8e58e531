"""What the README shows is what the project does."""

import re
from pathlib import Path

import pytest
import torch

from llava.cli import main
from llava.token_compression import CompressionConfig, compress, list_methods, registry

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_example_of_a_method_works_as_written():
    (source,) = [block for block in blocks("python") if "@register" in block]
    try:
        exec(compile(source, "README.md", "exec"), {})
        assert "first_frame" in list_methods()
        features = torch.randn(3, 4, 8)
        result = compress(features, CompressionConfig(method="first_frame", retained_tokens=4, merge=False))
        assert torch.equal(result.tokens, features[0])
    finally:
        registry._methods.pop("first_frame", None)


def test_example_on_tensors_works_as_written():
    (source,) = [block for block in blocks("python") if "compress(features" in block]
    names = {"features": torch.randn(8, 25, 16)}
    exec(compile(source, "README.md", "exec"), names)
    assert names["result"].tokens.shape == (64, 16)
    assert names["result"].positions.shape == (64,)
    assert names["result"].assignment.shape == (8, 25)


def test_example_in_python_answers(monkeypatch):
    first, second = [block for block in blocks("python") if "qa = VideoQA" in block or "qa.watch" in block]
    monkeypatch.chdir(ROOT)
    names: dict = {}
    exec(compile(first, "README.md", "exec"), names)
    assert names["answer"].source_tokens == 200
    assert names["answer"].kept_tokens == 50
    exec(compile(second, "README.md", "exec"), names)
    assert names["watched"].kept_tokens == 50


def test_report_on_the_bundled_model_is_the_one_shown(capsys):
    assert main(["check", "tiny"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line and " free: " not in line]
    assert len(lines) > 10
    assert [line for line in lines if f"    {line}\n" not in README] == []


def test_configuration_shown_is_the_default_one():
    (shown,) = blocks("yaml")
    assert shown.strip() == (ROOT / "configs" / "tiny_videomme.yaml").read_text().strip()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:configs|scripts|eval|llava)/[\w/.]+\w", README))))
def test_files_named_exist(path):
    if path != "llava/token_compression/first_frame.py":  # the example
        assert (ROOT / path).exists()
