"""This rank's samples against everybody's, while blocks of samples go round the ranks in a ring.

A rank has its own rows, one other's (and the one that is on its way), and rows of a matrix, (N_local, N): never all
samples, never (N, N). Gradients go round as blocks do and end where they belong, everything in an order that depends on the
ranks alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from kdkernels.distributed.batch import Samples
from kdkernels.ops.library import save
from kdkernels.ops.precision import full_float32


def _pass_on(samples: Samples, block: torch.Tensor, arriving: torch.Tensor) -> list[Any]:
    """Starts sending to the next rank and receiving from the one before. What is empty does not travel."""
    ranks, me, group = len(samples.counts), samples.rank, samples.group
    operations = []
    if block.numel():
        operations.append(dist.P2POp(dist.isend, block, dist.get_global_rank(group, (me + 1) % ranks), group))
    if arriving.numel():
        operations.append(dist.P2POp(dist.irecv, arriving, dist.get_global_rank(group, (me - 1) % ranks), group))
    return dist.batch_isend_irecv(operations) if operations else []


def _blocks(samples: Samples, x: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """(owner, its rows) of every rank, this one's first; the next block travels while one is used."""
    ranks, block = len(samples.counts), x.contiguous()
    for step in range(ranks):
        owner = (samples.rank - step) % ranks
        last = step == ranks - 1
        if not last:
            arriving = x.new_empty(samples.counts[owner - 1], *x.shape[1:])
            on_their_way = _pass_on(samples, block, arriving)
        yield owner, block
        if not last:
            for one in on_their_way:
                one.wait()
            block = arriving


class _Rows(torch.autograd.Function):
    """a_i . b_j, or |a_i - b_j|^2, for this rank's rows of a and all rows of b.

    Products are in float32 (float64 ones in float64). Distances are from differences in float64, and their gradients are
    products in float64, so that both are right on clusters far from the origin.
    """

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor, apart: bool, samples: Samples) -> torch.Tensor:
        ctx.apart, ctx.samples = apart, samples
        save(ctx, a, b)
        out = a.new_empty(a.shape[0], samples.whole, dtype=torch.promote_types(a.dtype, torch.float32))
        ctx.wide = torch.float64 if apart else out.dtype
        with torch.autocast(a.device.type, enabled=False), full_float32():
            mine = a.to(ctx.wide)
            for owner, block in _blocks(samples, b):
                theirs = block.to(ctx.wide)
                out[:, samples.of(owner)] = (
                    torch.cdist(mine, theirs, compute_mode="donot_use_mm_for_euclid_dist").square_()
                    if apart
                    else mine @ theirs.T
                )
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        a, b = ctx.saved_tensors
        want_a, want_b = ctx.needs_input_grad[:2]
        samples, ranks = ctx.samples, len(ctx.samples.counts)
        with torch.autocast(a.device.type, enabled=False), full_float32():
            mine = a.to(ctx.wide)
            da, db = torch.zeros_like(mine), b.new_zeros(b.shape, dtype=ctx.wide)
            for owner, block in _blocks(samples, b):
                theirs, g = block.to(ctx.wide), upstream[:, samples.of(owner)].to(ctx.wide)
                if want_a:
                    da += 2 * (g.sum(1, keepdim=True) * mine - g @ theirs) if ctx.apart else g @ theirs
                if want_b:
                    db += 2 * (g.sum(0).unsqueeze(1) * theirs - g.T @ mine) if ctx.apart else g.T @ mine
                    if ranks > 1:
                        arriving = db.new_empty(samples.counts[owner - 1], *db.shape[1:])
                        for one in _pass_on(samples, db, arriving):
                            one.wait()
                        db = arriving
        return da.to(a.dtype) if want_a else None, db.to(b.dtype) if want_b else None, None, None


def products(a: torch.Tensor, b: torch.Tensor, samples: Samples) -> torch.Tensor:
    """a B^T, (N_local, N), B being all ranks' b; float32 or float64, whatever the user's allow_tf32."""
    return _Rows.apply(a, b, False, samples)


def squared_distances(x: torch.Tensor, samples: Samples) -> torch.Tensor:
    """|x_i - x_j|^2 of this rank's i and everybody's j, (N_local, N); float32 or float64."""
    return _Rows.apply(x, x, True, samples)


def others(samples: Samples, device: torch.device) -> torch.Tensor:
    """Whether i and j are two samples, (N_local, N)."""
    mine = torch.arange(samples.own.start, samples.own.stop, device=device)
    return mine[:, None] != torch.arange(samples.whole, device=device)
