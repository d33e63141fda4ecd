"""Distillation between logits or heads whose vocabulary is spread over the ranks of a group.

For a chunk of rows: local log-sum-exps meet in one collective; from log-probabilities of the whole vocabulary the row kernels
make each shard's part of the divergence and its derivatives g; their sums over classes meet in a second one, which the KL
kinds do without; and dz = (g - p sum g) / T. A head's shard gives its own dW, and the hidden states' gradients, which all
shards share, are added up once. Everything is computed in float32 (float64 logits in float64), a chunk of rows at a time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from kdkernels import backends
from kdkernels.distributed.batch import all_gather
from kdkernels.losses import checks
from kdkernels.losses.logits import _soft_term
from kdkernels.ops.linear_divergence.heads import Head, Side, chunk_rows
from kdkernels.ops.row_divergence import reference
from kdkernels.ops.row_divergence.kinds import Inputs, Kind
from kdkernels.ops.row_divergence.op import forward_op
from kdkernels.ops.scalars import Number, pack

BUFFERS = 4  # tensors of a chunk's logits: both models' and the derivatives


@dataclasses.dataclass(frozen=True)
class _Job:
    """What does not change from chunk to chunk."""

    kind: Kind
    p0: Number
    p1: Number
    temperature: Number
    teacher_temperature: Number
    kd: torch.Tensor | float  # factors of the two terms, divisors included
    ce: torch.Tensor | float | None
    start: int  # this rank's first class
    group: Any
    backend: str
    chunk_bytes: int


class _Scores:
    """Logits that exist already, as linear_divergence's Side has those of a head."""

    def __init__(self, x: torch.Tensor, want: bool):
        self.x, self.classes, self.any = x, x.shape[1], want
        self.d = torch.empty_like(x) if want else None

    def scores(self, rows: slice, out: torch.Tensor) -> None:
        out.copy_(self.x[rows])

    def accumulate(self, rows: slice, gradient: torch.Tensor, scores: torch.Tensor) -> None:
        assert self.d is not None
        self.d[rows] = gradient

    def gradients(self) -> tuple[torch.Tensor | None, ...]:
        return (self.d,)


def _run(
    job: _Job, s: Any, t: Any, classes: int, dtype: torch.dtype, labels: torch.Tensor | None, weight: torch.Tensor
) -> torch.Tensor:
    """The loss of every row, on all ranks; the sides keep their gradients."""
    rows, device = weight.shape[0], weight.device
    step = chunk_rows(rows, max(classes, 1), classes, job.chunk_bytes, BUFFERS, device.type)
    losses = torch.empty(rows, dtype=dtype, device=device)
    z_s, z_t = (torch.empty(step, classes, dtype=dtype, device=device) for _ in range(2))
    hard = torch.empty(rows, dtype=dtype, device=device) if job.ce is not None else None
    for first in range(0, rows, step):
        part = slice(first, min(first + step, rows))
        x, y = z_s[: part.stop - first], z_t[: part.stop - first]
        s.scores(part, x)
        t.scores(part, y)
        w = weight[part]
        labels_here = None if labels is None else labels[part]
        loss, ce, ds, dt = _chunk(job, x, y, w, labels_here, s.any, t.any)
        losses[part] = loss
        if hard is not None:
            hard[part] = ce
        if ds is not None:
            s.accumulate(part, ds, x)
        if dt is not None:
            t.accumulate(part, dt, y)
    dist.all_reduce(losses, group=job.group)
    return losses if hard is None else losses + hard


def _chunk(
    job: _Job,
    x: torch.Tensor,
    y: torch.Tensor,
    w: torch.Tensor,
    labels: torch.Tensor | None,
    want_s: bool,
    want_t: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """This shard's part of each row's divergence, the whole hard-label term, and the gradients of the scores."""
    live = (w != 0).unsqueeze(1)
    a, b = (x / job.temperature).where(live, 0.0), (y / job.teacher_temperature).where(live, 0.0)
    local = [a.logsumexp(1), b.logsumexp(1)]
    reverse = job.kind == Kind.REVERSE_KL and want_s
    if reverse:
        # Of KL(p_s, p_t), which the student's gradient needs: this shard's sum of p_s (a - b), p_s being its own.
        p = torch.softmax(a, 1)
        some = p > 0  # NaN where all are -inf: no mass here
        local.append((p.where(some, 0.0) * (a - b).where(some, 0.0)).sum(1))
    if job.ce is not None:
        assert labels is not None
        local += [x.where(live, 0.0).logsumexp(1), _own(x, labels, job.start).squeeze(1)]
    lse_s, lse_t, *rest = _combined(local, reverse, job)
    a, b = a.sub_(lse_s.unsqueeze(1)), b.sub_(lse_t.unsqueeze(1))
    loss, g_s, g_t = _terms(job, a, b, w, want_s, want_t)
    sums = None
    if want_t or (want_s and job.kind not in (Kind.FORWARD_KL, Kind.REVERSE_KL)):
        nothing = torch.zeros_like(loss)
        sums = torch.stack([nothing if g is None else g.sum(1) for g in (g_s, g_t)])
        dist.all_reduce(sums, group=job.group)
    ds = dt = ce = None
    if g_s is not None:
        total = (
            sums[0] if sums is not None else -w * job.kd if job.kind == Kind.FORWARD_KL else (1 + rest[0]) * w * job.kd
        )
        ds = g_s.sub_(a.exp() * total.unsqueeze(1)).div_(job.temperature)
    if g_t is not None and sums is not None:
        dt = g_t.sub_(b.exp() * sums[1].unsqueeze(1)).div_(job.teacher_temperature)
    if job.ce is not None:
        lse_1, of_label = rest[-2:]
        ce = ((lse_1 - of_label) * w * job.ce).where(w != 0, 0.0)
        if ds is not None:
            factor = (w * job.ce).unsqueeze(1)
            ds.add_((x - lse_1.unsqueeze(1)).exp_().mul_(factor))
            _add_own(ds, labels, job.start, -factor)
    ds, dt = (None if d is None else d.masked_fill_(~live, 0.0) for d in (ds, dt))
    return loss, ce, ds, dt


def _own(x: torch.Tensor, labels: torch.Tensor, start: int) -> torch.Tensor:
    """The label's score (rows, 1) where this rank has it, else 0."""
    if x.shape[1] == 0:
        return x.new_zeros(x.shape[0], 1)
    at = labels.unsqueeze(1) - start
    here = (at >= 0) & (at < x.shape[1])
    return x.gather(1, at.where(here, 0)).where(here, 0.0)


def _add_own(gradient: torch.Tensor, labels: torch.Tensor | None, start: int, value: torch.Tensor) -> None:
    assert labels is not None
    if gradient.shape[1] == 0:
        return
    at = labels.unsqueeze(1) - start
    here = (at >= 0) & (at < gradient.shape[1])
    at = at.where(here, 0)
    gradient.scatter_(1, at, gradient.gather(1, at) + value.where(here, 0.0))


def _combined(local: list[torch.Tensor], reverse: bool, job: _Job) -> list[torch.Tensor]:
    """Every statistic of the whole vocabulary, by one collective."""
    mine = torch.stack(local)
    ranks = dist.get_world_size(job.group)
    everyone = mine.new_empty(ranks * mine.shape[0], mine.shape[1])
    all_gather(everyone, mine, group=job.group)
    stats = everyone.view(ranks, *mine.shape)
    lse = stats[:, :2].logsumexp(0)
    found = [lse[0], lse[1]]
    at = 2
    if reverse:
        shares = (stats[:, 0] - lse[0]).exp()
        inner = (shares * stats[:, at].where(shares > 0, 0.0)).sum(0)
        found.append(inner - lse[0] + lse[1])
        at += 1
    if job.ce is not None:
        found += [stats[:, at].logsumexp(0), stats[:, at + 1].sum(0)]
    return found


def _terms(
    job: _Job, a: torch.Tensor, b: torch.Tensor, w: torch.Tensor, want_s: bool, want_t: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Of log-probabilities: the rows' weighted divergence, and its derivatives."""
    if a.shape[1] == 0:  # a rank without classes: it takes part in the collectives
        return torch.zeros_like(w), torch.empty_like(a) if want_s else None, torch.empty_like(b) if want_t else None
    if job.backend == "reference":
        with torch.enable_grad():
            a, b = a.detach().requires_grad_(want_s), b.detach().requires_grad_(want_t)
            live = w != 0
            rows = reference.divergence(job.kind, a, b, job.p0, job.p1).where(live, 0.0) * w * job.kd
            wanted = [x for x, want in ((a, want_s), (b, want_t)) if want]
            grads = iter(torch.autograd.grad(rows.sum(), wanted) if wanted else ())
        return rows.detach(), next(grads) if want_s else None, next(grads) if want_t else None
    scalars = pack((1.0, 1.0, 1.0, 0.0, 0.0, job.p0, job.p1, 0.0))
    _, (losses, _), grads = forward_op(
        a, b, None, (w * job.kd).contiguous(), None, scalars, None, int(job.kind), int(Inputs.LOG_PROBS), False, 0, -100, 1,
        True, want_s, want_t, job.backend,
    )  # fmt: skip
    made = iter(grads)
    return losses, next(made) if want_s else None, next(made) if want_t else None


class _VocabParallel(torch.autograd.Function):
    """Gradients are made in the forward, or in the backward where their scale is not known: float16 logits, "none"."""

    @staticmethod
    def forward(ctx, job, make, deferred, reduce, labels, weight, *tensors):  # type: ignore[no-untyped-def]
        wants = list(ctx.needs_input_grad[6:])
        ctx.job, ctx.make, ctx.deferred, ctx.reduce = job, make, deferred, reduce
        losses, grads = _evaluate(job, make, labels, weight, tensors, wants if not deferred else [False] * len(wants))
        if deferred:
            ctx.save_for_backward(labels, weight, *tensors)
        else:
            ctx.save_for_backward(*grads)
            ctx.dtypes = [x.dtype if x is not None else None for x in tensors]
        return losses.sum() if reduce else losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        wants = list(ctx.needs_input_grad[6:])
        if ctx.deferred:
            labels, weight, *tensors = ctx.saved_tensors
            _, grads = _evaluate(ctx.job, ctx.make, labels, weight * upstream, tensors, wants)
            found = [None if g is None else g.to(x.dtype) for g, x in zip(grads, tensors, strict=True)]
        else:
            saved = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
            found = [None if g is None else (g * upstream).to(dtype) for g, dtype in saved]
        return (None,) * 6 + tuple(found)


def _evaluate(job: _Job, make: Any, labels: Any, weight: torch.Tensor, tensors: Any, wants: list[bool]) -> Any:
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        s, t, classes, dtype = make(tensors, wants)
        losses = _run(job, s, t, classes, dtype, labels, weight)
        found = [*s.gradients(), *t.gradients()]
        for i, g in enumerate(found):
            if len(tensors) > 2 and i in (0, 4) and wants[i]:  # hidden states: every shard has a part of their gradient
                dist.all_reduce(g, group=job.group)
        return losses, [g if want else None for g, want in zip(found, wants, strict=True)]


def _of_logits(tensors: Any, wants: list[bool]) -> Any:
    dtype = torch.float64 if torch.float64 in [x.dtype for x in tensors] else torch.float32
    return _Scores(tensors[0], wants[0]), _Scores(tensors[1], wants[1]), tensors[0].shape[1], dtype


def _of_heads(tensors: Any, wants: list[bool], of_heads: tuple[Any, ...] = (None,) * 4) -> Any:
    sides = []
    for i in (0, 4):
        scale, cap = of_heads[i // 2 : i // 2 + 2]
        side = Side(Head(*tensors[i : i + 4], scale, cap), wants[i : i + 4])
        if side.d_hidden is not None:
            side.d_hidden = torch.empty(tensors[i].shape, dtype=torch.float32, device=tensors[i].device)
        sides.append(_Wide(side))
    return *sides, tensors[1].shape[0], torch.float32


class _Wide:
    """A Side whose hidden states' gradients stay float32 until all shards' are added."""

    def __init__(self, side: Side):
        self.side, self.any = side, side.any
        self.scores, self.accumulate = side.scores, side.accumulate

    def gradients(self) -> tuple[torch.Tensor | None, ...]:
        return self.side.d_hidden, self.side.d_weight, self.side.d_bias, self.side.d_own


def _local(name: str, x: Any, axis: int, group: Any, start: int | None) -> tuple[torch.Tensor, Any, int | None]:
    """This rank's shard of a DTensor, its group and its first class; a plain tensor is a shard already."""
    if not hasattr(x, "placements"):
        return x, group, start
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded = [i for i, p in enumerate(x.placements) if isinstance(p, Shard)]
    if len(sharded) != 1 or x.placements[sharded[0]].dim % x.dim() != axis % x.dim():
        raise ValueError(f"{name} must be sharded along its class axis and no other, got {x.placements}")
    _, offset = compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)
    return x.to_local(), x.device_mesh.get_group(sharded[0]), offset[axis]


def _whole(x: Any) -> Any:
    """A replicated DTensor's tensor; anything else as it is."""
    return x.to_local() if hasattr(x, "placements") else x


def _finish(
    make: Any, tensors: tuple[Any, ...], rows: tuple[int, ...], classes: int, deferred: bool, labels: torch.Tensor | None,
    temperature: Number, alpha: Number, divergence: str, divergence_options: Mapping[str, Number] | None,
    teacher_temperature: Number | None, scale_by_t2: bool, reduction: str, weight: torch.Tensor | None, ignore_index: int,
    num_items: Number | None, chunk_bytes: int, vocab_start: int | None, group: Any, backend: str, operation: str,
) -> torch.Tensor:  # fmt: skip
    given = [x for x in tensors if x is not None]
    like = given[0]
    kind, (p0, p1) = _soft_term(divergence, divergence_options, like)
    if kind == Kind.DECOUPLED_KL:
        raise ValueError("divergence='decoupled_kl' is not available over a sharded vocabulary")
    checks.number("temperature", temperature, low=0, open_low=True, like=like)
    checks.number("teacher_temperature", teacher_temperature, low=0, open_low=True, optional=True, like=like)
    checks.number("alpha", alpha, low=0, high=1, like=like)
    checks.items(num_items, like)
    checks.flag("scale_by_t2", scale_by_t2)
    checks.integer("chunk_bytes", chunk_bytes, low=0)
    if vocab_start is not None:
        checks.integer("vocab_start", vocab_start, low=0)
    checks.meeting(group)
    checks.choice("reduction", reduction, ("rowmean", "batchmean", "sum", "none"))
    hard = labels is not None and not (isinstance(alpha, (int, float)) and alpha == 1)
    if labels is None and isinstance(alpha, (int, float)) and alpha != 1:
        raise TypeError("labels must be a tensor where alpha is below 1: the hard-label term needs them")
    backend = backends.resolve(operation, tuple(given), backend)
    device = like.device
    ranks = dist.get_world_size(group)
    start = dist.get_rank(group) * classes if vocab_start is None else vocab_start
    dtype = torch.float64 if torch.float64 in [x.dtype for x in given] else torch.float32
    weight = checks.per_row("weight", weight, rows, device)
    # Classes of other ranks are not known here: this many where all shards are alike.
    known = vocab_start is None and classes > 0
    labels = checks.labels_of(labels, rows, classes * ranks if known else 2**62, ignore_index, device)
    w = torch.ones(rows, dtype=dtype, device=device) if weight is None else weight.detach().to(dtype)
    if labels is not None:
        w = w.masked_fill(labels == ignore_index, 0.0)
        labels = labels.masked_fill(labels == ignore_index, 0).reshape(-1)
    w = w.reshape(-1)
    divisor: Number | torch.Tensor = 1.0
    if reduction != "none":
        by = {"sum": 1.0, "batchmean": max(rows[0], 1) if rows else 1.0, "rowmean": w.sum()}
        divisor = by[reduction] if num_items is None else num_items
    if isinstance(divisor, torch.Tensor):
        divisor = divisor.detach().to(device, dtype)
        share: Any = (divisor != 0).to(dtype) / divisor.where(divisor != 0, 1.0)
    else:
        share = 1.0 / divisor
    kd = share * alpha * (temperature**2 if scale_by_t2 else 1.0)
    job = _Job(
        kind, p0, p1, temperature, temperature if teacher_temperature is None else teacher_temperature, kd,
        share * (1 - alpha) if hard else None, start, group, backend, chunk_bytes,
    )  # fmt: skip
    loss = _VocabParallel.apply(job, make, deferred or reduction == "none", reduction != "none", labels, w, *tensors)
    return loss.view(rows) if reduction == "none" else loss


def vocab_parallel_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor | None = None,
    temperature: Number = 1.0,
    alpha: Number = 1.0,
    *,
    divergence: str = "forward_kl",
    divergence_options: Mapping[str, Number] | None = None,
    teacher_temperature: Number | None = None,
    scale_by_t2: bool = True,
    reduction: str = "rowmean",
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    num_items: Number | None = None,
    vocab_start: int | None = None,
    group: dist.ProcessGroup | None = None,
    chunk_bytes: int = 0,
    backend: str = "auto",
) -> torch.Tensor:
    """distillation_loss of logits whose last axis is spread over a group: (1 - alpha) CE + alpha T^2 divergence.

    Every rank calls it with its shard and gets the loss of the whole vocabulary, and the gradient of its shard.

    Args:
        student_logits: (..., V_local), float16, bfloat16, float32 or float64; or a DTensor sharded along its last axis. A rank
            may have no class at all.
        teacher_logits: the same shard of the teacher's.
        labels: indices into the whole vocabulary; they mask rows, and are the targets where alpha is below 1.
        temperature, divergence, divergence_options, teacher_temperature, scale_by_t2, weight, ignore_index, num_items: as
            distillation_loss; every divergence but "decoupled_kl". The same on all ranks.
        alpha: the divergence's weight; 1, the default, leaves the cross-entropy out.
        reduction: "rowmean", "batchmean", "sum" or "none". Where the tokens are spread too, see `count_items`.
        vocab_start: this rank's first class; default: its rank times V_local, all shards being alike. A DTensor knows it.
        group: the ranks that share the vocabulary; default: all. A DTensor knows it.
        chunk_bytes: memory for float32 copies of a chunk of rows; 0 chooses.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        A float32 scalar (float64 for float64 logits), or one value a row; the same on all ranks.

    Raises:
        ValueError, TypeError, IndexError, BackendError: as distillation_loss.
    """
    start = vocab_start
    student_logits, group, start = _local("student_logits", student_logits, -1, group, start)
    teacher_logits, group, start = _local("teacher_logits", teacher_logits, -1, group, start)
    checks.float_tensor("student_logits", student_logits)
    checks.float_tensor("teacher_logits", teacher_logits)
    if student_logits.dim() == 0 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "student_logits and teacher_logits must be the same shard, (..., V_local): "
            f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    rows, classes = tuple(student_logits.shape[:-1]), student_logits.shape[-1]
    flat = (
        student_logits.reshape(math.prod(rows), classes),
        teacher_logits.reshape(math.prod(rows), classes),
    )
    return _finish(
        _of_logits, flat, rows, classes, torch.float16 in (student_logits.dtype, teacher_logits.dtype), labels, temperature,
        alpha, divergence, divergence_options, teacher_temperature, scale_by_t2, reduction, weight, ignore_index, num_items,
        chunk_bytes, start, group, backend, "vocab_parallel_loss",
    )  # fmt: skip


def vocab_parallel_linear_loss(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    labels: torch.Tensor | None = None,
    temperature: Number = 1.0,
    alpha: Number = 1.0,
    *,
    student_bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    student_logit_scale: Number | None = None,
    teacher_logit_scale: Number | None = None,
    student_softcap: Number | None = None,
    teacher_softcap: Number | None = None,
    divergence: str = "forward_kl",
    divergence_options: Mapping[str, Number] | None = None,
    teacher_temperature: Number | None = None,
    scale_by_t2: bool = True,
    reduction: str = "rowmean",
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    num_items: Number | None = None,
    vocab_start: int | None = None,
    group: dist.ProcessGroup | None = None,
    chunk_bytes: int = 0,
    backend: str = "auto",
) -> torch.Tensor:
    """vocab_parallel_loss from hidden states, which every rank has, and heads of which every rank has some classes.

    Args:
        student_hidden: (..., H_s), the same on all ranks; their gradient is that of the whole vocabulary.
        student_weight: (V_local, H_s), this rank's rows; or a DTensor sharded along its first axis.
        teacher_hidden, teacher_weight: (..., H_t) and (V_local, H_t).
        student_bias, teacher_bias: (V_local,).
        student_logit_scale, teacher_logit_scale, student_softcap, teacher_softcap: as linear_kl_div.

    The other arguments, the result and the errors are vocab_parallel_loss's; float64 is not available.
    """
    start = vocab_start
    student_weight, group, start = _local("student_weight", student_weight, 0, group, start)
    teacher_weight, group, start = _local("teacher_weight", teacher_weight, 0, group, start)
    student_bias, teacher_bias = (
        None if b is None else _local("bias", b, 0, group, start)[0] for b in (student_bias, teacher_bias)
    )
    student_hidden, teacher_hidden = _whole(student_hidden), _whole(teacher_hidden)
    for name, x in (("student_hidden", student_hidden), ("student_weight", student_weight),
                    ("teacher_hidden", teacher_hidden), ("teacher_weight", teacher_weight)):  # fmt: skip
        checks.float_tensor(name, x)
        if x.dtype == torch.float64:
            raise TypeError(f"{name} must be float16, bfloat16 or float32, got float64")
    for model, hidden, head in (
        ("student", student_hidden, student_weight),
        ("teacher", teacher_hidden, teacher_weight),
    ):
        if head.dim() != 2 or hidden.dim() == 0 or head.shape[1] != hidden.shape[-1]:
            raise ValueError(
                f"{model}_weight must have shape (V_local, {hidden.shape[-1] if hidden.dim() else 'H'}), got {tuple(head.shape)}"
            )
    if student_weight.shape[0] != teacher_weight.shape[0] or student_hidden.shape[:-1] != teacher_hidden.shape[:-1]:
        raise ValueError(
            "student and teacher must have the same tokens and the same shard of the vocabulary: hidden states "
            f"{tuple(student_hidden.shape)} and {tuple(teacher_hidden.shape)}, heads {tuple(student_weight.shape)} and "
            f"{tuple(teacher_weight.shape)}"
        )
    checks.number("student_logit_scale", student_logit_scale, optional=True, like=student_hidden)
    checks.number("teacher_logit_scale", teacher_logit_scale, optional=True, like=student_hidden)
    checks.number("student_softcap", student_softcap, low=0, open_low=True, optional=True, like=student_hidden)
    checks.number("teacher_softcap", teacher_softcap, low=0, open_low=True, optional=True, like=student_hidden)

    def make(tensors: Any, wants: list[bool]) -> Any:
        return _of_heads(tensors, wants, (student_logit_scale, student_softcap, teacher_logit_scale, teacher_softcap))

    tensors = (
        student_hidden.reshape(-1, student_hidden.shape[-1]), student_weight, student_bias, None,
        teacher_hidden.reshape(-1, teacher_hidden.shape[-1]), teacher_weight, teacher_bias, None,
    )  # fmt: skip
    return _finish(
        make, tensors, tuple(student_hidden.shape[:-1]), student_weight.shape[0], False, labels, temperature, alpha,
        divergence, divergence_options, teacher_temperature, scale_by_t2, reduction, weight, ignore_index, num_items,
        chunk_bytes, start, group, backend, "vocab_parallel_linear_loss",
    )  # fmt: skip
