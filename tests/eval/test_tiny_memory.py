"""The dense targets of the language model's visual tokens agree with what the scenes hold, object by object."""

import pytest
import torch
from torch import nn

from eval.tiny_memory import (
    EVERY_FRAME,
    FRAME_HEADS,
    IGNORED,
    MIN_COVER,
    NAME_HEADS,
    NAMES,
    TOKEN_HEADS,
    MemoryHeads,
    memory_targets,
    name_targets,
)
from eval.world import (
    CANVAS,
    COLORS,
    NEVER,
    SHAPES,
    Split,
    draw_scenes,
    frame_times,
    object_cover,
    seed_for,
    visible,
)

GRID, FRAMES = 5, 8


def classes_of(heads):
    return {name: FRAMES if classes == EVERY_FRAME else classes for name, classes in heads.items()}


@pytest.fixture(scope="module")
def world():
    scenes = draw_scenes(48, seed_for(Split.DEV, 6, 0))
    times = frame_times(scenes, FRAMES)
    return scenes, times, memory_targets(scenes, times, GRID)


def test_targets_have_the_shapes_and_classes_of_the_heads(world):
    scenes, _, targets = world
    assert set(targets) == set(TOKEN_HEADS) | set(FRAME_HEADS)
    for name, classes in classes_of(TOKEN_HEADS).items():
        assert targets[name].shape == (len(scenes), FRAMES, GRID * GRID), name
        assert {*targets[name].unique().tolist()} <= {*range(classes), IGNORED}, name
        assert len(targets[name].unique()) > 3, name
    for name in ("gone_shape", "gone_color", "newest_shape", "newest_color", "count"):
        assert targets[name].shape == (len(scenes), FRAMES), name
        assert {*targets[name].unique().tolist()} <= {*range(FRAME_HEADS[name])}, name
        assert len(targets[name].unique()) > 3, name


def test_tokens_are_asked_about_the_object_that_they_show(world):
    scenes, times, targets = world
    cover = object_cover(scenes, times, GRID, samples=8)
    there = visible(scenes, times)
    checked = 0
    for b, f, p in (cover.amax(2) > MIN_COVER).nonzero().tolist():
        o = int(cover[b, f, :, p].argmax())
        first = int(there[b, :, o].nonzero()[0])
        assert targets["age"][b, f, p] == first
        assert targets["time"][b, f, p] == f
        assert targets["motion"][b, f, p] == (int(scenes.motion[b, o]) if f - first >= FRAMES // 4 else IGNORED)
        assert targets["first_color"][b, f, p] == scenes.color[b, o]
        x, y = (scenes.start[b, o] + scenes.shift[b, o] * times[b, first] - CANVAS / 2).tolist()
        clear = min(abs(x), abs(y)) >= 0.07 * CANVAS
        assert targets["origin"][b, f, p] == (2 * (y > 0) + (x > 0) if clear else IGNORED)
        checked += 1
    assert checked > 1000
    assert (targets["age"][cover.amax(2) <= MIN_COVER] == IGNORED).all()


def test_frames_are_asked_who_came_last_and_who_is_gone(world):
    scenes, times, targets = world
    for b in range(len(scenes)):
        objects = range(int(scenes.count[b]))
        for f, time in enumerate(times[b].tolist()):
            came = {o: float(scenes.appear[b, o]) for o in objects if 0 < scenes.appear[b, o] <= time}
            newest = max(came, key=came.__getitem__) if came else None
            gone = [o for o in objects if scenes.vanish[b, o] <= time]
            assert len(gone) <= 1
            for what, values, none in (("shape", scenes.shape, len(SHAPES)), ("color", scenes.color, len(COLORS))):
                assert targets[f"newest_{what}"][b, f] == (none if newest is None else values[b, newest])
                assert targets[f"gone_{what}"][b, f] == (values[b, gone[0]] if gone else none)
            assert targets["count"][b, f] + 1 == sum(float(scenes.appear[b, o]) <= time for o in objects)


def test_what_is_seen_never_shrinks_and_contains_what_is_there(world):
    _, _, targets = world
    assert (targets["seen"] >= targets["there"]).all()
    assert (targets["seen"].diff(dim=1) >= 0).all()
    assert (targets["there"][..., : len(SHAPES)].sum(-1) >= 1).any()


def test_names_are_asked_about_the_one_object_that_bears_them(world):
    scenes, times, _ = world
    targets = name_targets(scenes, times)
    there = visible(scenes, times)
    assert set(targets) == set(NAME_HEADS)
    for b in range(len(scenes)):
        bearers = {}
        for o in range(int(scenes.count[b])):
            bearers[SHAPES[scenes.shape[b, o]]] = o
            if scenes.change[b, o] == NEVER:
                bearers[COLORS[scenes.color[b, o]]] = o
        for n, name in enumerate(NAMES):
            o = bearers.get(name)
            if o is None:
                assert all(targets[head][b, n] == IGNORED for head in NAME_HEADS), name
                continue
            first, *_, last = there[b, :, o].nonzero().flatten().tolist()
            assert targets["its_shape"][b, n] == scenes.shape[b, o]
            assert targets["its_color"][b, n] == scenes.color[b, o]
            assert targets["its_motion"][b, n] == scenes.motion[b, o]
            assert targets["its_age"][b, n] == first
            changed = scenes.change[b, o] <= times[b, last]
            assert targets["its_last_color"][b, n] == (scenes.new_color if changed else scenes.color)[b, o]
            for head, frame in (("its_origin", first), ("its_last_place", last)):
                x, y = (scenes.start[b, o] + scenes.shift[b, o] * times[b, frame] - CANVAS / 2).tolist()
                clear = min(abs(x), abs(y)) >= 0.07 * CANVAS
                assert targets[head][b, n] == (2 * (y > 0) + (x > 0) if clear else IGNORED)


def test_heads_that_know_the_answer_have_no_loss_and_full_accuracy(world):
    """With one-hot hidden states and the heads that read them off, loss vanishes and every accuracy is 1."""
    _, _, targets = world
    parts, rows = [], {}
    for name, classes in classes_of(TOKEN_HEADS | FRAME_HEADS).items():
        target = targets[name]
        if name in ("there", "seen"):
            code = 2.0 * target - 1
        else:
            code = nn.functional.one_hot(target.clamp(min=0), classes).float()
        if name in FRAME_HEADS:
            code = code[:, :, None].expand(-1, -1, GRID * GRID, -1)
        rows[name] = slice(sum(p.shape[-1] for p in parts), sum(p.shape[-1] for p in parts) + classes)
        parts.append(code)
    hidden = torch.cat(parts, -1)
    heads = MemoryHeads(hidden.shape[-1], FRAMES)
    for name, head in [*heads.token.items(), *heads.frame.items()]:
        head.weight.data.zero_()
        head.bias.data.zero_()
        head.weight.data[:, rows[name]] = 100 * torch.eye(head.out_features)
    loss, accuracies = heads(hidden, targets)
    assert loss < 1e-6
    assert set(accuracies.values()) == {1.0}
