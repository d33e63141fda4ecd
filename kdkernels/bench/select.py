"""Which cases, dtypes and devices a command is about."""

from __future__ import annotations

import fnmatch

import torch

from kdkernels import backends
from kdkernels.bench.inputs import DTYPES
from kdkernels.console import UsageError
from kdkernels.ops.registry import Case, Spec, specs


def devices() -> list[torch.device]:
    """One of each kind that is here."""
    return [torch.device(kind) for kind in ("cpu", "cuda") if kind == "cpu" or torch.cuda.is_available()]


def default_device() -> torch.device:
    return devices()[-1]


def device(name: str) -> torch.device:
    """A device by its name.

    Raises:
        UsageError: it is none, or it is not here.
    """
    try:
        found = torch.device(name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0].rstrip(".")
        raise UsageError(f"device {name!r} cannot be used ({why}); `kdkernels info` says what is here") from None
    return found


def backend(name: str | None, device: torch.device) -> str | None:
    """One backend to time, or None for all that run on the device.

    Raises:
        UsageError: it does not exist, cannot run there, or is what the others are timed against.
    """
    if name in (None, "auto"):
        return None
    if name == "reference":
        raise UsageError(
            "backend 'reference' is not timed: it is written to be right, and plain PyTorch is in every row"
        )
    if reason := backends.unavailable(name, device.type):
        raise UsageError(f"backend {name!r} cannot be timed: {reason}")
    return name


def cases(family: str | None = None, pattern: str = "*") -> list[tuple[Spec, Case]]:
    """The cases of a family (all without one) whose names match.

    Raises:
        UsageError: for a family that does not exist.
    """
    known = specs()
    if family is not None and family not in [s.family for s in known]:
        raise UsageError(f"unknown family {family!r}: choose one of {', '.join(s.family for s in known)}")
    chosen = [s for s in known if family in (None, s.family)]
    return [(s, c) for s in chosen for c in s.cases if fnmatch.fnmatchcase(c.name, pattern)]


def dtypes(wanted: str | None, default: tuple[torch.dtype, ...]) -> tuple[torch.dtype, ...]:
    """The dtypes of a comma-separated list.

    Raises:
        UsageError: for a name that is not one.
    """
    if not wanted:
        return default
    names = wanted.split(",")
    for name in names:
        if name not in DTYPES:
            raise UsageError(f"unknown dtype {name!r}: choose among {', '.join(DTYPES)}")
    return tuple(DTYPES[n] for n in names)
