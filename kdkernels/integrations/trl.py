"""TRL's generalised Jensen-Shannon divergence, by our kernels.

    from kdkernels.integrations.trl import use_in
    use_in(trainer)                 # one GKDTrainer; its class stays as it is

Arguments, values and gradients are TRL's. What is deliberately not as there: a loss of half-precision logits is float32; -inf
in both models' logits counts 0 (there: NaN); reduction="none", which makes a tensor of the logits' size, is an error.
"""

from __future__ import annotations

from typing import TypeVar

import torch

import kdkernels
from kdkernels import checks

__all__ = ["generalized_jsd_loss", "use_in"]

Trainer = TypeVar("Trainer")


def generalized_jsd_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """beta KL(p_t, m) + (1 - beta) KL(p_s, m), m = beta p_t + (1 - beta) p_s, without T^2.

    Args:
        student_logits, teacher_logits: (B, T, V).
        labels: (B, T); tokens of -100 are left out.
        beta: the teacher's share of the mixture; 0 is the forward KL and 1 the reverse one.
        temperature: T.
        reduction: "batchmean" divides by the tokens that count, without labels by B; "mean" by those tokens (all of them
            without labels) times V; "sum" by nothing.
        num_items_in_batch: divides the sum instead, whatever the reduction.
    """
    checks.choice("reduction", reduction, ("batchmean", "mean", "sum"))
    ours = {"sum": "sum", "mean": "rowmean", "batchmean": "batchmean" if labels is None else "rowmean"}[reduction]
    loss = kdkernels.generalized_js_div(
        student_logits, teacher_logits, beta=beta, temperature=temperature, scale_by_t2=False, labels=labels,
        reduction=ours, num_items=num_items_in_batch,
    )  # fmt: skip
    return loss / student_logits.shape[-1] if reduction == "mean" and num_items_in_batch is None else loss


def use_in(trainer: Trainer) -> Trainer:
    """Makes one trainer compute its loss here, and returns it.

    Args:
        trainer: a GKDTrainer, or any that calls its own `generalized_jsd_loss` with those arguments.

    Raises:
        TypeError: it has no such method.
    """
    if not callable(getattr(trainer, "generalized_jsd_loss", None)):
        raise TypeError(f"trainer must have a method generalized_jsd_loss, as GKDTrainer; got {type(trainer).__name__}")
    trainer.generalized_jsd_loss = generalized_jsd_loss  # type: ignore[attr-defined]
    return trainer
