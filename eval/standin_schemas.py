"""Questions of the procedural world in the schema of each benchmark: its configurations, columns and paths of videos.

Columns are those that lmms-eval's tasks read. Where a benchmark has five options, the fifth is never right.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from eval.videos import Video

LETTERS = "ABCDE"
FIFTH_OPTION = "something else"

Row = tuple[str, dict[str, Any], str]
"""The configuration of the dataset, the columns, and the kind of question."""

MVBENCH_FOLDERS = {
    "action_antonym": "ssv2_video_mp4",
    "action_count": "perception/videos",
    "action_localization": "sta/sta_video_segment",
    "action_prediction": "star/Charades_segment",
    "action_sequence": "star/Charades_segment",
    "character_order": "perception/videos",
    "counterfactual_inference": "clevrer/video_validation",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/video_fps3_hq_segment",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "fine_grained_pose": "nturgbd_convert",
    "moving_attribute": "clevrer/video_validation",
    "moving_count": "clevrer/video_validation",
    "moving_direction": "clevrer/video_validation",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_segment",
    "object_shuffle": "perception/videos",
    "scene_transition": "scene_qa/video",
    "state_change": "perception/videos",
    "unexpected_action": "FunQA_test/test",
}
"""Where each part of MVBench has its videos."""

MLVU_DEV = ("anomaly_reco", "count", "ego", "needle", "order", "plotQA", "topic_reasoning")
MLVU_TEST = ("anomaly_reco", "count", "ego", "needleQA", "order", "plotQA", "sportsQA", "topic_reasoning", "tutorialQA")
"""The categories of MLVU's two parts."""


@dataclass(frozen=True)
class Schema:
    """How one benchmark stores a video and the questions about it.

    Attributes:
        rows: the rows that a video gives.
        path: where the video lies in HF_HOME.
        videos: how many of them it takes until every configuration has a row.
    """

    rows: Callable[[Video], Iterator[Row]]
    path: Callable[[Video], str]
    videos: int = 1


def video_id(video: Video) -> str:
    return f"procedural-{video.index + 1:03d}"


def _lettered(options: tuple[str, ...]) -> list[str]:
    return [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]


def _videomme(video: Video) -> Iterator[Row]:
    """Video-MME's tables know only their own names of domains."""
    for number, question in enumerate(video.questions, start=1):
        columns = {
            "video_id": f"{video.index + 1:03d}",
            "duration": video.duration,
            "domain": "Life Record",
            "sub_category": "Daily Life",
            "url": "",
            "videoID": video_id(video),
            "question_id": f"{video.index + 1:03d}-{number}",
            "task_type": question.task_type,
            "question": question.text,
            "options": _lettered(question.options),
            "answer": LETTERS[question.answer],
        }
        yield "videomme", columns, question.kind


def _nextqa(video: Video) -> Iterator[Row]:
    for number, question in enumerate(video.questions):
        columns = {"video": video_id(video), "question": question.text, "answer": question.answer, "qid": number}
        columns |= {f"a{index}": option for index, option in enumerate((*question.options, FIFTH_OPTION))}
        yield "MC", columns | {"type": "DO"}, question.kind


def _egoschema(config: str, public: bool, video: Video) -> Iterator[Row]:
    """One question about each video: answers are handed in by video."""
    question = video.questions[0]
    columns = {
        "question_idx": str(video.index),
        "video_idx": video_id(video),
        "question": question.text,
        "option": _lettered((*question.options, FIFTH_OPTION)),
        "answer": str(question.answer) if public else None,
    }
    yield config, columns, question.kind


def _mlvu(task_types: Sequence[str], video: Video) -> Iterator[Row]:
    for number, question in enumerate(video.questions):
        options = [f"({letter}) {option}" for letter, option in zip(LETTERS, question.options, strict=False)]
        columns = {
            "video_name": f"{video_id(video)}.mp4",
            "task_type": task_types[(4 * video.index + number) % len(task_types)],
            "question": "\n".join([question.text, *options]),
            "answer": LETTERS[question.answer],
        }
        yield "default", columns, question.kind


def _videommmu(video: Video) -> Iterator[Row]:
    """Each video has one question in each of the three tracks."""
    for track, question in zip(("Perception", "Comprehension", "Adaptation"), video.questions, strict=False):
        columns = {
            "id": f"dev_Art_{video.index + 1}",
            "question": question.text,
            "options": list(question.options),
            "answer": LETTERS[question.answer],
            "question_type": "multiple-choice",
        }
        yield track, columns, question.kind


def _mvbench_part(video: Video) -> str:
    return list(MVBENCH_FOLDERS)[video.index % len(MVBENCH_FOLDERS)]


def _mvbench(video: Video) -> Iterator[Row]:
    for question in video.questions:
        columns = {
            "video": f"{video_id(video)}.mp4",
            "question": question.text,
            "candidates": list(question.options),
            "answer": question.options[question.answer],
        }
        yield _mvbench_part(video), columns, question.kind


def _activitynetqa(video: Video) -> Iterator[Row]:
    for number, question in enumerate(video.questions):
        columns = {
            "video_name": video_id(video),
            "question_id": f"{video_id(video)}_{number}",
            "question": question.text.removesuffix("?").lower(),
            "answer": question.options[question.answer],
            "type": "8",
        }
        yield "default", columns, question.kind


def _videochatgpt(video: Video) -> Iterator[Row]:
    """Questions with an answer in words; each pair of the consistency part asks the same thing twice."""
    first, second, third = video.questions[:3]
    for config, question, names in (
        ("Generic", first, ["question"]),
        ("Temporal", second, ["question"]),
        ("Consistency", third, ["question_1"]),
        ("Consistency", third, ["question_2"]),
    ):
        texts = {name: question.text if name in names else "None" for name in ("question", "question_1", "question_2")}
        answer = f"It is {question.options[question.answer]}."
        yield config, {"video_name": video_id(video), **texts, "answer": answer}, question.kind


SCHEMAS = {
    "activitynetqa": Schema(_activitynetqa, lambda video: f"activitynetqa/all_test/v_{video_id(video)}.mp4"),
    "videochatgpt": Schema(_videochatgpt, lambda video: f"videochatgpt/Test_Videos/{video_id(video)}.mp4"),
    "nextqa": Schema(_nextqa, lambda video: f"nextqa/NExTVideo/{video_id(video)}.mp4"),
    "egoschema": Schema(
        partial(_egoschema, "GENERATION", False), lambda video: f"egoschema/videos/{video_id(video)}.mp4"
    ),
    "egoschema_subset": Schema(
        partial(_egoschema, "Subset", True), lambda video: f"egoschema/videos/{video_id(video)}.mp4"
    ),
    "mlvu_dev": Schema(partial(_mlvu, MLVU_DEV), lambda video: f"mlvu/{video_id(video)}.mp4"),
    "mlvu_test": Schema(partial(_mlvu, MLVU_TEST), lambda video: f"mlvu_test/{video_id(video)}.mp4"),
    "videomme": Schema(_videomme, lambda video: f"videomme/data/{video_id(video)}.mp4"),
    "videommmu": Schema(_videommmu, lambda video: f"video_mmmu/Art/dev_Art_{video.index + 1}.mp4"),
    "mvbench": Schema(
        _mvbench,
        lambda video: f"mvbench_video/{MVBENCH_FOLDERS[_mvbench_part(video)]}/{video_id(video)}.mp4",
        videos=len(MVBENCH_FOLDERS),
    ),
}
"""By the name of the benchmark."""
