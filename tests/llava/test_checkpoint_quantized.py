"""8- and 4-bit loading: which layers are quantised, that answers stay close, and what is said without bitsandbytes."""

import importlib.metadata
import shutil

import pytest
import torch
from torch import nn
from transformers.utils import is_bitsandbytes_available

from llava.errors import ConfigError, DeviceError
from llava.model import quantized
from llava.model.builder import load_pretrained_model
from llava.model.completeness import meta_model
from llava.model.memory import weight_bytes
from llava.model.quantized import quantization_config, quantized_layers

needs_bitsandbytes = pytest.mark.skipif(not is_bitsandbytes_available(), reason="bitsandbytes is not installed")
IDS = torch.tensor([[2, -200, 3, 4, 5]])


@pytest.fixture(scope="module")
def wide(make_llava):
    """A model whose layers divide into blocks of 4-bit weights."""
    return make_llava(hidden_size=64, intermediate_size=128, initializer_range=0.1)


@pytest.fixture(scope="module")
def folder(wide, tiny_checkpoint, tmp_path_factory):
    """Its checkpoint."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("wide") / "model")
    wide.save_pretrained(folder)
    return folder


def load(folder, **arguments):
    return load_pretrained_model(str(folder), None, "llava_qwen", **{"device_map": "cpu", **arguments})[1]


@pytest.mark.parametrize("argument", ["load_8bit", "load_4bit", "load_in_4bit"])
def test_without_bitsandbytes_the_error_says_how_to_get_it(folder, monkeypatch, argument):
    monkeypatch.setattr(quantized, "is_bitsandbytes_available", lambda: False)
    bits = argument[-4]
    with pytest.raises(DeviceError, match=f"{bits}-bit loading needs bitsandbytes .*pip install 'bitsandbytes>="):
        load(folder, **{argument: True})


def test_a_broken_bitsandbytes_is_one_error(wide, monkeypatch):
    def broken(name):
        raise OSError("libcudart.so: cannot open\nshared object file")

    monkeypatch.setattr(quantized, "is_bitsandbytes_available", lambda: True)
    monkeypatch.setattr(quantized.importlib, "import_module", broken)
    with pytest.raises(DeviceError, match=r"does not start here: libcudart\.so: cannot open shared object file"):
        quantization_config(8, wide.config, torch.float16)


def test_only_the_decoders_layers_are_quantised(wide):
    names = {name for name, _ in quantized_layers(wide)}
    expected = {
        f"model.layers.{index}.{name}_proj"
        for index in range(2)
        for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    }
    assert names == expected


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("bits", "agreement"), [(8, 0.999), (4, 0.95)])
def test_a_quantised_model_answers_almost_the_same(folder, wide, make_video, bits, agreement, dtype):
    import bitsandbytes

    layer = {8: bitsandbytes.nn.Linear8bitLt, 4: bitsandbytes.nn.Linear4bit}[bits]
    model = load(folder, **{f"load_{bits}bit": True, "torch_dtype": dtype})
    replaced = {name for name, module in model.named_modules() if isinstance(module, layer)}
    assert replaced == {name for name, _ in quantized_layers(wide)}
    assert type(model.lm_head) is nn.Linear
    assert {str(weight.dtype) for weight in model.get_vision_tower().parameters()} == {f"torch.{dtype}"}
    assert {str(weight.dtype) for weight in model.model.mm_projector.parameters()} == {f"torch.{dtype}"}

    frames = make_video(3)
    logits = model(IDS, images=[frames], modalities=["video"]).logits.float()
    exact = wide(IDS, images=[frames], modalities=["video"]).logits
    assert torch.corrcoef(torch.stack([logits.flatten(), exact.flatten()]))[0, 1] > agreement
    assert not torch.equal(logits, exact)
    assert model.generate(IDS, images=[frames], modalities=["video"], max_new_tokens=3).shape == (1, 3)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [8, 4])
def test_the_predicted_memory_is_what_is_used(folder, wide, bits):
    model = load(folder, **{f"load_{bits}bit": True, "torch_dtype": "bfloat16"})
    used = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    for module in (module for _, module in model.named_modules() if hasattr(module, "weight")):
        if bits == 8 and getattr(module.weight, "SCB", None) is not None:
            used += module.weight.SCB.nbytes
        state = getattr(module.weight, "quant_state", None)
        if state is not None:
            used += state.absmax.nbytes + state.state2.absmax.nbytes
    predicted = weight_bytes(meta_model(wide.config))[f"{bits}-bit"]
    # the last group of 256 scales is not full in a tiny layer
    assert predicted == pytest.approx(used, abs=4 * len(list(quantized_layers(wide))))


def test_layers_that_do_not_divide_into_blocks(make_llava, monkeypatch):
    monkeypatch.setattr(quantized, "is_bitsandbytes_available", lambda: True)
    monkeypatch.setattr(quantized.importlib, "import_module", lambda name: None)
    with pytest.raises(ConfigError, match=r"blocks of 64.*hidden_size 32"):
        quantization_config(4, make_llava().config, torch.float32)


def test_what_transformers_is_asked_for(wide, monkeypatch):
    monkeypatch.setattr(quantized, "is_bitsandbytes_available", lambda: True)
    monkeypatch.setattr(quantized.importlib, "import_module", lambda name: None)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.46.1")  # transformers asks for it, too
    eight = quantization_config(8, wide.config, torch.bfloat16)
    four = quantization_config(4, wide.config, torch.bfloat16)
    assert (eight.load_in_8bit, eight.load_in_4bit) == (True, False)
    assert (four.load_in_8bit, four.load_in_4bit) == (False, True)
    assert (four.bnb_4bit_quant_type, four.bnb_4bit_use_double_quant) == ("nf4", True)
    assert four.bnb_4bit_compute_dtype == torch.bfloat16
    for config in (eight, four):
        assert "lm_head" in config.llm_int8_skip_modules
        assert "model.vision_tower" in config.llm_int8_skip_modules
