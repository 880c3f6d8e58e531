"""Every path gives the results of the plain one, bit for bit."""

import contextlib
import importlib.metadata
import math

import pytest
import torch

from llava.token_compression import (
    CompressionConfig,
    coarse,
    compress,
    cosine,
    dense,
    means,
    merge,
    nearest,
    paths,
    pruned,
    scissor,
)
from llava.token_compression.coarse import CoarseGraph
from llava.token_compression.components import normalised, on_grid, threshold_components
from llava.token_compression.cosine import Halved, Stored
from llava.token_compression.dense import DenseGraphs
from llava.token_compression.plain import PlainGraphs, nearest_plain
from llava.token_compression.pruned import LargeGraph

# What makes small inputs take the ways of large ones
WAYS = {
    "as large as it is": {},
    "pruned": {
        (paths, "DENSE_SIZE"): 2,
        **{(nearest, "FEW"): 2, (nearest, "FEW_ENTRIES"): 0},
        **{(pruned, "ROWS"): 16, (pruned, "PRUNED_SIZE"): 2},
    },
    "unpruned": {(paths, "DENSE_SIZE"): 2, (pruned, "ROWS"): 8, (pruned, "PENDING_EDGES"): 100},
    "rounded off": {(coarse, "has_matrix_unit"): lambda: True, (paths, "DENSE_SIZE"): 2, (coarse, "PENDING"): 9},
    "means on demand": {(means, "STORED_ENTRIES"): 0, (paths, "DENSE_SIZE"): 2, (pruned, "PRUNED_SIZE"): 2},
}
KINDS = ("clustered", "noise", "duplicates", "constant", "zeros")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CONFIGS = [
    *[CompressionConfig(similarity_threshold=tau) for tau in (-1.0, -0.3, 0.0, 0.5, 0.9, 0.9999, 1.0)],
    *[CompressionConfig(retention_ratio=ratio) for ratio in (0.01, 0.1, 0.4, 0.9)],
    CompressionConfig(similarity_threshold=0.5, error_tolerance=0.6),
    CompressionConfig(retention_ratio=0.4, error_tolerance=0.6),
]


def video(frames: int, tokens: int, dim: int, kind: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(frames, tokens, dim, generator=generator)
    if kind == "clustered":
        group = torch.randint(0, 6, (frames, tokens), generator=generator)
        features = torch.randn(6, dim, generator=generator)[group] + 0.3 * features
    elif kind == "duplicates":
        features = torch.randn(5, dim, generator=generator)[torch.randint(0, 5, (frames, tokens), generator=generator)]
    elif kind == "constant":
        features = features[:1, :1].expand(frames, tokens, dim).clone()
    elif kind == "zeros":
        features[torch.rand(frames, tokens, generator=generator) < 0.4] = 0
    return features


@contextlib.contextmanager
def going(path: paths.Path, way: str = "as large as it is"):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coarse, "has_matrix_unit", lambda: False)
        for (module, name), value in WAYS[way].items():
            patch.setattr(module, name, value)
        for module in (scissor, merge):
            patch.setattr(f"{module.__name__}.path_for", lambda tokens: path)
        yield


def assert_same(result, expected):
    assert torch.equal(result.positions, expected.positions)
    assert torch.equal(result.assignment, expected.assignment)
    assert torch.equal(result.tokens, expected.tokens)
    assert result.stats.similarity_threshold == expected.stats.similarity_threshold
    assert result.stats.spatial_tokens == expected.stats.spatial_tokens


def check(features: torch.Tensor, config: CompressionConfig, ways=WAYS):
    with going(paths.PLAIN):
        expected = compress(features, config)
    for way in ways:
        with going(paths.FAST, way):
            assert_same(compress(features, config), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("frames", "tokens", "dim"), [(1, 1, 8), (1, 7, 8), (5, 30, 70), (3, 80, 160)])
def test_all_ways_give_the_plain_result(kind, frames, tokens, dim):
    for index, config in enumerate(CONFIGS):
        dtype = DTYPES[(index + frames) % len(DTYPES)]
        check(video(frames, tokens, dim, kind, seed=index).to(dtype), config)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_ways_give_the_plain_result_for_every_dtype(dtype):
    for config in CONFIGS[3:10:3]:
        check(video(4, 40, 96, "clustered").to(dtype), config)


@pytest.mark.parametrize("doubt", [1e-3, 0.05, 0.8])
def test_how_much_is_looked_up_does_not_matter(doubt, monkeypatch):
    """However coarse the products, decisions are exact; the largest doubt makes all of them be looked up at once."""
    for module in (cosine, dense):
        monkeypatch.setattr(module, "slack", lambda dim, device: doubt)
    for kind in ("clustered", "duplicates", "zeros"):
        for config in CONFIGS[3:10:2]:
            check(video(3, 40, 96, kind), config)


def test_pytorchs_precision_of_products_does_not_matter():
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("high", "medium"):
            torch.set_float32_matmul_precision(precision)
            for config in CONFIGS[3:10:2]:
                check(video(3, 60, 256, "clustered"), config)
    finally:
        torch.set_float32_matmul_precision(before)


def test_too_many_equal_edges_to_look_up_one_by_one(monkeypatch):
    monkeypatch.setattr(pruned, "LOOKUPS", 0)
    for kind in ("duplicates", "constant", "clustered"):
        check(video(4, 40, 96, kind), CompressionConfig(retention_ratio=0.2))


@pytest.mark.parametrize("dim", [2, 24, 897])
def test_rounding_off_moves_cosines_by_no_more_than_is_said(dim):
    """Every entry of the first two is moved as far as possible, the same way or the other."""
    worst = torch.tensor([1 + 0.99 * 2.0**-8, 1 + 1.01 * 2.0**-8]).unsqueeze(1).expand(2, dim)
    random = torch.randn(60, dim, generator=torch.Generator().manual_seed(0)) ** 3
    tokens = Stored(torch.cat([worst, 3 * worst, random]))
    rounded = coarse.Coarse(tokens).scaled(slice(None))
    off = (cosine.products(rounded, rounded) - cosine.exact_products(tokens.values, tokens.values)).abs()
    assert 2.0**-7.5 < off.max() <= coarse.DOUBT + tokens.doubt


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_magnitudes_are_normalised_first(scale):
    features = video(3, 40, 96, "clustered")
    with going(paths.PLAIN):
        expected = compress(features, CompressionConfig(similarity_threshold=0.8, merge=False)).assignment
    for way in WAYS:
        with going(paths.FAST, way):
            result = compress(features * scale, CompressionConfig(similarity_threshold=0.8, merge=False))
            assert torch.equal(result.assignment, expected)


def graphs(vectors: torch.Tensor):
    """One graph of these vectors, by each implementation."""
    tokens = Stored(vectors)
    with going(paths.FAST, "pruned"):
        yield LargeGraph(tokens)
        yield LargeGraph(Halved(tokens))
    with going(paths.FAST, "unpruned"):
        yield LargeGraph(tokens)
    for way in ("as large as it is", "rounded off"):
        with going(paths.FAST, way):
            yield DenseGraphs(tokens, 1)
    yield CoarseGraph(tokens)
    yield PlainGraphs(tokens, 1)


@pytest.mark.parametrize("tau", [0.25, 0.5, 0.625, 0.6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_similarities_equal_to_the_threshold_are_no_edges(tau, dtype):
    """Signs in 32 dimensions, scaled by small numbers: cosines are multiples of 1/16, known in whole numbers."""
    generator = torch.Generator().manual_seed(0)
    signs = 2 * torch.randint(0, 2, (6, 32), generator=generator) - 1
    flip = torch.rand(120, 32, generator=generator) < 0.12
    vectors = torch.where(flip, -1, 1) * signs[torch.randint(0, 6, (120,), generator=generator)]
    products = vectors @ vectors.T
    adjacency = products > tau * 32
    assert tau == 0.6 or (products == tau * 32).any()
    scale = torch.randint(1, 8, (120, 1), generator=generator)
    expected = None
    for graph in graphs((vectors * scale).to(dtype)):
        labels, degrees = graph.components(tau, None)
        assert torch.equal(degrees, adjacency.sum(1))
        assert expected is None or torch.equal(labels, expected)
        expected = labels


def shaped(kind: str) -> torch.Tensor:
    """Vectors whose graphs at some thresholds are chains, stars, cliques, complete or empty."""
    if kind == "chain":  # each shares nine of its ten entries with the next one: a cosine of exactly 0.9
        order = torch.randperm(250, generator=torch.Generator().manual_seed(1))
        return torch.ones(260, 260).tril().triu(-9)[9:259][order]
    if kind == "star":
        leaves = torch.eye(40)
        return torch.cat([leaves, leaves.mean(0, keepdim=True)])
    if kind == "cliques":
        return torch.eye(7)[torch.randint(0, 7, (90,), generator=torch.Generator().manual_seed(2))]
    return torch.ones(50, 5) if kind == "complete" else torch.eye(50)


@pytest.mark.parametrize("kind", ["chain", "star", "cliques", "complete", "empty"])
@pytest.mark.parametrize("tau", [0.1, 0.85, 0.9, 0.95])
def test_graphs_of_every_shape(kind, tau):
    vectors = shaped(kind)
    unit = normalised(vectors.double())
    expected = threshold_components(unit.unsqueeze(0), tau)
    if kind == "chain":  # whose cosine of 0.9 is not above 0.9
        assert len(expected[0].unique()) == (1 if tau < 0.9 else 250)
    plain = PlainGraphs(Stored(vectors), 1).forest(1, None)
    for graph in graphs(vectors):
        labels, degrees = graph.components(tau, None)
        assert torch.equal(labels, expected[0])
        assert torch.equal(degrees, expected[1])
        needed = len(vectors) // 2
        forest = graph.forest(needed, None)
        for count in range(len(vectors) - needed + 1, len(vectors) + 1, 7):
            assert torch.equal(forest.cut(count), plain.cut(count))
            assert forest.thresholds(count) == plain.thresholds(count)
            assert forest.components_above(forest.thresholds(count)[1]) == plain.components_above(
                plain.thresholds(count)[1]
            )


@pytest.mark.parametrize("kind", ["clustered", "duplicates", "zeros"])
def test_where_a_threshold_is_expected_does_not_matter(kind):
    """Windows around the thresholds, on one side of them, without either limit."""
    vectors = video(1, 150, 40, kind)[0]
    plain = PlainGraphs(Stored(vectors), 1).forest(1, None)
    for count in (1, 2, 60, 149):
        lowest, highest = plain.thresholds(count)
        for window in (
            *[(lowest - 0.01, highest + 0.01), (lowest, highest), (-1.0, highest + 0.01), (lowest - 0.01, 1.0)],
            *[(highest + 0.01, highest + 0.1), (lowest - 0.1, lowest - 0.01)],
        ):
            for graph in graphs(vectors):
                forest = graph.forest(len(vectors) - count + 1, None, window)
                assert torch.equal(forest.cut(count), plain.cut(count))
                assert forest.thresholds(count) == (lowest, highest)


@pytest.mark.parametrize("kind", KINDS)
def test_degrees_decide_between_members_as_in_the_plain_path(kind):
    vectors = video(1, 150, 40, kind)[0]
    for tau in (0.3, 0.7):
        labels, degrees = PlainGraphs(Stored(vectors), 1).components(tau, None)
        for graph in graphs(vectors):
            assert torch.equal(graph.degrees(tau, None), degrees)
            some = torch.bincount(labels)[labels] > 2  # smaller components have equal degrees, which may be left out
            assert torch.equal(graph.degrees(tau, labels)[some], degrees[some])


@pytest.mark.parametrize("tokens", [1, 2, 3, 17, 128, 129, 1000, 10_000])
def test_sizes_from_one_token_to_ten_thousand(tokens):
    vectors = video(1, tokens, 24, "clustered")[0].bfloat16()
    expected = PlainGraphs(Stored(vectors), 1).components(0.9, None)
    large = LargeGraph(Stored(vectors)).components(0.9, None)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(large, expected, strict=True))
    with going(paths.FAST):
        result = compress(vectors.unsqueeze(0), CompressionConfig(retained_tokens=math.isqrt(tokens)))
    assert len(result.tokens) == math.isqrt(tokens)


@pytest.mark.parametrize("kept", [1, 5, 300])
def test_the_nearest_token_is_the_first_of_equals(kept):
    source, choices = video(1, 200, 48, "zeros")[0], video(1, kept, 48, "duplicates", seed=1)[0]
    membership = torch.randint(-1, kept, (200,), generator=torch.Generator().manual_seed(3))
    rows = torch.arange(0, 200, 2)
    expected = nearest_plain(Stored(source), Stored(choices), membership, rows)
    cosines = cosine.exact_products(source[rows], choices)
    zero = ~source[rows].any(dim=1) & (membership[rows] >= 0)
    assert torch.equal(expected[~zero], (cosines == cosines.amax(1, keepdim=True)).int().argmax(1)[~zero])
    for way in WAYS:
        with going(paths.FAST, way):
            assert torch.equal(nearest.nearest(Stored(source), Stored(choices), membership, rows), expected)


def test_exact_cosines_do_not_depend_on_the_order_of_summation():
    vectors = video(1, 60, 1000, "clustered")[0]
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(4))
    i, j = torch.triu_indices(60, 60)
    pairs = cosine.exact_cosines(vectors[i], vectors[j])
    assert torch.equal(pairs, cosine.exact_cosines(vectors[i][:, order], vectors[j][:, order]))
    assert torch.equal(pairs, cosine.exact_products(vectors, vectors)[i, j])
    assert (pairs[i == j] == 1).all()
    assert on_grid(0.8) == float(cosine.exact_cosines(torch.tensor([[4.0, 3.0]]), torch.tensor([[1.0, 0.0]])))


def test_products_are_within_the_slack_and_sketches_bound_cosines():
    for dim in (8, 300, 2000):
        tokens = Stored(video(1, 100, dim, "clustered")[0])
        exact = cosine.exact_products(tokens.values, tokens.values)
        everything = tokens.scaled(slice(None))
        assert (cosine.products(everything, everything) - exact).abs().max() <= tokens.doubt
        halved = Halved(tokens)
        approximate = cosine.products(halved.scaled(slice(None)), halved.scaled(slice(None)))
        assert (approximate - exact).abs().max() <= halved.doubt
        for some in (tokens, halved):
            sketch = pruned.Sketch(some)
            sketches = sketch.all(some)
            assert (sketches @ sketches.T >= exact - sketch.margin).all()


@pytest.mark.parametrize(("version", "has"), [("3.4.0", True), ("3.10.1", True), ("3.3.1", False), (None, False)])
def test_kernels_are_used_where_a_triton_is_installed_that_is_new_enough(version, has, monkeypatch):
    def installed(name):
        assert name == "triton"
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    paths.has_kernels.cache_clear()
    try:
        assert paths.has_kernels() is has
    finally:
        paths.has_kernels.cache_clear()
