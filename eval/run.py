"""Run an experiment: `python -m eval.run CONFIG [section.key=value ...]`.

Prepares the data, has `eval.worker` evaluate every setting that has no finished result (in one process, or in one per
GPU through `accelerate launch`), shows its progress, and ends with one table. Everything that lmms-eval and its
libraries print goes to a log file.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from eval.benchmarks import find_benchmark
from eval.job import experiment_of
from eval.judge import VERDICTS, Judge, serve
from eval.report import table
from eval.results import (
    answer_fingerprint,
    append_event,
    benchmark_folder,
    finished_result,
    prepare_folder,
    result_fingerprint,
    setting_folder,
)
from eval.standin import standin_home, write_standin
from llava.cli_errors import run
from llava.config import Experiment, setting_name
from llava.errors import DeviceError, UserError

CHECKOUT = Path(__file__).resolve().parents[1]


class StoppedError(UserError):
    """An evaluation that had begun came to an end.

    Attributes:
        setting: the one that was being evaluated, None where it was not yet come to that.
    """

    def __init__(self, message: str, setting: str | None) -> None:
        super().__init__(message)
        self.setting = setting


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="eval.run", description=__doc__.partition("\n")[0])
    parser.add_argument("config", help="an experiment, for example configs/tiny_videomme.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the file's")
    arguments = parser.parse_args(argv)
    job = {"config": arguments.config, "overrides": arguments.overrides}
    experiment = experiment_of(job)
    try:
        results = run_experiment(job)
    except KeyboardInterrupt:
        print("\nInterrupted. Finished answers are kept: run the same command again to go on.", file=sys.stderr)
        return 130
    evaluation = experiment.evaluation
    print(f"\n{experiment.name} on {evaluation.benchmark}, {results[0][1]['summary']['samples']} questions\n")
    print(table(results))
    return 0


def run_experiment(job: Mapping[str, Any]) -> list[tuple[Path, dict[str, Any]]]:
    """Evaluate every setting of a job (see `eval.job`) that has no finished result.

    Returns:
        Each setting's result file and its content.

    Raises:
        UserError: a user's mistake; `StoppedError` where it is one that only a running evaluation shows.
        KeyboardInterrupt: interrupted, by Ctrl-C or SIGTERM; finished answers are kept.
    """
    experiment = experiment_of(job)
    evaluation = experiment.evaluation
    processes = number_of_processes(experiment)
    standin = standin_home(evaluation).resolve() if evaluation.data == "standin" else None
    fingerprints = {c: result_fingerprint(experiment, c, standin) for c in experiment.compressions}
    pending: dict[str, dict[str, str]] = {}
    for compression, fingerprint in fingerprints.items():
        folder = setting_folder(experiment, compression)
        if evaluation.resume and finished_result(folder, fingerprint):
            print(f"{setting_name(compression)}: finished before, see {folder / 'result.json'}", flush=True)
        else:
            answers = answer_fingerprint(experiment, compression)
            pending[setting_name(compression)] = {"answers": answers, "result": fingerprint}
    if pending:
        judge = prepare_judge(experiment)
        for compression in fingerprints:
            if setting_name(compression) in pending:
                prepare_folder(setting_folder(experiment, compression), evaluation.resume)
        if standin:
            write_standin(evaluation)
        evaluate(experiment, {**job, "settings": pending}, standin, processes, judge)
    paths = [setting_folder(experiment, compression) / "result.json" for compression in fingerprints]
    return [(path, json.loads(path.read_text())) for path in paths]


def number_of_processes(experiment: Experiment) -> int:
    """One process per GPU, one on the CPU, or what `evaluation.num_processes` says."""
    wanted, gpus = experiment.evaluation.num_processes, torch.cuda.device_count()
    device = experiment.model.device
    if device.startswith("cuda") and gpus == 0:
        raise DeviceError(f"model.device is {device!r}, but there is no CUDA device here; use model.device=cpu.")
    on_gpus = gpus > 0 and device in ("auto", "cuda")
    if wanted == "auto":
        return gpus if on_gpus else 1
    if on_gpus and wanted > gpus:
        raise DeviceError(f"evaluation.num_processes is {wanted}, but there are {gpus} CUDA devices.")
    return wanted


def prepare_judge(experiment: Experiment) -> Judge | None:
    """The judge of a benchmark that has one, which has answered a first question.

    Raises:
        UserError: there is no key, or the judge does not answer.
    """
    evaluation = experiment.evaluation
    benchmark = find_benchmark(evaluation.benchmark)
    if not benchmark.verdict:
        return None
    folder = benchmark_folder(experiment) / "verdicts"
    judge = Judge(evaluation.judge, benchmark, folder, evaluation.resume)
    judge.check()
    return judge


def evaluate(
    experiment: Experiment, job: dict[str, Any], standin: Path | None, processes: int, judge: Judge | None = None
) -> None:
    """Run `eval.worker` on the job, showing its progress.

    Raises:
        StoppedError: the worker met an error, or died; the message says where its log is.
    """
    folder = benchmark_folder(experiment)
    log, events, job_file = folder / "lmms_eval.log", folder / ".events.jsonl", folder / ".job.json"
    events.write_text("")
    job_file.write_text(json.dumps(job | {"events": str(events)}))
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        command += ["--main_process_port", "0", "--module"]
    command += ["eval.worker", str(job_file)]
    tqdm.write(f"Evaluating {', '.join(job['settings'])}; the log is {log}", file=sys.stderr)
    environment = worker_environment(experiment, standin)
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("w"))
        if judge:
            environment |= stack.enter_context(serve(judge, lambda event: append_event(events, event)))
        worker = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        stack.enter_context(_stopped_on_exit(worker))
        error, setting = follow(worker, events)
    events.unlink()
    job_file.unlink()
    if error:
        raise StoppedError(error, setting)
    if worker.returncode:
        print(*log.read_text(errors="replace").splitlines()[-15:], sep="\n", file=sys.stderr)
        raise StoppedError(
            f"The evaluation stopped with exit status {worker.returncode}; {log} ends as shown above. Finished answers "
            "are kept: run the same command again to go on.",
            setting,
        )


def worker_environment(experiment: Experiment, standin: Path | None) -> dict[str, str]:
    """Environment variables of the worker: with a stand-in, datasets come from there and from nowhere else."""
    environment = dict(os.environ)
    home = Path(environment.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    environment["HF_HOME"] = str(home)  # some tasks of lmms-eval have no default for it, or a wrong one
    path = [str(CHECKOUT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    environment["TOKENIZERS_PARALLELISM"] = "false"
    if experiment.model.device == "cpu" or not torch.cuda.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"
    if standin:
        environment.pop("HF_DATASETS_CACHE", None)
        environment.pop("LMMS_EVAL_DATASETS_CACHE", None)
        environment.setdefault("HF_HUB_CACHE", str(home / "hub"))  # models are still found where they were
        environment["HF_HOME"] = str(standin)
        environment["HF_HUB_OFFLINE"] = "1"
    return environment


def follow(worker: subprocess.Popen, events: Path) -> tuple[str | None, str | None]:
    """Show the worker's progress until it ends.

    Returns:
        The message of the first error, which ends it, if any; the setting that it had come to.
    """
    error: str | None = None
    setting: str | None = None
    reached: str | None = None
    bar: Any = None
    done: dict[int, int] = {}
    total: dict[int, int] = {}
    for event in _tail(worker, events):
        if "error" in event:
            error = error or event["error"]
            worker.terminate()
            continue
        reached = event["setting"] if event["setting"] != VERDICTS else reached
        if event["setting"] != setting:
            if bar is not None:
                bar.close()
            setting, done, total = event["setting"], {}, {}
            bar = tqdm(desc=setting, unit="", mininterval=0.5 if sys.stderr.isatty() else 10)
        done[event["rank"]], total[event["rank"]] = event["done"], event["total"]
        bar.total = sum(total.values())
        bar.update(sum(done.values()) - bar.n)
    if bar is not None:
        bar.close()
    return error, reached


def _tail(worker: subprocess.Popen, events: Path) -> Iterator[dict[str, Any]]:
    """The events that processes of the worker append to the file, until the worker has ended."""
    with events.open() as file:
        buffer = ""
        while True:
            ended = worker.poll() is not None
            buffer += file.read()
            *lines, buffer = buffer.split("\n")
            yield from map(json.loads, lines)
            if ended:
                return
            time.sleep(0.2)


@contextlib.contextmanager
def _stopped_on_exit(worker: subprocess.Popen) -> Iterator[None]:
    """Leave no worker behind, whether this process is interrupted by Ctrl-C or by SIGTERM."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
        if worker.poll() is None:
            worker.terminate()
            try:
                worker.wait(timeout=10)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()


if __name__ == "__main__":
    sys.exit(run(main))
