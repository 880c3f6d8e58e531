"""Compression of each family of transformers, on tiny random models of the real architectures."""

import pytest
import torch
import transformers
from tiny_hf import TINY, Prompts

from llava.instrument import record
from llava.token_compression import CompressionConfig, compress, compression, list_methods
from llava.token_compression.registry import get_method

CLOSE = {"rtol": 0, "atol": 1e-4}
METHODS = [
    name
    for name in list_methods()
    if name != "none" and not get_method(name).inputs and get_method(name).before is None
]
IMAGES = [name for name, tiny in TINY.items() if tiny.image is not None]
ROTARY = [name for name in TINY if name.startswith("qwen")]


@pytest.fixture(scope="module", params=TINY)
def tiny(request):
    return TINY[request.param]


@pytest.fixture(scope="module")
def model(tiny):
    return tiny.model()


def reads(model, prompts, **settings):
    """What the language model gets under these settings (none: without compression), and the logits."""
    seen = {}

    def look(module, args, kwargs):
        seen.update(kwargs)

    language_model = getattr(model.base_model, "language_model", None) or model.base_model.text_model

    def run():
        handle = language_model.register_forward_pre_hook(look, with_kwargs=True)
        try:
            seen["logits"] = model(**prompts.inputs).logits
        finally:
            handle.remove()

    with torch.no_grad():
        if settings:
            with compression(model, **settings):
                run()
        else:
            run()
    return seen


def answer(model, prompts, tokens=5, **kwargs):
    """Ids and logits of a generated answer: (rows, tokens), and (rows, tokens, vocabulary)."""
    output = model.generate(
        **prompts.inputs,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **kwargs,
    )
    length = prompts.inputs["input_ids"].shape[1]
    assert torch.equal(output.sequences[: len(prompts.inputs["input_ids"]), :length], prompts.inputs["input_ids"])
    return output.sequences[:, length:], torch.stack(output.logits, dim=1)


def kept_places(prompts, length, row, results):
    """Places of a prompt that stay, given what compression makes of its videos."""
    keep = prompts.inputs["attention_mask"][row].bool().clone()
    for places, result in zip(prompts.videos[row], results, strict=True):
        keep[places.flatten()] = False
        keep[places.flatten()[result.positions]] = True
    return keep.nonzero()[:, 0]


def test_everything_kept_changes_nothing(tiny, model):
    prompts = tiny.prompts([[4, 4], [4]])
    before = model(**prompts.inputs).logits
    with compression(model, retention_ratio=1.0):
        assert torch.equal(model(**prompts.inputs).logits, before)
    with compression(model, method="none"):
        assert torch.equal(model(**prompts.inputs).logits, before)


@pytest.mark.parametrize("method", METHODS)
def test_language_model_reads_what_compress_gives(tiny, model, method):
    """The kept tokens are those of `compress` by hand, in exactly the number asked for; the text stays as it was."""
    prompts = tiny.prompts([[4, 4]], seed=1)
    config = CompressionConfig(method=method, retained_tokens=5)
    whole, short = reads(model, prompts), reads(model, prompts, method=method, retained_tokens=5)
    embeds = whole["inputs_embeds"][0]
    results = [compress(embeds[places], config) for places in prompts.videos[0]]
    kept = kept_places(prompts, len(embeds), 0, results)
    expected = embeds.clone()
    for places, result in zip(prompts.videos[0], results, strict=True):
        expected[places.flatten()[result.positions]] = result.tokens
        assert len(result.tokens) == 5
    assert torch.equal(short["inputs_embeds"][0], expected[kept])
    assert len(kept) == len(embeds) - 2 * (16 - 5)
    assert short["logits"].shape[1] == len(kept)


@pytest.mark.parametrize("choice", ["source", "contiguous", None])
def test_positions(tiny, model, choice):
    prompts = tiny.prompts([[4, 4]])
    whole, short = reads(model, prompts), reads(model, prompts, retained_tokens=6, position_ids=choice)
    length = whole["inputs_embeds"].shape[1]
    config = CompressionConfig(retained_tokens=6)
    results = [compress(whole["inputs_embeds"][0, places], config) for places in prompts.videos[0]]
    kept = kept_places(prompts, length, 0, results)
    positions = short["position_ids"][..., 0, :]
    if tiny.name in ROTARY:
        names = ("input_ids", "mm_token_type_ids", "video_grid_thw")
        given = {name: value for name, value in prompts.inputs.items() if name in names}
        before = model.base_model.get_rope_index(**given)[0][:, 0]
    else:
        before = torch.arange(length)
    if choice == "source" or (choice is None and tiny.name in ROTARY):
        assert torch.equal(positions[-3:] if tiny.name in ROTARY else positions, before[..., kept])
    elif tiny.name in ROTARY:  # text has the same number on all axes; now the videos have too, without gaps
        assert torch.equal(positions[-3:], torch.arange(len(kept)).expand(3, -1))
    else:
        assert torch.equal(positions, torch.arange(len(kept)))


@pytest.mark.parametrize("choice", ["source", "contiguous"])
def test_answers_agree_with_and_without_cache(tiny, model, choice):
    prompts = tiny.prompts([[4]])
    with compression(model, retention_ratio=0.4, position_ids=choice):
        ids, logits = answer(model, prompts)
        for kwargs in ({"use_cache": False}, {"cache_implementation": "static"}):
            if tiny.name == "smolvlm" and "use_cache" in kwargs and older(5, 5):
                continue
            other_ids, other = answer(model, prompts, **kwargs)
            assert torch.equal(other_ids, ids)
            torch.testing.assert_close(other, logits, **CLOSE)
    _, whole = answer(model, prompts)
    assert (whole - logits).abs().max() > 0.05


def older(major, minor):
    """Whether the installed transformers is older."""
    return tuple(map(int, transformers.__version__.split(".")[:2])) < (major, minor)


@pytest.mark.parametrize("choice", ["source", "contiguous"])
def test_batch_equals_single(tiny, model, choice):
    """Left-padded rows with unequal numbers of videos, of which unequal numbers of tokens are kept."""
    batch = tiny.prompts([[4], [4, 4]], words=4)
    with compression(model, retention_ratio=0.3, position_ids=choice), record() as recorder:
        ids, logits = answer(model, batch)
        static_ids, static = answer(model, batch, cache_implementation="static")
    assert [stats.kept_tokens for stats in recorder.compressions] == [5] * 6
    assert torch.equal(ids, static_ids)
    torch.testing.assert_close(static, logits, **CLOSE)
    for row, videos in enumerate(batch.videos):
        single = single_row(batch, row, len(videos))
        with compression(model, retention_ratio=0.3, position_ids=choice):
            row_ids, row_logits = answer(model, single)
        assert torch.equal(row_ids[0], ids[row])
        torch.testing.assert_close(row_logits[0], logits[row], **CLOSE)


def single_row(batch, row, videos):
    """One row of a batch without its padding; rows hold one and two videos of four frames."""
    valid = batch.inputs["attention_mask"][row].bool()
    first = 0 if row == 0 else 1
    inputs = {}
    for name, value in batch.inputs.items():
        if name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            inputs[name] = value[row : row + 1, valid]
        elif name == "pixel_values" and value.ndim == 5:  # padded per row
            inputs[name] = value[row : row + 1]
        else:
            each = len(value) // 3
            inputs[name] = value[first * each : (first + videos) * each]
    return Prompts(inputs, [])
