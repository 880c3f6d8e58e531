"""Small videos for tests: every frame shows its own number, so that a wrong frame cannot pass for a right one."""

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

WIDTH, HEIGHT = 96, 64


def numbered_frame(number: int) -> np.ndarray:
    """(HEIGHT, WIDTH, 3) picture of `number` (up to 255) as eight squares, with a red corner."""
    frame = np.full((HEIGHT, WIDTH, 3), 40, dtype=np.uint8)
    frame[:16, :24] = (255, 0, 0)
    for bit in range(8):
        if number >> bit & 1:
            frame[24:40, 8 * bit + 16 : 8 * bit + 24] = 255
    return frame


def read_number(frame: np.ndarray) -> int:
    """The number in a frame made by `numbered_frame`, at whatever scale."""
    height, width = frame.shape[:2]
    return sum(1 << bit for bit in range(8) if frame[height // 2, (8 * bit + 20) * width // WIDTH, 1] > 128)


def write_video(
    path: Path,
    frames: int = 30,
    *,
    times: Sequence[int] | None = None,
    codec: str = "libx264",
    gop: int = 12,
    b_frames: int = 2,
    streams: int = 1,
    options: dict[str, str] | None = None,
    muxer: dict[str, str] | None = None,
) -> Path:
    """A video of 10 frames per second, or with frames at `times` (milliseconds). Stream k is k + 1 times as large and
    begins to count at 100 k."""
    base = Fraction(1, 1000) if times else Fraction(1, 10)
    with av.open(str(path), "w", options=muxer or {}) as container:
        outputs = []
        for k in range(streams):
            stream = container.add_stream(codec, rate=10, options=options or {})
            stream.width, stream.height, stream.pix_fmt = WIDTH * (k + 1), HEIGHT * (k + 1), "yuv420p"
            stream.codec_context.gop_size, stream.codec_context.max_b_frames = gop, b_frames
            stream.codec_context.time_base = base
            outputs.append(stream)
        for number in range(frames):
            for k, stream in enumerate(outputs):
                picture = np.kron(numbered_frame(number + 100 * k), np.ones((k + 1, k + 1, 1), np.uint8))
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = (times[number] if times else number), base
                container.mux(stream.encode(frame))
        for stream in outputs:
            container.mux(stream.encode())
    return path


def write_audio(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        for number in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.rate, frame.pts = 16000, 1024 * number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def rotate(path: Path, degrees: int) -> Path:
    """Rewrite the display matrix of an MP4 file so that players turn its pictures clockwise by `degrees`."""
    a, b, c, d = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    data = bytearray(path.read_bytes())
    matrix = (
        data.find(b"tkhd") + 44
    )  # version 0 box: 4 name, 4 flags, 20 times and track, 8 reserved, 8 layer and volume
    struct.pack_into(">9i", data, matrix, a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def hide_start(path: Path, seconds: float) -> Path:
    """Rewrite the edit list of an MP4 file so that its first `seconds` are not shown."""
    data = bytearray(path.read_bytes())
    entry = data.find(b"elst") + 12
    timescale = struct.unpack_from(">I", data, data.find(b"mdhd") + 16)[0]
    length, start = struct.unpack_from(">Ii", data, entry)
    struct.pack_into(">Ii", data, entry, length - int(1000 * seconds), start + int(timescale * seconds))
    path.write_bytes(data)
    return path


def cut(path: Path, share: float) -> Path:
    """Keep only the first `share` of the bytes of a file."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path
