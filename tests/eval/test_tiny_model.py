"""The bundled models know their world, look at the video to answer, and are what their cards say they are."""

import json

import pytest
from safetensors import safe_open

from eval.export_tiny import export
from eval.measure_tiny import measure, table, wording_table
from eval.tiny_tokenizer import build_tokenizer
from eval.world import Split
from llava.assets import BUNDLED, tiny_model_path
from llava.errors import UserError
from llava.model.builder import load_pretrained_model

TAUGHT = {"tiny": ["videomme"]}
"""The wordings of questions that each model was trained on."""


@pytest.fixture(scope="module", params=BUNDLED)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def rows(name):
    measured = measure(tiny_model_path(name), Split.DEV, seed=7, count=24).rows()
    return {(row["control"], row["kind"]): row for row in measured}


def test_answers_four_option_questions_about_unseen_videos(name, rows):
    assert rows["video", "all"]["asked"] == 96
    for wording in ("video", *TAUGHT[name]):
        assert rows[wording, "all"]["accuracy"] > 0.90  # the card's figure, less three standard errors of 96 questions
    assert rows["video", "all/free"]["accuracy"] > 0.85


@pytest.mark.parametrize("control", ["swapped", "blank"])
def test_is_at_chance_without_the_right_video(rows, control):
    assert rows[control, "all"]["low"] < 0.30
    assert rows[control, "all"]["accuracy"] < 0.45


def test_card_holds_the_measured_tables(name):
    folder = tiny_model_path(name)
    measured = json.loads((folder / "accuracy.json").read_text())
    card = (folder / "README.md").read_text()
    assert table(measured) in card
    assert wording_table(measured) in card
    total = next(row for row in measured if (row["control"], row["kind"]) == ("video", "all"))
    assert total["low"] > 0.93
    for row in measured:
        if row["control"] == "video" and "/" not in row["kind"] and row["low"] <= 0.30:
            assert row["kind"] in card.split("Not learnt", 1)[1]


def test_checkpoints_are_small_and_in_the_original_layout(name):
    folder = tiny_model_path(name)
    assert sum(path.stat().st_size for path in folder.parent.rglob("*") if path.is_file()) < 20e6
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert "model.embed_tokens.weight" in names
    assert "model.mm_projector.0.weight" in names
    assert "model.vision_tower.vision_tower.vision_model.embeddings.patch_embedding.weight" in names
    tokenizer, model, _, length = load_pretrained_model(str(folder), None, "llava_qwen", device_map="cpu")
    shape = (model.config.mm_num_frames, model.get_vision_tower().num_patches_per_side, length)
    assert shape == {"tiny": (8, 10, 2048)}[name]
    if name != "tiny":  # whose recipe is an older one
        assert tokenizer.get_vocab() == build_tokenizer().get_vocab()


def test_an_unfinished_run_is_not_exported(tmp_path):
    with pytest.raises(UserError, match=r"Stage tower of .* has 0 of"):
        export(tmp_path, tmp_path / "checkpoint", videos=1)
    assert not (tmp_path / "checkpoint").exists()
