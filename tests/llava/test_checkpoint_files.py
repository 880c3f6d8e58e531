"""Weight files: only headers are read, nothing pickled is run, and whatever is damaged is named."""

import contextlib
import json
import os
import pickle
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from llava.errors import CheckpointError
from llava.model.builder import load_pretrained_model
from llava.model.weight_files import WeightFiles, load_pickled, read_header, read_weight_files

TENSORS = {"a.weight": torch.ones(3, 4), "b.bias": torch.zeros(5, dtype=torch.bfloat16)}


def attack(marker):
    """An object whose unpickling runs a command that leaves a file behind."""

    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    return Attack()


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    """A checkpoint that may be damaged."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "model")


@pytest.fixture
def marker(tmp_path):
    """A path that must not exist after the test."""
    path = tmp_path / "was_run"
    yield path
    assert not path.exists()


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_headers_hold_shapes_and_dtypes(tmp_path, suffix):
    file = tmp_path / f"model.{suffix}"
    save_file(TENSORS, file) if suffix == "safetensors" else torch.save(TENSORS, file)
    headers = read_header(file)
    assert {name: (header.shape, header.dtype, header.bytes) for name, header in headers.items()} == {
        "a.weight": ((3, 4), torch.float32, 48),
        "b.bias": ((5,), torch.bfloat16, 10),
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused_and_not_run(tmp_path, marker, zipped):
    file = tmp_path / "pytorch_model.bin"
    torch.save({**TENSORS, "c": attack(marker)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin .* would run posix\.system.* as safetensors"):
        load_pickled(file)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_bare_pickle_is_refused_and_not_run(tmp_path, marker, protocol):
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(pickle.dumps(attack(marker), protocol))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        load_pickled(file)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_loading_a_checkpoint_runs_no_pickled_code(folder, llava, marker, name):
    (folder / "model.safetensors").unlink()
    content = {**llava.state_dict(), "surprise": attack(marker)}
    torch.save(content, folder / ("pytorch_model.bin" if name.endswith(".bin") else "shard.bin"))
    if name.endswith(".json"):
        (folder / name).write_text(json.dumps({"weight_map": dict.fromkeys(content, "shard.bin")}))
    with pytest.raises(CheckpointError, match=r"would run posix\.system"):
        load_pretrained_model(str(folder), device_map="cpu")


@pytest.mark.parametrize("content", [[torch.ones(2)], {"state_dict": TENSORS}, {"step": 3}, {1: torch.ones(2)}])
def test_a_pickle_of_something_else_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="tensors by name"):
        load_pickled(tmp_path / "pytorch_model.bin")


@given(st.data())
def test_damaged_bytes_are_one_clear_error(tmp_path_factory, data):
    """Truncated and overwritten files either still give the right headers or are refused, never anything else."""
    suffix = data.draw(st.sampled_from(["safetensors", "bin"]))
    file = tmp_path_factory.mktemp("damaged") / f"model.{suffix}"
    save_file(TENSORS, file) if suffix == "safetensors" else torch.save(TENSORS, file)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(CheckpointError):
        read_header(file)


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "{}",
        "[]",
        '{"weight_map": {}}',
        '{"weight_map": ["a"]}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "../elsewhere.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
    ],
)
def test_an_invalid_index_is_named(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    (problem,) = read_weight_files(tmp_path).problems
    assert "model.safetensors.index.json is not a valid weight index" in problem


def test_every_file_that_is_wrong_is_reported(tmp_path):
    save_file(TENSORS, tmp_path / "1.safetensors")
    (tmp_path / "2.safetensors").write_bytes((tmp_path / "1.safetensors").read_bytes()[:-1])
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a.weight": "1.safetensors", "c": "2.safetensors", "d": "3.safetensors"}})
    )
    weights = read_weight_files(tmp_path)
    assert weights.tensors.keys() == TENSORS.keys()
    assert len(weights.problems) == 2
    assert "2.safetensors is damaged or incomplete" in weights.problems[0]
    assert "names 3.safetensors, which is missing" in weights.problems[1]


def test_safetensors_come_before_pickles(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    assert read_weight_files(tmp_path).names == ["model.safetensors"]
    assert read_weight_files(tmp_path).problems == []


def test_a_folder_without_weights(tmp_path):
    weights = read_weight_files(tmp_path)
    assert weights == WeightFiles(problems=weights.problems)
    assert "has no weights" in weights.problems[0]
