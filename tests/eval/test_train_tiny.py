"""Training of the tiny model: all stages, interrupted or not, give the same checkpoint, which loads and answers."""

import argparse
import dataclasses

import pytest
import torch

from eval import train_tiny
from eval.export_tiny import export
from eval.tiny_model import SIZES, TinySize
from eval.tiny_stages import STAGES, schedule
from eval.train_tiny import Trainer
from llava.pipeline import VideoQA


@pytest.fixture(autouse=True)
def short_stages(monkeypatch):
    """Three steps of two videos per stage, with a snapshot after each."""
    short = {name: dataclasses.replace(stage, steps=3, videos=2) for name, stage in STAGES.items()}
    monkeypatch.setattr(train_tiny, "STAGES", short)
    monkeypatch.setattr("eval.tiny_lessons.STAGES", short)
    monkeypatch.setattr("eval.export_tiny.STAGES", short)
    monkeypatch.setattr(train_tiny, "SNAPSHOT_SECONDS", -1.0)
    monkeypatch.setitem(SIZES, "small", TinySize(width=64, frames=4, grid=6))
    monkeypatch.setitem(SIZES, "wider", TinySize(width=96, frames=4, grid=6))


def trainer(out, seed=0, until=None, size="small"):
    out.mkdir(exist_ok=True)
    arguments = argparse.Namespace(out=str(out), size=size, seed=seed, workers=1, device="cpu", until=until)
    return Trainer(arguments, rank=0)


@pytest.fixture
def finished(tmp_path):
    whole = trainer(tmp_path / "whole")
    whole.run()
    return whole


def test_an_interrupted_run_gives_the_same_weights(tmp_path, finished):
    interrupted = trainer(tmp_path / "parts")
    real_loss = interrupted.lessons.loss

    def stop_at_second_step(stage, step):
        if (stage, step) == ("lm", 1):
            raise KeyboardInterrupt
        return real_loss(stage, step)

    interrupted.lessons.loss = stop_at_second_step
    with pytest.raises(KeyboardInterrupt):
        interrupted.run()
    resumed = trainer(tmp_path / "parts")
    resumed.run()
    weights = dict(resumed.lessons.everything.named_parameters())
    for name, expected in finished.lessons.everything.named_parameters():
        assert torch.equal(weights[name], expected), name


def test_a_run_stops_where_it_is_told_to(tmp_path):
    trainer(tmp_path / "run", until="memory").run()
    assert sorted(path.name for path in (tmp_path / "run").glob("*.pt")) == ["memory.pt", "tower.pt"]


@pytest.mark.parametrize("other", [{"seed": 1}, {"size": "wider"}])
def test_a_snapshot_of_another_model_is_refused(tmp_path, finished, other):
    with pytest.raises(SystemExit, match="belongs to a run with other settings"):
        trainer(tmp_path / "whole", **other).run()


def test_each_stage_changes_only_its_own_parameters(tmp_path):
    run = trainer(tmp_path / "run")
    lessons = run.lessons
    for stage in ("tower", "memory", "words", "align"):
        before = {name: p.detach().clone() for name, p in lessons.everything.named_parameters()}
        run.fit(stage)
        trained = {name for name, _ in lessons.trainable(stage)}
        changed = {name for name, p in lessons.everything.named_parameters() if not torch.equal(p, before[name])}
        assert changed
        assert changed <= trained


def test_the_exported_checkpoint_is_the_trained_model(tmp_path, finished):
    target = tmp_path / "checkpoint"
    export(tmp_path / "whole", target, videos=2)
    loaded = VideoQA.from_pretrained(target, device="cpu").model
    trained = dict(finished.lessons.model.named_parameters())
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, trained[name]), name
    assert (loaded.config.mm_num_frames, loaded.config.hidden_size) == (4, 64)
    card = (target / "README.md").read_text()
    assert "| **all, four options** |" in card
    assert "--size small --seed 0 --workers 1` repeats it" in card


def test_learning_rate_warms_up_and_ends_at_zero():
    stage = STAGES["lm"]
    rates = [schedule(step, stage) for step in range(stage.steps + 1)]
    assert rates[0] == pytest.approx(1 / stage.warmup)
    assert max(rates) == 1.0
    assert rates[-1] == 0.0
    assert all(a >= b for a, b in zip(rates[stage.warmup :], rates[stage.warmup + 1 :], strict=False))


@pytest.mark.parametrize("arguments", [["--until", "nonsense"], ["--seed", "x"]])
def test_wrong_arguments_are_named(arguments, capsys):
    with pytest.raises(SystemExit):
        train_tiny.main(arguments)
    assert arguments[1] in capsys.readouterr().err
