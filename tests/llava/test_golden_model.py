"""Parity with the outputs of LLaVA-NeXT (A) and LLaVA-Scissor (B), stage by stage."""

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
pytestmark = pytest.mark.skipif(not GOLDEN.exists(), reason="the recorded outputs (../shared/golden) are not here")

CASES = [
    "A3_video4",
    "A3_video4_average",
    "A3_video4_max",
    "A4_video4_5d",
    "A4_video9_frame",
    "A4_video9_grid",
    "A4_video9_no_token",
    "A4_video9_one_token",
    "A5a_text_only",
    "A9_tied_video4",
    "B1a_video8",
    "B1b_video8",
    "B1c_video8",
    "B2a_video16",
    "B2b_video16",
    "B3_two_videos_batch_left",
    "B3_two_videos_batch_right",
    "B3_two_videos_one_prompt",
    "B5_video8_zip_off",
]
VIDEO_CASES = [name for name in CASES if name != "A5a_text_only"]
COMPRESSED_CASES = [name for name in CASES if name.startswith("B") and name != "B5_video8_zip_off"]
PENALTY_CASES = ["A3_video4", "A5a_text_only"]
EMBEDS, LOGITS = 1e-5, 1e-4


@functools.cache
def index():
    return json.loads((GOLDEN / "index.json").read_text())["cases"]


@functools.cache
def checkpoint(name):
    return load_pretrained_model(str(GOLDEN / name), device_map="cpu")[1]


class Case:
    """One recorded case: its arrays as tensors, and the model with the case's config."""

    def __init__(self, name):
        self.fields = index()[name]
        self.modalities = self.fields["modalities"]
        if "images" in self.fields["arrays"]:
            self.images = self["images"]
        else:
            self.images = [self[f"image_{item}"] for item in range(self.fields["n_images"])] or None

    def __contains__(self, key):
        return key in self.fields["arrays"]

    def __getitem__(self, key):
        entry = self.fields["arrays"][key]
        with np.load(GOLDEN / entry.get("stored_in", self.fields["file"])) as arrays:
            return torch.from_numpy(arrays[entry.get("stored_key", key)])

    def items(self, key):
        return [self[f"{key}_{item}"] for item in range(self.fields["n_images"])]

    @property
    def mask(self):
        return self["attention_mask"] if "attention_mask" in self.fields["arrays"] else None


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


def test_every_video_and_text_case_is_covered():
    supported = {"video", "text"}
    recorded = {
        name
        for name, fields in index().items()
        if name[:2] in ("A3", "A4", "A5", "A9", "B1", "B2", "B3", "B5") and set(fields["modalities"]) <= supported
    }
    assert recorded == set(CASES)


@pytest.mark.parametrize("case", VIDEO_CASES, indirect=True)
def test_vision_tower_and_projector(case, model):
    features = model.get_vision_tower()(torch.cat(list(case.images)))
    largest = case["vision_out"].abs().max()  # about 7: float32 rounds there in steps of 5e-7, 20 times in a row
    assert_within(features / largest, case["vision_out"] / largest, EMBEDS)
    assert_within(model.model.mm_projector(features), case["projector_out"], EMBEDS)


@pytest.mark.parametrize("case", VIDEO_CASES, indirect=True)
def test_pooling_of_the_recorded_projector_output(case, model):
    pooled = pool_2x2(case["projector_out"], model.config.mm_spatial_pool_mode)
    assert_within(pooled, torch.cat(case.items("pool_out")), EMBEDS)


@pytest.mark.parametrize("case", COMPRESSED_CASES, indirect=True)
def test_compression_of_the_models_own_features(case, model):
    features = model.encode_frames(torch.cat(list(case.images))).split([len(item) for item in case.images])
    for video, expected, assignment in zip(features, case.items("compressed"), case.items("assign"), strict=True):
        result = compress(video, checkpoint_compression(model.config))
        assert_within(result.tokens, expected, EMBEDS)
        assert torch.equal(result.assignment.flatten(), assignment.long())


@pytest.mark.parametrize("case", VIDEO_CASES, indirect=True)
def test_prepared_inputs(case, model):
    ids = case["input_ids"]
    out = model.prepare_inputs_labels_for_multimodal(ids, None, case.mask, None, None, case.images, case.modalities)
    input_ids, positions, mask, past, embeds, labels = out
    assert (input_ids, positions, past, labels) == (None, None, None, None)
    assert mask is None if case.mask is None else torch.equal(mask, case["out_attention_mask"])
    assert_within(embeds, case["inputs_embeds"], EMBEDS)


@pytest.mark.parametrize("case", VIDEO_CASES, indirect=True)
def test_prepared_mask_positions_and_labels_when_given(case, model):
    ids = case["input_ids"]
    mask = torch.ones_like(ids) if case.mask is None else case.mask
    out = model.prepare_inputs_labels_for_multimodal(
        ids, torch.arange(ids.shape[1])[None], mask, None, ids.clone(), case.images, case.modalities
    )
    assert torch.equal(out[2], case["full_attention_mask"])
    assert torch.equal(out[1], case["full_position_ids"])
    assert (out[5] == -100).sum() >= out[4].shape[1] - ids.shape[1]


def test_logits(case, model):
    out = model(case["input_ids"], attention_mask=case.mask, images=case.images, modalities=case.modalities)
    logits, visible = out.logits, torch.ones(out.logits.shape[:2], dtype=torch.bool)
    if "full_attention_mask" in case:
        visible = case["full_attention_mask"].bool()
    if "logits_positions" in case:
        logits, visible = logits[:, case["logits_positions"]], visible[:, case["logits_positions"]]
    assert_within(logits[visible], case["logits"][visible], LOGITS)


def generate(case, model, **kwargs):
    return model.generate(
        case["input_ids"],
        attention_mask=case.mask,
        images=case.images,
        modalities=case.modalities,
        do_sample=False,
        max_new_tokens=12,
        **kwargs,
    )


def test_greedy_tokens(case, model):
    expected = case["generated"]
    if case.fields["config_overrides"].get("tokenizer_padding_side") == "right":
        # The published code continues a shorter right-padded row after its padding. Here a row of a batch continues
        # after its own last token, on either side of padding: as recorded for the left-padded batch.
        expected = Case("B3_two_videos_batch_left")["generated"]
        assert not torch.equal(expected, case["generated"])
    assert torch.equal(generate(case, model), expected)


@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty`")
@pytest.mark.parametrize("case", PENALTY_CASES, indirect=True)
def test_greedy_tokens_with_repetition_penalty(case, model):
    assert torch.equal(generate(case, model, repetition_penalty=1.3), case["generated_repetition_penalty"])
