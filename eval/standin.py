"""Offline stand-ins of the benchmarks: procedural videos and questions where lmms-eval looks for the real ones.

`write_standin(home, ...)` fills a folder that serves as HF_HOME of an evaluation process, so that lmms-eval's own task
runs unchanged and without a network; for Video-MME:

    <home>/datasets/lmms-eval___video-mme/videomme/0.0.0/<40 hex digits>/video-mme-test.arrow, dataset_info.json
    <home>/videomme/data/<videoID>.mp4
    <home>/kinds.json          what the schema has no column for: the kinds of the questions of each configuration

The folder's name ends in a fingerprint of everything it depends on, and it appears under that name only when it is
complete: an interrupted run leaves nothing that looks finished.
"""

import hashlib
import json
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from tqdm import tqdm

from eval.benchmarks import Benchmark, find_benchmark
from eval.standin_schemas import SCHEMAS
from eval.videos import Video, make_videos
from eval.world import Split
from llava.config import EvaluationConfig
from llava.errors import UserError


def standin_home(evaluation: EvaluationConfig) -> Path:
    """Where the stand-in that `evaluation` asks for lies, or will lie: the HF_HOME of the run.

    Raises:
        UserError: the benchmark has no stand-in, or one that needs more videos.
    """
    schema = SCHEMAS.get(evaluation.benchmark)
    if schema is None:
        raise UserError(
            f"evaluation.data: {evaluation.benchmark} has no stand-in; use evaluation.data=hub, or one of the "
            f"benchmarks {', '.join(SCHEMAS)}."
        )
    if evaluation.videos < schema.videos:
        raise UserError(
            f"evaluation.videos is {evaluation.videos}; the stand-in of {evaluation.benchmark} takes at least "
            f"{schema.videos}, one for each of its parts."
        )
    return Path(evaluation.data_dir) / f"{evaluation.benchmark}-{_fingerprint(evaluation)[:12]}"


def write_standin(evaluation: EvaluationConfig) -> None:
    """Write the evaluation split of the procedural world as `evaluation` asks for it, unless it is there.

    Raises:
        UserError: the folder cannot be written.
    """
    home, count = standin_home(evaluation), evaluation.videos
    if not home.exists():
        schema = SCHEMAS[evaluation.benchmark]
        videos = make_videos(Split.EVAL, count, evaluation.seed, schema.parts, schema.stretch)
        videos = tqdm(videos, total=count, desc="Writing the stand-in videos", unit="video")
        write_home(home, videos, _fingerprint(evaluation), evaluation.benchmark)


def write_home(home: Path, videos: Iterable[Video], fingerprint: str, benchmark: str = "videomme") -> None:
    """Write `videos` as the stand-in `home`, all of it or nothing. `fingerprint`: hexadecimal, at least 40 digits."""
    schema = SCHEMAS[benchmark]
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=home.parent) as folder:
            partial = Path(folder) / home.name
            rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
            kinds: dict[str, list[str]] = defaultdict(list)
            for video in videos:
                path = partial / schema.path(video)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_video(path, video.frames, video.fps)
                for config, row, kind in schema.rows(video):
                    rows[config].append(row)
                    kinds[config].append(kind)
            for config in rows:
                _write_dataset(partial, find_benchmark(benchmark), config, rows[config], fingerprint)
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


def read_kinds(home: Path) -> dict[str, list[str]]:
    """Configuration of the dataset -> kind of each of its questions in their order, as written next to the data."""
    return json.loads((home / "kinds.json").read_text())


def _write_dataset(home: Path, benchmark: Benchmark, config: str, rows: list[dict[str, Any]], fingerprint: str) -> None:
    """Write `rows` as `datasets.load_dataset` leaves one configuration of a downloaded dataset in its cache."""
    from datasets import DatasetInfo, Features, List, SplitDict, SplitInfo, Value, Version
    from datasets.arrow_writer import ArrowWriter
    from datasets.naming import camelcase_to_snakecase

    owner, repository = str(benchmark.dataset).split("/")
    name = camelcase_to_snakecase(repository)
    folder = home / "datasets" / f"{owner}___{name}" / config / "0.0.0" / fingerprint[:40]
    folder.mkdir(parents=True)
    types = {int: Value("int64"), list: List(Value("string"))}
    features = Features({key: types.get(type(value), Value("string")) for key, value in rows[0].items()})
    split = str(benchmark.split)
    with ArrowWriter(path=str(folder / f"{name}-{split}.arrow"), features=features) as writer:
        for row in rows:
            writer.write(row)
        examples, size = writer.finalize()
    splits = SplitDict(dataset_name=name)
    splits[split] = SplitInfo(split, num_bytes=size, num_examples=examples, dataset_name=name)
    info = DatasetInfo(
        description=f"A procedural stand-in in the schema of {benchmark.dataset}.",
        features=features,
        builder_name="parquet",
        dataset_name=name,
        config_name=config,
        version=Version("0.0.0"),
        splits=splits,
        dataset_size=size,
    )
    info.write_to_directory(str(folder))


def _fingerprint(evaluation: EvaluationConfig) -> str:
    benchmark = find_benchmark(evaluation.benchmark)
    parts = (benchmark.dataset, benchmark.split, evaluation.videos, evaluation.seed, _source_digest())
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _source_digest() -> str:
    """Of the files that decide what the videos and questions look like."""
    names = ("world.py", "questions.py", "videos.py", "standin.py", "standin_schemas.py")
    sources = sorted(Path(__file__).parent / name for name in names)
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
