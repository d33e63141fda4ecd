"""Losses for detectors, and the others between features and scores, against published code in plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from published import same
from targets import Target
from torch import nn

import kdkernels as kd
from kdkernels.losses.boxes import giou, padded_boxes
from kdkernels.ops.weighted_match import focal, reference
from kdkernels.ops.weighted_match.spec import eager_fgd, eager_pearson, eager_variational

F64 = torch.float64


def pair(generator: torch.Generator, *shape: int, dtype: torch.dtype = F64) -> list[torch.Tensor]:
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2)]


# -------------------------------------------------------------------------------------------------------------------- FGD


BOXES = [
    torch.tensor([[0.5, 1.2, 3.7, 4.1], [2.0, 2.0, 2.0, 2.0], [1.0, 0.0, 9.0, 2.5]]),
    torch.zeros(0, 4),
    torch.tensor([[0.0, 0.0, 9.0, 7.0]]),
]


def padded(boxes: list[torch.Tensor]) -> torch.Tensor:
    out = torch.tensor([0.0, 0.0, -1.0, -1.0]).repeat(len(boxes), 5, 1)
    for i, one in enumerate(boxes):
        out[i, : len(one)] = one
    return out


def test_fgd_as_published(generator: torch.Generator) -> None:
    s, t = pair(generator, 3, 5, 7, 9)
    s.requires_grad_()
    expected = eager_fgd(s, t, padded(BOXES))
    got = kd.fgd_loss(s, t, BOXES)
    same(got, expected, rtol=1e-10)
    for a, b in zip(torch.autograd.grad(got, s), torch.autograd.grad(expected, s), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)
    same(kd.fgd_loss(s, t, padded(BOXES)), got)


def published_context(s: torch.Tensor, t: torch.Tensor, block: kd.GlobalContext) -> torch.Tensor:
    """The authors' get_rela_loss."""

    def pooled(x: torch.Tensor, mask: nn.Module) -> torch.Tensor:
        n, c, h, w = x.shape
        weights = F.softmax(mask(x).view(n, 1, h * w), dim=2).unsqueeze(-1)
        return torch.matmul(x.view(n, c, h * w).unsqueeze(1), weights).view(n, c, 1, 1)

    out_s = s + block.student_add(pooled(s, block.student_mask))
    out_t = t + block.teacher_add(pooled(t, block.teacher_mask))
    return F.mse_loss(out_s, out_t, reduction="sum") / len(s)


@pytest.mark.parametrize("channels_last", [False, True])
def test_global_context_as_published(target: Target, channels_last: bool, generator: torch.Generator) -> None:
    s, t = pair(generator, 3, 6, 7, 9, dtype=torch.float32)
    block = kd.GlobalContext(6)
    for p in block.parameters():
        nn.init.normal_(p, std=0.3, generator=generator)
    weights = {"foreground_weight": 0.0, "background_weight": 0.0, "attention_weight": 0.0, "global_weight": 0.5}
    inputs = [s.requires_grad_(), *block.parameters()]
    expected = 0.5 * published_context(s, t, block)
    wanted = torch.autograd.grad(expected, inputs)
    x, y = (v.to(target.device) for v in (s, t))
    if channels_last:
        x, y = (v.contiguous(memory_format=torch.channels_last) for v in (x, y))
    got = kd.fgd_loss(x, y, BOXES, global_context=block.to(target.device), backend=target.backend, **weights)
    same(got.cpu(), expected, rtol=1e-5)
    for a, b in zip(torch.autograd.grad(got, [s, *block.parameters()]), wanted, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-4)


def masks(target: Target, boxes: Any, size: tuple[int, int], scale: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Of the foreground and of the background."""
    first = boxes if isinstance(boxes, torch.Tensor) else boxes[0]
    drawn = padded_boxes(boxes, len(boxes), first.device).to(target.device)
    scale = None if scale is None else scale.to(target.device)
    if not target.fused:
        return list(reference.box_masks(drawn, size, scale))
    return [focal.box_masks(drawn, scale, size, *of, target.backend).cpu() for of in ((1.0, 0.0), (0.0, 1.0))]


def test_boxes_beyond_the_image_are_clipped(target: Target) -> None:
    far = torch.inf
    boxes = torch.tensor([
        [[-3.0, -2.5, 2.0, 1.0], [20.0, 20.0, 30.0, 30.0], [-9.0, -9.0, -5.0, -5.0], [3.0, 9.0, 4.0, 8.0]],
        [[-1e30, -5e9, 4e9, 1e30], [-far, -far, far, far], [6.0, 5.0, 8.0, 8.0], [1.0, 1.0, 0.5, 3.0]],
    ])  # fmt: skip
    front, back = masks(target, boxes, (5, 6))
    expected = torch.zeros(5, 6)
    expected[:2, :3] = 1 / (6 * 5)
    torch.testing.assert_close(front[0], expected)
    torch.testing.assert_close(back[0], (expected == 0) / 24)
    assert (front[1] == 0).all()  # of boxes without end the part of a pixel is none
    torch.testing.assert_close(back[1], torch.full((5, 6), 1 / 30))


def test_an_image_full_of_boxes_has_no_background(target: Target) -> None:
    front, back = masks(target, [torch.tensor([[0.0, 0.0, 6.0, 5.0]]), torch.zeros(0, 4)], (5, 6))
    assert (back[0] == 0).all()
    assert (front[1] == 0).all()
    torch.testing.assert_close(back[1], torch.full((5, 6), 1 / 30))


@pytest.mark.backends("cpu", "triton")
def test_masks_of_random_boxes(fused: Target, generator: torch.Generator) -> None:
    """Against plain PyTorch, with each image's own scale."""
    corners = torch.rand(3, 11, 2, 2, generator=generator) * torch.tensor([50.0, 40.0]) - 5
    boxes = torch.cat([corners.amin(2), corners.amax(2)], 2)
    boxes[1, ::2] = boxes[1, ::2].flip(1)  # no boxes
    boxes[2, 3:, 2] = boxes[2, 3:, 0]  # without width
    scale = torch.tensor([[0.25, 0.2, 0.25, 0.2], [0.3, 0.1, 0.3, 0.1], [1.0, 1.0, 1.0, 1.0]]).unsqueeze(1)
    for of in (scale, scale[:1], None):
        for got, expected in zip(
            masks(fused, boxes, (8, 11), of), reference.box_masks(boxes, (8, 11), of), strict=True
        ):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=0.0)


@pytest.mark.backends("cpu", "triton")
@pytest.mark.parametrize("want_student", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_fgd_as_operators(fused: Target, dtype: torch.dtype, want_student: bool, generator: torch.Generator) -> None:
    ops, b = torch.ops.kdkernels, fused.backend
    s, t = (x.to(fused.device, dtype) for x in pair(generator, 3, 5, 7, 9, dtype=torch.float32))
    drawn, weights = padded_boxes(BOXES, 3, torch.device("cpu")).to(fused.device), torch.tensor([0.7, 0.4])
    for scale in (None, torch.rand(3, 1, 4, generator=generator).to(fused.device)):
        torch.library.opcheck(ops.box_masks.default, (drawn, scale, weights, 7, 9, b))
    mask = ops.box_masks(drawn, None, weights, 7, 9, b)
    for upstream in (None, torch.tensor([2.0], device=fused.device)):
        arguments = (s, t, mask, torch.tensor([0.5, 1.0]), torch.tensor([0.1]), upstream, want_student, b)
        torch.library.opcheck(ops.feature_focal.default, arguments)


@pytest.mark.backends("cpu", "triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_fgd_gradient(fused: Target, dtype: torch.dtype, channels_last: bool, generator: torch.Generator) -> None:
    """Every term counts, and a gradient in half precision is rounded once."""
    weights = {"foreground_weight": 0.7, "background_weight": 0.4, "attention_weight": 0.02}
    s, t = (x.to(dtype) for x in pair(generator, 3, 5, 7, 9, dtype=torch.float32))
    s[0, 1, :2] = 0  # |s| has no slope there
    x, y = s.double().requires_grad_(), t.double()
    expected = kd.fgd_loss(x, y, BOXES, temperature=0.8, backend="reference", **weights)
    (wanted,) = torch.autograd.grad(expected * 3, x)
    x, y = (v.to(fused.device) for v in (s, t))
    if channels_last:
        x, y = x.contiguous(memory_format=torch.channels_last), y  # a teacher may lie otherwise
    x.requires_grad_()
    boxes = [b.to(fused.device) for b in BOXES]
    got = kd.fgd_loss(x, y, boxes, temperature=0.8, backend=fused.backend, **weights)
    same(got.cpu().double(), expected, rtol=2e-6)
    (ds,) = torch.autograd.grad(got * 3, x)
    assert ds.dtype == dtype
    ulps = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    # float32 and bfloat16 gradients are scaled after they were stored.
    torch.testing.assert_close(ds.cpu().double(), wanted, rtol=(4 if dtype == torch.float32 else 2) * ulps, atol=3e-7)


def test_boxes_in_the_images_coordinates(generator: torch.Generator) -> None:
    s, t = pair(generator, 3, 5, 7, 9)
    large = [b * torch.tensor([8.0, 4.0, 8.0, 4.0]) for b in BOXES]
    expected = kd.fgd_loss(s, t, BOXES)
    same(kd.fgd_loss(s, t, large, image_size=(28, 72)), expected)
    same(kd.fgd_loss(s, t, large, image_size=torch.tensor([[28, 72]] * 3)), expected)


def test_many_boxes(generator: torch.Generator) -> None:
    """More than are drawn at once."""
    corners = torch.rand(2, 37, 2, 2, generator=generator) * torch.tensor([9.0, 7.0])
    boxes = torch.cat([corners.amin(2), corners.amax(2)], 2)
    s, t = pair(generator, 2, 3, 7, 9)
    same(kd.fgd_loss(s, t, boxes), eager_fgd(s, t, boxes), rtol=1e-6)  # eager divides in float64, of float32 boxes


@pytest.mark.parametrize("boxes", [[torch.zeros(0, 4)] * 2, torch.zeros(2, 0, 4)], ids=["list", "tensor"])
def test_no_boxes_at_all(target: Target, boxes: Any, generator: torch.Generator) -> None:
    s, t = (x.to(target.device) for x in pair(generator, 2, 3, 4, 4, dtype=torch.float32))
    boxes = [b.to(target.device) for b in boxes] if isinstance(boxes, list) else boxes.to(target.device)
    loss = kd.fgd_loss(s.requires_grad_(), t, boxes, backend=target.backend)
    loss.backward()
    assert loss.isfinite()
    assert s.grad.isfinite().all()


def test_fgd_contains_a_nan(target: Target, generator: torch.Generator) -> None:
    """Of one image: the others' gradients stay what they were."""
    s, t = (x.to(target.device) for x in pair(generator, 3, 3, 7, 9, dtype=torch.float32))
    boxes = [b.to(target.device) for b in BOXES]
    grads = []
    for broken in (False, True):
        x = s.clone()
        x[1, 0, 0, 0] = torch.nan if broken else 1.0
        x.requires_grad_()
        kd.fgd_loss(x, t, boxes, backend=target.backend).backward()
        grads.append(x.grad)
    assert grads[1][1].isnan().any()
    assert torch.equal(grads[0][::2], grads[1][::2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fgd_reads_half_precision_where_it_lies(dtype: torch.dtype, generator: torch.Generator) -> None:
    """Without a gradient; a loss with one is the same, from a copy."""
    s, t = (x.to(dtype) for x in pair(generator, 3, 3, 7, 9, dtype=torch.float32))
    block = kd.GlobalContext(3)
    wanted = kd.fgd_loss(s.clone().requires_grad_(), t, BOXES, global_context=block)
    read = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True)
    with torch.no_grad(), read:
        loss = kd.fgd_loss(s, t, BOXES, global_context=block)
    # With a gradient torch's convolutions may round otherwise.
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0.0)
    copies = [e for e in read.events() if e.name == "aten::copy_" and e.input_shapes[0] == list(s.shape)]
    assert not copies


def test_fgd_compiles_with_lists_of_boxes(generator: torch.Generator) -> None:
    s, t = pair(generator, 3, 3, 7, 9, dtype=torch.float32)
    compiled = torch.compile(lambda s, t: kd.fgd_loss(s, t, BOXES), fullgraph=True, backend="aot_eager")
    same(compiled(s, t), kd.fgd_loss(s, t, BOXES))


# -------------------------------------------------------------------------------------------------- scores, boxes, features


def test_detections_as_lists_and_as_a_batch(target: Target, generator: torch.Generator) -> None:
    counts = (3, 0, 2)
    scores = [[torch.randn(n, 5, generator=generator) for n in counts] for _ in range(2)]
    boxes = [[torch.rand(n, 4, generator=generator) for n in counts] for _ in range(2)]
    (ss, ts), (sb, tb) = scores, boxes
    valid = torch.arange(3) < torch.tensor(counts)[:, None]

    def batch(x: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([F.pad(one, (0, 0, 0, 3 - len(one)), value=7.0) for one in x]).to(target.device)

    lists = kd.detection_distillation_loss(
        *([x.to(target.device) for x in v] for v in (ss, ts, sb, tb)), temperature=2.0, backend=target.backend
    )
    padded_ = kd.detection_distillation_loss(
        batch(ss), batch(ts), batch(sb), batch(tb), valid=valid.to(target.device), temperature=2.0,
        backend=target.backend,
    )  # fmt: skip
    a, b = torch.cat(ss), torch.cat(ts)
    kl = 4 * F.kl_div((a / 2).log_softmax(-1), (b / 2).softmax(-1), reduction="batchmean")
    l1 = F.smooth_l1_loss(torch.cat(sb), torch.cat(tb), reduction="none").sum(1).mean()
    same(lists.cpu(), kl + l1, rtol=1e-5)
    same(padded_.cpu(), kl + l1, rtol=1e-5)


def test_detections_with_giou_and_features(generator: torch.Generator) -> None:
    scores = pair(generator, 2, 3, 5)
    corners = torch.rand(2, 2, 3, 2, 2, generator=generator, dtype=F64)
    boxes = torch.cat([corners.amin(-2), corners.amax(-2)], -1)
    maps_s, maps_t = [pair(generator, 2, 4, 3, 3)[0]], [pair(generator, 2, 6, 3, 3)[1]]
    adapter = kd.Adapter(4, 6).double()
    got = kd.detection_distillation_loss(
        *scores, *boxes, maps_s, maps_t, box_loss="giou", adapters=[adapter], box_weight=2.0, feature_weight=3.0
    )
    kl = F.kl_div(scores[0].log_softmax(-1), scores[1].softmax(-1), reduction="sum") / 6
    expected = kl + 2 * (1 - giou(*boxes)).mean() + 3 * F.mse_loss(adapter(maps_s[0]), maps_t[0])
    same(got, expected, rtol=1e-10)


def test_giou() -> None:
    a = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    b = torch.tensor([[1.0, 1.0, 3.0, 3.0], [0.0, 0.0, 1.0, 1.0], [2.0, 0.0, 3.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(giou(a, b), torch.tensor([1 / 7 - 2 / 9, 1.0, -1 / 3, 0.0]))


def test_no_detections(target: Target) -> None:
    s = torch.zeros(0, 5, device=target.device, requires_grad=True)
    boxes = [torch.zeros(0, 4, device=target.device)] * 2
    loss = kd.detection_distillation_loss([s, s], [s.detach()] * 2, boxes, boxes, backend=target.backend)
    loss.backward()
    assert loss == 0
    none = torch.zeros(1, 2, dtype=torch.bool, device=target.device)
    x = torch.ones(1, 2, 4, device=target.device)
    assert kd.detection_distillation_loss(x, 2 * x, x, 2 * x, valid=none, backend=target.backend) == 0


def test_rank_mimicking(target: Target, generator: torch.Generator) -> None:
    s, t = (x.to(target.device) for x in pair(generator, 4, 6, dtype=torch.float32))
    valid = torch.rand(4, 6, generator=generator).to(target.device) < 0.6
    valid[:, 0], valid[2] = True, False
    s.requires_grad_()
    loss = kd.rank_mimicking_loss(s, t, valid=valid, backend=target.backend)
    rows = []
    for i in (0, 1, 3):
        keep = valid[i]
        rows.append(F.kl_div(s[i, keep].log_softmax(0), t[i, keep].softmax(0), reduction="sum"))
    same(loss, torch.stack(rows).mean(), rtol=1e-5)
    (g,) = torch.autograd.grad(loss, s)
    assert (g[~valid] == 0).all()
    assert g.isfinite().all()


# ------------------------------------------------------------------------------------------------- statistics of features


def test_variational_information_as_in_repdistiller(generator: torch.Generator) -> None:
    s, t = pair(generator, 3, 5, 4, 4)
    loss = kd.VariationalInformationLoss(5).double()
    same(loss(s, t), eager_variational(s, t, loss.raw_variance), rtol=1e-7)
    same(F.softplus(loss.raw_variance) + 1e-5, torch.full((5,), 5.0, dtype=F64), rtol=1e-6)
    tokens = [x.flatten(2).transpose(1, 2) for x in (s, t)]
    same(loss(*tokens, dim=-1), loss(s, t))


def test_pearson_as_published(generator: torch.Generator) -> None:
    s, t = pair(generator, 3, 5, 4, 4)
    same(kd.pearson_feature_loss(s, t), eager_pearson(s, t), rtol=1e-10)
    small = F.avg_pool2d(s, 2)
    expected = eager_pearson(F.interpolate(small, (4, 4), mode="bilinear"), t)
    same(kd.pearson_feature_loss(small, t, resize="student"), expected, rtol=1e-10)


@pytest.mark.backends("cpu", "triton")
def test_pearson_far_from_the_origin(fused: Target, generator: torch.Generator) -> None:
    """A mean of a thousand deviations: float64 sums need none taken off."""
    s, t = (x.to(fused.device) + 1000 for x in pair(generator, 3, 5, 4, 4, dtype=torch.float32))
    s.requires_grad_()
    loss = kd.pearson_feature_loss(s, t, backend=fused.backend)
    loss.backward()
    exact = s.detach().double().cpu().requires_grad_()
    expected = kd.pearson_feature_loss(exact, t.double().cpu())
    expected.backward()
    same(loss.detach().cpu(), expected.detach(), rtol=1e-6)
    torch.testing.assert_close(s.grad.cpu().double(), exact.grad, rtol=1e-5, atol=1e-9)


def test_pearson_of_constant_channels(target: Target, generator: torch.Generator) -> None:
    s, t = (x.to(target.device) for x in pair(generator, 2, 3, 4, 4, dtype=torch.float32))
    s[:, 1] = 0.3
    s.requires_grad_()
    loss = kd.pearson_feature_loss(s, t, backend=target.backend)
    loss.backward()
    assert loss.isfinite()
    assert (s.grad[:, 1] == 0).all()
    assert s.grad.isfinite().all()


def published_hcl(students: list[torch.Tensor], teachers: list[torch.Tensor]) -> torch.Tensor:
    total = torch.zeros(())
    for fs, ft in zip(students, teachers, strict=True):
        h = fs.shape[2]
        loss, count, weights = F.mse_loss(fs, ft), 1.0, 1.0
        for size in (4, 2, 1):
            if size >= h:
                continue
            a, b = F.adaptive_avg_pool2d(fs, (size, size)), F.adaptive_avg_pool2d(ft, (size, size))
            count /= 2.0
            loss = loss + F.mse_loss(a, b) * count
            weights += count
        total = total + loss / weights
    return total


def test_hierarchical_context_as_published(generator: torch.Generator) -> None:
    both = [pair(generator, 2, 3, n, n) for n in (8, 7, 3, 1)]
    students, teachers = (list(x) for x in zip(*both, strict=True))
    same(kd.hierarchical_context_loss(students, teachers), published_hcl(students, teachers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 41, 37), (1, 5, 56, 24), (2, 3, 9, 2)], ids=str)
def test_hierarchical_context_in_one_read(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Windows that overlap, nest, or are wider than the map; both gradients, for any number of threads."""
    s, t = (x.to(dtype) for x in pair(generator, *shape, dtype=torch.float32))
    levels, before, found = (6, 5, 1), torch.get_num_threads(), []
    if shape[2] == 56:
        s, t, levels = s.transpose(2, 3).contiguous().transpose(2, 3), t[..., ::1], (8, 4, 2)

    def both(s: torch.Tensor, t: torch.Tensor, backend: str) -> tuple[torch.Tensor, ...]:
        s, t = s.detach().requires_grad_(), t.detach().requires_grad_()
        value = 100 * kd.hierarchical_context_loss(s, t, levels=levels, backend=backend)
        return value.detach(), *torch.autograd.grad(value, (s, t))

    exact = both(s.double(), t.double(), "reference")
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(both(s, t, "cpu"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    for got, wanted in zip(found[0], exact, strict=True):
        about = torch.finfo(got.dtype)
        atol = 2e-7 * float(wanted.abs().max()) + about.smallest_normal * about.eps
        torch.testing.assert_close(got.double(), wanted, rtol=2 * about.eps, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_hierarchical_context_as_an_operator(dtype: torch.dtype, generator: torch.Generator) -> None:
    s, t = (x.to(dtype) for x in pair(generator, 2, 3, 6, 5, dtype=torch.float32))
    scalars = torch.tensor([0.5, 4.0, 0.25, 2.0, 0.125])
    torch.library.opcheck(
        torch.ops.kdkernels.feature_context.default, (s, t, scalars, torch.ones(1), True, True, "cpu")
    )
    loss = lambda s, t: kd.hierarchical_context_loss(s, t, backend="cpu")  # noqa: E731
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, expected in zip(gradient(compiled, s, t), gradient(loss, s, t), strict=True):
        torch.testing.assert_close(got, expected)


# ------------------------------------------------------------------------------------------------------ vectors and scores


def test_cosine(target: Target, generator: torch.Generator) -> None:
    s, t = (x.to(target.device) for x in pair(generator, 6, 9, dtype=torch.float32))
    s[1], t[2], s[4] = 0, 0, t[4] * 3
    s.requires_grad_()
    each = kd.cosine_loss(s, t, reduction="none", backend=target.backend)
    expected = 1 - F.cosine_similarity(s.detach().double(), t.double(), dim=-1)
    torch.testing.assert_close(each.detach().double(), expected, rtol=1e-6, atol=5e-7)
    assert each[1] == each[2] == 1
    (g,) = torch.autograd.grad(kd.cosine_loss(s, t, backend=target.backend), s)
    assert g.isfinite().all()
    assert (g[1:3] == 0).all()
    maps = [x.T.reshape(1, 9, 2, 3) for x in (s.detach(), t)]
    torch.testing.assert_close(
        kd.cosine_loss(*maps, dim=1, reduction="none", backend=target.backend).flatten(), each.detach()
    )


@pytest.mark.backends("cpu", "triton")
def test_cosine_of_nearly_equal_vectors(fused: Target, generator: torch.Generator) -> None:
    """1 - cos of 1e-9 keeps its digits, which float32 sums would lose."""
    s = torch.randn(4, 64, generator=generator).to(fused.device)
    t = s + 4e-5 * torch.randn(4, 64, generator=generator).to(fused.device)
    exact = kd.cosine_loss(s.double().cpu(), t.double().cpu())
    assert exact < 1e-8
    same(kd.cosine_loss(s, t, backend=fused.backend).cpu(), exact, rtol=1e-6)


def test_cosine_contains_a_nan(target: Target, generator: torch.Generator) -> None:
    s, t = (x.to(target.device) for x in pair(generator, 3, 9, dtype=torch.float32))
    s[1, 0] = torch.nan
    each = kd.cosine_loss(s, t, reduction="none", backend=target.backend)
    assert each.isnan().tolist() == [False, True, False]


def test_margin_ranking(target: Target, generator: torch.Generator) -> None:
    logits = torch.randn(6, 5, generator=generator).to(target.device).requires_grad_()
    labels = torch.randint(0, 5, (6,), generator=generator).to(target.device)

    def loss(x: torch.Tensor, y: torch.Tensor, **options: Any) -> torch.Tensor:
        return kd.margin_ranking_loss(x, y, backend=target.backend, **options)

    expected = F.multi_margin_loss(logits, labels, margin=0.7) * 5 / 4  # torch divides by V
    same(loss(logits, labels, margin=0.7), expected, rtol=1e-6)
    right = logits.gather(1, labels[:, None])
    hardest = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    expected = (1 - right[:, 0] + hardest).clamp_min(0).mean()
    same(loss(logits, labels, wrong="hardest"), expected, rtol=1e-6)
    for options in ({}, {"wrong": "hardest"}):
        (g,) = torch.autograd.grad(loss(logits, labels, **options), logits)
        (exact,) = torch.autograd.grad(kd.margin_ranking_loss(logits.double(), labels, **options), logits)
        torch.testing.assert_close(g, exact.to(g), rtol=1e-5, atol=1e-7)
    labels[2] = -100
    each = loss(logits, labels, reduction="none")
    assert each[2] == 0
    same(loss(logits, labels), each.sum() / 5, rtol=1e-6)
    (g,) = torch.autograd.grad(loss(logits, labels), logits)
    assert (g[2] == 0).all()
    assert loss(logits[:, :1], labels * 0) == 0
    assert loss(logits, labels * 0 - 100) == 0
    assert loss(logits[:0], labels[:0]) == 0


@pytest.mark.parametrize("wrong", ["all", "hardest"])
def test_margins_contain_what_is_broken(target: Target, wrong: str, generator: torch.Generator) -> None:
    """NaN in one row, the same scores twice, -inf, and scores that a float16 sum could not hold."""
    x = torch.randn(5, 40, generator=generator, dtype=torch.float32).to(target.device)
    labels = torch.arange(5, device=target.device)
    x[1, 7] = torch.nan
    x[2, 9] = x[2, 30] = 5.0
    x[3, 8] = -torch.inf
    x[4] *= 1e4
    for dtype in (torch.float32, torch.float16):
        s = x.to(dtype).requires_grad_()
        each = kd.margin_ranking_loss(s, labels, wrong=wrong, reduction="none", backend=target.backend)
        assert each.isnan().tolist() == [False, True, False, False, False]
        (g,) = torch.autograd.grad(each[torch.tensor([0, 2, 3, 4])].sum(), s)
        exact = s.detach().double().requires_grad_()
        wide = kd.margin_ranking_loss(exact, labels, wrong=wrong, reduction="none")[torch.tensor([0, 2, 3, 4])]
        same(each[torch.tensor([0, 2, 3, 4])], wide, rtol=1e-6)
        (e,) = torch.autograd.grad(wide.sum(), exact)
        keep = torch.tensor([0, 2, 3, 4])
        torch.testing.assert_close(g[keep].double(), e[keep], rtol=2e-3, atol=1e-6)


@pytest.mark.backends("cpu", "triton")
def test_margins_as_an_operator(fused: Target, generator: torch.Generator) -> None:
    x = torch.randn(3, 7, generator=generator).to(fused.device)
    labels, scalars = torch.arange(3, device=fused.device), torch.tensor([1.0, 0.0])
    for upstream in (None, torch.ones(3, device=fused.device)):
        arguments = (x, labels, scalars, upstream, True, -100, fused.backend)
        torch.library.opcheck(torch.ops.kdkernels.margin_rows.default, arguments)
    with pytest.raises(IndexError, match="labels hold 7, outside 0 to 6"):
        kd.margin_ranking_loss(x, labels + 5, backend=fused.backend)


def test_margin_mse(generator: torch.Generator) -> None:
    sp, sn = pair(generator, 6)
    tp, tn = pair(generator, 6)
    same(kd.margin_mse_loss(sp, sn, tp, tn), F.mse_loss(sp - sn, tp - tn))
    for k in (3, 22000):  # few are composed of torch operations
        many_s, many_t = pair(generator, 6, k)
        scores = [x.requires_grad_() for x in (sp[:, None], many_s, tp[:, None], many_t)]
        for dtype, rtol in ((F64, 1e-12), (torch.float32, 1e-5)):
            got = kd.margin_mse_loss(*(x.to(dtype) for x in scores), reduction="sum")
            wanted = F.mse_loss(scores[0] - scores[1], scores[2] - scores[3], reduction="sum")
            same(got, wanted, rtol)
            for a, b in zip(torch.autograd.grad(got, scores), torch.autograd.grad(wanted, scores), strict=True):
                torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


# ------------------------------------------------------------------------------------------------ what every one must bear


def fgd(s: torch.Tensor, t: torch.Tensor, **options: Any) -> torch.Tensor:
    boxes = torch.tensor([[0.5, 0.5, 2.0, 2.5]], device=s.device).expand(len(s), 1, 4)
    return kd.fgd_loss(s, t, boxes, **options)


def variational(s: torch.Tensor, t: torch.Tensor, **options: Any) -> torch.Tensor:
    return kd.variational_information_loss(s, t, torch.zeros(s.shape[1], device=s.device), **options)


LOSSES: dict[str, Any] = {
    "fgd": fgd,
    "variational": variational,
    "pearson": kd.pearson_feature_loss,
    "context": kd.hierarchical_context_loss,
    "cosine": lambda s, t, **o: kd.cosine_loss(s, t, dim=1, **o),
}
ALONE = {  # those in which an image's gradient does not depend on the others
    **{n: LOSSES[n] for n in ("fgd", "variational", "context", "cosine")},
    "hint": kd.hint_loss, "attention": kd.attention_transfer_loss,
    "channel attention": lambda s, t, **o: kd.channel_attention_transfer_loss(s, t, distance="norm", **o),
}  # fmt: skip


def gradient(loss: Any, s: torch.Tensor, t: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    s = s.detach().requires_grad_()
    value = loss(s, t, **options)
    return value.detach(), torch.autograd.grad(value, s)[0]


@pytest.mark.parametrize("name", LOSSES)
def test_an_empty_batch(target: Target, name: str) -> None:
    x = torch.zeros(0, 3, 4, 4, device=target.device)
    loss, ds = gradient(LOSSES[name], x, x, backend=target.backend)
    assert loss == 0 or name == "context"  # a mean of nothing at a coarser size
    assert ds.shape == x.shape


@pytest.mark.parametrize("name", LOSSES)
def test_zero_maps(target: Target, name: str, generator: torch.Generator) -> None:
    s, t = (x.to(target.device) for x in pair(generator, 2, 3, 4, 4, dtype=torch.float32))
    s[0] = 0
    for a, b in ((s, t), (t, s), (torch.zeros_like(s), torch.zeros_like(t))):
        assert all(x.isfinite().all() for x in gradient(LOSSES[name], a, b, backend=target.backend))


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_does_not_overflow(target: Target, name: str, generator: torch.Generator) -> None:
    s, t = ((2e4 * x).half().clamp(-6e4, 6e4) for x in pair(generator, 2, 33, 4, 4, dtype=torch.float32))
    loss, ds = gradient(LOSSES[name], s.to(target.device), t.to(target.device), backend=target.backend)
    exact, wide = gradient(LOSSES[name], s.double(), t.double())
    torch.testing.assert_close(loss.cpu().double(), exact, rtol=1e-5, atol=0)
    assert torch.equal(ds.cpu().isfinite(), wide.half().isfinite())


@pytest.mark.parametrize("name", ALONE)
def test_a_nan_stays_in_its_image(target: Target, name: str, generator: torch.Generator) -> None:
    s, t = (x.to(target.device) for x in pair(generator, 3, 3, 4, 4, dtype=torch.float32))
    _, whole = gradient(ALONE[name], s, t, backend=target.backend)
    s[1, 0, 0, 0] = torch.nan
    loss, broken = gradient(ALONE[name], s, t, backend=target.backend)
    assert loss.isnan()
    assert broken[1].isnan().any()
    assert torch.equal(broken[::2], whole[::2])


def test_boxes_that_are_none(target: Target, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN corners, sides below 0, and boxes wholly outside change nothing: where values lie on a GPU, nobody looks."""
    monkeypatch.setattr("kdkernels.checks._may_read", lambda x: False)
    s, t = (x.to(target.device) for x in pair(generator, 1, 3, 7, 9, dtype=torch.float32))
    good = torch.tensor([[1.0, 1.0, 4.0, 3.0]])
    bad = torch.tensor(
        [[torch.nan, 1.0, 2.0, 2.0], [5.0, 1.0, 2.0, 2.0], [50.0, 50.0, 60.0, 60.0], [-9.0, -9.0, -5.0, -5.0]]
    )
    expected = gradient(kd.fgd_loss, s, t, boxes=[good.to(s.device)], backend=target.backend)
    got = gradient(kd.fgd_loss, s, t, boxes=[torch.cat([bad, good, bad]).to(s.device)], backend=target.backend)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# -------------------------------------------------------------------------------------------------------------- bad input

X = torch.zeros(2, 3, 4, 4)
BAD: dict[str, tuple[Any, str]] = {
    "channels": (lambda: kd.fgd_loss(X, X[:, :2], [X[0, 0]] * 2), "add an adapter"),
    "tokens": (lambda: kd.fgd_loss(X[0], X[0], [X[0, 0]] * 3), r"must be \(N, C, H, W\)"),
    "boxes": (lambda: kd.fgd_loss(X, X, [X[0, 0]]), "one entry an image, 2; got 1"),
    "box shape": (lambda: kd.fgd_loss(X, X, [torch.zeros(3, 5)] * 2), r"boxes\[0\] must be \(m, 4\), got \(3, 5\)"),
    "box tensor": (lambda: kd.fgd_loss(X, X, torch.zeros(2, 4)), r"boxes must be \(N, M, 4\) with N = 2"),
    "no box": (lambda: kd.fgd_loss(X, X, [torch.tensor([[0.0, 0, 1, 1], [3, 0, 1, 1]])] * 2),
               r"boxes\[0\] must be x1, y1, x2, y2, with x1 <= x2 and y1 <= y2; got \[3.0, 0.0, 1.0, 1.0\]"),
    "box of NaN": (lambda: kd.fgd_loss(X, X, [X[0, 0], X[0, 0] / 0]), r"boxes\[1\] must be x1, .*; got \[nan, nan"),
    "padded box of NaN": (lambda: kd.fgd_loss(X, X, X[:, 0] / 0), r"boxes must be numbers; got \[nan, nan"),
    "image size": (lambda: kd.fgd_loss(X, X, [X[0, 0]] * 2, image_size=(1, 2, 3)), "image_size must be"),
    "temperature": (lambda: kd.fgd_loss(X, X, [X[0, 0]] * 2, temperature=0.0), "temperature must be positive"),
    "variance": (lambda: kd.variational_information_loss(X, X, torch.zeros(2)), r"one number a channel, \(3,\)"),
    "resize": (lambda: kd.pearson_feature_loss(X, X, resize="both"), "unknown resize 'both'"),
    "levels": (lambda: kd.hierarchical_context_loss(X, X, levels=(1, 2)), "levels must fall"),
    "maps": (lambda: kd.hierarchical_context_loss([X], [X, X]), "as many maps"),
    "detections": (lambda: kd.detection_distillation_loss([X[0, 0]], [X[0, 0, :2]]), "detections must match"),
    "one sided boxes": (lambda: kd.detection_distillation_loss(X[0], X[0], X[0]), "go together"),
    "levels of features": (
        lambda: kd.detection_distillation_loss(X[0], X[0], student_features=[X], teacher_features=[]), "as many levels",
    ),
    "ranks": (lambda: kd.rank_mimicking_loss(X[0, 0], X[0, 0], valid=X[0, 0]), "valid must be boolean"),
    "wrong": (lambda: kd.margin_ranking_loss(X[0, 0], torch.zeros(4).long(), wrong="easy"), "unknown wrong"),
    "margins": (lambda: kd.margin_mse_loss(X[0, 0, 0], X[0, 0, 0, :3], X[0, 0, 0], X[0, 0, 0]), "go together"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, words = BAD[name]
    with pytest.raises(ValueError, match=words):
        call()


def test_errors_name_the_loss_that_was_called() -> None:
    scores = torch.zeros(2, 3, dtype=F64)
    with pytest.raises(kd.BackendError, match="rank_mimicking_loss cannot run on backend 'cpu'"):
        kd.rank_mimicking_loss(scores, scores, backend="cpu")
    with pytest.raises(kd.BackendError, match="detection_distillation_loss cannot run on backend 'cpu'"):
        kd.detection_distillation_loss(scores.unsqueeze(0), scores.unsqueeze(0), backend="cpu")
    with pytest.raises(ValueError, match="student_scores"):
        kd.rank_mimicking_loss(scores, scores[:1])


def test_modules_are_their_functions(generator: torch.Generator) -> None:
    s, t = pair(generator, 2, 3, 4, 4)
    boxes = [torch.tensor([[0.0, 0.0, 2.0, 2.0]])] * 2
    same(kd.FGDLoss(temperature=0.7)(s, t, boxes), kd.fgd_loss(s, t, boxes, temperature=0.7))
    same(kd.PearsonFeatureLoss()(s, t), kd.pearson_feature_loss(s, t))
    same(kd.HierarchicalContextLoss()(s, t), kd.hierarchical_context_loss(s, t))
    same(kd.CosineLoss(dim=1)(s, t), kd.cosine_loss(s, t, dim=1))
    labels = torch.tensor([0, 1])
    x = s[:, :, 0, 0]
    same(kd.MarginRankingLoss(margin=2.0)(x, labels), kd.margin_ranking_loss(x, labels, margin=2.0))
    same(kd.MarginMSELoss()(x, x, x, -x), kd.margin_mse_loss(x, x, x, -x))
    same(kd.RankMimickingLoss()(x, -x), kd.rank_mimicking_loss(x, -x))
    same(kd.DetectionDistillationLoss()(s[0], t[0]), kd.detection_distillation_loss(s[0], t[0]))
    trained = kd.FGDLoss(adapter=kd.Adapter(3, 3), global_context=kd.GlobalContext(3))
    assert len(list(trained.parameters())) == 2 + 2 * 7
