"""Sums of powers of a feature map, and second moments of a pair: operators and autograd. Tensors as in op.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from kdkernels.ops.library import define, first_order, learns, save
from kdkernels.ops.scalars import pack
from kdkernels.ops.weighted_match import native, reference
from kdkernels.ops.weighted_match.maps import Plan, as_dense, as_map, like, of_channels, plan

MOMENTS = 5  # sums of s, t, s^2, t^2, s t
Pair = tuple[torch.Tensor, torch.Tensor]


def kernels(backend: str) -> Any:
    """call(backend, entry, ...) of a backend."""
    if backend == "triton":
        from kdkernels.ops.weighted_match import triton

        return triton.call
    return native.call


def small(x: torch.Tensor | None) -> torch.Tensor | None:
    """A weight or an offset as the kernels take it."""
    return None if x is None else x.detach().float().contiguous()


def exponent_of(p: float) -> int:
    """Which power the kernels make by multiplications; 0 for any other."""
    return int(p) if p in (1, 2, 3, 4) else 0


AT_ONCE = 16384  # torch shares a single sum among threads from twice that on, but never a row of many


def ordered_sum(x: torch.Tensor) -> torch.Tensor:
    """The sum of all elements, added in one order whatever the number of threads."""
    if x.numel() > AT_ONCE:
        x = x.reshape(-1)
    while x.numel() > AT_ONCE:
        x = F.pad(x, (0, -x.numel() % 1024)).view(-1, 1024).sum(1)
    return x.sum()


def _sides(by: Plan, channels: Any, pixels: Any) -> tuple[Any, Any]:
    """What belongs to the rows and to the lanes."""
    return (pixels, channels) if by.channels_last else (channels, pixels)


def _kept(x: torch.Tensor, by: Plan, channels: bool) -> tuple[int, int]:
    """(batch, channels) or (batch, pixels)."""
    return x.shape[0], by.shape[2 if channels == by.channels_last else 1]


# ---- sums of powers ----


def _power_sums(
    x: torch.Tensor, channel_weight: torch.Tensor | None, pixel_weight: torch.Tensor | None, scalars: torch.Tensor,
    exponent: int, odd: bool, channels: bool, pixels: bool, dim: int, backend: str,
) -> Pair:  # fmt: skip
    by = plan(x, dim)
    outputs = _power_outputs(x, by, channels, pixels)
    if x.numel() == 0:
        return outputs[0].zero_(), outputs[1].zero_()
    made = (outputs[0] if channels else None), (outputs[1] if pixels else None)
    kernels(backend)(
        backend, "feature_power_sums", as_map(x, by), *_sides(by, channel_weight, pixel_weight), scalars,
        *_sides(by, *made), exponent, int(odd),
    )  # fmt: skip
    return outputs


def _power_outputs(x: torch.Tensor, by: Plan, channels: bool, pixels: bool) -> Pair:
    options = {"dtype": torch.float32, "device": x.device}
    return (
        torch.empty(_kept(x, by, True) if channels else (0,), **options),
        torch.empty(_kept(x, by, False) if pixels else (0,), **options),
    )


def _power_sums_fake(x, channel_weight, pixel_weight, scalars, exponent, odd, channels, pixels, dim, backend):
    return _power_outputs(x, plan(x, dim), channels, pixels)


def _power_gradient(
    x: torch.Tensor, channel_weight: torch.Tensor | None, pixel_weight: torch.Tensor | None, scalars: torch.Tensor,
    channels: torch.Tensor | None, pixels: torch.Tensor | None, exponent: int, odd: bool, dim: int, backend: str,
) -> torch.Tensor:  # fmt: skip
    by = plan(x, dim)
    dx = like(x, by)
    if x.numel():
        kernels(backend)(
            backend, "feature_power_gradient", as_map(x, by), *_sides(by, channel_weight, pixel_weight), scalars,
            *_sides(by, small(channels), small(pixels)), as_dense(dx, by), exponent, int(odd),
        )  # fmt: skip
    return dx


def _power_gradient_fake(x, channel_weight, pixel_weight, scalars, channels, pixels, exponent, odd, dim, backend):
    return like(x, plan(x, dim))


power_sums_op = define(
    "feature_power_sums(Tensor x, Tensor? channel_weight, Tensor? pixel_weight, Tensor scalars, int exponent, bool odd, "
    "bool channels, bool pixels, int dim, str backend) -> (Tensor, Tensor)",
    _power_sums,
    _power_sums_fake,
)
power_gradient_op = define(
    "feature_power_gradient(Tensor x, Tensor? channel_weight, Tensor? pixel_weight, Tensor scalars, Tensor? channels, "
    "Tensor? pixels, int exponent, bool odd, int dim, str backend) -> Tensor",
    _power_gradient,
    _power_gradient_fake,
)


class PowerSums(torch.autograd.Function):
    """The weights' gradients are the same sums, with the other side's upstream as weights."""

    @staticmethod
    def forward(ctx, x, channel_weight, pixel_weight, scalars, options):
        sides = small(channel_weight), small(pixel_weight)
        channels, pixels = power_sums_op(x, *sides, scalars, *options)
        save(ctx, channels if channels.numel() else pixels, x, *sides, scalars)
        ctx.options = options
        return channels, pixels

    @staticmethod
    def backward(ctx, channels, pixels):
        output, x, channel_weight, pixel_weight, scalars = ctx.saved_tensors
        exponent, odd, of_channels_, of_pixels, dim, backend = ctx.options
        want_x, want_channel, want_pixel = ctx.needs_input_grad[:3]
        dx = d_channel = d_pixel = None
        with torch.no_grad():
            channels, pixels = small(channels if of_channels_ else None), small(pixels if of_pixels else None)
            if want_x:
                dx = power_gradient_op(
                    x, channel_weight, pixel_weight, scalars, channels, pixels, exponent, odd, dim, backend
                )
            if want_channel or want_pixel:
                d_channel, d_pixel = power_sums_op(
                    x, channels, pixels, scalars, exponent, odd, want_channel and of_pixels, want_pixel and of_channels_,
                    dim, backend,
                )  # fmt: skip
        d_channel, d_pixel = d_channel if want_channel else None, d_pixel if want_pixel else None
        return (*first_order("feature_power_sums", output, (dx, d_channel, d_pixel)), None, None)


def power_sums(
    x: torch.Tensor,
    p: float,
    *,
    dim: int = 1,
    signed: bool = False,
    channels: bool = False,
    pixels: bool = False,
    channel_weight: torch.Tensor | None = None,
    pixel_weight: torch.Tensor | None = None,
    backend: str,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Sums of |x|^p over the pixels of every channel, (batch, channels), and over the channels of every pixel.

    Args:
        x: features.
        p: at least 1; 1 to 4 are multiplications.
        dim: the channels' axis, not negative.
        signed: x^p instead, for an integer p.
        channels, pixels: which of the two to make, in one read; None stands for the other.
        channel_weight: (batch, channels), in the sums of the pixels. It gets a gradient.
        pixel_weight: (batch, pixels), in the sums of the channels.
        backend: a resolved one.
    """
    if backend == "reference":
        return reference.power_sums(of_channels(x, dim), p, signed, channels, pixels, channel_weight, pixel_weight)
    odd = signed and p % 2 == 1
    options = exponent_of(p), odd, channels, pixels, dim, backend
    sides, scalars = (channel_weight, pixel_weight), pack((p, 0.0))
    if learns(x, *sides):
        of_each = PowerSums.apply(x, *sides, scalars, options)
    else:
        of_each = power_sums_op(x, *map(small, sides), scalars, *options)
    return of_each[0] if channels else None, of_each[1] if pixels else None


# ---- second moments of a pair ----


def _moments(s: torch.Tensor, t: torch.Tensor, channels: bool, dim: int, backend: str) -> torch.Tensor:
    by_s = plan(s, dim)
    by_t = plan(t, dim, by_s.channels_last)
    out = torch.empty(MOMENTS, *_kept(s, by_s, channels), dtype=torch.float64, device=s.device)
    if s.numel() == 0:
        return out.zero_()
    made = _sides(by_s, out if channels else None, None if channels else out)
    kernels(backend)(backend, "feature_moments", as_map(s, by_s), as_map(t, by_t), *made)
    return out


def _moments_fake(s, t, channels, dim, backend):
    return torch.empty(MOMENTS, *_kept(s, plan(s, dim), channels), dtype=torch.float64, device=s.device)


def _moments_gradient(
    s: torch.Tensor, t: torch.Tensor, upstream: torch.Tensor, channels: bool, dim: int, want_student: bool,
    want_teacher: bool, backend: str,
) -> Pair:  # fmt: skip
    by_s = plan(s, dim)
    by_t = plan(t, dim, by_s.channels_last)
    ds, dt = _moments_gradients(s, t, by_s, by_t, want_student, want_teacher)
    if s.numel():
        kernels(backend)(
            backend, "feature_moments_gradient", as_map(s, by_s), as_map(t, by_t), upstream.contiguous(),
            as_dense(ds, by_s) if want_student else None, as_dense(dt, by_t) if want_teacher else None,
            channels == by_s.channels_last,
        )  # fmt: skip
    return ds, dt


def _moments_gradients(s: torch.Tensor, t: torch.Tensor, by_s: Plan, by_t: Plan, student: bool, teacher: bool) -> Pair:
    return (
        like(s, by_s) if student else torch.empty(0, dtype=s.dtype, device=s.device),
        like(t, by_t) if teacher else torch.empty(0, dtype=t.dtype, device=t.device),
    )


def _moments_gradient_fake(s, t, upstream, channels, dim, want_student, want_teacher, backend):
    by_s = plan(s, dim)
    return _moments_gradients(s, t, by_s, plan(t, dim, by_s.channels_last), want_student, want_teacher)


moments_op = define(
    "feature_moments(Tensor s, Tensor t, bool channels, int dim, str backend) -> Tensor", _moments, _moments_fake
)
moments_gradient_op = define(
    "feature_moments_gradient(Tensor s, Tensor t, Tensor upstream, bool channels, int dim, bool want_student, "
    "bool want_teacher, str backend) -> (Tensor, Tensor)",
    _moments_gradient,
    _moments_gradient_fake,
)


class Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx, s, t, channels, dim, backend):
        sums = moments_op(s, t, channels, dim, backend)
        save(ctx, sums, s, t)
        ctx.options = channels, dim
        ctx.backend = backend
        return sums

    @staticmethod
    def backward(ctx, upstream):
        sums, s, t = ctx.saved_tensors
        want_s, want_t = ctx.needs_input_grad[:2]
        with torch.no_grad():
            ds, dt = moments_gradient_op(s, t, upstream, *ctx.options, want_s, want_t, ctx.backend)
        grads = first_order("feature_moments", sums, (ds if want_s else None, dt if want_t else None))
        return (*grads, None, None, None)


def moments(
    student: torch.Tensor, teacher: torch.Tensor, *, channels: bool, dim: int = 1, backend: str
) -> torch.Tensor:
    """Sums of s, t, s^2, t^2 and s t over the pixels of every channel, or over the channels of every pixel.

    Args:
        student, teacher: features of one shape.
        channels: keep the channels.
        dim: their axis, not negative.
        backend: a resolved one, not "reference".

    Returns:
        float64 (5, batch, channels or pixels): so many digits that neither variances nor correlations lose any.
    """
    if not learns(student, teacher):
        return moments_op(student, teacher, channels, dim, backend)
    return Moments.apply(student, teacher, channels, dim, backend)
