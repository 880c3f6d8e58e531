"""Where every frame of a video file is, found by reading its packets without decoding them.

All decoders work from this one index, so that frame 17 is the same frame and has the same time whichever of them
decodes it. Containers differ in what they promise: packets come in decoding order rather than display order, edit
lists hide frames, AVI keeps no display times at all. What is settled here need not be guessed elsewhere.
"""

import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava.errors import VideoError
from llava.files import check_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FrameIndex:
    """The frames of one video stream in display order.

    Attributes:
        stream: index of the stream in its container.
        streams: number of video streams in the container, cover pictures included.
        container: FFmpeg's name of the container format, such as `"matroska,webm"`.
        width, height: size of a frame as stored, before rotation.
        pts: (N,) int64, display time of each frame in units of the stream's time base, strictly increasing; 0 to N-1
            where the container has no display times.
        timed: whether `pts` are display times.
        keyframes: (K,) int64, the `pts` at which decoding can start; empty when it must start at the first frame.
        open_gop: whether some frames are shown before the keyframe that precedes them in the file.
        timestamps: (N,) float64, seconds since the first frame.
        duration: seconds from the first frame to the end of the last one.
        announced: seconds that the container promises, or None where it promises nothing.
    """

    stream: int
    streams: int
    container: str
    width: int
    height: int
    pts: np.ndarray
    timed: bool
    keyframes: np.ndarray
    open_gop: bool
    timestamps: np.ndarray
    duration: float
    announced: float | None

    @property
    def fps(self) -> float:
        """Frames per second, averaged over the whole stream."""
        return len(self.pts) / self.duration

    @property
    def truncated(self) -> bool:
        """Whether the frames end more than a second, and more than 5 %, before the container says they do."""
        return self.announced is not None and self.announced - self.duration > max(1.0, 0.05 * self.announced)


def index_frames(path: Path) -> FrameIndex:
    """Index the default video stream of a file. Reads the whole file once; keeps a few bytes per frame.

    Raises:
        VideoError: the file is missing, empty, unreadable, not a video, or holds no video frames.
    """
    check_file(path, VideoError)
    try:
        import av
    except ImportError as error:
        raise VideoError("Reading a video needs PyAV, which is not installed: `pip install av`.") from error
    try:
        return _index(path)
    except (av.FFmpegError, UnicodeError) as error:
        raise VideoError(
            f"{path} cannot be read as a video ({getattr(error, 'strerror', None) or error}): it is damaged, cut off, "
            f"or another kind of file. Download it again, or convert it with `ffmpeg -i {path.name} fixed.mp4`."
        ) from error


def open_container(path: Path) -> Any:
    """Open a file with PyAV; close it by using it in a `with` statement."""
    import av

    return av.open(str(path))


def _index(path: Path) -> FrameIndex:
    times: list[int | None] = []
    keys: list[int] = []
    open_gop = False
    last = (-math.inf, 0)  # display time and duration of the packet shown last
    with open_container(path) as container:
        stream = _choose_stream(path, container)
        for packet in container.demux(stream):
            if not packet.size or packet.is_discard:  # the end marker; frames hidden by an edit list
                continue
            times.append(packet.pts)
            if packet.pts is not None:
                last = max(last, (packet.pts, packet.duration or 0))
                open_gop |= bool(keys) and packet.pts < keys[-1]
                if packet.is_keyframe:
                    keys.append(packet.pts)
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        timed = container.format.name != "avi" and None not in times
        unit = float(stream.time_base) if timed else 1 / rate
        pts = np.unique(np.array(times, dtype=np.int64)) if timed else np.arange(_count_frames(path))
        if not len(pts):
            raise VideoError(f"{path} holds no video frames: it is cut off or damaged. Download or record it again.")
        timestamps = (pts - pts[0]) * unit
        return FrameIndex(
            stream=stream.index,
            streams=len(container.streams.video),
            container=container.format.name,
            width=stream.width,
            height=stream.height,
            pts=pts,
            timed=timed,
            keyframes=np.unique(np.array(keys if timed else [], dtype=np.int64)),
            open_gop=open_gop,
            timestamps=timestamps,
            duration=float(timestamps[-1]) + ((timed and last[1] * unit) or 1 / rate),
            announced=_announced_seconds(stream),
        )


def _choose_stream(path: Path, container: Any) -> Any:
    """FFmpeg's default video stream."""
    from av.stream import Disposition

    stream = container.streams.best("video")
    if stream is None or stream.disposition & Disposition.attached_pic or container.format.name == "tty":
        kinds = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
        raise VideoError(f"{path} has no video stream (it holds {kinds}): give a file with moving pictures.")
    if len(container.streams.video) > 1:
        logger.debug("%s: stream %d, the default of %d video streams", path, stream.index, len(container.streams.video))
    return stream


def _announced_seconds(stream: Any) -> float | None:
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    match = re.fullmatch(
        r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", "")
    )  # Matroska: time of the end
    if match is None:
        return None
    hours, minutes, seconds = (float(group) for group in match.groups())
    return 3600 * hours + 60 * minutes + seconds - float((stream.start_time or 0) * stream.time_base)


def _count_frames(path: Path) -> int:
    """Number of frames that decoding gives, for containers that do not tell."""
    with open_container(path) as container:
        return sum(1 for _ in container.decode(container.streams.best("video")))
