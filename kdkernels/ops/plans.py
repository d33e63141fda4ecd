"""What of a call follows from its options and from its tensors' shapes alone, worked out once."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from kdkernels import backends
from kdkernels.ops.library import looked_at
from kdkernels.ops.scalars import remembers

Plan = TypeVar("Plan")
_ABOUT = operator.attrgetter("shape", "layout", "dtype", "device", "requires_grad")
KEPT = 4096  # plans of one kind; then they are forgotten, and worked out anew


def remembered(make: Callable[..., Plan]) -> Callable[..., Plan]:
    """`make(tensors, *options)`, remembered: at small sizes checking and planning would take longer than computing.

    It may look at everything about the tensors but their values, at which backend is asked for, and at whether gradients
    are on. What it raises is not kept.
    """
    known: dict[Any, Plan] = {}

    @functools.wraps(make)
    def plan(tensors: tuple[torch.Tensor, ...], *options: Any) -> Plan:
        if looked_at(*tensors):
            return make(tensors, *options)
        try:
            # With the options' types, for 1, 1.0 and True are equal.
            # backends.requested(), which here needs not ask whether this is traced.
            backend = backends.forced.get() or backends.environment
            asked = backend, torch.is_grad_enabled(), options, *map(type, options)
            key = *asked, *map(_ABOUT, tensors), *map(torch.Tensor.stride, tensors)
            found = known.get(key)
        except (TypeError, RuntimeError):  # an option has no hash, or a tensor no strides
            return make(tensors, *options)
        if found is None:
            found = make(tensors, *options)
            if remembers(options):
                if len(known) >= KEPT:
                    known.clear()
                known[key] = found
        return found

    return plan
