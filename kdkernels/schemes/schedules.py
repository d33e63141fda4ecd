"""Temperatures and weights that change during training, and a weight that differs from row to row.

A schedule is called with a step, or an epoch, and gives a number: `kl_div(s, t, temperature=schedule(step))`. Changing
numbers recompile nothing under torch.compile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kdkernels import checks
from kdkernels.schemes.labels import known_labels


@dataclass(frozen=True)
class Constant:
    """The same number always."""

    value: float

    def __post_init__(self) -> None:
        checks.plain_number("value", self.value)

    def __call__(self, step: float) -> float:
        return self.value


@dataclass(frozen=True)
class Linear:
    """From `start` at step `delay` to `end` at step `delay + steps` along a line; constant before and after.

    Annealing KD (Jafari et al. 2021, arXiv:2104.07163) lowers the temperature so; PS-KD (Kim et al. 2021,
    arXiv:2006.12000) raises the weight of an earlier epoch's predictions from 0 to 0.8.
    """

    start: float
    end: float
    steps: float
    delay: float = 0.0

    def __post_init__(self) -> None:
        for name in ("start", "end", "delay"):
            checks.plain_number(name, getattr(self, name))
        checks.plain_number("steps", self.steps, low=0, open_low=True)

    def progress(self, step: float) -> float:
        return min(max((step - self.delay) / self.steps, 0.0), 1.0)

    def __call__(self, step: float) -> float:
        share = self.progress(step)
        return (1 - share) * self.start + share * self.end  # exact at both ends


@dataclass(frozen=True)
class Cosine(Linear):
    """As Linear along half a cosine, flat at both ends."""

    def progress(self, step: float) -> float:
        return (1 - math.cos(math.pi * super().progress(step))) / 2


def confidence_weight(
    teacher_logits: torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
    power: float = 1.0,
    ignore_index: int = -100,
) -> torch.Tensor:
    """How far to trust the teacher on every row, for the argument `weight` of a loss.

    p_t[label]^power, so that a teacher who is wrong teaches little (as in CA-MKD, Zhang et al. 2022,
    arXiv:2201.00007, where it is the cross-entropy); without labels the largest probability.

    Args:
        teacher_logits: scores, (..., V).
        labels: class indices, (...); the weight is 0 where they are `ignore_index`.
        temperature, power: see above; power 0 gives ones.

    Returns:
        float32 weights (...) without a gradient, to be normalised by the loss's reduction "rowmean".

    Raises:
        ValueError: a temperature that is not positive, a negative power, labels of another shape.
        TypeError, IndexError: labels that are no class indices, as kl_div.
    """
    checks.float_tensor("teacher_logits", teacher_logits)
    if teacher_logits.dim() == 0:
        raise ValueError("teacher_logits must have a class axis, got a 0-d tensor")
    checks.plain_number("temperature", temperature, low=0, open_low=True)
    checks.plain_number("power", power, low=0)
    p = (teacher_logits.detach().float() / temperature).softmax(-1)
    if labels is None:
        return p.amax(-1).pow(power)
    labels = known_labels(labels, teacher_logits, ignore_index)
    kept = labels != ignore_index
    chosen = p.gather(-1, labels.where(kept, 0).unsqueeze(-1)).squeeze(-1)
    return chosen.pow(power).where(kept, 0.0)
