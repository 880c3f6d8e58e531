"""The benchmarks of the paper: which task of lmms-eval each one is, on which data, and what figure the paper gives.

`find_benchmark(name)` takes one of these names or any task of lmms-eval. Facts are those of lmms-eval 0.7.3; tests
compare them with the one that is installed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Score = Callable[[Mapping[str, Any], Any], float | None]
"""From a sample as lmms-eval logs it, and its task, to how right it is, 0 to 1; None where that cannot be told."""


@dataclass(frozen=True)
class Figure:
    """A figure of the paper that is not the accuracy over all questions.

    Attributes:
        label: the head of its column.
        metric: what the names of lmms-eval's metrics begin with whose mean, over metrics and tasks, is the figure.
        scale: 100 where lmms-eval gives a share and the paper percent.
    """

    label: str
    metric: str
    scale: float = 1.0


def plain_score(sample: Mapping[str, Any], task: Any) -> float | None:
    """What most tasks of lmms-eval log: a metric that is the score, or a mapping with the key `score`."""
    for name, value in sample.items():
        if name in ("acc", "exact_match") and isinstance(value, float | int):
            return float(value)
        if isinstance(value, dict) and isinstance(value.get("score"), float | int):
            return float(value["score"])
    return None


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: how `evaluation.benchmark` and the folder of its results call it.
        task: lmms-eval's task or group of tasks.
        folder: the folder of lmms-eval's tasks that defines it; None: look through all, which takes ten seconds.
        split: the split that each task asks about.
        dataset: its repository on the Hugging Face hub, and the revision; None: lmms-eval knows.
        unpacked: the folder in HF_HOME into which lmms-eval unpacks the videos.
        score: the share of one question that is right.
        figure: what the paper gives, where that is not the accuracy over all questions.
        verdict: what a judge says of an answer, out of "pred" (yes or no) and "score" (0 to 5); empty: no judge.
        submission: the server that scores a file of answers, where the right ones are not public.
        advice: ends the message about missing videos.
    """

    name: str
    task: str
    folder: str | None = None
    split: str | None = None
    dataset: str | None = None
    revision: str | None = None
    unpacked: str | None = None
    score: Score = plain_score
    figure: Figure | None = None
    verdict: tuple[str, ...] = ()
    submission: str | None = None
    advice: str = ""

    @property
    def download(self) -> str:
        """The commands that fetch the data to where lmms-eval looks for them."""
        revision = f" --revision {self.revision}" if self.revision else ""
        return f"hf auth login && hf download --repo-type dataset {self.dataset}{revision}"


def _same(metric: str, answer: str, right: str) -> Score:
    return lambda sample, task: str(sample[metric][answer]) == str(sample[metric][right])


def _mlvu(split: str, dataset: str, unpacked: str) -> Benchmark:
    return Benchmark(
        name=f"mlvu_{split}",
        task=f"mlvu_{split}",
        folder="mlvu",
        split="test",
        dataset=dataset,
        unpacked=unpacked,
        score=_same("mlvu_percetion_score", "pred_answer", "answer"),
        figure=Figure("mean of categories %", "mlvu_percetion_score"),
    )


def _egoschema(name: str, **more: Any) -> Benchmark:
    return Benchmark(
        name=name,
        task=name,
        folder="egoschema",
        split="test",
        dataset="lmms-eval/egoschema",
        unpacked="egoschema",
        **more,
    )


BENCHMARKS = (
    Benchmark(
        name="activitynetqa",
        task="activitynetqa",
        folder="activitynetqa",
        split="test",
        dataset="lmms-eval/ActivityNetQA",
        unpacked="activitynetqa",
        score=lambda sample, task: "yes" in sample["gpt_eval_accuracy"]["Correctness"],
        figure=Figure("score 0-5", "gpt_eval_score"),
        verdict=("pred", "score"),
    ),
    Benchmark(
        name="videochatgpt",
        task="videochatgpt",
        folder="videochatgpt",
        split="test",
        dataset="lmms-eval/VideoChatGPT",
        unpacked="videochatgpt",
        score=lambda sample, task: None,
        figure=Figure("mean score 0-5", "gpt_eval_score_"),
        verdict=("score",),
    ),
    Benchmark(
        name="nextqa",
        task="nextqa_mc_test",
        folder="nextqa",
        split="test",
        dataset="lmms-eval/NExTQA",
        unpacked="nextqa",
    ),
    # The paper's figures are multiples of 1 / 5031, so it asked all questions; 500 of them have public answers.
    _egoschema(
        "egoschema",
        score=lambda sample, task: None,
        submission="https://validation-server.onrender.com/api/upload/",
    ),
    _egoschema("egoschema_subset", score=_same("score", "pred", "ground_truth")),
    # The paper does not say which of the two it used; its 62.48 % without compression is where others are on dev.
    _mlvu("dev", "sy1998/MLVU_dev", "mlvu"),
    _mlvu("test", "sy1998/MLVU_Test", "mlvu_test"),
    Benchmark(
        name="videomme",
        task="videomme",
        folder="videomme",
        split="test",
        dataset="lmms-eval/Video-MME",
        unpacked="videomme",
    ),
    Benchmark(
        name="videommmu",
        task="video_mmmu",
        folder="videommmu",
        split="test",
        dataset="lmms-eval/VideoMMMU",
        unpacked="video_mmmu",
        score=lambda sample, task: task.aggregation()["mmmu_acc"]([sample["mmmu_acc"]]),
        figure=Figure("mean of tracks %", "mmmu_acc", 100),
    ),
    Benchmark(
        name="mvbench",
        task="mvbench",
        folder="mvbench",
        split="train",
        dataset="OpenGVLab/MVBench",
        revision="video",
        unpacked="mvbench_video",
        figure=Figure("mean of tasks %", "mvbench_accuracy"),
        advice="The videos of fine_grained_pose are part of NTU RGB+D and are had from its owners alone: "
        "https://rose1.ntu.edu.sg/dataset/actionRecognition",
    ),
)


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of this name, or the task that lmms-eval calls so."""
    return next((b for b in BENCHMARKS if b.name == name), Benchmark(name=name, task=name))
