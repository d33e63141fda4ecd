"""Wrong arguments, and usual ones in an unusual form: which there are, and what a call may do with one.

What is tried follows from a signature: everything that is in THINGS for each argument, and for a tensor, or a sequence,
also what was good with something wrong in it. A call must then either raise an error that names the argument, before
anything is launched, or return what is right: its annotation takes the value, or the value is a number as another type.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from kdkernels import BackendError, backends

ERRORS = (TypeError, ValueError, IndexError, KeyError, BackendError)
F32 = torch.float32

# Made anew for each call: nobody is to see what another one did with them.
THINGS: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "False": lambda: False,
    "words": lambda: "words",
    "bytes": lambda: b"words",
    "an empty list": list,
    "a list of words": lambda: ["words"],
    "a list of None": lambda: [None, None],
    "a dictionary": lambda: {"words": 1},
    "an object": object,
    "a function": lambda: lambda *args, **kwargs: None,
    "a dtype": lambda: F32,
    "NaN": lambda: math.nan,
    "infinity": lambda: math.inf,
    "minus infinity": lambda: -math.inf,
    "minus one": lambda: -1,
    "zero": lambda: 0,
    "one": lambda: 1,
    "one half": lambda: 0.5,
    "a huge number": lambda: 1e12,
    "a huge integer": lambda: 10**30,
    "a complex number": lambda: 1j,
    "a number of numpy": lambda: np.float64(0.5),
    "a short number of numpy": lambda: np.float32(0.5),
    "an integer of numpy": lambda: np.int64(1),
    "a boolean of numpy": lambda: np.bool_(True),
    "an array of words": lambda: np.array(["mean", "words"]),
    "a tensor with a number": lambda: torch.tensor(0.5),
    "a tensor with an integer": lambda: torch.tensor(1),
    "a tensor with a boolean": lambda: torch.tensor(True),
    "a tensor with one element": lambda: torch.tensor([0.5]),
    "a tensor with NaN": lambda: torch.tensor(math.nan),
    "a tensor with a complex number": lambda: torch.tensor(1j),
    "a tensor that learns": lambda: torch.tensor(0.5, requires_grad=True),
    "a tensor of three": lambda: torch.tensor([0.5, 1.0, 2.0]),
    "a tensor of booleans": lambda: torch.tensor([True, False]),
    "an empty tensor": lambda: torch.zeros(0),
    "a number elsewhere": lambda: torch.tensor(0.5, device="meta"),
    "a sparse number": lambda: torch.tensor(0.5).to_sparse(),
}
OF_TENSOR: dict[str, Callable[[torch.Tensor], Any]] = {
    "with no rows": lambda x: x[:0],
    "with a row less": lambda x: x[1:],
    "with a column less": lambda x: x[..., 1:],
    "with an axis more": lambda x: x.unsqueeze(0),
    "as integers": lambda x: torch.zeros_like(x, dtype=torch.int64),
    "as floats": lambda x: torch.zeros_like(x, dtype=F32),
    "as booleans": lambda x: torch.zeros_like(x, dtype=torch.bool),
    "as complex numbers": lambda x: torch.zeros_like(x, dtype=torch.complex64),
    "elsewhere": lambda x: x.to("meta"),
    "made sparse": lambda x: x.to_sparse(),
    "with far indices": lambda x: x if x.is_floating_point() else torch.full_like(x, 10**6),
    "with negative indices": lambda x: x if x.is_floating_point() else torch.full_like(x, -7),
}


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotation of every argument that has a name; a constructor's for a class."""
    made = inspect.unwrap(function.__init__ if isinstance(function, type) else function)  # type: ignore[misc]
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    given = {p.name: p.annotation for p in inspect.signature(function).parameters.values() if p.kind in named}
    return {name: eval(x, made.__globals__) if isinstance(x, str) else x for name, x in given.items()}


def takes(hint: Any, value: Any) -> bool:
    """Whether an annotation takes a value, as a type checker would say."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or isinstance(hint, typing.TypeVar):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(takes(one, value) for one in inner)
    if hint is None or hint is types.NoneType:
        return value is None
    if hint is float:
        return isinstance(value, (int, float))
    if hint is nn.Module or origin is Callable:
        return callable(value)  # a function will do where a module is called
    if origin is tuple:
        return isinstance(value, tuple) and len(value) == len(inner) and all(map(takes, inner, value))
    if origin in (Sequence, Iterable, list):
        return isinstance(value, (list, tuple)) and all(takes(inner[0], one) for one in value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(takes(inner[0], k) and takes(inner[1], v) for k, v in value.items())
    return isinstance(value, origin or hint)


def plain(value: Any) -> Any:
    """The number that a value is in another form, or None where it is no number, or a plain one."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, torch.Tensor) and value.numel() == 1 and value.device.type == "cpu":
        return value.detach().to_dense().item()
    return int(value) if isinstance(value, bool) else None


def moderate(value: Any) -> bool:
    """Whether what is computed from it should be finite."""
    if isinstance(value, torch.Tensor) and value.device.type == "cpu":
        return not value.to_dense().isnan().any()
    return not isinstance(value, (int, float)) or abs(value) < 1e9


def replacements(function: Callable[..., Any], good: Mapping[str, Any]) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """(argument, what, how to make it) of everything to try."""
    for name in hints_of(function):
        yield from ((name, what, make) for what, make in THINGS.items())
        x = good.get(name)
        if isinstance(x, torch.Tensor):
            for what, change in OF_TENSOR.items():
                yield name, f"itself {what}", lambda change=change, x=x: change(x)
                yield name, f"a list of itself {what}", lambda change=change, x=x: [change(x)]
        elif isinstance(x, (list, tuple)) and x:
            yield name, "itself with one less", lambda x=x: x[1:]
            yield name, "itself with one more", lambda x=x: [*x, x[0]]
            yield name, "itself with None", lambda x=x: [None, *x[1:]]
            yield name, "itself with words", lambda x=x: ["words", *x[1:]]


class Launches:
    """Counts the kernels that are called."""

    def __init__(self, monkeypatch: Any) -> None:
        self.count = 0
        library = backends.library("cpu")
        call = library.call

        def counting(name: str, *args: Any) -> None:
            self.count += 1
            call(name, *args)

        monkeypatch.setattr(library, "call", counting)


def trouble(
    function: Callable[..., Any],
    good: Mapping[str, Any],
    argument: str,
    make: Callable[[], Any],
    *,
    also: Sequence[str] = (),
    launches: Launches | None = None,
) -> str | None:
    """What is wrong with how a call takes one argument, or None.

    Args:
        also: what an error may name instead where the value is of the right type, and at odds with another argument.
    """
    value, hint, before = make(), hints_of(function)[argument], launches.count if launches else 0
    twin = value.item() if isinstance(value, np.number) else value  # numpy's numbers must do where Python's do
    try:
        found = function(**{**good, argument: value})
    except ERRORS as error:
        words = str(error)
        names = [argument] if not takes(hint, twin) else [*hints_of(function), *also]
        if not re.search("|".join(rf"\b{name}\b" for name in names), words):
            return f"{type(error).__name__} without its name: {words[:160]}"
        # Indices the CPU kernel of the scores looks at itself, before it writes anything (test_errors.py).
        if twin is not value:
            with contextlib.suppress(*ERRORS):
                function(**{**good, argument: twin})
                return f"refused, while {twin!r} is taken: {words[:160]}"
        if launches and launches.count > before and not isinstance(error, IndexError):
            return f"{type(error).__name__} after a launch: {words[:160]}"
        return None
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:160]}"
    if isinstance(found, torch.Tensor) and found.device.type == "cpu" and found.isnan().any() and moderate(value):
        return "NaN"
    given = [x for x in (value if isinstance(value, list) else [value]) if isinstance(x, torch.Tensor)]
    if any(x.is_complex() or x.device != found.device for x in given if isinstance(found, torch.Tensor)):
        return "taken without a word"
    number = plain(value)
    if number is None or not takes(hint, number):
        return None if takes(hint, value) else "taken without a word"
    try:
        expected = function(**{**good, argument: number})
    except ERRORS as error:
        return f"taken, while {number!r} is refused: {str(error)[:160]}"
    if isinstance(found, torch.Tensor) and isinstance(expected, torch.Tensor) and not torch.equal(found, expected):
        if found.shape != expected.shape:
            return f"of shape {tuple(found.shape)}, while {number!r} gives {tuple(expected.shape)}"
        close = torch.allclose(found, expected, rtol=1e-5, atol=1e-7, equal_nan=True)
        return None if close else f"{found.tolist()}, while {number!r} gives {expected.tolist()}"
    return None
