"""The operators on feature maps, their autograd, and the choice of backend.

A map is (batch, rows, lanes) with its lanes side by side in memory: channels are its rows in an NCHW tensor, and its
lanes where they come last. Weights, offsets and sums are as small as a map's rows or lanes, and what follows from them
is plain torch: only what reads or writes a whole map is here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from kdkernels.ops.library import define, first_order, graph_is_kept
from kdkernels.ops.scalars import pack
from kdkernels.ops.scale.op import scaled
from kdkernels.ops.weighted_match import native, reference
from kdkernels.ops.weighted_match.reference import MEASURES

MOMENTS = 5  # sums of s, t, s^2, t^2, s t
MAP = tuple[torch.Tensor, torch.Tensor]


def _kernels(backend: str) -> Any:
    """The module with a backend's tile(lanes) and call(backend, entry, ...)."""
    if backend == "triton":
        from kdkernels.ops.weighted_match import triton

        return triton
    return native


def _packed(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _small(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.detach().float().contiguous()


def ordered_sum(x: torch.Tensor) -> torch.Tensor:
    """The sum of all elements, added in one order whatever the number of threads."""
    x = x.reshape(-1)
    while x.numel() > 16384:  # torch shares a single sum among threads from twice that on, but never a row of many
        x = F.pad(x, (0, -x.numel() % 1024)).view(-1, 1024).sum(1)
    return x.sum()


def _shares(x: torch.Tensor, rows: bool, fields: int, tile: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Room for the sums of every tile: (pieces, fields, batch, rows or lanes)."""
    batch, height, width = x.shape
    kept, pieces = (height, -(-width // tile[1])) if rows else (width, -(-height // tile[0]))
    return torch.empty(pieces, fields, batch, kept, dtype=dtype, device=x.device)


def _joined(shares: torch.Tensor) -> torch.Tensor:
    return shares[0] if shares.shape[0] == 1 else shares.sum(0, dtype=torch.float64).to(shares.dtype)


# ---- weighted differences ----


def _match(
    s: torch.Tensor,
    t: torch.Tensor,
    row_weight: torch.Tensor | None,
    lane_weight: torch.Tensor | None,
    row_offset: torch.Tensor | None,
    lane_offset: torch.Tensor | None,
    scalars: torch.Tensor,
    upstream: torch.Tensor | None,
    measure: int,
    row_sums: bool,
    lane_sums: bool,
    want_student: bool,
    want_teacher: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    outputs = _match_fake(
        s, t, row_weight, lane_weight, row_offset, lane_offset, scalars, upstream, measure, row_sums, lane_sums,
        want_student, want_teacher, backend,
    )  # fmt: skip
    total, rows, lanes, ds, dt = outputs
    if s.numel() == 0:
        return total.zero_(), rows.zero_(), lanes.zero_(), ds, dt
    s, t = _packed(s), _packed(t)
    sides = row_weight, lane_weight, row_offset, lane_offset
    if not row_sums and all(x is None for x in sides) and s.is_contiguous() and t.is_contiguous():
        s, t = (x.view(x.shape[0], 1, -1) for x in (s, t))  # nothing tells a row from another: one long row
    kernels = _kernels(backend)
    tile = kernels.tile(s.shape[2])
    of_rows = _shares(s, True, 2, tile, torch.float32)
    of_lanes = _shares(s, False, 2, tile, torch.float32) if lane_sums else None
    kernels.call(
        backend, "feature_match", s, t, *sides, scalars, None if upstream is None else upstream.reshape(1).float(),
        of_rows, of_lanes, ds.view(s.shape) if want_student else None, dt.view(t.shape) if want_teacher else None,
        measure, *tile,
    )  # fmt: skip
    values = of_rows.select(1, 0).sum(0, dtype=torch.float64)
    if row_weight is not None:
        values = values * row_weight
    total.copy_(ordered_sum(values) * scalars[1])
    if row_sums:
        rows = _joined(of_rows)
    if of_lanes is not None:
        lanes = _joined(of_lanes)
    return total, rows, lanes, ds, dt


def _match_fake(
    s, t, row_weight, lane_weight, row_offset, lane_offset, scalars, upstream, measure, row_sums, lane_sums, want_student,
    want_teacher, backend,
):  # fmt: skip
    batch, rows, lanes = s.shape
    options = {"dtype": torch.float32, "device": s.device}
    return (
        torch.empty((), **options),
        torch.empty((2, batch, rows) if row_sums else (0,), **options),
        torch.empty((2, batch, lanes) if lane_sums else (0,), **options),
        torch.empty(s.shape if want_student else (0,), dtype=s.dtype, device=s.device),
        torch.empty(t.shape if want_teacher else (0,), dtype=t.dtype, device=t.device),
    )


match_op = define(
    "feature_match(Tensor s, Tensor t, Tensor? row_weight, Tensor? lane_weight, Tensor? row_offset, Tensor? lane_offset, "
    "Tensor scalars, Tensor? upstream, int measure, bool row_sums, bool lane_sums, bool want_student, bool want_teacher, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _match,
    _match_fake,
)


class Match(torch.autograd.Function):
    """Value and maps' gradients in one pass, and the sums that are the weights' and offsets' gradients.

    A float16 gradient is made in the backward, when its upstream scale is known: stored before, small ones would be 0.
    """

    @staticmethod
    def forward(ctx, s, t, row_weight, lane_weight, row_offset, lane_offset, scalars, options):
        measure, backend = options
        want_s, want_t, *of_sides = ctx.needs_input_grad[:6]
        sides = tuple(map(_small, (row_weight, lane_weight, row_offset, lane_offset)))
        late = (want_s and s.dtype == torch.float16) or (want_t and t.dtype == torch.float16)
        total, rows, lanes, ds, dt = match_op(
            s, t, *sides, scalars, None, measure, of_sides[0] or of_sides[2], of_sides[1] or of_sides[3],
            want_s and not late, want_t and not late, backend,
        )  # fmt: skip
        inputs = (s, t) if late else (None, None)
        ctx.save_for_backward(total, *inputs, *sides, scalars, rows, lanes, ds, dt)
        ctx.late, ctx.options = late, options
        return total

    @staticmethod
    def backward(ctx, upstream):
        measure, backend = ctx.options
        total, s, t, *sides, scalars, rows, lanes, ds, dt = ctx.saved_tensors
        want_s, want_t, *of_sides = ctx.needs_input_grad[:6]
        with torch.no_grad():
            if ctx.late:
                *_, ds, dt = match_op(
                    s, t, *sides, scalars, upstream, measure, False, False, want_s, want_t, backend
                )  # fmt: skip
                maps: tuple = ds if want_s else None, dt if want_t else None
            else:
                made = tuple(g for g, want in ((ds, want_s), (dt, want_t)) if want)
                grads = iter(scaled(made, upstream, backend, keep=graph_is_kept()))
                maps = tuple(next(grads) if want else None for want in (want_s, want_t))
            row_weight, lane_weight, *_ = sides
            upstream = upstream * scalars[1]
            small = (
                upstream * rows[0] if of_sides[0] else None,
                upstream * lanes[0] if of_sides[1] else None,
                upstream * _times(rows[1], row_weight) if of_sides[2] else None,
                upstream * _times(lanes[1], lane_weight) if of_sides[3] else None,
            )
        return (*first_order("feature_match", total, (*maps, *small)), None, None)


def _times(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    return x if weight is None else x * weight


def match(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    row_weight: torch.Tensor | None = None,
    lane_weight: torch.Tensor | None = None,
    row_offset: torch.Tensor | None = None,
    lane_offset: torch.Tensor | None = None,
    measure: str = "squared",
    beta: float = 1.0,
    factor: float = 1.0,
    backend: str,
) -> torch.Tensor:
    """factor sum_(b,r,l) row_weight_br lane_weight_bl m(s_brl - t_brl + row_offset_br + lane_offset_bl).

    Args:
        student, teacher: maps (batch, rows, lanes).
        row_weight, row_offset: (batch, rows); weights are 1 and offsets 0 where not given. They get gradients.
        lane_weight, lane_offset: (batch, lanes).
        measure: m(d): "squared" d^2, "absolute" |d|, or "smooth_l1", which turns linear at beta.
        factor: what the loss is multiplied by before its gradient is rounded to the maps' dtype.
        backend: a resolved one.
    """
    sides = row_weight, lane_weight, row_offset, lane_offset
    if backend == "reference":
        return factor * reference.match(student, teacher, *sides, measure=measure, beta=beta)
    return Match.apply(student, teacher, *sides, pack((beta, factor)), (MEASURES.index(measure), backend))


# ---- sums of powers ----


def _power_sums(
    x: torch.Tensor, row_weight: torch.Tensor | None, lane_weight: torch.Tensor | None, scalars: torch.Tensor,
    exponent: int, odd: bool, rows: bool, lanes: bool, backend: str,
) -> MAP:  # fmt: skip
    out_rows, out_lanes = _power_sums_fake(x, row_weight, lane_weight, scalars, exponent, odd, rows, lanes, backend)
    if x.numel() == 0:
        return out_rows.zero_(), out_lanes.zero_()
    kernels, x = _kernels(backend), _packed(x)
    tile = kernels.tile(x.shape[2])
    of_rows = _shares(x, True, 1, tile, torch.float32) if rows else None
    of_lanes = _shares(x, False, 1, tile, torch.float32) if lanes else None
    kernels.call(
        backend, "feature_power_sums", x, row_weight, lane_weight, scalars, of_rows, of_lanes, exponent, int(odd), *tile
    )
    return (
        out_rows if of_rows is None else _joined(of_rows)[0],
        out_lanes if of_lanes is None else _joined(of_lanes)[0],
    )


def _power_sums_fake(x, row_weight, lane_weight, scalars, exponent, odd, rows, lanes, backend):
    batch, height, width = x.shape
    options = {"dtype": torch.float32, "device": x.device}
    return (
        torch.empty((batch, height) if rows else (0,), **options),
        torch.empty((batch, width) if lanes else (0,), **options),
    )


def _power_gradient(
    x: torch.Tensor, row_weight: torch.Tensor | None, lane_weight: torch.Tensor | None, scalars: torch.Tensor,
    rows: torch.Tensor | None, lanes: torch.Tensor | None, exponent: int, odd: bool, backend: str,
) -> torch.Tensor:  # fmt: skip
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        kernels, x = _kernels(backend), _packed(x)
        kernels.call(
            backend, "feature_power_gradient", x, row_weight, lane_weight, scalars, _small(rows), _small(lanes), dx,
            exponent, int(odd), *kernels.tile(x.shape[2]),
        )  # fmt: skip
    return dx


def _power_gradient_fake(x, row_weight, lane_weight, scalars, rows, lanes, exponent, odd, backend):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


power_sums_op = define(
    "feature_power_sums(Tensor x, Tensor? row_weight, Tensor? lane_weight, Tensor scalars, int exponent, bool odd, "
    "bool rows, bool lanes, str backend) -> (Tensor, Tensor)",
    _power_sums,
    _power_sums_fake,
)
power_gradient_op = define(
    "feature_power_gradient(Tensor x, Tensor? row_weight, Tensor? lane_weight, Tensor scalars, Tensor? rows, "
    "Tensor? lanes, int exponent, bool odd, str backend) -> Tensor",
    _power_gradient,
    _power_gradient_fake,
)


class PowerSums(torch.autograd.Function):
    """The weights' gradients are the same sums, with the other side's upstream as weights."""

    @staticmethod
    def forward(ctx, x, row_weight, lane_weight, scalars, options):
        sides = _small(row_weight), _small(lane_weight)
        rows, lanes = power_sums_op(x, *sides, scalars, *options)
        ctx.save_for_backward(rows if rows.numel() else lanes, x, *sides, scalars)
        ctx.options = options
        return rows, lanes

    @staticmethod
    def backward(ctx, rows, lanes):
        output, x, row_weight, lane_weight, scalars = ctx.saved_tensors
        exponent, odd, of_rows, of_lanes, backend = ctx.options
        want_x, want_row, want_lane = ctx.needs_input_grad[:3]
        dx = d_row = d_lane = None
        with torch.no_grad():
            rows, lanes = _small(rows if of_rows else None), _small(lanes if of_lanes else None)
            if want_x:
                dx = power_gradient_op(x, row_weight, lane_weight, scalars, rows, lanes, exponent, odd, backend)
            if want_row or want_lane:
                d_row, d_lane = power_sums_op(
                    x, rows, lanes, scalars, exponent, odd, want_row and of_lanes, want_lane and of_rows, backend
                )
        d_row, d_lane = d_row if want_row else None, d_lane if want_lane else None
        return (*first_order("feature_power_sums", output, (dx, d_row, d_lane)), None, None)


def power_sums(
    x: torch.Tensor,
    p: float,
    *,
    signed: bool = False,
    rows: bool = False,
    lanes: bool = False,
    row_weight: torch.Tensor | None = None,
    lane_weight: torch.Tensor | None = None,
    backend: str,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Sums of |x|^p over the lanes of every row, (batch, rows), and over the rows of every lane, (batch, lanes).

    Args:
        x: a map (batch, rows, lanes).
        p: at least 1; 1 to 4 are multiplications.
        signed: x^p instead, for an integer p.
        rows, lanes: which of the two to make, in one read; None stands for the other.
        row_weight: (batch, rows), in the sums of the lanes. It gets a gradient.
        lane_weight: (batch, lanes), in the sums of the rows.
        backend: a resolved one.
    """
    if backend == "reference":
        return reference.power_sums(x, p, signed, rows, lanes, row_weight, lane_weight)
    exponent = int(p) if p in (1, 2, 3, 4) else 0
    odd = signed and p % 2 == 1
    options = exponent, odd, rows, lanes, backend
    of_rows, of_lanes = PowerSums.apply(x, row_weight, lane_weight, pack((p, 0.0)), options)
    return of_rows if rows else None, of_lanes if lanes else None


# ---- second moments of a pair ----


def _moments(s: torch.Tensor, t: torch.Tensor, lanes: bool, backend: str) -> torch.Tensor:
    out = _moments_fake(s, t, lanes, backend)
    if s.numel() == 0:
        return out.zero_()
    kernels, s, t = _kernels(backend), _packed(s), _packed(t)
    tile = kernels.tile(s.shape[2])
    shares = _shares(s, not lanes, MOMENTS, tile, torch.float64)
    kernels.call(
        backend, "feature_moments", s, t, None if lanes else shares, shares if lanes else None, *tile
    )  # fmt: skip
    return _joined(shares)


def _moments_fake(s, t, lanes, backend):
    batch, height, width = s.shape
    return torch.empty(MOMENTS, batch, width if lanes else height, dtype=torch.float64, device=s.device)


def _moments_gradient(
    s: torch.Tensor, t: torch.Tensor, upstream: torch.Tensor, lanes: bool, want_student: bool, want_teacher: bool,
    backend: str,
) -> MAP:  # fmt: skip
    ds, dt = _moments_gradient_fake(s, t, upstream, lanes, want_student, want_teacher, backend)
    if s.numel():
        kernels, s, t = _kernels(backend), _packed(s), _packed(t)
        kernels.call(
            backend, "feature_moments_gradient", s, t, upstream.contiguous(), ds if want_student else None,
            dt if want_teacher else None, int(lanes), *kernels.tile(s.shape[2]),
        )  # fmt: skip
    return ds, dt


def _moments_gradient_fake(s, t, upstream, lanes, want_student, want_teacher, backend):
    return (
        torch.empty(s.shape if want_student else (0,), dtype=s.dtype, device=s.device),
        torch.empty(t.shape if want_teacher else (0,), dtype=t.dtype, device=t.device),
    )


moments_op = define("feature_moments(Tensor s, Tensor t, bool lanes, str backend) -> Tensor", _moments, _moments_fake)
moments_gradient_op = define(
    "feature_moments_gradient(Tensor s, Tensor t, Tensor upstream, bool lanes, bool want_student, bool want_teacher, "
    "str backend) -> (Tensor, Tensor)",
    _moments_gradient,
    _moments_gradient_fake,
)


class Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx, s, t, lanes, backend):
        sums = moments_op(s, t, lanes, backend)
        ctx.save_for_backward(sums, s, t)
        ctx.options = lanes, backend
        return sums

    @staticmethod
    def backward(ctx, upstream):
        sums, s, t = ctx.saved_tensors
        lanes, backend = ctx.options
        want_s, want_t = ctx.needs_input_grad[:2]
        with torch.no_grad():
            ds, dt = moments_gradient_op(s, t, upstream, lanes, want_s, want_t, backend)
        return (*first_order("feature_moments", sums, (ds if want_s else None, dt if want_t else None)), None, None)


def moments(student: torch.Tensor, teacher: torch.Tensor, *, lanes: bool, backend: str) -> torch.Tensor:
    """Sums of s, t, s^2, t^2 and s t over the rows of every lane, or over the lanes of every row.

    Args:
        student, teacher: maps (batch, rows, lanes).
        lanes: keep the lanes.
        backend: a resolved one, not "reference".

    Returns:
        float64 (5, batch, lanes or rows): so many digits that neither variances nor correlations lose any.
    """
    return Moments.apply(student, teacher, lanes, backend)
