"""A loss at each of several layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kdkernels.typed import typed


class MultiLayerLoss(nn.Module):
    """sum_i weight_i loss_i(student's layer, teacher's layer) over pairs of layers.

        pairs = match_layers(student, teacher, "every-3")
        loss = MultiLayerLoss(pairs, kdkernels.hint_loss, adapters=[Adapter(64, 256), ...])
        loss(student_features, teacher_features)    # what calls of two FeatureCaptures returned beside the logits

    Args:
        pairs: (student's name, teacher's name) of each.
        losses: one for all, or one each: functions or modules of two tensors. Modules with parameters are trained with
            the student.
        weights: one number each; 1 by default.
        adapters: a module each (or None) for the student's features.

    Raises:
        ValueError: as many losses, weights or adapters as there are pairs were not given.
    """

    @typed
    def __init__(
        self,
        pairs: Sequence[tuple[str, str]],
        losses: Callable[..., torch.Tensor] | Sequence[Callable[..., torch.Tensor]],
        *,
        weights: Sequence[float] | None = None,
        adapters: Sequence[nn.Module | None] | None = None,
    ):
        super().__init__()
        self.pairs = [(s, t) for s, t in pairs]
        for loss in losses if isinstance(losses, (list, tuple)) else (losses,):
            if isinstance(loss, type):
                raise TypeError(
                    f"losses must be functions or modules, got the class {loss.__name__}: {loss.__name__}()"
                )
        each = [losses] * len(self.pairs) if callable(losses) else list(losses)
        self.weights = [1.0] * len(self.pairs) if weights is None else list(weights)
        members = [None] * len(self.pairs) if adapters is None else list(adapters)
        for name, given in (("losses", each), ("weights", self.weights), ("adapters", members)):
            if len(given) != len(self.pairs):
                raise ValueError(f"{name} must have one entry a pair, {len(self.pairs)}; got {len(given)}")
        self.losses = each
        self.adapters = nn.ModuleList(nn.Identity() if m is None else m for m in members)
        self.modules_of_losses = nn.ModuleList(loss for loss in each if isinstance(loss, nn.Module))

    @typed
    def forward(self, student: Mapping[str, torch.Tensor], teacher: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The weighted sum.

        Raises:
            KeyError: features of a layer are missing.
        """
        total: Any = 0.0
        for i, (s, t) in enumerate(self.pairs):
            for name, of, features in ((s, "student", student), (t, "teacher", teacher)):
                if name not in features:
                    raise KeyError(f"the {of}'s features have no layer {name!r}: there are {', '.join(features)}")
            total = total + self.weights[i] * self.losses[i](self.adapters[i](student[s]), teacher[t])
        return total

    def extra_repr(self) -> str:
        return ", ".join(f"{s} <- {t} ({w:g})" for (s, t), w in zip(self.pairs, self.weights))
