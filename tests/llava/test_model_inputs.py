"""Pooling, newlines and splicing, and what they refuse."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava.constants import IMAGE_TOKEN_INDEX as IMAGE
from llava.errors import ConfigError, UserError
from llava.model.newlines import SourceTokens, VisualTokens, insert_newlines
from llava.model.pooling import pool_2x2
from llava.model.splice import pad_rows, splice_row

PROMPT = torch.tensor([[5, 6, IMAGE, 7, 8, 9]])


@pytest.mark.parametrize(("mode", "side"), [("bilinear", 5), ("average", 4), ("max", 4)])
def test_pooled_sides(mode, side):
    assert pool_2x2(torch.randn(3, 81, 8), mode).shape == (3, side * side, 8)


def test_pooling_keeps_rows_and_columns_apart():
    row = torch.arange(4.0).repeat_interleave(4).view(1, 16, 1)
    expected = torch.tensor([0.5, 0.5, 2.5, 2.5]).view(1, 4, 1)
    for mode in ("bilinear", "average"):
        torch.testing.assert_close(pool_2x2(row, mode), expected)
    torch.testing.assert_close(pool_2x2(row, "max"), expected + 0.5)
    with pytest.raises(ConfigError, match="nearest"):
        pool_2x2(row, "nearest")


@given(st.data())
def test_newlines_follow_each_row_that_kept_a_token(data):
    base, period, rows = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 7)), data.draw(st.integers(1, 6))
    count = base + period * rows
    kept = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1)))
    tokens = torch.tensor(kept, dtype=torch.float32)[:, None]
    source = SourceTokens(torch.arange(float(count)).view(1, count, 1), base, period)
    out = insert_newlines(tokens, torch.tensor(kept), source, torch.tensor([-1.0]))

    uncompressed = [float(token) for token in range(base)]  # by hand: the base, then rows with a newline after each
    expected = [float(token) for token in kept if token < base]
    for start in range(base, count, period):
        uncompressed += [*map(float, range(start, start + period)), -1.0]
        members = [float(token) for token in kept if start <= token < start + period]
        expected += [*members, -1.0] if members else []
    assert out.embeds.flatten().tolist() == expected
    assert out.length == len(uncompressed)
    assert [uncompressed[place] for place in out.positions.tolist()] == expected
    assert (out.positions.diff() > 0).all()


def test_text_around_items_keeps_its_order():
    def embed(ids):
        return ids[:, None].float()

    items = [
        VisualTokens(torch.tensor([[100.0]]), torch.tensor([2]), 4, None),
        VisualTokens(torch.ones(2, 1), torch.tensor([0, 1]), 2, torch.tensor([3, -1])),
    ]
    ids = torch.tensor([IMAGE, 1, 2, IMAGE])
    row = splice_row(ids, ids.clone(), items, embed, source_positions=True)
    assert row.embeds.flatten().tolist() == [100, 1, 2, 1, 1]
    assert row.position_ids.tolist() == [2, 4, 5, 6, 7]
    assert row.labels.tolist() == [-100, 1, 2, -100, -100]
    contiguous = splice_row(ids, ids.clone(), items, embed, source_positions=False)
    assert contiguous.position_ids.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="middle"):
        pad_rows([row], "middle")


def prepare(model, images, modalities="video", ids=PROMPT, mask=None):
    return model.prepare_inputs_labels_for_multimodal(ids, None, mask, None, None, images, modalities)


def test_nothing_to_insert_returns_the_arguments(llava):
    text = torch.tensor([[5, 6, 7]])
    for cache in (None, "cache"):
        out = llava.prepare_inputs_labels_for_multimodal(text, None, None, cache, text, None)
        assert out == (text, None, None, cache, None, text)


def test_one_string_stands_for_every_item(llava, make_video):
    two = torch.tensor([[5, IMAGE, 6, IMAGE]])
    videos = [make_video(2), make_video(3)]
    assert torch.equal(prepare(llava, videos, "video", two)[4], prepare(llava, videos, ["video", "video"], two)[4])


@pytest.mark.parametrize("videos", [2, 3])
def test_surplus_videos_are_not_ignored(llava, make_video, videos):
    with pytest.raises(UserError, match=f"1 <image> placeholders but {videos}"):
        prepare(llava, [make_video(2)] * videos)


def test_surplus_placeholders_do_not_reuse_the_last_video(llava, make_video):
    with pytest.raises(UserError, match="3 <image> placeholders but 2"):
        prepare(llava, [make_video(2)] * 2, "video", torch.tensor([[IMAGE, 5, IMAGE, IMAGE]]))


def test_rows_without_a_modality_are_not_dropped(llava, make_video):
    batch = torch.cat([PROMPT, PROMPT])
    with pytest.raises(UserError, match="1 modalities were given for 2"):
        prepare(llava, [make_video(2)] * 2, ["video"], batch)
    assert len(prepare(llava, [make_video(2)] * 2, ["video", "video"], batch)[4]) == 2


def test_modalities_are_known_and_text_has_no_placeholder(llava, make_video):
    with pytest.raises(UserError, match="did you mean 'video'"):
        prepare(llava, [make_video(1)], ["vidoe"])
    with pytest.raises(UserError, match=r"images\[0\].*\"text\""):
        prepare(llava, [make_video(1)], ["text"])


def test_a_text_only_row_may_bring_a_dummy(llava, make_video):
    batch = torch.tensor([[5, IMAGE, 6], [7, 8, 9], [5, 6, IMAGE]])
    images, dummy = [make_video(1, 1), make_video(1, 2)], make_video(1, 3)
    expected = prepare(llava, images, "image", batch)[4]
    found = prepare(llava, [images[0], dummy, images[1]], ["image", "text", "image"], batch)[4]
    assert torch.equal(found, expected)


def test_a_placeholder_needs_a_video(llava):
    with pytest.raises(UserError, match="1 <image> placeholders but 0"):
        llava(PROMPT)


def test_pixels_must_be_preprocessed(llava):
    with pytest.raises(UserError, match="uint8"):
        prepare(llava, [torch.zeros(2, 3, 32, 32, dtype=torch.uint8)])


@pytest.mark.parametrize(
    ("shape", "message"),
    [((4, 3, 16, 16), "frames, 3, 32, 32"), ((4, 1, 32, 32), "frames, 3, 32, 32"), ((0, 3, 32, 32), "frames, 3")],
)
def test_videos_of_another_shape(llava, shape, message):
    with pytest.raises(UserError, match=message):
        prepare(llava, [torch.zeros(shape)])


@pytest.mark.parametrize("modalities", ["video", ["video"]])
def test_a_4d_tensor_of_one_video_is_its_frames(llava, make_video, modalities):
    """lmms-eval's `llava_onevision` hands in frames like this; the published code takes the first one alone."""
    assert torch.equal(prepare(llava, make_video(4), modalities)[4], prepare(llava, [make_video(4)], modalities)[4])


@pytest.mark.parametrize(("shape", "modalities"), [((2, 3, 32, 32), ["video"] * 2), ((3, 32, 32), "video")])
def test_several_videos_are_no_4d_tensor(llava, shape, modalities):
    with pytest.raises(UserError, match="pass a list"):
        prepare(llava, torch.zeros(shape), modalities)


def test_images_are_tensors(llava):
    with pytest.raises(UserError, match=r"images\[0\] is a ndarray.*process_images"):
        prepare(llava, [np.zeros((1, 3, 32, 32))])


def test_videos_of_different_sizes_name_the_expected_one(llava, make_video):
    two = torch.tensor([[5, IMAGE, 6, IMAGE]])
    with pytest.raises(UserError, match="32, 32"):
        prepare(llava, [make_video(2), torch.zeros(2, 3, 16, 16)], "video", two)


def test_a_text_only_model_takes_no_video(make_llava, make_video):
    model = make_llava(mm_vision_tower=None)
    assert model.get_vision_tower() is None
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False).shape[0] == 1
    with pytest.raises(UserError, match="no vision tower"):
        prepare(model, [make_video(2)])


def test_config_values_are_read_when_they_are_used(llava, make_video):
    for key, value in (("mm_newline_position", "nowhere"), ("mm_patch_merge_type", "mosaic")):
        before = getattr(llava.config, key)
        setattr(llava.config, key, value)
        with pytest.raises(ConfigError, match=value):
            prepare(llava, [make_video(2)])
        setattr(llava.config, key, before)


def test_newlines_need_their_embedding(make_llava, make_video):
    model = make_llava(mm_patch_merge_type="spatial", mm_newline_position="grid")
    with pytest.raises(ConfigError, match="image_newline"):
        prepare(model, [make_video(2)])


def test_too_long_a_prompt_is_cut_with_a_warning(llava, make_video, caplog):
    llava.config.tokenizer_model_max_length = 7
    with caplog.at_level(logging.WARNING):
        assert prepare(llava, [make_video(4)])[4].shape[1] == 7
    assert "tokenizer_model_max_length" in caplog.text


def test_the_loss_does_not_depend_on_the_side_of_the_padding(llava, make_video):
    """The published code predicts the first token of a left-padded row from the padding before it."""
    ids = torch.tensor([[5, IMAGE, 6, 7], [8, 9, 3, 4]])
    losses = []
    for side in ("left", "right"):
        llava.config.tokenizer_padding_side = side
        mask = torch.ones_like(ids)
        out = llava(ids, attention_mask=mask, labels=ids, images=[make_video(2)], modalities="video")
        losses.append(out.loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_mask_of_another_shape_goes_with_labels(llava):
    ids = torch.tensor([[8, 9, 3, 4]])
    causal = torch.ones(4, 4, dtype=torch.bool).tril()[None, None]
    expected = llava(ids, labels=ids).loss
    torch.testing.assert_close(llava(ids, labels=ids, attention_mask=causal).loss, expected)
