"""The operator kdkernels::linear_sparse: one head against a teacher that is known at k classes a token.

A chunk's logits are read by row_gather's kernels; what they find makes the loss and its derivatives (support.py), with which
they write the logits' gradient, and that goes into the head's as in op.py.
"""

from __future__ import annotations

import torch

from kdkernels.ops.library import define, first_order, save
from kdkernels.ops.linear_divergence.heads import (
    FLOAT,
    Head,
    Side,
    chunk_rows,
    pack_transforms,
    stored,
    unpack_transforms,
    view,
)
from kdkernels.ops.row_divergence.kinds import Kind
from kdkernels.ops.row_gather.op import forward_op as gather
from kdkernels.ops.row_gather.op import kernels
from kdkernels.ops.row_gather.support import Treatment
from kdkernels.ops.scalars import Number, pack
from kdkernels.ops.scale.op import scaled

BUFFERS = 2  # tensors of a chunk's logits: themselves and their gradient


def least_bytes(classes: int) -> int:
    """What one row's logits take."""
    return FLOAT * BUFFERS * classes


# teacher: (rows, m) as Treatment.teacher makes it, indices (rows, k) ascending, factor (rows,): all of a row's loss is
# multiplied by it, and nothing is looked at where it is 0. All three but the indices are float64.
def _forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    teacher: torch.Tensor,
    indices: torch.Tensor,
    factor: torch.Tensor,
    scalars: torch.Tensor,
    head_scalars: torch.Tensor,
    missing: str,
    kind: int,
    min_log_prob: float | None,
    transforms: int,
    chunk_bytes: int,
    wants: list[bool],
    backend: str,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    treatment = Treatment(missing, Kind(kind), min_log_prob)
    rows, classes = hidden.shape[0], weight.shape[0]
    device = hidden.device
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        scale, softcap = unpack_transforms(head_scalars, transforms, 0)
        side = Side(Head(hidden, weight, bias, None, scale, softcap), [*wants[:3], False])
        step = chunk_rows(rows, classes, hidden.shape[1], chunk_bytes, BUFFERS, device.type)
        losses = torch.empty_like(factor)
        d_teacher = torch.empty_like(teacher) if wants[3] else None
        z = torch.empty(step, classes, dtype=torch.float32, device=device)
        d_z = torch.empty_like(z) if side.any else None
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            x, index, f = z[: part.stop - start], indices[part], factor[part]
            side.scores(part, x)
            keep = f != 0
            live = keep.to(torch.uint8)
            *found, stats = gather(x, index, live, scalars, treatment.outside, backend)
            a, rest, total = (v.double() if v.numel() else None for v in found)
            assert a is not None
            each, d_a, d_b = treatment.terms(treatment.student(a, rest, total, index, classes), teacher[part])
            losses[part] = (each.sum(-1) * f).where(keep, 0.0)
            of_row, keep = f.unsqueeze(1), keep.unsqueeze(1)
            if d_teacher is not None:
                d_teacher[part] = (d_b * of_row).where(keep, 0.0)
            if d_z is not None:
                d_a = (d_a * of_row).where(keep, 0.0)
                g = treatment.student_gradient(d_a, a, index, classes)
                ds = d_z[: part.stop - start]
                kernels(backend)[1](
                    view(x), index, live, scalars, stats,
                    *(None if v is None else v.float().contiguous() for v in g), view(ds),
                )  # fmt: skip
                side.accumulate(part, ds, x)
        del z, d_z
        return losses, side.gradients() + ([] if d_teacher is None else [d_teacher])


def _forward_fake(hidden, weight, bias, teacher, indices, factor, scalars, head_scalars, missing, kind, min_log_prob,
                  transforms, chunk_bytes, wants, backend):  # fmt: skip
    inputs = (hidden, weight, bias, teacher)
    return torch.empty_like(factor), [
        x.new_empty(x.shape, dtype=stored(x.dtype)) for x, want in zip(inputs, wants, strict=True) if want
    ]


forward_op = define(
    "linear_sparse(Tensor hidden, Tensor weight, Tensor? bias, Tensor teacher, Tensor indices, Tensor factor, "
    "Tensor scalars, Tensor head_scalars, str missing, int kind, float? min_log_prob, int transforms, int chunk_bytes, "
    "bool[] wants, str backend) -> (Tensor, Tensor[])",
    _forward,
    _forward_fake,
)


class LinearSparse(torch.autograd.Function):
    """Loss and gradients in one pass over the tokens; where every row has its own upstream gradient, one more."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, teacher, indices, factor, scalars, head_scalars, options):
        *how, per_row, backend = options
        inputs = (hidden, weight, bias, teacher)
        wants = list(ctx.needs_input_grad[:4])
        ctx.stored = not per_row
        losses, grads = forward_op(
            *inputs, indices, factor, scalars, head_scalars, *how, wants if ctx.stored else [False] * 4, backend
        )
        ctx.options = options
        output = losses if per_row else losses.sum()
        if ctx.stored:
            ctx.save_for_backward(output, *grads)
        else:
            save(ctx, output, *inputs, indices, factor, scalars, head_scalars)
        return output

    @staticmethod
    def backward(ctx, upstream):
        wants = list(ctx.needs_input_grad[:4])
        *how, _, backend = ctx.options
        with torch.no_grad():
            if ctx.stored:
                output, *grads = ctx.saved_tensors
                # The teacher's is float64, which the kernels do not scale.
                scaled_ones = iter(scaled([g for g in grads if g.dtype != torch.float64], upstream, backend))
                grads = [g * upstream if g.dtype == torch.float64 else next(scaled_ones) for g in grads]
            else:
                output, *inputs, indices, factor, scalars, head_scalars = ctx.saved_tensors
                of_rows = (factor * upstream).where(factor != 0, 0.0)
                _, grads = forward_op(*inputs, indices, of_rows, scalars, head_scalars, *how, wants, backend)
        each = iter(first_order("linear_topk_div", output, grads))
        return (*(next(each) if want else None for want in wants), *(None,) * 5)


def linear_sparse(
    student: Head,
    teacher: torch.Tensor,
    indices: torch.Tensor,
    factor: torch.Tensor,
    treatment: Treatment,
    *,
    temperature: Number,
    compact: bool,
    chunk_bytes: int,
    per_row: bool,
    backend: str,
) -> torch.Tensor:
    """The sum over rows (or each row) of factor * D, D the divergence of the student's logits from a sparse teacher.

    Args:
        student: hidden states (..., H) and a weight (V, H).
        teacher: float64 (..., m), what Treatment.teacher made of the values; gets a gradient if it requires one.
        indices: int64 (..., k), ascending in each row.
        factor: float64 (...): nothing is computed where it is 0.
        temperature: of the student.
        compact: leave rows of factor 0 out of the products; one host synchronisation, to know how many are left.
        chunk_bytes: what the logits of a chunk may take; 0 chooses.
        per_row: a loss for each row.
        backend: any but "reference".
    """
    leading = indices.shape[:-1]
    if not torch.is_grad_enabled():  # an autograd.Function is not told
        student = Head(*(None if x is None else x.detach() for x in student[:4]), *student[4:])  # type: ignore[arg-type]
        teacher = teacher.detach()
    rows = [x.reshape(-1, x.shape[-1]) for x in (student.hidden, teacher, indices)]
    factor = factor.reshape(-1)
    kept = None
    if compact:
        kept = (factor != 0).nonzero().squeeze(-1)
        rows, factor = [x.index_select(0, kept) for x in rows], factor.index_select(0, kept)
    hidden, teacher, indices = rows
    head_scalars, transforms = pack_transforms(student)
    losses = LinearSparse.apply(
        hidden, student.weight, student.bias, teacher, indices.contiguous(), factor, pack((temperature,)), head_scalars,
        (treatment.missing, treatment.kind.value, treatment.min_log_prob, transforms, chunk_bytes, per_row, backend),
    )  # fmt: skip
    if not per_row:
        return losses
    if kept is not None:
        losses = losses.new_zeros(leading.numel()).index_copy(0, kept, losses)
    return losses.view(leading)
