import os

import pytest

from llava.answer_log import AnswerLog, question_key, settings_fingerprint
from llava.errors import UserError

SETTINGS = "0123456789abcdef"


def test_every_process_reads_what_all_have_written(tmp_path):
    AnswerLog(tmp_path, SETTINGS, rank=0).add("a", {"response": "A"})
    AnswerLog(tmp_path, SETTINGS, rank=1).add("b", {"response": "B"})
    log = AnswerLog(tmp_path, SETTINGS, rank=0)
    assert log.get("a")["response"] == "A"
    assert log.get("b")["response"] == "B"
    assert log.get("c") is None


def test_other_settings_share_nothing(tmp_path):
    AnswerLog(tmp_path, SETTINGS).add("a", {"response": "A"})
    assert AnswerLog(tmp_path, SETTINGS[::-1]).get("a") is None


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_line_that_was_cut_off_costs_only_itself(tmp_path, cut):
    log = AnswerLog(tmp_path, SETTINGS)
    log.add("a", {"response": "A"})
    log.add("b", {"response": "B"})
    (path,) = tmp_path.glob("*.jsonl")
    path.write_bytes(path.read_bytes()[:-cut])
    log = AnswerLog(tmp_path, SETTINGS)
    assert log.get("a")["response"] == "A"
    log.add("c", {"response": "C"})
    log = AnswerLog(tmp_path, SETTINGS)
    assert (log.get("a")["response"], log.get("c")["response"]) == ("A", "C")
    assert (log.get("b") is None) == (cut > 1)


def test_a_file_in_the_way_is_a_user_error(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="taken"):
        AnswerLog(tmp_path / "taken", SETTINGS)


def test_settings_fingerprint_follows_settings_and_checkpoint_files(tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"1")
    first = settings_fingerprint("a", model_path=str(tmp_path))
    assert first == settings_fingerprint("a", model_path=str(tmp_path))
    assert first != settings_fingerprint("b", model_path=str(tmp_path))
    weights.write_bytes(b"12")
    assert first != settings_fingerprint("a", model_path=str(tmp_path))


def test_question_key_follows_prompt_options_and_file(tmp_path):
    video = tmp_path / "video.mp4"
    video.write_bytes(b"1")
    arguments = ("generate_until", "What?", {"max_new_tokens": 16}, [str(video)])
    key = question_key(*arguments)
    assert key == question_key(*arguments)
    assert key != question_key("loglikelihood", *arguments[1:])
    assert key != question_key("generate_until", "Who?", *arguments[2:])
    assert key != question_key("generate_until", "What?", {}, [str(video)])
    assert key != question_key(*arguments[:3], [])
    os.utime(video, (0, 0))
    assert key != question_key(*arguments)
