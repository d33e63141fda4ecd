"""Weighted differences of feature maps, and the distance of their attentions: operators, autograd, choice of backend.

Tensors are (N, C, ...), or have their channels on another axis `dim`, and are read as they lie (maps.py). Weights, offsets
and sums are as small as a map's channels (N, C) or pixels (N, P).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from kdkernels.native import View
from kdkernels.ops.library import define, first_order, learns, save
from kdkernels.ops.scalars import pack
from kdkernels.ops.scale.op import learners, with_gradients
from kdkernels.ops.weighted_match import reference
from kdkernels.ops.weighted_match.maps import Plan, as_dense, as_map, like, of_channels, plan, readable
from kdkernels.ops.weighted_match.reference import MEASURES
from kdkernels.ops.weighted_match.sums import exponent_of, kernels, power_gradient_op, small

HALF = torch.float16
ALIKE = None, None, None, None  # no weights, no offsets
Outputs = tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]


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
) -> Outputs:
    by_s = plan(s, dim)
    by_t = plan(t, dim, by_s.channels_last)
    outputs = _match_outputs(s, t, by_s, by_t, channel_sums, pixel_sums, want_student, want_teacher)
    total, of_sides, grads = outputs
    if s.numel() == 0:
        for x in (total, *of_sides):
            x.zero_()
        return outputs
    sides = channel_weight, pixel_weight, channel_offset, pixel_offset
    if sides == ALIKE and not of_sides and by_s.whole and by_t.whole:
        maps = [View(x, *by_s.line) for x in (readable(s, by_s), readable(t, by_t), *grads)]
        d_x, d_y = maps[2] if want_student else None, maps[-1] if want_teacher else None
        kernels(backend)(
            backend, "feature_match", maps[0], maps[1], *sides, scalars, upstream, total, None, None, d_x, d_y, measure
        )
        return outputs
    x, y = as_map(s, by_s), as_map(t, by_t)
    d_x, d_y = as_dense(grads[0], by_s) if want_student else None, as_dense(grads[-1], by_t) if want_teacher else None
    rows, lanes = of_sides[0] if channel_sums else None, of_sides[-1] if pixel_sums else None
    if by_s.channels_last:
        sides = pixel_weight, channel_weight, pixel_offset, channel_offset
        rows, lanes = lanes, rows
    kernels(backend)(backend, "feature_match", x, y, *sides, scalars, upstream, total, rows, lanes, d_x, d_y, measure)
    return outputs


def _match_outputs(
    s: torch.Tensor, t: torch.Tensor, by_s: Plan, by_t: Plan, channels: bool, pixels: bool, student: bool, teacher: bool
) -> Outputs:
    of_sides = []
    if channels or pixels:
        _, rows, lanes = by_s.shape
        n_channels, n_pixels = (lanes, rows) if by_s.channels_last else (rows, lanes)
        sizes = [n for n, want in ((n_channels, channels), (n_pixels, pixels)) if want]
        of_sides = [torch.empty((2, s.shape[0], n), dtype=torch.float32, device=s.device) for n in sizes]
    return (
        torch.empty((), dtype=torch.float32, device=s.device),
        of_sides,
        gradients(s, t, by_s, by_t, student, teacher),
    )


def gradients(
    s: torch.Tensor, t: torch.Tensor, by_s: Plan, by_t: Plan, student: bool, teacher: bool
) -> list[torch.Tensor]:
    """Room for those that are wanted."""
    return [like(x, by) for x, by, want in ((s, by_s, student), (t, by_t, teacher)) if want]


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
    "bool want_student, bool want_teacher, str backend) -> (Tensor, Tensor[], Tensor[])",
    _match,
    _match_fake,
)


def one_float(upstream: torch.Tensor) -> torch.Tensor:
    """An upstream gradient as the kernels take it."""
    return upstream.reshape(1).float()


class LateMatch(torch.autograd.Function):
    """The maps' gradients in the backward, when their upstream scale is known: stored before, small ones would be 0."""

    @staticmethod
    def forward(ctx, s, t, channel_weight, pixel_weight, channel_offset, pixel_offset, scalars, options):
        measure, dim, backend = options
        sides = tuple(map(small, (channel_weight, pixel_weight, channel_offset, pixel_offset)))
        wanted = ctx.needs_input_grad[2:6]
        total, sums, _ = match_op(
            s, t, *sides, scalars, None, measure, dim, wanted[0] or wanted[2], wanted[1] or wanted[3], False, False, backend
        )  # fmt: skip
        save(ctx, total, s, t, *sides, scalars, *_of_sides(sums, sides, scalars, wanted))
        ctx.options = options
        return total

    @staticmethod
    def backward(ctx, upstream):
        measure, dim, backend = ctx.options
        total, s, t, channel_weight, pixel_weight, channel_offset, pixel_offset, scalars, *small_ones = (
            ctx.saved_tensors
        )
        want_s, want_t, *of_sides = ctx.needs_input_grad[:6]
        with torch.no_grad():
            _, _, made = match_op(
                s, t, channel_weight, pixel_weight, channel_offset, pixel_offset, scalars, one_float(upstream), measure,
                dim, False, False, want_s, want_t, backend,
            )  # fmt: skip
            found = (upstream * x for x in small_ones)
            grads = (made[0] if want_s else None, made[-1] if want_t else None,
                     *(next(found) if want else None for want in of_sides))  # fmt: skip
        return (*first_order("feature_match", total, grads), None, None)


def _of_sides(
    sums: list[torch.Tensor], sides: tuple[torch.Tensor | None, ...], scalars: torch.Tensor, wanted: Sequence[bool]
) -> list[torch.Tensor]:
    """The gradients of the weights and offsets that want one, from the sums of measure and slope over the other side."""
    channels, pixels = sums[:1], sums[-1:]  # whichever there are
    places = ((channels, 0, None), (pixels, 0, None), (channels, 1, sides[0]), (pixels, 1, sides[1]))
    made = [(of[0][field], weight) for (of, field, weight), want in zip(places, wanted, strict=True) if want]
    return [x * scalars[1] if weight is None else x * scalars[1] * weight for x, weight in made]


def is_late(s: torch.Tensor, t: torch.Tensor, want_s: bool, want_t: bool) -> bool:
    """Whether the maps' gradients are to wait for their upstream scale."""
    return (want_s and s.dtype == HALF) or (want_t and t.dtype == HALF)


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
    want_s, want_t = learns(student), learns(teacher)
    if is_late(student, teacher, want_s, want_t):
        return LateMatch.apply(student, teacher, *sides, scalars, (kind, dim, backend))
    flat, wanted = sides, (False, False, False, False)
    if any(x is not None for x in sides):  # as tensors they are not to be compared
        flat = tuple(map(small, sides))
        wanted = tuple([learns(x) for x in sides])
    total, sums, grads = match_op(
        student, teacher, *flat, scalars, None, kind, dim, wanted[0] or wanted[2], wanted[1] or wanted[3], want_s, want_t,
        backend,
    )  # fmt: skip
    if sums:
        grads = [*grads, *_of_sides(sums, flat, scalars, wanted)]
    if not grads:
        return total
    inputs = learners((student, teacher, *sides), (want_s, want_t, *wanted))
    return with_gradients("feature_match", backend, total, grads, inputs)


# ---- the distance of two attentions ----

SQUARED, MEAN, ADD_EPS, SIGNED, OVER_CHANNELS = 1, 2, 4, 8, 16  # of the operator's `flags`


def _attention(
    s: torch.Tensor, t: torch.Tensor, scalars: torch.Tensor, exponent: int, flags: int, dim: int, want_student: bool,
    want_teacher: bool, backend: str,
) -> Outputs:  # fmt: skip
    by_s, by_t = plan(s, dim), plan(t, dim)
    outputs = _attention_outputs(s, t, by_s, by_t, flags, want_student, want_teacher)
    total, (of_s, of_t), grads = outputs
    if s.shape[0] == 0:
        total.zero_()
        return outputs
    over_channels = flags & OVER_CHANNELS != 0
    kernels(backend)(
        backend, "feature_attention", as_map(s, by_s), as_map(t, by_t), scalars, total, of_s, of_t,
        as_dense(grads[0], by_s) if want_student else None, as_dense(grads[-1], by_t) if want_teacher else None, exponent,
        flags & SIGNED, by_s.channels_last == over_channels, by_t.channels_last == over_channels, flags & MEAN,
        flags & SQUARED, flags & ADD_EPS,
    )  # fmt: skip
    return outputs


def _attention_outputs(
    s: torch.Tensor, t: torch.Tensor, by_s: Plan, by_t: Plan, flags: int, student: bool, teacher: bool
) -> Outputs:
    keep_rows = by_s.channels_last == (flags & OVER_CHANNELS != 0)
    kept = by_s.shape[1 if keep_rows else 2]
    return (
        torch.empty((), dtype=torch.float32, device=s.device),
        [torch.empty((s.shape[0], kept), dtype=torch.float32, device=s.device) for _ in range(2)],
        gradients(s, t, by_s, by_t, student, teacher),
    )


def _attention_fake(s, t, scalars, exponent, flags, dim, want_student, want_teacher, backend):
    return _attention_outputs(s, t, plan(s, dim), plan(t, dim), flags, want_student, want_teacher)


attention_op = define(
    "feature_attention(Tensor s, Tensor t, Tensor scalars, int exponent, int flags, int dim, bool want_student, "
    "bool want_teacher, str backend) -> (Tensor, Tensor[], Tensor[])",
    _attention,
    _attention_fake,
)


class LateAttention(torch.autograd.Function):
    """The maps' gradients from those by the sums in the backward, as float16 needs."""

    @staticmethod
    def forward(ctx, s, t, scalars, options):
        exponent, flags, dim, backend = options
        total, (by_s, by_t), _ = attention_op(s, t, scalars, exponent, flags, dim, False, False, backend)
        save(ctx, total, s, t, by_s, by_t, scalars)
        ctx.options = options
        return total

    @staticmethod
    def backward(ctx, upstream):
        exponent, flags, dim, backend = ctx.options
        total, s, t, by_s, by_t, scalars = ctx.saved_tensors
        odd = flags & SIGNED != 0
        with torch.no_grad():
            grads = tuple(
                power_gradient_op(
                    x, None, None, scalars, None if flags & OVER_CHANNELS else upstream * by,
                    upstream * by if flags & OVER_CHANNELS else None, exponent, odd, dim, backend,
                ) if want else None
                for x, by, want in zip((s, t), (by_s, by_t), ctx.needs_input_grad)
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
    want_s, want_t = learns(student), learns(teacher)
    if is_late(student, teacher, want_s, want_t):
        return LateAttention.apply(student, teacher, scalars, (exponent, flags, dim, backend))
    total, _, grads = attention_op(student, teacher, scalars, exponent, flags, dim, want_s, want_t, backend)
    if not grads:
        return total
    return with_gradients("feature_attention", backend, total, grads, learners((student, teacher), (want_s, want_t)))
