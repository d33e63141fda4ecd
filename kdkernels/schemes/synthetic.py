"""Batches that a teacher makes itself, where there is no data."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from kdkernels import checks
from kdkernels.losses.divergences import js_div
from kdkernels.schemes.generations import frozen
from kdkernels.typed import typed


class _Statistics:
    """How far a batch's means and variances are from those that batch norms have kept."""

    def __init__(self, model: nn.Module):
        norms = [
            m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
        ]
        self.terms: list[torch.Tensor] = []
        self.hooks = [m.register_forward_pre_hook(self._look) for m in norms]

    def _look(self, norm: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        variance, mean = torch.var_mean(inputs[0].transpose(0, 1).flatten(1), 1, correction=0)
        apart = (mean - norm.running_mean).square().sum() + (variance - norm.running_var).square().sum()
        self.terms.append(apart)

    def taken(self) -> torch.Tensor | float:
        terms, self.terms = self.terms, []
        return torch.stack(terms).sum() if terms else 0.0


@typed
def synthetic_batch(
    teacher: nn.Module,
    start: torch.Tensor,
    labels: torch.Tensor,
    *,
    steps: int = 100,
    rate: float = 0.05,
    statistics_weight: float = 1.0,
    smoothness: float = 0.0,
    student: nn.Module | None = None,
    competition: float = 1.0,
    bounds: tuple[float, float] | None = None,
) -> torch.Tensor:
    """Inputs that a teacher takes for given classes, made from noise by following its gradient: data-free distillation.

        x = synthetic_batch(teacher, torch.rand(64, 1, 8, 8), torch.randint(10, (64,)), bounds=(0, 1))
        loss = kdkernels.kl_div(student(x), teacher(x), temperature=4.0)

    Adam on x of CE(teacher(x), labels) + statistics_weight * the distance of every batch norm's batch statistics from its
    running ones + smoothness * mean squared difference of neighbouring pixels; with a student also
    competition * (1 - JS(student, teacher)), so that inputs appear where the two disagree. Yin et al., DeepInversion and
    Adaptive DeepInversion (2020, arXiv:1912.08795), whose weights depend on the network.

    Args:
        teacher: frozen and in eval mode meanwhile.
        start: the first inputs, (N, ...); not written to.
        labels: class indices, (N,).
        steps, rate: of Adam.
        statistics_weight, smoothness, competition: see above. Without batch norms the first has no effect.
        student: frozen and in eval mode meanwhile.
        bounds: the least and the greatest value of an input, kept after every step.

    Returns:
        The inputs, without a gradient.

    Raises:
        ValueError: a negative weight, steps or rate; bounds out of order.
    """
    for name, value in (("steps", steps), ("rate", rate), ("statistics_weight", statistics_weight),
                        ("smoothness", smoothness), ("competition", competition)):  # fmt: skip
        checks.plain_number(name, value, low=0)
    if bounds is not None and not bounds[0] < bounds[1]:
        raise ValueError(f"bounds must be in order, got {bounds}")
    x = start.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([x], rate)
    statistics = _Statistics(teacher)
    try:
        with torch.enable_grad(), frozen(*(m for m in (teacher, student) if m is not None)):
            for _ in range(steps):
                logits = teacher(x)
                loss = F.cross_entropy(logits.float(), labels) + statistics_weight * statistics.taken()
                if smoothness:
                    axes = range(2, x.dim())
                    loss = loss + smoothness * sum(x.diff(dim=axis).square().mean() for axis in axes)
                if student is not None and competition:
                    loss = loss + competition * (1 - js_div(student(x), logits))
                (x.grad,) = torch.autograd.grad(loss, x)
                optimizer.step()
                if bounds is not None:
                    with torch.no_grad():
                        x.clamp_(*bounds)
    finally:
        for hook in statistics.hooks:
            hook.remove()
    return x.detach()
