"""Segments of a video: it is cut where neighbouring frames are unlike (DySeg of FastVID, also of FlashVID)."""

from torch import Tensor
from torch.nn import functional


def segments(frames: Tensor, threshold: float, least: int) -> Tensor:
    """Cut after every frame whose cosine to the next one is below a threshold, and after the least similar ones.

    Args:
        frames: (frames, dim) one vector per frame.
        threshold: a cosine.
        least: so many segments at least, as far as there are frames for them; of equal cosines the first is cut.

    Returns:
        (frames,) int64, the segment of each frame, from 0 on.
    """
    similarity = functional.cosine_similarity(frames[:-1], frames[1:], dim=-1, eps=1e-6)
    cuts = similarity < threshold
    cuts[similarity.argsort(stable=True)[: least - 1]] = True
    return functional.pad(cuts, (1, 0)).cumsum(0)
