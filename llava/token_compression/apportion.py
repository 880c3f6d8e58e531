"""Whole shares of a budget: equal ones, spread out, and in proportion to weights within bounds."""

import torch
from torch import Tensor

STEPS = 2**20
"""Shares are compared in steps of one part in so many, so that rounding errors break no ties."""


def equal_shares(total: int, count: int) -> Tensor:
    """Shares (count,) int64 of a total that differ by at most one, the larger ones spread out evenly; on the CPU."""
    bounds = torch.arange(count + 1) * total // count
    return bounds.diff()


def starts(length: int, count: int) -> Tensor:
    """Where (count,) int64 each of `count` nearly equal parts of a length starts; distinct if count <= length."""
    return torch.arange(count) * length // count


def apportion(weights: Tensor, total: int, lower: int = 0, upper: Tensor | int | None = None) -> Tensor:
    """Divide `total` in proportion to weights, each share between `lower` and `upper`.

    The real shares are `min(max(s w, lower), upper)` for the one scale s at which they add up to the total (Hamilton's
    method, with bounds); what remains after rounding them down goes to the largest remainders, one each, equal ones by
    lowest index. Where all weights are 0 they count as equal.

    Args:
        weights: (n,) at least 0, finite, on any device.
        total: from n * lower to n * upper.
        lower, upper: bounds of every share; no upper one by default, or (n,) int64 of them.

    Returns:
        (n,) int64 on the device of the weights, adding up to `total`.

    Raises:
        ValueError: the bounds do not allow that total.
    """
    count, bounds = len(weights), torch.as_tensor(total if upper is None else upper).cpu().expand(len(weights))
    if not count * lower <= total <= int(bounds.sum()):
        raise ValueError(f"{total} cannot be divided into {count} shares from {lower} to {upper}.")
    shares = bounded_shares(weights.double().cpu(), total, lower, bounds).mul_(STEPS).round_().div_(STEPS)
    whole = shares.floor()
    order = (shares - whole).argsort(descending=True, stable=True)
    whole[order[: total - int(whole.sum())]] += 1
    return whole.long().to(weights.device)


def bounded_shares(weights: Tensor, total: int, lower: int, upper: Tensor) -> Tensor:
    """The real shares (n,) of `apportion`, in float64 on the CPU, for upper bounds (n,).

    Each round fixes those beyond the bound that is violated by more, which hold for good.
    """
    shares, free = torch.zeros_like(weights), torch.ones_like(weights, dtype=torch.bool)
    while free.any():
        own = weights[free] if weights[free].sum() > 0 else torch.ones_like(weights[free])
        scaled = (total - shares[~free].sum()) * (own / own.sum())
        below, above = (lower - scaled).clamp_min(0), (scaled - upper[free]).clamp_min(0)
        fixed = below > 0 if below.sum() >= above.sum() else above > 0
        shares[free] = torch.where(fixed, torch.minimum(scaled.clamp_min(lower), upper[free]), scaled)
        if not fixed.any():
            break
        free[free.nonzero().view(-1)[fixed]] = False
    return shares
