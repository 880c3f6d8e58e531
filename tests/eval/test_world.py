"""The procedural world: seeds, geometry and labels agree with each other."""

import numpy as np
import pytest
import torch

from eval.world import (
    _PALETTE,
    CANVAS,
    COLORS,
    LABEL_GROUPS,
    NEVER,
    SHAPES,
    Split,
    draw_scenes,
    frame_times,
    patch_labels,
    render,
    seed_for,
    visible,
)


def test_splits_never_share_a_seed():
    corners = [0, 1, 2**16 - 1]
    indices = [0, 1, 2**32 - 1]
    seeds = [seed_for(split, seed, index) for split in Split for seed in corners for index in indices]
    assert len(set(seeds)) == len(seeds)
    # Each split's seeds fill a range of their own: the largest of one is below the smallest of the next.
    for lower, higher in zip(list(Split), list(Split)[1:], strict=False):
        assert seed_for(lower, 2**16 - 1, 2**32 - 1) < seed_for(higher, 0, 0)


def test_scenes_of_different_seeds_differ_whatever_part_of_the_seed_does():
    """A generator that looks at the low bits alone would draw one scene for all of these."""
    seeds = [seed_for(split, seed, index) for split in Split for seed in (0, 1, 300) for index in (0, 5, 2**30)]
    starts = [tuple(draw_scenes(1, seed).start.flatten().tolist()) for seed in seeds]
    assert len(set(starts)) == len(seeds)
    times = torch.tensor([[0.0]])
    scene = draw_scenes(1, 0)
    noises = {render(scene, times, 8, seed).sum().item() for seed in seeds}
    assert len(noises) == len(seeds)


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (2**16, 0), (0, 2**32), (0, -1)])
def test_seeds_outside_their_range_are_refused(seed, index):
    with pytest.raises(ValueError, match="must lie in"):
        seed_for(Split.TRAIN, seed, index)


def test_a_seed_gives_the_same_scenes_and_frames():
    first, second = (draw_scenes(4, seed_for(Split.DEV, 0, 3)) for _ in range(2))
    times = frame_times(first, 8)
    assert torch.equal(render(first, times, 40, seed=5), render(second, times, 40, seed=5))
    other = draw_scenes(4, seed_for(Split.DEV, 0, 4))
    assert not torch.equal(first.start, other.start)


def test_objects_stay_inside_the_canvas():
    scenes = draw_scenes(200, seed_for(Split.DEV, 1, 0))
    for end in (scenes.start, scenes.start + scenes.shift):
        assert (end - scenes.radius[..., None] >= 0).all()
        assert (end + scenes.radius[..., None] <= CANVAS).all()


def test_objects_of_a_scene_differ_in_color_and_shape():
    scenes = draw_scenes(200, seed_for(Split.DEV, 1, 1))
    for row in range(len(scenes)):
        count = int(scenes.count[row])
        colors = scenes.color[row, :count].tolist() + scenes.new_color[row, :1].tolist()
        assert len(set(colors)) == count + 1
        assert len(set(scenes.shape[row, :count].tolist())) == count


def test_times_are_those_of_truncated_linspace():
    scenes = draw_scenes(64, seed_for(Split.DEV, 1, 2))
    times = frame_times(scenes, 8)
    for row, length in enumerate(scenes.frame_count.tolist()):
        expected = np.linspace(0, length - 1, 8, dtype=int) / (length - 1)
        assert torch.allclose(times[row], torch.tensor(expected, dtype=torch.float32))


def test_every_event_separates_the_sampled_frames():
    """Whatever the length of the video, eight uniform frames show both sides of every event, in the same place."""
    scenes = draw_scenes(500, seed_for(Split.DEV, 1, 3))
    times = frame_times(scenes, 8)
    grid = torch.arange(8) / 7
    for name in ("appear", "vanish", "change"):
        event = getattr(scenes, name)[:, None]  # (B, 1, O)
        assert torch.equal(times[..., None] >= event, (grid[:, None] >= event))
    there = visible(scenes, times)
    exists = torch.arange(there.shape[-1]) < scenes.count[:, None]
    assert torch.equal(there.any(1), exists)


def test_labels_describe_the_rendered_patch():
    """Where a label says that a patch lies wholly in one color, the rendered pixels have that color."""
    scenes = draw_scenes(16, seed_for(Split.DEV, 1, 4))
    scenes.noise[:] = 0
    scenes.tint[:] = 0
    times = frame_times(scenes, 8)
    labels = patch_labels(scenes, times, grid=10)
    color = labels[..., : len(COLORS)]
    frames = render(scenes, times, 80)  # (B, F, 3, 80, 80)
    patches = frames.unflatten(-1, (10, 8)).unflatten(-3, (10, 8))  # (B, F, 3, 10, 8, 10, 8)
    means = patches.mean((4, 6)).flatten(3).transpose(2, 3)  # (B, F, 100, 3)
    full = color > 0.99
    assert full.any(0).any(0).any(0).sum() == len(COLORS)
    nearest = torch.cdist(means[full.any(-1)], _PALETTE).argmin(-1)
    assert torch.equal(nearest, full.float().argmax(-1)[full.any(-1)])


def test_coverages_add_up():
    scenes = draw_scenes(32, seed_for(Split.DEV, 1, 5))
    color, shape, background, small = patch_labels(scenes, frame_times(scenes, 8), 10).split(
        list(LABEL_GROUPS.values()), -1
    )
    total = color.sum(-1) + background.sum(-1)
    assert torch.allclose(total, torch.ones_like(total))
    assert torch.allclose(color.sum(-1), shape.sum(-1))
    assert (small[..., 0] <= color.sum(-1) + 1e-6).all()
    assert shape.shape[-1] == len(SHAPES)
    assert (scenes.vanish[scenes.vanish < NEVER] < 1).all()
