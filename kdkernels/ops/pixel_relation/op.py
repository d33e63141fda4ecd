"""The operators of relations between pixels, their autograd, and the choice of backend.

Products of matrices, a chunk of rows at a time, with what follows them taken at once: no matrix over all pixels of an
image is kept, let alone of a batch.
"""

from __future__ import annotations

from typing import Any

import torch

from kdkernels.ops.library import define, first_order
from kdkernels.ops.linear_divergence.heads import FLOAT, LEAST_ROWS
from kdkernels.ops.linear_divergence.op import buffers
from kdkernels.ops.linear_divergence.op import forward_op as linear_divergence
from kdkernels.ops.pixel_relation import reference
from kdkernels.ops.precision import full_float32
from kdkernels.ops.row_divergence.kinds import Kind
from kdkernels.ops.scalars import Number, pack
from kdkernels.ops.scale.op import scaled

CHUNK_BYTES = 32 << 20  # of similarities at a time


def _empty_gradients(
    student: torch.Tensor, teacher: torch.Tensor, want_student: bool, want_teacher: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(  # type: ignore[return-value]
        torch.empty_like(x) if want else x.new_empty(0)
        for x, want in ((student, want_student), (teacher, want_teacher))
    )


def _similarity(
    student: torch.Tensor, teacher: torch.Tensor, want_student: bool, want_teacher: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ds, dt = _empty_gradients(student, teacher, want_student, want_teacher)
    images, pixels, _ = student.shape
    step = max(CHUNK_BYTES // (FLOAT * max(pixels, 1)), 1)
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    with torch.no_grad(), torch.autocast(student.device.type, enabled=False), full_float32():
        if 2 * FLOAT * pixels * pixels <= CHUNK_BYTES:  # several images at a time
            parts = [(slice(at, at + step // pixels), slice(None)) for at in range(0, images, step // pixels)]
        else:
            parts = [(slice(i, i + 1), slice(r, r + step)) for i in range(images) for r in range(0, pixels, step)]
        for image, rows in parts:
            s, t = student[image], teacher[image]
            difference = torch.bmm(s[:, rows], s.transpose(1, 2))
            difference.baddbmm_(t[:, rows], t.transpose(1, 2), alpha=-1)
            total += torch.linalg.vector_norm(difference, dim=-1).double().square().sum()
            # The matrix is symmetric: each of its elements is met as a row's and as a column's.
            for d, x, factor in ((ds, s, 4), (dt, t, -4)):
                if d.numel():
                    own = d[image, rows].transpose(1, 2)  # maps lie channel by channel
                    torch.bmm(x.transpose(1, 2), difference.transpose(1, 2), out=own).mul_(factor)
    return total.float(), ds, dt


def _fake(student, teacher, want_student, want_teacher):
    return student.new_empty(()), *_empty_gradients(student, teacher, want_student, want_teacher)


def _cross_image(
    student: torch.Tensor,
    teacher: torch.Tensor,
    scalars: torch.Tensor,
    want_student: bool,
    want_teacher: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    student, teacher = student.contiguous(), teacher.contiguous()
    ds, dt = (d.zero_() for d in _empty_gradients(student, teacher, want_student, want_teacher))
    # Pixels of all images against those of one: hidden states against a head.
    s, t = student.flatten(0, 1), teacher.flatten(0, 1)
    wants = [want_student, want_student, False, False, want_teacher, want_teacher, False, False]
    no_head_scalars = pack((0.0, 0.0, 0.0, 0.0))
    chunk_bytes = max(CHUNK_BYTES, LEAST_ROWS * buffers(wants, Kind.FORWARD_KL) * FLOAT * student.shape[1])
    with full_float32():
        for j in range(student.shape[0]):
            losses, made = linear_divergence(
                s, student[j], None, None, t, teacher[j], None, None, None, None, None, scalars, no_head_scalars, None,
                Kind.FORWARD_KL.value, False, 0, -100, chunk_bytes, wants, backend,
            )  # fmt: skip
            total += losses.sum(dtype=torch.float64)
            each = iter(made)
            for d, want in ((ds, want_student), (dt, want_teacher)):
                if want:
                    d.view(-1, d.shape[2]).add_(next(each))
                    d[j].add_(next(each))
    return total.float(), ds, dt


def _cross_image_fake(student, teacher, scalars, want_student, want_teacher, backend):
    return _fake(student.contiguous(), teacher.contiguous(), want_student, want_teacher)


similarity_op = define(
    "pixel_similarity(Tensor student, Tensor teacher, bool want_student, bool want_teacher) -> (Tensor, Tensor, Tensor)",
    _similarity,
    _fake,
)
cross_image_op = define(
    "cross_image_relation(Tensor student, Tensor teacher, Tensor scalars, bool want_student, bool want_teacher, "
    "str backend) -> (Tensor, Tensor, Tensor)",
    _cross_image,
    _cross_image_fake,
)


def _stored(ctx: Any, operation: str, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The gradients that the forward made, times the upstream one. They are float32: nothing has underflown."""
    output, *made = ctx.saved_tensors
    with torch.no_grad():
        grads = tuple(g for g, want in zip(made, ctx.needs_input_grad) if want)
        grads = iter(scaled(grads, upstream, ctx.backend))
    return first_order(operation, output, tuple(next(grads) if want else None for want in ctx.needs_input_grad[:2]))


class PixelSimilarity(torch.autograd.Function):
    """Loss and both gradients in one pass."""

    @staticmethod
    def forward(ctx, student, teacher, backend):
        loss, ds, dt = similarity_op(student, teacher, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(loss, ds, dt)
        ctx.backend = backend
        return loss

    @staticmethod
    def backward(ctx, upstream):
        return (*_stored(ctx, "pairwise_structure_loss", upstream), None)


class CrossImageRelation(torch.autograd.Function):
    """Loss and both gradients in one pass."""

    @staticmethod
    def forward(ctx, student, teacher, scalars, backend):
        loss, ds, dt = cross_image_op(student, teacher, scalars, *ctx.needs_input_grad[:2], backend)
        ctx.save_for_backward(loss, ds, dt)
        ctx.backend = backend
        return loss

    @staticmethod
    def backward(ctx, upstream):
        return (*_stored(ctx, "cross_image_relation_loss", upstream), None, None)


def pixel_similarity(student: torch.Tensor, teacher: torch.Tensor, *, backend: str) -> torch.Tensor:
    """sum over images of |S S^T - T T^T|^2, pixels being rows.

    Args:
        student, teacher: pixels' features, float32 (images, pixels, channels); channels may differ.
        backend: a resolved one.
    """
    if backend == "reference":
        return reference.pixel_similarity(student, teacher)
    # As they lie, which is channel by channel: a copy here would turn every gradient behind it round.
    return PixelSimilarity.apply(student, teacher, backend)


def cross_image_relation(
    student: torch.Tensor, teacher: torch.Tensor, *, temperature: Number, backend: str
) -> torch.Tensor:
    """sum over ordered pairs of images, and rows, of KL(softmax(T_i T_j^T / temperature), softmax(S_i S_j^T / temperature)).

    Args:
        student, teacher: as for pixel_similarity.
        temperature: positive.
        backend: a resolved one.
    """
    if backend == "reference":
        return reference.cross_image_relation(student, teacher, temperature=temperature)  # type: ignore[arg-type]
    scalars = pack((temperature, temperature, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0))
    return CrossImageRelation.apply(student.contiguous(), teacher.contiguous(), scalars, backend)
