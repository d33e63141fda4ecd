"""Weighted differences of feature maps, and the distance of their attentions: operators, autograd, choice of backend.

Tensors are (N, C, ...), or have their channels on another axis `dim`, and are read as they lie (maps.py). Weights, offsets
and sums are as small as a map's channels (N, C) or pixels (N, P).
"""

from __future__ import annotations

import math

import torch

from kdkernels.ops.library import define, first_order
from kdkernels.ops.scalars import pack
from kdkernels.ops.scale.op import scaled
from kdkernels.ops.weighted_match import reference
from kdkernels.ops.weighted_match.maps import Plan, as_dense, as_line, as_map, is_dense, like, of_channels, plan
from kdkernels.ops.weighted_match.reference import MEASURES
from kdkernels.ops.weighted_match.sums import exponent_of, kernels, needs_gradient, power_gradient_op, small

HALF = torch.float16


# ---- weighted differences ----


def _match(
    s: torch.Tensor,
    t: torch.Tensor,
    channel_weight: torch.Tensor | None,
    pixel_weight: torch.Tensor | None,
    channel_offset: torch.Tensor | None,
    pixel_offset: torch.Tensor | None,
    scalars: torch.Tensor,
    upstream: torch.Tensor | None,
    measure: int,
    dim: int,
    channel_sums: bool,
    pixel_sums: bool,
    want_student: bool,
    want_teacher: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    by_s = plan(s, dim)
    by_t = plan(t, dim, by_s.channels_last)
    outputs = _match_outputs(s, t, by_s, by_t, channel_sums, pixel_sums, want_student, want_teacher)
    total, channels, pixels, ds, dt = outputs
    if s.numel() == 0:
        return total.zero_(), channels.zero_(), pixels.zero_(), ds, dt
    sides = channel_weight, pixel_weight, channel_offset, pixel_offset
    x, y = as_map(s, by_s), as_map(t, by_t)
    d_x, d_y = as_dense(ds, by_s) if want_student else None, as_dense(dt, by_t) if want_teacher else None
    rows, lanes = channels if channel_sums else None, pixels if pixel_sums else None
    if by_s.channels_last:
        sides = pixel_weight, channel_weight, pixel_offset, channel_offset
        rows, lanes = lanes, rows
    if sides == (None, None, None, None) and rows is None and lanes is None and is_dense(x) and is_dense(y):
        x, y, d_x, d_y = (None if v is None else as_line(v) for v in (x, y, d_x, d_y))
    kernels(backend)(backend, "feature_match", x, y, *sides, scalars, upstream, total, rows, lanes, d_x, d_y, measure)
    return outputs


def _match_outputs(
    s: torch.Tensor, t: torch.Tensor, by_s: Plan, by_t: Plan, channels: bool, pixels: bool, student: bool, teacher: bool
) -> tuple[torch.Tensor, ...]:
    _, rows, lanes = by_s.shape
    n_channels, n_pixels = (lanes, rows) if by_s.channels_last else (rows, lanes)
    return (
        torch.empty((), dtype=torch.float32, device=s.device),
        torch.empty((2, s.shape[0], n_channels) if channels else 0, dtype=torch.float32, device=s.device),
        torch.empty((2, s.shape[0], n_pixels) if pixels else 0, dtype=torch.float32, device=s.device),
        like(s, by_s) if student else torch.empty(0, dtype=s.dtype, device=s.device),
        like(t, by_t) if teacher else torch.empty(0, dtype=t.dtype, device=t.device),
    )


def _match_fake(
    s, t, channel_weight, pixel_weight, channel_offset, pixel_offset, scalars, upstream, measure, dim, channel_sums,
    pixel_sums, want_student, want_teacher, backend,
):  # fmt: skip
    by_s = plan(s, dim)
    by_t = plan(t, dim, by_s.channels_last)
    return _match_outputs(s, t, by_s, by_t, channel_sums, pixel_sums, want_student, want_teacher)


match_op = define(
    "feature_match(Tensor s, Tensor t, Tensor? channel_weight, Tensor? pixel_weight, Tensor? channel_offset, "
    "Tensor? pixel_offset, Tensor scalars, Tensor? upstream, int measure, int dim, bool channel_sums, bool pixel_sums, "
    "bool want_student, bool want_teacher, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _match,
    _match_fake,
)


def _one(upstream: torch.Tensor) -> torch.Tensor:
    return upstream.reshape(1).float()


class Match(torch.autograd.Function):
    """Value and maps' gradients in one pass, and the sums that are the weights' and offsets' gradients.

    A float16 gradient is made in the backward, when its upstream scale is known: stored before, small ones would be 0.
    """

    @staticmethod
    def forward(ctx, s, t, channel_weight, pixel_weight, channel_offset, pixel_offset, scalars, options):
        measure, dim, backend = options
        want_s, want_t, *of_sides = ctx.needs_input_grad[:6]
        sides = tuple(map(small, (channel_weight, pixel_weight, channel_offset, pixel_offset)))
        late = (want_s and s.dtype == HALF) or (want_t and t.dtype == HALF)
        total, channels, pixels, ds, dt = match_op(
            s, t, *sides, scalars, None, measure, dim, of_sides[0] or of_sides[2], of_sides[1] or of_sides[3],
            want_s and not late, want_t and not late, backend,
        )  # fmt: skip
        inputs = (s, t) if late else (None, None)
        ctx.save_for_backward(total, *inputs, *sides, scalars, channels, pixels, ds, dt)
        ctx.late, ctx.options = late, options
        return total

    @staticmethod
    def backward(ctx, upstream):
        measure, dim, backend = ctx.options
        total, s, t, *sides, scalars, channels, pixels, ds, dt = ctx.saved_tensors
        want_s, want_t, *of_sides = ctx.needs_input_grad[:6]
        maps: tuple
        small_ones: tuple = (None, None, None, None)
        with torch.no_grad():
            if ctx.late:
                *_, ds, dt = match_op(
                    s, t, *sides, scalars, _one(upstream), measure, dim, False, False, want_s, want_t, backend
                )  # fmt: skip
                maps = ds if want_s else None, dt if want_t else None
            else:
                maps = _scaled((ds, dt), (want_s, want_t), upstream, backend)
            if any(of_sides):
                channel_weight, pixel_weight, *_ = sides
                upstream = upstream * scalars[1]
                small_ones = (
                    upstream * channels[0] if of_sides[0] else None,
                    upstream * pixels[0] if of_sides[1] else None,
                    upstream * _times(channels[1], channel_weight) if of_sides[2] else None,
                    upstream * _times(pixels[1], pixel_weight) if of_sides[3] else None,
                )
        return (*first_order("feature_match", total, (*maps, *small_ones)), None, None)


def _scaled(
    grads: tuple[torch.Tensor, torch.Tensor], wanted: tuple[bool, bool], upstream: torch.Tensor, backend: str
) -> tuple[torch.Tensor | None, ...]:
    """Stored gradients times upstream, None where they are not wanted."""
    made = iter(scaled([g for g, want in zip(grads, wanted) if want], upstream, backend))
    return tuple(next(made) if want else None for want in wanted)


def _times(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    return x if weight is None else x * weight


def match(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    dim: int = 1,
    channel_weight: torch.Tensor | None = None,
    pixel_weight: torch.Tensor | None = None,
    channel_offset: torch.Tensor | None = None,
    pixel_offset: torch.Tensor | None = None,
    measure: str = "squared",
    beta: float = 1.0,
    factor: float = 1.0,
    backend: str,
) -> torch.Tensor:
    """factor sum_(b,c,l) channel_weight_bc pixel_weight_bl m(s_bcl - t_bcl + channel_offset_bc + pixel_offset_bl).

    Args:
        student, teacher: features of one shape.
        dim: their channels' axis, not negative and not the first.
        channel_weight, channel_offset: (batch, channels); weights are 1 and offsets 0 where not given. They get gradients.
        pixel_weight, pixel_offset: (batch, pixels).
        measure: m(d): "squared" d^2, "absolute" |d|, or "smooth_l1", which turns linear at beta.
        factor: what the loss is multiplied by before its gradient is rounded to the features' dtype.
        backend: a resolved one.
    """
    sides = channel_weight, pixel_weight, channel_offset, pixel_offset
    if backend == "reference":
        s, t = of_channels(student, dim), of_channels(teacher, dim)
        return factor * reference.match(s, t, *sides, measure=measure, beta=beta)
    scalars, kind = pack((beta, factor)), MEASURES.index(measure)
    if not needs_gradient(student, teacher, *sides):
        sides = tuple(map(small, sides))
        return match_op(
            student, teacher, *sides, scalars, None, kind, dim, False, False, False, False, backend
        )[0]  # fmt: skip
    return Match.apply(student, teacher, *sides, scalars, (kind, dim, backend))


# ---- the distance of two attentions ----

SQUARED, MEAN, ADD_EPS, SIGNED, OVER_CHANNELS = 1, 2, 4, 8, 16  # of the operator's `flags`


def _attention(
    s: torch.Tensor, t: torch.Tensor, scalars: torch.Tensor, exponent: int, flags: int, dim: int, want_student: bool,
    want_teacher: bool, backend: str,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    by_s, by_t = plan(s, dim), plan(t, dim)
    outputs = _attention_outputs(s, t, by_s, by_t, flags, want_student, want_teacher)
    total, of_s, of_t, ds, dt = outputs
    if s.shape[0] == 0:
        total.zero_()
        return outputs
    over_channels = flags & OVER_CHANNELS != 0
    kernels(backend)(
        backend, "feature_attention", as_map(s, by_s), as_map(t, by_t), scalars, total, of_s, of_t,
        as_dense(ds, by_s) if want_student else None, as_dense(dt, by_t) if want_teacher else None, exponent,
        flags & SIGNED, by_s.channels_last == over_channels, by_t.channels_last == over_channels, flags & MEAN,
        flags & SQUARED, flags & ADD_EPS,
    )  # fmt: skip
    return outputs


def _attention_outputs(
    s: torch.Tensor, t: torch.Tensor, by_s: Plan, by_t: Plan, flags: int, student: bool, teacher: bool
) -> tuple[torch.Tensor, ...]:
    keep_rows = by_s.channels_last == (flags & OVER_CHANNELS != 0)
    kept = by_s.shape[1 if keep_rows else 2]
    return (
        torch.empty((), dtype=torch.float32, device=s.device),
        torch.empty((s.shape[0], kept), dtype=torch.float32, device=s.device),
        torch.empty((s.shape[0], kept), dtype=torch.float32, device=s.device),
        like(s, by_s) if student else torch.empty(0, dtype=s.dtype, device=s.device),
        like(t, by_t) if teacher else torch.empty(0, dtype=t.dtype, device=t.device),
    )


def _attention_fake(s, t, scalars, exponent, flags, dim, want_student, want_teacher, backend):
    return _attention_outputs(s, t, plan(s, dim), plan(t, dim), flags, want_student, want_teacher)


attention_op = define(
    "feature_attention(Tensor s, Tensor t, Tensor scalars, int exponent, int flags, int dim, bool want_student, "
    "bool want_teacher, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _attention,
    _attention_fake,
)


class Attention(torch.autograd.Function):
    """The maps' gradients with the value, while the maps are in cache; float16 ones from the sums' in the backward."""

    @staticmethod
    def forward(ctx, s, t, scalars, options):
        exponent, flags, dim, backend = options
        want_s, want_t = ctx.needs_input_grad[:2]
        late = (want_s and s.dtype == HALF) or (want_t and t.dtype == HALF)
        total, by_s, by_t, ds, dt = attention_op(
            s, t, scalars, exponent, flags, dim, want_s and not late, want_t and not late, backend
        )
        kept = (s, t, by_s, by_t) if late else (None, None, None, None)
        ctx.save_for_backward(total, *kept, scalars, ds, dt)
        ctx.late, ctx.options = late, options
        return total

    @staticmethod
    def backward(ctx, upstream):
        exponent, flags, dim, backend = ctx.options
        total, s, t, by_s, by_t, scalars, ds, dt = ctx.saved_tensors
        want_s, want_t = ctx.needs_input_grad[:2]
        with torch.no_grad():
            if not ctx.late:
                grads = _scaled((ds, dt), (want_s, want_t), upstream, backend)
            else:
                odd = flags & SIGNED != 0
                grads = tuple(
                    power_gradient_op(
                        x, None, None, scalars, None if flags & OVER_CHANNELS else upstream * by,
                        upstream * by if flags & OVER_CHANNELS else None, exponent, odd, dim, backend,
                    ) if want else None
                    for x, by, want in ((s, by_s, want_s), (t, by_t, want_t))
                )  # fmt: skip
        return (*first_order("feature_attention", total, grads), None, None)


def attention(
    student: torch.Tensor,
    teacher: torch.Tensor,
    p: float,
    *,
    over_channels: bool,
    signed: bool,
    mean: bool,
    squared: bool,
    eps: float,
    add_eps: bool,
    dim: int,
    backend: str,
) -> torch.Tensor:
    """The mean over samples of the mean squared difference, or of the distance, of two attentions a = A / |A|.

    A are sums (or means) of |x|^p over the channels of every pixel, or over the pixels of every channel.

    Args:
        student, teacher: features with as many samples, and as many pixels (channels).
        p: at least 1.
        over_channels: sum over these; else over the pixels.
        signed: x^p instead, for an integer p.
        squared: the squares' mean over what is left, instead of each sample's distance.
        eps, add_eps: the least norm, or what is added to it.
        dim: the channels' axis, not negative.
        backend: a resolved one, not "reference".
    """
    flags = SQUARED * squared + MEAN * mean + ADD_EPS * add_eps + OVER_CHANNELS * over_channels
    flags += SIGNED * (signed and math.fmod(p, 2) == 1)
    scalars, exponent = pack((p, eps)), exponent_of(p)
    if not needs_gradient(student, teacher):
        return attention_op(student, teacher, scalars, exponent, flags, dim, False, False, backend)[0]
    return Attention.apply(student, teacher, scalars, (exponent, flags, dim, backend))
