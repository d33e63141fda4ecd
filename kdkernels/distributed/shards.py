"""A loss over a vocabulary of which every rank of a group has a part, a chunk of rows at a time.

Local log-sum-exps meet in one collective; from log-probabilities of the whole vocabulary the row kernels make each shard's
part of the divergence and its derivatives g; their sums over classes meet in a second one, which the KL kinds do without;
and dz = (g - p sum g) / T. A head's shard gives its own dW, and the hidden states' gradients, which all shards share, are
added up once. Everything is computed in float32 (float64 logits in float64).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist

from kdkernels.distributed.batch import all_gather
from kdkernels.ops.library import save
from kdkernels.ops.linear_divergence.heads import Head, Side, chunk_rows
from kdkernels.ops.row_divergence import reference
from kdkernels.ops.row_divergence.kinds import Inputs, Kind
from kdkernels.ops.row_divergence.op import forward_op
from kdkernels.ops.scalars import Number, pack

BUFFERS = 4  # tensors of a chunk's logits: both models' and the derivatives


@dataclasses.dataclass(frozen=True)
class Job:
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
    job: Job, s: Any, t: Any, classes: int, dtype: torch.dtype, labels: torch.Tensor | None, weight: torch.Tensor
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
    job: Job,
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


def _combined(local: list[torch.Tensor], reverse: bool, job: Job) -> list[torch.Tensor]:
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
    job: Job, a: torch.Tensor, b: torch.Tensor, w: torch.Tensor, want_s: bool, want_t: bool
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


class ShardedLoss(torch.autograd.Function):
    """Gradients are made in the forward, or in the backward where their scale is not known: float16 logits, "none"."""

    @staticmethod
    def forward(ctx, job, make, deferred, reduce, labels, weight, *tensors):  # type: ignore[no-untyped-def]
        wants = list(ctx.needs_input_grad[6:])
        ctx.job, ctx.make, ctx.deferred, ctx.reduce = job, make, deferred, reduce
        losses, grads = _evaluate(job, make, labels, weight, tensors, wants if not deferred else [False] * len(wants))
        if deferred:
            save(ctx, labels, weight, *tensors)
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


def _evaluate(job: Job, make: Any, labels: Any, weight: torch.Tensor, tensors: Any, wants: list[bool]) -> Any:
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        s, t, classes, dtype = make(tensors, wants)
        losses = _run(job, s, t, classes, dtype, labels, weight)
        found = [*s.gradients(), *t.gradients()]
        for i, g in enumerate(found):
            if len(tensors) > 2 and i in (0, 4) and wants[i]:  # hidden states: every shard has a part of their gradient
                dist.all_reduce(g, group=job.group)
        return losses, [g if want else None for g, want in zip(found, wants, strict=True)]


def of_logits(tensors: Any, wants: list[bool]) -> Any:
    """Both sides of a loss of logits, how many classes they have here, and the dtype to compute in."""
    dtype = torch.float64 if torch.float64 in [x.dtype for x in tensors] else torch.float32
    return _Scores(tensors[0], wants[0]), _Scores(tensors[1], wants[1]), tensors[0].shape[1], dtype


def of_heads(tensors: Any, wants: list[bool], transforms: tuple[Any, ...]) -> Any:
    """The same of hidden states and heads, and the student's and the teacher's scale and softcap."""
    sides = []
    for i in (0, 4):
        scale, cap = transforms[i // 2 : i // 2 + 2]
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
