"""What turns a loss function into an nn.Module that remembers its options."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch


class LossModule(torch.nn.Module):
    """Base of the loss modules: `Loss(**options)(*tensors)` is `function(*tensors, **options)`.

    Options are the function's keyword-only arguments, and those that default to a number. An nn.Parameter (a learnable
    temperature) becomes a parameter of the module and a tensor a buffer, so that both move and save with it.

    Raises:
        TypeError: for an option without a name, or one that the function does not have.
    """

    function: ClassVar[Callable[..., torch.Tensor]]

    def __init__(self, *unnamed: Any, **options: Any):
        super().__init__()
        kind = type(self).__name__
        arguments = inspect.signature(self.function).parameters
        known = [n for n, p in arguments.items() if p.kind is p.KEYWORD_ONLY or isinstance(p.default, (int, float))]
        if unnamed:
            got = "a tensor" if isinstance(unnamed[0], torch.Tensor) else repr(unnamed[0])
            raise TypeError(
                f"{kind} takes its options by name, and tensors when it is called, {kind}()(...); got {got}"
            )
        for name, value in options.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
                raise TypeError(f"{kind} has no option {name!r}; {hint}")
            if isinstance(value, torch.nn.Parameter):
                self.register_parameter(name, value)
            elif isinstance(value, torch.Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        self._arguments, self._options = tuple(arguments), tuple(options)

    def forward(self, *tensors: Any, **options: Any) -> torch.Tensor:
        """The loss of these tensors; arguments of a call override the module's options."""
        given = (*self._arguments[: len(tensors)], *options)
        kept = {name: getattr(self, name) for name in self._options if name not in given}
        return self.function(*tensors, **kept, **options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._options)
