"""sum |sort(p_s) - sort(p_t)| of rows, by a kernel on the CPU and by torch's sort elsewhere, with the gradient by hand."""

from __future__ import annotations

from typing import Any

import torch

from kdkernels import backends
from kdkernels.ops.layout import side_by_side
from kdkernels.ops.library import define, first_order, learns, save
from kdkernels.ops.scalars import Number, pack

CHUNK = 1 << 22  # elements that are sorted at a time: what a call needs besides its results


def plain(student: torch.Tensor, teacher: torch.Tensor, t_s: Number, t_t: Number, dtype: torch.dtype) -> torch.Tensor:
    """The rows' distances in plain PyTorch; softmax keeps the order, so that scores are sorted, not probabilities."""
    s, t = (
        (x.to(dtype) / by).sort(dim=-1, descending=True, stable=True).values
        for x, by in ((student, t_s), (teacher, t_t))
    )
    p, q = s.softmax(-1), t.softmax(-1)
    width = max(p.shape[-1], q.shape[-1])
    p, q = (torch.nn.functional.pad(x, (0, width - x.shape[-1])) for x in (p, q))
    return (p - q).abs().sum(-1)


def _side(x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(probabilities, largest first; their classes)."""
    values, order = x.float().sort(dim=-1, descending=True, stable=True)
    return (values / t).softmax(-1), order


# The signs of the sorted differences, brought back to their classes: int8, all that the gradients need besides p.
def _forward(
    student: torch.Tensor, teacher: torch.Tensor, scalars: torch.Tensor, want_student: bool, want_teacher: bool, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    losses, signs_s, signs_t = _forward_fake(student, teacher, scalars, want_student, want_teacher, backend)
    if backend == "cpu":
        if losses.numel():
            backends.library("cpu").call(
                "sorted_match_forward", side_by_side(student), side_by_side(teacher), scalars, losses, signs_s if want_student else None,
                signs_t if want_teacher else None, torch.get_num_threads(),
            )  # fmt: skip
        return losses, signs_s, signs_t
    rows = max(1, CHUNK // max(student.shape[1], teacher.shape[1]))
    t_s, t_t = scalars.to(student.device)
    common = min(student.shape[1], teacher.shape[1])
    for at in (slice(i, i + rows) for i in range(0, student.shape[0], rows)):
        (p, order_s), (q, order_t) = _side(student[at], t_s), _side(teacher[at], t_t)
        differences = p[:, :common] - q[:, :common]
        losses[at] = differences.abs().sum(-1) + p[:, common:].sum(-1) + q[:, common:].sum(-1)
        signs = differences.sign().to(torch.int8)
        for wanted, out, order, sign in (
            (want_student, signs_s, order_s, signs),
            (want_teacher, signs_t, order_t, -signs),
        ):
            if wanted:
                rest = sign.new_ones(sign.shape[0], order.shape[1] - common)
                out[at] = torch.empty_like(order, dtype=torch.int8).scatter_(1, order, torch.cat([sign, rest], 1))
    return losses, signs_s, signs_t


def _forward_fake(student, teacher, scalars, want_student, want_teacher, backend):
    return (
        torch.empty(student.shape[0], dtype=torch.float32, device=student.device),
        torch.empty(student.shape if want_student else (0,), dtype=torch.int8, device=student.device),
        torch.empty(teacher.shape if want_teacher else (0,), dtype=torch.int8, device=student.device),
    )


def _backward(
    x: torch.Tensor, signs: torch.Tensor, scalars: torch.Tensor, upstream: torch.Tensor, side: int, backend: str
) -> torch.Tensor:
    dx = x.new_empty(x.shape)
    if backend == "cpu":
        if dx.numel():
            backends.library("cpu").call(
                "sorted_match_backward", side_by_side(x), signs, scalars, upstream.contiguous(), dx, side, torch.get_num_threads(),
            )  # fmt: skip
        return dx
    t = scalars.to(x.device)[side]
    rows = max(1, CHUNK // x.shape[1])
    for at in (slice(i, i + rows) for i in range(0, x.shape[0], rows)):
        p, h = (x[at].float() / t).softmax(-1), signs[at].float()
        u = upstream[at].unsqueeze(1)
        # Rows without an upstream gradient are left out: whatever they hold, theirs is 0.
        dx[at] = (p * (h - (p * h).sum(-1, keepdim=True)) * (u / t)).masked_fill(u == 0, 0.0)
    return dx


def _backward_fake(x, signs, scalars, upstream, side, backend):
    return x.new_empty(x.shape)


forward_op = define(
    "sorted_match_forward(Tensor student, Tensor teacher, Tensor scalars, bool want_student, bool want_teacher, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
backward_op = define(
    "sorted_match_backward(Tensor x, Tensor signs, Tensor scalars, Tensor upstream, int side, str backend) -> Tensor",
    _backward,
    _backward_fake,
)


class SortedMatch(torch.autograd.Function):
    """One byte a class is kept between forward and backward."""

    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, scalars: torch.Tensor, backend: str
    ) -> torch.Tensor:
        losses, signs_s, signs_t = forward_op(student, teacher, scalars, *ctx.needs_input_grad[:2], backend)
        ctx.backend = backend
        save(ctx, losses, student, teacher, scalars, signs_s, signs_t)
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        losses, student, teacher, scalars, signs_s, signs_t = ctx.saved_tensors
        want_s, want_t = ctx.needs_input_grad[:2]
        with torch.no_grad():
            ds = backward_op(student, signs_s, scalars, upstream, 0, ctx.backend) if want_s else None
            dt = backward_op(teacher, signs_t, scalars, upstream, 1, ctx.backend) if want_t else None
        return (*first_order("uld_loss", losses, (ds, dt)), None, None)


def sorted_match(student: torch.Tensor, teacher: torch.Tensor, t_s: Number, t_t: Number, backend: str) -> torch.Tensor:
    """Rows of losses from (N, V_s) and (N, V_t); `backend` as backends.resolve returned it."""
    if backend == "reference":
        wide = torch.float64 in (student.dtype, teacher.dtype)
        return plain(student, teacher, t_s, t_t, torch.float64 if wide else torch.float32)
    scalars = pack((t_s, t_t))
    if not learns(student, teacher):
        return forward_op(student, teacher, scalars, False, False, backend)[0]
    return SortedMatch.apply(student, teacher, scalars, backend)
