from pathlib import Path
from threading import current_thread

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("lmms_eval", reason="needs the extra `eval`")

from lmms_eval.api.instance import Instance

from eval.standin import write_video
from llava.answer_log import AnswerLog
from llava.config import ModelConfig
from llava.errors import CheckpointError, ConfigError, UserError
from llava.lmms_eval_model import LlavaScissor
from llava.read_ahead import ReadAhead
from llava.token_compression import CompressionConfig, compression
from llava.video import VideoConfig, load_video

CHECKPOINT = Path(__file__).parents[3] / "shared" / "golden" / "ckpt_a"

pytestmark = pytest.mark.skipif(not CHECKPOINT.is_dir(), reason="needs the recorded checkpoint ../shared/golden/ckpt_a")

TENTH = CompressionConfig(retention_ratio=0.1)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for number in range(2):
        frames = np.random.default_rng(number).integers(0, 255, (4, 32, 32, 3), dtype=np.uint8)
        write_video(folder / f"{number}.mp4", frames, fps=4.0)
    return [str(folder / "0.mp4"), str(folder / "1.mp4")]


@pytest.fixture(scope="module")
def lm():
    return LlavaScissor(ModelConfig(path=str(CHECKPOINT), device="cpu"), VideoConfig(num_frames=2))


def request(kind, lm, visuals, text="What is this?", second=None, doc_id=0):
    """An lmms-eval request as its tasks make them, on a document that holds the visuals."""
    lm.task_dict = {"task": {"test": {doc_id: {"visuals": visuals}}}}
    arguments = (text, second, lambda document: document["visuals"], doc_id, "task", "test")
    return Instance(kind, arguments, 0, metadata={"task": "task", "doc_id": doc_id, "repeats": 1})


def generate(lm, visuals, **options):
    options = {"max_new_tokens": 4, "temperature": 0, "do_sample": False, "until": ["\n\n"]} | options
    (answer,) = lm.generate_until([request("generate_until", lm, visuals, second=options)])
    return answer


def test_lmms_eval_finds_the_model():
    from lmms_eval.models import get_model

    assert get_model("llava_scissor") is LlavaScissor


def test_every_sample_logs_its_tokens_and_times(lm, videos, tmp_path):
    forget_videos(lm)
    log = AnswerLog(tmp_path, "s" * 12)
    progress = []
    lm.start(TENTH, log, lambda done, total: progress.append((done, total)))
    answer = generate(lm, videos[:1])
    (key,) = lm.keys["task", 0]
    record = log.get(key)
    assert record["response"] == answer
    (stats,) = record["videos"]
    assert stats["kept_tokens"] == round(0.1 * stats["source_tokens"])
    assert {"decode_video", "vision_tower", "compression", "prefill", "decode"} <= set(record["milliseconds"])
    assert progress == [(1, 1)]
    assert lm.qa.model.token_compression is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ckpt_a", CompressionConfig(method="none")),
        ("ckpt_b", CompressionConfig(similarity_threshold=0.9, error_tolerance=0.05, images=True)),
    ],
)
def test_without_a_compression_the_checkpoint_decides(videos, tmp_path, name, expected):
    lm = LlavaScissor(ModelConfig(path=str(CHECKPOINT.with_name(name)), device="cpu"), VideoConfig(num_frames=2))
    assert lm.compression == expected
    lm.start(None, AnswerLog(tmp_path, "s" * 12))
    generate(lm, videos[:1])
    (key,) = lm.keys["task", 0]
    (stats,) = lm.log.get(key)["videos"]
    assert stats["similarity_threshold"] == expected.similarity_threshold
    assert stats["source_tokens"] == 50


def test_a_logged_answer_is_reused_under_the_same_settings_only(lm, videos, tmp_path, monkeypatch):
    lm.start(TENTH, AnswerLog(tmp_path, "s" * 12))
    answer = generate(lm, videos[:1])
    monkeypatch.setattr(lm.qa, "generate", None)
    lm.start(TENTH, AnswerLog(tmp_path, "s" * 12))
    assert generate(lm, videos[:1]) == answer
    with pytest.raises(TypeError):
        generate(lm, videos[1:])
    with pytest.raises(TypeError):
        generate(lm, videos[:1], max_new_tokens=5)
    lm.start(TENTH, AnswerLog(tmp_path, "t" * 12))
    with pytest.raises(TypeError):
        generate(lm, videos[:1])


def forget_videos(lm):
    """Read anew; gives the list of the videos that are read, and whether ahead."""
    read = []

    def reader(path, config):
        read.append((str(path), current_thread().name.startswith("read-ahead")))
        return load_video(path, config)

    lm.qa.load_video = lm.videos = ReadAhead(reader)
    return read


def test_a_video_is_decoded_once_for_questions_in_a_row(lm, videos):
    lm.start(TENTH)
    read = forget_videos(lm)
    for video in (0, 0, 0, 1, 1):
        generate(lm, [videos[video]])
    assert read == [(videos[0], False), (videos[1], False)]


def test_reading_ahead_changes_no_answer_and_reads_nothing_twice(lm, videos, monkeypatch):
    lm.start(TENTH)
    documents = {number: {"visuals": [str(videos[video])]} for number, video in enumerate((0, 0, 1, 1, 0))}
    options = {"max_new_tokens": 4, "do_sample": False}

    def answers():
        lm.task_dict = {"task": {"test": documents}}
        metadata = {"task": "task", "repeats": 1}
        return lm.generate_until(
            [
                Instance(
                    "generate_until",
                    ("What?", options, lambda document: document["visuals"], number, "task", "test"),
                    0,
                    metadata=metadata | {"doc_id": number},
                )
                for number in documents
            ]
        )

    expected = answers()
    read = forget_videos(lm)
    monkeypatch.setattr(lm, "reads_ahead", True)
    assert answers() == expected
    assert read == [(videos[0], False), (videos[1], True), (videos[0], True)]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_any_number_of_videos(lm, videos, tmp_path, count):
    log = AnswerLog(tmp_path, "s" * 12)
    lm.start(CompressionConfig(retained_tokens=7), log)
    generate(lm, videos[:count])
    (key,) = lm.keys["task", 0]
    assert [stats["kept_tokens"] for stats in log.get(key)["videos"]] == [7] * count


def test_loglikelihood_is_the_loss_of_each_choice_under_compression(lm, videos):
    """lmms-eval takes the choice with the smallest number."""
    choices = ["a red square", "two", "blue"]
    requests = [request("loglikelihood", lm, videos[:1], second=choice) for choice in choices[:2]]
    requests.append(request("loglikelihood", lm, videos[:1], second=lambda document: choices[2]))
    lm.start(TENTH)
    compressed = lm.loglikelihood(requests)
    with compression(lm.qa.model, TENTH):
        assert compressed == [lm.qa.score("What is this?", choice, videos[:1]) for choice in choices]
    assert all(loss > 0 and not greedy for loss, greedy in compressed)  # the weights are random
    lm.start(None)
    assert lm.loglikelihood(requests) != compressed


def test_a_logged_loglikelihood_is_reused(lm, videos, tmp_path, monkeypatch):
    lm.start(TENTH, AnswerLog(tmp_path, "s" * 12))
    scores = lm.loglikelihood([request("loglikelihood", lm, videos[:1], second="two")])
    monkeypatch.setattr(lm.qa, "score", None)
    lm.start(TENTH, AnswerLog(tmp_path, "s" * 12))
    assert lm.loglikelihood([request("loglikelihood", lm, videos[:1], second="two")]) == scores


def test_images_of_a_task_are_answered_and_logged_by_their_pixels(lm, videos, tmp_path, monkeypatch):
    log = AnswerLog(tmp_path, "s" * 12)
    images = [Image.new("RGB", (140, 130), color) for color in ("red", "blue")]
    lm.start(CompressionConfig(retained_tokens=7, images=True), log)
    answer = generate(lm, images[:1])
    assert answer == lm.qa.ask(images[0], "What is this?", compression=lm.compression, max_new_tokens=4).text
    record = log.get(lm.keys["task", 0][0])
    assert record["visuals"][0].startswith("image 140x130 ")
    assert [stats["kept_tokens"] for stats in record["videos"]] == [7]
    generate(lm, [*images, videos[0]])
    assert len(log.get(lm.keys["task", 0][1])["videos"]) == 3

    monkeypatch.setattr(lm.qa, "generate", None)
    lm.start(lm.compression, AnswerLog(tmp_path, "s" * 12))
    assert generate(lm, [images[0].copy()]) == answer
    with pytest.raises(TypeError):
        generate(lm, images[1:])


def test_other_visuals_and_tasks_of_several_rounds_are_user_errors(lm):
    with pytest.raises(UserError, match="ndarray"):
        generate(lm, [np.zeros((4, 4, 3))])
    with pytest.raises(UserError, match="several rounds"):
        lm.generate_until_multi_round([])


def test_a_video_that_the_data_lack_is_a_user_error(lm):
    def leave(_):
        raise SystemExit("video path:/data/x.mp4 does not exist")

    missing = request("generate_until", lm, [], second={"max_new_tokens": 1})
    missing.arguments = (*missing.arguments[:2], leave, *missing.arguments[3:])
    with pytest.raises(UserError, match=r"document 0.*x\.mp4.*HF_HOME"):
        lm.generate_until([missing])


def test_the_argument_string_sorts_names_into_sections(tmp_path):
    arguments = f"pretrained={CHECKPOINT},num_frames=2,retention_ratio=0.5,temporal=False,log_dir={tmp_path}"
    lm = LlavaScissor.create_from_arg_string(arguments, {"device": "cpu", "batch_size": 1, "max_batch_size": None})
    assert lm.compression == CompressionConfig(retention_ratio=0.5, temporal=False)
    assert lm.log is not None
    assert lm.device.type == "cpu"


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ("pretrained=x,retention_ration=0.1", ConfigError, "retention_ratio"),
        ("pretrained=x,retention_ratio=2", ConfigError, "at most 1"),
        ("pretrained=x,temporal=False", ConfigError, "exactly one|need one of"),
        ("pretrained=x,num_frames=many", ConfigError, "num_frames"),
        ("pretrained=./nowhere", CheckpointError, "nowhere"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, words):
    with pytest.raises(error, match=words):
        LlavaScissor.create_from_arg_string(arguments)


def test_a_larger_batch_is_refused():
    with pytest.raises(ConfigError, match="batch_size"):
        LlavaScissor.create_from_arg_string("pretrained=x", {"batch_size": 8})
