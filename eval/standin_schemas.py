"""Questions of the procedural world in the schema of each benchmark: its configurations, columns and paths of videos.

Each part of a benchmark asks the kind of question that comes nearest to its own: what moves where stands for an action,
what appears last for the order of a story, the one small object in a long video for the needle of MLVU. Columns are
those that lmms-eval's tasks read. Where a benchmark has five options, the fifth is never right.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from eval.videos import Parts, Video, any_four

LETTERS = "ABCDE"
FIFTH_OPTION = "something else"

Row = tuple[str, dict[str, Any], str]
"""The configuration of the dataset, the columns, and the kind of question."""

MVBENCH = {
    "action_antonym": ("ssv2_video_mp4", ("motion",)),
    "action_count": ("perception/videos", ("count",)),
    "action_localization": ("sta/sta_video_segment", ("vanish", "change")),
    "action_prediction": ("star/Charades_segment", ("place",)),
    "action_sequence": ("star/Charades_segment", ("order",)),
    "character_order": ("perception/videos", ("order",)),
    "counterfactual_inference": ("clevrer/video_validation", ("absent",)),
    "egocentric_navigation": ("vlnqa", ("motion",)),
    "episodic_reasoning": ("tvqa/video_fps3_hq_segment", ("vanish", "change", "order")),
    "fine_grained_action": ("Moments_in_Time_Raw/videos", ("motion",)),
    "fine_grained_pose": ("nturgbd_convert", ("shape",)),
    "moving_attribute": ("clevrer/video_validation", ("color",)),
    "moving_count": ("clevrer/video_validation", ("count",)),
    "moving_direction": ("clevrer/video_validation", ("motion",)),
    "object_existence": ("clevrer/video_validation", ("absent",)),
    "object_interaction": ("star/Charades_segment", ("shape", "small")),
    "object_shuffle": ("perception/videos", ("place",)),
    "scene_transition": ("scene_qa/video", ("scene",)),
    "state_change": ("perception/videos", ("change",)),
    "unexpected_action": ("FunQA_test/test", ("vanish",)),
}
"""Where each part of MVBench has its videos, and the kinds of its questions."""

MLVU_DEV = {
    "anomaly_reco": ("vanish",),
    "count": ("count",),
    "ego": ("motion",),
    "needle": ("small",),
    "order": ("order",),
    "plotQA": ("place", "change"),
    "topic_reasoning": ("scene",),
}
MLVU_TEST = {
    "anomaly_reco": ("vanish",),
    "count": ("count",),
    "ego": ("place",),
    "needleQA": ("small",),
    "order": ("order",),
    "plotQA": ("change", "color"),
    "sportsQA": ("motion",),
    "topic_reasoning": ("scene",),
    "tutorialQA": ("absent", "shape"),
}
"""The categories of MLVU's two parts, and the kinds of their questions."""

VIDEOMMMU = {
    "Perception": ("color", "shape", "small", "scene"),
    "Comprehension": ("motion", "place", "order", "change", "vanish"),
    "Adaptation": ("count", "absent"),
}
"""The tracks of VideoMMMU: from what is seen to what has to be concluded."""

EGOSCHEMA = ("order", "absent", "count", "motion", "change")
"""Kinds of questions that take the whole video."""

VIDEOCHATGPT = (("color", "shape", "scene", "motion"), ("order", "change", "vanish"), ("place", "count", "small"))
"""Kinds of questions of Video-ChatGPT's generic, temporal and consistency parts."""

NEXTQA_TYPES = {"motion": "DO", "scene": "DL", "count": "DC", "order": "TN", "vanish": "TC", "change": "TC"}
"""NExT-QA's types (descriptive, temporal) of the kinds; "DO" for the others."""

ACTIVITYNETQA_TYPES = {
    "motion": "0",
    "place": "1",
    "order": "2",
    "color": "4",
    "shape": "5",
    "scene": "6",
    "count": "7",
}
"""ActivityNet-QA's types (motion, spatial and temporal relation, color, object, location, number) of the kinds; "8" for
the others."""

LONG = 4
"""How many times as long as the others the videos of MLVU are: 4 to 32 seconds."""


@dataclass(frozen=True)
class Schema:
    """How one benchmark stores a video and the questions about it.

    Attributes:
        rows: the rows that a video gives.
        path: where the video lies in HF_HOME.
        parts: the kinds of the questions about each video.
        stretch: how many times as long as the world's own its videos are.
        videos: how many of them it takes until every configuration has a row.
    """

    rows: Callable[[Video], Iterator[Row]]
    path: Callable[[Video], str]
    parts: Callable[[int], Parts] = any_four
    stretch: int = 1
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
        yield "MC", columns | {"type": NEXTQA_TYPES.get(question.kind, "DO")}, question.kind


def _egoschema(config: str, public: bool, video: Video) -> Iterator[Row]:
    """One question about each video: answers are handed in by video."""
    (question,) = video.questions
    columns = {
        "question_idx": str(video.index),
        "video_idx": video_id(video),
        "question": question.text,
        "option": _lettered((*question.options, FIFTH_OPTION)),
        "answer": str(question.answer) if public else None,
    }
    yield config, columns, question.kind


def _mlvu_category(categories: Mapping[str, Sequence[str]], index: int, number: int) -> str:
    """Of question `number` of video `index`: all categories in turn."""
    return list(categories)[(4 * index + number) % len(categories)]


def _mlvu(categories: Mapping[str, Sequence[str]], video: Video) -> Iterator[Row]:
    for number, question in enumerate(video.questions):
        options = [f"({letter}) {option}" for letter, option in zip(LETTERS, question.options, strict=False)]
        columns = {
            "video_name": f"{video_id(video)}.mp4",
            "task_type": _mlvu_category(categories, video.index, number),
            "question": "\n".join([question.text, *options]),
            "answer": LETTERS[question.answer],
        }
        yield "default", columns, question.kind


def _videommmu(video: Video) -> Iterator[Row]:
    """Each video has one question in each of the three tracks."""
    for track, question in zip(VIDEOMMMU, video.questions, strict=True):
        columns = {
            "id": f"dev_Art_{video.index + 1}",
            "question": question.text,
            "options": list(question.options),
            "answer": LETTERS[question.answer],
            "question_type": "multiple-choice",
        }
        yield track, columns, question.kind


def _mvbench_part(index: int) -> str:
    return list(MVBENCH)[index % len(MVBENCH)]


def _mvbench(video: Video) -> Iterator[Row]:
    """One question about each video, as most parts of MVBench have it."""
    (question,) = video.questions
    columns = {
        "video": f"{video_id(video)}.mp4",
        "question": question.text,
        "candidates": list(question.options),
        "answer": question.options[question.answer],
    }
    yield _mvbench_part(video.index), columns, question.kind


def _activitynetqa(video: Video) -> Iterator[Row]:
    for number, question in enumerate(video.questions):
        columns = {
            "video_name": video_id(video),
            "question_id": f"{video_id(video)}_{number}",
            "question": question.text.removesuffix("?").lower(),
            "answer": question.options[question.answer],
            "type": ACTIVITYNETQA_TYPES.get(question.kind, "8"),
        }
        yield "default", columns, question.kind


def _videochatgpt(video: Video) -> Iterator[Row]:
    """Questions with an answer in words; each pair of the consistency part asks the same thing twice."""
    first, second, third = video.questions
    for config, question, names in (
        ("Generic", first, ["question"]),
        ("Temporal", second, ["question"]),
        ("Consistency", third, ["question_1"]),
        ("Consistency", third, ["question_2"]),
    ):
        texts = {name: question.text if name in names else "None" for name in ("question", "question_1", "question_2")}
        answer = f"It is {question.options[question.answer]}."
        yield config, {"video_name": video_id(video), **texts, "answer": answer}, question.kind


def _mlvu_schema(categories: Mapping[str, Sequence[str]], folder: str) -> Schema:
    return Schema(
        partial(_mlvu, categories),
        lambda video: f"{folder}/{video_id(video)}.mp4",
        parts=lambda index: [categories[_mlvu_category(categories, index, number)] for number in range(4)],
        stretch=LONG,
    )


def _egoschema_schema(config: str, public: bool) -> Schema:
    return Schema(
        partial(_egoschema, config, public),
        lambda video: f"egoschema/videos/{video_id(video)}.mp4",
        parts=lambda index: [EGOSCHEMA],
    )


SCHEMAS = {
    "activitynetqa": Schema(_activitynetqa, lambda video: f"activitynetqa/all_test/v_{video_id(video)}.mp4"),
    "videochatgpt": Schema(
        _videochatgpt,
        lambda video: f"videochatgpt/Test_Videos/{video_id(video)}.mp4",
        parts=lambda index: VIDEOCHATGPT,
    ),
    "nextqa": Schema(_nextqa, lambda video: f"nextqa/NExTVideo/{video_id(video)}.mp4"),
    "egoschema": _egoschema_schema("GENERATION", False),
    "egoschema_subset": _egoschema_schema("Subset", True),
    "mlvu_dev": _mlvu_schema(MLVU_DEV, "mlvu"),
    "mlvu_test": _mlvu_schema(MLVU_TEST, "mlvu_test"),
    "videomme": Schema(_videomme, lambda video: f"videomme/data/{video_id(video)}.mp4"),
    "videommmu": Schema(
        _videommmu,
        lambda video: f"video_mmmu/Art/dev_Art_{video.index + 1}.mp4",
        parts=lambda index: list(VIDEOMMMU.values()),
    ),
    "mvbench": Schema(
        _mvbench,
        lambda video: f"mvbench_video/{MVBENCH[_mvbench_part(video.index)][0]}/{video_id(video)}.mp4",
        parts=lambda index: [MVBENCH[_mvbench_part(index)][1]],
        videos=len(MVBENCH),
    ),
}
"""By the name of the benchmark."""
