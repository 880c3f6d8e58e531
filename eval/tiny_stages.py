"""The stages of the tiny model's training: lengths, learning rates, and what is asked in each."""

from dataclasses import dataclass

import torch
from torch import nn

from eval.muon import Muon


@dataclass(frozen=True)
class StageConfig:
    """Length and learning rates of one stage. `videos` are per step, over all workers."""

    steps: int
    videos: int
    muon: float
    adam: float
    decay: float  # the last share of the steps, over which the learning rates fall to zero
    warmup: int = 20


STAGES = {
    "tower": StageConfig(steps=600, videos=192, muon=0.02, adam=3e-3, decay=0.4),
    "memory": StageConfig(steps=450, videos=24, muon=0.02, adam=3e-3, decay=0.1),
    "words": StageConfig(steps=450, videos=16, muon=0.015, adam=2e-3, decay=0.05),
    "lm": StageConfig(steps=1400, videos=16, muon=0.015, adam=2e-3, decay=0.3),
    "align": StageConfig(steps=800, videos=6, muon=0.02, adam=3e-3, decay=1.0),
    "joint": StageConfig(steps=320, videos=16, muon=0.01, adam=1e-3, decay=0.6),
}
EASY_STEPS = 150
"""Steps of stage `lm` over which the share of hard wrong options rises from 0 to its final value."""
HARD = 0.95
"""That final value: the share of questions whose wrong options come from what the video shows."""
WEIGHTS = {
    **dict.fromkeys(("motion", "order", "vanish", "change"), 3.0),
    **dict.fromkeys(("place", "color", "shape", "small"), 2.0),
    "exist": 0.5,
}
"""How much rather than other kinds (1) a kind is asked."""
MEMORY_WEIGHT = 1.0
"""Weight of the dense loss on the visual tokens beside that of the answers."""
WITH_OPTIONS = 0.75
"""Share of the questions that come with options, where a kind has both forms."""
QUESTIONS_PER_VIDEO = 12


def make_optimizers(
    named: list[tuple[str, nn.Parameter]], config: StageConfig
) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the matrices of the transformer blocks and the projector, AdamW for everything else; with their peak
    rates. (AdamW alone leaves the projector with three times the error after as many steps.)"""
    inner = (".layers.", ".mm_projector.")
    hidden = [p for name, p in named if any(part in name for part in inner) and p.ndim == 2 and config.muon]
    ids = {id(p) for p in hidden}
    others = [p for _, p in named if id(p) not in ids]
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [
        (torch.optim.AdamW(others, lr=config.adam, betas=(0.9, 0.95), weight_decay=0.0), config.adam)
    ]
    if hidden:
        optimizers.append((Muon(hidden, lr=config.muon), config.muon))
    return optimizers


def schedule(step: int, config: StageConfig) -> float:
    """Warm-up, plateau, linear decay to zero."""
    left = (config.steps - step) / (config.decay * config.steps)
    return min(1.0, (step + 1) / config.warmup, left)
