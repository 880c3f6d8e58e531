"""The efficiency harness: its files, its arithmetic, and real runs of small grids. No time is asserted."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from eval.efficiency import __main__ as harness
from eval.efficiency import plots, report
from eval.efficiency.config import Cell, load_harness
from eval.efficiency.inputs import plausible_features
from eval.efficiency.measure import STAGES
from eval.efficiency.models import load_subject, shape_config
from eval.efficiency.timing import percentile, repeat, spread
from eval.efficiency.tree import Tree
from llava.errors import ConfigError, UserError
from llava.model.completeness import meta_model
from llava.model.memory import cache_bytes, parameter_counts
from llava.model.multimodal_encoder.siglip_encoder import SigLipVisionTower

CONFIGS = Path(__file__).parents[2] / "configs" / "efficiency"

SMALL = """\
name: small
model: {MODEL, device: cpu}
grid: {frames: [2], retention_ratios: [1.0, 0.5, 0.1]}
measurement: {runs: 2, warmup: 1, new_tokens: 3, prompt_tokens: 6, clip_width: 64, clip_height: 48, output_dir: OUT}
"""


@pytest.fixture(autouse=True)
def _frozen_source(monkeypatch):
    """Cells are kept although the source may change during these tests."""
    monkeypatch.setattr(harness, "source_digest", lambda _: "frozen")
    monkeypatch.setattr("llava.answer_log.source_digest", lambda _: "frozen")


@pytest.fixture
def write_config(tmp_path):
    def write(model="path: tiny", change=lambda text: text):
        path = tmp_path / "small.yaml"
        path.write_text(change(SMALL.replace("MODEL", model).replace("OUT", str(tmp_path / "results"))))
        return path

    return write


def result_of(config):
    return json.loads((config.parent / "results" / "small" / "result.json").read_text())


def loaded(config, *overrides):
    """The model of a file."""
    harness = load_harness(config, overrides)
    return load_subject(harness.model, harness.measurement).model


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_grid_is_valid_and_has_its_baselines(path):
    loaded = load_harness(path)
    assert loaded.name == path.stem
    cells = loaded.cells()
    assert len(set(cells)) == len(cells)
    for cell in cells:
        assert cells.index(Cell(cell.frames, cell.batch_size)) <= cells.index(cell)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grid.frame=[8]", "did you mean 'frames'"),
        ("grid.frames=[0]", r"command line \(grid.frames=\[0\]\): grid: frames: .*at least 1"),
        ("grid.frames=[]", "frames: give at least one number"),
        ("grid.retention_ratios=[1.5]", r"1\.5 is outside \(0, 1\]"),
        ("grid.methods=[scisor]", "did you mean 'scissor'"),
        ("grid.methods=[fastv]", "prunes inside the language model"),
        ("model.shape=8b", "unknown value '8b'"),
        ("model.device=balanced", "timed on one device"),
        ("measurement.runs=many", "expected a whole number"),
        ("measurement.new_tokens=1", "at least 2"),
        ("measurement.clip_width=63", "even number"),
        ("name.first=3", "name: expected text"),
        ("measurement=3", "name a key of the section"),
        ("measurments.runs=3", "did you mean 'measurement'"),
    ],
)
def test_a_wrong_setting_names_its_place_and_the_way_out(write_config, override, message):
    with pytest.raises(ConfigError, match=message):
        load_harness(write_config(), [override])


def test_a_model_is_either_a_checkpoint_or_a_shape(write_config):
    with pytest.raises(ConfigError, match="exactly one of path"):
        load_harness(write_config("dtype: float32"))
    with pytest.raises(ConfigError, match="exactly one of path"):
        load_harness(write_config("path: tiny, shape: 7b"))
    assert load_harness(write_config(), ["model.shape=7b"]).model.path is None


def test_percentiles_interpolate_between_neighbours():
    values = [40.0, 10.0, 30.0, 20.0]
    assert [percentile(values, percent) for percent in (0, 50, 100)] == [10, 25, 40]
    assert percentile(values, 90) == pytest.approx(37)
    assert percentile([7.0], 90) == 7
    drawn = torch.rand(37, dtype=torch.float64)
    expected = torch.quantile(drawn, torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64)).tolist()
    assert list(spread(drawn.tolist()).values()) == pytest.approx(expected)


def test_a_slow_cell_is_run_less_often_but_three_times(write_config):
    calls = []
    settings = load_harness(write_config(), ["measurement.max_seconds=0.0", "measurement.runs=9"]).measurement
    assert len(repeat(lambda: calls.append("run"), settings, lambda: calls.append("warm"))) == 3
    assert calls == ["run", "warm", "run", "run", "run"]


@pytest.mark.parametrize("model", ["path: tiny", "shape: tiny"])
def test_a_real_run_measures_every_stage_of_every_cell(write_config, capsys, model):
    config = write_config(model)
    assert harness.main([str(config), "grid.batch_sizes=[1, 2]"]) == 0
    result = result_of(config)
    assert [(cell["cell"]["batch_size"], cell["cell"]["retention_ratio"]) for cell in result["cells"]] == [
        (batch, ratio) for batch in (1, 2) for ratio in (1.0, 0.5, 0.1)
    ]
    language_model = shape_config("tiny")
    for cell in result["cells"]:
        batch, kept = cell["cell"]["batch_size"], cell["tokens"]["kept"]
        assert cell["status"] == "measured"
        assert cell["tokens"]["source"] == 50
        assert kept == round(50 * cell["cell"]["retention_ratio"])
        assert cell["tokens"]["prompt"] == kept + 1 + 6  # a newline, and the text
        assert cell["kv_cache_bytes"] == 2 * cache_bytes(language_model, batch * cell["tokens"]["prompt"])  # float32
        rotary = batch * cell["tokens"]["prompt"] * language_model.hidden_size // language_model.num_attention_heads
        surplus = cell["prefill_flops"]["counted"] - cell["prefill_flops"]["with_full_attention"]
        assert surplus in (0, rotary)  # older transformers make the rotary angles by a matrix product
        assert cell["prefill_flops"]["attention_counted"]
        times = cell["milliseconds"]
        assert set(times) == {*STAGES, "other", "time_to_first_token", "per_generated_token", "further_question"}
        further = times.pop("further_question")
        assert (further is None) == (batch > 1)
        if further is not None:
            times = {**times, "further_question": further}
        assert all(0 < entry["p10"] <= entry["median"] <= entry["p90"] for entry in times.values())
        assert cell["peak_memory_bytes"] is None
    assert set(result["inputs"]["2"]) == {"decode_video", "preprocess", "fingerprint"}
    assert result["environment"]["packages"]["torch"]
    text = (config.parent / "results" / "small" / "result.md").read_text()
    assert text in capsys.readouterr().out
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert text.count("2 frames, batch 2, scissor 10 %") == 3  # times, sizes, verdict


def test_finished_cells_are_kept_until_something_changes(write_config, monkeypatch):
    config = write_config()
    measured = []

    def fake(model, cell, *_, **__):
        measured.append(cell.retention_ratio)
        return {"status": "not measured", "reason": f"measurement {len(measured)}"}

    monkeypatch.setattr(harness, "measure_cell", fake)

    def run(*overrides):
        already = len(measured)
        harness.main([str(config), "measurement.runs=1", *overrides])
        return measured[already:]

    assert run() == [1.0, 0.5, 0.1]
    before = result_of(config)["cells"]
    assert run() == []
    assert result_of(config)["cells"] == before
    assert run("grid.retention_ratios=[0.5, 0.2]") == [0.2]
    assert result_of(config)["cells"][:2] == before[:2]
    assert run("measurement.seed=1") == [1.0, 0.5, 0.1]
    assert run("measurement.seed=1", "measurement.resume=false") == [1.0, 0.5, 0.1]
    monkeypatch.setattr(harness, "describe_hardware", lambda: "another machine")
    assert run("measurement.seed=1") == [1.0, 0.5, 0.1]


def test_cells_measured_before_an_interruption_are_on_disk(write_config, monkeypatch):
    config = write_config()
    plain = harness.measure_cell

    def interrupted(model, cell, *rest, **more):
        if cell.retention_ratio == 0.1:
            raise KeyboardInterrupt
        return plain(model, cell, *rest, **more)

    monkeypatch.setattr(harness, "measure_cell", interrupted)
    with pytest.raises(KeyboardInterrupt):
        harness.main([str(config)])
    assert [cell["cell"]["retention_ratio"] for cell in result_of(config)["cells"]] == [1.0, 0.5]


def test_a_cell_without_memory_is_recorded_and_the_others_go_on(write_config, monkeypatch):
    config = write_config()
    plain = Tree.prefill

    def prefill(self, arguments):
        if self.model.token_compression.method == "none":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB.\nMore advice.")
        return plain(self, arguments)

    monkeypatch.setattr(Tree, "prefill", prefill)
    assert harness.main([str(config)]) == 0
    baseline, *others = result_of(config)["cells"]
    assert (baseline["status"], baseline["reason"]) == (
        "out of memory",
        "CUDA out of memory. Tried to allocate 80 GiB.",
    )
    assert [cell["status"] for cell in others] == ["measured"] * 2
    text = (config.parent / "results" / "small" / "result.md").read_text()
    assert "uncompressed: out of memory (CUDA out of memory. Tried to allocate 80 GiB.)" in text
    assert "the uncompressed baseline could not be measured" in text


def test_another_error_is_not_taken_for_missing_memory(write_config, monkeypatch):
    monkeypatch.setattr(Tree, "prefill", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        harness.main([str(write_config())])


def test_a_prompt_beyond_the_context_is_refused_for_a_checkpoint_and_measured_for_a_shape(write_config):
    config = write_config(change=lambda text: text.replace("prompt_tokens: 6", "prompt_tokens: 2030"))
    harness.main([str(config), "grid.retention_ratios=[0.1]"])
    baseline, compressed = result_of(config)["cells"]
    assert baseline["status"] == "not measured"
    assert baseline["reason"] == "A prompt of 2081 positions; the checkpoint reads 2048."
    assert compressed["tokens"]["prompt"] == 2036
    harness.main([str(config), "grid.retention_ratios=[]", "model.shape=tiny"])
    assert [cell["tokens"]["prompt"] for cell in result_of(config)["cells"]] == [2081]


@pytest.mark.parametrize(("shape", "parameters"), [("0.5b", 0.494e9), ("7b", 7.615e9)])
def test_shapes_are_the_published_ones(shape, parameters):
    model = meta_model(shape_config(shape))
    tower = model.get_vision_tower()
    assert isinstance(tower, SigLipVisionTower)
    assert len(tower.vision_tower.vision_model.encoder.layers) == 26
    assert parameter_counts(model)["language model"] == pytest.approx(parameters, rel=1e-3)


def test_an_answer_never_ends_before_its_last_token(write_config):
    model = loaded(write_config())
    end = torch.tensor(model.config.eos_token_id)
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits.index_fill(-1, end, 1e9))
    assert model.generate(torch.tensor([[3, 4]]), max_new_tokens=9, do_sample=False).tolist() == [[int(end)] * 9]


def test_random_weights_are_drawn_in_their_dtype_from_the_seed(write_config):
    config = write_config("shape: tiny")
    first, second, other = (loaded(config, "model.dtype=bfloat16", f"measurement.seed={seed}") for seed in (0, 0, 1))
    assert {parameter.dtype for parameter in first.parameters()} == {torch.bfloat16}
    weights = [model.model.layers[0].mlp.up_proj.weight for model in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_features_of_random_weights_are_replaced_for_each_video_and_given_back(write_config):
    model = loaded(write_config("shape: tiny"))
    pixels = torch.rand(4, 3, 80, 80)
    plain = model.encode_frames(pixels)
    with plausible_features(model, 2, seed=0) as reserved:
        replaced = model.encode_frames(pixels)
    assert reserved == replaced[:2].nbytes
    assert replaced.shape == plain.shape
    assert torch.equal(replaced[:2], replaced[2:])
    assert not torch.equal(replaced, plain)
    assert torch.equal(model.encode_frames(pixels), plain)


def cell(method, ratio, **milliseconds):
    times = dict.fromkeys(report.PARTS, 1.0) | {"per_generated_token": 2.0} | milliseconds
    times["time_to_first_token"] = sum(times[part] for part in report.PARTS)
    entries: dict = {name: {"median": time, "p10": time, "p90": time} for name, time in times.items()}
    entries["further_question"] = None
    setting = {"frames": 8, "batch_size": 1, "method": method, "retention_ratio": ratio}
    return {"cell": setting, "status": "measured", "milliseconds": entries}


def test_the_verdict_weighs_compression_against_the_prefill_that_it_saves():
    cells = [
        cell("none", 1.0, prefill=100.0, compression=0.0),
        cell("scissor", 0.5, prefill=60.0, compression=39.0),
        cell("scissor", 0.1, prefill=60.0, compression=41.0),
        cell("random", 0.1, prefill=120.0, vision_tower=1.5),
    ]
    baseline, pays, costs, disturbed = report.sentences(cells)
    assert "prefill dominates, 97% of 103 ms to the first token" in baseline
    assert "Compression pays: it takes 39.0 ms and saves 40.0 ms of prefill; the first token comes 1.01" in pays
    assert "Compression does not pay: it takes 41.0 ms and saves 40.0 ms" in costs
    assert "does not pay: it takes 1.00 ms and saves no prefill" in disturbed
    assert "vision tower, which compression leaves alone, took 1.50 ms instead of 1.00" in disturbed
    assert "leaves alone" not in pays + costs


def test_without_matplotlib_one_line_says_so_and_the_results_stay(write_config, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    config = write_config()
    assert harness.main([str(config), "grid.retention_ratios=[]"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "matplotlib" in line]
    assert lines == [
        "The plots need matplotlib: pip install 'llava-scissor[plot]', then run the same command again. What was "
        "measured is kept."
    ]
    assert result_of(config)["cells"][0]["status"] == "measured"


def test_plots_are_written_for_each_batch_size(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    cells = [cell("none", 1.0), cell("scissor", 0.5), cell("scissor", 0.1)]
    written = plots.write_plots({"name": "example", "cells": cells}, tmp_path)
    assert [path.name for path in written] == [
        f"{name}-batch1.{suffix}" for name in ("stages", "first_token") for suffix in ("png", "svg")
    ]
    assert all(path.stat().st_size > 1000 for path in written)


def test_a_run_without_a_file_says_which_to_name():
    with pytest.raises(UserError, match="tiny_cpu"):
        harness.main(["measurement.runs=1"])
