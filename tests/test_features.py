"""Losses between feature maps: published variants in plain PyTorch, layouts, bad input, and what must not change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from published import close, same
from targets import Target
from torch import nn

import kdkernels as kd
from kdkernels.ops.weighted_match import op, sums

F64 = torch.float64


def pair(
    generator: torch.Generator, *shape: int, dtype: torch.dtype = F64, teacher: tuple[int, ...] | None = None
) -> list[torch.Tensor]:
    return [torch.randn(s, generator=generator, dtype=dtype) for s in (shape, teacher or shape)]


# ----------------------------------------------------------------------------------------------------- published variants


def at_map(x: torch.Tensor, p: float = 2) -> torch.Tensor:
    return F.normalize(x.pow(p).mean(1).view(x.size(0), -1))


def test_hint_is_the_mean_squared_error(generator: torch.Generator) -> None:
    s, t = pair(generator, 3, 5, 4, 4)
    same(kd.hint_loss(s, t), F.mse_loss(s, t))
    same(kd.hint_loss(s, t, measure="absolute", reduction="sum"), F.l1_loss(s, t, reduction="sum"))
    same(kd.hint_loss(s, t, measure="smooth_l1", beta=0.3), F.smooth_l1_loss(s, t, beta=0.3))


def test_hint_of_normalized_features_as_in_mmrazor(generator: torch.Generator) -> None:
    s, t = pair(generator, 3, 5, 4, 4)
    a, b = (x.flatten(1) / x.flatten(1).norm(2, dim=1, keepdim=True) for x in (s, t))
    same(kd.hint_loss(s, t, normalize=True, reduction="batchmean"), (a - b).pow(2).sum() / 3)


def test_attention_of_the_authors_and_of_repdistiller(generator: torch.Generator) -> None:
    s, t = pair(generator, 3, 5, 4, 4, teacher=(3, 7, 4, 4))
    same(kd.attention_transfer_loss(s, t), (at_map(s) - at_map(t)).pow(2).mean())
    same(kd.attention_transfer_loss(s, t, p=3, signed=True), (at_map(s, 3) - at_map(t, 3)).pow(2).mean())
    same(kd.attention_transfer_loss(s, t, p=5, signed=True), (at_map(s, 5) - at_map(t, 5)).pow(2).mean())
    assert kd.attention_transfer_loss(s, t, p=3) != kd.attention_transfer_loss(s, t, p=3, signed=True)


@pytest.mark.backends("cpu", "triton")
def test_signed_powers_in_kernels(fused: Target, generator: torch.Generator) -> None:
    s, t = (x.to(fused.device) for x in pair(generator, 2, 3, 4, 3, dtype=torch.float32))
    for p in (1.0, 3.0, 5.0):
        exact = gradients(lambda s, t, p=p: (at_map(s, p) - at_map(t, p)).pow(2).mean(), s.to(F64), t.to(F64))
        close(gradients(kd.attention_transfer_loss, s, t, p=p, signed=True, backend=fused.backend), exact, 1e-5)


def test_attention_in_torchdistills_mode_paper(generator: torch.Generator) -> None:
    s, t = pair(generator, 3, 5, 4, 4)
    expected = torch.norm(at_map(s) - at_map(t), dim=1).sum() / 3
    same(kd.attention_transfer_loss(s, t, distance="norm"), expected)


def test_attention_of_the_zoo(generator: torch.Generator) -> None:
    def am(x: torch.Tensor, p: float) -> torch.Tensor:
        a = x.abs().pow(p).sum(1, keepdim=True)
        return a / (torch.norm(a, dim=(2, 3), keepdim=True) + 1e-6)

    s, t = (1e-3 * x for x in pair(generator, 3, 5, 4, 4))
    expected = F.mse_loss(am(s, 2.0), am(t, 2.0))
    got = kd.attention_transfer_loss(s, t, channels="sum", eps=1e-6, add_eps=True)
    same(got, expected)
    assert (got - kd.attention_transfer_loss(s, t)).abs() > 1e-3 * got


def test_attention_pools_the_larger_map(generator: torch.Generator) -> None:
    s, t = pair(generator, 3, 5, 8, 8, teacher=(3, 7, 4, 4))
    expected = (at_map(F.adaptive_avg_pool2d(s, (4, 4))) - at_map(t)).pow(2).mean()
    same(kd.attention_transfer_loss(s, t), expected)
    same(kd.attention_transfer_loss(t, s), expected)
    with pytest.raises(ValueError, match="pool or interpolate"):
        kd.attention_transfer_loss(s, t, pool=False)


def test_channel_attention(generator: torch.Generator) -> None:
    s, t = pair(generator, 3, 5, 8, 8, teacher=(3, 5, 4, 4))
    a, b = (F.normalize(x.abs().pow(2).mean((2, 3))) for x in (s, t))
    same(kd.channel_attention_transfer_loss(s, t), (a - b).pow(2).mean())


def test_attention_needs_positions() -> None:
    """One position alone would always have all the attention, and the loss would be 0."""
    with pytest.raises(ValueError, match=r"must have positions to attend to.*got shape \(2, 5\)"):
        kd.attention_transfer_loss(torch.randn(2, 5), torch.randn(2, 5))


# --------------------------------------------------------------------------------------------------------------- adapters


def test_an_adapter_makes_widths_meet(target: Target, generator: torch.Generator) -> None:
    s, t = (x.to(target.device) for x in pair(generator, 2, 3, 4, 4, dtype=torch.float32, teacher=(2, 6, 4, 4)))
    with pytest.raises(ValueError, match=r"channels differ, 3 against 6.*add an adapter.*Adapter\(3, 6\)"):
        kd.hint_loss(s, t, backend=target.backend)
    loss = kd.HintLoss(adapter=kd.Adapter(3, 6, batch_norm=True, relu=True), backend=target.backend).to(target.device)
    loss(s, t).backward()
    assert loss.adapter.project.weight.grad.abs().sum() > 0
    assert {n.split(".")[0] for n, _ in loss.named_parameters()} == {"adapter"}


def test_a_linear_adapter(generator: torch.Generator) -> None:
    s, t = pair(generator, 2, 5, 3, dtype=torch.float32, teacher=(2, 5, 6))
    for norm in (False, True):
        adapter = kd.Adapter(3, 6, linear=True, batch_norm=norm)
        same(kd.hint_loss(s, t, adapter=adapter, dim=-1), F.mse_loss(adapter(s), t), rtol=1e-5)


# ------------------------------------------------------------------------------------------------------- layouts, corners

LOSSES: dict[str, Any] = {
    "hint": kd.hint_loss,
    "hint-normalized": lambda s, t, **o: kd.hint_loss(s, t, normalize=True, **o),
    "attention": kd.attention_transfer_loss,
    "channel-attention": kd.channel_attention_transfer_loss,
}


def gradients(loss: Any, s: torch.Tensor, t: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ...]:
    s, t = s.detach().requires_grad_(), t.detach().requires_grad_()
    value = loss(s, t, **options)
    return value.detach(), *torch.autograd.grad(value, (s, t))


LAYOUTS = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "student only": None,
    "sliced": lambda x: torch.cat([x, x.new_full(x.shape[:3] + (2,), torch.nan)], 3)[..., :-2],
    "expanded": lambda x: x[:1].expand_as(x),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LOSSES)
def test_layouts(fused: Target, name: str, layout: str, generator: torch.Generator) -> None:
    s, t = (x.to(fused.device) for x in pair(generator, 2, 9, 3, 5, dtype=torch.float32))
    change = LAYOUTS[layout]
    if change is None:
        s = LAYOUTS["channels last"](s)
    else:
        s, t = change(s), change(t)
    got = gradients(LOSSES[name], s, t, backend=fused.backend)
    for g, e in zip(got, gradients(LOSSES[name], s.cpu().double(), t.cpu().double()), strict=True):
        torch.testing.assert_close(g.cpu().double(), e, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_an_empty_batch(target: Target, name: str) -> None:
    s, t = (torch.zeros(0, 3, 4, 4, device=target.device) for _ in range(2))
    loss, ds, _ = gradients(LOSSES[name], s, t, backend=target.backend)
    assert loss == 0
    assert ds.shape == s.shape


@pytest.mark.parametrize("name", LOSSES)
def test_zero_maps(target: Target, name: str, generator: torch.Generator) -> None:
    s, t = (x.to(target.device) for x in pair(generator, 2, 3, 4, 4, dtype=torch.float32))
    s[0] = 0
    for a, b in ((s, t), (t, s), (torch.zeros_like(s), torch.zeros_like(t))):
        assert all(x.isfinite().all() for x in gradients(LOSSES[name], a, b, backend=target.backend))
    if name != "hint":
        assert (gradients(LOSSES[name], s, t, backend=target.backend)[1][0] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_does_not_overflow(target: Target, name: str, generator: torch.Generator) -> None:
    s, t = (x.to(target.device) * 2e4 for x in pair(generator, 2, 33, 4, 4, dtype=torch.float32))
    s, t = s.half().clamp(-6e4, 6e4), t.half().clamp(-6e4, 6e4)
    loss, *_ = gradients(LOSSES[name], s, t, backend=target.backend)
    exact, *_ = gradients(LOSSES[name], s.cpu().double(), t.cpu().double())
    torch.testing.assert_close(loss.cpu().double(), exact, rtol=1e-5, atol=0)


def test_small_half_gradients_survive_a_scaler(fused: Target, generator: torch.Generator) -> None:
    """Made after the upstream scale is known: before it, 2 d / n would be 0 in float16."""
    s, t = (x.to(fused.device).half() for x in pair(generator, 8, 64, 16, 16, dtype=torch.float32))
    t = s + (t * 2**-8).half()
    s.requires_grad_()
    (65536.0 * kd.hint_loss(s, t, backend=fused.backend)).backward()
    exact = 65536.0 * 2 * (s.detach().double() - t.double()) / s.numel()
    torch.testing.assert_close(s.grad.double(), exact, rtol=2**-10, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_threads_change_no_bit(name: str, generator: torch.Generator) -> None:
    s, t = pair(generator, 3, 70, 40, 41, dtype=torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(gradients(LOSSES[name], s, t, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_too_large_for_the_caches(dtype: torch.dtype, generator: torch.Generator) -> None:
    """From 8 MiB on they are written past the caches, in pieces; rows of 361 elements begin anywhere in a line."""
    n = 8 if dtype == torch.float32 else 16
    s, t = (x.to(dtype) for x in pair(generator, n, 801, 19, 19, dtype=torch.float32))
    channel, pixel = torch.rand(n, 801, generator=generator), torch.rand(n, 361, generator=generator)

    def weighted(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        sides = {"channel_weight": channel[: len(s)], "pixel_weight": pixel[: len(s)]}
        return op.match(s, t, **sides, factor=1 / len(s), backend="cpu")

    at = kd.attention_transfer_loss, kd.channel_attention_transfer_loss
    for loss in (*at, kd.hint_loss, kd.hierarchical_context_loss, weighted):
        for of_teacher in (False, True):
            grads = []
            for xs in ((s, t), (s[:1], t[:1])):
                leaves = [x.detach().requires_grad_(i == of_teacher) for i, x in enumerate(xs)]
                with kd.use_backend("cpu"):
                    grads += torch.autograd.grad(loss(*leaves), leaves[of_teacher])
            whole, one = grads
            assert whole.nbytes >= 2**23 > one.nbytes
            assert torch.equal(whole[0] * n, one[0]), loss
            assert whole.isfinite().all() and (whole[-1] != 0).any()


def test_ordered_sum_takes_every_element() -> None:
    for n in (0, 1, 16384, 16385, 50000):
        assert sums.ordered_sum(torch.ones(n, dtype=F64)) == n


# -------------------------------------------------------------------------------------------------------------- bad input

BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "no axes": (lambda: kd.hint_loss(torch.zeros(3), torch.zeros(3)), ValueError, r"student_features must be \(N, C"),
    "samples": (lambda: kd.hint_loss(torch.zeros(2, 3), torch.zeros(1, 3)), ValueError, "hold the same samples"),
    "sizes": (lambda: kd.hint_loss(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)), ValueError, "sizes differ"),
    "integers": (lambda: kd.hint_loss(torch.zeros(2, 3).long(), torch.zeros(2, 3)), TypeError, "must be float16"),
    "axis": (lambda: kd.hint_loss(torch.zeros(2, 3), torch.zeros(2, 3), dim=0), ValueError, "other than the first, got 0"),
    "no pixels": (lambda: kd.hint_loss(torch.zeros(2, 3, 0), torch.zeros(2, 3, 0)), ValueError, "at least one channel"),
    "measure": (lambda: kd.hint_loss(torch.zeros(2, 3), torch.zeros(2, 3), measure="l2"), ValueError, "unknown measure"),
    "power": (lambda: kd.attention_transfer_loss(torch.zeros(2, 3), torch.zeros(2, 3), p=0.5), ValueError, "p must be"),
    "signed": (
        lambda: kd.attention_transfer_loss(torch.zeros(2, 3), torch.zeros(2, 3), p=1.5, signed=True),
        ValueError, "signed takes an integer p, got 1.5",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, error, words = BAD[name]
    with pytest.raises(error, match=words):
        call()


@pytest.mark.backends("cpu", "triton")
def test_float64_is_for_the_reference(fused: Target) -> None:
    x = torch.zeros(2, 3, 4, 4, dtype=F64, device=fused.device)
    with pytest.raises(kd.BackendError, match="float64 runs on 'reference'"):
        kd.hint_loss(x, x, backend=fused.backend)


# --------------------------------------------------------------------------------------------------------- as operators


@pytest.mark.backends("cpu", "triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck(fused: Target, dtype: torch.dtype, generator: torch.Generator) -> None:
    ops, b = torch.ops.kdkernels, fused.backend
    s, t = (x.to(fused.device, dtype) for x in pair(generator, 2, 3, 5, dtype=torch.float32))
    rows, lanes = (torch.rand(2, n, generator=generator).to(fused.device) for n in (3, 5))
    scalars = torch.tensor([1.0, 0.5])
    torch.library.opcheck(
        ops.feature_match.default, (s, t, rows, lanes, rows, lanes, scalars, None, 0, 1, True, True, True, True, b)
    )
    torch.library.opcheck(ops.feature_attention.default, (s, t, scalars, 2, op.OVER_CHANNELS, 1, True, False, b))
    torch.library.opcheck(ops.feature_power_sums.default, (s, rows, lanes, scalars, 2, False, True, True, 1, b))
    torch.library.opcheck(ops.feature_power_gradient.default, (s, rows, lanes, scalars, rows, lanes, 2, False, 1, b))
    torch.library.opcheck(ops.feature_moments.default, (s, t, False, 1, b))
    upstream = torch.randn(5, 2, 5, generator=generator, dtype=F64).to(fused.device)
    torch.library.opcheck(ops.feature_moments_gradient.default, (s, t, upstream, False, 1, True, True, b))


@pytest.mark.parametrize("name", LOSSES)
def test_compiles_whole(name: str, generator: torch.Generator) -> None:
    s, t = pair(generator, 2, 3, 4, 4, dtype=torch.float32)
    compiled = torch.compile(lambda a, b: LOSSES[name](a, b, backend="cpu"), fullgraph=True, backend="aot_eager")
    for got, expected in zip(gradients(compiled, s, t), gradients(LOSSES[name], s, t), strict=True):
        same(got, expected, rtol=1e-6)


@pytest.mark.backends("cpu", "triton")
@pytest.mark.parametrize("name", LOSSES)
def test_second_derivatives_are_refused(fused: Target, name: str, generator: torch.Generator) -> None:
    s, t = (x.to(fused.device) for x in pair(generator, 2, 3, 4, 4, dtype=torch.float32))
    s.requires_grad_()
    (g,) = torch.autograd.grad(LOSSES[name](s, t, backend=fused.backend), s, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        g.pow(2).sum().backward()


def test_weights_and_offsets_get_gradients(fused: Target, generator: torch.Generator) -> None:
    s, t = (x.to(fused.device) for x in pair(generator, 2, 9, 20, dtype=torch.float32))
    small = [torch.rand(2, n, generator=generator).to(fused.device).requires_grad_() for n in (9, 20, 9, 20)]
    names = ("channel_weight", "pixel_weight", "channel_offset", "pixel_offset")
    backend = fused.backend if fused.backend in ("cpu", "triton") else "reference"
    for measure in ("squared", "absolute", "smooth_l1"):
        options = {"measure": measure, "beta": 0.7, "factor": 0.3}
        loss = op.match(s, t, **dict(zip(names, small, strict=True)), **options, backend=backend)
        got = torch.autograd.grad(1.5 * loss, small)
        wide = [x.detach().double().requires_grad_() for x in small]
        exact = op.match(s.double(), t.double(), **dict(zip(names, wide, strict=True)), **options, backend="reference")
        for g, e in zip(got, torch.autograd.grad(1.5 * exact, wide), strict=True):
            torch.testing.assert_close(g.double(), e, rtol=1e-5, atol=1e-6)


def test_modules_are_their_functions(generator: torch.Generator) -> None:
    s, t = pair(generator, 2, 3, 4, 4)
    same(kd.AttentionTransferLoss(p=4.0)(s, t), kd.attention_transfer_loss(s, t, p=4.0))
    same(kd.ChannelAttentionTransferLoss()(s, t), kd.channel_attention_transfer_loss(s, t))
    assert isinstance(kd.HintLoss(adapter=nn.Identity()).adapter, nn.Module)
