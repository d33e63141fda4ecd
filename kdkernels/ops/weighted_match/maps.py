"""How feature tensors of any layout become maps (batch, rows, lanes), as views wherever strides allow it."""

from __future__ import annotations

import torch


def channels_and_pixels(x: torch.Tensor, dim: int) -> torch.Tensor:
    """(batch, channels, pixels) of a tensor whose channels are its axis `dim`."""
    if x.dim() == 2:
        return x.unsqueeze(2)
    x = x.movedim(dim, 1) if dim != 1 else x
    return x.flatten(2) if x.dim() > 3 else x


def oriented(*maps: torch.Tensor) -> tuple[list[torch.Tensor], bool]:
    """Maps of one shape (batch, channels, pixels) with their lanes last, and whether the lanes are the channels.

    The first decides; another that lies otherwise is copied when it is used.
    """
    x = maps[0]
    channels_last = x.shape[2] == 1 or (x.stride(1) == 1 and x.stride(2) != 1)
    return ([m.transpose(1, 2) for m in maps] if channels_last else list(maps)), channels_last
