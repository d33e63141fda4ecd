"""The relations of samples by CUDA and Triton kernels, one after the other; the CPU's are one native call."""

from __future__ import annotations

import torch

from kdkernels.ops.pairwise_distance.op import run
from kdkernels.ops.scalars import pack
from kdkernels.ops.triplet_angle import native


def relations(
    backend: str,
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None,
    scalars: torch.Tensor,
    loss: torch.Tensor,
    ds: torch.Tensor | None,
    dt: torch.Tensor | None,
    distance: bool,
    squared: bool,
    normalize: bool,
    reduction: int,
    angle: bool,
) -> None:
    """The CPU kernels' entry sample_relations."""
    n = student.shape[0]
    weight, beta, eps, scale, angle_beta = scalars.tolist()
    matrix = torch.empty(n, n, dtype=torch.float32, device=student.device)
    models = [(x, torch.empty_like(matrix), torch.empty_like(matrix) if angle else None) for x in (student, teacher)]
    for x, hi, lo in models:
        run("forward", backend, x, hi, lo)
    (_, s, s_lo), (_, t, t_lo) = models
    terms = []  # of each the loss, and the gradients of both models' squared distances

    def room() -> list[torch.Tensor | None]:
        terms.append([torch.empty_like(loss), *(None if g is None else torch.empty_like(matrix) for g in (ds, dt))])
        return terms[-1]

    if distance:
        args = int(squared), int(normalize), reduction
        run("match", backend, s, t, mask, pack((beta, eps, 0.0, 0.0)), *room(), *args)
        if weight != 1.0:
            terms[0] = [x if x is None else x.mul_(weight) for x in terms[0]]
    if angle:
        args = s, s_lo, t, t_lo, pack((angle_beta, scale)), *room()
        if backend == "triton":
            from kdkernels.ops.triplet_angle import triton

            triton.forward(*args)
        else:
            native.forward(backend, *args)
    if len(terms) == 2:
        terms = [[x if x is None else x.add_(y) for x, y in zip(*terms)]]
    total, *slopes = terms[0]
    loss.copy_(total)
    for (x, _, _), slope, dx in zip(models, slopes, (ds, dt)):
        if dx is not None:
            run("backward", backend, x, slope, dx)
