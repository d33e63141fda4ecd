"""Divergences of the logits of two models, from hidden states and output heads.

The logits are made, used and turned into gradients a chunk of tokens at a time: memory is that of a chunk,
whatever the number of tokens. See kdkernels/ops/linear_divergence/README.md. The losses are those of
`kdkernels.losses.logits` and `.divergences` of `softcap tanh(scale (hidden weight^T + bias) / softcap)`; what a
head adds is described at `linear_kl_div`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec

import torch

from kdkernels import checks
from kdkernels.losses.logits import soft_term
from kdkernels.losses.module import LossModule
from kdkernels.ops.linear_divergence.heads import FLOAT, Head
from kdkernels.ops.linear_divergence.op import buffers, linear_divergence
from kdkernels.ops.row_divergence.kinds import Kind
from kdkernels.ops.scalars import Number

P = ParamSpec("P")


def head_of(
    model: str, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scale: Number | None,
    softcap: Number | None, vocab_size: int | None, device: torch.device,
) -> Head:  # fmt: skip
    """One model's side, checked, without the padding of its vocabulary."""
    names = f"{model}_hidden", f"{model}_weight", f"{model}_bias"
    tensors = [hidden, weight] if bias is None else [hidden, weight, bias]
    for name, x in zip(names, tensors):
        checks.float_tensor(name, x)
        if x.device != device:
            raise ValueError(f"{name} must be on {device} with student_hidden, got {x.device}")
    if hidden.dim() == 0:
        raise ValueError(f"{names[0]} must have a feature axis, got a 0-d tensor")
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(f"{names[1]} must have shape (V, H) with at least one class, got {tuple(weight.shape)}")
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{names[1]} must have one column a feature of {names[0]}, ({weight.shape[0]}, {hidden.shape[-1]}); "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"{names[2]} must have one value a class, shape ({weight.shape[0]},); got {tuple(bias.shape)}")
    checks.number(f"{model}_logit_scale", scale, optional=True, like=hidden)
    checks.number(f"{model}_softcap", softcap, low=0, open_low=True, optional=True, like=hidden)
    if vocab_size is not None:
        checks.integer("vocab_size", vocab_size)
        if not 1 <= vocab_size <= weight.shape[0]:
            raise ValueError(
                f"vocab_size must be between 1 and the {weight.shape[0]} rows of {names[1]}, got {vocab_size}"
            )
        weight, bias = weight[:vocab_size], None if bias is None else bias[:vocab_size]
    if torch.is_autocast_enabled(device.type) and torch.float64 not in (hidden.dtype, weight.dtype):
        # What F.linear would do; gradients come back through the casts.
        dtype = torch.get_autocast_dtype(device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return Head(hidden, weight, bias, None, scale, softcap)


def check_chunk(chunk_bytes: int | None, student: Head, teacher: Head | None, kind: Kind) -> None:
    """The budget holds at least one row."""
    sides = (student[:4], (None,) * 4 if teacher is None else teacher[:4])
    wants = [x is not None and x.requires_grad for side in sides for x in side]
    classes = student.weight.shape[0] + (student.own is not None)
    check_budget(chunk_bytes, FLOAT * classes * buffers(wants, kind))


def check_budget(chunk_bytes: int | None, least: int) -> None:
    if chunk_bytes is None:
        return
    checks.integer("chunk_bytes", chunk_bytes)
    if chunk_bytes < least:
        raise ValueError(f"chunk_bytes must be at least {least}, the logits of one row here, got {chunk_bytes}")


def _call(
    operation: str,
    kind: Kind,
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    *,
    student_bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    student_logit_scale: Number | None = None,
    teacher_logit_scale: Number | None = None,
    student_softcap: Number | None = None,
    teacher_softcap: Number | None = None,
    vocab_size: int | None = None,
    temperature: Number = 1.0,
    teacher_temperature: Number | None = None,
    reduction: str = "rowmean",
    weight: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    ignore_index: int = -100,
    num_items: Number | None = None,
    chunk_bytes: int | None = None,
    class_weight: torch.Tensor | None = None,
    scale_by_t2: bool = True,
    compact: bool = False,
    **options: Any,
) -> torch.Tensor:
    """Validates what all linear losses have in common, and runs the operator."""
    checks.flag("scale_by_t2", scale_by_t2)
    checks.flag("compact", compact)
    checks.float_tensor("student_hidden", student_hidden)
    device = student_hidden.device
    student = head_of("student", student_hidden, student_weight, student_bias, student_logit_scale, student_softcap,
                    vocab_size, device)  # fmt: skip
    teacher = head_of("teacher", teacher_hidden, teacher_weight, teacher_bias, teacher_logit_scale, teacher_softcap,
                    vocab_size, device)  # fmt: skip
    rows, classes = tuple(student_hidden.shape[:-1]), student.weight.shape[0]
    if teacher_hidden.shape[:-1] != student_hidden.shape[:-1]:
        raise ValueError(
            "student and teacher must have the same tokens: "
            f"student_hidden has shape {tuple(student_hidden.shape)} and teacher_hidden {tuple(teacher_hidden.shape)}"
        )
    if teacher.weight.shape[0] != classes:
        raise ValueError(
            f"student_weight has {classes} classes and teacher_weight {teacher.weight.shape[0]}: if the larger one is "
            "padded, pass the size of the vocabulary as vocab_size"
        )
    checks.temperatures(temperature, teacher_temperature, student_hidden)
    checks.items(num_items, student_hidden)
    checks.choice("reduction", reduction, checks.REDUCTIONS)
    weight = checks.per_row("weight", weight, rows, device)
    ignore_index = checks.integer("ignore_index", ignore_index)
    labels = checks.labels_of(labels, rows, classes, ignore_index, device)
    class_weight = checks.per_class("class_weight", class_weight, classes, device)
    check_chunk(chunk_bytes, student, teacher, kind)
    return linear_divergence(
        student, teacher, kind=kind, temperature=temperature, teacher_temperature=teacher_temperature,
        reduction=reduction, weight=weight, labels=labels, class_weight=class_weight, ignore_index=ignore_index,
        num_items=num_items, chunk_bytes=chunk_bytes or 0, operation=operation, scale_by_t2=scale_by_t2, compact=compact,
        **options,
    )  # fmt: skip


def _arguments_of(
    other: Callable[P, torch.Tensor],
) -> Callable[[Callable[..., torch.Tensor]], Callable[P, torch.Tensor]]:
    """For a loss that hands its arguments on: it has those of `other`, for help() and type checkers."""

    def with_signature(loss: Callable[..., torch.Tensor]) -> Callable[P, torch.Tensor]:
        loss.__signature__ = inspect.signature(other)  # type: ignore[attr-defined]
        return loss

    return with_signature


def linear_kl_div(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    *,
    student_bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    student_logit_scale: Number | None = None,
    teacher_logit_scale: Number | None = None,
    student_softcap: Number | None = None,
    teacher_softcap: Number | None = None,
    vocab_size: int | None = None,
    temperature: Number = 1.0,
    teacher_temperature: Number | None = None,
    scale_by_t2: bool = True,
    reduction: str = "rowmean",
    weight: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    ignore_index: int = -100,
    num_items: Number | None = None,
    compact: bool = False,
    chunk_bytes: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """kl_div of the logits that two heads make of hidden states: T^2 KL(p_t, p_s), without the logits.

    Hinton, Vinyals and Dean (2015, arXiv:1503.02531).

    z = softcap tanh(scale (hidden weight^T + bias) / softcap), p = softmax(z / T).

    Args:
        student_hidden: (..., H_s), the states that the student's output head takes.
        student_weight: (V, H_s), the head. As with student_hidden and the biases, a gradient is made only where one
            is required: a frozen head costs no product for it.
        teacher_hidden: (..., H_t), the same leading axes.
        teacher_weight: (V, H_t).
        student_bias, teacher_bias: (V,).
        student_logit_scale, teacher_logit_scale: factor of the logits (Cohere, Granite). It gets no gradient.
        student_softcap, teacher_softcap: bound of the logits (Gemma 2: 30.0), a positive number.
        vocab_size: how many classes there are; those beyond, with which a head is padded, are left out of the softmax.
            Needed where the two heads differ in size.
        temperature, teacher_temperature, scale_by_t2, weight, labels, ignore_index, num_items: as kl_div; T gets no
            gradient.
        reduction: as kl_div, of logits (..., V).
        compact: leave the tokens of weight 0 (ignored labels) out of the products, which costs one synchronisation with
            the host; by default they are rows of zeros. It pays where many tokens are ignored (half of them: 1.7 times as
            fast on a CPU, where nothing waits).
        chunk_bytes: memory for the logits of a chunk of tokens, of both models together; by default about as much as the
            student's weight and its gradient take, at most 4 GiB (256 MiB on a CPU). The logits are float32 whatever the
            inputs are: 8 V bytes a token.
        backend: "auto", "cuda", "triton", "cpu" or "reference" of what stands between the matrix products, which are
            torch's. "reference" makes the whole logits.

    Returns:
        A float32 scalar (float64 if an input is float64), or one value a token. If all tokens are left out: 0, with
        zero gradients.

    Raises:
        ValueError: shapes that do not fit, heads of different sizes without vocab_size, chunk_bytes below what one row
            needs, and what kl_div raises it for.
        TypeError, IndexError, BackendError: as kl_div.

    Gradients are made in the forward. Beside them and the inputs, memory holds two tensors of a chunk's logits (two more
    where the teacher learns) and the weight's gradient in float32. `reduction="none"` makes them in the backward, at the
    price of the logits' products once more. 16-bit inputs are multiplied as they are on a GPU, and widened on a CPU.
    """
    return _call(
        "linear_kl_div", Kind.FORWARD_KL, student_hidden, student_weight, teacher_hidden, teacher_weight,
        student_bias=student_bias, teacher_bias=teacher_bias, student_logit_scale=student_logit_scale,
        teacher_logit_scale=teacher_logit_scale, student_softcap=student_softcap, teacher_softcap=teacher_softcap,
        vocab_size=vocab_size, temperature=temperature, teacher_temperature=teacher_temperature,
        scale_by_t2=scale_by_t2, reduction=reduction, weight=weight, labels=labels, ignore_index=ignore_index,
        num_items=num_items, compact=compact, chunk_bytes=chunk_bytes, backend=backend,
    )  # fmt: skip


@_arguments_of(linear_kl_div)
def linear_reverse_kl_div(*args: Any, **options: Any) -> torch.Tensor:
    """reverse_kl_div from hidden states and heads: T^2 KL(p_s, p_t).

    The arguments, the result and the errors are linear_kl_div's.
    """
    return _call("linear_reverse_kl_div", Kind.REVERSE_KL, *args, **options)


@_arguments_of(linear_kl_div)
def linear_js_div(*args: Any, **options: Any) -> torch.Tensor:
    """js_div from hidden states and heads: T^2 (0.5 KL(p_t, m) + 0.5 KL(p_s, m)), m = (p_t + p_s) / 2.

    The arguments, the result and the errors are linear_kl_div's.
    """
    return _call("linear_js_div", Kind.JSD, *args, p0=0.5, **options)


def linear_generalized_js_div(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    *,
    beta: Number = 0.5,
    student_bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    student_logit_scale: Number | None = None,
    teacher_logit_scale: Number | None = None,
    student_softcap: Number | None = None,
    teacher_softcap: Number | None = None,
    vocab_size: int | None = None,
    temperature: Number = 1.0,
    teacher_temperature: Number | None = None,
    scale_by_t2: bool = True,
    reduction: str = "rowmean",
    weight: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    ignore_index: int = -100,
    num_items: Number | None = None,
    compact: bool = False,
    chunk_bytes: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """generalized_js_div from hidden states and heads.

    T^2 (beta KL(p_t, m) + (1 - beta) KL(p_s, m)), m = beta p_t + (1 - beta) p_s (Agarwal et al. 2024, arXiv:2306.13649).

    Args:
        beta: the teacher's share of the mixture, between 0 and 1, a number or a tensor with one element; 0 is
            linear_kl_div and 1 linear_reverse_kl_div.

    The other arguments, the result and the errors are linear_kl_div's.

    Against others: Liger's LigerFusedLinearJSD is this with `scale_by_t2=False` and shifted labels.
    """
    checks.number("beta", beta, low=0, high=1, like=student_hidden)
    return _call(
        "linear_generalized_js_div", Kind.JSD, student_hidden, student_weight, teacher_hidden, teacher_weight,
        student_bias=student_bias, teacher_bias=teacher_bias, student_logit_scale=student_logit_scale,
        teacher_logit_scale=teacher_logit_scale, student_softcap=student_softcap, teacher_softcap=teacher_softcap,
        vocab_size=vocab_size, temperature=temperature, teacher_temperature=teacher_temperature,
        scale_by_t2=scale_by_t2, reduction=reduction, weight=weight, labels=labels, ignore_index=ignore_index,
        num_items=num_items, compact=compact, chunk_bytes=chunk_bytes, p0=beta, backend=backend,
    )  # fmt: skip


def linear_distillation_loss(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: Number = 4.0,
    alpha: Number = 0.9,
    *,
    divergence: str = "forward_kl",
    divergence_options: Mapping[str, Number] | None = None,
    student_bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    student_logit_scale: Number | None = None,
    teacher_logit_scale: Number | None = None,
    student_softcap: Number | None = None,
    teacher_softcap: Number | None = None,
    vocab_size: int | None = None,
    teacher_temperature: Number | None = None,
    scale_by_t2: bool = True,
    label_smoothing: float = 0.0,
    class_weight: torch.Tensor | None = None,
    reduction: str = "rowmean",
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    num_items: Number | None = None,
    compact: bool = False,
    chunk_bytes: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """distillation_loss from hidden states and heads: (1 - alpha) CE(z_s, y) + alpha T^2 KL(p_t, p_s), in one pass.

    Args:
        labels: class indices, the leading axes of the hidden states; tokens with `ignore_index` are left out.
        temperature: T > 0 of the distillation term; the cross-entropy is at temperature 1.
        alpha: the weight of the distillation term, between 0 and 1, a number or a tensor with one element.
        divergence: any of distillation_loss's: the distillation term is that divergence instead.
        divergence_options: its parameters by name.
        label_smoothing, class_weight: of the cross-entropy, as distillation_loss.

    The other arguments, the result and the errors are linear_kl_div's and distillation_loss's.

    Against others: Liger's LigerFusedLinearJSDLoss(weight_hard_loss=1 - a, weight_soft_loss=a) is this with
    `divergence="js"`, `scale_by_t2=False` and, on heads of one size, shifted labels.
    """
    kind, (p0, p1) = soft_term(divergence, divergence_options, student_hidden)
    checks.number("alpha", alpha, low=0, high=1, like=student_hidden)
    checks.plain_number("label_smoothing", label_smoothing, low=0, high=1)
    if labels is None:
        raise TypeError("labels must be a tensor; without labels use linear_kl_div")
    return _call(
        "linear_distillation_loss", kind, student_hidden, student_weight, teacher_hidden, teacher_weight,
        student_bias=student_bias, teacher_bias=teacher_bias, student_logit_scale=student_logit_scale,
        teacher_logit_scale=teacher_logit_scale, student_softcap=student_softcap, teacher_softcap=teacher_softcap,
        vocab_size=vocab_size, temperature=temperature, teacher_temperature=teacher_temperature,
        scale_by_t2=scale_by_t2, reduction=reduction, weight=weight, labels=labels, ignore_index=ignore_index,
        num_items=num_items, compact=compact, chunk_bytes=chunk_bytes, class_weight=class_weight,
        label_smoothing=label_smoothing, kd_weight=alpha, ce_weight=1 - alpha, p0=p0, p1=p1, backend=backend,
    )  # fmt: skip


class LinearKLDivLoss(LossModule):
    """`linear_kl_div` as a module: its keyword arguments are the options."""

    function = staticmethod(linear_kl_div)


class LinearReverseKLDivLoss(LossModule):
    """`linear_reverse_kl_div` as a module: its keyword arguments are the options."""

    function = staticmethod(linear_reverse_kl_div)


class LinearJSDivLoss(LossModule):
    """`linear_js_div` as a module: its keyword arguments are the options."""

    function = staticmethod(linear_js_div)


class LinearGeneralizedJSDivLoss(LossModule):
    """`linear_generalized_js_div` as a module: its keyword arguments are the options."""

    function = staticmethod(linear_generalized_js_div)


class LinearDistillationLoss(LossModule):
    """`linear_distillation_loss` as a module: its keyword arguments are the options."""

    function = staticmethod(linear_distillation_loss)
