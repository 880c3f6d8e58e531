"""Reading ahead gives the videos that reading gives, each read once, and their errors in their turn."""

import threading

import pytest

from llava.assets import tiny_model_path
from llava.errors import VideoError
from llava.instrument import record
from llava.read_ahead import ReadAhead
from llava.video import VideoConfig, load_video

CONFIG = VideoConfig(num_frames=2)
DEMO = tiny_model_path().parent / "demo.mp4"


class Reader:
    """Says who read what; reading waits for `gate`."""

    def __init__(self):
        self.read, self.threads, self.gate = [], [], threading.Event()
        self.gate.set()

    def __call__(self, path, config):
        assert self.gate.wait(10)
        self.read.append(path)
        self.threads.append(threading.current_thread().name)
        if path == "broken":
            raise VideoError("broken is not a video.")
        return f"frames of {path} for {config.num_frames}"


def test_the_expected_video_is_read_in_a_thread_while_this_one_is_in_use():
    reader = Reader()
    videos = ReadAhead(reader)
    videos.expect("b", CONFIG)
    assert videos("a", CONFIG) == "frames of a for 2"
    assert videos("a", CONFIG) == "frames of a for 2"  # the second question about it
    videos.expect("c", CONFIG)
    assert videos("b", CONFIG) == "frames of b for 2"
    assert videos("c", CONFIG) == "frames of c for 2"
    assert reader.read == ["a", "b", "c"]
    main, *ahead = reader.threads
    assert main == threading.current_thread().name
    assert all(name.startswith("read-ahead") for name in ahead)


def test_reading_ahead_does_not_wait():
    reader = Reader()
    videos = ReadAhead(reader)
    videos("a", CONFIG)
    reader.gate.clear()
    videos.expect("b", CONFIG)
    assert videos("a", CONFIG) == "frames of a for 2"  # although b cannot be read yet
    assert reader.read == ["a"]
    reader.gate.set()
    assert videos("b", CONFIG) == "frames of b for 2"


def test_another_video_or_setting_than_the_expected_one_is_read_as_ever():
    reader = Reader()
    videos = ReadAhead(reader)
    videos.expect("b", CONFIG)
    videos("a", CONFIG)
    videos.expect(None, CONFIG)
    assert videos("c", CONFIG) == "frames of c for 2"
    assert videos("c", VideoConfig(num_frames=3)) == "frames of c for 3"
    assert videos("c", CONFIG) == "frames of c for 2"
    assert sorted(reader.read) == ["a", "b", "c", "c", "c"]


def test_an_error_is_raised_in_the_turn_of_its_video_and_every_time():
    reader = Reader()
    videos = ReadAhead(reader)
    videos.expect("broken", CONFIG)
    assert videos("a", CONFIG) == "frames of a for 2"
    for _ in range(2):
        with pytest.raises(VideoError, match="broken is not a video"):
            videos("broken", CONFIG)
    assert videos("b", CONFIG) == "frames of b for 2"


def test_frames_are_those_of_the_reader_and_the_waiting_is_timed():
    videos = ReadAhead(load_video)
    videos.expect(DEMO, CONFIG)
    videos(DEMO, VideoConfig(num_frames=1))
    with record() as recorder:
        ahead = videos(DEMO, CONFIG)
    assert (ahead.frames == load_video(DEMO, CONFIG).frames).all()
    assert "decode_video" in recorder.milliseconds
