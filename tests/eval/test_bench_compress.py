from pathlib import Path

import pytest
import torch

from eval import bench_compress
from eval.bench_compress import RETENTION_RATIOS, THRESHOLDS, long_table, synthetic_features, table


def test_the_table_has_a_row_for_every_setting_and_exact_counts():
    rows = table(((8, 16, 12),), "cpu", torch.float32, repeats=1).splitlines()[2:]
    assert len(rows) == len(THRESHOLDS) + len(RETENTION_RATIOS)
    kept = [int(row.split("|")[4].split()[0]) for row in rows]
    assert kept[len(THRESHOLDS) :] == [round(ratio * 128) for ratio in RETENTION_RATIOS]
    assert all(float(row.split("|")[6]) >= 0 for row in rows)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of resident memory is read from /proc")
def test_the_table_of_long_videos_has_a_row_for_every_length_and_setting(monkeypatch):
    monkeypatch.setattr(bench_compress, "LONG_VIDEO", (16, 12))
    rows = long_table([2, 10], "cpu", torch.bfloat16).splitlines()[2:]
    assert [int(row.split("|")[1]) for row in rows] == [2] * 3 + [10] * 3
    assert [int(row.split("|")[4]) for row in rows][2::3] == [3, 16]  # exactly 10 %


def test_features_repeat_and_regions_persist_within_a_scene_only():
    features = synthetic_features(8, 49, 64)
    assert torch.equal(features, synthetic_features(8, 49, 64))
    same_place = torch.cosine_similarity(features[1:], features[:-1], dim=-1).mean(dim=1)
    cuts = [1, 3, 5]
    within = [pair for pair in range(7) if pair not in cuts]
    assert same_place[within].min() > same_place[cuts].max()
    with pytest.raises(ValueError, match="square"):
        synthetic_features(1, 50, 4)
