"""Where the parts of a model go: automatic spreading, maps given by the user, and offloading to disk."""

import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava.errors import CheckpointError, DeviceError
from llava.model import device_map as device_maps
from llava.model.builder import load_pretrained_model
from llava.model.completeness import meta_model
from llava.model.device_map import VISUAL, place, spread
from llava.model.memory import parameter_bytes

IDS = torch.tensor([[2, -200, 3, 4, 5]])


def whole_map(**changes):
    """Every part of the tiny model on the CPU, except for the changes."""
    parts = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", *VISUAL, "lm_head"]
    return {**dict.fromkeys(parts, "cpu"), **{name.replace("_at_", "."): device for name, device in changes.items()}}


def load(folder, **arguments):
    return load_pretrained_model(str(folder), None, "llava_qwen", **arguments)[1]


def answers(model, frames):
    logits = model(IDS, images=[frames], modalities=["video"]).logits
    return logits, model.generate(IDS, images=[frames], modalities=["video"], max_new_tokens=3)


@pytest.mark.parametrize("shards", ["one file", "shards"])
@pytest.mark.parametrize("offloaded", [["model.layers.1"], ["model.layers.0", "model.layers.1", "lm_head"]])
def test_layers_on_disk_give_the_same_logits(tiny_checkpoint, tmp_path, llava, make_video, offloaded, shards):
    folder = tiny_checkpoint
    if shards == "shards":
        folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
        (folder / "model.safetensors").unlink()
        llava.save_pretrained(folder, max_shard_size="20KB")
    model = load(folder, device_map=whole_map() | dict.fromkeys(offloaded, "disk"))
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    for wanted, found in zip(answers(llava, make_video(3)), answers(model, make_video(3)), strict=True):
        assert torch.equal(wanted, found)


def test_pickled_weights_on_disk_need_a_folder(tiny_checkpoint, tmp_path, llava):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save(llava.state_dict(), folder / "pytorch_model.bin")
    on_disk = whole_map() | {"model.layers.1": "disk"}
    with pytest.raises(CheckpointError, match="offload_folder"):
        load(folder, device_map=on_disk)
    model = load(folder, device_map=on_disk, offload_folder=str(tmp_path / "offloaded"))
    assert torch.equal(model(IDS[:, 2:]).logits, llava(IDS[:, 2:]).logits)


@pytest.mark.parametrize("device_map", ["cpu", torch.device("cpu"), {"": "cpu"}, "auto", "sequential", None])
def test_ways_to_say_cpu(tiny_checkpoint, device_map, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert {weight.device.type for weight in load(tiny_checkpoint, device_map=device_map).parameters()} == {"cpu"}


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        (whole_map() | {"model.vision_tower": "disk"}, r"'model\.vision_tower' goes to disk"),
        (whole_map() | {"model.image_newline": "disk"}, r"model\.image_newline"),
        ({"": "disk"}, "goes to disk"),
        (whole_map() | {"model.vision_towr": "cpu"}, r"did you mean 'model\.vision_tower'"),
        (whole_map() | {"transformer.h.0": "cpu"}, r"no part 'transformer\.h\.0', as in model\.layers\.0"),
        ({"model": "cpu"}, r"no device for lm_head\.weight"),
        ({"": "cpu", "model.layers.1": "disk"}, r"'model\.layers\.1' is a part of ''"),
        ({"model": "cpu", "model.layers": "disk", "lm_head": "cpu"}, r"'model\.layers' is a part of 'model'"),
        ("gpu", "'gpu' is no device"),
        ({"": "gpu"}, "'gpu' is no device"),
        ("balanced_low_0", "'balanced_low_0' is no device"),
    ],
)
def test_maps_that_cannot_work(tiny_checkpoint, device_map, message):
    with pytest.raises(DeviceError, match=message):
        load(tiny_checkpoint, device_map=device_map)


def test_the_cpu_is_an_offload_beside_a_gpu(make_llava):
    """accelerate would leave an offloaded tower without data, so the map is refused before anything is read."""
    parameters = [name for name, _ in make_llava().named_parameters()]
    split = whole_map() | {"model.embed_tokens": 0, "model.layers.1": 0}
    with pytest.raises(DeviceError, match="goes to cpu"):
        device_maps.check_map(split, parameters, None)
    device_maps.check_map(split | dict.fromkeys(VISUAL, 0), parameters, None)
    with pytest.raises(DeviceError, match="8-bit weights are not offloaded"):
        device_maps.check_map(split | dict.fromkeys(VISUAL, 0), parameters, 8)


@given(
    sizes=st.lists(st.integers(1, 50), min_size=2, max_size=12),
    rooms=st.lists(st.integers(100, 300), min_size=1, max_size=4),
    cpu=st.integers(0, 200),
    tied=st.booleans(),
    balanced=st.booleans(),
)
def test_spreading(sizes, rooms, cpu, tied, balanced):
    """Everything has one place, in order, visual parts first, and no device holds more than it has room for."""
    layers = {f"model.layers.{index}.mlp.weight": size for index, size in enumerate(sizes)}
    parameters = {"model.embed_tokens.weight": 20, **layers, "model.norm.weight": 1}
    parameters |= {"model.vision_tower.a.weight": 30, "model.mm_projector.0.bias": 5, "model.image_newline": 1}
    if not tied:
        parameters["lm_head.weight"] = 20
    gpus = dict(enumerate(rooms))
    placed = spread(parameters, gpus, cpu, balanced)

    assert {placed[part] for part in (*VISUAL, "model.embed_tokens", "model.rotary_emb")} == {0}
    assert not tied or placed["lm_head"] == 0
    order = [*gpus, "cpu", "disk"]
    in_order = [order.index(placed[f"model.layers.{index}"]) for index in range(len(sizes))]
    assert in_order == sorted(in_order)
    used = dict.fromkeys(order, 0)
    for name, size in parameters.items():
        (part,) = [part for part in placed if name == part or name.startswith(f"{part}.")]
        used[placed[part]] += size
    assert all(used[index] <= room for index, room in gpus.items())
    assert used["cpu"] <= cpu
    whole = sum(parameters.values())
    if min(rooms) >= whole:
        assert set(placed.values()) <= set(gpus)
        if balanced:  # nobody is more than one layer (or the pinned parts) above the even share
            assert max(used.values()) <= max(-(-whole // len(rooms)) + max(*sizes, 20), 56 + max(sizes))
        else:
            assert set(placed.values()) == {0}


def test_auto_on_gpus_measures_what_is_there(make_llava, monkeypatch):
    config = make_llava().config
    whole = sum(parameter_bytes(meta_model(config), 2).values())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    memory = {0: 10 * whole, "cpu": 10 * whole}
    monkeypatch.setattr(device_maps, "get_max_memory", lambda given: given or memory)
    assert set(place("auto", config, torch.float16).values()) == {0}
    assert "cpu" in place("auto", config, torch.float16, max_memory={0: whole // 2, "cpu": whole}).values()
    assert "disk" in place("auto", config, torch.float16, max_memory={0: whole // 2}).values()
    with pytest.raises(DeviceError, match=r"8-bit model needs .* not offloaded"):
        place("auto", config, torch.float16, 8, {0: whole // 2})
