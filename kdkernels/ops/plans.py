"""What of a call follows from its options and from its tensors' shapes alone, worked out once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

from kdkernels import backends
from kdkernels.ops.scalars import TENSORS, remembers

Plan = TypeVar("Plan")
KEPT = 4096  # plans of one kind; then they are forgotten, and worked out anew


class Remembered(Generic[Plan]):
    """`make(tensors, *options)`, remembered: at small sizes checking and planning would take longer than computing.

    It may look at the tensors' shapes, strides, dtypes and devices, and at which backend is asked for; not at values, nor
    at whether they require a gradient. What it raises is not kept.
    """

    def __init__(self, make: Callable[..., Plan]):
        self._make = make
        self._known: dict[Any, Plan] = {}

    def __call__(self, tensors: tuple[torch.Tensor, ...], *options: Any) -> Plan:
        if not remembers(options):
            return self._make(tensors, *options)
        signature: list[Any] = [backends.requested()]
        for x in tensors:
            if type(x) not in TENSORS or x.layout is not torch.strided:
                return self._make(tensors, *options)
            signature += x.shape, x.stride(), x.dtype, x.device
        key = (*signature, options, *map(type, options))  # 1, 1.0 and True are equal
        plan = self._known.get(key)
        if plan is None:
            if len(self._known) >= KEPT:
                self._known.clear()
            plan = self._known[key] = self._make(tensors, *options)
        return plan
