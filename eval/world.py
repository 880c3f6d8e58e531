"""A procedural world of short videos in which every fact is known by construction.

A scene holds one to four objects of different shape and color on a textured, noisy, drifting background. Objects move
or stay, appear and disappear, one may change its color, one may be small, and the background may be cut to another
one. Time runs from 0 (first frame) to 1 (last frame), so a scene can be shown at any number of frames and any size.

Everything is a function of a 63-bit seed whose top byte is the split: training, development and evaluation scenes
do not coincide. (NumPy draws, as PyTorch's generator on the CPU looks at no more than the low 32 bits of a seed.)
Scenes are drawn and rendered in batches, as tensors:

    scenes = draw_scenes(64, seed_for(Split.TRAIN, 0, step))
    times = frame_times(scenes, frames=8)           # (B, F): when a model that samples 8 frames looks
    frames = render(scenes, times, size=80)         # (B, F, 3, 80, 80) in [0, 1]
    labels = patch_labels(scenes, times, grid=10)   # what each patch shows: the target of the vision tower
"""

import enum
import math
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SHAPES = ("circle", "square", "triangle", "cross")
MOTIONS = ("still", "left", "right", "up", "down")
BACKGROUNDS = ("plain", "striped", "checked", "dotted")
PLACES = ("top-left", "top-right", "bottom-left", "bottom-right")
MAX_OBJECTS = 4

CANVAS = 80.0
"""Side of the square canvas in world units; radii, positions and displacements below are in these units."""

STEP = 1 / 7
"""Events lie halfway between multiples of this, so that a model which samples eight frames sees each on one side."""

NEVER = 2.0

_PALETTE = torch.tensor(
    [
        [0.88, 0.10, 0.10],
        [0.98, 0.55, 0.05],
        [0.97, 0.93, 0.15],
        [0.10, 0.68, 0.15],
        [0.10, 0.85, 0.88],
        [0.12, 0.20, 0.90],
        [0.50, 0.12, 0.70],
        [0.98, 0.55, 0.78],
    ]
)
_DIRECTIONS = torch.tensor([[0.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0]])  # y points down


class Split(enum.IntEnum):
    """The top byte of every seed: what is trained on is never measured on."""

    TRAIN = 1
    DEV = 2
    EVAL = 3


def seed_for(split: Split, seed: int, index: int) -> int:
    """A 63-bit seed for scene or batch `index` (up to 2**32) of run `seed` (up to 2**16) in `split`."""
    if not (0 <= seed < 1 << 16 and 0 <= index < 1 << 32):
        raise ValueError(f"seed {seed} must lie in [0, 2**16) and index {index} in [0, 2**32)")
    return int(split) << 55 | seed << 32 | index


@dataclass
class Scenes:
    """A batch of B scenes with up to O = 4 objects; times are in [0, 1], lengths in canvas units.

    count (B,): objects; frame_count (B,): frames of the video; color, new_color, shape, motion (B, O): indices into
    the tuples above; radius (B, O); small (B, O) bool; start, shift (B, O, 2): position at time 0 and displacement
    over the whole video; appear, vanish, change (B, O): event times, NEVER if there is none (appear: -1);
    background (B, 2) and backdrop (B, 2, 10): pattern and its parameters before and after the cut; cut (B,);
    tint (B, O, 3): color jitter; noise (B,): standard deviation of the pixel noise.
    """

    count: Tensor
    frame_count: Tensor
    color: Tensor
    new_color: Tensor
    shape: Tensor
    motion: Tensor
    radius: Tensor
    small: Tensor
    start: Tensor
    shift: Tensor
    appear: Tensor
    vanish: Tensor
    change: Tensor
    background: Tensor
    backdrop: Tensor
    cut: Tensor
    tint: Tensor
    noise: Tensor

    def __len__(self) -> int:
        return len(self.count)

    def __getitem__(self, rows: slice) -> "Scenes":
        return Scenes(*(getattr(self, field.name)[rows] for field in fields(self)))


def draw_scenes(batch: int, seed: int, min_objects: int = 1) -> Scenes:
    """Draw `batch` scenes from `seed`. Every tensor is on the CPU."""
    rng = np.random.default_rng(seed)
    o = MAX_OBJECTS

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.from_numpy(rng.random(shape, dtype=np.float32))

    def permutations(rows: int, values: int) -> Tensor:
        return uniform(rows, values).argsort(1)

    weights = np.array([0.10, 0.25, 0.35, 0.30])
    weights[: min_objects - 1] = 0
    count = 1 + torch.from_numpy(rng.choice(o, batch, p=weights / weights.sum()))
    exists = torch.arange(o) < count[:, None]  # (B, O)
    colors = permutations(batch, len(COLORS))  # the first O are the objects', the fifth is the new color of a change
    small = torch.zeros(batch, o, dtype=torch.bool)
    small[torch.arange(batch), (uniform(batch) * count).long()] = uniform(batch) < 0.4
    radius = torch.where(small, uniform(batch, o, low=4.6, high=5.4), uniform(batch, o, low=9.0, high=11.5))

    # Motion: one of four directions or still; the path stays inside the canvas.
    motion = torch.where(uniform(batch, o) < 0.25, 0, 1 + (uniform(batch, o) * 4).long())
    travel = uniform(batch, o, low=34, high=44) * (motion > 0)
    shift = _DIRECTIONS[motion] * travel[..., None]  # (B, O, 2)
    start = _place(count, radius, shift, uniform)

    # Events. In half of the scenes objects appear one after another, two steps or more apart.
    slots = permutations(batch, 3)[:, :2] * 2 + 1  # two of {1, 3, 5}: appearances of at most two objects
    appears = (uniform(batch) < 0.55) & (count > 1)
    late = permutations(batch, o)  # which objects appear late, among those that exist
    rank = torch.where(exists, late, o + late).argsort(1).argsort(1)  # 0, 1, ... over existing objects
    late_count = torch.minimum(1 + (uniform(batch) < 0.6).long(), count - 1)
    is_late = appears[:, None] & (rank < late_count[:, None])
    slot = slots.gather(1, rank.clamp(max=1))
    appear = torch.where(is_late, (slot - 0.5) * STEP, -1.0)
    vanishes = (uniform(batch) < 0.35) & (count > 1)
    is_vanish = vanishes[:, None] & (rank == count[:, None] - 1)  # never one that appears late
    vanish = torch.where(is_vanish, (3 + (uniform(batch, 1) * 3).long() + 0.5) * STEP, NEVER)
    changes = uniform(batch) < 0.4
    is_change = changes[:, None] & (rank == (count[:, None] - 2).clamp(min=0)) & ~is_vanish & ~is_late
    change = torch.where(is_change, (2 + (uniform(batch, 1) * 4).long() + 0.5) * STEP, NEVER)

    cuts = uniform(batch) < 0.4
    patterns = permutations(batch, len(BACKGROUNDS))[:, :2]
    patterns[:, 1] = torch.where(cuts, patterns[:, 1], patterns[:, 0])
    cut = torch.where(cuts, (2 + (uniform(batch) * 4).long() + 0.5) * STEP, NEVER)

    lengths = torch.where(uniform(batch) < 0.2, 8, 16 + (uniform(batch) * 49).long())
    return Scenes(
        count=count,
        frame_count=lengths,
        color=colors[:, :o],
        new_color=colors[:, o : o + 1].expand(-1, o),
        shape=permutations(batch, len(SHAPES)),
        motion=motion,
        radius=radius,
        small=small & exists,
        start=start,
        shift=shift,
        appear=appear,
        vanish=vanish,
        change=change,
        background=patterns,
        backdrop=uniform(batch, 2, 10),
        cut=cut,
        tint=uniform(batch, o, 3, low=-0.05, high=0.05),
        noise=uniform(batch, low=0.01, high=0.05),
    )


def _place(count: Tensor, radius: Tensor, shift: Tensor, uniform) -> Tensor:
    """Starting points (B, O, 2): of eight random placements the one whose objects overlap least over time."""
    batch, o = radius.shape
    tries = 8
    low = radius[..., None] + 1 + (-shift).clamp(min=0)  # (B, O, 2)
    high = CANVAS - radius[..., None] - 1 - shift.clamp(min=0)
    start = low + (high - low) * uniform(tries, batch, o, 2)
    times = torch.linspace(0, 1, 5)
    path = start[..., None, :] + shift[..., None, :] * times[:, None]  # (tries, B, O, 5, 2)
    gap = (path[:, :, :, None] - path[:, :, None]).norm(dim=-1) - (radius[..., None] + radius[:, None])[..., None]
    exists = torch.arange(o) < count[:, None]
    pairs = (exists[:, :, None] & exists[:, None]).triu(1)[..., None]  # (B, O, O, 1)
    overlap = ((1 - gap).clamp(min=0) * pairs).sum((2, 3, 4))  # (tries, B)
    return start[overlap.argmin(0), torch.arange(batch)]


def frame_times(scenes: Scenes, frames: int) -> Tensor:
    """Times (B, F) of `frames` frames sampled uniformly: linspace over the frame indices, truncated."""
    last = (scenes.frame_count - 1).double()[:, None]
    index = (torch.arange(frames) * last / (frames - 1)).floor()
    return (index / last).float()


def visible(scenes: Scenes, times: Tensor) -> Tensor:
    """(B, F, O) bool: which objects are there at `times` (B, F)."""
    exists = torch.arange(MAX_OBJECTS) < scenes.count[:, None]
    t = times[..., None]
    return exists[:, None] & (t >= scenes.appear[:, None]) & (t < scenes.vanish[:, None])


def object_centres(scenes: Scenes, times: Tensor) -> Tensor:
    """(B, F, O, 2): where the objects are at `times` (B, F), there or not."""
    return scenes.start[:, None] + scenes.shift[:, None] * times[..., None, None]


def quadrants(points: Tensor) -> Tensor:
    """Index into PLACES of points (..., 2) that lie clearly inside a quadrant, -100 for the others."""
    offset = points - CANVAS / 2
    clear = offset.abs().amin(-1) >= 0.07 * CANVAS
    return torch.where(clear, 2 * (offset[..., 1] > 0).long() + (offset[..., 0] > 0).long(), -100)


def _coverage(scenes: Scenes, times: Tensor, size: int) -> Tensor:
    """(B, F, O, size, size) in [0, 1]: how much of each pixel the object covers, occlusion not yet applied."""
    scale = size / CANVAS
    centre = object_centres(scenes, times)
    axis = torch.arange(size) + 0.5
    # The four objects of a scene have the four shapes in some order: one formula each, then back to object order.
    order = scenes.shape.argsort(1)  # the object that has shape k
    distances = []
    for k, distance in enumerate((_circle, _square, _triangle, _cross)):
        rows, which = torch.arange(len(scenes)), order[:, k]
        x = axis - centre[rows, :, which, 0, None] * scale  # (B, F, size)
        y = axis - centre[rows, :, which, 1, None] * scale
        radius = (scenes.radius[rows, which] * scale)[:, None, None, None]
        distances.append(distance(x[..., None, :], y[..., :, None], radius))  # (B, F, size, size)
    there = visible(scenes, times)  # (B, F, O)
    covered = [torch.stack([distances[k][row] for row, k in enumerate(shapes)]) for shapes in scenes.shape.T.tolist()]
    return (0.5 - torch.stack(covered, 2)).clamp_(0, 1) * there[..., None, None]


def _circle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return (x.square() + y.square()).sqrt() - r


def _square(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.88 * r


def _triangle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return torch.maximum(y - 0.6 * r, 0.866 * x.abs() - (0.5 * y + 0.6 * r))  # pointing up; y points down


def _cross(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    ax, ay = x.abs(), y.abs()
    return torch.minimum(torch.maximum(ax - r, ay - 0.36 * r), torch.maximum(ax - 0.36 * r, ay - r))


def object_colors(scenes: Scenes, times: Tensor) -> Tensor:
    """(B, F, O) color index at `times` (B, F)."""
    changed = times[..., None] >= scenes.change[:, None]
    return torch.where(changed, scenes.new_color[:, None], scenes.color[:, None])


def _backgrounds(scenes: Scenes, times: Tensor, size: int) -> Tensor:
    """(B, F, 3, size, size): low-contrast gray patterns that drift."""
    after = (times >= scenes.cut[:, None]).long()  # (B, F)
    rows = torch.arange(len(scenes))[:, None]
    p = scenes.backdrop[rows, after][..., None]  # (B, F, 10, 1)
    pattern = scenes.background[rows, after][..., None, None]
    axis = (torch.arange(size) + 0.5) * (CANVAS / size)
    x = axis + 14 * (p[:, :, 0] - 0.5) * times[..., None]  # (B, F, size)
    y = axis + 14 * (p[:, :, 1] - 0.5) * times[..., None]
    frequency = 2 * math.pi / (9 + 5 * p[:, :, 2])
    angle = math.pi * p[:, :, 3]

    def wave(f: Tensor) -> Tensor:  # sin(f (x cos a + y sin a)) from sines of x and of y alone
        u, v = (f * torch.cos(angle) * x)[..., None, :], (f * torch.sin(angle) * y)[..., :, None]
        return torch.sin(u) * torch.cos(v) + torch.cos(u) * torch.sin(v)

    fx, fy = (frequency * x)[..., None, :], (frequency * y)[..., :, None]
    plain = 0.6 * wave(frequency / 6)
    striped = wave(frequency).sign_()
    checked = torch.sign(torch.sin(fx)) * torch.sign(torch.sin(fy))
    dotted = torch.where(torch.cos(fx) + torch.cos(fy) > 1.0, 1.0, -0.4)
    kinds = (plain, striped, checked, dotted)
    chosen = torch.where(pattern < 2, torch.where(pattern == 0, *kinds[:2]), torch.where(pattern == 2, *kinds[2:]))
    p = p[..., None]
    level = 0.35 + 0.3 * p[:, :, 4] + (0.06 + 0.05 * p[:, :, 5]) * chosen  # (B, F, size, size)
    hue = 0.06 * (p[:, :, 6:9] - 0.5)  # (B, F, 3, 1, 1)
    return level[:, :, None] + hue


def render(scenes: Scenes, times: Tensor, size: int, seed: int = 0) -> Tensor:
    """Frames (B, F, 3, size, size), float32 in [0, 1], at `times` (B, F); `seed` draws the pixel noise."""
    cover = _coverage(scenes, times, size)
    colors = (_PALETTE[object_colors(scenes, times)] + scenes.tint[:, None]).clamp(0, 1)  # (B, F, O, 3)
    frames = _backgrounds(scenes, times, size)
    for k in range(MAX_OBJECTS):  # painter's algorithm: later objects lie on top
        alpha = cover[:, :, k, None]
        frames = frames + alpha * (colors[:, :, k, :, None, None] - frames)
    rng = np.random.default_rng(seed)
    noise = (
        torch.from_numpy(rng.standard_normal(frames.shape, dtype=np.float32)) * scenes.noise[:, None, None, None, None]
    )
    return (frames + noise).clamp(0, 1)


LABEL_GROUPS = {"color": len(COLORS), "shape": len(SHAPES), "background": len(BACKGROUNDS), "small": 1}
LABEL_WIDTH = sum(LABEL_GROUPS.values())


def object_cover(scenes: Scenes, times: Tensor, grid: int, samples: int = 4) -> Tensor:
    """Which share of each patch shows each object: (B, F, O, grid * grid), on `samples` x `samples` points."""
    cover = (_coverage(scenes, times, grid * samples) > 0.5).float()
    free = torch.ones_like(cover[:, :, 0])
    seen = torch.zeros_like(cover)
    for k in reversed(range(MAX_OBJECTS)):
        seen[:, :, k] = cover[:, :, k] * free
        free = free * (1 - cover[:, :, k])
    return torch.nn.functional.avg_pool2d(seen.flatten(0, 1), samples).flatten(2).unflatten(0, times.shape)


def patch_labels(scenes: Scenes, times: Tensor, grid: int, samples: int = 4) -> Tensor:
    """What each patch shows: (B, F, grid * grid, LABEL_WIDTH) float32.

    Per patch the fraction covered by each color, by each shape, by the background (in the place of its pattern) and by
    a small object, measured on `samples` x `samples` points; row-major over the patches.
    """
    frames = times.shape[1]
    objects = object_cover(scenes, times, grid, samples)  # (B, F, O, grid * grid)
    free = 1 - objects.sum(2)
    one_hot = torch.nn.functional.one_hot
    color = one_hot(object_colors(scenes, times), len(COLORS)).float()  # (B, F, O, 8)
    shape = one_hot(scenes.shape, len(SHAPES)).float()[:, None].expand(-1, frames, -1, -1)
    after = (times >= scenes.cut[:, None]).long()
    pattern = one_hot(scenes.background.gather(1, after), len(BACKGROUNDS)).float()  # (B, F, 4)
    small = scenes.small.float()[:, None, :, None].expand(-1, frames, -1, -1)
    return torch.cat(
        [
            torch.einsum("bfop,bfoc->bfpc", objects, torch.cat([color, shape], -1)),
            free[..., None] * pattern[:, :, None],
            torch.einsum("bfop,bfoc->bfpc", objects, small),
        ],
        -1,
    )


def patch_masks(scenes: Scenes, times: Tensor, grid: int, samples: int = 4) -> Tensor:
    """Where objects lie inside each patch: (B, F, grid * grid, samples * samples) in {0, 1}, row-major twice."""
    inside = (_coverage(scenes, times, grid * samples) > 0.5).any(2).float()
    cells = inside.unflatten(3, (grid, samples)).unflatten(2, (grid, samples))  # (B, F, grid, samples, grid, samples)
    return cells.transpose(3, 4).flatten(4).flatten(2, 3)
