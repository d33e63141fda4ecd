"""Mean squared differences of two maps and of their averages at several sizes, from one read: operator and autograd."""

from __future__ import annotations

import torch

from kdkernels.ops.library import define, first_order, learns, save
from kdkernels.ops.scale.op import learners, with_gradients
from kdkernels.ops.weighted_match.maps import as_dense, as_map, plan
from kdkernels.ops.weighted_match.op import gradients, is_late, one_float
from kdkernels.ops.weighted_match.sums import kernels

Outputs = tuple[torch.Tensor, list[torch.Tensor]]


def _context(
    s: torch.Tensor, t: torch.Tensor, scalars: torch.Tensor, upstream: torch.Tensor | None, want_student: bool,
    want_teacher: bool, backend: str,
) -> Outputs:  # fmt: skip
    by_s, by_t = plan(s, 1, False), plan(t, 1, False)
    total, grads = outputs = _context_fake(s, t, scalars, upstream, want_student, want_teacher, backend)
    if s.numel() == 0:
        total.zero_()
        return outputs
    kernels(backend)(
        backend, "feature_context", as_map(s, by_s), as_map(t, by_t), scalars, upstream, total,
        as_dense(grads[0], by_s) if want_student else None, as_dense(grads[-1], by_t) if want_teacher else None,
        s.shape[3],
    )  # fmt: skip
    return outputs


def _context_fake(s, t, scalars, upstream, want_student, want_teacher, backend) -> Outputs:
    made = gradients(s, t, plan(s, 1, False), plan(t, 1, False), want_student, want_teacher)
    return torch.empty((), dtype=torch.float32, device=s.device), made


context_op = define(
    "feature_context(Tensor s, Tensor t, Tensor scalars, Tensor? upstream, bool want_student, bool want_teacher, "
    "str backend) -> (Tensor, Tensor[])",
    _context,
    _context_fake,
)


class LateContext(torch.autograd.Function):
    """The gradients in the backward, as float16 needs."""

    @staticmethod
    def forward(ctx, s, t, scalars, backend):
        total, _ = context_op(s, t, scalars, None, False, False, backend)
        save(ctx, total, s, t, scalars)
        ctx.backend = backend
        return total

    @staticmethod
    def backward(ctx, upstream):
        total, s, t, scalars = ctx.saved_tensors
        want_s, want_t = ctx.needs_input_grad[:2]
        with torch.no_grad():
            _, made = context_op(s, t, scalars, one_float(upstream), want_s, want_t, ctx.backend)
        grads = made[0] if want_s else None, made[-1] if want_t else None
        return (*first_order("feature_context", total, grads), None, None)


def context(student: torch.Tensor, teacher: torch.Tensor, scalars: torch.Tensor, *, backend: str) -> torch.Tensor:
    """factor sum (s - t)^2 + sum over levels of their factor times the sum of the squared averages of s - t.

    Args:
        student, teacher: maps (N, C, H, W) of one shape.
        scalars: the factor, then each level's cells a side, falling, and its factor. Windows are torch's adaptive ones, of
            the last level's cells where these divide without a rest.
        backend: "cpu".
    """
    want_s, want_t = learns(student), learns(teacher)
    if is_late(student, teacher, want_s, want_t):
        return LateContext.apply(student, teacher, scalars, backend)
    total, grads = context_op(student, teacher, scalars, None, want_s, want_t, backend)
    if not grads:
        return total
    return with_gradients("feature_context", backend, total, grads, learners((student, teacher), (want_s, want_t)))
