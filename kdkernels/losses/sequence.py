"""Sequence-level distillation: cross-entropy on what the teacher wrote (Kim and Rush 2016, arXiv:1606.07947)."""

from __future__ import annotations

import torch

from kdkernels import checks
from kdkernels.losses.linear import check_chunk, head_of
from kdkernels.losses.module import LossModule
from kdkernels.ops.linear_divergence.op import linear_divergence
from kdkernels.ops.row_divergence.kinds import Kind
from kdkernels.ops.row_divergence.op import row_divergence
from kdkernels.ops.scalars import Number


def _targets(
    tokens: torch.Tensor, shape: tuple[int, ...], completion_mask: torch.Tensor | None,
    sequence_weight: torch.Tensor | None, shift: bool, ignore_index: int, classes: int, device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The token that each position is to predict, and its weight."""
    checks.flag("shift", shift)
    if len(shape) != 2:
        raise ValueError(f"the student's positions must be (B, T), got {shape}")
    if tokens is None:
        raise TypeError("tokens must be a tensor, got NoneType")
    labels = checks.labels_of(tokens, shape, classes, ignore_index, device, name="tokens")
    mask = checks.per_row("completion_mask", completion_mask, shape, device)
    by_sequence = checks.per_row("sequence_weight", sequence_weight, shape[:1], device)
    assert labels is not None
    weight = torch.ones(shape, dtype=torch.float32, device=device) if mask is None else mask.to(torch.float32)
    if by_sequence is not None:
        weight = weight * by_sequence.to(torch.float32).unsqueeze(1)
    if shift:
        # Position i predicts token i + 1, and the last one nothing: the scores stay whole, no copy is made.
        labels, weight = (torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], 1) for x in (labels, weight))
    return labels, weight


def sequence_loss(
    student_logits: torch.Tensor,
    tokens: torch.Tensor,
    completion_mask: torch.Tensor | None = None,
    *,
    sequence_weight: torch.Tensor | None = None,
    shift: bool = True,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "rowmean",
    num_items: Number | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Cross-entropy of the student on sequences that the teacher generated, over their completions.

    Kim and Rush (2016, arXiv:1606.07947):

    sum_bt w_b m_bt CE(z_b(t-1), y_bt) / sum_bt w_b m_bt.

    Args:
        student_logits: (B, T, V), float16, bfloat16, float32 or float64: of the prompts and completions.
        tokens: integers (B, T), the teacher's sequences, prompts included. Those equal to `ignore_index` are left out.
        completion_mask: (B, T), nonzero (or a weight) where a token is the teacher's and not the prompt's or padding.
        sequence_weight: (B,), e.g. the teacher's probability of each sequence, normalised over the beam.
        shift: position t - 1 predicts token t, as causal models do; False: the tokens are shifted already.
        label_smoothing: as in torch's cross_entropy.
        ignore_index, num_items, backend: as distillation_loss.
        reduction: "rowmean" as above, "batchmean" divides by B, "sum" by nothing; "none" gives one value a position (of
            the predicting one).

    Returns:
        A float32 scalar (float64 for float64 logits), or (B, T). Without any token: 0, with zero gradients.

    Raises:
        ValueError, TypeError, IndexError, BackendError: as distillation_loss.

    Against others: TRL's GKD with seq_kd trains on this, prompts labelled -100.
    """
    checks.float_tensor("student_logits", student_logits)
    if student_logits.dim() == 0 or student_logits.shape[-1] == 0:
        raise ValueError(f"student_logits must be (B, T, V), got shape {tuple(student_logits.shape)}")
    checks.choice("reduction", reduction, ("rowmean", "batchmean", "sum", "none"))
    checks.plain_number("label_smoothing", label_smoothing, low=0, high=1)
    checks.items(num_items, student_logits)
    labels, weight = _targets(
        tokens, tuple(student_logits.shape[:-1]), completion_mask, sequence_weight, shift, ignore_index,
        student_logits.shape[-1], student_logits.device,
    )  # fmt: skip
    # No teacher: a divergence from itself, times 0.
    return row_divergence(
        "sequence_loss", Kind.FORWARD_KL, student_logits, student_logits.detach(), kd_weight=0.0, ce_weight=1.0, reduction=reduction,
        labels=labels, weight=weight, label_smoothing=label_smoothing, ignore_index=ignore_index, num_items=num_items,
        backend=backend, what="logits",
    )  # fmt: skip


def linear_sequence_loss(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    tokens: torch.Tensor,
    completion_mask: torch.Tensor | None = None,
    *,
    student_bias: torch.Tensor | None = None,
    student_logit_scale: Number | None = None,
    student_softcap: Number | None = None,
    vocab_size: int | None = None,
    sequence_weight: torch.Tensor | None = None,
    shift: bool = True,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "rowmean",
    num_items: Number | None = None,
    compact: bool = False,
    chunk_bytes: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """sequence_loss from hidden states (B, T, H) and a head (V, H), without the logits.

    The other arguments, the result and the errors are sequence_loss's and linear_kl_div's; `compact=True` leaves the
    prompts out of the products.
    """
    checks.float_tensor("student_hidden", student_hidden)
    device = student_hidden.device
    student = head_of("student", student_hidden, student_weight, student_bias, student_logit_scale, student_softcap,
                    vocab_size, device)  # fmt: skip
    checks.choice("reduction", reduction, ("rowmean", "batchmean", "sum", "none"))
    checks.plain_number("label_smoothing", label_smoothing, low=0, high=1)
    checks.items(num_items, student_hidden)
    checks.flag("compact", compact)
    check_chunk(chunk_bytes, student, None, Kind.FORWARD_KL)
    ignore_index = checks.integer("ignore_index", ignore_index)
    labels, weight = _targets(
        tokens, tuple(student_hidden.shape[:-1]), completion_mask, sequence_weight, shift, ignore_index,
        student.weight.shape[0], device,
    )  # fmt: skip
    return linear_divergence(
        student, None, kind=Kind.FORWARD_KL, kd_weight=0.0, ce_weight=1.0, reduction=reduction, labels=labels,
        weight=weight, label_smoothing=label_smoothing, ignore_index=ignore_index, num_items=num_items, compact=compact,
        chunk_bytes=chunk_bytes or 0, backend=backend, operation="linear_sequence_loss",
    )  # fmt: skip


class SequenceLoss(LossModule):
    """`sequence_loss` as a module: SequenceLoss()(student_logits, tokens, completion_mask)."""

    function = staticmethod(sequence_loss)


class LinearSequenceLoss(LossModule):
    """`linear_sequence_loss` as a module: its keyword arguments are the options."""

    function = staticmethod(linear_sequence_loss)
