"""Boxes of detectors: as tensors, on a feature map's scale, and how two of them overlap."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kdkernels import checks

Boxes = torch.Tensor | Sequence[torch.Tensor]


def padded_boxes(boxes: Boxes, batch: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Boxes of every image as (N, M, 4); what is no box has a side below 0, or is NaN."""
    if isinstance(boxes, torch.Tensor):
        if boxes.dim() != 3 or boxes.shape[0] != batch or boxes.shape[2] != 4:
            raise ValueError(f"boxes must be (N, M, 4) with N = {batch}, or a list of (m, 4); got {tuple(boxes.shape)}")
        _check("boxes", boxes, device, padded=True)
        padded = boxes.to(dtype)
    else:
        if not isinstance(boxes, (list, tuple)):
            raise TypeError(f"boxes must be (N, M, 4) or a list of (m, 4), got {type(boxes).__name__}")
        if len(boxes) != batch:
            raise ValueError(f"boxes must have one entry an image, {batch}; got {len(boxes)}")
        for i, one in enumerate(boxes):
            if not isinstance(one, torch.Tensor):
                raise TypeError(f"boxes[{i}] must be a tensor (m, 4), got {type(one).__name__}")
            if one.numel() and (one.dim() != 2 or one.shape[1] != 4):
                raise ValueError(f"boxes[{i}] must be (m, 4), got {tuple(one.shape)}")
            _check(f"boxes[{i}]", one, device, padded=False)
        counts = [one.numel() // 4 for one in boxes]
        padded = torch.full((batch, max([0, *counts]), 4), torch.nan, dtype=dtype, device=device)
        for i, one in enumerate(boxes):
            padded[i, : counts[i]] = one.reshape(-1, 4)
    return padded


def _check(name: str, boxes: torch.Tensor, device: torch.device, padded: bool) -> None:
    checks.dense(name, boxes)
    if boxes.is_complex():
        raise TypeError(f"{name} must be real numbers, got complex ones")
    if boxes.device != device:
        raise ValueError(f"{name} must be on {device} with the features, got {boxes.device}")
    checks.boxes(name, boxes, padded=padded)


def map_scale(
    image_size: torch.Tensor | Sequence[int] | None, size: tuple[int, int], batch: int, device: torch.device
) -> torch.Tensor | None:
    """What brings boxes from an image's coordinates to the map's."""
    if image_size is None:
        return None
    if not isinstance(image_size, torch.Tensor):
        if not isinstance(image_size, (list, tuple)):
            raise TypeError(f"image_size must be (height, width) or a tensor, got {type(image_size).__name__}")
        if len(image_size) != 2:
            raise ValueError(f"image_size must be (height, width), got {tuple(image_size)}")
        height, width = image_size
        checks.plain_number("image_size[0]", height, low=0, open_low=True)
        checks.plain_number("image_size[1]", width, low=0, open_low=True)
        # Filled there: numbers that are copied to a GPU make the host wait for it.
        x, y = (
            torch.full((1, 1, 1), n, dtype=torch.float64, device=device) for n in (size[1] / width, size[0] / height)
        )
        return torch.cat([x, y, x, y], 2)
    if tuple(image_size.shape) not in ((2,), (batch, 2)):
        raise ValueError(f"image_size must be (height, width) or ({batch}, 2) of them, got {tuple(image_size.shape)}")
    if image_size.is_complex() or image_size.dtype == torch.bool:
        raise TypeError(f"image_size must be real numbers, got {image_size.dtype}")
    checks.positive("image_size", image_size)
    checks.dense("image_size", image_size)
    if image_size.device.type not in ("cpu", device.type):
        raise ValueError(f"image_size must be on {device} with the features, got {image_size.device}")
    own = image_size.to(device, torch.float32).reshape(-1, 2)
    factors = [torch.full_like(n, by) / n for n, by in zip(own.flip(1).split(1, 1), (size[1], size[0]))]
    return torch.cat([*factors, *factors], 1).unsqueeze(1)


def giou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Generalised intersection over union of boxes (..., 4), x1, y1, x2, y2: between -1 and 1; 1 for two equal ones."""

    def area(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        return (high - low).clamp_min(0).prod(-1)

    shared = area(torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:]))
    hull = area(torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:]))
    union = area(a[..., :2], a[..., 2:]) + area(b[..., :2], b[..., 2:]) - shared
    # A box without area has no part in a ratio: 0 rather than 0 / 0.
    return shared / union.where(union > 0, 1.0) - (hull - union) / hull.where(hull > 0, 1.0)
