"""Stages and who times them. CUDA is a stand-in here: events on a queue whose clock the test holds."""

import pytest
import torch

from llava import instrument
from llava.instrument import record, stage

CUDA = torch.device("cuda:0")


@pytest.fixture
def cuda(monkeypatch):
    """A list of what is asked of the device. Each event is a tick later than the one before."""
    calls = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            calls.append("event")
            self.tick = calls.count("event")

        def synchronize(self):
            calls.append("wait")

        def elapsed_time(self, end):
            return float(end.tick - self.tick)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("synchronise"))
    return calls


def test_device_events_synchronise_nothing_inside_the_block(cuda):
    with record(events=True) as recorder:
        with stage("prefill", CUDA), stage("compression", CUDA):
            pass
        with stage("compression", CUDA):
            pass
        with stage("preprocess"):
            pass
        assert cuda == ["event"] * 6
        assert "prefill" not in recorder.milliseconds
    assert (recorder.milliseconds["prefill"], recorder.milliseconds["compression"]) == (3, 2)
    assert recorder.milliseconds["preprocess"] >= 0
    assert cuda[6:] == ["wait"] * 3


def test_without_events_the_device_is_synchronised_at_both_ends(cuda):
    with record() as recorder, stage("prefill", CUDA):
        assert cuda == ["synchronise"]
    assert cuda == ["synchronise"] * 2
    assert set(recorder.milliseconds) == {"prefill"}


def test_a_stage_without_a_recorder_asks_nothing_of_the_device(cuda):
    with stage("prefill", CUDA):
        pass
    assert (cuda, instrument.active()) == ([], None)


def test_a_stage_within_the_same_stage_is_counted_once(cuda):
    with record(events=True) as recorder:
        with stage("compression", CUDA), stage("compression", CUDA):
            pass
        with pytest.raises(KeyError), stage("compression", CUDA):
            raise KeyError
        with stage("compression", CUDA):
            pass
    assert recorder.milliseconds["compression"] == 2
