"""What turns a loss function into an nn.Module that remembers its options."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch


class LossModule(torch.nn.Module):
    """Base of the loss modules: `Loss(**options)(*tensors)` is `function(*tensors, **options)`.

    Options are the function's keyword-only arguments. An nn.Parameter (a learnable temperature)
    becomes a parameter of the module and a tensor a buffer, so that both move and save with it.

    Raises:
        TypeError: for an option that the function does not have.
    """

    function: ClassVar[Callable[..., torch.Tensor]]

    def __init__(self, **options: Any):
        super().__init__()
        known = inspect.signature(self.function).parameters
        for name, value in options.items():
            if name not in known or known[name].kind is not inspect.Parameter.KEYWORD_ONLY:
                raise TypeError(f"{type(self).__name__} has no option {name!r}")
            if isinstance(value, torch.nn.Parameter):
                self.register_parameter(name, value)
            elif isinstance(value, torch.Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        self._options = tuple(options)

    def forward(self, *tensors: torch.Tensor | None, **options: Any) -> torch.Tensor:
        """The loss of these tensors; keyword arguments override the module's options for one call."""
        return self.function(*tensors, **{**{name: getattr(self, name) for name in self._options}, **options})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._options)
