"""Images in prompts: how crops are merged, beside videos, and under compression."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from llava.constants import IMAGE_TOKEN_INDEX as IMAGE
from llava.errors import ConfigError, UserError
from llava.instrument import record
from llava.model.image_merge import merge_crops
from llava.model.newlines import insert_newlines
from llava.token_compression import CompressionConfig, compression

SIDE, PATCHES = 32, 16
GRID = [[SIDE * columns, SIDE * rows] for columns in range(1, 4) for rows in range(1, 4)]
PROMPT = torch.tensor([[5, 6, IMAGE, 7, 8]])
TEXT = PROMPT.shape[1] - 1
WIDE = (64, 32)  # two crops beside each other, nothing to cut off
TALL = (20, 60)  # two crops one above the other, with black at both sides
TALL_MAP = (8, 2)  # patches that are not black


@pytest.fixture
def llava(make_llava):
    return make_llava(image_aspect_ratio="anyres", image_grid_pinpoints=GRID)


@pytest.fixture
def picture(make_video):
    """A function that makes the pixels of an image: the base image and `crops`."""
    return lambda crops, seed=0: make_video(1 + crops, seed)


def embeds(model, images, modalities="image", sizes=None, ids=PROMPT):
    with torch.no_grad():
        return model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, images, modalities, sizes)[4]


def layout(merge, size, crops, aspect_ratio="anyres", newline=-1.0):
    """Where the tokens of an image go, each named by 100 * crop + patch, newlines by -1."""
    features = torch.arange(1.0 + crops)[:, None, None] * 100 + torch.arange(float(PATCHES))[None, :, None]
    config = SimpleNamespace(
        mm_patch_merge_type=merge, image_aspect_ratio=aspect_ratio, image_grid_pinpoints=[[SIDE * 2, SIDE], *GRID]
    )
    source = merge_crops(features, config, size, SIDE)
    tokens = source.tokens.flatten(0, 1)
    out = insert_newlines(tokens, torch.arange(len(tokens)), source, torch.tensor([newline]))
    assert torch.equal(out.positions, torch.arange(len(out.embeds)))
    assert out.length == len(out.embeds)
    return out.embeds.flatten().tolist()


BASE = [float(patch) for patch in range(16)]
WIDE_ROWS = [[100.0 * crop + 4 * row + column for crop in (1, 2) for column in range(4)] for row in range(4)]
WIDE_MAP = [token for row in WIDE_ROWS for token in row]


@pytest.mark.parametrize(
    ("merge", "expected"),
    [
        ("flat", [100.0 * crop + patch for crop in range(3) for patch in range(16)]),
        ("spatial", BASE + WIDE_MAP),
        ("spatial_unpad", BASE + [token for row in WIDE_ROWS for token in [*row, -1.0]]),
        ("spatial_nobase", WIDE_MAP),
        ("spatial_unpad_nobase", [token for row in WIDE_ROWS for token in [*row, -1.0]]),
        ("spatial_maxpool2x2", [*BASE, 105.0, 107.0, 205.0, 207.0, 113.0, 115.0, 213.0, 215.0]),
    ],
)
def test_order_of_merged_crops(merge, expected):
    assert layout(merge, WIDE, 2) == expected


@pytest.mark.parametrize(("merge", "newline"), [("flat", []), ("spatial", []), ("spatial_unpad", [-1.0])])
def test_an_image_without_crops_needs_no_size(merge, newline):
    assert layout(merge, None, 0) == BASE + newline


def test_black_columns_are_cut_off():
    rows, columns = TALL_MAP
    tokens = layout("spatial_unpad_nobase", TALL, 2)
    assert len(tokens) == rows * (columns + 1)
    assert [tokens[index] for index in (0, 1, 2, 3)] == [101.0, 102.0, -1.0, 105.0]


def test_a_map_larger_than_the_limit_is_shrunk():
    wide = torch.tensor(WIDE_ROWS)[None, None]
    shrunk = functional.interpolate(wide, size=(2, 5), mode="bilinear")[0, 0].tolist()  # by sqrt(2), rounded down
    expected = [token for row in shrunk for token in [*row, -1.0]]
    assert layout("spatial_unpad_nobase", WIDE, 2, "anyres_max_1") == pytest.approx(expected)
    for aspect_ratio in ("anyres_max_2", "anyres", "pad"):
        assert layout("spatial_unpad_nobase", WIDE, 2, aspect_ratio) == layout("spatial_unpad_nobase", WIDE, 2)


def test_crops_need_the_size_of_their_image(llava, picture):
    """The published code guesses a grid of 2 x 2, then fails on the missing size."""
    with pytest.raises(UserError, match=r"2 crops needs its size: pass image_sizes"):
        embeds(llava, [picture(2)])
    llava.config.mm_patch_merge_type = "flat"
    assert embeds(llava, [picture(2)]).shape[1] == TEXT + 3 * PATCHES


@pytest.mark.parametrize("crops", [1, 3, 4])
def test_crops_that_do_not_fill_the_grid_are_not_squeezed_into_it(llava, picture, crops):
    """The published code takes what is too much or too little for more or fewer dimensions."""
    with pytest.raises(UserError, match=rf"64 x 32 pixels has 2 x 1 crops .* but {crops} were given"):
        embeds(llava, [picture(crops)], sizes=[WIDE])


def test_mistakes_in_sizes_and_settings_are_named(llava, picture):
    with pytest.raises(UserError, match="1 image_sizes were given for 2"):
        embeds(llava, [picture(2)] * 2, sizes=[WIDE], ids=torch.tensor([[IMAGE, 5, IMAGE]]))
    for size in ((0, 32), 64, (64, 32, 3), "wide"):
        with pytest.raises(UserError, match=r"image_sizes\[0\] is"):
            embeds(llava, [picture(2)], sizes=[size])
    llava.config.image_grid_pinpoints = None
    with pytest.raises(ConfigError, match="image_grid_pinpoints"):
        embeds(llava, [picture(2)], sizes=[WIDE])
    llava.config.mm_patch_merge_type = "mosaic"
    with pytest.raises(ConfigError, match="mosaic"):
        embeds(llava, [picture(2)], sizes=[WIDE])


def test_sizes_of_videos_are_not_read(llava, make_video):
    """Published example scripts pass one number for each frame."""
    expected = embeds(llava, [make_video(3)], "video")
    assert torch.equal(embeds(llava, [make_video(3)], ["video"], [64 * 32 * 3] * 3), expected)


def test_newlines_of_images_need_their_embedding(make_llava, picture):
    model = make_llava(mm_patch_merge_type="spatial")
    model.config.mm_patch_merge_type = "spatial_unpad"
    with pytest.raises(ConfigError, match=r"image_newline.*mm_patch_merge_type"):
        embeds(model, [picture(0)])


def test_images_and_videos_in_one_prompt_are_those_of_prompts_of_their_own(llava, picture, make_video):
    items = [picture(2, 1), make_video(3, 2), picture(0, 3)]
    modalities, sizes = ["image", "video", "image"], [WIDE, (9, 9), (9, 9)]
    alone = [
        embeds(llava, [item], [modality], [size])[0, 2:-2]
        for item, modality, size in zip(items, modalities, sizes, strict=True)
    ]
    assert [len(item) for item in alone] == [PATCHES + 4 * (8 + 1), 3 * 4 + 1, PATCHES + 1]
    together = embeds(llava, items, modalities, sizes, torch.tensor([[IMAGE, IMAGE, IMAGE]]))[0]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)

    batch = torch.tensor([[5, IMAGE, 6], [5, IMAGE, 6], [5, IMAGE, 6]])
    rows = embeds(llava, items, modalities, sizes, batch)
    for row, item in zip(rows, alone, strict=True):
        torch.testing.assert_close(row[1 : 1 + len(item)], item, atol=1e-5, rtol=0)


def test_three_and_five_dimensions_are_the_same_as_lists(llava, picture):
    two = torch.tensor([[IMAGE, 5, IMAGE]])
    one, other = picture(0, 1), picture(0, 2)
    expected = embeds(llava, [one, other], ids=two)
    assert torch.equal(embeds(llava, [one[0], other[0]], ids=two), expected)
    assert torch.equal(embeds(llava, torch.stack([one, other]), ids=two), expected)


def test_a_4d_tensor_is_a_batch_of_images_without_newlines_and_never_compressed(llava, picture):
    two = torch.tensor([[IMAGE, 5, IMAGE]])
    plain = embeds(llava, picture(1), ids=two)
    assert plain.shape[1] == 2 * PATCHES + 1
    with compression(llava, retention_ratio=0.5, images=True), record() as recorder:
        assert torch.equal(embeds(llava, picture(1), ids=two), plain)
    assert [stats.kept_tokens for stats in recorder.compressions] == [PATCHES, PATCHES]
    llava.config.mm_patch_merge_type = "spatial"
    assert torch.equal(embeds(llava, list(picture(1)), ids=two), plain)


def test_compression_leaves_images_alone_unless_it_is_for_them(llava, picture, make_video):
    ids = torch.tensor([[IMAGE, 5, IMAGE]])
    items, modalities, sizes = [picture(2), make_video(4)], ["image", "video"], [WIDE, WIDE]
    plain = embeds(llava, items, modalities, sizes, ids)
    with compression(llava, retention_ratio=0.25), record() as recorder:
        compressed = embeds(llava, items, modalities, sizes, ids)
    image = PATCHES + 4 * (8 + 1)
    assert torch.equal(compressed[0, : image + 1], plain[0, : image + 1])
    assert compressed.shape[1] == image + 1 + 4 + 1
    assert [stats.kept_tokens for stats in recorder.compressions] == [PATCHES + 4 * 8, 4]


@pytest.mark.parametrize("merge", ["flat", "spatial", "spatial_unpad", "spatial_unpad_nobase", "spatial_maxpool2x2"])
@pytest.mark.parametrize("method", ["scissor", "uniform"])
def test_a_compressed_image_keeps_exactly_its_budget_of_what_the_prompt_would_hold(llava, picture, merge, method):
    llava.config.mm_patch_merge_type = merge
    plain = embeds(llava, [picture(2)], sizes=[TALL])
    rows = TALL_MAP[0] if "unpad" in merge else 0
    source = plain.shape[1] - TEXT - rows
    for ratio in (0.1, 0.5, 1.0):
        with record() as recorder, compression(llava, method=method, retention_ratio=ratio, images=True):
            compressed = embeds(llava, [picture(2)], sizes=[TALL])
        (stats,) = recorder.compressions
        assert (stats.source_tokens, stats.kept_tokens) == (source, max(1, round(ratio * source)))
        newlines = (compressed[0] == llava.model.image_newline).all(dim=1).sum()
        assert compressed.shape[1] == TEXT + stats.kept_tokens + newlines
        assert newlines <= min(rows, stats.kept_tokens)
    assert torch.equal(compressed, plain)  # the last ratio is 1


def test_kept_tokens_and_newlines_of_an_image_keep_their_positions(llava, picture):
    """Selected tokens are those of the uncompressed prompt, and `source` numbers them as they are there."""
    plain = embeds(llava, [picture(2)], sizes=[TALL])[0]
    config = CompressionConfig(
        method="random", retention_ratio=0.3, images=True, merge=False, position_ids="source", seed=3
    )
    with compression(llava, config), torch.no_grad():
        args = (PROMPT, None, None, None, None, [picture(2)], "image", [TALL])
        _, positions, _, _, kept, _ = llava.prepare_inputs_labels_for_multimodal(*args)
    assert torch.equal(kept[0], plain[positions[0]])
    row_ends = 2 + PATCHES + torch.arange(1, TALL_MAP[0] + 1) * (TALL_MAP[1] + 1) - 1
    newline = torch.isin(positions[0], row_ends)
    assert newline.any()
    rows_kept = (positions[0, :-2][~newline[:-2]] - 2 - PATCHES).div(TALL_MAP[1] + 1, rounding_mode="floor")
    assert newline.sum() == len(rows_kept[rows_kept >= 0].unique())


def test_a_video_beside_an_image_is_compressed_instead_of_crashing(make_llava, picture, make_video):
    """The published code splits the tokens of all items as those of the first."""
    model = make_llava(mm_use_zip=True, mm_zip_tau=0.5, mm_zip_epsilon=0.05)
    ids = torch.tensor([[IMAGE, 5, IMAGE]])
    image, video = picture(3), make_video(4)
    alone = [embeds(model, [item], [kind])[0, 2:-2] for item, kind in ((image, "image"), (video, "video"))]
    assert all(0 < len(item) < 64 for item in alone)
    for order in ([0, 1], [1, 0]):
        items, kinds = [[image, video][index] for index in order], [["image", "video"][index] for index in order]
        found = embeds(model, items, kinds, ids=ids)[0]
        text = model.model.embed_tokens(torch.tensor([5]))
        expected = torch.cat([alone[order[0]], text, alone[order[1]]])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_greedy_answers_of_images_and_videos_in_a_batch_are_those_of_each_alone(llava, picture, make_video):
    items, kinds, sizes = [picture(2, 1), make_video(3, 2), picture(0, 3)], ["image", "video", "image"], [WIDE] * 3
    greedy = {"max_new_tokens": 6, "do_sample": False}
    batch = torch.cat([PROMPT] * 3)
    mask = torch.ones_like(batch)
    together = llava.generate(batch, attention_mask=mask, images=items, modalities=kinds, image_sizes=sizes, **greedy)
    for row, item, kind, size in zip(together, items, kinds, sizes, strict=True):
        alone = llava.generate(PROMPT, images=[item], modalities=[kind], image_sizes=[size], **greedy)[0]
        assert torch.equal(row[: len(alone)], alone)
