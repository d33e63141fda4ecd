"""Temperatures that fit a pair of models, or are learnt."""

from __future__ import annotations

import math

import torch
from torch import nn

from kdkernels import checks
from kdkernels.schemes.gradients import scale_gradient
from kdkernels.typed import typed


@typed
def capacity_gap(student: nn.Module, teacher: nn.Module) -> float:
    """Orders of magnitude between the numbers of parameters, log10(P_teacher / P_student), at least 0.

    Raises:
        ValueError: a model without parameters.
    """
    counts = [sum(p.numel() for p in model.parameters()) for model in (student, teacher)]
    if min(counts) == 0:
        raise ValueError("student and teacher must have parameters")
    return max(math.log10(counts[1] / counts[0]), 0.0)


@typed
def by_capacity(student: nn.Module, teacher: nn.Module, equal: float, apart: float, *, decades: float = 2.0) -> float:
    """A temperature or weight for a pair of models: `equal` for as many parameters, `apart` where they are far apart.

    equal + (apart - equal) min(capacity_gap / decades, 1). A student much smaller than its teacher follows softer targets
    better and sharp ones worse (Mirzadeh et al. 2020, arXiv:1902.03393; Cho and Hariharan 2019, arXiv:1910.01348); this
    linear rule is ours. It goes into the other schedules: `Linear(by_capacity(s, t, 2.0, 8.0), 1.0, epochs)` starts as soft
    as the gap asks and ends with the teacher's own distribution.

    Args:
        equal, apart: the two ends.
        decades: orders of magnitude that count as far apart.

    Raises:
        ValueError: as capacity_gap; decades not positive.
    """
    checks.plain_number("decades", decades, low=0, open_low=True)
    share = min(capacity_gap(student, teacher) / decades, 1.0)
    return (1 - share) * equal + share * apart


class LearnableTemperature(nn.Module):
    """A temperature that is trained: low + (high - low) sigmoid(u), with its gradient from the fused kernel.

        temperature = LearnableTemperature()
        optimizer = SGD([*student.parameters(), *temperature.parameters()], ...)
        loss = kdkernels.kl_div(s, t, temperature=temperature(strength))

    CTKD (Li et al. 2023, arXiv:2211.16231): the temperature is trained against the student, by a reversed gradient
    whose strength grows from 0 to 1 over the first epochs (`Cosine(0, 1, 10)`), so that the task gets harder. The
    authors' bounds are 1 and 21.

    Args:
        initial: the temperature to start with, between low and high.
        low, high: the bounds, 0 < low < high.
        adversarial: reverse the gradient; else the temperature lowers the loss as the student does (use
            scale_by_t2=False then, or T^2 alone pulls it down).

    Raises:
        ValueError: bounds or an initial value out of order.
    """

    @typed
    def __init__(self, initial: float = 4.0, *, low: float = 1.0, high: float = 21.0, adversarial: bool = True):
        super().__init__()
        if not 0 < low < initial < high < math.inf:
            raise ValueError(
                f"low, initial, high must be positive and in that order, got {low:g}, {initial:g}, {high:g}"
            )
        self.low, self.high, self.adversarial = low, high, adversarial
        share = (initial - low) / (high - low)
        self.u = nn.Parameter(torch.tensor(math.log(share / (1 - share))))

    def forward(self, strength: float = 1.0) -> torch.Tensor:
        """The temperature, a 0-d tensor; its gradient is multiplied by `strength` (and by -1 where adversarial)."""
        checks.plain_number("strength", strength)
        temperature = self.low + (self.high - self.low) * self.u.sigmoid()
        return scale_gradient(temperature, -strength if self.adversarial else strength)

    def extra_repr(self) -> str:
        return f"low={self.low:g}, high={self.high:g}, adversarial={self.adversarial}"
