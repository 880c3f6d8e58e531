"""What test_kernels.py runs in a process of its own, where Triton interprets kernels, or on a GPU if there is one."""

import os

import pytest
import torch

from llava.token_compression import CompressionConfig, compress, merge, paths, scissor
from llava.token_compression.components import on_grid
from llava.token_compression.cosine import Stored
from llava.token_compression.gpu import fused, graphs, launch
from llava.token_compression.plain import PlainGraphs, nearest_plain

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("clustered", "noise", "duplicates", "constant", "zeros")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles so small that few vectors fill several, and no plain path for few vectors."""
    for name, value in (("BLOCK", 16), ("ENTRIES", 16), ("PROGRAMS", 3)):
        monkeypatch.setattr(launch, name, value)
    monkeypatch.setattr(graphs, "PAIRS", 1500)


def video(frames: int, tokens: int, dim: int, kind: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(frames, tokens, dim, generator=generator)
    group = torch.randint(0, 5, (frames, tokens), generator=generator)
    prototypes = torch.randn(5, dim, generator=generator)
    if kind == "clustered":
        features = prototypes[group] + 0.3 * features
    elif kind == "duplicates":
        features = prototypes[group]
    elif kind == "constant":
        features = prototypes[:1].expand(frames, tokens, dim).clone()
    elif kind == "zeros":
        features[torch.rand(frames, tokens, generator=generator) < 0.4] = 0
    return features.to(DEVICE)


def through(path: paths.Path, features: torch.Tensor, config: CompressionConfig):
    with pytest.MonkeyPatch.context() as patch:
        for module in (scissor, merge):
            patch.setattr(f"{module.__name__}.path_for", lambda tokens: path)
        patch.setattr(fused, "fits", lambda features, config: False)
        return compress(features, config)


def assert_same(result, expected):
    """On a GPU sums of the plain path may round differently; everything else is the same."""
    assert torch.equal(result.positions, expected.positions)
    assert torch.equal(result.assignment, expected.assignment)
    assert result.stats.similarity_threshold == expected.stats.similarity_threshold
    torch.testing.assert_close(result.tokens, expected.tokens, atol=0 if DEVICE == "cpu" else 1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "tokens", "dim"), [(1, 1, 5), (2, 37, 40)])
def test_components_and_degrees(kind, dtype, count, tokens, dim):
    values = video(count, tokens, dim, kind).to(dtype).flatten(0, 1)
    sampled = torch.rand(count * tokens, generator=torch.Generator().manual_seed(1)).lt(0.4).to(DEVICE)
    for tau, chosen in ((-0.4, None), (0.3, sampled), (0.9, None), (1.0, None)):
        expected = PlainGraphs(Stored(values), count).components(tau, chosen)
        inverse, unusual = launch.inverse_lengths(values)
        there = torch.full((1,), len(values), dtype=torch.int32, device=DEVICE)
        labels, degrees, wrong = launch.unite(values, inverse, count, there, on_grid(tau), chosen)
        assert not (wrong | unusual)
        assert torch.equal(labels, expected[0])
        assert torch.equal(degrees, expected[1])


def test_a_chain_through_all_tiles_in_any_order():
    order = torch.randperm(90, generator=torch.Generator().manual_seed(0))
    chain = torch.ones(100, 100).tril().triu(-9)[9:99][order].to(DEVICE)  # a cosine of exactly 0.9 with the next one
    for tau in (0.85, 0.9):
        labels, degrees = graphs.TritonGraphs(chain, 1).components(tau, None)
        expected = PlainGraphs(Stored(chain), 1).components(tau, None)
        assert torch.equal(labels, expected[0])
        assert torch.equal(degrees, expected[1])
    assert len(labels.unique()) == 90


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_whole_step_by_threshold(kind, dtype):
    features = video(2, 21, 40, kind).to(dtype)
    for temporal, merges, tau in ((True, True, 0.6), (True, False, -0.2), (False, True, 0.9)):
        config = CompressionConfig(similarity_threshold=tau, temporal=temporal, merge=merges)
        expected = through(paths.PLAIN, features, config)
        kept, assignment = fused.compressed(features, config)
        assert torch.equal(kept.positions, expected.positions)
        assert torch.equal(assignment, expected.assignment.view(-1))
        assert kept.spatial_tokens == expected.stats.spatial_tokens
        atol = 0 if DEVICE == "cpu" else 1e-5
        torch.testing.assert_close(kept.tokens.to(dtype), expected.tokens, atol=atol, rtol=0)


@pytest.mark.parametrize(("kind", "dtype"), [*zip(KINDS, [*DTYPES, *DTYPES], strict=False)])
def test_the_path_for_everything_else(kind, dtype):
    features = video(2, 21, 40, kind).to(dtype)
    for config in (
        CompressionConfig(retention_ratio=0.3),
        CompressionConfig(similarity_threshold=0.5, error_tolerance=0.6),
    ):
        assert_same(through(graphs.TRITON, features, config), through(paths.PLAIN, features, config))


@pytest.mark.parametrize("kind", ["clustered", "duplicates", "zeros"])
def test_where_a_threshold_is_expected_does_not_matter(kind):
    vectors = video(1, 60, 40, kind)[0]
    plain = PlainGraphs(Stored(vectors), 1).forest(1, None)
    for count in (2, 20):
        lowest, highest = plain.thresholds(count)
        for window in ((lowest - 0.01, highest + 0.01), (-1.0, highest + 0.01), (highest + 0.01, 1.0), (-0.9, lowest)):
            forest = graphs.TritonGraphs(vectors, 1).forest(len(vectors) - count + 1, None, window)
            assert torch.equal(forest.cut(count), plain.cut(count))
            assert forest.thresholds(count) == (lowest, highest)


def test_the_nearest_token_is_the_first_of_equals():
    source, kept = video(1, 50, 24, "zeros")[0], video(1, 40, 24, "duplicates", seed=1)[0]
    membership = torch.randint(-1, 40, (50,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    rows = torch.arange(0, 50, 2, device=DEVICE)
    expected = nearest_plain(Stored(source), Stored(kept), membership, rows)
    assert torch.equal(graphs.TRITON.nearest(Stored(source), Stored(kept), membership, rows), expected)


def test_what_does_not_fit_is_left_to_the_general_path(monkeypatch):
    config = CompressionConfig(similarity_threshold=0.5)
    features = video(2, 12, 24, "clustered")
    for bad in (torch.nan, torch.inf, 1e30):
        spoilt = features.clone()
        spoilt[1, 3, 5] = bad
        assert fused.compressed(spoilt, config) is None
    monkeypatch.setattr(launch, "doubt", lambda dim: 0.5)  # so much to look up that the list overflows
    monkeypatch.setattr(launch, "PAIRS", 8)
    assert fused.compressed(features, config) is None
    assert_same(through(graphs.TRITON, features, config), through(paths.PLAIN, features, config))


def test_numbers_are_read_from_the_device_once(monkeypatch):
    """Counted where Python asks for them; every other operation has a shape that is known beforehand."""
    read, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: read.append(self) or tolist(self))
    features = video(2, 12, 24, "clustered")
    waiting = {"nonzero", "_local_scalar_dense", "masked_select", "unique_consecutive", "_unique2", "bincount", "equal"}

    class Refuse(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            assert function._schema.name.removeprefix("aten::") not in waiting
            return function(*arguments, **(keywords or {}))

    with Refuse():
        assert fused.compressed(features, CompressionConfig(similarity_threshold=0.5)) is not None
    assert len(read) == 1
