"""Parity with the outputs of LLaVA-NeXT (A) and LLaVA-Scissor (B), stage by stage, on every recorded case."""

import copy
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from llava.model.builder import load_pretrained_model
from llava.model.llava_arch import checkpoint_compression
from llava.model.pooling import pool_2x2
from llava.token_compression import compress

GOLDEN = Path(__file__).parents[2] / ".." / "shared" / "golden"
if not (GOLDEN / "index.json").exists():
    pytest.skip("the recorded outputs (../shared/golden) are not here", allow_module_level=True)

INDEX = json.loads((GOLDEN / "index.json").read_text())["cases"]
CASES = [name for name in INDEX if not name.startswith(("A7_", "B4_"))]  # those need no model, and have other tests
GROUPS = {"A1", "A2", "A3", "A4", "A5", "A6", "A8", "A9", "B1", "B2", "B3", "B5", "B6", "B7"}
PROMPT_ARRAYS = {"input_ids", "attention_mask", "labels"}
COMPARED_ARRAYS = {
    *("vision_out", "projector_out", "pool_out", "compressed", "assign", "inputs_embeds"),
    *("spatial_counts", "spatial_labels", "spatial_tokens", "temporal_labels"),
    *("out_attention_mask", "out_labels", "full_attention_mask", "full_position_ids"),
    *("logits", "logits_positions", "loss", "generated", "generated_repetition_penalty"),
}
EMBEDS, LOGITS = 1e-5, 1e-4


def arrays(name):
    return INDEX[name]["arrays"]


def having(array):
    return [name for name in CASES if array in arrays(name)]


VISUAL_CASES = having("vision_out")


@functools.cache
def checkpoint(name):
    return load_pretrained_model(str(GOLDEN / name), device_map="cpu")[1]


class Case:
    """One recorded case: its arrays as tensors, and the arguments of the model's calls."""

    def __init__(self, name):
        self.name = name
        self.fields = INDEX[name]
        if "images" in self:
            self.images = self["images"]
        else:
            self.images = self.per_item("image") or None
        self.visual = {
            "images": self.images,
            "modalities": self.fields["modalities"],
            "image_sizes": self.fields["image_sizes"],
        }

    def __contains__(self, key):
        return key in self.fields["arrays"]

    def __getitem__(self, key):
        entry = self.fields["arrays"][key]
        with np.load(GOLDEN / entry.get("stored_in", self.fields["file"])) as stored:
            return torch.from_numpy(stored[entry.get("stored_key", key)])

    def if_recorded(self, key):
        if key in self:
            return self[key]
        return None

    def per_item(self, key):
        """The arrays of this kind, in the order of the items that have one."""
        names = [f"{key}_{item}" for item in range(self.fields["n_images"])]
        return [self[name] for name in names if name in self]

    @property
    def crops(self):
        """All frames and crops as one batch (frames, 3, side, side)."""
        if isinstance(self.images, torch.Tensor):
            return self.images.flatten(0, -4)
        return torch.cat([item.unsqueeze(0) if item.ndim == 3 else item for item in self.images])


@pytest.fixture(params=CASES)
def case(request):
    return Case(request.param)


@pytest.fixture
def model(case):
    model = checkpoint(case.fields["checkpoint"])
    before = copy.deepcopy(vars(model.config))
    for key, value in case.fields["config_overrides"].items():
        setattr(model.config, key, value)
    with torch.no_grad():
        yield model
    vars(model.config).clear()
    vars(model.config).update(before)


def assert_within(found, expected, bound):
    """Compare the largest absolute error with a bound."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max().item() <= bound


def test_every_recorded_array_of_every_group_is_compared():
    assert {name[:2] for name in CASES} == GROUPS
    kinds = {key.rstrip("0123456789").rstrip("_") for name in CASES for key in arrays(name)}
    assert kinds == COMPARED_ARRAYS | PROMPT_ARRAYS | {"image", "images"}


@pytest.mark.parametrize("case", VISUAL_CASES, indirect=True)
def test_vision_tower_and_projector(case, model):
    features = model.get_vision_tower()(case.crops)
    largest = case["vision_out"].abs().max()  # about 7: float32 rounds there in steps of 5e-7, 20 times in a row
    assert_within(features / largest, case["vision_out"] / largest, EMBEDS)
    assert_within(model.model.mm_projector(features), case["projector_out"], EMBEDS)


@pytest.mark.parametrize("case", having("pool_out_0"), indirect=True)
def test_pooling_of_the_recorded_projector_output(case, model):
    pooled = torch.cat(case.per_item("pool_out"))  # videos come first in every case
    projected = case["projector_out"][: len(pooled)]
    assert_within(pool_2x2(projected, model.config.mm_spatial_pool_mode), pooled, EMBEDS)


@pytest.mark.parametrize("case", having("compressed_0"), indirect=True)
def test_compression_of_the_models_own_features(case, model):
    pool = case.fields["modalities"] != ["image"]
    features = model.encode_frames(case.crops, pool).split([len(item) for item in case.images])
    config = checkpoint_compression(model.config)
    assert config.images
    for index, item in enumerate(features):
        recorded = {key: case.per_item(key)[index] for key in COMPARED_ARRAYS if f"{key}_{index}" in case}
        result = compress(item, config)
        assert_within(result.tokens, recorded["compressed"], EMBEDS)
        assert torch.equal(result.assignment.flatten(), recorded["assign"].long())

        counts = recorded["spatial_counts"].long()
        labels = recorded["spatial_labels"].long() + (counts.cumsum(0) - counts).unsqueeze(1)
        unmerged = {"merge": False, "similarity_threshold": config.similarity_threshold}
        spatial = compress(item, type(config)(temporal=False, **unmerged))
        assert_within(spatial.tokens, recorded["spatial_tokens"], EMBEDS)
        assert torch.equal(spatial.assignment, labels)
        both = compress(item, type(config)(**unmerged))
        assert torch.equal(both.assignment, recorded["temporal_labels"].long()[labels])


@pytest.mark.parametrize("case", VISUAL_CASES, indirect=True)
def test_prepared_inputs(case, model):
    mask = case.if_recorded("attention_mask")
    out = model.prepare_inputs_labels_for_multimodal(case["input_ids"], None, mask, None, None, **case.visual)
    input_ids, positions, new_mask, past, embeds, labels = out
    assert (input_ids, positions, past, labels) == (None, None, None, None)
    assert new_mask is None if mask is None else torch.equal(new_mask, case["out_attention_mask"])
    assert_within(embeds, case["inputs_embeds"], EMBEDS)


@pytest.mark.parametrize("case", VISUAL_CASES, indirect=True)
def test_prepared_mask_positions_and_labels_when_given(case, model):
    ids = case["input_ids"]
    mask = case["attention_mask"] if "attention_mask" in case else torch.ones_like(ids)
    labels = case["labels"] if "labels" in case else ids.clone()
    out = model.prepare_inputs_labels_for_multimodal(
        ids, torch.arange(ids.shape[1])[None], mask, None, labels, **case.visual
    )
    assert torch.equal(out[2], case["full_attention_mask"])
    assert torch.equal(out[1], case["full_position_ids"])
    if "out_labels" in case:
        assert torch.equal(out[5], case["out_labels"])
    else:
        assert (out[5] == -100).sum() >= out[4].shape[1] - ids.shape[1]


LEFT_PADDED_WITH_LOSS = "A6_batch_left"


def test_logits_and_loss(case, model):
    labels = case.if_recorded("labels")
    out = model(case["input_ids"], attention_mask=case.if_recorded("attention_mask"), labels=labels, **case.visual)
    logits, visible = out.logits, torch.ones(out.logits.shape[:2], dtype=torch.bool)
    if "full_attention_mask" in case:
        visible = case["full_attention_mask"].bool()
    if "logits_positions" in case:
        logits, visible = logits[:, case["logits_positions"]], visible[:, case["logits_positions"]]
    assert_within(logits[visible], case["logits"][visible], LOGITS)
    if labels is not None and case.name != LEFT_PADDED_WITH_LOSS:
        assert_within(out.loss, case["loss"], LOGITS)


@pytest.mark.parametrize("case", [LEFT_PADDED_WITH_LOSS], indirect=True)
def test_the_loss_of_a_left_padded_batch_has_no_prediction_from_padding(case, model):
    """The published code predicts a row's first token from the padding before it. Right padding gives the same loss."""
    right = Case("A6_batch_right")["loss"]
    assert (right - case["loss"]).abs() > 0.01
    out = model(case["input_ids"], attention_mask=case["attention_mask"], labels=case["labels"], **case.visual)
    assert_within(out.loss, right, LOGITS)


def generate(case, model, **kwargs):
    mask = case.if_recorded("attention_mask")
    return model.generate(
        case["input_ids"], attention_mask=mask, do_sample=False, max_new_tokens=12, **case.visual, **kwargs
    )


RIGHT_PADDED = [name for name in CASES if INDEX[name]["config_overrides"].get("tokenizer_padding_side") == "right"]


@pytest.mark.parametrize("case", [name for name in CASES if name not in RIGHT_PADDED], indirect=True)
def test_greedy_tokens(case, model):
    assert torch.equal(generate(case, model), case["generated"])


@pytest.mark.parametrize("case", RIGHT_PADDED, indirect=True)
def test_a_right_padded_row_continues_after_its_own_last_token(case, model):
    """The published code continues it after its padding. Here the answers are those of the left-padded batch."""
    left = Case(case.name.replace("right", "left"))["generated"]
    assert not torch.equal(left, case["generated"])
    assert torch.equal(generate(case, model), left)


@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty`")
@pytest.mark.parametrize("case", having("generated_repetition_penalty"), indirect=True)
def test_greedy_tokens_with_repetition_penalty(case, model):
    assert torch.equal(generate(case, model, repetition_penalty=1.3), case["generated_repetition_penalty"])
