"""Contrastive distillation: similarities of embeddings to a queue, a memory bank or the batch.

A queue is the weight of a head whose hidden states are embeddings, so that its similarities exist a chunk of samples at a
time (kdkernels/ops/linear_divergence/README.md). Embeddings are L2-normalised here, in float32 at least; a zero one stays
zero and gets no gradient. What a queue or bank holds is taken as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed

from kdkernels import backends, checks
from kdkernels.losses.linear import check_chunk
from kdkernels.losses.module import LossModule
from kdkernels.losses.samples import normalized
from kdkernels.ops.linear_divergence.heads import Head
from kdkernels.ops.linear_divergence.op import linear_divergence
from kdkernels.ops.row_divergence.kinds import Kind
from kdkernels.ops.scalars import Number

if TYPE_CHECKING:
    from kdkernels.distributed.batch import Samples


def _queue(name: str, queue: torch.Tensor, of_name: str, x: torch.Tensor) -> torch.Tensor:
    checks.float_tensor(name, queue)
    if queue.dim() != 2 or queue.shape[0] == 0 or queue.shape[1] != x.shape[1]:
        raise ValueError(
            f"{name} must have shape (K, {x.shape[1]}), K at least 1 and as wide as {of_name}; got {tuple(queue.shape)}"
        )
    if queue.device != x.device:
        raise ValueError(f"{name} must be on {x.device} with {of_name}, got {queue.device}")
    return queue


def compress_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    queue: torch.Tensor,
    teacher_queue: torch.Tensor | None = None,
    *,
    temperature: Number = 0.04,
    teacher_temperature: Number | None = None,
    scale_by_t2: bool = False,
    reduction: str = "rowmean",
    weight: torch.Tensor | None = None,
    chunk_bytes: int | None = None,
    group: torch.distributed.ProcessGroup | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """CompRess: the student's similarities to a queue are distributed as the teacher's.

    mean_i KL(softmax(t_i Q_t^T / T), softmax(s_i Q_s^T / T)): Abbasi Koohpayegani, Tejankar and Pirsiavash (2020,
    arXiv:2010.14713). Compute it before the batch is enqueued; the queues are read in place, and may change before the
    backward unless reduction is "none".

    Args:
        student: embeddings (N, D_s), float16, bfloat16, float32 or float64. Further axes are flattened.
        teacher: (N, D_t).
        queue: (K, D_s), normalised: the student's earlier embeddings (the paper's 2q), or the teacher's (1q, one
            queue for both: no `teacher_queue`, and D_t = D_s). See `Queue`.
        teacher_queue: (K, D_t), the teacher's embeddings of the same samples.
        temperature, teacher_temperature, scale_by_t2, weight: as kl_div; a weight for every sample.
        reduction: as kl_div, of scores (N, K).
        chunk_bytes, backend: as linear_kl_div.
        group: the ranks whose samples are one batch, this rank's being `student` and `teacher` (and `weight`), as many as it
            has; default: this process's alone. Values and gradients: kdkernels/distributed/README.md.

    Returns:
        A float32 scalar (float64 if an input is float64), or one value a sample (with a group, of this rank's).

    Raises:
        ValueError: shapes or devices that do not fit, and what linear_kl_div raises it for.
        TypeError, BackendError: as linear_kl_div.
    """
    student, teacher, samples = checks.batch("compress_loss", student, teacher, group, gather=False, weight=weight)
    s, t = normalized(student), normalized(teacher)
    student_head = Head(s, _queue("queue", queue, "student", s))
    shared = teacher_queue is None
    name = "queue" if shared else "teacher_queue"
    teacher_head = Head(t, _queue(name, queue if teacher_queue is None else teacher_queue, "teacher", t))
    if student_head.weight.shape[0] != teacher_head.weight.shape[0]:
        raise ValueError(
            "queue and teacher_queue must hold the same samples: "
            f"{student_head.weight.shape[0]} and {teacher_head.weight.shape[0]} of them"
        )
    return _call("compress_loss", Kind.FORWARD_KL, student_head, teacher_head, temperature, teacher_temperature,
                 scale_by_t2, reduction, weight, chunk_bytes, samples, backend)  # fmt: skip


def seed_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    queue: torch.Tensor,
    *,
    temperature: Number = 0.2,
    teacher_temperature: Number | None = 1e-4,
    scale_by_t2: bool = False,
    reduction: str = "rowmean",
    weight: torch.Tensor | None = None,
    chunk_bytes: int | None = None,
    group: torch.distributed.ProcessGroup | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """SEED: soft cross-entropy over a queue of the teacher's embeddings and the sample's own.

    -mean_i sum_j p_ij log q_ij, p_i = softmax(t_i [t_i, Q]^T / T_t), q_i = softmax(s_i [t_i, Q]^T / T_s): Fang et al.
    (2021, arXiv:2101.04731).

    Args:
        student: embeddings (N, D). Further axes are flattened.
        teacher: (N, D).
        queue: (K, D), normalised embeddings of the teacher (65536 in the paper). See `Queue`.
        temperature: the student's; the paper's 0.2.
        teacher_temperature: 1e-4 in the authors' code, 0.01 in the paper's text; None: the student's.
        scale_by_t2, reduction, weight, chunk_bytes, group, backend: as compress_loss.

    Returns, raises: as compress_loss. The teacher gets a gradient if it requires one; the published code detaches it.
    """
    student, teacher, samples = checks.batch("seed_loss", student, teacher, group, gather=False, weight=weight)
    s, t = normalized(student), normalized(teacher)
    if s.shape[1] != t.shape[1]:
        raise ValueError(
            f"student and teacher must have embeddings of one size, got {s.shape[1]} and {t.shape[1]}: project the student's"
        )
    queue = _queue("queue", queue, "teacher", t)
    return _call("seed_loss", Kind.SOFT_CROSS_ENTROPY, Head(s, queue, own=t), Head(t, queue, own=t), temperature,
                 teacher_temperature, scale_by_t2, reduction, weight, chunk_bytes, samples, backend)  # fmt: skip


def info_nce_distillation_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    queue: torch.Tensor | None = None,
    temperature: Number = 0.07,
    symmetric: bool = False,
    reduction: str = "rowmean",
    weight: torch.Tensor | None = None,
    chunk_bytes: int | None = None,
    group: torch.distributed.ProcessGroup | None = None,
    ring: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """InfoNCE between the models: each sample's student embedding must find its teacher embedding.

    -mean_i log softmax_j(s_i t_j^T / T)_i, the negatives being the teacher's other embeddings of the batch, or a queue.

    Args:
        student: embeddings (N, D). Further axes are flattened.
        teacher: (N, D); gets a gradient if it requires one.
        queue: (K, D), normalised: negatives instead of the batch's.
        temperature: T > 0, a number or a tensor with one element. It gets no gradient.
        symmetric: the mean of this and of the teacher's embeddings looking for the student's, as CLIP has it; without a
            queue only.
        reduction, weight, chunk_bytes, group, backend: as compress_loss. With a group, negatives are all ranks' embeddings.
        ring: with a group and without a queue, blocks of samples go from rank to rank and no rank has all of them: memory
            O(N_local N), by torch's operations whatever the backend.

    Returns, raises: as compress_loss.
    """
    checks.ring(ring, group)
    checks.flag("symmetric", symmetric)
    operation = "info_nce_distillation_loss"
    student, teacher, samples = checks.batch(operation, student, teacher, group, gather=False, weight=weight)
    s, t = normalized(student), normalized(teacher)
    if s.shape[1] != t.shape[1]:
        raise ValueError(
            f"student and teacher must have embeddings of one size, got {s.shape[1]} and {t.shape[1]}: project the student's"
        )
    if (symmetric or ring) and queue is not None:
        raise ValueError(
            f"{'symmetric' if symmetric else 'ring'} goes with the batch's negatives only: leave out queue"
        )
    checks.number("temperature", temperature, low=0, open_low=True, like=s)
    scale = 1 / temperature
    if ring:
        return _info_nce_in_a_ring(s, t, samples, scale, symmetric, reduction, weight, backend)
    if queue is not None:
        heads = [Head(s, _queue("queue", queue, "teacher", t), own=t, scale=scale)]
        labels = torch.full((s.shape[0],), queue.shape[0], device=s.device)
    else:
        pairs = [(s, t), (t, s)][: 2 if symmetric else 1]
        heads = [Head(x, y if samples is None else samples.gather(y), scale=scale) for x, y in pairs]
        labels = torch.arange(s.shape[0], device=s.device) + (0 if samples is None else samples.own.start)
    options = 1.0, None, False, reduction, weight, chunk_bytes, samples, backend, labels
    losses = [_call(operation, Kind.FORWARD_KL, head, None, *options) for head in heads]
    return sum(losses[1:], losses[0]) / len(losses)


def _info_nce_in_a_ring(
    s: torch.Tensor, t: torch.Tensor, samples: Samples | None, scale: Number, symmetric: bool, reduction: str,
    weight: torch.Tensor | None, backend: str,
) -> torch.Tensor:  # fmt: skip
    from kdkernels.distributed.row_losses import info_nce

    assert samples is not None
    checks.choice("reduction", reduction, checks.REDUCTIONS)
    backends.resolve("info_nce_distillation_loss", (s, t), backend)
    weight = checks.per_row("weight", weight, tuple(s.shape[:1]), s.device)
    rows = info_nce(s, t, samples, scale)
    if symmetric:
        rows = (rows + info_nce(t, s, samples, scale)) / 2
    if weight is not None:
        rows = (rows * weight.to(rows.dtype)).where(weight != 0, 0.0)
    return rows if reduction == "none" else _of_all(rows.sum(), samples, reduction, weight)


def _call(
    operation: str,
    kind: Kind,
    student: Head,
    teacher: Head | None,
    temperature: Number,
    teacher_temperature: Number | None,
    scale_by_t2: bool,
    reduction: str,
    weight: torch.Tensor | None,
    chunk_bytes: int | None,
    samples: Samples | None,
    backend: str,
    labels: torch.Tensor | None = None,
) -> torch.Tensor:
    checks.flag("scale_by_t2", scale_by_t2)
    checks.temperatures(temperature, teacher_temperature, student.hidden)
    checks.choice("reduction", reduction, checks.REDUCTIONS)
    weight = checks.per_row("weight", weight, tuple(student.hidden.shape[:1]), student.hidden.device)
    check_chunk(chunk_bytes, student, teacher, kind)
    hard = labels is not None
    together = samples is not None and reduction != "none"
    if student.hidden.shape[0] == 0 and (hard or samples is not None):
        # No sample here, but other ranks wait for the gradients' exchange.
        given = [x for head in (student, teacher) if head is not None for x in (head.hidden, head.own) if x is not None]
        loss = torch.cat(given, 1).sum(1) + 0 * student.weight.sum()
        loss = loss if reduction == "none" else loss.sum()
    else:
        loss = linear_divergence(
            student, teacher, kind=kind, temperature=temperature, teacher_temperature=teacher_temperature,
            kd_weight=0.0 if hard else 1.0, ce_weight=1.0 if hard else None, scale_by_t2=scale_by_t2,
            reduction="sum" if together else reduction, weight=weight, labels=labels, ignore_index=-1,
            chunk_bytes=chunk_bytes or 0, backend=backend, operation=operation,
        )  # fmt: skip
    if not together:
        return loss
    assert samples is not None
    columns = None if hard else student.weight.shape[0] + (student.own is not None)
    return _of_all(loss, samples, reduction, weight, columns)


def _of_all(
    total: torch.Tensor, samples: Samples, reduction: str, weight: torch.Tensor | None, columns: int | None = None
) -> torch.Tensor:
    """The loss of all ranks' samples from the sum of this rank's; "mean" is over columns too where there are any."""
    total = samples.total(total)
    if reduction == "sum":
        return total
    by_row = reduction == "rowmean" or (reduction == "mean" and columns is None)
    if by_row and weight is not None:
        mass = samples.total(weight.detach().to(total.dtype).sum())
        return total / mass.where(mass != 0, 1.0)
    return total / max(samples.whole * (columns if reduction == "mean" and columns else 1), 1)


# --------------------------------------------------------------------------------------------- noise-contrastive estimation

DENSE_WITHIN = 16  # similarities to the whole bank, where it is at most so many times as large as a sample's negatives


class _Gathered(torch.autograd.Function):
    """x_i . bank[indices_ik], a few samples at a time: the gathered entries are never all there."""

    @staticmethod
    def forward(ctx, x, bank, indices):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(bank, indices)
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
    student, teacher, samples = checks.batch("crd_loss", student, teacher, group, gather=False, indices=indices)
    s, t = normalized(student), normalized(teacher)
    if s.shape[1] != t.shape[1]:
        raise ValueError(f"student and teacher must have embeddings of one size, got {s.shape[1]} and {t.shape[1]}")
    _queue("student_bank", student_bank, "student", s)
    _queue("teacher_bank", teacher_bank, "teacher", t)
    if student_bank.shape != teacher_bank.shape:
        raise ValueError(
            f"the banks must hold the same samples: {tuple(student_bank.shape)} and {tuple(teacher_bank.shape)}"
        )
    if not isinstance(indices, torch.Tensor) or indices.is_floating_point() or indices.is_complex():
        raise TypeError("indices must be a tensor of integers")
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
        return _of_all(losses.sum(), samples, reduction, None)
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


class CompRessLoss(LossModule):
    """`compress_loss` as a module: its keyword arguments are the options."""

    function = staticmethod(compress_loss)


class SEEDLoss(LossModule):
    """`seed_loss` as a module: its keyword arguments are the options."""

    function = staticmethod(seed_loss)


class InfoNCEDistillationLoss(LossModule):
    """`info_nce_distillation_loss` as a module: its keyword arguments are the options."""

    function = staticmethod(info_nce_distillation_loss)


class CRDLoss(LossModule):
    """`crd_loss` as a module: its keyword arguments are the options."""

    function = staticmethod(crd_loss)
