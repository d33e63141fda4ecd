"""What teachers made of a student have in common."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from kdkernels.features.capture import unwrapped


class FrozenCopy(nn.Module):
    """A copy of a model, always in eval mode, whose parameters require no gradient and whose forward builds no graph.

    Args:
        model: what to copy; it may be wrapped in DistributedDataParallel or compiled.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = copy.deepcopy(unwrapped(model)).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> FrozenCopy:
        return super().train(False)  # whoever calls train() on a whole model does not mean its teacher

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)
