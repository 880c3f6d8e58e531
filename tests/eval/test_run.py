"""The experiment runner, end to end: lmms-eval's own task on a small stand-in, with a checkpoint of random weights."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fake_judge import fake_judge

pytest.importorskip("lmms_eval", reason="needs the extra `eval`")

from eval import run, standin
from eval.results import finished_result, prepare_folder
from llava import answer_log
from llava.config import load_experiment
from llava.errors import DeviceError, UserError

CHECKOUT = Path(__file__).parents[2]
CHECKPOINT = CHECKOUT.parent / "shared" / "golden" / "ckpt_a"

pytestmark = pytest.mark.skipif(not CHECKPOINT.is_dir(), reason="needs the recorded checkpoint ../shared/golden/ckpt_a")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiment")
    path = folder / "example.yaml"
    path.write_text(
        f"""\
name: example
model: {{path: {CHECKPOINT}, device: cpu}}
video: {{num_frames: 2}}
evaluation:
  data: standin
  videos: 4
  limit: 13
  max_new_tokens: 2
  threads: 1
  retention_ratios: [1.0, 0.2]
  data_dir: {folder / "data"}
  output_dir: {folder / "results"}
"""
    )
    return path


def read(folder, setting):
    result = json.loads((folder / setting / "result.json").read_text())
    samples = [json.loads(line) for line in (folder / setting / "samples.jsonl").read_text().splitlines()]
    return result, samples


def without_times(samples):
    stats = ("source_tokens", "spatial_tokens", "kept_tokens", "similarity_threshold")
    untimed = [{key: value for key, value in sample.items() if key != "milliseconds"} for sample in samples]
    return [sample | {"videos": [{key: v[key] for key in stats} for v in sample["videos"]]} for sample in untimed]


@pytest.fixture(scope="module", autouse=True)
def _frozen_source():
    """Neither answers nor videos are reused when the source changes: not even if that happens during these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(standin, "_source_digest", lambda: "frozen")
        patch.setattr(answer_log, "source_digest", lambda _: "frozen")
        yield


@pytest.fixture(scope="module")
def interrupted(config):
    """Start a run, interrupt it after the third answer, and return where it writes to."""
    folder = config.parent / "results" / "example" / "videomme"
    ended = threading.Event()

    def interrupt():
        while not ended.wait(0.02):
            if sum(len(path.read_text().splitlines()) for path in folder.glob("r100/answers-*.jsonl")) >= 3:
                os.kill(os.getpid(), signal.SIGINT)
                return

    thread = threading.Thread(target=interrupt)
    thread.start()
    status = run.main([str(config)])
    ended.set()
    thread.join()
    assert status == 130
    assert not list(folder.glob("*/result.json"))
    return folder


@pytest.mark.slow
def test_an_interrupted_run_goes_on_and_two_processes_give_the_same(config, interrupted, capsys):
    (log,) = interrupted.glob("r100/answers-*.jsonl")
    before = log.read_text().splitlines()
    assert run.main([str(config)]) == 0
    table = capsys.readouterr().out
    assert [line.split()[0] for line in table.splitlines() if "result.json" in line] == ["r100", "r20"]
    lines = log.read_text().splitlines()
    assert lines[: len(before)] == before
    assert len(lines) == len({json.loads(line)["key"] for line in lines}) == 13

    other = config.parent / "two"
    assert run.main([str(config), f"evaluation.output_dir={other}", "evaluation.num_processes=2"]) == 0
    for setting, ratio in (("r100", 1.0), ("r20", 0.2)):
        result, samples = read(interrupted, setting)
        result_of_two, samples_of_two = read(other / "example" / "videomme", setting)
        assert without_times(samples) == without_times(samples_of_two)
        assert [sample["doc_id"] for sample in samples] == list(range(13))
        assert result["summary"]["accuracy"] == result_of_two["summary"]["accuracy"]
        assert result["summary"]["retention_ratio"]["mean"] == ratio
        assert (result["environment"]["processes"], result_of_two["environment"]["processes"]) == (1, 2)
        task = result["tasks"]["videomme"]
        assert task["scores"] == {"videomme_perception_score": pytest.approx(result["summary"]["accuracy"]["percent"])}
        assert (task["dataset"], task["split"], task["rows"]) == ("lmms-eval/Video-MME", "test", 16)
        assert {"vision_tower", "compression", "prefill"} <= set(result["summary"]["milliseconds"])
        assert {"torch", "transformers", "lmms-eval"} <= set(result["environment"]["packages"])
        assert result["environment"]["hardware"]["torch_threads"] == 1
        assert result["config"]["video"]["num_frames"] == 2

    # Nothing is left to do: no worker is started, and the table is the same.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.subprocess, "Popen", None)
        assert run.main([str(config)]) == 0
    again = capsys.readouterr().out
    assert again.count("finished before") == 2
    assert table.strip() in again


@pytest.mark.slow
def test_a_judge_serves_all_processes_and_keeps_its_verdicts(config, monkeypatch, capsys):
    """Through the command, the processes and the judge, up to the table."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    overrides = ["evaluation.benchmark=activitynetqa", "evaluation.num_processes=2", "evaluation.limit=3"]
    overrides += ["evaluation.retention_ratios=[0.2]", "evaluation.judge.model=judge"]
    with fake_judge(lambda _: "{'pred': 'yes', 'score': 4}") as (url, requests):
        assert run.main([str(config), *overrides, f"evaluation.judge.base_url={url}"]) == 0
    output = capsys.readouterr().out
    assert "score 0-5" in output
    assert f"r20: 3 verdicts, by fake-1 at {url}." in output
    assert 1 < len(requests) <= 4  # the first is the check; equal answers to equal questions are judged once
    folder = config.parent / "results" / "example" / "activitynetqa"
    result, samples = read(folder, "r20")
    assert (result["environment"]["processes"], len(samples)) == (2, 3)
    assert (result["figure"]["value"], result["summary"]["accuracy"]["percent"]) == (4, 100)
    assert len(list((folder / "verdicts").iterdir())) == 1
    assert not any(b"sk-very-secret" in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def job_that(code, events):
    return subprocess.Popen([sys.executable, "-c", code.format(events=str(events))])


def test_follow_returns_the_first_error_of_the_worker(tmp_path):
    events = tmp_path / "events"
    events.write_text("")
    code = """
with open({events!r}, "a") as file:
    file.write('{{"setting": "r10", "rank": 0, "done": 1, "total": 2}}\\n{{"setting": "r10", "rank": 1, ')
    file.flush()
    file.write('"done": 1, "total": 2}}\\n{{"error": "no such model"}}\\n{{"error": "later"}}\\n')
"""
    assert run.follow(job_that(code, events), events) == ("no such model", "r10")


def test_follow_ends_a_worker_for_which_someone_else_reports_an_error(tmp_path):
    events = tmp_path / "events"
    events.write_text('{"error": "the judge is away"}\n')
    worker = job_that("import time; time.sleep(1000)", events)
    assert run.follow(worker, events) == ("the judge is away", None)
    assert worker.wait(timeout=60)


def test_a_worker_that_dies_is_reported_with_its_log(config, monkeypatch, tmp_path, capsys):
    code = "import sys; print('out of memory'); sys.exit(9)"
    popen = subprocess.Popen
    monkeypatch.setattr(run.subprocess, "Popen", lambda _, **options: popen([sys.executable, "-c", code], **options))
    with pytest.raises(UserError, match=r"exit status 9.*run the same command again"):
        run.main([str(config), f"evaluation.output_dir={tmp_path}"])
    assert "out of memory" in capsys.readouterr().err


def test_a_worker_reports_a_missing_checkpoint(config, tmp_path):
    """In this process: the worker's own main, up to its first mistake."""
    from eval import worker

    job = {
        "config": str(config),
        "overrides": ["model.path=no/such-checkpoint"],
        "settings": {"r100": {"answers": "0" * 64, "result": "1" * 64}},
        "events": str(tmp_path / "events"),
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(worker, "load_tasks", lambda _: {})
        assert worker.main(str(tmp_path / "job.json")) == 2
    (event,) = map(json.loads, (tmp_path / "events").read_text().splitlines())
    assert "no/such-checkpoint" in event["error"]


def test_an_output_folder_that_cannot_be_written_is_a_user_error(config, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match=r"taken.*evaluation\.output_dir"):
        run.main([str(config), f"evaluation.output_dir={tmp_path / 'taken'}"])


def test_a_judged_benchmark_without_a_key_stops_before_anything_is_written(config, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    folders = [f"evaluation.output_dir={tmp_path / 'results'}", f"evaluation.data_dir={tmp_path / 'data'}"]
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        run.main([str(config), "evaluation.benchmark=videochatgpt", *folders])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("benchmark", "words"), [("mmmu_val", "no stand-in.*data=hub.*videomme"), ("mvbench", "videos is 4.*at least 20")]
)
def test_what_has_no_standin_is_a_user_error(config, benchmark, words):
    with pytest.raises(UserError, match=words):
        run.main([str(config), f"evaluation.benchmark={benchmark}"])


def test_an_older_result_is_kept_under_another_name(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps({"fingerprint": "f" * 64}))
    (tmp_path / "samples.jsonl").write_text("old")
    (tmp_path / "answers-1.rank0.jsonl").write_text("answers")
    assert finished_result(tmp_path, "f" * 64)
    assert finished_result(tmp_path, "0" * 64) is None
    prepare_folder(tmp_path, resume=True)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["answers-1.rank0.jsonl", "result.ffffffffffff.json", "samples.ffffffffffff.jsonl"]
    prepare_folder(tmp_path, resume=False)
    assert not list(tmp_path.glob("answers*"))


@pytest.mark.parametrize(
    ("gpus", "overrides", "expected"),
    [
        (0, [], 1),
        (0, ["evaluation.num_processes=2"], 2),
        (4, ["model.device=auto"], 4),
        (4, ["model.device=cuda", "evaluation.num_processes=2"], 2),
        (4, ["model.device=cpu"], 1),
        (4, ["model.device=cuda:1"], 1),
        (0, ["model.device=cuda"], "no CUDA device"),
        (2, ["model.device=cuda", "evaluation.num_processes=3"], "there are 2"),
    ],
)
def test_number_of_processes(config, monkeypatch, gpus, overrides, expected):
    monkeypatch.setattr(run.torch.cuda, "device_count", lambda: gpus)
    experiment = load_experiment(config, overrides)
    if isinstance(expected, int):
        assert run.number_of_processes(experiment) == expected
    else:
        with pytest.raises(DeviceError, match=expected):
            run.number_of_processes(experiment)


def test_with_a_standin_datasets_come_from_there_alone(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", "/models")
    monkeypatch.setenv("HF_DATASETS_CACHE", "/elsewhere")
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    environment = run.worker_environment(load_experiment(config), tmp_path)
    assert environment["HF_HOME"] == str(tmp_path)
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["HF_HUB_CACHE"] == "/models/hub"
    assert "HF_DATASETS_CACHE" not in environment
    untouched = run.worker_environment(load_experiment(config), None)
    assert (untouched["HF_HOME"], untouched["HF_DATASETS_CACHE"]) == ("/models", "/elsewhere")
    monkeypatch.delenv("HF_HOME")
    home = run.worker_environment(load_experiment(config), None)["HF_HOME"]
    assert home == str(Path("~/.cache/huggingface").expanduser())


def test_the_scripts_are_valid_bash():
    for script in (CHECKOUT / "scripts").glob("*.sh"):
        subprocess.run(["bash", "-n", str(script)], check=True)
        first = script.read_text().splitlines()[0]
        assert script.name == "lib.sh" or re.fullmatch(r"#!/usr/bin/env bash", first)
