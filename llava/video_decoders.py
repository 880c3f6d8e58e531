"""Three ways to decode chosen frames of an indexed video: decord, torchcodec and PyAV.

Each decoder is one generator `(path, index, wanted) -> frames`: `wanted` are strictly increasing positions in the
index, and the frames come in that order as (height, width, 3) uint8 RGB arrays, rotated as the file asks for. At most
a chunk of frames is in memory at a time. A decoder that would return other frames than the wanted ones raises
`CannotDecode` before its first frame.
"""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llava.video_index import FrameIndex, open_container

logger = logging.getLogger(__name__)

CHUNK = 8
"""Frames decoded at a time by the decoders that return batches."""

TIME_TOLERANCE = 0.01
"""Seconds by which a decoder's own times may differ from the index (decord keeps them in float32)."""


class CannotDecode(Exception):  # noqa: N818 - it is a reason to try the next decoder
    """This decoder does not return the wanted frames of this file; the message says why."""


def decord_frames(path: Path, index: FrameIndex, wanted: np.ndarray) -> Iterator[np.ndarray]:
    """Frames through decord 0.6, where its results are right.

    It silently returns other frames than asked from MP4 files whose pictures do not begin at time zero, and where
    frames are shown before their keyframe; it cannot be told which of several video streams to take, and it counts
    the frames that an edit list hides.
    """
    import decord

    _require_exact_seeking(index)
    if index.open_gop or ("mp4" in index.container and index.pts[0] != 0):
        raise CannotDecode("it returns wrong frames from streams with open groups of pictures or a late start")
    if index.streams > 1:
        raise CannotDecode(f"it cannot choose among {index.streams} video streams")
    decord.logging.set_level(decord.logging.QUIET)
    reader = decord.VideoReader(str(path), ctx=decord.cpu(0))
    times = reader.get_frame_timestamp(range(len(reader)))[:, 0]
    _require_same_times(times, index.timestamps)
    for chunk in _chunks(wanted):
        batch = reader.get_batch(chunk.tolist())
        yield from batch.asnumpy() if hasattr(batch, "asnumpy") else np.asarray(batch)  # the caller's decord.bridge


def torchcodec_frames(path: Path, index: FrameIndex, wanted: np.ndarray) -> Iterator[np.ndarray]:
    """Frames through torchcodec, which needs FFmpeg's shared libraries; their times are checked one by one."""
    from torchcodec.decoders import VideoDecoder

    _require_exact_seeking(index)
    decoder = VideoDecoder(str(path), stream_index=index.stream, dimension_order="NHWC", seek_mode="exact")
    if not hasattr(decoder.metadata, "rotation"):
        raise CannotDecode("this version ignores rotation (`pip install -U torchcodec`)")
    start = decoder.metadata.begin_stream_seconds
    for chunk in _chunks(wanted):
        batch = decoder.get_frames_at(indices=chunk.tolist())
        _require_same_times(batch.pts_seconds.numpy() - start, index.timestamps[chunk])
        yield from batch.data.numpy()


def pyav_frames(path: Path, index: FrameIndex, wanted: np.ndarray) -> Iterator[np.ndarray]:
    """Frames through PyAV: decodes forward, and jumps to a keyframe where one lies between two wanted frames."""
    import av
    from av.filter import Graph

    replaced = 0
    try:
        with open_container(path) as container:
            graph = Graph()  # a filter graph honours the file's colour matrix; Frame.to_ndarray alone assumes BT.601
            graph.link_nodes(
                graph.add_buffer(template=container.streams[index.stream]),
                graph.add("scale", f"{index.width}:{index.height}"),  # a stream may change its size midway
                graph.add("format", "pix_fmts=rgb24"),
                graph.add("buffersink"),
            ).configure()
            targets = index.pts[wanted]
            for target, (place, frame) in zip(targets, _pyav_walk(path, container, index, targets), strict=True):
                replaced += place != target
                graph.push(frame)
                picture: Any = graph.pull()
                # Display matrices turn counter-clockwise, as np.rot90 does.
                yield np.rot90(picture.to_ndarray(), k=round(frame.rotation / 90))
    except av.FFmpegError as error:
        raise CannotDecode(f"the data is damaged ({error.strerror})") from error
    if replaced:
        logger.warning("%s: %d of %d frames cannot be decoded; the next ones are used", path, replaced, len(wanted))


def _pyav_walk(
    path: Path, container: Any, index: FrameIndex, targets: np.ndarray, jump: bool = True
) -> Iterator[tuple[int, Any]]:
    """The first decodable frame at or after each of the ascending `targets`, with its own place in `index.pts`."""
    stream = container.streams[index.stream]
    stream.thread_type = "AUTO"

    def decode() -> Iterator[tuple[int, Any]]:
        return ((frame.pts if index.timed else n, frame) for n, frame in enumerate(container.decode(stream)))

    frames, current = decode(), None
    for done, target in enumerate(targets):
        reached = index.pts[0] if current is None else current[0]
        keyframe = index.keyframes[index.keyframes <= target].max(initial=index.pts[0])
        if jump and keyframe > reached:
            container.seek(int(keyframe), stream=stream)
            frames = decode()
            current = next(frames, None)
            if current is None or current[0] > keyframe:  # landed too late: walk all the way in this container
                with open_container(path) as again:
                    yield from _pyav_walk(path, again, index, targets[done:], jump=False)
                return
        while current is None or current[0] < target:
            current = next(frames, None)
            if current is None:
                seconds = index.timestamps[np.searchsorted(index.pts, target)]
                raise CannotDecode(f"no frame can be decoded from {seconds:.2f} s on")
        yield current


def _require_exact_seeking(index: FrameIndex) -> None:
    """decord and torchcodec jump to the wrong place in MPEG-TS, MPEG-PS and AVI."""
    if not {"mp4", "matroska"} & set(index.container.split(",")):
        raise CannotDecode(f"it returns wrong frames from {index.container} files")


def _require_same_times(times: np.ndarray, expected: np.ndarray) -> None:
    if len(times) != len(expected) or not np.allclose(times, expected, rtol=0, atol=TIME_TOLERANCE):
        raise CannotDecode("it finds other frames than the file's own index")


def _chunks(wanted: np.ndarray) -> list[np.ndarray]:
    return np.split(wanted, range(CHUNK, len(wanted), CHUNK))


DECODERS: dict[str, Callable[[Path, FrameIndex, np.ndarray], Iterator[np.ndarray]]] = {
    "decord": decord_frames,
    "torchcodec": torchcodec_frames,
    "pyav": pyav_frames,
}
"""Every decoder by name, in the order in which `decoder="auto"` tries them."""
