"""Contrastive distillation: similarities of embeddings to a queue or to the batch.

A queue is the weight of a head whose hidden states are embeddings, so that its similarities exist a chunk of samples at a
time (kdkernels/ops/linear_divergence/README.md). Embeddings are L2-normalised here, in float32 at least; a zero one stays
zero and gets no gradient. What a queue holds is taken as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed

from kdkernels import backends, checks, groups
from kdkernels.losses.linear import check_chunk
from kdkernels.losses.module import LossModule
from kdkernels.losses.samples import normalized
from kdkernels.ops.linear_divergence.heads import Head
from kdkernels.ops.linear_divergence.op import linear_divergence
from kdkernels.ops.row_divergence.kinds import Kind
from kdkernels.ops.row_divergence.op import row_divergence
from kdkernels.ops.scalars import Number

if TYPE_CHECKING:
    from kdkernels.distributed.batch import Samples


def check_queue(name: str, queue: torch.Tensor, of_name: str, x: torch.Tensor) -> torch.Tensor:
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
    student, teacher, samples = groups.batch("compress_loss", student, teacher, group, gather=False, weight=weight)
    s, t = normalized(student), normalized(teacher)
    student_head = Head(s, check_queue("queue", queue, "student", s))
    shared = teacher_queue is None
    name = "queue" if shared else "teacher_queue"
    teacher_head = Head(t, check_queue(name, queue if teacher_queue is None else teacher_queue, "teacher", t))
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
    student, teacher, samples = groups.batch("seed_loss", student, teacher, group, gather=False, weight=weight)
    s, t = normalized(student), normalized(teacher)
    if s.shape[1] != t.shape[1]:
        raise ValueError(
            f"student and teacher must have embeddings of one size, got {s.shape[1]} and {t.shape[1]}: project the student's"
        )
    queue = check_queue("queue", queue, "teacher", t)
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

    -mean_i log softmax_j(s_i t_j^T / T)_i, the negatives being the teacher's other embeddings of the batch, or a queue:
    the loss of van den Oord, Li and Vinyals (2018, arXiv:1807.03748).

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
    groups.ring(ring, group)
    checks.flag("symmetric", symmetric)
    operation = "info_nce_distillation_loss"
    student, teacher, samples = groups.batch(operation, student, teacher, group, gather=False, weight=weight)
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
    if queue is None and samples is None and chunk_bytes is None and 0 < s.shape[0] <= WHOLE:
        return _info_nce_at_once(s, t, scale, symmetric, reduction, weight, backend)
    if queue is not None:
        heads = [Head(s, check_queue("queue", queue, "teacher", t), own=t, scale=scale)]
        labels = torch.full((s.shape[0],), queue.shape[0], device=s.device)
    else:
        pairs = [(s, t), (t, s)][: 2 if symmetric else 1]
        heads = [Head(x, y if samples is None else samples.gather(y), scale=scale) for x, y in pairs]
        labels = torch.arange(s.shape[0], device=s.device) + (0 if samples is None else samples.own.start)
    options = 1.0, None, False, reduction, weight, chunk_bytes, samples, backend, labels
    losses = [_call(operation, Kind.FORWARD_KL, head, None, *options) for head in heads]
    return sum(losses[1:], losses[0]) / len(losses)


WHOLE = 512  # samples whose similarities to each other are kept: they stay in the cache, and are not made twice


def _info_nce_at_once(
    s: torch.Tensor, t: torch.Tensor, scale: Number, symmetric: bool, reduction: str, weight: torch.Tensor | None, backend: str
) -> torch.Tensor:  # fmt: skip
    """Both directions read one matrix of similarities, one its rows and one its columns."""
    with torch.autocast(s.device.type, enabled=False):
        scores = (s * (scale.reshape(()) if isinstance(scale, torch.Tensor) else scale)) @ t.T
    labels = torch.arange(s.shape[0], device=s.device)
    axes = (1, 0) if symmetric else (1,)
    # No teacher: a divergence from itself, times 0.
    losses = [
        row_divergence(
            "info_nce_distillation_loss", Kind.FORWARD_KL, scores, scores.detach(), kd_weight=0.0, ce_weight=1.0 / len(axes),
            dim=axis, reduction=reduction, labels=labels, weight=weight, ignore_index=-1, backend=backend,
        )
        for axis in axes
    ]  # fmt: skip
    return sum(losses[1:], losses[0])


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
    return rows if reduction == "none" else of_all(rows.sum(), samples, reduction, weight)


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
    return of_all(loss, samples, reduction, weight, columns)


def of_all(
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


class CompRessLoss(LossModule):
    """`compress_loss` as a module: its keyword arguments are the options."""

    function = staticmethod(compress_loss)


class SEEDLoss(LossModule):
    """`seed_loss` as a module: its keyword arguments are the options."""

    function = staticmethod(seed_loss)


class InfoNCEDistillationLoss(LossModule):
    """`info_nce_distillation_loss` as a module: its keyword arguments are the options."""

    function = staticmethod(info_nce_distillation_loss)
