"""Decoding: the right frames, upright and with the right times, from every decoder and every kind of file."""

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from video_files import cut, hide_start, numbered_frame, read_number, rotate, write_audio, write_video

from llava.errors import ConfigError, VideoError
from llava.instrument import record
from llava.video import VideoConfig, load_video, sample_frames
from llava.video_decoders import DECODERS

CLIPS = Path(__file__).parents[2] / ".." / "shared" / "videos"
IRREGULAR = np.cumsum([0, *([33, 40, 250, 100, 500] * 6)])[:30].tolist()


def decoders_at_hand() -> list[str]:
    """The decoders that can be imported here."""
    found = []
    for name in DECODERS:
        try:
            __import__("av" if name == "pyav" else name)
        except (ImportError, OSError, RuntimeError):
            continue
        found.append(name)
    return found


KINDS = {
    "mp4": lambda folder: write_video(folder / "a.mp4"),
    "mkv": lambda folder: write_video(folder / "a.mkv"),
    "webm": lambda folder: write_video(folder / "a.webm", codec="libvpx-vp9", b_frames=0),
    "avi with B-frames": lambda folder: write_video(folder / "a.avi"),
    "transport stream": lambda folder: write_video(folder / "a.ts"),
    "irregular times": lambda folder: write_video(folder / "a.mp4", times=IRREGULAR),
    "late start": lambda folder: write_video(folder / "a.mkv", times=[5000 + t for t in IRREGULAR]),
    "no edit list": lambda folder: write_video(folder / "a.mp4", muxer={"use_editlist": "0"}),
    "fragmented": lambda folder: write_video(folder / "a.mp4", muxer={"movflags": "frag_keyframe+empty_moov"}),
    "open groups": lambda folder: write_video(folder / "a.mp4", gop=7, options={"x264-params": "open-gop=1"}),
    "two streams": lambda folder: write_video(folder / "a.mp4", streams=2),
}


@pytest.mark.parametrize("decoder", ["auto", *decoders_at_hand()])
@pytest.mark.parametrize("kind", KINDS)
def test_each_decoder_returns_the_sampled_frames_or_refuses(tmp_path, kind, decoder):
    path = KINDS[kind](tmp_path)
    try:
        video = load_video(path, VideoConfig(num_frames=13, decoder=decoder))
    except VideoError:
        assert decoder in ("decord", "torchcodec"), "PyAV and the automatic choice read every kind of file here"
        return
    numbers = np.array([read_number(frame) for frame in video.frames])
    first_stream = 100 * (video.frames.shape[1] // 64 - 1)
    assert (numbers - first_stream).tolist() == np.linspace(0, 29, 13, dtype=int).tolist()
    assert video.frame_indices.tolist() == np.linspace(0, 29, 13, dtype=int).tolist()
    times = np.array(IRREGULAR if kind in ("irregular times", "late start") else range(0, 3000, 100)) / 1000
    np.testing.assert_allclose(video.timestamps, times[video.frame_indices], atol=2e-3)
    assert video.total_frames == 30


def test_decord_decodes_plain_files_by_default(tmp_path):
    pytest.importorskip("decord")
    assert load_video(write_video(tmp_path / "a.mp4")).decoder == "decord"


@pytest.mark.parametrize("degrees", [90, 180, 270])
@pytest.mark.parametrize("decoder", decoders_at_hand())
def test_rotated_recordings_come_upright(tmp_path, decoder, degrees):
    path = rotate(write_video(tmp_path / "a.mp4"), degrees)
    frame = load_video(path, VideoConfig(num_frames=4, decoder=decoder)).frames[2].astype(int)
    upright = np.rot90(numbered_frame(19).astype(int), k=-degrees // 90)
    assert frame.shape == upright.shape
    assert np.abs(frame - upright).mean() < 10


def test_frames_hidden_by_an_edit_list_do_not_count(tmp_path):
    video = load_video(hide_start(write_video(tmp_path / "a.mp4"), 1.0), VideoConfig(num_frames=5))
    assert [read_number(frame) for frame in video.frames] == [10, 14, 19, 24, 29]
    assert video.total_frames == 20
    assert video.timestamps[0] == 0


@pytest.mark.parametrize(
    "clip", ["av1_video.mkv", "flipping_a_pancake.mkv", "nasa_13013.mp4", "unordered.mov", "video_90.mov"]
)
@pytest.mark.parametrize("decoder", decoders_at_hand())
def test_decoders_agree_on_real_clips(clip, decoder):
    if not (CLIPS / clip).exists():
        pytest.skip("the sample clips are not in ../shared/videos")
    reference = load_video(CLIPS / clip, VideoConfig(num_frames=9, decoder="pyav"))
    try:
        video = load_video(CLIPS / clip, VideoConfig(num_frames=9, decoder=decoder))
    except VideoError:
        assert decoder == "decord"
        assert clip in ("av1_video.mkv", "nasa_13013.mp4")
        return
    assert np.abs(video.frames.astype(int) - reference.frames).mean() < 1
    np.testing.assert_allclose(video.timestamps, reference.timestamps)


def test_fallback_is_logged_and_names_the_reason(tmp_path, caplog):
    pytest.importorskip("decord")
    path = write_video(tmp_path / "a.ts")
    with caplog.at_level(logging.WARNING):
        video = load_video(path)
    assert video.decoder != "decord"
    assert "a.ts" in caplog.text
    assert "decord: it returns wrong frames from mpegts files" in caplog.text


def test_a_named_decoder_is_never_replaced(tmp_path):
    pytest.importorskip("decord")
    with pytest.raises(VideoError, match=r"decord.*video\.decoder=auto"):
        load_video(write_video(tmp_path / "a.ts"), VideoConfig(decoder="decord"))


def test_a_short_video_repeats_frames_to_reach_the_number(tmp_path):
    video = load_video(write_video(tmp_path / "a.mp4", 3), VideoConfig(num_frames=8))
    assert [read_number(frame) for frame in video.frames] == [0, 0, 0, 0, 1, 1, 1, 2]
    assert video.frame_indices.tolist() == np.linspace(0, 2, 8, dtype=int).tolist()


def test_a_time_span_and_a_rate_select_what_is_on_screen(tmp_path):
    path = write_video(tmp_path / "a.mp4")  # frame k from k/10 to (k+1)/10 seconds
    video = load_video(path, VideoConfig(start=0.55, end=2.05, fps=2.0))
    assert [read_number(frame) for frame in video.frames] == [5, 10, 15]
    assert load_video(path, VideoConfig(num_frames=2, fps=2.0)).frame_indices.tolist() == [0, 25]
    assert load_video(path, VideoConfig(num_frames=3, start=1.0, end=2.0)).frame_indices.tolist() == [10, 14, 19]


@example(gaps=[1.0], count=1, fps=1.0, span=(0.0, 1e-38))
@given(
    gaps=st.lists(st.floats(0.005, 3.0), min_size=1, max_size=60),
    count=st.integers(1, 80),
    fps=st.one_of(st.none(), st.floats(0.05, 200.0)),
    span=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_sampling_stays_within_the_span_and_the_number(gaps, count, fps, span):
    edges = np.cumsum([0.0, *gaps])
    times, duration = edges[:-1], float(edges[-1])
    start, end = (duration * share for share in sorted(span))
    if start >= end or start >= duration:
        return
    chosen = sample_frames(times, duration, VideoConfig(num_frames=count, fps=fps, start=start, end=end))
    assert (np.diff(chosen) >= 0).all()
    assert chosen[0] == np.flatnonzero(times <= start)[-1], "the first frame is the one on screen at the start"
    assert (times[chosen] <= end).all()
    if fps is None:
        assert len(chosen) == count
    else:
        assert 1 <= len(chosen) <= count
        assert len(set(chosen.tolist())) == len(chosen)
        on_screen = {int(np.flatnonzero(times <= t + 1e-9)[-1]) for t in np.arange(start, end - 1e-6, 1 / fps)}
        if len(on_screen) <= count:
            assert set(chosen.tolist()) <= on_screen | {int(chosen[0])}


def bad_file(kind: str, folder: Path) -> Path:
    path = folder / "clip.mp4"
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("this is not a video\n" * 50)
    elif kind == "plain text file":
        path = folder / "notes.txt"
        path.write_text("this is not a video\n" * 50)
    elif kind == "sound":
        write_audio(path)
    elif kind == "cut off before its index":
        cut(write_video(path), 0.6)
    elif kind == "cut off after its index":
        cut(write_video(path, muxer={"movflags": "faststart"}), 0.6)
    elif kind == "cut off matroska":
        path = cut(write_video(folder / "clip.mkv", 60), 0.8)
    elif kind == "damaged":
        data = bytearray(write_video(path, muxer={"movflags": "faststart"}).read_bytes())
        middle = data.find(b"mdat") + 1500
        data[middle:] = np.random.default_rng(0).integers(0, 256, len(data) - middle, dtype=np.uint8).tobytes()
        path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "There is no file"),
        ("folder", "is a folder"),
        ("empty", "is empty"),
        ("text", "cannot be read as a video"),
        ("plain text file", "(no video stream|cannot be read)"),
        ("sound", r"no video stream \(it holds audio\)"),
        ("cut off before its index", "cut off"),
        ("cut off after its index", r"stops after \d.* video\.end="),
        ("cut off matroska", r"stops after \d.* video\.end="),
        ("damaged", "damaged"),
    ],
)
def test_unusable_files_are_named_with_the_way_out(tmp_path, kind, message):
    path = bad_file(kind, tmp_path)
    with pytest.raises(VideoError, match=message) as caught:
        load_video(path)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_readable_part_of_a_cut_off_file_can_be_used(tmp_path):
    path = bad_file("cut off matroska", tmp_path)
    video = load_video(path, VideoConfig(num_frames=4, end=2.0))
    assert [read_number(frame) for frame in video.frames] == [0, 6, 12, 19]


def test_a_span_after_the_end_is_refused(tmp_path):
    with pytest.raises(VideoError, match=r"video\.start is 9 s, but .*a\.mp4 lasts 3\.00 s"):
        load_video(write_video(tmp_path / "a.mp4"), VideoConfig(start=9.0))


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"num_frames": 0}, "num_frames"),
        ({"fps": 0.0}, "fps"),
        ({"fps": float("nan")}, "fps"),
        ({"start": -1.0}, "start"),
        ({"end": 0.0}, "end"),
        ({"start": 3.0, "end": 2.0}, "end"),
        ({"end": float("nan")}, "end"),
        ({"decoder": "opencv"}, "decoder"),
    ],
)
def test_impossible_values_name_the_key(values, key):
    with pytest.raises(ConfigError, match=rf"video\.{key}"):
        VideoConfig(**values)


def test_decoding_is_recorded_as_a_stage(tmp_path):
    with record() as recorder:
        load_video(write_video(tmp_path / "a.mp4"), VideoConfig(num_frames=2))
    assert recorder.milliseconds["decode_video"] > 0


def test_import_needs_no_decoder_and_says_what_to_install(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    program = f"""
import sys
sys.modules.update(av=None, decord=None, torchcodec=None)
from llava.video import load_video
from llava.errors import VideoError
try:
    load_video({str(path)!r})
except VideoError as error:
    assert "pip install av" in str(error), error
else:
    raise SystemExit("decoded without a decoder")
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_only_the_sampled_frames_are_kept_in_memory(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setitem(
        DECODERS,
        "pyav",
        lambda path, index, wanted: seen.append(wanted) or iter(np.zeros((len(wanted), 2, 2, 3), "u1")),
    )
    load_video(write_video(tmp_path / "a.mp4", 30), VideoConfig(num_frames=4, decoder="pyav"))
    assert [wanted.tolist() for wanted in seen] == [[0, 9, 19, 29]]
