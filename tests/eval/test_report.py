import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from eval.report import clustered_wilson, spread, summarize, table


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_without_clusters_the_interval_is_wilsons(correct):
    low, high = clustered_wilson([float(c) for c in correct], [str(i) for i in range(len(correct))])
    expected = binomtest(sum(correct), len(correct)).proportion_ci(0.95, method="wilson")
    assert low == pytest.approx(expected.low, abs=1e-6)
    assert high == pytest.approx(expected.high, abs=1e-6)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=1, max_size=60))
def test_the_interval_holds_the_mean_and_clusters_never_narrow_it(samples):
    scores = [float(correct) for correct, _ in samples]
    low, high = clustered_wilson(scores, [str(cluster) for _, cluster in samples])
    alone = clustered_wilson(scores, [str(i) for i in range(len(scores))])
    assert 0 <= low <= sum(scores) / len(scores) + 1e-12
    assert sum(scores) / len(scores) - 1e-12 <= high <= 1
    assert high - low >= alone[1] - alone[0] - 1e-12


def test_questions_that_repeat_each_other_count_once():
    """Ten copies of every answer say as much as the answers themselves."""
    scores, clusters = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0], list("abcdef")
    assert clustered_wilson(scores * 10, clusters * 10) == pytest.approx(clustered_wilson(scores, clusters))


def sample(video, score, kept, **group):
    return {
        "score": score,
        "visuals": [video],
        "videos": [{"source_tokens": 100, "kept_tokens": kept, "average_tokens": kept / 2}],
        "milliseconds": {"vision_tower": 10.0, "prefill": float(kept)},
        "group": group,
    }


def test_summary_counts_questions_for_accuracy_and_videos_for_tokens():
    samples = [
        sample("a", 1.0, 10, kind="color"),
        sample("a", 0.0, 10, kind="color"),
        sample("a", 1.0, 10, kind="count"),
        sample("b", 1.0, 30, kind="count"),
    ]
    summary = summarize(samples)
    assert summary["accuracy"]["percent"] == 75
    assert summary["accuracy_by"]["kind"]["color"]["percent"] == 50
    assert summary["accuracy_by"]["kind"]["count"]["samples"] == 2
    assert summary["tokens_after"] == spread([10, 30])
    assert summary["tokens_per_layer"] == spread([5, 15])
    assert summary["retention_ratio"]["mean"] == pytest.approx(0.2)
    assert summary["milliseconds"]["prefill"]["mean"] == 15


def test_summary_without_scores_or_videos():
    summary = summarize([{"score": None, "visuals": [], "videos": [], "milliseconds": {}, "group": {}}])
    assert summary["accuracy"] is None
    assert summary["tokens_after"] is None


@given(st.lists(st.floats(-1e3, 1e3), min_size=1))
def test_spread_is_ordered(values):
    numbers = spread(values)
    assert numbers["min"] <= numbers["median"] <= numbers["max"]
    assert numbers["min"] - 1e-6 <= numbers["mean"] <= numbers["max"] + 1e-6
    assert math.isfinite(numbers["std"])


def result(samples, **more):
    tasks = {"task": {"scores": {"metric": 0.5}}}
    base = {"setting": "r10", "summary": summarize(samples), "tasks": tasks, "figure": None, "judge": None}
    return base | {"submission": None} | more


PATH = Path("results/x/result.json")
SAMPLES = [sample("a", 1.0, 10), sample("b", 0.0, 30)]
UNSCORED = [sample("a", None, 10), sample("b", None, 30)]


def test_table_has_a_row_with_every_number_for_each_result():
    lines = table([(PATH, result(SAMPLES))] * 2).splitlines()
    assert len(lines) == 6
    assert re.fullmatch(r"r10 +50\.0 \(.+ to .+\) +20\.0 +10 +30 +10\.0 +- +20\.0 +results/x/result\.json", lines[2])


def test_marks_stand_under_their_own_head_and_are_no_percentages():
    figure = {"label": "mean score 0-5", "value": 3.27, "parts": {"context": 3.5, "temporal": 3.04}}
    lines = table([(PATH, result(UNSCORED, figure=figure))] * 2).splitlines()
    assert re.match(r"setting +mean score 0-5 +tokens/video", lines[0])
    assert re.match(r"r10 +3\.27 +20\.0", lines[2])
    assert "%" not in lines[0] + lines[2]
    parts = [line.split() for line in lines if line.startswith(("context", "temporal"))]
    assert parts == [["context", "3.50", "3.50"], ["temporal", "3.04", "3.04"]]


def test_a_figure_stands_next_to_the_accuracy_over_questions():
    figure = {"label": "mean of categories %", "value": 62.5, "parts": {"mlvu_dev": 62.5}}
    head, _, row, *rest = table([(PATH, result(SAMPLES, figure=figure))]).splitlines()
    assert re.match(r"setting +mean of categories % +accuracy % \(95 % interval\)", head)
    assert re.match(r"r10 +62\.50 +50\.0 \(", row)
    assert not any("mlvu_dev" in line for line in rest)


def test_without_figure_and_accuracy_lmms_evals_scores_are_shown_if_there_are_any():
    assert "metric 0.50" in table([(PATH, result(UNSCORED))])
    head = table([(PATH, result(UNSCORED, tasks={"egoschema": {"scores": {}}}))]).splitlines()[0]
    assert head.split()[:2] == ["setting", "tokens/video"]


def test_notes_say_where_a_submission_lies_and_who_judged():
    submission = {"path": "results/x/submission.json", "server": "https://server/upload/"}
    assert "-d @results/x/submission.json https://server/upload/" in table(
        [(PATH, result(UNSCORED, submission=submission))]
    )
    judge = {"verdicts": 20, "unusable": 0, "models": ["gpt-x"], "base_url": "https://host/v1"}
    assert "r10: 20 verdicts, by gpt-x at https://host/v1." in table([(PATH, result(SAMPLES, judge=judge))])
    noted = table([(PATH, result(SAMPLES, judge=judge | {"unusable": 3}))])
    assert "20 verdicts, of which 3 could not be read and count as 0" in noted
