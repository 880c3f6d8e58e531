"""PruneVid on hand-made cases."""

import pytest
import torch

from llava.errors import ConfigError
from llava.token_compression import CompressionConfig, compress
from llava.token_compression.prunevid import refined


def result(features, count, **options):
    return compress(features, CompressionConfig(method="prunevid", retained_tokens=count, options=options))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([4, 4, 4, 4], [0, 0, 0, 0]),
        ([1, 1, 2, 2, 2], [0, 0, 1, 1, 1]),
        ([1, 1, 7, 2, 2, 2], [0, 0, 1, 1, 1, 1]),  # the orphan goes to the longer side
        ([1, 1, 7, 2, 2], [0, 0, 0, 1, 1]),  # the left one of equals
        ([1, 1, 1, 2, 2, 1, 1], [0, 0, 0, 1, 1, 1, 1]),  # the shorter run of a cluster is an orphan
        ([1, 1, 2, 2, 1, 1], [0, 0, 1, 1, 2, 2]),  # runs of equal length are all kept
        ([1, 2, 1, 2], [0, 0, 0, 0]),  # nothing is kept
        ([7, 1, 1, 8, 9], [0, 0, 0, 0, 0]),
        ([5], [0]),
    ],
)
def test_segments_of_clusters(labels, expected):
    assert refined(torch.tensor(labels)).tolist() == expected


def test_a_still_is_kept_once():
    features = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(0)).expand(8, 12, 16)
    found = result(features, 12)
    assert found.positions.tolist() == list(range(12))
    assert torch.equal(found.assignment, torch.arange(12).expand(8, 12))
    torch.testing.assert_close(found.tokens, features[0])


def test_still_and_moving_places_by_hand():
    """Places 0 and 1 stay; place 2 moves. Two tokens for the still places, one for the moving one of each frame."""
    features = torch.tensor([[[1.0, 0], [0, 4], [1, 1]], [[3.0, 0], [0, 2], [-1, 1]]])
    found = result(features, 4)
    assert found.positions.tolist() == [0, 1, 2, 5]
    assert found.assignment.tolist() == [[0, 1, 2], [0, 1, 3]]
    torch.testing.assert_close(found.tokens, torch.tensor([[2.0, 0], [0, 3], [1, 1], [-1, 1]]))


def test_similarity_is_the_mean_over_pairs_of_frames():
    """Cosines of three frames' tokens: 1, 0 and 0, a third in the mean."""
    features = torch.tensor([[[1.0, 0]], [[1.0, 0]], [[0.0, 1]]])
    assert (result(features, 1, tau=0.33).assignment == 0).all()
    assert (result(features, 1, tau=0.34).assignment < 0).any()


def test_clusters_are_means_of_their_members():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 40, 8, generator=generator)
    found = result(features, 10)
    for slot in range(10):
        torch.testing.assert_close(found.tokens[slot], features[0][found.assignment[0] == slot].mean(0))


def test_more_than_the_segments_leave_is_what_is_least_like_the_mean_of_its_place():
    features = torch.tensor([[1.0, 0], [0, 1]]).repeat(4, 1, 1)
    features[2, 1] = torch.tensor([0.3, 1.0])
    found = result(features, 3)
    assert found.positions.tolist() == [0, 1, 5]
    assert found.assignment.tolist() == [[0, 1], [0, 1], [0, 2], [0, 1]]


def test_shares_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="segment_share must lie in"):
        CompressionConfig(method="prunevid", retained_tokens=1, options={"segment_share": 1.5})
