"""The operator kdkernels::linear_divergence, its autograd, and the choice of backend."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from kdkernels import backends
from kdkernels.native import View
from kdkernels.ops.library import define, first_order, graph_is_kept
from kdkernels.ops.linear_divergence import gemm, reference
from kdkernels.ops.row_divergence.kinds import STATS, Inputs, Kind
from kdkernels.ops.row_divergence.op import COUNT_CE, COUNT_KD, _divisors, _flat, _kernels, _value
from kdkernels.ops.scalars import Number, pack
from kdkernels.ops.scale.op import scaled

FLOAT = 4  # bytes of a logit, whatever the inputs are
# Bounds of the automatic budget for a chunk's logits of both models.
MOST_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}
LEAST_ROWS = 64
SCALE_S, CAP_S, SCALE_T, CAP_T = 1, 2, 4, 8  # which of the packed head scalars count


class Head(NamedTuple):
    """One model's side: softcap tanh(scale (hidden weight^T + bias) / softcap).

    `own` is one more class for every row alone: its score is hidden . own, and it stands last.
    """

    hidden: torch.Tensor  # (N, H)
    weight: torch.Tensor  # (V, H)
    bias: torch.Tensor | None = None  # (V,)
    own: torch.Tensor | None = None  # (N, H)
    scale: Number | None = None
    softcap: Number | None = None


_NOBODY: Any = Head(None, None)  # type: ignore[arg-type]


def chunk_rows(rows: int, classes: int, width: int, chunk_bytes: int, buffers: int, device: str) -> int:
    """Rows of a chunk, all chunks but the last alike.

    Args:
        rows, classes: of the logits.
        width: the student's hidden size.
        chunk_bytes: what the logits of a chunk may take; 0 chooses. The float32 gradient of a weight is read and
            written once a chunk, which beside the product is little from about `width` rows on, and what such a
            chunk's logits take is that gradient's own size.
        buffers: how many tensors of a chunk's logits there are at a time.
    """
    row = FLOAT * classes * buffers
    if chunk_bytes == 0:
        chunk_bytes = max(min(row * width, MOST_BYTES.get(device, MOST_BYTES["cuda"])), row * LEAST_ROWS)
    most_rows = chunk_bytes // row
    if rows <= most_rows:
        return max(rows, 1)
    n = -(-rows // -(-rows // most_rows))  # as few chunks, but equal ones
    # A multiple of 8 where there is a choice: then slices of labels and losses are aligned.
    return n if n < 8 else min(-(-n // 8) * 8, most_rows // 8 * 8)


class _Side:
    """A head with the accumulators of those of its gradients that are wanted."""

    def __init__(self, head: Head, wants: list[bool]):
        self.head = head
        self.any = any(wants)
        self.products = gemm.Products(head.hidden, head.weight)
        h, w, b, o = (t if want else None for t, want in zip(head[:4], wants, strict=True))
        f32 = {"dtype": torch.float32, "device": head.hidden.device}
        # What a float16 model gets stays wide until the backward knows its scale.
        self.d_hidden = None if h is None else torch.empty(h.shape, dtype=_stored(h.dtype), device=h.device)
        self.d_weight = None if w is None else torch.empty(w.shape, **f32)
        self.d_bias = None if b is None else torch.zeros(b.shape, **f32)
        self.d_own = None if o is None else torch.empty(o.shape, dtype=_stored(o.dtype), device=o.device)
        if self.d_weight is not None and head.hidden.shape[0] == 0:
            self.d_weight.zero_()

    def scores(self, rows: slice, out: torch.Tensor) -> None:
        head = self.head
        classes = head.weight.shape[0]
        self.products.scores(rows, out[:, :classes])
        if head.bias is not None:
            out[:, :classes].add_(head.bias)
        if head.own is not None:
            out[:, -1] = (head.hidden[rows].float() * head.own[rows]).sum(-1)
        if head.softcap is not None:
            out.mul_(1 / head.softcap if head.scale is None else head.scale / head.softcap).tanh_().mul_(head.softcap)
        elif head.scale is not None:
            out.mul_(head.scale)

    def accumulate(self, rows: slice, gradient: torch.Tensor, scores: torch.Tensor) -> None:
        """Takes the gradient of a chunk's scores; both are used up."""
        head, classes = self.head, self.head.weight.shape[0]
        if head.softcap is not None:
            gradient.mul_(scores.div_(head.softcap).square_().neg_().add_(1.0))
        if head.scale is not None:
            gradient.mul_(head.scale)
        hidden = head.hidden[rows]
        of_classes = gradient[:, :classes]
        if self.d_bias is not None:
            self.d_bias.add_(of_classes.sum(0))
        if self.d_hidden is not None or self.d_weight is not None:
            operand, factor = self.products.operand(of_classes)
        if self.d_hidden is not None:
            wide = self.d_hidden.dtype == torch.float32
            out = self.d_hidden[rows] if wide else torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
            self.products.by_hidden(operand, factor, out)
            if head.own is not None:
                out.addcmul_(gradient[:, -1:], head.own[rows].float())
            if not wide:
                self.d_hidden[rows] = out
        if self.d_own is not None:
            self.d_own[rows] = gradient[:, -1:] * hidden.float()
        if self.d_weight is not None:
            self.products.by_weight(rows, operand, factor, self.d_weight)

    def gradients(self) -> tuple[torch.Tensor, ...]:
        head = self.head
        found = (self.d_hidden, self.d_weight, self.d_bias, self.d_own)
        return tuple(
            head.hidden.new_empty(0) if d is None or x is None else d.to(_stored(x.dtype))
            for d, x in zip(found, head[:4], strict=True)
        )


def _stored(dtype: torch.dtype) -> torch.dtype:
    """How a gradient waits for its upstream scale: float16 would underflow."""
    return torch.float32 if dtype == torch.float16 else dtype


def _view(x: torch.Tensor) -> View:
    return View(x, (*x.shape, 1), (*x.stride(), 1))


def _forward(
    student: torch.Tensor,
    student_weight: torch.Tensor,
    student_bias: torch.Tensor | None,
    student_own: torch.Tensor | None,
    teacher: torch.Tensor | None,
    teacher_weight: torch.Tensor | None,
    teacher_bias: torch.Tensor | None,
    teacher_own: torch.Tensor | None,
    labels: torch.Tensor | None,
    weight: torch.Tensor | None,
    class_weight: torch.Tensor | None,
    scalars: torch.Tensor,
    head_scalars: torch.Tensor,
    divisors: torch.Tensor | None,
    kind: int,
    hard: bool,
    transforms: int,
    ignore_index: int,
    chunk_bytes: int,
    wants: list[bool],
    backend: str,
) -> tuple[torch.Tensor, ...]:
    def side(hidden: Any, head_weight: Any, bias: Any, own: Any, scale: int, cap: int, at: int, want: Any) -> _Side:
        factor = head_scalars[at] if transforms & scale else None
        softcap = head_scalars[at + 1] if transforms & cap else None
        return _Side(Head(hidden, head_weight, bias, own, factor, softcap), want)

    rows, classes = student.shape[0], student_weight.shape[0] + (student_own is not None)
    device = student.device
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        s = side(student, student_weight, student_bias, student_own, SCALE_S, CAP_S, 0, wants[:4])
        t = None
        if teacher is not None:
            t = side(teacher, teacher_weight, teacher_bias, teacher_own, SCALE_T, CAP_T, 2, wants[4:])
        # The row kernels read a teacher's logit for the last time just before they write the student's gradient
        # there. Not so where the teacher learns too, or where the label's logit stands apart.
        shared = not any(wants[4:]) and kind != Kind.DECOUPLED_KL
        step = chunk_rows(rows, classes, student.shape[1], chunk_bytes, buffers(wants, kind), device.type)
        f32 = {"dtype": torch.float32, "device": device}
        losses = torch.empty(rows, **f32)
        stats = torch.empty(step + 1, STATS, **f32)
        z_s, z_t = torch.empty(step, classes, **f32), torch.empty(step, classes, **f32)
        d_s = None if not s.any else z_t if shared else torch.empty_like(z_s)
        d_t = torch.empty_like(z_t) if any(wants[4:]) else None
        kernel = _kernels(backend)[0]
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            n = part.stop - start
            x, y = z_s[:n], z_t[:n]
            s.scores(part, x)
            if t is None:
                y.copy_(x)
            else:
                t.scores(part, y)
            ds, dt = (None if d is None else d[:n] for d in (d_s, d_t))
            kernel(
                _view(x), _view(y), _part(labels, part), _part(weight, part), class_weight, scalars, divisors,
                losses[part], None, View(stats, (n, STATS), (STATS, 1)),
                None if ds is None else _view(ds), None if dt is None else _view(dt),
                kind, Inputs.LOGITS.value, int(hard), 0, ignore_index,
            )  # fmt: skip
            if ds is not None:
                s.accumulate(part, ds, x)
            if t is not None and dt is not None:
                t.accumulate(part, dt, y)
        del z_s, z_t, d_s, d_t  # before the gradients are cast
        nothing = tuple(student.new_empty(0) for _ in range(4))
        return losses, *s.gradients(), *(nothing if t is None else t.gradients())


def buffers(wants: list[bool], kind: int) -> int:
    """How many tensors of a chunk's logits are alive at a time."""
    student, teacher = any(wants[:4]), any(wants[4:])
    return 2 + (student and (teacher or kind == Kind.DECOUPLED_KL)) + teacher


def _part(x: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    return None if x is None else x[rows]


def _forward_fake(student, student_weight, student_bias, student_own, teacher, teacher_weight, teacher_bias, teacher_own,
                  labels, weight, class_weight, scalars, head_scalars, divisors, kind, hard, transforms, ignore_index,
                  chunk_bytes, wants, backend):  # fmt: skip
    inputs = (student, student_weight, student_bias, student_own, teacher, teacher_weight, teacher_bias, teacher_own)
    hidden = (student,) * 4 + (student if teacher is None else teacher,) * 4
    grads = (
        x.new_empty(x.shape, dtype=_stored(x.dtype)) if want and x is not None else like.new_empty(0)
        for x, like, want in zip(inputs, hidden, wants, strict=True)
    )
    return torch.empty(student.shape[0], dtype=torch.float32, device=student.device), *grads


forward_op = define(
    "linear_divergence(Tensor student, Tensor student_weight, Tensor? student_bias, Tensor? student_own, "
    "Tensor? teacher, Tensor? teacher_weight, Tensor? teacher_bias, Tensor? teacher_own, Tensor? labels, Tensor? weight, "
    "Tensor? class_weight, Tensor scalars, Tensor head_scalars, Tensor? divisors, int kind, bool hard, int transforms, "
    "int ignore_index, int chunk_bytes, bool[] wants, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)


class LinearDivergence(torch.autograd.Function):
    """Loss and gradients in one pass over the tokens; where every row has its own upstream gradient, one more.

    Nothing is recomputed for float16: hidden states and weights are small beside logits, so that their gradients can
    wait in float32 until the backward knows the scale.
    """

    @staticmethod
    def forward(ctx, student, student_weight, student_bias, student_own, teacher, teacher_weight, teacher_bias, teacher_own,
                labels, weight, class_weight, scalars, head_scalars, divisors, options):  # fmt: skip
        kind, hard, transforms, ignore_index, chunk_bytes, per_row, backend = options
        inputs = (
            student,
            student_weight,
            student_bias,
            student_own,
            teacher,
            teacher_weight,
            teacher_bias,
            teacher_own,
        )
        wants = list(ctx.needs_input_grad[:8])
        ctx.stored = not per_row
        losses, *grads = forward_op(
            *inputs, labels, weight, class_weight, scalars, head_scalars, divisors, kind, hard, transforms, ignore_index,
            chunk_bytes, wants if ctx.stored else [False] * 8, backend,
        )  # fmt: skip
        ctx.backend, ctx.options = backend, options
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        output = losses if per_row else losses.double().sum().float()
        if ctx.stored:
            ctx.save_for_backward(output, *(g for g, want in zip(grads, wants, strict=True) if want))
        else:
            ctx.save_for_backward(output, *inputs, labels, weight, class_weight, scalars, head_scalars)
        return output

    @staticmethod
    def backward(ctx, upstream):
        wants = list(ctx.needs_input_grad[:8])
        if ctx.stored:
            output, *grads = ctx.saved_tensors
            dtypes = [d for d, want in zip(ctx.dtypes, wants, strict=True) if want]
            kept = [i for i, (g, dtype) in enumerate(zip(grads, dtypes, strict=True)) if g.dtype == dtype]
            with torch.no_grad():
                ready = dict(zip(kept, scaled(tuple(grads[i] for i in kept), upstream, ctx.backend, graph_is_kept())))
                found = [
                    ready[i] if i in ready else (g * upstream).to(dtype)
                    for i, (g, dtype) in enumerate(zip(grads, dtypes, strict=True))
                ]
        else:
            kind, hard, transforms, ignore_index, chunk_bytes, _, backend = ctx.options
            output, *inputs, labels, weight, class_weight, scalars, head_scalars = ctx.saved_tensors
            with torch.no_grad():
                # Every term is linear in its row's weight.
                rows = upstream.float().contiguous()
                _, *grads = forward_op(
                    *inputs, labels, rows if weight is None else rows * weight, class_weight, scalars, head_scalars,
                    None, kind, hard, transforms, ignore_index, chunk_bytes, wants, backend,
                )  # fmt: skip
                found = [g.to(d) for g, d, want in zip(grads, ctx.dtypes, wants, strict=True) if want]
        each = iter(found)
        grads = first_order("linear_divergence", output, tuple(next(each) if want else None for want in wants))
        return (*grads, *(None,) * 7)


def linear_divergence(
    student: Head,
    teacher: Head | None,
    *,
    kind: Kind,
    temperature: Number = 1.0,
    teacher_temperature: Number | None = None,
    kd_weight: Number = 1.0,
    ce_weight: Number | None = None,
    scale_by_t2: bool = True,
    reduction: str = "rowmean",
    labels: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    class_weight: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    num_items: Number | None = None,
    p0: Number = 0.0,
    p1: Number = 0.0,
    compact: bool = False,
    chunk_bytes: int = 0,
    backend: str = "auto",
    operation: str = "linear_divergence",
) -> torch.Tensor:
    """row_divergence between the logits of two heads, which never exist as a whole.

    The arguments are row_divergence's, already validated, and besides:

    Args:
        student, teacher: hidden states (..., H) with the same leading axes, weights (V, H). Without a teacher the
            divergence is 0, and the hard-label term what is left.
        compact: leave rows of weight 0 out of the products; one host synchronisation, to know how many are left.
        chunk_bytes: what the logits of a chunk may take; 0 chooses.
    """
    sides = (student, _NOBODY if teacher is None else teacher)
    given = [x for head in sides for x in head[:4] if x is not None]
    backend = backends.resolve(operation, tuple(given), backend)
    if backend == "reference":
        return reference.linear_divergence(
            student, teacher, kind=kind, temperature=temperature, teacher_temperature=teacher_temperature,
            kd_weight=kd_weight, ce_weight=ce_weight, scale_by_t2=scale_by_t2, reduction=reduction, labels=labels,
            weight=weight, class_weight=class_weight, label_smoothing=label_smoothing, ignore_index=ignore_index,
            num_items=num_items, p0=p0, p1=p1,
        )  # fmt: skip
    if not torch.is_grad_enabled():  # an autograd.Function is not told
        sides = tuple(Head(*(None if x is None else x.detach() for x in head[:4]), *head[4:]) for head in sides)
    student, other = sides
    leading = student.hidden.shape[:-1]
    hard = ce_weight is not None
    # The logits' shape, in the memory of one element.
    scores = student.hidden.new_empty(()).expand(*leading, student.weight.shape[0] + (student.own is not None))
    kd_divisor, ce_divisor, count, divisors = _divisors(
        scores, len(leading), reduction, labels, weight, hard, num_items
    )
    labels, weight = _flat(labels, torch.int64), _flat(weight, torch.float32)
    class_weight = _flat(class_weight, torch.float32)
    if divisors is not None:
        divisors = divisors.contiguous()
    if count:
        divisors = _counted(count, labels, weight, class_weight, ignore_index, scores)
    kd_factor = _value(kd_weight) / kd_divisor
    if scale_by_t2:
        kd_factor = kd_factor * _value(temperature) ** 2
    scalars = pack((
        temperature,
        temperature if teacher_temperature is None else teacher_temperature,
        kd_factor,
        0.0 if ce_weight is None else _value(ce_weight) / ce_divisor,
        label_smoothing,
        p0,
        p1,
        0.0,
    ))  # fmt: skip
    of_heads = (student.scale, student.softcap, other.scale, other.softcap)
    head_scalars = pack(tuple(0.0 if x is None else x for x in of_heads))
    transforms = sum(1 << i for i, x in enumerate(of_heads) if x is not None)
    flat = [None if x is None else x.reshape(-1, x.shape[-1]) for h in sides for x in (h.hidden, h.own)]
    kept = None
    if compact and (labels is not None or weight is not None):
        mask = _weights(labels, weight, ignore_index, scores) != 0
        kept = mask.nonzero().squeeze(-1)
        flat = [None if x is None else x.index_select(0, kept) for x in flat]
        labels, weight = (None if x is None else x.index_select(0, kept) for x in (labels, weight))
    losses = LinearDivergence.apply(
        flat[0], student.weight, student.bias, flat[1], flat[2], other.weight, other.bias, flat[3],
        labels, weight, class_weight, scalars, head_scalars, divisors,
        (int(kind), hard, transforms, ignore_index, chunk_bytes, reduction == "none", backend),
    )  # fmt: skip
    if reduction != "none":
        return losses
    if kept is not None:
        losses = losses.new_zeros(leading.numel()).index_copy(0, kept, losses)
    return losses.view(leading)


def _weights(
    labels: torch.Tensor | None, weight: torch.Tensor | None, ignore_index: int, scores: torch.Tensor
) -> torch.Tensor:
    """The weight of every row."""
    if weight is None:
        weight = torch.ones(scores.numel() // scores.shape[-1], dtype=torch.float32, device=scores.device)
    return weight if labels is None else weight.masked_fill(labels == ignore_index, 0.0)


def _counted(
    count: int,
    labels: torch.Tensor | None,
    weight: torch.Tensor | None,
    class_weight: torch.Tensor | None,
    ignore_index: int,
    scores: torch.Tensor,
) -> torch.Tensor:
    """Both divisors, over all rows: a chunk does not know the others."""
    rows = _weights(labels, weight, ignore_index, scores)
    one = torch.ones((), dtype=torch.float32, device=rows.device)
    kd = rows.sum() if count & COUNT_KD else one
    ce = one
    if count & COUNT_CE:
        of_label = rows
        if class_weight is not None and labels is not None:
            of_label = rows * class_weight[labels.clamp(0, scores.shape[-1] - 1)]
        ce = of_label.sum()
    return torch.stack([kd, ce])
