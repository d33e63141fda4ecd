"""A divergence from a teacher known at k classes a token, from the student's hidden states and output head."""

from __future__ import annotations

import math

import torch

from kdkernels import backends, checks
from kdkernels.losses.linear import check_budget, head_of
from kdkernels.losses.module import LossModule
from kdkernels.losses.rows import divided, divisor, row_weights
from kdkernels.losses.sparse import support_of, teacher_of, topk_div, treatment_of
from kdkernels.ops.linear_divergence import reference
from kdkernels.ops.linear_divergence.sparse import least_bytes, linear_sparse
from kdkernels.ops.scalars import Number


def linear_topk_div(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_values: torch.Tensor,
    teacher_indices: torch.Tensor,
    *,
    missing: str = "renormalize",
    divergence: str = "forward_kl",
    teacher_values_are: str = "logits",
    min_log_prob: float | None = None,
    student_bias: torch.Tensor | None = None,
    student_logit_scale: Number | None = None,
    student_softcap: Number | None = None,
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
    """topk_div of the logits that a head makes of hidden states, without the logits.

    T^2 D(p_t, p_s), p_s = softmax(z / T), z = softcap tanh(scale (hidden weight^T + bias) / softcap), the teacher given at
    k classes a token: files of a teacher's top logits, an API's log-probabilities.

    Args:
        student_hidden: (..., H), float16, bfloat16, float32 or float64.
        student_weight: (V, H). As with student_hidden and the bias, a gradient is made only where one is required.
        teacher_values, teacher_indices: (..., k), 1 <= k <= V, as topk_div: -1 leaves an entry out, a class that occurs
            twice counts twice in sums over the k. The values get a gradient if they require one.
        missing, divergence, teacher_values_are, min_log_prob: as topk_div: what holds of the classes that are not given.
        student_bias, student_logit_scale, student_softcap, vocab_size: as linear_kl_div.
        temperature, teacher_temperature: as topk_div, but without a gradient.
        scale_by_t2, weight, labels, ignore_index, num_items: as topk_div.
        reduction: as topk_div, of logits (..., V).
        compact: leave the tokens of weight 0 (ignored labels) out of the products, as linear_kl_div.
        chunk_bytes: memory for the logits of a chunk of tokens and their gradient, float32 each: 8 V bytes a token.
            Default: about as much as the weight and its gradient take.
        backend: "auto", "cuda", "triton", "cpu" or "reference" of what stands between the matrix products, which are
            torch's. "reference" makes the whole logits.

    Returns:
        A float32 scalar (float64 if an input is float64), or one value a token: what topk_div returns.

    Raises:
        ValueError: shapes that do not fit, k > V, options that exclude each other, chunk_bytes below what one row needs.
        TypeError, IndexError, BackendError: as topk_div.

    Gradients are made in the forward, with reduction="none" in the backward. Three products in all; beside them two tensors
    of a chunk's logits and the weight's gradient in float32 are all that is large.
    """
    checks.flag("scale_by_t2", scale_by_t2)
    checks.flag("compact", compact)
    treatment = treatment_of(missing, divergence, teacher_values_are, min_log_prob, teacher_temperature)
    checks.choice("reduction", reduction, checks.REDUCTIONS)
    checks.temperatures(temperature, teacher_temperature, student_hidden)
    checks.items(num_items, student_hidden)
    checks.float_tensor("student_hidden", student_hidden)
    device = student_hidden.device
    head = head_of("student", student_hidden, student_weight, student_bias, student_logit_scale, student_softcap, vocab_size,
                 device)  # fmt: skip
    rows, classes = tuple(student_hidden.shape[:-1]), head.weight.shape[0]
    indices = support_of("student_hidden", student_hidden, classes, teacher_values, teacher_indices)
    weight = checks.per_row("weight", weight, rows, device)
    labels = checks.labels_of(labels, rows, classes, ignore_index, device)
    check_budget(chunk_bytes, least_bytes(classes))
    given = [head.hidden, head.weight, teacher_values, *([] if head.bias is None else [head.bias])]
    backend = backends.resolve("linear_topk_div", tuple(given), backend)
    t_t = temperature if teacher_temperature is None else teacher_temperature
    if backend == "reference":
        dtype = torch.float64 if torch.float64 in [x.dtype for x in given] else torch.float32
        return topk_div(
            reference.logits(*head, dtype), teacher_values, teacher_indices, missing=missing, divergence=divergence,
            teacher_values_are=teacher_values_are, min_log_prob=min_log_prob, temperature=temperature,
            teacher_temperature=teacher_temperature, scale_by_t2=scale_by_t2, reduction=reduction, weight=weight,
            labels=labels, ignore_index=ignore_index, num_items=num_items, backend=backend,
        )  # fmt: skip
    w = row_weights(weight, labels, ignore_index, torch.float64)
    live = None if w is None else w != 0
    indices, teacher = teacher_of(
        treatment, teacher_values, indices, live, teacher_values_are, t_t, classes, torch.float64, torch.float32
    )
    if w is None:
        w = torch.ones(rows, dtype=torch.float64, device=device)
    elif labels is not None and live is not None:
        w = w.masked_fill(live & ((labels < 0) | (labels >= classes)), math.nan)
    factor = divided(w, divisor(None if live is None else w, reduction, (*rows, classes), num_items))
    loss = linear_sparse(
        head, teacher, indices, factor * temperature**2 if scale_by_t2 else factor, treatment, temperature=temperature,
        compact=compact and live is not None, chunk_bytes=chunk_bytes or 0, per_row=reduction == "none", backend=backend,
    )  # fmt: skip
    return loss.float()


class LinearTopKDivLoss(LossModule):
    """`linear_topk_div` as a module: its keyword arguments are the options."""

    function = staticmethod(linear_topk_div)
