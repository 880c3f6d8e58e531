"""Cells of a table, from results on disk to Markdown and CSV; and the grid that makes the results."""

import csv
import json

import numpy as np
import pytest

pytest.importorskip("lmms_eval", reason="needs the extra `eval`")

from eval.results import result_fingerprint, setting_folder
from eval.run import CHECKOUT, StoppedError
from eval.standin import standin_home
from eval.tables import __main__ as command
from eval.tables import cells as cells_module
from eval.tables.bootstrap import DRAWS, Estimate, estimate
from eval.tables.cells import (
    FAILED,
    MEASURED,
    NEEDS_JUDGE,
    NEEDS_WEIGHTS,
    NO_METHOD,
    NOT_RUN,
    OTHER_MODEL,
    STALE,
    STATES,
    Grid,
)
from eval.tables.plots import write_plot
from eval.tables.published import Column, Row, Table, load_table, table_names, with_split
from eval.tables.write import comma_separated, markdown
from llava import answer_log
from llava.cli_errors import run
from llava.errors import ConfigError, UserError

GOLDEN = CHECKOUT.parent / "shared" / "golden" / "ckpt_a"
CONFIG = str(CHECKOUT / "configs" / "tiny_videomme.yaml")
COLUMN = Column("VideoMME %", "videomme")
ROWS = (
    Row("none", 1.0, (60.0,)),
    Row("scissor", 0.5, (50.0,)),
    Row("uniform", 0.5, (59.0,)),
    Row("fancy", 0.5, (58.0,)),
    Row("scissor", 0.2, (57.0,), base_model="another"),
    Row("random", 0.2, (30.0,), options={"no_such_key": 1}),
)
TABLE = Table("0", "A test", "nowhere", "configs/tiny_videomme.yaml", (COLUMN,), ROWS)


@pytest.fixture(autouse=True)
def _frozen_source(monkeypatch):
    """Results do not go out of date when the source changes during these tests."""
    monkeypatch.setattr(answer_log, "source_digest", lambda _: "frozen")


def sample(number, score, video=None, task="videomme", **more):
    base = {"task": task, "doc_id": number, "question": "What?", "score": score, "verdict": None, "group": {}}
    return {**base, "visuals": [f"{number if video is None else video}.mp4"], **more}


def put(experiment, scores):
    """A finished result whose questions have these scores."""
    (compression,) = experiment.compressions
    folder = setting_folder(experiment, compression)
    folder.mkdir(parents=True)
    standin = standin_home(experiment.evaluation).resolve()
    result = {"fingerprint": result_fingerprint(experiment, compression, standin), "submission": None}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample(i, s)) + "\n" for i, s in enumerate(scores)))
    return folder


@pytest.fixture
def grid(tmp_path):
    return Grid(TABLE, None, [f"evaluation.output_dir={tmp_path / 'results'}", f"evaluation.data_dir={tmp_path}"])


@pytest.fixture
def measured(grid):
    """60 % without compression; the same answers at scissor's 50 %, others at uniform's."""
    full = [1.0] * 60 + [0.0] * 40
    settings = dict(zip(("none", "scissor", "uniform"), grid.runs()["videomme"], strict=True))
    for variant, scores in zip(settings.values(), (full, full, [0.0] * 30 + full[30:]), strict=True):
        put(Grid.load(grid.config, "videomme", grid.overrides, variant), scores)
    return grid


def test_the_interval_of_independent_questions_is_that_of_the_normal_approximation():
    scores = [1.0] * 300 + [0.0] * 700
    found = estimate(COLUMN, [sample(i, score) for i, score in enumerate(scores)])
    half = 196 * (0.3 * 0.7 / 1000) ** 0.5
    assert found.value == pytest.approx(30)
    assert found.interval == pytest.approx((30 - half, 30 + half), abs=0.35)


def test_questions_on_one_video_are_drawn_together():
    """Ten questions with one answer say no more than one question."""
    alone = estimate(COLUMN, [sample(i, float(i % 2)) for i in range(40)])
    together = estimate(COLUMN, [sample(i, float(i // 10 % 2), video=i // 10) for i in range(400)])
    assert np.ptp(together.interval) == pytest.approx(np.ptp(alone.interval), rel=0.1)


def test_a_mean_over_groups_weighs_them_equally():
    samples = [sample(i, 1.0, group={"task_type": "many"}) for i in range(9)]
    samples.append(sample(9, 0.0, group={"task_type": "few"}))
    assert estimate(Column("x", "mlvu_dev", mean_over="task_type"), samples).value == 50
    assert estimate(Column("x", "mlvu_dev"), samples).value == 90
    tasks = [sample(i, float(i == 0), task=name) for i, name in enumerate("abb")]
    assert estimate(Column("x", "mvbench", mean_over="task"), tasks).value == 50
    assert estimate(Column("x", "mvbench", task="b"), tasks).value == 0


def test_scores_of_a_judge():
    samples = [sample(0, None, verdict={"s_a": 4, "s_b": 1}), sample(1, None, verdict={"s_a": 2})]
    assert estimate(Column("x", "videochatgpt", of="s_a"), samples).value == 3
    assert estimate(Column("x", "videochatgpt", of="s_", mean_over="metric"), samples).value == 2
    assert estimate(Column("x", "egoschema"), samples) is None


def test_what_is_measured_is_compared_with_what_is_published(measured):
    none, same, worse, *_ = [cells[0] for cells in measured.cells({})]
    assert [cell.state for cell in (none, same, worse)] == [MEASURED] * 3
    assert (none.ours.value, none.difference, none.outside_noise) == (60, 0, False)
    # Equal answers: no change, with no doubt about it, while 10 points are published.
    assert same.change.interval == (0, 0)
    assert (same.difference, same.outside_noise) == (10, True)
    assert worse.change.value == pytest.approx(-30)
    assert worse.change.interval[0] < -30 < worse.change.interval[1] < -1
    assert worse.difference == pytest.approx(-29)
    assert worse.outside_noise


def test_cells_without_a_figure_say_why(measured):
    states = [cells[0].state for cells in measured.cells({})]
    assert states == [MEASURED, MEASURED, MEASURED, NO_METHOD, OTHER_MODEL, FAILED]
    text = markdown(measured, measured.cells({}))
    assert "[1] no such method: there is no method 'fancy' here." in text
    assert "unknown key 'no_such_key'" in text


def test_failures_and_results_of_other_settings(grid):
    assert {cells[0].state for cells in grid.cells({})[:3]} == {NOT_RUN}
    failures = {(grid.config, "videomme", "r50"): "It broke."}
    _, scissor, uniform, *_ = [cells[0] for cells in grid.cells(failures)]
    assert (scissor.state, scissor.reason, uniform.state) == (FAILED, "It broke.", NOT_RUN)
    folder = put(Grid.load(grid.config, "videomme", grid.overrides, grid.runs()["videomme"][0]), [1.0])
    (folder / "result.json").write_text('{"fingerprint": "older"}')
    assert grid.cells({})[0][0].state == STALE


def test_other_questions_are_not_compared(measured):
    path = setting_folder(measured.base, None).parent / "r50"
    lines = (path / "samples.jsonl").read_text().splitlines()
    (path / "samples.jsonl").write_text("\n".join(lines[:50]) + "\n")
    cell = measured.cells({})[1][0]
    assert (cell.state, cell.ours) == (FAILED, None)
    assert "other questions" in cell.reason


def test_percent_of_the_uncompressed_run(measured):
    relative = Table("0", "A test", "nowhere", TABLE.config, (COLUMN,), ROWS[:3], relative=True)
    none, same, worse = [cells[0] for cells in Grid(relative, None, measured.overrides).cells({})]
    assert [cell.ours.value for cell in (none, same, worse)] == [100, 100, 50]
    assert same.ours.interval == (100, 100)


def test_there_is_no_percentage_of_nothing(grid):
    relative = Table("0", "A test", "nowhere", TABLE.config, (COLUMN,), ROWS[:1], relative=True)
    put(Grid.load(grid.config, "videomme", grid.overrides, grid.runs()["videomme"][0]), [0.0] * 5)
    (cell,) = Grid(relative, None, grid.overrides).cells({})[0]
    assert (cell.state, cell.ours) == (FAILED, None)
    assert "nothing right" in cell.reason


def test_figures_of_other_models_stand_in_tables_of_their_own(measured, tmp_path):
    """Both those that are published for another model and, with another model of ours, all that are published."""
    ours, _, theirs = markdown(measured, measured.cells({})).partition("## Published, other base models")
    assert "published 57" not in ours
    assert "57" in theirs
    other = Grid(TABLE, CONFIG, [*measured.overrides, "video.num_frames=4"])
    assert not other.comparable
    assert all(cells[0].published is None and cells[0].difference is None for cells in other.cells({}))
    ours, _, theirs = markdown(other, other.cells({})).partition("## Published, base model of")
    assert "59" not in ours
    assert "59" in theirs


def test_csv_has_every_cell(measured):
    lines = list(csv.DictReader(comma_separated(measured, measured.cells({})).splitlines()))
    assert [line["method"] for line in lines] == [row.method for row in ROWS]
    assert (lines[2]["ours"], lines[2]["published"], lines[2]["change"]) == ("30.0", "59.0", "-30.0")
    assert lines[4]["base_model"] == "another"


def test_another_split_is_not_set_beside_what_is_published():
    table = with_split(load_table("2"), "mlvu_test")
    assert [column.benchmark for column in table.columns][1] == "mlvu_test"
    assert {row.values[1] for row in table.rows} == {row.average for row in table.rows} == {None}
    assert table.rows[0].values[0] == 58.08
    assert with_split(load_table("1"), "mlvu_test") == load_table("1")
    with pytest.raises(ConfigError, match=r"--split mlvu_tst: there is no such split; did you mean 'mlvu_test'"):
        with_split(load_table("2"), "mlvu_tst")


def test_what_the_papers_cells_need(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(cells_module, "try_to_load_from_cache", lambda *_: None)
    states = {cells[0].state for cells in Grid(load_table("1"), None, []).cells({}) if cells[0].row.method == "scissor"}
    assert states == {NEEDS_WEIGHTS}
    tiny = Grid(load_table("1"), CONFIG, [f"evaluation.output_dir={tmp_path}"]).cells({})
    states = {cell.column.benchmark: cell.state for cell in tiny[0]}
    assert states == {"activitynetqa": NEEDS_JUDGE, "videochatgpt": NEEDS_JUDGE, "nextqa": NOT_RUN}


def test_one_setting_that_fails_leaves_the_others(monkeypatch):
    asked = []

    def fake(job):
        asked.append([variant[-1] for variant in job["variants"]])
        if any("l2norm" in variant[-1] for variant in job["variants"]):
            raise StoppedError("l2norm is broken.", "l2norm-r20")

    monkeypatch.setattr(command, "run_experiment", fake)
    failures = command.Failures()
    variants = [["compression.retention_ratio=0.2", f"compression.method={name}"] for name in ("l2norm", "uniform")]
    failures.run(CONFIG, "videomme", variants, [])
    assert failures == {(CONFIG, "videomme", "l2norm-r20"): "l2norm is broken."}
    assert asked[-1] == ["compression.method=uniform"]

    def no_data(job):
        raise UserError("There are no data.")

    monkeypatch.setattr(command, "run_experiment", no_data)
    failures.run(CONFIG, "mvbench", variants, [])
    assert failures[CONFIG, "mvbench", ""] == "There are no data."


def test_a_wrong_argument_is_one_line(capsys):
    for arguments, message in (
        (["--table", "8"], "error: --table 8: there is no such table"),
        (["--table", "1", "--config", "missing.yaml"], "error: Cannot read the configuration file missing.yaml"),
        (["configs/onevision_7b.yaml"], "is no section.key=value; a table is named by --table"),
    ):
        assert run(lambda arguments=arguments: command.main(arguments)) == 2
        assert message in capsys.readouterr().err


def test_a_table_that_contradicts_itself_is_refused():
    with pytest.raises(ConfigError, match="has 2 values"):
        Table("0", "", "", "", (COLUMN,), (Row("none", 1.0, (1.0, 2.0)),))
    with pytest.raises(ConfigError, match="no column 'VideoMM %'; did you mean 'VideoMME %'"):
        Table("0", "", "", "", (COLUMN,), average=("VideoMM %",))


def test_a_mean_of_estimates_is_paired():
    draws = np.arange(DRAWS, dtype=float)
    mean = Estimate.mean([Estimate(1.0, draws), Estimate(3.0, -draws)])
    assert (mean.value, mean.interval) == (2.0, (0.0, 0.0))


@pytest.mark.slow
@pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs the recorded checkpoint ../shared/golden/ckpt_a")
def test_a_grid_end_to_end(tmp_path, capsys, monkeypatch):
    """Table 4b on random weights: three benchmarks of which one wants a judge; then again, without running anything."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "example.yaml"
    config.write_text(
        f"""\
name: example
model: {{path: {GOLDEN}, device: cpu}}
video: {{num_frames: 2}}
evaluation: {{data: standin, videos: 20, limit: 1, max_new_tokens: 2, threads: 1}}
"""
    )
    assert command.main(["--table", "4b", "--config", str(config)]) == 0
    output = capsys.readouterr()
    assert "OPENAI_API_KEY" in output.err
    lines = list(csv.DictReader((tmp_path / "results/tables/example/4b.csv").read_text().splitlines()))
    states = {line["benchmark"]: line["state"] for line in lines}
    assert states == {"mvbench": MEASURED, "videomme": MEASURED, "activitynetqa": NEEDS_JUDGE}
    for line in lines:
        if line["state"] == MEASURED:
            result = json.loads((tmp_path / line["result"]).read_text())
            figure = result["figure"] or {"value": result["summary"]["accuracy"]["percent"]}
            assert float(line["ours"]) == pytest.approx(figure["value"], abs=1e-3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eval.run.subprocess.Popen", None)
        assert command.main(["--table", "4b", "--config", str(config)]) == 0
    assert "finished before" in capsys.readouterr().out


def test_all_tables_are_written_without_running_anything(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs the extra `plot`")
    assert command.main(["--only-write", f"evaluation.output_dir={tmp_path}", f"evaluation.data_dir={tmp_path}"]) == 0
    written = {path.stem: path for path in tmp_path.glob("tables/*/*.csv")}
    assert set(written) == set(table_names())
    for name, path in written.items():
        lines = list(csv.DictReader(path.read_text().splitlines()))
        table = load_table(name)
        columns = len(table.columns) + bool(table.average or table.average_of_tables)
        assert len(lines) == columns * len(table.rows)
        assert all(line["state"] in STATES for line in lines)
        assert all(line["reason"] for line in lines if line["state"] in (NO_METHOD, OTHER_MODEL, NEEDS_WEIGHTS))
        assert path.with_suffix(".md").read_text().startswith("# ")
    assert written["figure4"].with_suffix(".png").stat().st_size > 0
    assert capsys.readouterr().out.count("\n") > len(written)


def test_plots(measured, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra `plot`")
    paths = write_plot(measured, measured.cells({}), tmp_path)
    assert [path.suffix for path in paths] == [".png", ".svg"]
    assert "published" in paths[1].read_text()
    assert write_plot(Grid(Table("0", "", "", TABLE.config, (COLUMN,)), None), [], tmp_path) == []
