"""Checkpoints with only a projector or LoRA weights, and the complete one that they were trained from."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import is_peft_available

from llava.errors import CheckpointError, ConfigError, DeviceError
from llava.model import adapter
from llava.model.builder import load_pretrained_model
from llava.model.device_map import VISUAL

needs_peft = pytest.mark.skipif(not is_peft_available(), reason="peft is not installed")
IDS = torch.tensor([[2, -200, 3, 4, 5]])
PROJECTOR = "model.mm_projector.0.weight"


@pytest.fixture
def projector(tiny_checkpoint, llava, tmp_path):
    """A folder as training the projector alone leaves it: no weights but its own, no tokenizer."""
    folder = tmp_path / "projector"
    folder.mkdir()
    shutil.copy(tiny_checkpoint / "config.json", folder)
    trained = {name: 2 * value for name, value in llava.state_dict().items() if "mm_projector" in name}
    torch.save(trained, folder / "mm_projector.bin")
    return folder


@pytest.fixture
def lora(tiny_checkpoint, llava, make_video, tmp_path):
    """A folder as LoRA training leaves it, and the logits of the model as it was trained."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path / "lora-model"
    torch.manual_seed(1)
    trained = copy.deepcopy(llava)
    trained.model.mm_projector[0].weight.data.mul_(2)
    layers = r"model\.layers\.\d+\.(self_attn|mlp)\.(q|v|up)_proj"
    wrapped = get_peft_model(trained, LoraConfig(r=4, target_modules=layers, init_lora_weights=False))
    wrapped.eval().save_pretrained(folder)
    shutil.copy(tiny_checkpoint / "config.json", folder)
    other = {f"base_model.model.{PROJECTOR}": trained.model.mm_projector[0].weight.data}
    torch.save(other, folder / "non_lora_trainables.bin")
    return folder, trained(IDS, images=[make_video(3)], modalities=["video"]).logits


def load(folder, base, **arguments):
    return load_pretrained_model(str(folder), base and str(base), "llava_qwen", **{"device_map": "cpu", **arguments})


def test_a_projector_replaces_that_of_its_base(projector, tiny_checkpoint, llava):
    tokenizer, model, _, _ = load(projector, tiny_checkpoint)
    assert tokenizer("red ball").input_ids == [7, 8]
    for name, value in llava.state_dict().items():
        assert torch.equal(model.state_dict()[name], 2 * value if "mm_projector" in name else value), name


def test_the_base_need_not_have_what_the_checkpoint_brings(projector, tiny_checkpoint, tmp_path):
    base = shutil.copytree(tiny_checkpoint, tmp_path / "base")
    weights = {name: value for name, value in load_file(base / "model.safetensors").items() if "mm_proj" not in name}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    load(projector, base)
    weights.pop("model.norm.weight")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 of the model's weights: model\.norm\.weight"):
        load(projector, base)


@needs_peft
def test_lora_weights_are_merged(lora, tiny_checkpoint, make_video):
    folder, wanted = lora
    model = load(folder, tiny_checkpoint)[1]
    assert type(model).__name__ == "LlavaQwenForCausalLM"
    assert not any("lora" in name for name, _ in model.named_modules())
    found = model(IDS, images=[make_video(3)], modalities=["video"]).logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    base = load(tiny_checkpoint, None)[1](IDS, images=[make_video(3)], modalities=["video"]).logits
    assert (found - base).abs().max() > 0.1


@needs_peft
def test_lora_weights_for_other_layers_are_refused(lora, tiny_checkpoint):
    folder, _ = lora
    file = folder / "adapter_model.safetensors"
    save_file({name.replace("layers.1", "layers.9"): value for name, value in load_file(file).items()}, file)
    with pytest.raises(CheckpointError, match=r"does not fit its model_base: it is for model\.layers\.9"):
        load(folder, tiny_checkpoint)


@needs_peft
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter_config.json", "{", "cannot be added"),
        ("adapter_model.safetensors", "", "damaged or incomplete"),
        ("adapter_model.safetensors", None, "no adapter_model"),
        ("non_lora_trainables.bin", "x", r"non_lora_trainables\.bin is damaged"),
    ],
)
def test_damaged_lora_folders(lora, tiny_checkpoint, name, content, message):
    folder, _ = lora
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load(folder, tiny_checkpoint)


@needs_peft
def test_lora_and_quantised_weights_exclude_each_other(lora, tiny_checkpoint):
    with pytest.raises(ConfigError, match="LoRA weights are merged"):
        load(lora[0], tiny_checkpoint, load_8bit=True)


def test_lora_without_peft(tmp_path, llava, monkeypatch):
    (tmp_path / "adapter_config.json").write_text("{}")
    monkeypatch.setattr(adapter, "is_peft_available", lambda: False)
    with pytest.raises(CheckpointError, match="pip install peft"):
        adapter.merge_lora(llava, tmp_path)


def test_a_partial_checkpoint_without_its_base(projector):
    with pytest.raises(CheckpointError, match=r"only a projector or LoRA weights.* as model_base"):
        load(projector, None)


def test_a_base_for_a_complete_checkpoint(tiny_checkpoint):
    with pytest.raises(CheckpointError, match="leave model_base out"):
        load(tiny_checkpoint, tiny_checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts.update({"model.mm_projektor.bias": torch.ones(2)}), r"model\.mm_projektor\.bias"),
        (lambda parts: parts.update({PROJECTOR: torch.ones(2, 3)}), r"\(2, 3\) instead of \(32, 16\)"),
    ],
)
def test_a_projector_that_does_not_fit(projector, tiny_checkpoint, change, message):
    parts = torch.load(projector / "mm_projector.bin")
    change(parts)
    torch.save(parts, projector / "mm_projector.bin")
    with pytest.raises(CheckpointError, match=message):
        load(projector, tiny_checkpoint)


def test_an_offloaded_parameter_is_not_replaced(projector, tiny_checkpoint, llava):
    torch.save({"lm_head.weight": llava.lm_head.weight.data}, projector / "mm_projector.bin")
    parts = ["model.embed_tokens", "model.layers", "model.norm", *VISUAL, "lm_head"]
    device_map = {**dict.fromkeys(parts, "cpu"), "lm_head": "disk"}
    with pytest.raises(DeviceError, match=r"offloads lm_head\.weight"):
        load(projector, tiny_checkpoint, device_map=device_map)


def test_the_config_is_the_partial_checkpoints_own(projector, tiny_checkpoint):
    path = projector / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "mm_newline_position": "grid"}))
    assert load(projector, tiny_checkpoint)[1].config.mm_newline_position == "grid"
