"""Read the next video in a thread while the model is busy with this one."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from llava.instrument import stage
from llava.video import Video, VideoConfig

Key = tuple[str, VideoConfig]


class ReadAhead:
    """A reader of videos that remembers the last one, and reads the one that is expected next.

    Two videos are in memory at most. What goes wrong while one is read ahead is raised when it is asked for.

    Args:
        read: `llava.video.load_video`, or a function like it.
    """

    def __init__(self, read: Callable[[str | Path, VideoConfig], Video]) -> None:
        self._read = read
        self._last: tuple[Key, Video] | None = None
        self._expected: Key | None = None
        self._ahead: tuple[Key, Future[Video]] | None = None
        self._thread = ThreadPoolExecutor(1, "read-ahead")

    def __call__(self, path: str | Path, config: VideoConfig) -> Video:
        """The video; the expected one is read from now on.

        Raises:
            VideoError: it cannot be read.
        """
        key = (str(path), config)
        if self._last is None or self._last[0] != key:
            ahead, self._ahead = self._ahead, None
            self._last = None
            if ahead is not None and ahead[0] == key:
                with stage("decode_video"):  # what is left of it
                    self._last = key, ahead[1].result()
            else:
                self._last = key, self._read(path, config)
        if self._expected not in (None, key) and (self._ahead is None or self._ahead[0] != self._expected):
            self._ahead = self._expected, self._thread.submit(self._read, *self._expected)
        return self._last[1]

    def expect(self, path: str | Path | None, config: VideoConfig) -> None:
        """Say which video will be asked for after the one that is asked for next; None: not known."""
        self._expected = None if path is None else (str(path), config)
