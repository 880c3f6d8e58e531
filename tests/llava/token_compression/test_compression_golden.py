"""Parity with the published LLaVA-Scissor function on its recorded outputs (the B4 cases).

Where the published result does not depend on its random number generator, everything must match: labels, counts, order,
tokens and the final assignment. Elsewhere (vertices sampled at random, tokens lost from components) the exact counts
are compared, and the sampled ones statistically.
"""

import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from llava.token_compression import CompressionConfig, compress
from llava.token_compression.merge import merge

GOLDEN = Path(__file__).parents[3] / ".." / "shared" / "golden"
if not (GOLDEN / "index.json").exists():
    pytest.skip("the recorded outputs in ../shared/golden are not here", allow_module_level=True)
CASES = {name: case for name, case in json.loads((GOLDEN / "index.json").read_text())["cases"].items() if "B4_" in name}
FLOAT32 = [name for name, case in CASES.items() if "compute_dtype" not in case]
DETERMINISTIC = [name for name in FLOAT32 if CASES[name]["exact_regime"] and "tokens" in CASES[name]["arrays"]]
RANDOM = [name for name in FLOAT32 if name not in DETERMINISTIC]
LOW_PRECISION = [name for name in CASES if name not in FLOAT32]


@functools.cache
def file(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / name) as arrays:
        return dict(arrays)


def array(case: str, key: str) -> torch.Tensor:
    entry = CASES[case]["arrays"][key]
    values = torch.from_numpy(file(entry.get("stored_in", CASES[case]["file"]))[entry.get("stored_key", key)])
    return values if values.is_floating_point() else values.long()


def run(case: str, **settings):
    config = CompressionConfig(similarity_threshold=CASES[case]["tau"], **settings)
    return compress(array(case, "features"), config)


def test_all_cases_are_sorted_into_groups():
    assert len(DETERMINISTIC) >= 16
    assert len(DETERMINISTIC) + len(RANDOM) + len(LOW_PRECISION) == len(CASES) >= 28


@pytest.mark.parametrize("case", DETERMINISTIC)
def test_everything_matches_where_the_published_result_is_deterministic(case):
    frames, tokens = CASES[case]["frames"], CASES[case]["hw"]
    counts, spatial_labels = array(case, "spatial_counts"), array(case, "spatial_labels")
    offset = counts.cumsum(0) - counts
    within_video = spatial_labels + offset.unsqueeze(1)
    temporal_labels = array(case, "temporal_labels")

    spatial = run(case, temporal=False, merge=False)
    assert torch.equal(spatial.assignment, within_video)
    assert torch.equal(torch.bincount(spatial.positions // tokens, minlength=frames), counts)
    if "spatial_tokens" in CASES[case]["arrays"]:  # not recorded for the larger cases
        torch.testing.assert_close(spatial.tokens, array(case, "spatial_tokens"), atol=1e-5, rtol=0)

    temporal = run(case, merge=False)
    assert torch.equal(temporal.assignment, temporal_labels[within_video])
    assert temporal.stats.spatial_tokens == counts.sum()

    final = run(case)
    assert torch.equal(final.assignment.view(-1), array(case, "assign"))
    torch.testing.assert_close(final.tokens, array(case, "tokens"), atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", RANDOM)
def test_exact_counts_match_where_the_published_result_is_random(case):
    expected = CASES[case]["exact_cc"]
    stats = run(case).stats
    assert (stats.spatial_tokens, stats.kept_tokens) == (expected["after_spatial"], expected["after_temporal"])


@pytest.mark.parametrize("case", RANDOM)
def test_sampled_counts_look_like_the_recorded_runs(case):
    """The mean of ten of our seeds lies within the recorded runs, widened by three standard errors of both means."""
    runs = CASES[case]["runs"]
    ours = [run(case, error_tolerance=CASES[case]["epsilon"], seed=seed).stats for seed in range(10)]
    for key, counts in {
        "after_spatial": [stats.spatial_tokens for stats in ours],
        "after_temporal": [stats.kept_tokens for stats in ours],
    }.items():
        recorded = [entry[key] for entry in runs]
        spread = max(np.std(recorded, ddof=1), np.std(counts, ddof=1), 0.5)
        slack = 3 * spread * math.sqrt(1 / len(recorded) + 1 / len(counts))
        assert abs(np.mean(counts) - np.mean(recorded)) <= slack, (key, counts, recorded)
        assert min(counts) >= CASES[case]["exact_cc"][key]  # a sampled graph has no edge that the exact one lacks


@pytest.mark.parametrize("case", RANDOM)
def test_final_merge_matches_the_recorded_labels_of_every_seed(case):
    """Rebuild each recorded run from its labels with our merge (lost tokens, label -1, are in no mean)."""
    features = array(case, "features")
    for seed in range(len(CASES[case]["runs"])):
        counts = array(case, f"spatial_counts_seed{seed}")
        offset = (counts.cumsum(0) - counts).unsqueeze(1)
        labels = array(case, f"spatial_labels_seed{seed}")
        spatial = means(features.flatten(0, 1), torch.where(labels < 0, -1, labels + offset).view(-1))
        kept = means(spatial, array(case, f"temporal_labels_seed{seed}"))
        tokens, _ = merge(features.flatten(0, 1), kept, torch.full((features.shape[0] * features.shape[1],), -1))
        torch.testing.assert_close(tokens, array(case, f"tokens_seed{seed}"), atol=1e-5, rtol=0)


def means(vectors: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.stack([vectors[labels == label].mean(0) for label in range(int(labels.max()) + 1)])


@pytest.mark.parametrize("case", LOW_PRECISION)
def test_low_precision_is_at_least_as_near_to_float32_as_published(case):
    """The published function compares rounded cosines with a rounded threshold; only the input is rounded here."""
    dtype = getattr(torch, CASES[case]["compute_dtype"])
    features = array(case, "features")
    config = CompressionConfig(similarity_threshold=CASES[case]["tau"])
    result, reference = compress(features.to(dtype), config), compress(features, config)
    assert result.tokens.dtype == dtype
    assert result.tokens.isfinite().all()
    published_error = abs(CASES[case]["after_spatial"] - reference.stats.spatial_tokens)
    assert abs(result.stats.spatial_tokens - reference.stats.spatial_tokens) <= max(1, published_error)
    upcast = compress(features.to(dtype).float(), config)  # nothing but the rounding of input and output happens
    assert torch.equal(result.assignment, upcast.assignment)
    assert torch.equal(result.tokens, upcast.tokens.to(dtype))
