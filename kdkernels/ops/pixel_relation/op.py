"""The operators of relations between pixels, their autograd, and the choice of backend.

Products of matrices, a chunk of rows at a time, with what follows them taken at once: no matrix over all pixels of an
image is kept, let alone of a batch.
"""

from __future__ import annotations

import torch

from kdkernels.ops.library import define, learns
from kdkernels.ops.linear_divergence.heads import FLOAT, LEAST_ROWS
from kdkernels.ops.linear_divergence.op import buffers
from kdkernels.ops.linear_divergence.op import forward_op as linear_divergence
from kdkernels.ops.pixel_relation import reference
from kdkernels.ops.precision import full_float32
from kdkernels.ops.row_divergence.kinds import Kind
from kdkernels.ops.scalars import Number, pack
from kdkernels.ops.scale.op import learners, with_gradients

CHUNK_BYTES = 32 << 20  # of similarities at a time


Outputs = tuple[torch.Tensor, list[torch.Tensor]]


def _gradients(
    student: torch.Tensor, teacher: torch.Tensor, want_student: bool, want_teacher: bool
) -> list[torch.Tensor]:
    """Room for those that are wanted."""
    return [torch.empty_like(x) for x, want in ((student, want_student), (teacher, want_teacher)) if want]


def _similarity(student: torch.Tensor, teacher: torch.Tensor, want_student: bool, want_teacher: bool) -> Outputs:
    grads = _gradients(student, teacher, want_student, want_teacher)
    ds, dt = grads[0] if want_student else None, grads[-1] if want_teacher else None
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
                if d is not None:
                    own = d[image, rows].transpose(1, 2)  # maps lie channel by channel
                    torch.bmm(x.transpose(1, 2), difference.transpose(1, 2), out=own).mul_(factor)
    return total.float(), grads


def _fake(student, teacher, want_student, want_teacher):
    return student.new_empty(()), _gradients(student, teacher, want_student, want_teacher)


def _cross_image(
    student: torch.Tensor,
    teacher: torch.Tensor,
    scalars: torch.Tensor,
    want_student: bool,
    want_teacher: bool,
    backend: str,
) -> Outputs:
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    student, teacher = student.contiguous(), teacher.contiguous()
    grads = [d.zero_() for d in _gradients(student, teacher, want_student, want_teacher)]
    # Pixels of all images against those of one: hidden states against a head.
    s, t = student.flatten(0, 1), teacher.flatten(0, 1)
    wants = [want_student, want_student, False, False, want_teacher, want_teacher, False, False]
    no_head_scalars = pack((0.0, 0.0, 0.0, 0.0))
    chunk_bytes = max(CHUNK_BYTES, LEAST_ROWS * buffers(wants, Kind.FORWARD_KL) * FLOAT * student.shape[1])
    with torch.no_grad(), full_float32():
        for j in range(student.shape[0]):
            losses, made = linear_divergence(
                s, student[j], None, None, t, teacher[j], None, None, None, None, None, scalars, no_head_scalars, None,
                Kind.FORWARD_KL.value, False, 0, -100, chunk_bytes, wants, backend,
            )  # fmt: skip
            total += losses.sum(dtype=torch.float64)
            for d, of_all, of_one in zip(grads, made[::2], made[1::2], strict=True):
                d.view(-1, d.shape[2]).add_(of_all)
                d[j].add_(of_one)
    return total.float(), grads


def _cross_image_fake(student, teacher, scalars, want_student, want_teacher, backend):
    return _fake(student.contiguous(), teacher.contiguous(), want_student, want_teacher)


similarity_op = define(
    "pixel_similarity(Tensor student, Tensor teacher, bool want_student, bool want_teacher) -> (Tensor, Tensor[])",
    _similarity,
    _fake,
)
cross_image_op = define(
    "cross_image_relation(Tensor student, Tensor teacher, Tensor scalars, bool want_student, bool want_teacher, "
    "str backend) -> (Tensor, Tensor[])",
    _cross_image,
    _cross_image_fake,
)


def pixel_similarity(student: torch.Tensor, teacher: torch.Tensor, *, backend: str) -> torch.Tensor:
    """sum over images of |S S^T - T T^T|^2, pixels being rows.

    Args:
        student, teacher: pixels' features, float32 (images, pixels, channels); channels may differ.
        backend: a resolved one.
    """
    if backend == "reference":
        return reference.pixel_similarity(student, teacher)
    # As they lie, which is channel by channel: a copy here would turn every gradient behind it round.
    wanted = learns(student), learns(teacher)
    loss, grads = similarity_op(student, teacher, *wanted)
    if not grads:
        return loss
    return with_gradients("pairwise_structure_loss", backend, loss, grads, learners((student, teacher), wanted))


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
    student, teacher = student.contiguous(), teacher.contiguous()
    wanted = learns(student), learns(teacher)
    loss, grads = cross_image_op(student, teacher, scalars, *wanted, backend)
    if not grads:
        return loss
    return with_gradients("cross_image_relation_loss", backend, loss, grads, learners((student, teacher), wanted))
