"""The offline stand-in of Video-MME: procedural videos and questions where lmms-eval looks for the real ones.

`write_standin(root, ...)` fills a folder that serves as HF_HOME of an evaluation process, so that lmms-eval's own
`videomme` task runs unchanged and without a network:

    <home>/datasets/lmms-eval___video-mme/videomme/0.0.0/<40 hex digits>/video-mme-test.arrow, dataset_info.json
    <home>/videomme/data/<videoID>.mp4
    <home>/kinds.json          what the schema has no column for: question_id -> kind of question

The folder's name ends in a fingerprint of everything it depends on, and it appears under that name only when it is
complete: an interrupted run leaves nothing that looks finished.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from tqdm import tqdm

from eval.videos import Video, make_videos
from eval.world import Split
from llava.errors import UserError

DATASET = "lmms-eval/Video-MME"
CONFIG_NAME = "videomme"
LETTERS = "ABCD"


def write_standin(root: Path, count: int, seed: int) -> Path:
    """Write the evaluation split of the procedural world below `root`, unless it is there; return the new HF_HOME.

    Raises:
        UserError: the folder cannot be written.
    """
    fingerprint = hashlib.sha256(f"{count} {seed} {_source_digest()}".encode()).hexdigest()
    home = root / f"videomme-{fingerprint[:12]}"
    if not home.exists():
        videos = make_videos(split=Split.EVAL, count=count, seed=seed)
        write_home(home, tqdm(videos, total=count, desc="Writing the stand-in videos", unit="video"), fingerprint)
    return home


def write_home(home: Path, videos: Iterable[Video], fingerprint: str) -> None:
    """Write `videos` as the stand-in `home`, all of it or nothing. `fingerprint`: hexadecimal, at least 40 digits."""
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=home.parent) as folder:
            partial = Path(folder) / home.name
            (partial / "videomme" / "data").mkdir(parents=True)
            rows, kinds = [], {}
            for video in videos:
                write_video(partial / "videomme" / "data" / f"{_video_id(video)}.mp4", video.frames, video.fps)
                for row, question in zip(_rows(video), video.questions, strict=True):
                    rows.append(row)
                    kinds[row["question_id"]] = question.kind
            _write_dataset(partial, rows, fingerprint)
            (partial / "kinds.json").write_text(json.dumps(kinds, indent=1))
            if not home.exists():  # another process may have finished first
                shutil.move(partial, home)
    except OSError as error:
        raise UserError(
            f"Cannot write the stand-in videos to {home.parent}: {error.strerror or error}. "
            "Free some space, or choose another folder with evaluation.data_dir=FOLDER."
        ) from error


def write_video(path: Path, frames: np.ndarray, fps: float) -> None:
    """Encode `frames`, (T, H, W, 3) uint8 RGB with even H and W, as a small H.264 file of high quality."""
    with av.open(str(path), "w") as container:
        rate = Fraction(fps).limit_denominator(1000)
        # The same bytes every time, which macroblock trees and several threads do not give.
        options = {"crf": "14", "preset": "fast", "threads": "1", "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def read_kinds(home: Path) -> dict[str, str]:
    """question_id -> kind of question, as written next to the data."""
    return json.loads((home / "kinds.json").read_text())


def _rows(video: Video) -> Iterator[dict[str, Any]]:
    """The rows of `video` in the columns of Video-MME, whose tables know only their own names of domains."""
    for number, question in enumerate(video.questions, start=1):
        yield {
            "video_id": f"{video.index + 1:03d}",
            "duration": video.duration,
            "domain": "Life Record",
            "sub_category": "Daily Life",
            "url": "",
            "videoID": _video_id(video),
            "question_id": f"{video.index + 1:03d}-{number}",
            "task_type": question.task_type,
            "question": question.text,
            "options": [f"{letter}. {option}" for letter, option in zip(LETTERS, question.options, strict=True)],
            "answer": LETTERS[question.answer],
        }


def _video_id(video: Video) -> str:
    return f"procedural-{video.index + 1:03d}"


def _write_dataset(home: Path, rows: list[dict[str, Any]], fingerprint: str) -> None:
    """Write `rows` as `datasets.load_dataset` leaves a downloaded dataset in its cache."""
    from datasets import DatasetInfo, Features, List, SplitDict, SplitInfo, Value, Version
    from datasets.arrow_writer import ArrowWriter

    owner, name = DATASET.lower().split("/")
    folder = home / "datasets" / f"{owner}___{name}" / CONFIG_NAME / "0.0.0" / fingerprint[:40]
    folder.mkdir(parents=True)
    features = Features({key: List(Value("string")) if key == "options" else Value("string") for key in rows[0]})
    with ArrowWriter(path=str(folder / f"{name}-test.arrow"), features=features) as writer:
        for row in rows:
            writer.write(row)
        examples, size = writer.finalize()
    splits = SplitDict(dataset_name=name)
    splits["test"] = SplitInfo("test", num_bytes=size, num_examples=examples, dataset_name=name)
    info = DatasetInfo(
        description="A procedural stand-in in the schema of Video-MME.",
        features=features,
        builder_name="parquet",
        dataset_name=name,
        config_name=CONFIG_NAME,
        version=Version("0.0.0"),
        splits=splits,
        dataset_size=size,
    )
    info.write_to_directory(str(folder))


def _source_digest() -> str:
    """Of the files that decide what the videos and questions look like."""
    sources = sorted(Path(__file__).parent / name for name in ("world.py", "questions.py", "videos.py", "standin.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
