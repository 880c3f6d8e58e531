"""Components and spanning trees against SciPy, on graphs of very different shape."""

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components as scipy_components
from scipy.sparse.csgraph import minimum_spanning_tree

from llava.token_compression.components import (
    UNRELATED,
    connected_components,
    degrees_above,
    join,
    maximum_spanning_forest,
    normalised,
    similarities,
    threshold_components,
)


def scipy_labels(adjacency: np.ndarray) -> np.ndarray:
    """The lowest vertex of each vertex's component."""
    _, component = scipy_components(csr_matrix(adjacency), directed=False)
    _, first = np.unique(component, return_index=True)
    return first[component]


def shuffled(adjacency: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    order = rng.permutation(len(adjacency))
    return adjacency[np.ix_(order, order)]


def chain(n: int) -> np.ndarray:
    return np.eye(n, k=1, dtype=bool)


def star(n: int) -> np.ndarray:
    adjacency = np.zeros((n, n), bool)
    adjacency[0] = True
    return adjacency


def cliques(n: int, rng: np.random.Generator) -> np.ndarray:
    group = rng.integers(0, max(1, n // 5), n)
    return group[:, None] == group[None]


def random_graphs(rng: np.random.Generator):
    for _ in range(1000):
        n = int(rng.integers(1, 60))
        density = 10 ** rng.uniform(-3, 0)  # nearly empty to complete
        yield np.triu(rng.random((n, n)) < density)
    for n in (1, 2, 3, 50, 196, 300):
        for _ in range(5):
            yield shuffled(chain(n), rng)
            yield shuffled(star(n), rng)
            yield shuffled(cliques(n, rng), rng)
    yield chain(300)
    yield chain(300)[::-1, ::-1]


def symmetric(adjacency: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(adjacency | adjacency.swapaxes(1, 2)).float()


def test_components_equal_scipy_on_more_than_a_thousand_graphs():
    count = 0
    for adjacency in random_graphs(np.random.default_rng(0)):
        labels = connected_components(symmetric(adjacency[None]))
        np.testing.assert_array_equal(labels[0].numpy(), scipy_labels(adjacency))
        count += 1
    assert count > 1000


def test_a_batch_of_graphs_is_labelled_graph_by_graph():
    rng = np.random.default_rng(1)
    batch = np.stack([np.triu(rng.random((40, 40)) < density) for density in (0, 0.01, 0.03, 0.1, 1)])
    labels = connected_components(symmetric(batch))
    np.testing.assert_array_equal(labels.numpy(), np.stack([scipy_labels(graph) for graph in batch]))


def test_one_long_shuffled_chain_is_one_component():
    order = torch.randperm(100_000, generator=torch.Generator().manual_seed(0))
    labels = join(torch.arange(100_000), order[:-1], order[1:])
    assert not labels.any()


def test_joining_edges_one_at_a_time_equals_joining_them_at_once():
    generator = torch.Generator().manual_seed(2)
    u, v = torch.randint(0, 300, (2, 250), generator=generator)
    stepwise = torch.arange(300)
    for i in range(250):
        stepwise = join(stepwise, u[i : i + 1], v[i : i + 1])
    assert torch.equal(stepwise, join(torch.arange(300), u, v))


@pytest.mark.parametrize("block_entries", [64, 1000, 2**21])
@pytest.mark.parametrize("threshold", [-1.0, -0.2, 0.0, 0.3, 0.6, 0.9, 1.0])
def test_threshold_components_and_degrees_equal_scipy_for_any_block_size(monkeypatch, block_entries, threshold):
    monkeypatch.setattr("llava.token_compression.components.BLOCK_ENTRIES", block_entries)
    vectors = torch.randn(3, 37, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    vectors[1, 5] = 0  # a zero vector has no edge, at a negative threshold either
    unit = normalised(vectors)
    labels, degrees = threshold_components(unit, threshold)
    for graph in range(3):
        adjacency = (unit[graph] @ unit[graph].T > threshold).numpy()
        absent = ~vectors[graph].any(dim=1).numpy()
        adjacency[absent] = adjacency[:, absent] = False
        np.fill_diagonal(adjacency, True)
        if threshold == 1:
            adjacency = np.eye(37, dtype=bool)
        np.testing.assert_array_equal(labels.view(3, 37)[graph].numpy() - 37 * graph, scipy_labels(adjacency))
        np.testing.assert_array_equal(degrees.view(3, 37)[graph].numpy(), adjacency.sum(1))


@pytest.mark.parametrize("block_entries", [64, 1000, 2**21])
def test_similarities_are_symmetric_cosines_for_any_block_size(monkeypatch, block_entries):
    monkeypatch.setattr("llava.token_compression.components.BLOCK_ENTRIES", block_entries)
    vectors = torch.randn(3, 37, 6, generator=torch.Generator().manual_seed(4))
    vectors[2, 0] = 0
    weights = similarities(normalised(vectors))
    expected = torch.cosine_similarity(vectors[:, :, None], vectors[:, None], dim=-1)
    expected[2, 0] = expected[2, :, 0] = UNRELATED
    expected.diagonal(dim1=1, dim2=2).fill_(UNRELATED)
    assert torch.equal(weights, weights.mT)
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=0)
    above = (expected > 0.25).sum(-1).view(-1) + 1
    assert torch.equal(degrees_above(weights, 0.25), above)


def forests(ties: bool, count: int = 30):
    rng = np.random.default_rng(5)
    for _ in range(count):
        n = int(rng.integers(1, 40))
        weights = rng.integers(0, 5, (n, n)) / 5 if ties else rng.random((n, n))
        yield np.triu(weights, 1) + np.triu(weights, 1).T


@pytest.mark.parametrize("ties", [False, True])
def test_spanning_tree_weighs_what_scipys_does(ties):
    for weights in forests(ties):
        forest = maximum_spanning_forest(torch.from_numpy(weights).unsqueeze(0))
        distances = 2 - weights  # SciPy minimises, and takes 0 for no edge
        np.fill_diagonal(distances, 0)
        expected = minimum_spanning_tree(distances)
        assert len(forest.weight) == len(weights) - 1
        assert float((2 - forest.weight).sum()) == pytest.approx(expected.sum())
        np.testing.assert_array_equal(forest.weight.numpy(), weights[forest.u, forest.v])


def test_every_cut_equals_scipys_single_linkage():
    for weights in forests(ties=False):
        n = len(weights)
        forest = maximum_spanning_forest(torch.from_numpy(weights).unsqueeze(0))
        tree = linkage((2 - weights)[np.triu_indices(n, 1)], "single") if n > 1 else None
        for count in range(1, n + 1):
            labels, (threshold, highest) = forest.cut(count), forest.thresholds(count)
            if tree is not None:
                flat = fcluster(tree, count, "maxclust")
                _, first = np.unique(flat, return_index=True)
                np.testing.assert_array_equal(labels.numpy(), first[np.searchsorted(np.unique(flat), flat)])
            adjacency = (weights > threshold) & ~np.eye(n, dtype=bool)
            if count > 1:  # the cut is also the graph of all similarities above the threshold it names
                np.testing.assert_array_equal(labels.numpy(), scipy_labels(adjacency))
                assert forest.components_above(threshold) == count
            assert count == n or forest.components_above(highest) > count


def test_ties_are_cut_to_the_exact_count_by_lowest_vertices():
    for weights in forests(ties=True):
        forest = maximum_spanning_forest(torch.from_numpy(weights).unsqueeze(0))
        for count in range(1, len(weights) + 1):
            assert len(forest.cut(count).unique()) == count
    labels = maximum_spanning_forest(torch.ones(1, 5, 5)).cut(3)
    assert labels.tolist() == [0, 0, 0, 3, 4]


def test_a_batch_of_trees_is_cut_by_strength_and_never_joins_graphs():
    weights = torch.from_numpy(np.stack([w for w in forests(ties=False, count=400) if len(w) == 12][:4]))
    weights[0] *= 0.01  # the weakest graph is the first to fall apart
    forest = maximum_spanning_forest(weights)
    labels = forest.cut(4).view(4, 12)
    assert torch.equal(labels, (12 * torch.arange(4)).unsqueeze(1).expand(4, 12))
    labels = forest.cut(15).view(4, 12)
    assert len(labels[0].unique()) == 12
    assert all(len(labels[graph].unique()) == 1 for graph in (1, 2, 3))


def test_normalised_survives_extreme_magnitudes():
    vectors = torch.tensor([[3e-30, 4e-30], [3e30, 4e30], [3.0, 4.0], [0.0, 0.0]])
    expected = torch.tensor([[0.6, 0.8], [0.6, 0.8], [0.6, 0.8], [0.0, 0.0]])
    torch.testing.assert_close(normalised(vectors), expected)
