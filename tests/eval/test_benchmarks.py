"""Every benchmark through lmms-eval's own tasks, in one process: small stand-ins, the bundled model, a fake judge."""

import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from fake_judge import fake_judge
from standin_videos import make_videos

from eval.benchmarks import BENCHMARKS, find_benchmark
from eval.judge import Judge, serve
from eval.run import worker_environment
from eval.standin import read_kinds, write_home
from eval.standin_schemas import SCHEMAS
from eval.tiny_wordings import FREE_WORDINGS, WORDINGS
from llava.config import JudgeConfig, load_experiment

CHECKOUT = Path(__file__).parents[2]
NAMES = [benchmark.name for benchmark in BENCHMARKS]
VIDEOS, LIMIT = {"mvbench": 20}, {"mvbench": 1, "mlvu_dev": 9, "mlvu_test": 15}
KEY = "sk-very-secret"
MARKS = {
    "factual accuracy": 5,
    "detail orientation": 4,
    "contextual understanding": 3,
    "temporal understanding": 2,
    "consistency of generative outputs": 1,
}
"""What the judge always gives in each part of Video-ChatGPT, by words of its instructions."""

RUN = """
import json, os, sys
from eval import worker

load = worker.load_tasks

def load_and_tell(benchmark):
    tasks = load(benchmark)
    told = {
        name: {
            "dataset": task.config.dataset_path,
            "revision": (task.config.dataset_kwargs or {}).get("revision"),
            "split": task.config.test_split,
        }
        for name, task in tasks.items()
    }
    print("TASKS", json.dumps([benchmark.name, told]))
    return tasks

worker.load_tasks = load_and_tell
for job, environment in json.load(open(sys.argv[1])):
    os.environ.update(environment)
    assert worker.main(job) == 0, job
"""


def judge_says(request):
    """Short answers are right; a mark by the part of Video-ChatGPT."""
    text = " ".join(message["content"] for message in request["messages"])
    if "'pred'" in text:
        right = is_right(text.partition("Predicted Answer: ")[2].partition("\n")[0])
        return f"```python\n{{'pred': '{'yes' if right else 'no'}', 'score': {5 if right else 2}}}\n```"
    return json.dumps({"score": next(mark for words, mark in MARKS.items() if words in text)})


def is_right(answer):
    return len(answer) % 2 == 0


def write_standins(folder):
    """All stand-ins in one HF_HOME, which a process reads only once."""
    home, kinds = folder / "home", {}
    for name in NAMES:
        videos = make_videos(VIDEOS.get(name, 5), min(3, len(SCHEMAS[name].parts(0))))
        write_home(folder / name, videos, "0123456789abcdef" * 4, name)
        shutil.copytree(folder / name, home, dirs_exist_ok=True)
        kinds |= read_kinds(folder / name)
    (home / "kinds.json").write_text(json.dumps(kinds))
    return home


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """All benchmarks evaluated; gives the folder, what the tasks told of themselves, and the judge's requests."""
    pytest.importorskip("lmms_eval", reason="needs the extra `eval`")
    folder = tmp_path_factory.mktemp("benchmarks")
    config = folder / "example.yaml"
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.MonkeyPatch.context()).setenv("OPENAI_API_KEY", KEY)
        url, requests = stack.enter_context(fake_judge(judge_says))
        config.write_text(
            "name: example\nmodel: {device: cpu}\nvideo: {num_frames: 2}\n"
            f"evaluation: {{data: standin, retention_ratios: [0.2], output_dir: {folder / 'results'}}}\n"
        )
        home = write_standins(folder)
        jobs = []
        for name in NAMES:
            overrides = [f"evaluation.benchmark={name}", f"evaluation.limit={LIMIT.get(name, 2)}"]
            overrides += [f"evaluation.judge.base_url={url}", "evaluation.judge.model=judge"]
            experiment = load_experiment(config, overrides)
            environment = worker_environment(experiment, home)
            if (benchmark := find_benchmark(name)).verdict:
                judge = Judge(JudgeConfig(url, "judge"), benchmark, folder / "verdicts")
                environment |= stack.enter_context(serve(judge, lambda _: None))
            job = {"config": str(config), "overrides": overrides, "events": str(folder / "events")}
            job["settings"] = {"r20": {"answers": "0" * 64, "result": "1" * 64}}
            (folder / f"{name}.json").write_text(json.dumps(job))
            changed = {key: value for key, value in environment.items() if os.environ.get(key) != value}
            jobs.append([str(folder / f"{name}.json"), changed])
        (folder / "jobs.json").write_text(json.dumps(jobs))
        command = [sys.executable, "-c", RUN, str(folder / "jobs.json")]
        environment = worker_environment(load_experiment(config), home) | {"OPENAI_API_KEY": "none"}
        process = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
        events = (folder / "events").read_text() if (folder / "events").exists() else ""
        assert process.returncode == 0, process.stderr[-3000:] + events[-1000:]
        told = [line.removeprefix("TASKS ") for line in process.stdout.splitlines() if line.startswith("TASKS ")]
        yield folder, dict(map(json.loads, told)), requests


def read(finished, name):
    folder = finished[0] / "results" / "example" / name / "r20"
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return json.loads((folder / "result.json").read_text()), samples


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_tiny_models_are_taught_the_wording(finished, name):
    questions = next(make_videos(1)).questions
    taught = {wording.prompt(question) for wording in WORDINGS.values() for question in questions}
    taught |= {question.text + after for question in questions for after in FREE_WORDINGS}
    assert {sample["question"] for sample in read(finished, name)[1]} <= taught


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_result_names_the_task_the_split_and_the_data_that_lmms_eval_used(finished, name):
    result, samples = read(finished, name)
    benchmark = find_benchmark(name)
    for task, told in finished[1][name].items():
        assert told == {"dataset": benchmark.dataset, "revision": benchmark.revision, "split": benchmark.split}
        assert {key: result["tasks"][task][key] for key in ("dataset", "split")} == {
            "dataset": benchmark.dataset,
            "split": benchmark.split,
        }
    assert list(result["tasks"]) == sorted(finished[1][name])
    assert result["summary"]["samples"] == len(samples) > 0
    assert result["summary"]["retention_ratio"]["mean"] == pytest.approx(0.2)
    assert result["config"]["evaluation"]["benchmark"] == name
    for sample in samples:
        assert sample["visuals"][0].startswith(str(finished[0] / "home" / benchmark.unpacked))
        assert sample["group"]["kind"] in ("color", "count")


@pytest.mark.slow
def test_mvbench_gives_twenty_tasks_by_name_and_their_mean(finished):
    result, samples = read(finished, "mvbench")
    parts = result["figure"]["parts"]
    assert len(result["tasks"]) == len(parts) == len(samples) == 20
    assert {sample["task"] for sample in samples} == set(result["tasks"])
    for name, task in result["tasks"].items():
        assert parts[name.removeprefix("mvbench_")] == task["scores"]["mvbench_accuracy"]
    assert result["figure"]["value"] == pytest.approx(statistics.fmean(parts.values()))
    assert result["summary"]["accuracy"]["percent"] == pytest.approx(result["figure"]["value"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "task", "metric"),
    [
        ("videomme", "videomme", "videomme_perception_score"),
        ("nextqa", "nextqa_mc_test", "exact_match"),
        ("egoschema_subset", "egoschema_subset", "score"),
    ],
)
def test_accuracy_over_questions_is_lmms_evals_score(finished, name, task, metric):
    result, _ = read(finished, name)
    scale = 1 if name == "videomme" else 100
    assert result["figure"] is None
    assert result["summary"]["accuracy"]["percent"] == pytest.approx(scale * result["tasks"][task]["scores"][metric])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "group"), [("mlvu_dev", "task_type"), ("mlvu_test", "task_type"), ("videommmu", "task")]
)
def test_the_figure_is_the_mean_over_categories_and_tracks(finished, name, group):
    result, _ = read(finished, name)
    by_group = [accuracy["percent"] for accuracy in result["summary"]["accuracy_by"][group].values()]
    assert len(by_group) == {"mlvu_dev": 7, "mlvu_test": 9, "videommmu": 3}[name]
    assert result["figure"]["value"] == pytest.approx(statistics.fmean(by_group))


@pytest.mark.slow
def test_egoschema_hands_in_answers_instead_of_a_score(finished):
    result, samples = read(finished, "egoschema")
    assert result["figure"] is None
    assert result["summary"]["accuracy"] is None
    submission = json.loads(Path(result["submission"]["path"]).read_text())
    assert list(submission) == ["procedural-001", "procedural-002"]
    for sample, answer in zip(samples, submission.values(), strict=True):
        letter = sample["responses"][0].strip()
        assert letter not in tuple("ABCDE") or letter == "ABCDE"[answer]
    assert Path(result["submission"]["path"]).parent.name == "r20"
    assert read(finished, "egoschema_subset")[0]["submission"] is None


@pytest.mark.slow
def test_activitynetqa_is_scored_as_the_judge_says(finished):
    result, samples = read(finished, "activitynetqa")
    right = [is_right(sample["responses"][0]) for sample in samples]
    assert result["summary"]["accuracy"]["percent"] == pytest.approx(100 * statistics.fmean(right))
    assert result["tasks"]["activitynetqa"]["scores"]["gpt_eval_accuracy"] == pytest.approx(
        100 * statistics.fmean(right)
    )
    assert result["figure"]["value"] == pytest.approx(statistics.fmean(5 if r else 2 for r in right))
    assert [sample["verdict"]["gpt_eval_score"] for sample in samples] == [5 if r else 2 for r in right]
    assert result["judge"]["models"] == ["fake-1"]
    assert (result["judge"]["verdicts"], result["judge"]["unusable"]) == (2, 0)


@pytest.mark.slow
def test_videochatgpt_is_the_mean_of_its_five_marks(finished):
    result, samples = read(finished, "videochatgpt")
    parts = {"correctness": 5, "detailed_orientation": 4, "context": 3, "temporal": 2, "consistency": 1}
    assert result["figure"]["parts"] == parts
    assert result["figure"]["value"] == 3
    assert result["summary"]["accuracy"] is None
    assert {sample["task"] for sample in samples} == {
        f"videochatgpt_{part}" for part in ("gen", "temporal", "consistency")
    }


@pytest.mark.slow
def test_the_key_reaches_the_judge_and_no_file(finished):
    folder, _, requests = finished
    assert requests
    assert {headers["Authorization"] for _, headers, _ in requests} == {f"Bearer {KEY}"}
    texts = [path for path in folder.rglob("*") if path.suffix in (".json", ".jsonl", ".log", ".yaml", "")]
    assert not [path for path in texts if path.is_file() and KEY.encode() in path.read_bytes()]


def test_every_benchmark_has_a_standin_and_a_script():
    assert set(SCHEMAS) == set(NAMES)
    scripts = {path.stem.removeprefix("eval_"): path.read_text() for path in (CHECKOUT / "scripts").glob("eval_*.sh")}
    called = {name: re.search(r"^evaluate (\w+) ", text, re.MULTILINE)[1] for name, text in scripts.items()}
    assert set(called.values()) == set(NAMES) - {"egoschema_subset", "mlvu_test"}
    assert "egoschema_subset" in scripts["egoschema"]
    assert "mlvu_test" in scripts["mlvu"]
    alike = {text.partition("set -euo")[2].replace(f"evaluate {called[name]} ", "") for name, text in scripts.items()}
    assert len(alike) == 1


def test_any_other_task_of_lmms_eval_goes_by_its_own_name():
    assert find_benchmark("mvbench_action_count").task == "mvbench_action_count"
    assert find_benchmark("nextqa").task == "nextqa_mc_test"
