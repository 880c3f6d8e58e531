"""The files of `llava-scissor show`: PNGs, an mp4, the merge map as JSON, and one page that holds it all."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from llava.errors import UserError
from llava.show.look import Look
from llava.show.page import page
from llava.show.picture import colors, draw


def write(shown: Look, out: str | Path) -> list[Path]:
    """Write frame_000.png ..., components.mp4, merge_map.json and index.html into a folder, which is made.

    Returns:
        The files, index.html last.

    Raises:
        UserError: the folder cannot be made or written to.
    """
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _write(shown, folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written to ({error.strerror}); choose another --out.") from error


def _write(shown: Look, folder: Path) -> list[Path]:
    pictures = _pictures(shown)
    paths = []
    for index, picture in enumerate(pictures):
        paths.append(folder / f"frame_{index:03}.png")
        picture.save(paths[-1])
    movie, merge_map, html = (folder / name for name in ("components.mp4", "merge_map.json", "index.html"))
    _write_movie(movie, pictures, shown.video.timestamps)
    merge_map.write_text(json.dumps(_merge_map(shown)), encoding="utf-8")
    html.write_text(page(shown, pictures), encoding="utf-8")
    return [*paths, movie, merge_map, html]


def _pictures(shown: Look) -> list[Image.Image]:
    palette = colors(len(shown.result.positions))
    places = shown.representatives
    return [
        draw(frame, labels, places[places[:, 0] == index, 1:], palette)
        for index, (frame, labels) in enumerate(zip(shown.video.frames, shown.labels, strict=True))
    ]


def _merge_map(shown: Look) -> dict[str, object]:
    return {
        "video": str(shown.video.path),
        "seconds": shown.video.timestamps.tolist(),
        "compression": asdict(shown.compression),
        "stats": asdict(shown.result.stats),
        "representatives": shown.representatives.tolist(),  # frame, row, column of each kept token
        "assignment": shown.labels.tolist(),  # [frame][row][column]: kept token, -1 if dropped
        "kept_per_frame": shown.kept_per_frame(),
        "shown_per_frame": shown.shown_per_frame(),
    }


def _write_movie(path: Path, pictures: Sequence[Image.Image], seconds: np.ndarray) -> None:
    """An mp4 in which each picture stays as long as the frame it shows, between a tenth of a second and a second."""
    gaps = np.diff(seconds, append=seconds[-1] + (np.diff(seconds).mean() if len(seconds) > 1 else 1.0))
    starts = np.concatenate([[0], np.cumsum(gaps.clip(0.1, 1.0))])
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "18"})
        stream.width, stream.height = pictures[0].size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 25)
        for tick in range(max(1, round(25 * starts[-1]))):
            index = int(np.searchsorted(starts, tick / 25 + 1e-6, side="right")) - 1
            frame = av.VideoFrame.from_image(pictures[min(index, len(pictures) - 1)])
            frame.pts, frame.time_base = tick, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
