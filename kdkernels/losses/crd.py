"""Contrastive representation distillation: noise-contrastive estimation against memory banks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed

from kdkernels import backends, checks, groups
from kdkernels.losses.contrastive import check_queue, of_all
from kdkernels.losses.module import LossModule
from kdkernels.losses.samples import normalized
from kdkernels.ops.library import learns, savable, save
from kdkernels.ops.scalars import Number

if TYPE_CHECKING:
    from kdkernels.distributed.batch import Samples

DENSE_WITHIN = 16  # similarities to the whole bank, where it is at most so many times as large as a sample's negatives


class _Gathered(torch.autograd.Function):
    """x_i . bank[indices_ik], a few samples at a time: the gathered entries are never all there."""

    @staticmethod
    def forward(ctx, x, bank, indices):  # type: ignore[no-untyped-def]
        save(ctx, bank, indices)
        ctx.dtype = x.dtype
        products = [bank[i].to(x.dtype) @ row for i, row in zip(indices, x, strict=True)]
        return torch.stack(products) if products else x.new_empty(indices.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        bank, indices = ctx.saved_tensors
        dx = [g @ bank[i].to(ctx.dtype) for i, g in zip(indices, upstream, strict=True)]
        return torch.stack(dx) if dx else upstream.new_empty(0, bank.shape[1]), None, None


def crd_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    student_bank: torch.Tensor,
    teacher_bank: torch.Tensor,
    indices: torch.Tensor,
    *,
    temperature: Number = 0.07,
    normalizers: tuple[Number, Number] | None = None,
    eps: float = 1e-7,
    dense: bool | None = None,
    reduction: str = "rowmean",
    group: torch.distributed.ProcessGroup | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Contrastive representation distillation: tell a sample's embedding in the other model from K random ones.

    For each model's embedding x_i against the other's bank, with P_k = exp(x_i . bank[k] / T) / Z and c = K / n:
    -mean_i [log P_pos / (P_pos + c + eps) + sum_k log c / (P_k + c + eps)], both models' terms added. Tian, Krishnan and
    Isola (2020, arXiv:1910.10699).

    Args:
        student, teacher: embeddings (N, D) from two heads of one size. Further axes are flattened. Both get gradients, as
            the teacher's head is trained too.
        student_bank, teacher_bank: (n, D), normalised: one entry for every training sample.
        indices: (N, 1 + K), the sample's own index and then those of its negatives.
        temperature: T > 0, a number or a tensor with one element. It gets no gradient.
        normalizers: the student's and the teacher's Z, numbers or tensors with one element; default: n times the batch's
            mean of exp(x . bank / T), which the authors' code takes from the first batch and then keeps.
        eps: as in the authors' code.
        dense: multiply with the whole bank and count how often each entry is a negative, or gather the negatives; default:
            the former where n is at most 16 K. The same value, up to rounding.
        reduction: "rowmean" or "batchmean" (the same), "sum", or "none": one value a sample.
        group: as compress_loss; the default normalizers are then of all ranks' samples, `indices` having this rank's.
        backend: every name runs the same torch operations.

    Returns:
        A float32 scalar (float64 if an input is float64), or one value a sample.

    Raises:
        ValueError, TypeError, BackendError: as compress_loss. IndexError: indices outside the bank (on a CPU).
    """
    student, teacher, samples = groups.batch("crd_loss", student, teacher, group, gather=False, indices=indices)
    s, t = normalized(student), normalized(teacher)
    if s.shape[1] != t.shape[1]:
        raise ValueError(f"student and teacher must have embeddings of one size, got {s.shape[1]} and {t.shape[1]}")
    check_queue("student_bank", student_bank, "student", s)
    check_queue("teacher_bank", teacher_bank, "teacher", t)
    if student_bank.shape != teacher_bank.shape:
        raise ValueError(
            f"the banks must hold the same samples: {tuple(student_bank.shape)} and {tuple(teacher_bank.shape)}"
        )
    if not isinstance(indices, torch.Tensor) or indices.is_floating_point() or indices.is_complex():
        got = str(indices.dtype).removeprefix("torch.") if isinstance(indices, torch.Tensor) else type(indices).__name__
        raise TypeError(f"indices must be a tensor of integers, got {got}")
    if indices.dim() != 2 or indices.shape[0] != s.shape[0] or indices.shape[1] < 2:
        raise ValueError(
            f"indices must have shape ({s.shape[0]}, 1 + K), a sample's own and its negatives'; got {tuple(indices.shape)}"
        )
    checks.same_device(student=student, indices=indices)
    checks.number("temperature", temperature, low=0, open_low=True, like=student)
    if normalizers is not None:
        if not isinstance(normalizers, (tuple, list)) or len(normalizers) != 2:
            raise TypeError(
                f"normalizers must be two numbers, the student's and the teacher's; got {normalizers!r:.80}"
            )
        for i, z in enumerate(normalizers):
            checks.number(f"normalizers[{i}]", z, low=0, open_low=True, like=student)
    if dense is not None:
        checks.flag("dense", dense)
    checks.choice("reduction", reduction, ("rowmean", "batchmean", "sum", "none"))
    checks.plain_number("eps", eps, low=0)
    backends.resolve("crd_loss", (s, t), backend)
    if learns(s, t):
        student_bank, teacher_bank = savable(student_bank, teacher_bank)  # type: ignore[assignment]
    n, negatives = student_bank.shape[0], indices.shape[1] - 1
    indices = indices.long()
    checks.indices("indices", indices, n)
    dense = n <= DENSE_WITHIN * negatives if dense is None else dense
    z_s, z_t = (None, None) if normalizers is None else normalizers
    losses = _nce(s, teacher_bank, indices, temperature, z_s, eps, dense, samples)
    losses = losses + _nce(t, student_bank, indices, temperature, z_t, eps, dense, samples)
    if reduction == "none":
        return losses
    if samples is not None:
        return of_all(losses.sum(), samples, reduction, None)
    return losses.sum() if reduction == "sum" else losses.sum() / max(losses.shape[0], 1)


def _nce(
    x: torch.Tensor, bank: torch.Tensor, indices: torch.Tensor, temperature: Number, z: Number | None, eps: float,
    dense: bool, samples: Samples | None,
) -> torch.Tensor:  # fmt: skip
    """One model's term of each sample, in logarithms: log P / (P + c) is logsigmoid(log P - log c)."""
    n, k = bank.shape[0], indices.shape[1] - 1
    positive = (x * bank[indices[:, 0]].to(x.dtype)).sum(1, keepdim=True) / temperature
    if dense:
        # Whole numbers, so that the order of the additions does not show.
        counts = x.new_zeros(x.shape[0], n).scatter_add_(
            1, indices[:, 1:], torch.ones_like(indices[:, 1:], dtype=x.dtype)
        )
        negative = x @ bank.to(x.dtype).T / temperature
    else:
        counts = x.new_ones(())
        negative = _Gathered.apply(x, bank, indices[:, 1:]) / temperature
    if z is None:
        with torch.no_grad():
            mass, rows = positive.exp().sum() + (counts * negative.exp()).sum(), indices.shape[0]
            if samples is not None:
                mass, rows = samples.total(mass), samples.whole
            z = mass / max(rows * indices.shape[1], 1) * n
    # Filled there: a number that is copied to a GPU makes the host wait for it.
    log_z = (z.detach().to(x) if isinstance(z, torch.Tensor) else x.new_full((), z)).log()
    noise = k / n
    log_c = torch.as_tensor(noise + eps, dtype=x.dtype).log()
    of_positive = -torch.nn.functional.logsigmoid(positive - log_z - log_c).squeeze(1)
    shift = torch.as_tensor(noise, dtype=x.dtype).log() - log_c
    of_negative = -counts * (torch.nn.functional.logsigmoid(log_c - (negative - log_z)) + shift)
    return of_positive + of_negative.sum(1)


class CRDLoss(LossModule):
    """`crd_loss` as a module: its keyword arguments are the options."""

    function = staticmethod(crd_loss)
