"""Arguments held to their annotations, where some microseconds more are nothing: constructors, and calls once a run or a step.

The losses do not use it: each says itself what it takes, with its own words and at next to no cost (checks.py).
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from kdkernels import checks

F = TypeVar("F", bound=Callable[..., Any])


def takes(hint: Any, value: Any) -> bool:
    """Whether an annotation takes a value. True is no number; what an iterator holds is not looked at."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or isinstance(hint, TypeVar):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(takes(one, value) for one in inner)
    if hint is None or hint is types.NoneType:
        return value is None
    if hint in (int, float):
        return checks.whole(value) if hint is int else checks.real(value)
    if origin is tuple:
        return isinstance(value, tuple) and len(value) == len(inner) and all(map(takes, inner, value))
    if origin in (Sequence, Iterable):
        if (
            isinstance(value, (str, bytes, Mapping))
            or hasattr(value, "__array__")
            or not isinstance(value, (origin, nn.ModuleList))
        ):
            return False
        return not isinstance(value, (list, tuple)) or all(takes(inner[0], one) for one in value)
    return isinstance(value, origin or hint)


def kind(value: Any) -> str:
    """The type of a value, and of what a list or a tuple holds."""
    inner = dict.fromkeys(map(kind, value)) if isinstance(value, (list, tuple)) else ()
    return type(value).__name__ + (f" of {', '.join(inner)}" if inner else "")


def typed(function: F) -> F:
    """Refuses an argument that its annotation does not take, by its name."""
    signature = inspect.signature(function)

    @functools.cache
    def hints() -> dict[str, Any]:
        given = {p.name: p.annotation for p in signature.parameters.values() if p.annotation is not p.empty}
        return {name: eval(x, function.__globals__) if isinstance(x, str) else x for name, x in given.items()}

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            try:
                given = signature.bind(*args, **kwargs).arguments
            except TypeError:
                return function(*args, **kwargs)  # in whose name Python says what is missing, or too much
            for name, value in given.items():
                parameter = signature.parameters[name]
                if name not in hints() or parameter.kind is parameter.VAR_KEYWORD:
                    continue
                for one in value if parameter.kind is parameter.VAR_POSITIONAL else (value,):
                    if not takes(hints()[name], one):
                        raise TypeError(f"{name} must be {parameter.annotation}, got {kind(one)}")
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]
