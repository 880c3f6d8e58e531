"""One process of an evaluation: `python -m eval.worker JOB`, started by `eval.run`, alone or by `accelerate launch`.

JOB is a JSON file: what `eval.job` describes, `settings` to evaluate with their fingerprints, and `events`, the file to
which progress and errors are appended as JSON lines. The data are looked for, the model is loaded once, lmms-eval's own
tasks are run at every setting, and process 0 writes the result files.
"""

import json
import os
import statistics
import sys
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from lmms_eval.evaluator import simple_evaluate

from eval.benchmarks import Benchmark, find_benchmark
from eval.environment import describe_environment
from eval.job import experiment_of
from eval.judge import judge_report
from eval.lmms_tasks import Tasks, check_videos, in_document_order, load_tasks, split_of
from eval.report import summarize
from eval.results import append_event, as_plain, setting_folder, write_result, write_submission
from eval.standin import read_kinds
from llava.answer_log import AnswerLog
from llava.config import Experiment, setting_name
from llava.errors import UserError
from llava.lmms_eval_model import LlavaScissor, make_accelerator
from llava.token_compression import CompressionConfig

Answers = dict[tuple[str, int], list[dict[str, Any]]]

GROUPS = ("task_type", "duration", "question_type", "category", "type")
"""Columns of a benchmark by which accuracy is also given, where they exist; `kind` comes from the stand-in."""

JUDGED_AT_ONCE = 4
"""How many answers one process has judged at the same time."""


def main(job_file: str) -> int:
    job = json.loads(Path(job_file).read_text())
    events = Path(job["events"])
    try:
        evaluate(experiment_of(job), job["settings"], events)
        # A process that ends while another one still listens to it may be aborted.
        PartialState().wait_for_everyone()
        PartialState().destroy_process_group()
    except UserError as error:
        append_event(events, {"error": str(error)})
        return 2
    return 0


def evaluate(experiment: Experiment, settings: dict[str, dict[str, str]], events: Path) -> None:
    """Run the benchmark at each of `settings`, given with the fingerprints of its answers and of its result."""
    evaluation = experiment.evaluation
    if evaluation.threads is not None:
        torch.set_num_threads(evaluation.threads)
    benchmark = find_benchmark(evaluation.benchmark)
    make_accelerator()  # before a task makes one that does not wait as long
    tasks = load_tasks(benchmark)
    if benchmark.dataset:
        check_videos(benchmark, tasks, evaluation.limit)
    lm = LlavaScissor(experiment.model, experiment.video)
    in_document_order(tasks, lm.world_size)
    if benchmark.submission:
        for task in tasks.values():
            task.aggregation().clear()  # it would send the answers to the benchmark's server
    for compression in experiment.compressions:
        setting = setting_name(compression)
        if setting not in settings:
            continue
        folder, fingerprints = setting_folder(experiment, compression), settings[setting]

        def report(done: int, total: int, setting: str = setting) -> None:
            append_event(events, {"setting": setting, "rank": lm.rank, "done": done, "total": total})

        report(0, 0)  # so that an error is known to be this setting's
        lm.start(compression, AnswerLog(folder, fingerprints["answers"], lm.rank), report)
        output = simple_evaluate(
            model=lm,
            tasks=list(tasks.values()),
            batch_size=1,
            limit=evaluation.limit,
            gen_kwargs=f"max_new_tokens={evaluation.max_new_tokens}" if evaluation.max_new_tokens else None,
            bootstrap_iters=0,
            cli_args=Namespace(output_path=str(folder), process_with_media=True),
            # Tasks guess where an answer names no option; in one thread they always guess the same.
            process_docs_parallel=JUDGED_AT_ONCE if benchmark.verdict else 1,
        )
        keys = dict(gather_object(list(lm.keys.items())))
        if lm.rank == 0:
            # The other processes have logged all their answers by now: read them anew.
            log = AnswerLog(folder, fingerprints["answers"])
            answers = {document: [log[key] for key in dict.fromkeys(of)] for document, of in keys.items()}
            result, samples = assemble(experiment, compression, tasks, output, answers, lm)
            if benchmark.submission:
                path = write_submission(folder, chain(*output["samples"].values()))
                result["submission"] = {"path": str(path), "server": benchmark.submission}
            write_result(folder, {"fingerprint": fingerprints["result"], **result}, samples)


def assemble(
    experiment: Experiment,
    compression: CompressionConfig | None,
    tasks: Tasks,
    output: dict[str, Any],
    answers: Answers,
    lm: LlavaScissor,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The result and the samples of one setting, from lmms-eval's output and the logged answers."""
    benchmark = find_benchmark(experiment.evaluation.benchmark)
    home = Path(os.environ["HF_HOME"]) if experiment.evaluation.data == "standin" else None
    samples = list(_samples(benchmark, tasks, output, answers, home))
    if any(sample["score"] is not None and not 0 <= sample["score"] <= 1 for sample in samples):
        samples = [sample | {"score": None} for sample in samples]  # marks, of which there is no accuracy
    scores = {name: _numbers(output["results"][name]) for name in tasks}
    result = {
        "name": experiment.name,
        "benchmark": benchmark.name,
        "setting": setting_name(compression),
        "tasks": {name: {**_describe(task), "scores": scores[name]} for name, task in tasks.items()},
        "figure": _figure(benchmark, scores) if benchmark.figure else None,
        "submission": None,
        "judge": judge_report(experiment.evaluation.judge) if benchmark.verdict else None,
        "summary": summarize(samples),
        "environment": describe_environment()
        | {
            "processes": lm.world_size,
            "device": str(lm.device),
            "dtype": str(lm.qa.model.dtype).removeprefix("torch."),
            "attn_implementation": lm.qa.model.config._attn_implementation,
            "data": home.name if home else "hub",
        },
        "config": as_plain(experiment, lm.compression),
    }
    return result, samples


def _samples(
    benchmark: Benchmark, tasks: Tasks, output: dict[str, Any], answers: Answers, home: Path | None
) -> Iterator[dict[str, Any]]:
    """Every document of the benchmark with its score and what its requests, one or one per choice, took."""
    kinds = read_kinds(home) if home else {}
    for name, task in tasks.items():
        kinds_here = kinds.get(task.config.dataset_name) or next(iter(kinds.values()), None)
        for sample in sorted(output["samples"][name], key=lambda sample: sample["doc_id"]):
            document = sample["doc"]
            group = {column: document[column] for column in GROUPS if isinstance(document.get(column), str)}
            if kinds_here:
                group["kind"] = kinds_here[sample["doc_id"]]
            if len(tasks) > 1:
                group["task"] = name
            score = benchmark.score(sample, task)
            yield {
                "task": name,
                "doc_id": sample["doc_id"],
                "target": sample["target"],
                "score": None if score is None else float(score),
                "verdict": _verdict(sample) if benchmark.verdict else None,
                "group": group,
                **_records(answers[name, sample["doc_id"]]),
            }


def _records(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the logged answers to one document say together."""
    milliseconds: dict[str, float] = defaultdict(float)
    for record in records:
        for stage, value in record["milliseconds"].items():
            milliseconds[stage] += value
    return {
        "question": records[0]["question"],
        "responses": [record["response"] for record in records],
        "visuals": records[0]["visuals"],
        "videos": records[0]["videos"],
        "milliseconds": milliseconds,
    }


def _verdict(sample: dict[str, Any]) -> dict[str, float]:
    """The judge's scores of one answer, by metric."""
    return {name: value["score"] for name, value in sample.items() if isinstance(value, dict) and "score" in value}


def _describe(task: Any) -> dict[str, Any]:
    """The data of a task."""
    split = split_of(task)
    dataset = task.dataset[split]
    return {
        "dataset": task.config.dataset_path,
        "configuration": task.config.dataset_name,
        "split": split,
        "rows": len(dataset),
        "fingerprint": dataset._fingerprint,
    }


def _numbers(results: dict[str, Any]) -> dict[str, float]:
    """lmms-eval's scores of one task, by metric."""
    return {
        metric.partition(",")[0]: value
        for metric, value in results.items()
        if isinstance(value, float | int) and metric != "samples" and "stderr" not in metric
    }


def _figure(benchmark: Benchmark, scores: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The paper's figure and the parts that it is the mean of."""
    figure = benchmark.figure
    assert figure is not None
    parts = {
        metric.removeprefix(figure.metric) or task.removeprefix(f"{benchmark.task}_"): figure.scale * value
        for task, metrics in scores.items()
        for metric, value in metrics.items()
        if metric.startswith(figure.metric)
    }
    return {"label": figure.label, "value": statistics.fmean(parts.values()), "parts": parts}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
